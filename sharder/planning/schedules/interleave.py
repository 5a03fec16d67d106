r"""Interleaved stages: v stages on each of D devices, so that pipelines fill in a v-th of the time.

Given a problem (problem.py), v, and an order of D devices; choose S = v D stages I0 < I1 < ... < IS along it, stage s
on device s mod D, so that each has a unit, each device's peak (interleaved_memory.py) fits, and the largest load of a
device is least:

    load(d) = sum over its stages of load(s)        or with overlap, the longest of its computes, sends and receives

Only the sums count, so that a device's stages may make up for each other. That makes many splits nearly as good as the
best, and a search with a state for each tuple of loads exponential in D. So blocks are cut stage by stage, and of the
tuples (closed set, loads) that could still be below the best known load only the WIDTH most promising are kept (a beam
search; Lowerre, "The Harpy speech recognition system", 1976). A tuple of s stages is bounded from below by

    max( max over d of load(d),  sum over d of w(d) load(d) + work of the rest + transfers of the rest )

with weights w of sum 1, as in search.py, each block where w(d) seconds is least, and each cut to come the cheapest that
there is between its two devices. It is promising if that is small, and so are v times its longest stage and v times the
mean of the stages to come, since stages of equal length fill a pipeline soonest.

All closed sets are gone through where there are up to MOST_CLOSED, and of a chain those at up to POSITIONS; else some
orders of the blocks are, a line of closed sets each. Of all closed sets, and all orders of the devices, the result is
the optimum where nothing had to be left out, and no split is below the least bound of what was. Else the bound is that
of work shared freely: for some number k of devices, with x the cheapest cut of a chain,

    load >= max( sum over v of w seconds,  (all work where it is fastest + 2 (v k - 1) x) / k,  the largest block )

Among splits with loads at most SLACK above the least the one with the shortest simulated step is taken.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

from shardwright.errors import ShardwrightError
from shardwright.sharder.planning.exact.search import ROUNDING, Stages, closed_sets, simple_bound_s
from shardwright.sharder.planning.exact.transfers import Traffic, load_s, traffic_of
from shardwright.sharder.planning.problem import Problem, bits
from shardwright.sharder.planning.schedules.interleaved_cuts import ClosedSets, Cuttable, Line
from shardwright.sharder.planning.schedules.interleaved_memory import device_peaks
from shardwright.sharder.planning.schedules.simulate import simulate
from shardwright.sharder.planning.schedules.stage_costs import shares_of, stage_costs, ties_s_of
from shardwright.sharder.planning.wide.orders import topological

__all__ = ["Interleaved", "device_loads", "interleaved", "piece_loads", "possible_devices"]

CLIMBED = 8
"""Cuts that are made better by moving one end at a time, where the best may have been left out."""
LINES = 6
"""Orders of the blocks that are cut, where there are several."""
ORDERS = 24
"""Orders of devices: all of up to four."""
SLACK = 0.01
MOST_CLOSED = 600
"""A graph with so many closed sets at most is cut at any of them."""
PLAYED = 24
"""Splits that are simulated, of those that are nearly the best."""


class Interleaved(NamedTuple):
    """The stages in order; device s modulo the number of devices has stage s."""

    stages: Stages
    value_s: float
    """The largest load of a device."""
    bound_s: float
    exact: bool


def possible_devices(problem: Problem) -> list[int]:
    """Numbers of devices, the most first, whose rounds divide the micro-batches and that leave each stage a block."""
    counts = range(len(problem.devices), 1, -1)
    units = sum(bool(block.units) for block in problem.blocks)
    return [
        k
        for k in counts
        if problem.microbatches % max(1, problem.microbatches // k) == 0 and problem.stages_per_device * k <= units
    ]


def device_loads(problem: Problem, stages: Stages) -> list[float]:
    """The load of each device, in the order in which the stages go around them, in seconds of a step."""
    count = len(stages) // problem.stages_per_device
    traffic, ties_s = traffic_of(problem, stages), ties_s_of(problem, stages)
    loads = []
    for position, (device, members) in enumerate(shares_of(stages, problem.stages_per_device)):
        work_s = sum(problem.work_s(v, device) for v in bits(members)) + sum(ties_s[position])
        together = Traffic(*(sum(parts) for parts in zip(*traffic[position::count], strict=True)))
        loads.append(load_s(problem, work_s, together))
    return loads


def piece_loads(problem: Problem, stages: Stages) -> list[float] | None:
    """The load of each stage, or None where one has no unit or breaks a pin, or a device does not hold its stages."""
    for device, members in stages:
        blocks = [problem.blocks[v] for v in bits(members)]
        if not any(block.units for block in blocks) or not all(block.allowed[device] for block in blocks):
            return None
    shares = shares_of(stages, problem.stages_per_device)
    for (device, _), peak in zip(shares, device_peaks(problem, stages), strict=True):
        if peak.bytes > problem.caps[device]:
            return None
    return [
        load_s(problem, sum(problem.work_s(v, device) for v in bits(members)) + sum(ties_s), traffic)
        for (device, members), traffic, ties_s in zip(
            stages, traffic_of(problem, stages), ties_s_of(problem, stages), strict=True
        )
    ]


def interleaved(
    problem: Problem,
    classes: Sequence[Sequence[int]],
    device_orders: Iterable[Sequence[int]],
    out_of_time: Callable[[], bool],
) -> Interleaved | None:
    """The best split with ``problem.stages_per_device`` stages on each device that is used; None if none fits.

    Args:
        classes: devices that cannot be told apart.
        device_orders: those to try where there are more than can all be tried.
        out_of_time: asked now and then; one order is cut whatever time has passed.

    Raises:
        ShardwrightError: none that fits was found, and not all were looked at; or transfers are not relayed.
    """
    if problem.transfers != "relayed":
        raise ShardwrightError(
            f"interleaved stages relay their tensors, as the engine does: no split for {problem.transfers} transfers"
        )
    chain = all(before >> v & 1 for v, before in enumerate(problem.predecessors[1:]))
    counts, given = possible_devices(problem), list(device_orders)
    best, bounds_s = _Best(problem), _bounds_s(problem, counts, chain)
    unseen_s, looked = 0.0, False  # what is not looked at has as much at least
    for sets in _cuttable(problem, chain):
        others_s = [math.inf if sets.every else 0.0]
        for count in counts:
            if best.value_s <= bounds_s[count]:
                continue  # with so few devices it cannot be better
            orders, every = _orders(len(problem.devices), count, classes, given)
            others_s.append(math.inf if every else 0.0)
            for order in orders:
                if looked and out_of_time():
                    others_s.append(0.0)
                    break
                others_s.append(best.cut(sets, order, out_of_time))
                looked = True
        unseen_s = max(unseen_s, min(others_s))
        if unseen_s >= best.value_s:
            break
    if not best.finals:
        if math.isinf(unseen_s) or not counts:
            return None
        raise ShardwrightError(
            f"no split with {problem.stages_per_device} stages on each device that fits was found; plan with "
            "--schedule 1f1b, which is searched through, or give the devices more memory with --memory"
        )
    stages, value_s = best.soonest()
    bound_s = min(best.value_s, max(unseen_s, min(bounds_s.values())))
    return Interleaved(stages, value_s, min(bound_s, value_s), value_s <= bound_s * (1 + ROUNDING))


def _cuttable(problem: Problem, chain: bool) -> Iterator[ClosedSets]:
    """Orders of the blocks, and behind the first all closed sets, if these are few."""
    yield Line(problem, range(len(problem.blocks)))
    if chain:
        return
    lattice = closed_sets(problem.predecessors, MOST_CLOSED)
    if lattice is not None:
        yield ClosedSets(problem, [*lattice], every=True)
    random_ = random.Random(0)
    for _ in range(LINES - 1):
        yield Line(problem, topological(problem, [random_.random() for _ in problem.blocks]))


def _orders(
    devices: int, count: int, classes: Sequence[Sequence[int]], given: Sequence[Sequence[int]]
) -> tuple[list[tuple[int, ...]], bool]:
    """Orders of ``count`` devices, and whether there are no others that differ."""
    if math.perm(devices, count) > 100 * ORDERS:
        return [*dict.fromkeys(tuple(order[:count]) for order in given)], False
    class_of = {device: number for number, members in enumerate(classes) for device in members}
    different: dict[tuple[int, ...], tuple[int, ...]] = {}
    for order in itertools.permutations(range(devices), count):
        different.setdefault(tuple(class_of[d] for d in order), order)
    orders = list(different.values())
    return orders[:ORDERS], len(orders) <= ORDERS


def _bounds_s(problem: Problem, counts: Sequence[int], chain: bool) -> dict[int, float]:
    """By number of devices: no split over so many has a smaller largest load; see the head of this module."""
    blocks = problem.blocks
    least = [min(itertools.compress(problem.seconds[v], b.allowed), default=math.inf) for v, b in enumerate(blocks)]
    cut_s = 0.0
    if chain and not problem.overlap:
        pairs = [(a, b) for a in range(len(problem.devices)) for b in range(len(problem.devices)) if a != b]
        tensors = [problem.crossing((1 << end) - 1) for end in range(1, len(blocks))]
        cut_s = min(problem.microbatches * sum(problem.transfer_s(each, *pair)) for each in tensors for pair in pairs)
    v = problem.stages_per_device
    simple_s = simple_bound_s(problem)
    return {k: max(simple_s, (sum(least) + 2 * (v * k - 1) * cut_s) / k) for k in counts}


class _Best:
    """The splits that were found, by their largest load, the least first."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.finals: dict[Stages, float] = {}

    @property
    def value_s(self) -> float:
        """The least largest load."""
        return min(self.finals.values(), default=math.inf)

    def cut(self, sets: ClosedSets, devices: Sequence[int], out_of_time: Callable[[], bool]) -> float:
        """Cut for that order of devices; the largest load that is possible at least where it was not looked.

        What could not be better is not counted.
        """
        stages = self.problem.stages_per_device * len(devices)
        few = sets.thinned(stages)
        cuttable = Cuttable(few, devices)
        ends, estimates_s, others_s = cuttable.beam(self.value_s * (1 + SLACK), out_of_time)
        for number, (row, estimate_s) in enumerate(zip(ends, estimates_s, strict=True)):
            if estimate_s > self.value_s * (1 + SLACK):
                break
            if number >= CLIMBED and out_of_time():
                return min(others_s, float(estimate_s))
            self._offer([cuttable.stages(row)])
        left_out = math.isfinite(others_s) or not few.every
        if left_out and len(ends) and isinstance(few, Line):
            self._offer(Cuttable(sets, devices).climbed(few.at[ends[:CLIMBED]], out_of_time))
        return others_s if few.every else 0.0

    def _offer(self, found: Iterable[Stages]) -> None:
        """Keep splits that are nearly the best, if they fit; none sends over a link that is not to be used."""
        for stages in found:
            value_s = max(device_loads(self.problem, stages))
            if (
                math.isfinite(value_s)
                and value_s <= self.value_s * (1 + SLACK)
                and piece_loads(self.problem, stages) is not None
            ):
                self.finals[stages] = value_s

    def soonest(self) -> tuple[Stages, float]:
        """Of the splits with nearly the least load, that with the shortest step."""
        problem, most_s = self.problem, self.value_s * (1 + SLACK)
        near = sorted((value_s, stages) for stages, value_s in self.finals.items() if value_s <= most_s)

        def step_s(stages: Stages) -> float:
            return simulate(
                stage_costs(problem, stages),
                problem.microbatches,
                schedule="interleaved",
                train=not problem.forward_only,
                stages_per_device=problem.stages_per_device,
                transfers="overlapped" if problem.overlap else "serial",
            ).step_s

        def longest_s(found: tuple[float, Stages]) -> float:
            return max(sum(problem.work_s(v, device) for v in bits(members)) for device, members in found[1])

        even = sorted(near, key=longest_s)[:PLAYED]
        played = {stages: (step_s(stages), value_s) for value_s, stages in {*near[:1], *even}}
        stages = min(played, key=lambda found: (*played[found], found))
        return stages, played[stages][1]
