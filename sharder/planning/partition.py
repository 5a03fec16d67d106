"""The driver of the exact split: first incumbents, one order of the devices at a time, then every split.

Ceilings rise from a simple bound, and once a split is found they fall with its value until nothing is below.
Graphs with more closed sets than ``limit`` are split along one topological order, with the gap said openly.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial

from shardwright.errors import ShardwrightError
from shardwright.sharder.planning.clock import clock_s
from shardwright.sharder.planning.exact.coarse import coarsened
from shardwright.sharder.planning.exact.direct import Direct
from shardwright.sharder.planning.exact.line import is_chain
from shardwright.sharder.planning.exact.search import (
    Done,
    Lattice,
    OutOfTimeError,
    Search,
    closed_sets,
    sums_of,
)
from shardwright.sharder.planning.exact.stagewise import Stagewise
from shardwright.sharder.planning.exact.transfers import as_staged
from shardwright.sharder.planning.formulation.device_classes import alike_devices, as_roomy_devices, orders_to_try
from shardwright.sharder.planning.formulation.relaxed import timeless
from shardwright.sharder.planning.problem import Problem
from shardwright.sharder.planning.schedules.interleave import interleaved
from shardwright.sharder.planning.wide.incumbent import Incumbent, Partition

__all__ = ["Partition", "partition"]


def _cannot_fit(problem: Problem) -> bool:
    """Whether memory rules out every split, seen without search: a block, or the sum of all that stays, everywhere or
    on the one device that pins leave it."""
    static = sum(block.static_bytes for block in problem.blocks)
    pinned = [0] * len(problem.devices)
    for block in problem.blocks:
        if sum(block.allowed) == 1:
            pinned[block.allowed.index(True)] += block.static_bytes
    too_much = static > sum(problem.caps) or any(p > cap for p, cap in zip(pinned, problem.caps, strict=True))
    return too_much or not all(
        any(block.allowed[d] and problem.least_bytes(v, d) <= cap for d, cap in enumerate(problem.caps))
        for v, block in enumerate(problem.blocks)
    )


AnySearch = Search | Stagewise | Direct


def search_over(
    problem: Problem,
    lattice: Lattice,
    sums: Mapping[int, Done],
    classes: Sequence[Sequence[int]],
    out_of_time: Callable[[], bool],
) -> AnySearch:
    """The exact search that knows the transfers of ``problem``."""
    if problem.transfers == "direct":
        return Direct(problem, lattice, sums, classes, out_of_time)
    kind = Stagewise if problem.transfers == "staged" or problem.overlap else Search
    return kind(problem, lattice, sums, classes, out_of_time)


def partition(
    problem: Problem,
    *,
    limit: int = 50_000,
    time_limit_s: float = 30.0,
    clock: Callable[[], float] = clock_s,
) -> Partition | None:
    """Split ``problem`` so that the largest load of a stage is least; None when no split fits the memory and the pins.

    Args:
        problem: blocks in a topological order.
        limit: how many closed sets may be searched exactly.
        time_limit_s: after this the best split so far is returned with an honest bound.
        clock: seconds; a test passes its own.

    Raises:
        ShardwrightError: no split that fits was found, but the search was cut short by the time or by ``limit``.
    """
    start_s = clock()
    if _cannot_fit(problem):
        return None
    if problem.stages_per_device > 1:
        found = interleaved(
            problem, alike_devices(problem), orders_to_try(problem), lambda: clock() >= start_s + time_limit_s
        )
        return None if found is None else Partition(*found)

    def left_s(share: float) -> float:
        return start_s + share * time_limit_s - clock()

    def spent(share: float) -> bool:
        return left_s(share) <= 0

    best = Incumbent(problem)
    if is_chain(problem):
        best.take_line(partial(spent, 1.0))
    if not best.proven:
        best.take_even_splits(spent)
    as_is = best.proven or is_chain(problem) or problem.fetching is not None  # coarse blocks are brought as a whole
    coarse = None if as_is else coarsened(problem, best.value_s)
    if coarse is not None:
        best.take_coarse(
            coarse,
            lambda fewer: partition(fewer, limit=limit, time_limit_s=start_s + time_limit_s - clock(), clock=clock),
        )
        return best.result if best.stages else None
    if problem.transfers == "direct" and not best.proven:
        with contextlib.suppress(ShardwrightError):  # the relaxed search was cut short, and knows nothing
            relaxed = partition(as_staged(problem), limit=limit, time_limit_s=time_limit_s / 3, clock=clock)
            if relaxed is None:
                return None
            best.relax(relaxed)
    try:
        complete = _search_all(problem, best, limit, left_s)
    except OutOfTimeError:
        if not best.stages:
            raise ShardwrightError(
                "no split that fits was found in the time allowed; allow more with --time-limit"
            ) from None
    else:
        if not best.stages and complete:
            return None
        if not best.stages and not _takes_any_that_fits(problem, best, limit, left_s(1.0), clock):
            raise ShardwrightError(
                f"no split that fits was found along one order of the {len(problem.blocks)} blocks, and there are too "
                "many other orders to search: give the devices more memory with --memory, or add a device"
            )
    return best.result


def _takes_any_that_fits(
    problem: Problem, best: Incumbent, limit: int, time_limit_s: float, clock: Callable[[], float]
) -> bool:
    """Where no good split was found that fits, take one that is looked for without regard to time; whether there is."""
    without = timeless(problem)
    if without != problem and time_limit_s > 0:
        with contextlib.suppress(ShardwrightError):
            found = partition(without, limit=limit, time_limit_s=time_limit_s, clock=clock)
            if found is not None:
                best.offer(found.stages)
    return bool(best.stages)


def _search_all(problem: Problem, best: Incumbent, limit: int, left_s: Callable[[float], float]) -> bool:
    """Improve ``best`` along one order of the blocks, then over every closed set; whether no split was left out.

    Args:
        problem: blocks in a topological order.
        best: what was found so far; it is changed.
        limit: how many closed sets may be searched.
        left_s: seconds until a share of the time has passed.
    """

    def spent(share: float) -> bool:
        return left_s(share) <= 0

    def some_split(family: Lattice, sums: Mapping[int, Done]) -> None:
        if not best.stages:
            found = search_over(problem, family, sums, as_roomy_devices(problem), partial(spent, 1.0)).below(math.inf)
            if found is not None:
                best.offer(found)

    if best.proven:
        return True
    if spent(1.0):
        raise OutOfTimeError
    prefixes: Lattice = {(1 << v) - 1: [(v, (2 << v) - 1)] for v in range(len(problem.blocks))}
    prefixes[(1 << len(problem.blocks)) - 1] = []
    family, sums = prefixes, sums_of(problem, prefixes)
    some_split(family, sums)
    # One order of the devices at a time is quick, and leaves something good should all orders take too long.
    orders = orders_to_try(problem) if best.stages else []
    for number, order in enumerate(orders, start=1):
        share = number / len(orders) / 2
        with contextlib.suppress(OutOfTimeError):
            best.improve(search_over(problem, family, sums, [order], partial(spent, share)).below, proves=False)
    if spent(1.0):
        raise OutOfTimeError
    lattice = closed_sets(problem.predecessors, limit)
    if lattice is None:
        best.try_orders(left_s)
    if lattice is not None and len(lattice) > len(prefixes):
        family, sums = lattice, sums_of(problem, lattice)
        some_split(family, sums)
    if best.stages:
        last = search_over(problem, family, sums, alike_devices(problem), partial(spent, 1.0))
        best.improve(last.below, proves=lattice is not None)
    return lattice is not None or best.none_fits
