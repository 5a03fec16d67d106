"""A small character language model, trained on this repository's LICENSE by a plan, or without one.

    shardwright profile examples/train_lm.py:CharacterModel --devices cpu:0,cpu:1 --out lm.profile.json
    shardwright shard examples/train_lm.py:CharacterModel --profile lm.profile.json --out lm.plan.json
    torchrun --nproc-per-node 2 examples/train_lm.py --plan lm.plan.json --steps 50 --save lm-50

and on one device again, with the same profile:

    shardwright shard examples/train_lm.py:CharacterModel --profile lm.profile.json --pin "*=cpu:0" --out one.plan.json
    python examples/train_lm.py --plan one.plan.json --resume lm-50 --steps 50

Without `--plan` the whole model trains in one process, with the same losses. What `shardwright` takes in a training
script are the lines with `pipe`.
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

import shardwright as sw

TEXT = Path(__file__).parents[1] / "LICENSE"
CHARACTERS = 128
WIDTH, HEADS, LAYERS = 64, 4, 6
BATCH, LENGTH = 16, 64


class Block(nn.Module):
    """Causal attention and a feed-forward layer, each beside a shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attend = nn.Linear(WIDTH, 3 * WIDTH)
        self.project = nn.Linear(WIDTH, WIDTH)
        self.feed = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, T, WIDTH) to the same shape."""
        heads = self.attend(self.norm1(x)).unflatten(-1, (3, HEADS, -1)).transpose(1, 3)
        found = F.scaled_dot_product_attention(*heads.unbind(2), is_causal=True)
        x = x + self.project(found.transpose(1, 2).flatten(2))
        return x + self.feed(self.norm2(x))


class CharacterModel(nn.Module):
    """Predicts the next character; the embedding's weight is the head's too."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(CHARACTERS, WIDTH)
        self.place = nn.Embedding(LENGTH, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, CHARACTERS, bias=False)
        nn.init.normal_(self.embed.weight, std=0.02)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        """Map characters (N, T) to logits (N, T, CHARACTERS)."""
        x = self.embed(ids) + self.place(torch.arange(ids.shape[1], device=ids.device))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))

    @staticmethod
    def sample_inputs() -> tuple[Tensor]:
        """A batch of characters."""
        return (batch(0)[0],)


def batch(step: int) -> tuple[Tensor, Tensor]:
    """Characters (BATCH, LENGTH) and those that follow; of a step, so every rank has the same and resuming is exact."""
    text = torch.frombuffer(bytearray(TEXT.read_bytes()), dtype=torch.uint8).long().clamp(max=CHARACTERS - 1)
    starts = torch.randint(0, len(text) - LENGTH, (BATCH, 1), generator=torch.Generator().manual_seed(step))
    windows = text[starts + torch.arange(LENGTH + 1)]
    return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()


def loss_of(logits: Tensor, target: Tensor) -> Tensor:
    """Mean cross-entropy of the characters, in nats."""
    return F.cross_entropy(logits.flatten(0, 1), target.flatten())


def train(plan: sw.Plan, steps: int, resume: Path | None, save: Path | None) -> None:
    """Train by a plan: this process is one stage."""
    pipe = sw.pipeline(CharacterModel(), plan, args=CharacterModel.sample_inputs(), loss=loss_of)
    optimizer = torch.optim.AdamW(pipe.parameters(), lr=3e-3)
    if resume is not None:
        pipe.load(resume, optimizer)
    first = int(next((state["step"] for state in optimizer.state.values()), 0))
    for step in range(first, first + steps):
        ids, target = batch(step)
        loss = pipe.step(ids, target=target)
        pipe.clip_grad_norm_(1.0)
        optimizer.step()
        optimizer.zero_grad()
        if pipe.stage == 0:
            print(f"step {step} loss {float(loss):.6f}", flush=True)
    if save is not None:
        pipe.save(save, optimizer)
    pipe.close()


def train_whole(steps: int) -> None:
    """Train the whole model in this process, for comparison."""
    model = CharacterModel()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(steps):
        ids, target = batch(step)
        loss = loss_of(model(ids), target)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step} loss {float(loss.detach()):.6f}", flush=True)


def main() -> None:
    """Read the options and train."""
    parser = argparse.ArgumentParser(description="Train a character language model on LICENSE.")
    parser.add_argument("--plan", type=Path, help="a plan's file; without it the whole model trains here")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--resume", type=Path, help="go on from this folder; needs a plan")
    parser.add_argument("--save", type=Path, help="write a checkpoint into this folder; needs a plan")
    options = parser.parse_args()
    torch.manual_seed(0)
    if options.plan is not None:
        train(sw.Plan.load(options.plan), options.steps, options.resume, options.save)
    elif options.resume is not None or options.save is not None:
        parser.error("--resume and --save need --plan")
    else:
        train_whole(options.steps)


if __name__ == "__main__":
    main()
