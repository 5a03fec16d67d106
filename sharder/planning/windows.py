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
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import numpy as np

from shardwright.sharder.planning.listing import Cuts, Family, Listing, TooManyError
from shardwright.sharder.planning.nesting import Floats, Indices, Masks, TooManyPairsError, within_each
from shardwright.sharder.planning.problem import Problem
from shardwright.sharder.planning.search import OutOfTimeError, Stages

__all__ = ["Asked", "Narrowed", "can_list", "narrowed", "within"]

QUICK_STEPS = 500_000
"""So many undecided sets are gone through for the least transfers of a cut, at some tenths of a microsecond each."""
STEPS = (2_000_000, 20_000_000, 150_000_000)
"""The same for what one cut may be: at first, and when what was left undecided is asked for again."""
AIM = 0.0098
"""A ceiling that is so much below the best split is asked for: if nothing is under it, the gap is below 1%."""
ASKED = 0.2, 0.35
"""But none nearer to the bound than so much of the gap, as it would tell little, nor farther: the lower a ceiling is the
fewer sets there are, and a split that is found is as good as a higher bound."""
CLOSE = 3e-3
"""A gap that is no wider is asked for as a whole."""
NEAR = 2e-4
"""Between a ceiling that is proven and one that is undecided nothing is tried if they are nearer than that."""
MOST_KEPT = 3_000
"""Of too many sets so many are gone on with."""
SMALL_FAMILY = 16
"""What comes next to each of so few sets is listed at once."""
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
    """The search for a chain of ``stages`` with loads of ``ceiling_s`` at most; ``steps`` for each list.

    Where there are too many sets it goes on with ``some`` of them, or gives up, and may be asked again with more steps.
    """

    def __init__(self, listing: Listing, stages: int, ceiling_s: float) -> None:
        self.listing, self.count, self.ceiling_s = listing, stages, ceiling_s
        self.steps, self.some = 0, False
        self.left, self.right = 0, stages
        self.cuts = {0: listing.nothing, stages: listing.everything}
        self.least = [0.0] * (stages + 1)
        """By cut: what x is not below."""
        self.complete = True
        """Whether every chain goes through the sets that are listed."""

    def found(self, steps: int, *, some: bool) -> list[int] | None:
        """The sets behind the stages, or None where there is no such chain.

        Raises:
            UndecidedError: there may be one.
        """
        self.steps, self.some = steps // self.listing.words, some
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
                sets = self.listing.sets(low, high, min(allowed, room), min(QUICK_STEPS // self.listing.words, self.steps))
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
            if not self.some:
                raise UndecidedError from None
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
        most = (high - low) / 2
        if len(beside.cuts.work_s) > SMALL_FAMILY:
            try:
                return self._next_to(self.listing.sets(low, high, most, self.steps), beside)
            except TooManyError:
                if not self.some:
                    raise
        return self.listing.sets(low, high, most, self.steps, beside)

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


class Asked:
    """Whether there are chains below one ceiling; what was listed is kept should it be asked for again.

    Args:
        listing: blocks and transfers.
        counts: numbers of stages, which are tried in this order.
        ceiling_s: no load is above, by work and transfers alone.
    """

    def __init__(self, listing: Listing, counts: Iterable[int], ceiling_s: float) -> None:
        enough = (count for count in counts if ceiling_s * count >= listing.whole_s - listing.slack_s)
        self.chains = [_Chain(listing, count, ceiling_s) for count in enough]

    def chain(self, steps: int, *, some: bool = True) -> list[int] | None:
        """The closed sets behind the stages of a split, as bit masks, smallest first; None where no split is such.

        Loads may be above by rounding.

        Args:
            steps: so many undecided sets are gone through for each cut, in words of 64 blocks.
            some: whether a chain through some sets is looked for where there are too many.

        Raises:
            UndecidedError: there may be one.
            OutOfTimeError: nor is there time.
        """
        while self.chains:
            found = self.chains[0].found(steps, some=some)
            if found is not None:
                return found
            self.chains.pop(0)
        return None


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
        found = Asked(Listing(problem, out_of_time), _counts(problem), ceiling_s).chain(STEPS[0])
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
    asked: tuple[float, Asked] | None = None
    for steps in STEPS:
        last = steps == STEPS[-1]
        undecided_s = math.inf
        while (ceiling_s := _next_ceiling_s(bound_s, best()[1], undecided_s, 4 * listing.slack_s)) is not None:
            if undecided_s < math.inf and not last:
                break
            value_s = best()[1]
            try:
                # Where nothing can be proven a split may still be found.
                some = last and undecided_s == math.inf
                if asked is None or asked[0] != ceiling_s:
                    asked = ceiling_s, Asked(listing, _counts(problem), ceiling_s)
                found = asked[1].chain(steps, some=some)
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


def _counts(problem: Problem) -> range:
    return range(problem.most_stages, 0, -1)


def _stages(closed: list[int]) -> Stages:
    """What lies between closed sets, on one device after another; nothing may."""
    members = (b & ~a for a, b in itertools.pairwise([0, *closed]))
    return tuple(enumerate(filter(None, members)))


def _next_ceiling_s(bound_s: float, value_s: float, undecided_s: float, slack_s: float) -> float | None:
    """A ceiling to ask for, between the bound and what is undecided, or the best; None where those are near."""
    last_s = value_s - slack_s
    if undecided_s > last_s:
        if value_s - bound_s <= CLOSE * value_s:
            return last_s if bound_s < last_s else None
        low, high = (bound_s + share * (value_s - bound_s) for share in ASKED)
        return min(max(low, value_s * (1 - AIM)), high)
    return (bound_s + undecided_s) / 2 if undecided_s - bound_s > NEAR * value_s else None
