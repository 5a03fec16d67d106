r"""Graphs with too many closed sets: whether any split is below a ceiling, from the few sets that its cuts may be.

For devices that are alike, and transfers that are relayed. Let all loads of S stages be at most T, and I1 < ... < IS-1
be what comes before their cuts. With w the work of a set and x the transfers of the cut behind it, for one end,

    w(Is) + x(Is)  <=  w(Is-1) - x(Is-1) + T        w(Is) - x(Is)  >=  w(Is+1) + x(Is+1) - T

so that a chain of such sets is found from either end, one cut at a time: from the sets that the last cut may be, all
that the next may be are listed (listing.py), until the ends meet or one has none. With B the largest w - x of the last
sets from the left, which cut l may be, and A the least w + x from the right, of cut r, a cut s between them has

    w(Is) + x(Is) <= B + (s - l) T - 2 * (least x of the cuts from l to s)
    w(Is) - x(Is) >= A - (r - s) T + 2 * (least x of the cuts from s to r)

and what these allow is not much where T is near the optimum: transfers that cannot be avoided leave little room for
others, and for waiting. The least x of a cut is found by listing with ever more x allowed. That there is no chain is
proven for every split; ties, memory, pins and worse links only rule out more. Assembly lines, which are balanced in
this way without transfers, are solved so from both ends by Sewell and Jacobson, "A branch, bound, and remember
algorithm for the simple assembly line balancing problem", INFORMS Journal on Computing 2012.

Where the sets are too many the ceiling is left undecided, and a lower one is asked for.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from shardwright.sharder.planning.listing import Cuts, Family, Listing, TooManyError
from shardwright.sharder.planning.nesting import Floats, Indices, Masks, TooManyPairsError, within_each
from shardwright.sharder.planning.problem import Problem
from shardwright.sharder.planning.search import OutOfTimeError, Stages

__all__ = ["Narrowed", "can_list", "chain_below", "narrowed", "within"]

QUICK_STEPS = 500_000
"""So many undecided sets are gone through for the least transfers of a cut, at some tenths of a microsecond each."""
STEPS = (2_000_000, 12_000_000, 72_000_000)
"""The same for what one cut may be: at first, and when what was left undecided is asked for again."""
AIM = 0.0098
"""The first ceiling is so much below the best split: if nothing is under it, the gap is below 1%."""
NEAR = 2e-4
"""Between a ceiling that is proven and one that is undecided nothing is tried if they are nearer than that."""
MOST_KEPT = 3_000
"""Of too many sets so many are gone on with."""
PAIRS_A_STEP = 100
"""So many pairs of sets are looked at in the time of some undecided sets."""


class Narrowed(NamedTuple):
    """One answer: a split to be looked at, or a bound."""

    stages: Stages
    bound: float
    """No largest load is below: seconds, or whatever the loads of the problem are."""


class UndecidedError(Exception):
    """There are too many sets."""


class _NoneError(Exception):
    """No chain is below the ceiling."""


class _Chain:
    """The search for a chain of ``stages`` with loads of ``ceiling_s`` at most; ``steps`` for each list."""

    def __init__(self, listing: Listing, stages: int, ceiling_s: float, steps: int) -> None:
        self.listing, self.count, self.ceiling_s, self.steps = listing, stages, ceiling_s, steps
        self.left, self.right = 0, stages
        self.cuts = {0: listing.nothing, stages: listing.everything}
        self.least = [0.0] * (stages + 1)
        """By cut: what x is not below."""
        self.complete = True
        """Whether every chain goes through the sets that are listed."""

    def found(self) -> list[int] | None:
        """The sets behind the stages, or None where there is no such chain.

        Raises:
            UndecidedError: there may be one.
        """
        with contextlib.suppress(_NoneError):
            self._narrow()
            while self.left + 1 < self.right:
                self._extend()
                self._narrow()
            chain = self._joined()
            if chain is not None:
                return chain
        if not self.complete:
            raise UndecidedError
        return None

    def _range(self, cut: int) -> tuple[float, float]:
        """What w - x of a cut in the middle is not below, and w + x not above."""
        before, behind = self.cuts[self.left], self.cuts[self.right]
        most = float((before.work_s - before.moved_s).max())
        fewest = float((behind.work_s + behind.moved_s).min())
        spared = 2 * sum(self.least[self.left + 1 : cut]), 2 * sum(self.least[cut + 1 : self.right])
        low = fewest - (self.right - cut) * self.ceiling_s + spared[1]
        return low, most + (cut - self.left) * self.ceiling_s - spared[0]

    def _narrow(self) -> None:
        """Raise the least x of each cut in the middle, those at the ends first."""
        middle = range(self.left + 1, self.right)
        for cut in sorted(middle, key=lambda cut: min(cut - self.left, self.right - cut)):
            low, high = self._range(cut)
            room = (high - low) / 2  # as low <= w - x and w + x <= high
            if room < -self.listing.slack_s:
                raise _NoneError
            self._raise_least(cut, low, high, room)

    def _raise_least(self, cut: int, low: float, high: float, room: float) -> None:
        allowed = max(room / 16, self.least[cut])
        while True:
            try:
                sets = self.listing.sets(low, high, min(allowed, room), min(QUICK_STEPS, self.steps))
            except TooManyError:
                return
            if sets:
                self.least[cut] = max(self.least[cut], float(sets.moved_s.min()) - self.listing.slack_s)
                return
            if allowed >= room:
                raise _NoneError
            self.least[cut] = max(self.least[cut], allowed)
            allowed *= 1.5

    def _extend(self) -> None:
        """List what the next cut may be, from the end that has fewer sets; of too many, some."""
        before, behind = self.cuts[self.left], self.cuts[self.right]
        from_left = len(before.work_s) <= len(behind.work_s)
        cut = self.left + 1 if from_left else self.right - 1
        low, high = self._range(cut)
        beside = Family(before, "before", self.ceiling_s) if from_left else Family(behind, "behind", self.ceiling_s)
        try:
            sets = self._beside(low, high, beside)
        except TooManyError as error:
            self.complete = False
            # Those that leave least to the other stages.
            done = error.some.moved_s - error.some.work_s if from_left else error.some.moved_s + error.some.work_s
            sets = error.some.first(MOST_KEPT, done)
        self.cuts[cut] = sets
        if from_left:
            self.left = cut
        else:
            self.right = cut
        if not sets:
            raise _NoneError

    def _beside(self, low: float, high: float, beside: Family) -> Cuts:
        """All sets between ``low`` and ``high`` that are a stage away from one of a family.

        The same set comes next to many: where all that there are can be listed, that is done once, and not for each
        of the family.
        """
        with contextlib.suppress(TooManyError):
            sets = self.listing.sets(low, high, (high - low) / 2, self.steps)
            return self._next_to(sets, beside)
        return self.listing.sets(low, high, (high - low) / 2, self.steps, beside)

    def _next_to(self, sets: Cuts, beside: Family) -> Cuts:
        """Those of ``sets`` that are a stage away from one of a family."""
        start, end = sets.work_s - sets.moved_s, sets.work_s + sets.moved_s
        theirs, reach = beside.cuts, self.ceiling_s + 2 * self.listing.slack_s
        too_many = False
        try:
            if beside.come == "before":
                begin = theirs.work_s - theirs.moved_s + reach
                origin = self._within_each(theirs.masks, begin, sets.masks, end)
            else:  # the other way round: what is not in those behind is not in these either
                begin = reach - theirs.work_s - theirs.moved_s
                origin = self._within_each(~theirs.masks, begin, ~sets.masks, -start)
        except TooManyPairsError as error:
            origin, too_many = error.some, True
        kept = np.flatnonzero(origin >= 0)
        found = Cuts(sets.masks[kept], sets.work_s[kept], sets.moved_s[kept], origin[kept])
        if too_many:
            raise TooManyError(found)
        return found

    def _within_each(self, inner: Masks, start: Floats, outer: Masks, needed: Floats, *, one: bool = False) -> Indices:
        pairs = PAIRS_A_STEP * self.steps
        out_of_time = self.listing.out_of_time
        return within_each(inner, start, outer, needed, pairs=pairs, out_of_time=out_of_time, one_is_enough=one)

    def _joined(self) -> list[int] | None:
        """A chain through one of the sets on the left and one on the right that is a stage away from it."""
        pair = self._pair()
        if pair is None:
            return None
        chain = {self.left: pair[0], self.right: pair[1]}
        for cut in range(self.left, 0, -1):
            chain[cut - 1] = int(self.cuts[cut].origin[chain[cut]])
        for cut in range(self.right, self.count):
            chain[cut + 1] = int(self.cuts[cut].origin[chain[cut]])
        return [self.cuts[cut].mask(chain[cut]) for cut in range(1, self.count + 1)]

    def _pair(self) -> tuple[int, int] | None:
        before, behind = self.cuts[self.left], self.cuts[self.right]
        start, end = before.work_s - before.moved_s, behind.work_s + behind.moved_s
        begin = start + self.ceiling_s + 2 * self.listing.slack_s
        try:
            inside = self._within_each(before.masks, begin, behind.masks, end, one=True)
        except TooManyPairsError:
            raise UndecidedError from None
        last = int(inside.argmax())
        return (int(inside[last]), last) if inside[last] >= 0 else None


def chain_below(listing: Listing, stages: int, ceiling_s: float, steps: int) -> list[int] | None:
    """The closed sets behind ``stages`` stages with loads of ``ceiling_s`` at most, by work and transfers alone.

    Returns:
        As bit masks, smallest first; None where no split is such. Loads may be above by rounding.

    Raises:
        UndecidedError: that is not decided with ``steps`` undecided sets for each cut.
        OutOfTimeError: nor in time.
    """
    if ceiling_s * stages < listing.whole_s - listing.slack_s:
        return None
    return _Chain(listing, stages, ceiling_s, steps).found()


def can_list(problem: Problem) -> bool:
    """Whether loads are sums of work, the same on every device, and of what is relayed."""
    differ = any(len(set(seconds)) > 1 for seconds in problem.seconds)
    return not differ and problem.transfers == "relayed" and not problem.overlap


def within(problem: Problem, ceiling_s: float, out_of_time: Callable[[], bool]) -> Narrowed | None:
    """A split with loads of ``ceiling_s`` at most, as :func:`narrowed` has it, or a bound above that where none has.

    Returns:
        None where this is not decided.
    """
    if not can_list(problem):
        return None
    try:
        found = _any_chain(Listing(problem, out_of_time), problem.most_stages, ceiling_s, STEPS[0])
    except (OutOfTimeError, UndecidedError):
        return None
    return Narrowed((), math.nextafter(ceiling_s, math.inf)) if found is None else Narrowed(_stages(found), 0.0)


def narrowed(
    problem: Problem,
    best: Callable[[], tuple[Stages, float]],
    bound_s: float,
    out_of_time: Callable[[], bool],
) -> Iterator[Narrowed]:
    """Better splits, were there no memory, ties and pins, and bounds on all splits, until they meet or time is up.

    There are none where the sets cannot be listed.

    Args:
        best: the stages of the best split that was taken, and its largest load.
        bound_s: a proven bound.
    """
    if not can_list(problem) or not 0 < best()[1] < math.inf:
        return
    try:
        listing = Listing(problem, out_of_time)
    except OutOfTimeError:
        return
    for steps in STEPS:
        undecided_s = math.inf
        while (ceiling_s := _next_ceiling_s(bound_s, best()[1], undecided_s, 4 * listing.slack_s)) is not None:
            value_s = best()[1]
            try:
                found = _any_chain(listing, problem.most_stages, ceiling_s, steps)
            except OutOfTimeError:
                return
            except UndecidedError:
                undecided_s = ceiling_s
                continue
            if found is None:
                # What is nearer to the best is the same loads, summed up in another order.
                bound_s = value_s if ceiling_s >= value_s - 4 * listing.slack_s else ceiling_s
                yield Narrowed((), bound_s)
                continue
            yield Narrowed(_stages(found), bound_s)
            if best()[1] >= value_s:  # it does not fit, or ties are dear
                undecided_s = ceiling_s
        if undecided_s == math.inf:
            return


def _stages(closed: list[int]) -> Stages:
    """What lies between closed sets, on one device after another; nothing may."""
    members = (b & ~a for a, b in itertools.pairwise([0, *closed]))
    return tuple(enumerate(filter(None, members)))


def _next_ceiling_s(bound_s: float, value_s: float, undecided_s: float, slack_s: float) -> float | None:
    """A ceiling to ask for, between the bound and what is undecided, or the best; None where those are near."""
    last_s = value_s - slack_s
    if undecided_s > last_s:
        if value_s - bound_s <= 4 * NEAR * value_s:
            return last_s if bound_s < last_s else None
        return max(value_s * (1 - AIM), (bound_s + value_s) / 2)
    return (bound_s + undecided_s) / 2 if undecided_s - bound_s > NEAR * value_s else None


def _any_chain(listing: Listing, most_stages: int, ceiling_s: float, steps: int) -> list[int] | None:
    """A chain of any number of stages."""
    for stages in range(most_stages, 0, -1):
        if ceiling_s * stages < listing.whole_s - listing.slack_s:
            break
        found = chain_below(listing, stages, ceiling_s, steps)
        if found is not None:
            return found
    return None
