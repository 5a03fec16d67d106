"""What pipelining in one process gains: training steps of the plain model and of the pipelined one, in turn.

    python benchmarks/inprocess.py
    python benchmarks/inprocess.py --layers 8 --batch 16 --tokens 64 --width 256 --microbatches 4 8

A stack of transformer layers is placed on two CPU workers of one core each by ``place(model, plan, microbatches=n)``.
A step is forward, backward and the update of AdamW. Beside it are the plain model with one thread, which is what
each worker has, and with as many threads as there are workers, which use the same cores within each operator. In every
round each takes one step, in an order drawn anew; ratios are taken within rounds, and their medians and quartiles
printed. Before that the pipelined gradients are compared with the plain ones.
"""

import argparse
import copy
import platform
import random
import statistics
import time
from datetime import UTC, datetime

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

import shardwright as sw

DEVICES = ("cpu:0", "cpu:1")


def stack(layers: int, width: int) -> nn.Module:
    """Transformer layers without dropout, which would draw other numbers."""
    made = [nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True) for _ in range(layers)]
    return nn.Sequential(*made)


class Trained:
    """A model with its optimizer; each step is timed."""

    def __init__(self, model: nn.Module, threads: int) -> None:
        self.model = model
        self.threads = threads
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def step(self, x: torch.Tensor, y: torch.Tensor) -> float:
        """Seconds of one step."""
        torch.set_num_threads(self.threads)
        begin = time.perf_counter()
        self.optimizer.zero_grad()
        F.mse_loss(self.model(x), y).backward()
        self.optimizer.step()
        return time.perf_counter() - begin


def difference(one: nn.Module, other: nn.Module, x: torch.Tensor, y: torch.Tensor) -> float:
    """The largest difference of a gradient, over the largest value of that gradient."""
    for model in (one, other):
        model.zero_grad()
        F.mse_loss(model(x), y).backward()
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return max(float((p.grad - q.grad).abs().max() / p.grad.abs().max()) for p, q in pairs)


def main() -> None:
    """Print a row for each contender."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    for name, value in (("layers", 8), ("batch", 16), ("tokens", 64), ("width", 128), ("rounds", 11)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--microbatches", type=int, nargs="+", default=[4, 8])
    options = parser.parse_args()
    torch.manual_seed(0)
    model = stack(options.layers, options.width)
    x = torch.randn(options.batch, options.tokens, options.width)
    y = torch.randn_like(x)
    profile = sw.profile(model, (x,), devices=list(DEVICES), microbatches=[1, *options.microbatches], rounds=1)
    pins = {str(i): DEVICES[2 * i // options.layers] for i in range(options.layers)}
    plans = {count: sw.plan(profile, microbatches=count, pins=pins) for count in options.microbatches}
    contenders = {
        "plain, 1 thread": Trained(copy.deepcopy(model), 1),
        "plain, 2 threads": Trained(copy.deepcopy(model), 2),
    }
    for count, plan in plans.items():
        placed = sw.place(copy.deepcopy(model), plan, microbatches=count)
        print(f"{count} micro-batches: gradients differ by {difference(model, placed, x, y):.1e} at most")
        contenders[f"pipelined, {count} micro-batches"] = Trained(placed, 1)
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(options.rounds + 2):
        for name in random.sample([*contenders], len(contenders)):
            seconds = contenders[name].step(x, y)
            if number >= 2:  # after the warm-up
                times[name].append(seconds)
    print("| | step | speed over plain, 1 thread | over plain, 2 threads |")
    print("|---|---|---|---|")
    for name, own in times.items():
        cells = []
        for base in list(times)[:2]:
            ratios = [other / mine for mine, other in zip(own, times[base], strict=True)]
            low, middle, high = statistics.quantiles(ratios, n=4)
            cells.append(f"{middle:.2f} ({low:.2f} to {high:.2f})")
        print(f"| {name} | {statistics.median(own) * 1e3:.0f} ms | {cells[0]} | {cells[1]} |")
    print(f"torch {torch.__version__}, Python {platform.python_version()}, {profile.devices[0].description} each")
    print(f"{options.layers} layers of width {options.width}, batch {options.batch} of {options.tokens} tokens")
    print(f"{datetime.now(UTC):%Y-%m-%d}")


if __name__ == "__main__":
    main()
