"""The best split so far and the proven bound, and what makes them better where not all closed sets can be searched."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial

from shardwright.errors import ShardwrightError
from shardwright.sharder.planning.exact.coarse import Coarse
from shardwright.sharder.planning.exact.even import best_even_split, even_splits
from shardwright.sharder.planning.exact.line import split_line
from shardwright.sharder.planning.exact.search import ROUNDING, Stages, simple_bound_s
from shardwright.sharder.planning.formulation.device_classes import alike_devices, as_roomy_devices, orders_to_try
from shardwright.sharder.planning.problem import Problem
from shardwright.sharder.planning.split_loads import stage_loads
from shardwright.sharder.planning.wide.afresh import begun_afresh
from shardwright.sharder.planning.wide.ceilings import NEAR, Narrowed, narrowed
from shardwright.sharder.planning.wide.device_orders import device_by_device, possible
from shardwright.sharder.planning.wide.lists import Lists
from shardwright.sharder.planning.wide.mincut import least_transfer_s, transfer_bound_s
from shardwright.sharder.planning.wide.mixed_cuts import mixed_transfer_bound_s
from shardwright.sharder.planning.wide.orders import best_of_orders
from shardwright.sharder.planning.wide.recut import WIDEST, WIDEST_ALIKE, Neighbours
from shardwright.sharder.planning.wide.room import making_room
from shardwright.sharder.planning.wide.shifting import Annealing, shifted

__all__ = ["Incumbent", "Partition"]

LONG_SUMS = 1e-9
"""Differences of sums over ten thousand blocks differ from the sums of a few of them by less than this share."""

UNTIL = 0.7, 0.95, 0.95, 0.95
UNTIL_LISTED = 0.05, 0.4, 0.55, 0.95
UNTIL_EVEN = 0.05, 0.2, 0.4, 0.95
UNTIL_SETS = 0.1, 0.2, 0.4, 0.95
UNTIL_ORDERED = 0.1, 0.45, 0.6, 0.95
UNTIL_FITTED = 0.45, 0.6, 0.75, 0.95
"""Shares of the time until which, in a graph with too many closed sets, orders, moves of blocks, neighbours split anew
and lists of cuts are tried: where there are no lists, where there are, where transfers cost nothing and lists alone
even out the work, where lists are over sets of devices, where orders of devices had some of the time before, and where
a split that fits was to be found first."""
ORDERED = 0.35
"""So large a share of the time passes until orders of devices are left off, at most."""
MOST_RECUT = 1_000
"""Of more blocks neighbours alone have too many sets, and orders and moves have the time."""
CUTS = 0.1
"""So large a share of the time goes to the bound by least cuts before anything is moved, at most."""
QUICK = 0.1
"""Lists are tried for a moment before moves, until this share of the time at most: they may be short."""
MORE_LISTS = 0.2
"""Lists without an answer in so much of the time have no more of it, and moves have the rest. Where the transfers that
are summed up with compute are not in what is listed each answer counts anew, else one is enough."""


@dataclass(frozen=True)
class Partition:
    """Stages in order, as device index and bit mask of blocks. ``value_s`` is the largest load of a device."""

    stages: Stages
    value_s: float
    bound_s: float
    """No split of this problem has a smaller largest load; to one part in a million, where CP-SAT has proven it."""
    exact: bool


def _passed(spent: Callable[[float], bool]) -> float:
    """The share of the time that has passed, to a hundredth."""
    return next((percent / 100 for percent in range(1, 101) if not spent(percent / 100)), 1.0)


class Incumbent:
    """The best split so far, and the proven bound."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.stages: Stages = ()
        self.value_s = math.inf
        self.bound_s = simple_bound_s(problem)
        self.annealing = Annealing(random.Random(0))
        """Whose runs learn from all before."""
        self.none_fits = False
        """Whether that is proven."""

    @cached_property
    def lists(self) -> Lists:
        """Of the sets that cuts may be."""
        return Lists(self.problem)

    @property
    def proven(self) -> bool:
        """Whether nothing better exists."""
        return bool(self.stages) and self.bound_s >= self.value_s * (1 - ROUNDING)

    @property
    def near(self) -> bool:
        """Whether no more than ``NEAR`` can be gained, for which nothing is moved: measurements do not know it."""
        return self.value_s - self.bound_s <= NEAR * self.value_s < math.inf

    def offer(self, stages: Stages) -> None:
        """Take ``stages`` if they are feasible and better."""
        loads = stage_loads(self.problem, stages)
        if loads and max(loads) < self.value_s:
            self._take(stages, max(loads))

    def _take(self, stages: Stages, value_s: float) -> None:
        self.value_s, self.stages = value_s, stages
        self.bound_s = min(self.bound_s, value_s)  # which rounding may have put above it

    def take_even_splits(self, spent: Callable[[float], bool]) -> None:
        """Take the first of the best even splits if it is better; one is looked at whatever time has passed.

        Args:
            spent: whether a share of the time has passed.
        """
        splits = even_splits(self.problem, orders_to_try(self.problem))
        found = best_even_split(splits, partial(stage_loads, self.problem), self.value_s, spent)
        if found is not None:
            self._take(*found)

    def relax(self, relaxed: Partition) -> None:
        """Take the bound of a relaxed problem, and its stages if they are good."""
        self.bound_s = max(self.bound_s, relaxed.bound_s)
        self.offer(relaxed.stages)

    def take_line(self, out_of_time: Callable[[], bool]) -> None:
        """Take the best split of a chain if it fits; without memory and ties it is a bound on all of them."""
        problem, blocks = self.problem, range(len(self.problem.blocks))
        split = split_line(
            problem,
            blocks,
            alike_devices(problem),
            orders_to_try(problem),
            bound_s=self.bound_s,
            out_of_time=out_of_time,
        )
        if split is None:
            return
        self.offer(split.stages)
        same = abs(self.value_s - split.value_s) <= LONG_SUMS * split.value_s
        # The same loads, summed up in another order.
        self.bound_s = self.value_s if same and split.bound_s == split.value_s else max(self.bound_s, split.bound_s)

    def try_orders(self, left_s: Callable[[float], float]) -> None:
        """Take the best of many orders of the blocks, and of moves from stage to stage, if it fits, and the bound that
        its value allows.

        Args:
            left_s: seconds until a share of the time has passed.
        """
        problem = self.problem

        def spent(share: float) -> bool:
            return left_s(share) <= 0

        classes, device_orders, listable = alike_devices(problem), orders_to_try(problem), self.lists.possible
        ordered = listable and problem.times_differ and not self.lists.in_proportion and possible(problem)
        shares = UNTIL_ORDERED if ordered else self._shares()
        start = self.stages
        if not start:
            start, shares = self._make_room(spent), UNTIL_FITTED
        if self.none_fits or not start:
            return
        orders_over, moves_over, anew_over, lists_over = (partial(spent, share) for share in shares)

        def best() -> tuple[Stages, float]:
            return self.stages, self.value_s

        if self.stages:
            for stages in best_of_orders(problem, classes, device_orders, best, self.bound_s, orders_over):
                self.offer(stages)
            for found in narrowed(self.lists, best, self.bound_s, partial(spent, QUICK), quick=True):
                self._narrow(found)
            self._count_transfers(partial(spent, shares[0] + CUTS))
            if ordered and not self.near:
                for found in device_by_device(problem, best, left_s(ORDERED)):
                    self._narrow(found)
        if not self.near:
            self._take_moves(start, device_orders, moves_over, anew_over if listable else lists_over)
        telling = self.lists.with_transfers or problem.overlap  # what binds is in what is listed, or may well be
        without_answer = shares[2] if telling else _passed(spent)

        def lists_idle() -> bool:
            return lists_over() or spent(without_answer + MORE_LISTS)

        for found in narrowed(self.lists, best, self.bound_s, lists_idle):
            without_answer = 1.0 if telling else _passed(spent)
            self._narrow(found)
        if self.near:
            return
        if listable and self.stages:
            for stages in shifted(problem, best, self.bound_s, lists_over, annealing=self.annealing):
                self.offer(stages)
        self._count_transfers(partial(spent, 1.0))

    def _shares(self) -> tuple[float, float, float, float]:
        """The shares of the time for what is tried, where orders of devices have none."""
        problem = self.problem
        if not self.lists.with_transfers or len(problem.blocks) > MOST_RECUT:
            return UNTIL
        if problem.times_differ:
            return UNTIL_SETS
        return UNTIL_LISTED if any(least_transfer_s(problem, tensor) for tensor in problem.crossings) else UNTIL_EVEN

    def _count_transfers(self, out_of_time: Callable[[], bool]) -> None:
        """Take the bound by what transfers no split avoids."""
        if out_of_time():
            return
        if self.problem.times_differ:
            moved_s = mixed_transfer_bound_s(self.problem, self.lists.weight_of_each, self.value_s, out_of_time)
        else:
            moved_s = transfer_bound_s(self.problem, self.value_s, out_of_time)
        self.bound_s = max(self.bound_s, min(self.value_s, moved_s))

    def _take_moves(
        self,
        start: Stages,
        device_orders: list[list[int]],
        moves_over: Callable[[], bool],
        anew_over: Callable[[], bool],
    ) -> None:
        """Take what moves from stage to stage lead to, from ``start`` and begun afresh, and neighbours split anew."""
        problem = self.problem

        def best() -> tuple[Stages, float]:
            return self.stages, self.value_s

        for stages in shifted(problem, best, self.bound_s, moves_over, start, self.annealing):
            self.offer(stages)
        neighbours = Neighbours(self.lists, partial(stage_loads, problem), anew_over)
        widest = WIDEST if problem.times_differ else WIDEST_ALIKE
        if not self.near:
            for stages in neighbours.split_anew(self.stages, widest):
                self.offer(stages)
        begun = begun_afresh(problem, alike_devices(problem), device_orders, best, self.bound_s, anew_over, neighbours)
        for stages in begun:
            self.offer(stages)

    def _narrow(self, found: Narrowed) -> None:
        """Take the split of an answer, or its bound."""
        self.offer(found.stages)
        self.bound_s = max(self.bound_s, min(self.value_s, found.bound))

    def _make_room(self, spent: Callable[[float], bool]) -> Stages:
        """Take the first split that fits, or see that none does; a split that is near to it, if there is one."""
        stages, problem = self.stages, self.problem
        starts = [split.stages for split in even_splits(problem, orders_to_try(problem))]
        for found in making_room(problem, starts, as_roomy_devices(problem), orders_to_try(problem), spent):
            self.none_fits = found.bound > max(problem.caps)
            self.offer(found.stages)
            if self.none_fits or self.stages:
                break
            stages = found.stages or stages
        return self.stages or stages

    def take_coarse(self, coarse: Coarse, split: Callable[[Problem], Partition | None]) -> None:
        """Take the best split of a problem with fewer blocks, which has all that are better than this, or its bound.

        Args:
            coarse: made with the value of this.
            split: what splits it.

        Raises:
            ShardwrightError: it was cut short before any split was found, and there is none here.
        """
        try:
            found = split(coarse.problem)
        except ShardwrightError:
            if not self.stages:
                raise
            return
        if found is None:  # what is left out is no better
            self.bound_s = self.value_s
            return
        self.offer(coarse.unfolded(found.stages))
        assert self.stages  # what fits as coarse blocks fits
        same = found.exact and self.value_s <= found.value_s * (1 + LONG_SUMS)
        self.bound_s = self.value_s if same else max(self.bound_s, min(self.value_s, found.bound_s))

    @property
    def result(self) -> Partition:
        """What was found."""
        return Partition(self.stages, self.value_s, self.value_s if self.proven else self.bound_s, self.proven)

    def improve(self, below: Callable[[float], Stages | None], *, proves: bool) -> None:
        """Take the best split ``below`` ceilings; where none is found, and that ``proves`` it, the bound rises."""
        low, slack = self.bound_s, 0.01
        while low < (target := self.value_s * (1 - ROUNDING)):
            ceiling = min(target, low * (1 + slack)) if low > 0 else target
            found = below(ceiling)
            if found is not None:
                self.offer(found)
                continue
            low, slack = ceiling, 4 * slack
            if proves:
                self.bound_s = low
