"""One order of the blocks cut for one order of the devices, several stages on each: see interleave.py."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from shardwright.sharder.planning.exact.search import Stages, fluid_s
from shardwright.sharder.planning.problem import Problem

__all__ = ["CuttableLine"]

WIDTH = 2_000
"""Tuples of loads that are kept after each stage."""
POSITIONS = 160
"""Ends of stages that are looked at along a line; more blocks than that are taken a few at a time."""
FARTHEST = 16
"""By so many positions at most."""
POWER = 40

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class _Beam:
    """Cuts of a line up to some stage: rows of positions, loads by device, and the largest stage of each."""

    ends: Integers
    loads_s: Floats
    largest_s: Floats

    def take(self, rows: Integers) -> _Beam:
        """Those in ``rows``."""
        return _Beam(self.ends[rows], self.loads_s[rows], self.largest_s[rows])


class CuttableLine:
    """Blocks in one order, to be cut for one order of devices, at POSITIONS places at most."""

    def __init__(
        self, problem: Problem, blocks: Sequence[int], devices: Sequence[int], at: Integers | None = None
    ) -> None:
        self.problem, self.blocks, self.devices = problem, blocks, tuple(devices)
        self.masks = list(itertools.accumulate((1 << v for v in blocks), int.__or__, initial=0))
        self.at = _positions(problem, blocks, problem.stages_per_device * len(self.devices)) if at is None else at
        self.thinned = len(self.at) <= len(blocks)
        masks = [self.masks[position] for position in self.at]
        seconds = np.array([[problem.seconds[v][d] for v in blocks] for d in self.devices])
        barred = np.array([[not problem.blocks[v].allowed[d] for v in blocks] for d in self.devices])
        self.work_s = _summed(seconds, self.at)
        self.barred = _summed(barred, self.at)
        self.units = _summed(np.array([[bool(problem.blocks[v].units) for v in blocks]]), self.at)[0]
        self.cut_s = np.array([[self._cut_s(mask, *pair) for mask in masks] for pair in self._pairs()])
        speed = np.array([1 / problem.total_s[d] if problem.total_s[d] else 1.0 for d in self.devices])
        self.weights = speed / speed.sum()
        rest = np.array(fluid_s(problem, self.devices))[list(blocks)]
        self.left_s = _summed(rest[None, ::-1], len(blocks) - self.at[::-1])[0][::-1]

    def whole(self) -> CuttableLine:
        """The line to be cut at any position."""
        return CuttableLine(self.problem, self.blocks, self.devices, np.arange(len(self.blocks) + 1))

    def climbed(self, cuts: Integers) -> Iterator[Stages]:
        """Each row of ends, moved one end at a time for as long as the sum of POWERs of the loads gets smaller."""
        steps = np.array([step for step in range(-FARTHEST, FARTHEST + 1) if step])
        borders = cuts.shape[1] - 1
        moved = np.repeat(np.arange(borders), len(steps))
        for row in cuts:
            before, ends = None, row
            while before is None or (ends != before).any():
                before = ends
                moves = np.tile(ends, (len(moved) + 1, 1))
                moves[np.arange(len(moved)), moved] += np.tile(steps, borders)
                power = self._power(moves)
                ends = moves[power.argmin()] if power.min() < power[-1] else before
            yield self.stages(ends)

    def _power(self, cuts: Integers) -> Floats:
        """By row of ends: the sum of powers of the loads, infinite where a stage cannot be."""
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
        scale_s = loads_s[-1].max() or 1.0  # the last row is that which nothing was moved in
        power: Floats = np.where(within, ((loads_s / scale_s) ** POWER).sum(axis=1), np.inf)
        return power

    def _pairs(self) -> Iterator[tuple[int, int]]:
        """Each device with the one that has the stage behind."""
        yield from zip(self.devices, self.devices[1:] + self.devices[:1], strict=True)

    def _cut_s(self, mask: int, device: int, following: int) -> float:
        """Seconds of a step that a cut costs each of its sides; beside compute, they are left out."""
        if self.problem.overlap:
            return 0.0
        return self.problem.microbatches * sum(self.problem.transfer_s(self.problem.crossing(mask), device, following))

    def stages(self, ends: Integers) -> Stages:
        """The stages that end at the positions ``ends``."""
        masks = [0, *(self.masks[self.at[end]] for end in ends)]
        count = len(self.devices)
        return tuple(
            (self.devices[s % count], behind & ~before) for s, (before, behind) in enumerate(itertools.pairwise(masks))
        )

    def beam(self, below_s: float) -> tuple[Integers, Floats, bool]:
        """Positions of cuts with an estimate of their largest load, the least first, and whether none was left out.

        The estimate leaves out ties, and transfers beside compute; it is never too large.
        """
        count = len(self.devices) * self.problem.stages_per_device
        found = _Beam(np.zeros((1, 0), np.int64), np.zeros((1, len(self.devices))), np.zeros(1))
        complete = not self.thinned
        for stage in range(count):
            found = self._grown(found, stage, count, below_s)
            if len(found.ends) > WIDTH:
                complete = False
                found = found.take(np.argpartition(self._uneven_s(found, stage + 1, count), WIDTH)[:WIDTH])
        loads_s = found.loads_s.max(axis=1) if len(found.ends) else np.zeros(0)
        order = np.argsort(loads_s, kind="stable")
        return found.ends[order], loads_s[order], complete

    def _bound_s(self, found: _Beam) -> Floats:
        """By cut: no way to go on from it has a smaller largest load."""
        if not len(found.ends):
            return np.zeros(0)
        rest_s = self.left_s[found.ends[:, -1]]
        bound_s: Floats = np.maximum(found.loads_s.max(axis=1), found.loads_s @ self.weights + rest_s)
        return bound_s

    def _uneven_s(self, found: _Beam, stages: int, count: int) -> Floats:
        """By cut: its bound, or the load of devices whose stages are all as long as its longest, or as the rest's."""
        longest_s = self.problem.stages_per_device * found.largest_s
        rest_s = self.left_s[found.ends[:, -1]] * count / max(1, count - stages)
        uneven_s: Floats = np.maximum(self._bound_s(found), np.maximum(longest_s, rest_s))
        return uneven_s

    def _grown(self, found: _Beam, stage: int, count: int, below_s: float) -> _Beam:
        """Every way to add ``stage`` that may stay below a load."""
        device, last = stage % len(self.devices), len(self.at) - 1
        starts = found.ends[:, -1] if stage else np.zeros(len(found.ends), np.int64)
        ends = np.array([last]) if stage == count - 1 else np.arange(1, last - (count - 2 - stage))
        rows, columns = np.nonzero(
            (self.units[ends] > self.units[starts][:, None])
            & (self.barred[device][ends] == self.barred[device][starts][:, None])
        )
        starts, ends = starts[rows], ends[columns]
        before_s = self.cut_s[device - 1][starts] if stage else 0.0
        behind_s = self.cut_s[device][ends] if stage < count - 1 else 0.0
        own_s = self.work_s[device][ends] - self.work_s[device][starts] + before_s + behind_s
        loads_s = found.loads_s[rows]
        loads_s[:, device] += own_s
        grown = _Beam(np.column_stack([found.ends[rows], ends]), loads_s, np.maximum(found.largest_s[rows], own_s))
        return grown.take(np.flatnonzero(self._bound_s(grown) <= below_s))


def _summed(values: npt.NDArray[np.generic], at: Integers) -> Floats:
    """By row: the sums of all before each of the positions ``at``."""
    sums: Floats = np.zeros((values.shape[0], values.shape[1] + 1))
    np.cumsum(values, axis=1, out=sums[:, 1:])
    return sums[:, at]


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
