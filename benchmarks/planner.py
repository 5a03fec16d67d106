"""How near plans are to the best there is, and how long they take: ours and three others on the same graphs.

    python benchmarks/planner.py --quick          # a minute
    python benchmarks/planner.py                  # the whole; pip install torchgpipe accelerate for their columns

A row is a graph of units in training on devices with links between them all. Times and sizes are drawn by seed, with
heavy tails as real models have them. Printed is the largest load of a stage, which is the time of a step once the
pipeline is full, over the bound that ours proves: 1.000 is an optimum. All are priced by the same formulas.

- ours: ``partition``, "exact" where the value is the bound; seconds are those of the CPU, in one thread;
- torchgpipe: ``blockpartition.solve`` of the times along one topological order. It knows of no transfers, no devices
  that differ and no memory; local search, left out where it would take more than minutes;
- Accelerate: ``infer_auto_device_map`` with an even share of memory, as ``device_map="auto"`` has it, on modules on the
  meta device with the graph's bytes in that order. It splits by bytes, not by time;
- equal: as many units on each device.

The others' stages may exceed the memory, which is said by "no fit", as is a map that leaves units on the disk.
"""

import argparse
import dataclasses
import itertools
import logging
import platform
import random
import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime

from shardwright.errors import ShardwrightError
from shardwright.sharder.planning.exact.search import closed_sets
from shardwright.sharder.planning.partition import Partition, partition
from shardwright.sharder.planning.problem import Block, Crossing, Problem
from shardwright.sharder.planning.split_loads import stage_loads

MIXED = (1.0, 2.1, 1.4, 0.7, 1.1, 1.9, 0.9, 1.3)
CLOSED_SETS = 50_000
Graph = list[list[int]]
"""By unit: the units that it reads, all of them before it."""


def chain(units: int) -> Graph:
    """Each unit reads the one before."""
    return [[v - 1] if v else [] for v in range(units)]


def layered(units: int, width: int, random_: random.Random) -> Graph:
    """Layers of ``width`` units, each of which reads one to three of the layer before."""
    graph: Graph = []
    for v in range(units):
        start = v - v % width - width
        before = range(max(start, 0), max(start + width, 0))
        graph.append(sorted(random_.sample(before, min(len(before), random_.randint(1, 3)))))
    return graph


def tangled(units: int, reach: int, random_: random.Random) -> Graph:
    """Each unit reads one or two of the ``reach`` before it."""
    return [
        sorted({random_.randrange(max(0, v - reach), v) for _ in range(random_.randint(1, 2))}) if v else []
        for v in range(units)
    ]


def series_parallel(units: int, branches: int, random_: random.Random) -> Graph:
    """Blocks of two to ``branches`` parallel chains of one to four units, one after another, joined by a unit each."""
    graph: Graph = [[]]
    while len(graph) < units:
        root, ends = len(graph) - 1, []
        for _ in range(random_.randint(2, branches)):
            for step in range(random_.randint(1, 4)):
                graph.append([root if not step else len(graph) - 1])
            ends.append(len(graph) - 1)
        graph.append(ends)
    return graph


def problem_of(graph: Graph, speeds: Sequence[float], seed: int, *, room: float | None = None) -> Problem:
    """Costs for ``graph`` on devices of these speeds; with ``room`` the caps are that many times an even share."""
    random_ = random.Random(seed)
    times = [random_.lognormvariate(-7, 1) for _ in graph]
    # A unit that takes long mostly has many weights too.
    sizes = [int(seconds * random_.lognormvariate(23, 0.7)) for seconds in times]
    made = [int(random_.lognormvariate(13, 1)) for _ in graph]
    readers = [0] * len(graph)
    for v, before in enumerate(graph):
        for u in before:
            readers[u] |= 1 << v
    cap = 10**16 if room is None else int(room * sum(sizes) / len(speeds))
    return Problem(
        blocks=tuple(
            Block(
                nodes=(f"u{v}",),
                forward_s=tuple(seconds / speed for speed in speeds),
                backward_s=tuple(2 * seconds / speed for speed in speeds),
                update_s=(0.0,) * len(speeds),
                static_bytes=sizes[v],
                units=(f"u{v}",),
                allowed=(True,) * len(speeds),
            )
            for v, seconds in enumerate(times)
        ),
        predecessors=tuple(sum(1 << u for u in before) for before in graph),
        crossings=tuple(Crossing(f"t{v}", v, mask, made[v], made[v]) for v, mask in enumerate(readers) if mask),
        devices=tuple(f"d{d}" for d in range(len(speeds))),
        caps=(cap,) * len(speeds),
        links=(((1e-5, 2e10),) * len(speeds),) * len(speeds),
        microbatches=4 * len(speeds) if room is None else len(speeds),
    )


def with_own_times(problem: Problem, seed: int) -> Problem:
    """Each unit takes its own times on each device, with a spread of 30% about those in proportion."""
    random_ = random.Random(seed)
    blocks = []
    for block in problem.blocks:
        factors = [random_.lognormvariate(0, 0.3) for _ in block.forward_s]
        forward, backward = (
            tuple(seconds * factor for seconds, factor in zip(times, factors, strict=True))
            for times in (block.forward_s, block.backward_s)
        )
        blocks.append(dataclasses.replace(block, forward_s=forward, backward_s=backward))
    return dataclasses.replace(problem, blocks=tuple(blocks))


@dataclasses.dataclass(frozen=True)
class Case:
    """A row of the table."""

    name: str
    problem: Problem


def cases(*, quick: bool) -> Iterator[Case]:
    """All rows, the small ones first."""
    for units in (100, 1_000, 10_000):
        for devices in (8, 64):
            if not quick or (units, devices) != (10_000, 8):
                yield Case("chain", problem_of(chain(units), [1.0] * devices, units))
    for name, speeds in [("two kinds", [1.0] * 4 + [2.0] * 4), ("all differ", MIXED)]:
        for units in (100, 1_000) if quick else (100, 1_000, 10_000):
            yield Case(f"chain, {name}", problem_of(chain(units), speeds, units))
    for units in (100, 300) if quick else (100, 300, 1_000):
        yield Case("chain, little memory", problem_of(chain(units), [1.0] * 8, units, room=1.3))
    sizes = (
        [(50, 2), (300, 8)] if quick else [(50, 2), (50, 8), (300, 4), (300, 8), (1_000, 8), (3_000, 8), (3_000, 16)]
    )
    for units, devices in sizes:
        random_ = random.Random(units)
        yield Case("layered, 4 wide", problem_of(layered(units, 4, random_), [1.0] * devices, units))
        yield Case("layered, 12 wide", problem_of(layered(units, 12, random_), [1.0] * devices, units))
        yield Case("series-parallel", problem_of(series_parallel(units, 4, random_), [1.0] * devices, units))
        yield Case("random, reach 4", problem_of(tangled(units, 4, random_), [1.0] * devices, units))
        yield Case("random, reach 40", problem_of(tangled(units, 40, random_), [1.0] * devices, units))
        if devices == 8:
            yield Case("random, all differ", problem_of(tangled(units, 40, random_), MIXED, units))
            little = problem_of(series_parallel(units, 4, random_), [1.0] * devices, units, room=1.3)
            yield Case("series-parallel, little memory", little)
            wide = problem_of(tangled(units, 40, random_), [1.0] * devices, units, room=1.3)
            yield Case("random, little memory", wide)
        if devices == 16:
            speeds = [1.0] * 8 + [2.0] * 8
            yield Case("random, two kinds", problem_of(tangled(units, 40, random_), speeds, units))
    if not quick:
        yield from cases_of_few()
        # Nearly as many closed sets as are searched exactly.
        yield Case("layered, 4 wide", problem_of(layered(101, 4, random.Random(101)), [1.0] * 8, 101))


def cases_of_few() -> Iterator[Case]:
    """Wide graphs on some devices that differ, their times in proportion and not."""
    for devices in (2, 3, 4):
        wide = layered(50, 12, random.Random(50)), tangled(50, 40, random.Random(50))
        for name, graph in zip(("layered, 12 wide", "random, reach 40"), wide, strict=True):
            differing = problem_of(graph, MIXED[:devices], 50)
            yield Case(f"{name}, all differ", differing)
            yield Case(f"{name}, each its own times", with_own_times(differing, 50))
    for devices in (5, 8):
        differing = problem_of(tangled(50, 40, random.Random(50)), MIXED[:devices], 50)
        yield Case("random, reach 40, each its own times", with_own_times(differing, 50))


def load_of(problem: Problem, shares: Sequence[int]) -> float | None:
    """The largest load when the blocks are dealt out in order, so many a device; None where that does not fit."""
    stages, start = [], 0
    for device, share in enumerate(shares):
        if share:
            stages.append((device, (1 << start + share) - (1 << start)))
        start += share
    loads = stage_loads(problem, stages) if start == len(problem.blocks) else None
    return None if loads is None else max(loads)


def equal(problem: Problem) -> list[int]:
    """As many units on each device."""
    count, devices = len(problem.blocks), len(problem.devices)
    ends = [round(count * d / devices) for d in range(devices + 1)]
    return [end - start for start, end in itertools.pairwise(ends)]


def torchgpipe(problem: Problem) -> list[int] | None:
    """The balance of torchgpipe, which takes times for all devices alike; None where it is left out."""
    from torchgpipe.balance import blockpartition

    if len(problem.blocks) > 1_000 or len(problem.blocks) < len(problem.devices):
        return None
    times = [problem.work_s(v, 0) for v in range(len(problem.blocks))]
    return [len(part) for part in blockpartition.solve(times, partitions=len(problem.devices))]


def accelerate(problem: Problem) -> list[int] | None:
    """The device map of Accelerate for a sequence of modules with the bytes of the units."""
    import torch
    from accelerate import infer_auto_device_map
    from torch import nn

    if len(problem.blocks) > 3_000:
        return None
    units: list[nn.Module] = []
    for block in problem.blocks:
        unit = nn.Module()
        unit.weight = nn.Parameter(torch.empty(block.static_bytes // 4 + 1, device="meta"))
        units.append(unit)
    model = nn.Sequential(*units)
    # As get_balanced_memory has it, which needs real devices: an even share and a little more, the last one open.
    total, devices = sum(block.static_bytes for block in problem.blocks), len(problem.devices)
    share = total // devices + int(1.25 * total / len(units))
    room: dict[int | str, int] = {d: min(share, problem.caps[d]) for d in range(devices - 1)}
    room[devices - 1] = problem.caps[-1]
    names = infer_auto_device_map(model, max_memory=room)
    where = [names.get(str(v), names.get("")) for v in range(len(units))]
    return [where.count(device) for device in room]


OTHERS = {"torchgpipe": torchgpipe, "Accelerate": accelerate, "equal": equal}


def ratio(problem: Problem, other: str, bound_s: float) -> str:
    """What another splitter's largest load is over the bound, in words where it has none."""
    try:
        shares = OTHERS[other](problem)
    except ImportError:
        return "not installed"
    if shares is None:
        return "-"
    value = load_of(problem, shares)
    return "no fit" if value is None else f"{value / bound_s:.2f}"


def closed_in_words(problem: Problem) -> str:
    """How many predecessor-closed sets the graph has."""
    lattice = closed_sets(problem.predecessors, CLOSED_SETS)
    return f"over {CLOSED_SETS:,}" if lattice is None else f"{len(lattice):,}"


def main() -> None:
    """Print one row a graph."""
    logging.getLogger("accelerate").setLevel(logging.ERROR)  # that none of the devices is here
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer and smaller graphs")
    parser.add_argument("--only", default="", help="rows whose name has this in it")
    parser.add_argument("--time-limit", type=float, default=30.0, help="seconds for each plan of ours")
    options = parser.parse_args()
    print(f"| graph | units | devices | closed sets | ours | seconds | {' | '.join(OTHERS)} |")
    print("|---|---|---|---|---|---|" + "---|" * len(OTHERS))
    gaps: list[float] = []
    for case in cases(quick=options.quick):
        if options.only not in case.name:
            continue
        problem = case.problem
        start = time.process_time()
        found: Partition | None = None
        try:
            found = partition(problem, time_limit_s=options.time_limit)
            ours = "no split" if found is None else f"{found.value_s / found.bound_s:.4f}"
        except ShardwrightError:
            ours = "none found"
        seconds = time.process_time() - start
        others = ["-"] * len(OTHERS)
        if found is not None:
            gaps.append(found.value_s / found.bound_s - 1)
            ours = ours if not found.exact else "exact"
            others = [ratio(problem, other, found.bound_s) for other in OTHERS]
        print(
            f"| {case.name} | {len(problem.blocks):,} | {len(problem.devices)} | {closed_in_words(problem)} | {ours} "
            f"| {seconds:.2f} | {' | '.join(others)} |",
            flush=True,
        )
    exact = sum(not gap for gap in gaps)
    print(f"\n{exact} of {len(gaps)} exact, {sum(gap < 0.01 for gap in gaps)} within 1%, largest gap {max(gaps):.1%}")
    print(f"Python {platform.python_version()}, {datetime.now(UTC):%Y-%m-%d}")


if __name__ == "__main__":
    main()
