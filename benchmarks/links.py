"""What a transfer costs inside a running pipeline, against what the links say that it costs.

Two CPU workers run two pipelines of the same compute in turn, under 1F1B on PyTorch's engine. In one a wide tensor
crosses the cut, in the other a single number a sample; the difference of their steps is what the transfers cost.
Between them the link is timed, idle and with both ends sending, and each price is put into the planner's simulation.

    python benchmarks/links.py --rounds 12
"""

import argparse
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B

from shardwright.profiler.devices import find_devices
from shardwright.profiler.links import fit, join, one_way
from shardwright.profiler.measure import prepare
from shardwright.profiler.measuring.messages import exchange, ping_pong
from shardwright.profiler.workers import worker
from shardwright.profiler.workers.pool import Pool
from shardwright.sharder.planning.schedules.simulate import StageCost, simulate

SIZES = (1 << 16, 1 << 18, 1 << 20, 9 << 18, 1 << 22)
"""Bytes of one micro-batch that cross; 9 << 18 is what crosses in examples/containers.py:Net, by 8 micro-batches."""
MICROBATCHES = 8
SAMPLES = 2
"""Of one micro-batch."""
WIDTH = 256
LIMIT_S = 120.0


class Work(nn.Module):
    """Some matrix products, the same whatever crosses the cut."""

    def __init__(self, products: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH) / WIDTH**0.5)
        self.start = nn.Buffer(torch.randn(WIDTH, WIDTH))
        self.products = products

    def forward(self, x: Tensor) -> Tensor:
        """A number that depends on all of ``x``."""
        y = self.start + x.mean()
        for _ in range(self.products):
            y = torch.tanh(y @ self.weight)
        return y.mean()


class First(nn.Module):
    """Makes the wide tensor, and sends all of it, or one column."""

    def __init__(self, width: int, products: int, *, wide: bool) -> None:
        super().__init__()
        self.work = Work(products)
        self.base = nn.Parameter(torch.randn(width))
        self.columns = width if wide else 1

    def forward(self, x: Tensor) -> Tensor:
        """Samples by ``width``, or by one."""
        return (self.base + self.work(x) + x)[:, : self.columns].contiguous()


class Second(nn.Module):
    """Computes on a wide tensor, whatever came in."""

    def __init__(self, width: int, products: int) -> None:
        super().__init__()
        self.work = Work(products)
        self.base = nn.Parameter(torch.randn(width))

    def forward(self, x: Tensor) -> Tensor:
        """Samples by one."""
        y = x + self.base
        return (self.work(y) * y).mean(1, keepdim=True)


def hold(rank: int, size: int, products: int) -> None:
    """Take in this worker's stage of both pipelines."""
    width = size // SAMPLES // torch.float32.itemsize
    for wide in (True, False):
        module = First(width, products, wide=wide) if rank == 0 else Second(width, products)
        crossing = torch.zeros(SAMPLES, width if wide else 1, device="meta", requires_grad=True)
        number = torch.zeros(SAMPLES, 1, device="meta")
        inputs, outputs = (number, crossing) if rank == 0 else (crossing, number)
        stage = PipelineStage(module, rank, 2, torch.device("cpu"), input_args=(inputs,), output_args=(outputs,))
        schedule = Schedule1F1B(stage, MICROBATCHES, loss_fn=lambda output, _: output.square().mean())
        worker.resident["wide" if wide else "thin"] = (schedule, module)


def step(rank: int, which: str) -> float:
    """One step of the ``which`` pipeline without an update, begun together; seconds."""
    schedule, module = worker.resident[which]
    batch = torch.ones(MICROBATCHES * SAMPLES, 1)
    dist.all_reduce(torch.zeros(1))
    start = time.perf_counter()
    module.zero_grad()
    schedule.step(*([batch] if rank == 0 else []), target=batch if rank else None, return_outputs=False)
    return time.perf_counter() - start


def prices(pool: Pool, names: list[str]) -> dict[str, tuple[Callable[[int], float], Callable[[int], float]]]:
    """Seconds that a message of so many bytes takes there and back, as each candidate for the planner says."""
    a, b = names
    turns = pool.call({a: (ping_pong, (1, True)), b: (ping_pong, (0, False))}, limit_s=LIMIT_S)
    both = pool.call({a: (exchange, (1, 1)), b: (exchange, (0, 0))}, limit_s=LIMIT_S)
    idle = [fit(one_way(turns[a], turns[b])), fit(one_way(turns[b], turns[a]))]
    busy = [fit(both[b]), fit(both[a])]

    def price(line: tuple[float, float], share: float) -> Callable[[int], float]:
        return lambda size: share * (line[0] + size / line[1])

    return {
        "idle": (price(idle[0], 1.0), price(idle[1], 1.0)),
        "half of busy": (price(busy[0], 0.5), price(busy[1], 0.5)),
        "busy": (price(busy[0], 1.0), price(busy[1], 1.0)),
    }


def simulated_s(thin_s: float, there_s: float, back_s: float) -> float:
    """A step of two stages that takes ``thin_s`` without transfers: a third of it is forward."""
    compute_s = thin_s / (MICROBATCHES + 1)
    stage = StageCost(compute_s / 3, compute_s * 2 / 3)
    first = StageCost(compute_s / 3, compute_s * 2 / 3, send_forward_s=there_s, receive_backward_s=back_s)
    return simulate([first, stage], MICROBATCHES).step_s


def main() -> None:
    """Print one row a size: the measured cost of a message, and what each price says of it."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=12, help="of steps and messages in turn, for each size")
    parser.add_argument("--steps", type=int, default=5, help="of each pipeline in a round")
    parser.add_argument("--products", type=int, default=3, help="matrix products of a stage: its compute")
    options = parser.parse_args()
    devices = find_devices("cpu:0,cpu:1")
    names = [device.name for device in devices]
    print("| bytes | step without | with transfers | a message | idle says | half of busy | busy |")
    print("|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder, Pool(devices) as pool:
        pool.call({d.name: (prepare, (d.name, len(d.cores))) for d in devices}, limit_s=LIMIT_S)
        store = str(Path(folder) / "store")
        pool.call({name: (join, (i, 2, store)) for i, name in enumerate(names)}, limit_s=LIMIT_S)
        for size in SIZES:
            pool.call({name: (hold, (i, size, options.products)) for i, name in enumerate(names)}, limit_s=LIMIT_S)
            print(row(pool, names, size, options), flush=True)
    print(f"torch {torch.__version__}, Python {platform.python_version()}, {devices[0].description}")
    print(f"{datetime.now(UTC):%Y-%m-%d}")


def row(pool: Pool, names: list[str], size: int, options: argparse.Namespace) -> str:
    """Medians over the rounds; ratios are taken within a round, in which the machine is the same."""

    def stepped(which: str) -> float:
        return max(pool.call({n: (step, (i, which)) for i, n in enumerate(names)}, limit_s=LIMIT_S).values())

    thin, wide, costs = [], [], []
    said: dict[str, list[float]] = {}
    for number in range(options.rounds + 1):
        times = [(stepped("thin"), stepped("wide")) for _ in range(options.steps)]
        if number == 0:
            continue
        thin_s, wide_s = (statistics.median(each) for each in zip(*times, strict=True))
        thin.append(thin_s)
        wide.append(wide_s)
        costs.append(wide_s - thin_s)
        for name, (there, back) in prices(pool, names).items():
            extra_s = simulated_s(thin_s, there(size), back(size)) - simulated_s(thin_s, there(4), back(4))
            said.setdefault(name, []).append(extra_s)
    median = statistics.median(costs)
    messages = 2 * MICROBATCHES
    low, _, high = statistics.quantiles(costs, n=4)
    cells = [
        f"{size / 2**20:.3g} MiB",
        f"{statistics.median(thin) * 1e3:.1f} ms",
        f"{statistics.median(wide) * 1e3:.1f} ms",
        f"{median / messages * 1e6:.0f} us ({low / messages * 1e6:.0f} to {high / messages * 1e6:.0f})",
        *(
            f"{statistics.median(each) / messages * 1e6:.0f} us ({statistics.median(each) / median:.2f}x)"
            for each in said.values()
        ),
    ]
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
