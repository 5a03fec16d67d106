"""What the tests of training share: ranks as torchrun starts them, models, and training with and without a plan."""

import os
import socket

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F  # noqa: N812
from torch.utils.checkpoint import checkpoint

import shardwright as sw
from shardwright.profiler.profile import Device
from shardwright.profiler.workers.pool import Pool, Worker, WorkerError


@pytest.fixture(scope="module")
def workers():
    """Four processes that stand for those of torchrun."""
    core = (min(os.sched_getaffinity(0)),) if hasattr(os, "sched_getaffinity") else ()
    devices = [Device(name=f"cpu:{i}", kind="cpu", description="", memory_bytes=10**9, cores=core) for i in range(4)]
    with Pool(devices) as pool:
        yield pool


def on_ranks(pool, count, function, *args):
    """What ``function(*args)`` returns on each of ``count`` ranks, as torchrun would start them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    calls = {f"cpu:{rank}": (as_rank, (rank, count, port, function, args)) for rank in range(count)}
    try:
        return list(pool.call(calls, limit_s=60).values())
    except WorkerError:  # one that is stuck would take the tests to come along
        for name in calls:
            pool.workers[name].close()
            pool.workers[name] = Worker(pool.workers[name].device)
        raise


def as_rank(rank, count, port, function, args):
    cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    try:
        return function(*args)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
        if cores is not None:
            os.sched_setaffinity(0, cores)


class Chain(nn.Module):
    """Layers in a row."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(*[nn.Linear(6, 6) for _ in range(6)])

    def forward(self, x):
        return self.layers(x)

    @staticmethod
    def batch(seed, size=8):
        made = torch.Generator().manual_seed(seed)
        return (torch.randn(size, 6, generator=made),), {}, torch.randn(size, 6, generator=made)

    loss = staticmethod(F.mse_loss)


class Branches(nn.Module):
    """Skips, an integer keyword, a parameter and a buffer outside units, a frozen unit, a dictionary of results."""

    def __init__(self):
        super().__init__()
        self.left = nn.ModuleList([nn.Linear(6, 6) for _ in range(3)])
        self.right = nn.ModuleList([nn.Linear(6, 6) for _ in range(3)])
        self.right[0].requires_grad_(False)
        self.gain = nn.Parameter(torch.rand(6))
        self.register_buffer("shift", torch.rand(6))
        self.heads = nn.ModuleDict({"rows": nn.Linear(12, 4), "sum": nn.Linear(6, 1)})

    def forward(self, x, *, index, scale=1.0):
        left, right = x, x
        for a, b in zip(self.left, self.right, strict=True):
            left, right = a(left).relu() + right, b(right).tanh()
        rows = self.heads["rows"](torch.cat([left, right * self.gain + self.shift], dim=1))
        return {"rows": torch.gather(rows, 1, index), "sum": self.heads["sum"](left) * scale}

    @staticmethod
    def batch(seed, size=8):
        made = torch.Generator().manual_seed(seed)
        index = torch.randint(0, 4, (size, 2), generator=made)
        return (torch.randn(size, 6, generator=made),), {"index": index}, torch.randn(size, 2, generator=made)

    @staticmethod
    def loss(output, target):
        return F.mse_loss(output["rows"], target) + output["sum"].square().mean()


class Language(nn.Module):
    """A tied embedding and head, dropout at rest in evaluation only."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.layers = nn.ModuleList([nn.Linear(6, 6) for _ in range(4)])
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight
        self.unused = nn.Linear(2, 2)

    def forward(self, ids):
        x = self.embed(ids)
        for layer in self.layers:
            x = x + layer(x).tanh()
        return self.head(x)

    @staticmethod
    def batch(seed, size=8):
        made = torch.Generator().manual_seed(seed)
        ids = torch.randint(0, 11, (size, 5), generator=made)
        return (ids[:, :-1].contiguous(),), {}, ids[:, 1:].contiguous()

    @staticmethod
    def loss(output, target):
        return F.cross_entropy(output.flatten(0, 1), target.flatten())


class Checkpointed(Language):
    """Its layers are computed anew in the backward: two by themselves, two together, of the reentrant kind."""

    def pair(self, x):
        for layer in self.layers[2:]:
            x = x + layer(x).tanh()
        return x

    def forward(self, ids):
        x = self.embed(ids)
        for layer in self.layers[:2]:
            x = x + checkpoint(layer, x, use_reentrant=False).tanh()
        return self.head(checkpoint(self.pair, x, use_reentrant=True))


def made(kind):
    torch.manual_seed(0)
    return kind()


def planned(captured_profile, kind, stages, microbatches=4, pieces=1, replicas=1, **options):
    """A plan of ``kind`` over exactly ``stages`` devices, with ``pieces`` stages on each; or so many ``replicas``."""
    args, kwargs, _ = kind.batch(0)
    devices = [f"cpu:{i}" for i in range(stages * replicas)]
    parted = options.get("schedule") == "zero-bubble"
    profile = captured_profile(
        made(kind), args, kwargs, devices=devices, microbatches=(1, microbatches), optimizer="adamw", parted=parted
    )
    if pieces > 1:
        options |= {"schedule": "interleaved", "stages_per_device": pieces}
    plan = sw.plan(profile, microbatches=microbatches, replicas=replicas, **options)
    assert (plan.replicas, plan.depth, len(plan.stages)) == (replicas, stages, pieces * stages)
    return plan


def made_pipe(kind, plan, **options):
    args, kwargs, _ = kind.batch(0)
    return sw.pipeline(made(kind), plan, args, kwargs, **{"loss": kind.loss, "timeout_s": 20.0} | options)


def adamw(module):
    return torch.optim.AdamW(module.parameters(), lr=0.01, weight_decay=0.1)


def plain_step(model, optimizer, seeds, clip=None):
    """A step of the unsharded model on one or several batches: the last loss, and the gradients' norm."""
    optimizer.zero_grad()
    for seed in seeds:
        args, kwargs, target = type(model).batch(seed)
        loss = type(model).loss(model(*args, **kwargs), target)
        loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), clip) if clip else torch.zeros(())
    optimizer.step()
    return float(loss.detach()), float(norm)


def piped_step(kind, pipe, optimizer, seeds, clip=None):
    """The same of a pipeline."""
    optimizer.zero_grad()
    for seed in seeds:
        args, kwargs, target = kind.batch(seed)
        loss = pipe.step(*args, target=target, **kwargs)
    norm = pipe.clip_grad_norm_(clip) if clip else torch.zeros(())
    optimizer.step()
    return float(loss), float(norm)


def unsharded(kind, steps, **options):
    """Losses and norms of the unsharded model, and the model."""
    model = made(kind)
    optimizer = adamw(model)
    return [plain_step(model, optimizer, seeds, **options) for seeds in steps], model


def close(found, expected):
    return all(a == pytest.approx(b, rel=1e-5, abs=1e-6) for a, b in zip(found, expected, strict=True))


def sizes(kind, plan, batches):
    """In a rank: losses of batches of other sizes in training and evaluation, results, and what of one is refused."""
    pipe = made_pipe(kind, plan)
    optimizer, found = adamw(pipe), []
    for seed, size in batches:
        args, kwargs, target = kind.batch(seed, size)
        evaluated = float(pipe.evaluate(*args, target=target, **kwargs))
        optimizer.zero_grad()
        loss = float(pipe.step(*args, target=target, **kwargs))
        optimizer.step()
        found.append((evaluated, loss, pipe(*args, **kwargs)))
    return found


@pytest.fixture
def alone(monkeypatch):
    """An ordinary process, without what torchrun sets; pipelines are left at the end."""
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    yield
    if dist.is_initialized():
        dist.destroy_process_group()
