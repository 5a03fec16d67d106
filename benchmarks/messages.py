"""What prompt messages are worth: steps of two small stages, each on its core, with and without them, in turn.

A step with all receives posted ahead, or with senders that give way, or with both, as prompt_stage.py of the runtime
has them, beside the same step with neither. The stages are alike: each has as much to do as the other waits for.

    python benchmarks/messages.py                        # four linear layers of 256 on micro-batches of 128 rows
    python benchmarks/messages.py --width 512 --layers 12

Columns: the forward of one micro-batch on a stage; the median step with neither, with quartiles; of the others, their
median as a multiple of it. The engine takes both by GPipe and in inference, neither by 1F1B.
"""

import argparse
import os
import socket
import statistics
import sys
import time
from datetime import UTC, datetime

import torch
import torch.distributed as dist
from torch import Tensor, multiprocessing, nn

from shardwright.sharder.runtime.piping.cut import StageProgram, TensorShape
from shardwright.sharder.runtime.piping.engine import make_schedule, make_stage

MODES = [(False, False), (False, True), (True, False), (True, True)]
"""Whether receives are posted ahead, and senders give way."""
WARMUP = 3


def main() -> None:
    """Time every kind of step with 4 and 16 micro-batches."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=128, help="of a micro-batch")
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4, help="of a stage")
    parser.add_argument("--steps", type=int, default=60, help="of each")
    asked = parser.parse_args()
    if len(os.sched_getaffinity(0)) < 2:
        sys.exit("the two stages need a core each, and this process has one")
    print("| step | micro-batches | forward | neither | giving way | receives ahead | both |")
    print("|---|---|---|---|---|---|---|", flush=True)
    for kind in ("inference", "gpipe", "1f1b"):
        for count in (4, 16):
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = free.getsockname()[1]
            multiprocessing.spawn(stage_of, (port, kind, count, asked), nprocs=2)  # type: ignore[no-untyped-call]
    print(f"\ntorch {torch.__version__}, {os.uname().sysname} {os.uname().release}, {os.cpu_count()} cores, ", end="")
    print(datetime.now(UTC).date())


def stage_of(rank: int, port: int, kind: str, count: int, asked: argparse.Namespace) -> None:
    """Be one of the two stages; the first prints the row."""
    os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[rank]})
    torch.set_num_threads(1)
    torch.manual_seed(0)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    train = kind != "inference"
    module = nn.Sequential(*[nn.Linear(asked.width, asked.width) for _ in range(asked.layers)])
    crossing = (TensorShape("x", (asked.rows, asked.width), torch.float32, requires_grad=train),)
    stage = make_stage(StageProgram(rank, (), {}, crossing, crossing), module, 2, torch.device("cpu"))
    post_all, giving_way = stage._post_all, stage._giving_way
    loss = mean_square if train else None
    schedule = make_schedule([stage], "1f1b" if kind == "1f1b" else "gpipe", count, loss, [True])
    batch, target = torch.randn(count * asked.rows, asked.width), torch.zeros(count * asked.rows)
    inputs, last = [batch] * (rank == 0), {"target": target} if train and rank else {}

    def step() -> float:
        dist.barrier()
        start = time.perf_counter()
        with torch.set_grad_enabled(train):
            schedule.step(*inputs, **last, return_outputs=False)
        dist.barrier()
        return time.perf_counter() - start

    found: dict[tuple[bool, bool], list[float]] = {mode: [] for mode in MODES}
    stage.prompt = True
    for number in range(WARMUP + asked.steps):
        turn = number % len(MODES)
        for mode in [*MODES[turn:], *MODES[:turn]]:
            stage._post_all = post_all if mode[0] else lambda: None  # type: ignore[method-assign]
            stage._giving_way = giving_way if mode[1] else lambda operations: operations  # type: ignore[method-assign]
            seconds = step()
            if number >= WARMUP:
                found[mode].append(seconds)
    start = time.perf_counter()
    with torch.no_grad():
        for _ in range(asked.steps):
            module(batch[: asked.rows])
    forward_s = (time.perf_counter() - start) / asked.steps
    if rank == 0:
        neither = found[MODES[0]]
        low, middle, high = statistics.quantiles(neither, n=4)
        ratios = {mode: statistics.median(seconds) / middle for mode, seconds in found.items()}
        spread = f"{1e3 * middle:.1f} ms ({1e3 * low:.1f} to {1e3 * high:.1f})"
        cells = [kind, str(count), f"{1e3 * forward_s:.2f} ms", spread]
        cells += [f"{ratios[mode]:.2f}" for mode in MODES[1:]]
        print(f"| {' | '.join(cells)} |", flush=True)
    dist.destroy_process_group()


def mean_square(output: Tensor, _target: Tensor) -> Tensor:
    """A loss."""
    return output.square().mean()


if __name__ == "__main__":
    main()
