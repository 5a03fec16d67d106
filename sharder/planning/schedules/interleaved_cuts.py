"""Closed sets at which blocks are cut for one order of the devices, several stages on each: see interleave.py."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from shardwright.sharder.planning.exact.search import Stages, fluid_s
from shardwright.sharder.planning.problem import Crossing, Problem

__all__ = ["ClosedSets", "Cuttable", "Line"]

WIDTH = 2_000
"""Tuples of loads that are kept after each stage along one line."""
WIDTH_OF_ALL = 8_000
"""And where all closed sets are gone through: what is kept there proves something."""
NARROW = 32
"""And once the time has passed."""
MOST_FOUND = 500_000
"""Tuples that may grow from those that are kept: where closed sets are many fewer are, but no fewer than on a line."""
POSITIONS = 160
"""Ends of stages that are looked at along a line; more blocks than that are taken a few at a time."""
FARTHEST = 16
"""By so many positions at most."""
POWER = 40
TOO_MUCH = 16.0
"""Loads that are so many times the largest are all the same: higher powers are no numbers."""
SMALLER = 1e-9
"""A sum that is not smaller by this share of it is the same one: rounding must not lead to and fro."""

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class _Beam:
    """Cuts up to some stage: rows of closed sets by number, loads by device, and the largest stage of each."""

    ends: Integers
    loads_s: Floats
    largest_s: Floats

    def take(self, rows: Integers) -> _Beam:
        """Those in ``rows``."""
        return _Beam(self.ends[rows], self.loads_s[rows], self.largest_s[rows])


class ClosedSets:
    """Closed sets at which a problem's blocks are cut.

    Args:
        problem: blocks, devices and links.
        masks: the closed sets, what is in another before it: nothing first, all last.
        every: whether there are no others.
    """

    def __init__(self, problem: Problem, masks: Sequence[int], *, every: bool) -> None:
        self.problem, self.masks, self.every = problem, masks, every
        self.width = WIDTH_OF_ALL if every else WIDTH

    def thinned(self, _stages: int, /) -> ClosedSets:
        """Those at which so many stages are cut: all of them, but for a long line."""
        return self

    @cached_property
    def crossing(self) -> list[list[Crossing]]:
        """What is sent over a cut behind each."""
        return [self.problem.crossing(mask) for mask in self.masks]

    @cached_property
    def _inside(self) -> Flags:
        return np.array([[mask >> v & 1 for v in range(len(self.problem.blocks))] for mask in self.masks], bool)

    @cached_property
    def _within(self) -> Flags:
        """Which is within which."""
        return np.asarray(self._inside.astype(np.int64) @ (~self._inside).T.astype(np.int64) == 0)

    def within(self, starts: Integers, ends: Integers) -> Flags:
        """By row: which of ``ends`` one of the ``starts`` is within."""
        return np.asarray(self._within[starts[:, None], ends])

    def sums(self, values: npt.NDArray[np.generic]) -> Floats:
        """By row and closed set: the sum of the values of the blocks in it."""
        sums: Floats = np.where(self._inside, values[:, None], 0).sum(axis=2)
        return sums

    def sums_behind(self, values: npt.NDArray[np.generic]) -> Floats:
        """By row and closed set: the sum of the values of the blocks that are not in it."""
        sums: Floats = np.where(self._inside, 0, values[:, None]).sum(axis=2)
        return sums


class Line(ClosedSets):
    """One order of the blocks, to be cut ``at`` so many places, or at any."""

    def __init__(self, problem: Problem, blocks: Sequence[int], at: Integers | None = None) -> None:
        self.blocks, self.at = list(blocks), np.arange(len(blocks) + 1) if at is None else at
        masks = list(itertools.accumulate((1 << v for v in blocks), int.__or__, initial=0))
        chain = all(before >> v & 1 for v, before in enumerate(problem.predecessors[1:]))
        super().__init__(problem, [masks[at] for at in self.at], every=chain and len(self.at) == len(masks))

    def thinned(self, stages: int, /) -> Line:
        """The line to be cut at POSITIONS places at most, or more if there are many ``stages``."""
        return Line(self.problem, self.blocks, _positions(self.problem, self.blocks, stages))

    def within(self, starts: Integers, ends: Integers) -> Flags:
        """See :class:`ClosedSets`."""
        return np.asarray(ends > starts[:, None])

    def sums(self, values: npt.NDArray[np.generic]) -> Floats:
        """See :class:`ClosedSets`."""
        return _summed(values[:, self.blocks])[:, self.at]

    def sums_behind(self, values: npt.NDArray[np.generic]) -> Floats:
        """See :class:`ClosedSets`."""
        return _summed(values[:, self.blocks[::-1]])[:, len(self.blocks) - self.at]


class Cuttable:
    """Closed sets at which blocks are cut for one order of devices; the stages go around them."""

    def __init__(self, sets: ClosedSets, devices: Sequence[int]) -> None:
        self.sets, self.problem, self.devices = sets, sets.problem, tuple(devices)
        problem = sets.problem
        self.work_s = sets.sums(np.array([[s[d] for s in problem.seconds] for d in self.devices]))
        self.barred = sets.sums(np.array([[not block.allowed[d] for block in problem.blocks] for d in self.devices]))
        self.units = sets.sums(np.array([[bool(block.units) for block in problem.blocks]]))[0]
        self.cut_s = np.array([[self._cut_s(each, *pair) for each in sets.crossing] for pair in self._pairs()])
        speed = np.array([1 / problem.total_s[d] if problem.total_s[d] else 1.0 for d in self.devices])
        self.weights = speed / speed.sum()
        self.left_s = sets.sums_behind(np.array(fluid_s(problem, self.devices))[None])[0]
        self.least_cut_s = self.cut_s[:, 1:-1].min(axis=1, initial=math.inf)
        """By position of the device before it."""

    def _pairs(self) -> Iterator[tuple[int, int]]:
        """Each device with the one that has the stage behind."""
        yield from zip(self.devices, self.devices[1:] + self.devices[:1], strict=True)

    def _cut_s(self, crossing: list[Crossing], device: int, following: int) -> float:
        """Seconds of a step that a cut costs each of its sides; beside compute, they are left out."""
        if self.problem.overlap:
            return 0.0
        return self.problem.microbatches * sum(self.problem.transfer_s(crossing, device, following))

    def stages(self, ends: Integers) -> Stages:
        """The stages that end at the closed sets of these numbers."""
        masks, count = [0, *(self.sets.masks[end] for end in ends)], len(self.devices)
        return tuple(
            (self.devices[s % count], behind & ~before) for s, (before, behind) in enumerate(itertools.pairwise(masks))
        )

    def climbed(self, cuts: Integers, out_of_time: Callable[[], bool]) -> Iterator[Stages]:
        """Each row of ends, moved one end at a time for as long as the sum of POWERs of the loads gets smaller.

        What is cut is a :class:`Line`.
        """
        steps = np.array([step for step in range(-FARTHEST, FARTHEST + 1) if step])
        borders = cuts.shape[1] - 1
        moved = np.repeat(np.arange(borders), len(steps))
        for row in cuts:
            ends, smaller = row, True
            while smaller and not out_of_time():
                moves = np.tile(ends, (len(moved) + 1, 1))
                moves[np.arange(len(moved)), moved] += np.tile(steps, borders)
                power = self._power(moves)
                smaller = power.min() < power[-1] * (1 - SMALLER)
                ends = moves[power.argmin()] if smaller else ends
            yield self.stages(ends)

    def _power(self, cuts: Integers) -> Floats:
        """By row of ends: the sum of powers of the loads, infinite where a stage cannot be, or sends over no link."""
        bounds = np.column_stack([np.zeros(len(cuts), np.int64), cuts])
        within = np.asarray((np.diff(bounds, axis=1) > 0).all(axis=1))
        bounds = np.where(within[:, None], bounds, np.linspace(0, bounds[0, -1], bounds.shape[1]).astype(int))
        device = np.arange(cuts.shape[1]) % len(self.devices)
        starts, ends = bounds[:, :-1], bounds[:, 1:]
        within &= (self.units[ends] > self.units[starts]).all(axis=1)
        within &= (self.barred[device, ends] == self.barred[device, starts]).all(axis=1)
        seconds = self.work_s[device, ends] - self.work_s[device, starts]
        seconds[:, 1:] += self.cut_s[device[:-1], starts[:, 1:]]
        seconds[:, :-1] += self.cut_s[device[:-1], ends[:, :-1]]
        loads_s = seconds.reshape(len(cuts), -1, len(self.devices)).sum(axis=1)
        within &= np.isfinite(loads_s).all(axis=1)
        scale_s = loads_s[-1].max() if within[-1] else 0.0  # the last row is that which nothing was moved in
        shares = np.minimum(loads_s[within] / (scale_s or 1.0), TOO_MUCH)
        power = np.full(len(cuts), np.inf)
        power[within] = (shares**POWER).sum(axis=1)
        return power

    def beam(self, below_s: float, out_of_time: Callable[[], bool]) -> tuple[Integers, Floats, float]:
        """The closed sets of cuts, an estimate of their largest loads, the least first, and what others have at least.

        No estimate is too large: ties and transfers beside compute are left out. What is not below ``below_s`` does not
        count as others. Once it is ``out_of_time`` few are kept.
        """
        count = len(self.devices) * self.problem.stages_per_device
        width = min(self.sets.width, max(WIDTH, MOST_FOUND // len(self.sets.masks)))
        found = _Beam(np.zeros((1, 0), np.int64), np.zeros((1, len(self.devices))), np.zeros(1))
        others_s = math.inf
        for stage in range(count):
            found = self._grown(found, stage, count, below_s)
            width = NARROW if out_of_time() else width
            if len(found.ends) > width:
                order = np.argpartition(self._uneven_s(found, stage + 1, count), width)
                others_s = min(others_s, self._least_s(found.take(order[width:]), stage + 1, count))
                found = found.take(order[:width])
        loads_s = found.loads_s.max(axis=1) if len(found.ends) else np.zeros(0)
        order = np.argsort(loads_s, kind="stable")
        return found.ends[order], loads_s[order], others_s

    def _least_s(self, found: _Beam, stages: int, count: int) -> float:
        """No way to go on from any of them has a smaller largest load."""
        ends = found.ends[:, -1]
        return float(self._bounds_s(ends, found.loads_s, stages, count).min(initial=math.inf))

    def _bounds_s(self, ends: Integers, loads_s: Floats, stages: int, count: int) -> Floats:
        """By cut of the first ``stages``, where it ends and its loads: no way to go on has a smaller largest load."""
        rest_s, devices = self.left_s[ends], len(self.devices)
        if stages < count:
            rest_s = rest_s + self.cut_s[(stages - 1) % devices][ends] * self.weights[stages % devices]
        for stage in range(stages, count - 1):
            position, following = stage % devices, (stage + 1) % devices
            rest_s = rest_s + self.least_cut_s[position] * (self.weights[position] + self.weights[following])
        bounds_s: Floats = np.maximum(loads_s.max(axis=1, initial=0.0), loads_s @ self.weights + rest_s)
        return bounds_s

    def _uneven_s(self, found: _Beam, stages: int, count: int) -> Floats:
        """By cut: its bound, or the load of devices whose stages are all as long as its longest, or as the rest's."""
        ends, longest_s = found.ends[:, -1], self.problem.stages_per_device * found.largest_s
        bounds_s = self._bounds_s(ends, found.loads_s, stages, count)
        rest_s = self.left_s[ends] * count / max(1, count - stages)
        uneven_s: Floats = np.maximum(bounds_s, np.maximum(longest_s, rest_s))
        return uneven_s

    def _grown(self, found: _Beam, stage: int, count: int, below_s: float) -> _Beam:
        """Every way to add ``stage`` that may stay below a load."""
        device, last = stage % len(self.devices), len(self.sets.masks) - 1
        starts = found.ends[:, -1] if stage else np.zeros(len(found.ends), np.int64)
        ends = np.array([last]) if stage == count - 1 else np.arange(1, last - (count - 2 - stage))
        rows, columns = np.nonzero(
            self.sets.within(starts, ends)
            & (self.units[ends] > self.units[starts][:, None])
            & (self.barred[device][ends] == self.barred[device][starts][:, None])
        )
        starts, ends = starts[rows], ends[columns]
        before_s = self.cut_s[device - 1][starts] if stage else 0.0
        behind_s = self.cut_s[device][ends] if stage < count - 1 else 0.0
        own_s = self.work_s[device][ends] - self.work_s[device][starts] + before_s + behind_s
        loads_s = found.loads_s[rows]
        loads_s[:, device] += own_s
        kept = np.flatnonzero(self._bounds_s(ends, loads_s, stage + 1, count) <= below_s)
        rows = rows[kept]
        cuts = np.column_stack([found.ends[rows], ends[kept]])
        return _Beam(cuts, loads_s[kept], np.maximum(found.largest_s[rows], own_s[kept]))


def _summed(values: npt.NDArray[np.generic]) -> Floats:
    """By row: the sums of none, the first, the first two and so on."""
    sums: Floats = np.zeros((values.shape[0], values.shape[1] + 1))
    np.cumsum(values, axis=1, out=sums[:, 1:])
    return sums


def _positions(problem: Problem, blocks: Sequence[int], stages: int) -> Integers:
    """The positions between ``blocks`` at which they may be cut: all of them, unless there are too many.

    Then, of neighbouring positions with nearly the same work before them that with the cheapest cut.
    """
    every = np.arange(len(blocks) + 1)
    most = max(POSITIONS, 2 * stages)
    if len(every) <= most:
        return every
    work = np.cumsum([0.0, *(min(problem.seconds[v]) for v in blocks)])
    masks = itertools.accumulate((1 << v for v in blocks), int.__or__, initial=0)
    sizes = [sum(c.forward_bytes + c.backward_bytes for c in problem.crossing(mask)) for mask in masks]
    slots = np.minimum((work[1:-1] / (work[-1] or 1.0) * (most - 2)).astype(int), most - 3)
    cheapest: dict[int, int] = {}
    for position, slot in zip(every[1:-1].tolist(), slots.tolist(), strict=True):
        if slot not in cheapest or sizes[position] < sizes[cheapest[slot]]:
            cheapest[slot] = position
    return np.array([0, *sorted(cheapest.values()), len(blocks)])
