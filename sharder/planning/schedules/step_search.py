"""The search for a split with a shorter step than that of the least largest load.

The search of partition.py makes the largest load least, and proves it. That is nearly all there is to a step of many
micro-batches on devices that are alike. With few, or on devices of unlike speed, a split with a larger load may have
the shorter step, as it has less before the slowest stage or leaves out a device. It is looked for by moves from several
splits on, of blocks over one cut and of stages to other devices: the move with the shortest simulated step is made.
Where there are few splits, all that the bounds (1) to (3) of step_bound.py allow are simulated, and the step is proven
the shortest.

How much is tried is counted, not timed, so that a plan does not hang on the speed of the machine that makes it.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import operator
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from shardwright.sharder.planning.exact.even import NAIVE, even_splits, naive_split
from shardwright.sharder.planning.exact.search import Lattice, Stages, closed_sets
from shardwright.sharder.planning.problem import Problem, bits
from shardwright.sharder.planning.schedules.near_splits import NearSplits
from shardwright.sharder.planning.schedules.simulate import StageCost, steps_of
from shardwright.sharder.planning.schedules.stage_costs import rules_of, stage_costs, stages_anew
from shardwright.sharder.planning.schedules.step_bound import bound_s, engine_times, least_times
from shardwright.sharder.planning.schedules.zero_bubble import divides
from shardwright.sharder.planning.split_loads import stage_loads

__all__ = ["SHORTER", "Shortest", "shortest_step"]

MOST_BLOCKS = 2_000
"""For more, nothing is tried: their loads alone take longer than all else."""
MOST_WORK = 40_000
"""Of all splits that are simulated for moves: their blocks, and their stages' micro-batches."""
MOST_PROOF = 100_000
"""Likewise, to prove that no step is shorter."""
FEWEST_SPLITS = 16
"""So many are simulated, however much each of them is."""
AT_ONCE = 32
"""Of the moves from a split, so many of the least bounds are simulated."""
EVEN = 3
"""Of the even splits of one number of stages so many are starts."""
HOPEFUL = 1.5
"""A split with a step longer than so many times the known one's is no start."""
NEAR, OTHERS = 1.1, 6
"""Splits whose steps are at most so many times the shortest are other ones, and at most so many."""
MOST_CLOSED, MOST_CUTS = 2_000, 10**6
"""Every split is looked for with so many closed sets at most, and so many ways to choose one for each cut."""
MOST_BEGINNINGS = 20_000
"""So many beginnings of splits are looked at for that."""
SHORTER = 1e-6
"""A step that is not shorter by this share of it is the same one."""


class Stepped(NamedTuple):
    """A split with its step."""

    step_s: float
    """Simulated, of the median times."""
    load_s: float
    """The largest of a device."""
    stages: Stages


class Shortest(NamedTuple):
    """A split with a short step."""

    step_s: float
    """At the median times."""
    stages: Stages
    proven: bool
    """Whether no split of several stages, one a device, has a shorter step at the median times."""
    others: tuple[Stages, ...] = ()
    """Splits with nearly as short a step, the naive ones among them: one of them may be faster where speeds vary."""


def shortest_step(problem: Problem, known: Stages, *, train: bool) -> Shortest:
    """The split with the shortest step that was found; the step is no longer than that of the naive splits that fit.

    Of more than ``MOST_BLOCKS`` blocks it is ``known``.

    Args:
        problem: of one stage a device.
        known: a split that fits. Only a split with several stages takes the place of one with several.
        train: whether there are backwards.
    """
    search = _StepSearch(problem, train=train)
    best = search.best_of([known])
    assert best is not None, "a split that is known fits"
    if len(known) < 2 or len(problem.blocks) > MOST_BLOCKS:
        return Shortest(best.step_s, known, proven=False)
    starts = search.starts(best)
    ends = [search.descended(start) for start in starts]
    best, proven = _AllSplits(search, min([best, *ends])).shortest()
    stages = search.near.in_order(best.stages)
    stages = known if stages == search.near.in_order(known) else stages
    near = (one.stages for one in sorted({*starts, *ends}) if one.step_s <= NEAR * best.step_s)
    others = [other for other in dict.fromkeys(map(search.near.in_order, near)) if other not in (stages, known)]
    return Shortest(best.step_s, stages, proven, tuple(others[:OTHERS]))


class _StepSearch:
    """Moves from split to split, each of which is taken once."""

    def __init__(self, problem: Problem, *, train: bool) -> None:
        self.problem, self.rules = problem, rules_of(problem, train=train)
        self.work = len(problem.blocks) + problem.microbatches * problem.most_stages
        """Of one split."""
        self.left = max(MOST_WORK // self.work, FEWEST_SPLITS)
        """So many splits may still be simulated for moves."""
        self._taken: set[Stages] = set()
        self._works: dict[tuple[int, int], tuple[float, float]] = {}
        self.forwards, self.backwards = least_times(problem)
        self.engine = engine_times(problem)
        self.near = NearSplits(problem)

    def starts(self, known: Stepped) -> list[Stepped]:
        """Splits to move from: the known one, the naive ones, and the best even ones of each number of stages."""
        found = [known]
        for weight in NAIVE.values():
            naive = self._new([naive_split(self.problem, weight)])
            found += filter(None, [self.best_of(naive)])
        even: dict[int, list[Stages]] = {}
        for stages in self._new(split.stages for split in even_splits(self.problem, self.near.device_orders())):
            even.setdefault(len(stages), []).append(stages)
        for alike in even.values():
            fitting = (self._checked(*one) for one in self._simulated(alike) if one[0] <= known.step_s * HOPEFUL)
            found += itertools.islice(filter(None, fitting), EVEN)
        return found

    def descended(self, at: Stepped) -> Stepped:
        """Where the moves from ``at`` on that make the step shorter lead to."""
        while self.left > 0:
            found = self.best_of(self._new(self.near.of(at.stages), at.step_s), at.step_s * (1 - SHORTER))
            if found is None:
                break
            at = found
        return at

    def _new(self, splits: Iterable[Stages], below_s: float = math.inf) -> list[Stages]:
        """Those of ``splits`` that were not taken yet and may be shorter than so many seconds; as many as are left, of
        the least bounds."""
        new = [stages for stages in dict.fromkeys(splits) if self.may_be(len(stages)) and stages not in self._taken]
        hopeful = sorted((bound_s, stages) for stages in new if (bound_s := self._bound_s(stages)) < below_s)
        taken = [stages for _, stages in hopeful[: max(0, min(self.left, AT_ONCE))]]
        self._taken.update(taken)
        self.left -= len(taken)
        return taken

    def may_be(self, stages: int) -> bool:
        """Whether a split may have so many stages: several, which the engine takes."""
        parted = self.problem.schedule == "zero-bubble"
        return stages > 1 and (not parted or divides(stages, self.problem.microbatches))

    def best_of(self, splits: Sequence[Stages], below_s: float = math.inf) -> Stepped | None:
        """The fitting one of ``splits`` with the shortest step; None where none is below so many seconds."""
        best: Stepped | None = None
        for least_s, stages in self._simulated(splits):
            if least_s >= below_s:
                break
            found = self._checked(least_s, stages)
            if found is not None and found.step_s < below_s:
                best, below_s = found, found.step_s
        return best

    def _simulated(self, splits: Sequence[Stages]) -> list[tuple[float, Stages]]:
        """Steps that ``splits`` do not go below, the shortest first; what does not fit may have one."""
        groups: dict[int, list[Stages]] = {}
        for stages in splits:
            groups.setdefault(len(stages), []).append(stages)
        found: list[tuple[float, Stages]] = []
        for group in groups.values():
            steps = steps_of([self._least_costs(s) for s in group], self.problem.microbatches, **self.rules)
            found += zip(steps, group, strict=True)
        return sorted(found)

    def _least_costs(self, stages: Stages) -> Sequence[StageCost]:
        """The costs of ``stages``, or less where some may be computed anew: whether they fit otherwise takes longer."""
        costs = stage_costs(self.problem, stages, [self.problem.recompute == "always"] * len(stages))
        if self.problem.recompute != "auto":
            return costs
        again = (sum(self.problem.blocks[v].again_s(device) for v in bits(members)) for device, members in stages)
        return [
            dataclasses.replace(cost, forward_s=min(cost.forward_s, s)) for cost, s in zip(costs, again, strict=True)
        ]

    def _checked(self, least_s: float, stages: Stages) -> Stepped | None:
        """``stages`` with their own step, which is not below ``least_s``; None if they do not fit."""
        loads = stage_loads(self.problem, stages)
        if loads is None:
            return None
        if self.problem.recompute == "auto":
            costs = stage_costs(self.problem, stages, stages_anew(self.problem, stages))
            (least_s,) = steps_of([costs], self.problem.microbatches, **self.rules)
        return Stepped(least_s, max(loads), stages)

    def _bound_s(self, stages: Stages) -> float:
        """A step of ``stages`` is no shorter: (1) to (3)."""
        return bound_s(self.problem, [self._work_s(*stage) for stage in stages])

    def _work_s(self, device: int, members: int) -> tuple[float, float]:
        """What a stage takes for a micro-batch, forward and backward."""
        key = device, members
        if key not in self._works:
            blocks, own = [*bits(members)], self.engine[device]
            forward_s, backward_s = (sum(each[v][device] for v in blocks) for each in (self.forwards, self.backwards))
            self._works[key] = forward_s + own[0], backward_s + own[1]
        return self._works[key]


class _AllSplits:
    """Every split of several stages whose step may be shorter, if they are few enough."""

    def __init__(self, search: _StepSearch, best: Stepped) -> None:
        self.search, self.best = search, best
        self.problem = search.problem
        self.beginnings, self.splits = MOST_BEGINNINGS, max(MOST_PROOF // search.work, FEWEST_SPLITS)
        """So many may still be looked at, and so many simulated."""
        self._waiting: list[Stages] = []

    def shortest(self) -> tuple[Stepped, bool]:
        """The best of all, or of those that were looked at, and whether these were all."""
        lattice = closed_sets(self.problem.predecessors, MOST_CLOSED)
        if lattice is None or len(lattice) ** (self.problem.most_stages - 1) > MOST_CUTS:
            return self.best, False
        self._sums = _sums_of(self.search.forwards, self.search.backwards, lattice)
        self._everything = (1 << len(self.problem.blocks)) - 1
        complete = self._go_on((), 0, ())
        self._simulate()
        return self.best, complete

    def _go_on(self, stages: Stages, closed: int, works: tuple[tuple[float, float], ...]) -> bool:
        """Look at all splits that begin with ``stages``, which hold ``closed`` and take ``works``; whether it was."""
        for device in self.search.near.unused(stages):
            if self.search.may_be(len(stages) + 1):
                self._offer((*stages, (device, self._everything & ~closed)), works)
            if len(stages) + 1 == self.problem.most_stages:
                continue
            for larger in self._sums:
                if larger & closed != closed or larger in (closed, self._everything):
                    continue
                self.beginnings -= 1
                if self.beginnings < 0 or self.splits < 0:
                    return False
                more = (*works, self._work_s(device, closed, larger))
                rest_s = self._sums[self._everything][2] - self._sums[larger][2]
                least_s = bound_s(self.problem, more, rest_s, self.problem.most_stages - len(more))
                if least_s < self._ceiling_s and not self._go_on((*stages, (device, larger & ~closed)), larger, more):
                    return False
        return True

    @property
    def _ceiling_s(self) -> float:
        return self.best.step_s * (1 - SHORTER)

    def _work_s(self, device: int, closed: int, larger: int) -> tuple[float, float]:
        """Forward and backward of a stage of what is between two closed sets."""
        (forwards, backwards, _), (less, fewer, _) = self._sums[larger], self._sums[closed]
        own = self.search.engine[device]
        return forwards[device] - less[device] + own[0], backwards[device] - fewer[device] + own[1]

    def _offer(self, stages: Stages, works: tuple[tuple[float, float], ...]) -> None:
        """Have ``stages`` simulated if they may be shorter; ``works`` are those of all but the last."""
        device, members = stages[-1]
        last = self._work_s(device, self._everything & ~members, self._everything)
        if bound_s(self.problem, [*works, last]) < self._ceiling_s:
            self._waiting.append(stages)
            self.splits -= 1
        if len(self._waiting) == AT_ONCE:
            self._simulate()

    def _simulate(self) -> None:
        """Take the best of those that wait."""
        self.best = self.search.best_of(self._waiting, self._ceiling_s) or self.best
        self._waiting.clear()


def _sums_of(
    forwards: Sequence[Sequence[float]], backwards: Sequence[Sequence[float]], lattice: Lattice
) -> dict[int, tuple[list[float], list[float], float]]:
    """By closed set: the sums of its blocks' times on each device, and what these take at least."""
    none = [0.0] * len(forwards[0])
    least_s = [min(map(operator.add, *both)) for both in zip(forwards, backwards, strict=True)]
    sums = {0: (none, none, 0.0)}
    for closed, larger_sets in lattice.items():
        forward_s, backward_s, so_far_s = sums[closed]
        for v, larger in larger_sets:
            if larger not in sums:
                sums[larger] = (
                    [*map(operator.add, forward_s, forwards[v])],
                    [*map(operator.add, backward_s, backwards[v])],
                    so_far_s + least_s[v],
                )
    return sums
