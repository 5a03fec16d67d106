r"""Graphs with too many closed sets: whether any split is below a ceiling, from the few sets that its cuts may be.

For devices in a given order; device_sets.py has all orders of devices that differ. Let all loads of S stages be at most
T, and I1 < ... < IS-1 be what comes before their cuts. With w the work of a set and x the transfers of the cut behind
it, for one end, where all devices are alike

    w(Is) + x(Is)  <=  w(Is-1) - x(Is-1) + T        w(Is) - x(Is)  >=  w(Is+1) + x(Is+1) - T

so that a chain of such sets is found from either end, one cut at a time: what the next cut may be is listed
(listing.py) and joined to what the last may be (nesting.py), until the ends meet or one has none. With B the largest
w - x of the last sets from the left, which cut l may be, and A the least w + x from the right, of cut r, a cut s
between them has

    w(Is) + x(Is) <= B + (s - l) T - 2 * (least x of the cuts from l to s)
    w(Is) - x(Is) >= A - (r - s) T + 2 * (least x of the cuts from s to r)

and what these allow is not much where T is near the optimum: transfers that cannot be avoided leave little room for
others, and for waiting. The least x of a cut is found by listing with ever more x allowed. That there is no chain is
proven for every split; ties, memory, pins and worse links only rule out more. Assembly lines, which are balanced in
this way without transfers, are solved so from both ends by Sewell and Jacobson, "A branch, bound, and remember
algorithm for the simple assembly line balancing problem", INFORMS Journal on Computing 2012.

Of devices that differ let c be weights, of sum 1, and w the sum of the least c * work of each block over all devices.
The load of a stage, T and x are multiplied by the c of its device: c * load is no less than what is left so, and as
much where the devices' times are in proportion.

Other transfers than those that are relayed one by one, and summed up with compute, are left out, which proves less.

Where the sets are too many the ceiling is left undecided, and a lower one is asked for.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from shardwright.sharder.planning.exact.search import Stages
from shardwright.sharder.planning.wide.listing import Cuts, Family, Listing, TooManyError
from shardwright.sharder.planning.wide.nesting import Floats, Indices, TooManyPairsError, stage_between

__all__ = ["ChainSearch", "Row", "UndecidedError"]

QUICK_STEPS = 500_000
"""So many undecided sets are gone through for the least transfers of a cut, at some tenths of a microsecond each."""
MOST_KEPT = 3_000
"""Of too many sets so many are gone on with."""
SMALL_FAMILY = 16
"""What comes next to each of so few sets is listed at once."""
PAIRS_A_STEP = 100
"""So many pairs of sets are looked at in the time of some undecided sets."""


class UndecidedError(Exception):
    """There are too many sets."""


class _NoneError(Exception):
    """No chain is below the ceiling."""


class _Chain:
    """The search for a chain of stages on devices of these ``weights``, with loads of ``ceiling_s`` at most.

    Where there are too many sets it goes on with ``some`` of them, or gives up, and may be asked again with more steps;
    what was gone on with some of them stays undecided.
    """

    def __init__(self, listing: Listing, weights: Sequence[float], ceiling_s: float) -> None:
        self.listing, self.weights, self.count, self.ceiling_s = listing, weights, len(weights), ceiling_s
        self.steps, self.some = 0, False
        self.left, self.right = 0, self.count
        self.cuts = dict(zip((0, self.count), listing.ends, strict=True))
        self.least = [0.0] * (self.count + 1)
        """By cut: what x is not below."""
        self.complete = True
        """Whether every chain goes through the sets that are listed."""

    def found(self, steps: int, *, some: bool) -> list[int] | None:
        """The sets behind the stages, or None where there is no such chain.

        Raises:
            UndecidedError: there may be one.
        """
        if not self.complete:
            raise UndecidedError
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

    def _start(self, cut: int, sets: Cuts) -> Floats:
        """By set that a cut may be: the earliest that the stage behind it begins, in work."""
        return sets.work_s - self.weights[cut] * sets.moved_s

    def _end(self, cut: int, sets: Cuts) -> Floats:
        """By set that a cut may be: the latest that the stage before it ends."""
        return sets.work_s + self.weights[cut - 1] * sets.moved_s

    def _both(self, cut: int) -> float:
        """What x counts in the two stages at a cut in the middle."""
        return self.weights[cut - 1] + self.weights[cut]

    def _between(self, first: int, last: int) -> float:
        """What the stages between two cuts take at most, but for the transfers between them that cannot be avoided."""
        spared = sum(self._both(cut) * self.least[cut] for cut in range(first + 1, last))
        return sum(self.weights[first:last]) * self.ceiling_s - spared

    def _range(self, cut: int) -> tuple[float, float]:
        """What the start of a cut in the middle is not below, and its end not above."""
        low = float(self._end(self.right, self.cuts[self.right]).min()) - self._between(cut, self.right)
        return low, float(self._start(self.left, self.cuts[self.left]).max()) + self._between(self.left, cut)

    def _narrow(self) -> None:
        """Raise the least x of each cut in the middle, those at the ends first."""
        middle = range(self.left + 1, self.right)
        for cut in sorted(middle, key=lambda cut: min(cut - self.left, self.right - cut)):
            low, high = self._range(cut)
            room = self._room(cut, low, high)
            if room < -self.listing.slack_s:
                raise _NoneError
            self._raise_least(cut, low, high, room)

    def _room(self, cut: int, low: float, high: float) -> float:
        """What x of a cut in the middle is not above, as low is not above the start, nor the end above high.

        What rounding may take from work is much in x where the devices of both stages have small weights.
        """
        return (high - low + 2 * self.listing.slack_s) / self._both(cut)

    def _raise_least(self, cut: int, low: float, high: float, room: float) -> None:
        allowed, steps = max(room / 16, self.least[cut]), min(QUICK_STEPS // self.listing.words, self.steps)
        while True:
            try:
                sets = self.listing.sets(low, high, min(allowed, room), steps, weights=self._beside_cut(cut))
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
        from_left = len(self.cuts[self.left].work_s) <= len(self.cuts[self.right].work_s)
        cut = self.left + 1 if from_left else self.right - 1
        try:
            sets = self._beside(cut, from_left=from_left)
        except TooManyError as error:
            if not self.some:
                raise UndecidedError from None
            self.complete = False
            # Those that leave least to the other stages.
            some = error.some
            sets = some.first(MOST_KEPT, -self._start(cut, some) if from_left else self._end(cut, some))
        self.cuts[cut] = sets
        if from_left:
            self.left = cut
        else:
            self.right = cut
        if not sets:
            raise _NoneError

    def _beside_cut(self, cut: int) -> tuple[float, float]:
        return self.weights[cut - 1], self.weights[cut]

    def _beside(self, cut: int, *, from_left: bool) -> Cuts:
        """All that a cut may be that is a stage away from what was listed on the left, or right.

        The same set comes next to many: where all that there are can be listed, that is done once, and not for each
        of the family.
        """
        low, high = self._range(cut)
        most, weights = self._room(cut, low, high), self._beside_cut(cut)
        beside = self.cuts[self.left if from_left else self.right]
        if len(beside.work_s) > SMALL_FAMILY:
            try:
                sets = self.listing.sets(low, high, most, self.steps, weights=weights)
                return self._next_to(cut, sets, from_left=from_left)
            except TooManyError:
                if not self.some:
                    raise
        if from_left:
            family = Family(beside, "before", self._start(self.left, beside) + weights[0] * self.ceiling_s)
        else:
            family = Family(beside, "behind", self._end(self.right, beside) - weights[1] * self.ceiling_s)
        return self.listing.sets(low, high, most, self.steps, family, weights)

    def _next_to(self, cut: int, sets: Cuts, *, from_left: bool) -> Cuts:
        """Those of ``sets``, which a cut may be, that are a stage away from what was listed on that side."""
        too_many = False
        try:
            if from_left:
                origin = self._stage_between((self.left, self.cuts[self.left]), (cut, sets))
            else:
                origin = self._stage_between((cut, sets), (self.right, self.cuts[self.right]), turned=True)
        except TooManyPairsError as error:
            origin, too_many = error.some, True
        found = sets._replace(origin=origin).take(np.flatnonzero(origin >= 0))
        if too_many:
            raise TooManyError(found)
        return found

    def _stage_between(
        self, before: tuple[int, Cuts], behind: tuple[int, Cuts], *, turned: bool = False, one: bool = False
    ) -> Indices:
        """By set of the cut behind a stage, or before it if ``turned``: one of the other that makes it, or -1.

        Args:
            before: the cut, and what it may be.
            behind: likewise.
            turned: which of the two is asked for.
            one: whether one answer is enough.
        """
        (first, some), (last, others) = before, behind
        start = self._start(first, some) + self.weights[first] * self.ceiling_s + 2 * self.listing.slack_s
        return stage_between(
            (some.masks, start),
            (others.masks, self._end(last, others)),
            turned=turned,
            pairs=PAIRS_A_STEP * self.steps,
            out_of_time=self.listing.out_of_time,
            one_is_enough=one,
        )

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
        try:
            left, right = ((cut, self.cuts[cut]) for cut in (self.left, self.right))
            inside = self._stage_between(left, right, one=True)
        except TooManyPairsError:
            raise UndecidedError from None
        last = int(inside.argmax())
        return (int(inside[last]), last) if inside[last] >= 0 else None


class Row(NamedTuple):
    """Devices one behind the other."""

    devices: tuple[int, ...]
    weights: tuple[float, ...]
    """Of each."""


class ChainSearch:
    """Whether there are chains below one ceiling; what was listed is kept should it be asked for again.

    Args:
        listing: blocks and transfers.
        rows: devices and their weights, stage by stage, which are tried in this order.
        ceiling_s: no load is above, by work and transfers alone.
    """

    def __init__(self, listing: Listing, rows: Iterable[Row], ceiling_s: float) -> None:
        enough = (row for row in rows if ceiling_s * sum(row.weights) >= listing.whole_s - listing.slack_s)
        self.left = [(row.devices, _Chain(listing, row.weights, ceiling_s)) for row in enough]
        self.before = listing.ends[0].mask(0)

    def stages(self, steps: int, *, some: bool = True) -> Stages | None:
        """A split with no load above the ceiling, but for rounding; None where there is none.

        Where devices' times are not in proportion, or there is more than work and transfers, it may be above after all.

        Args:
            steps: so many undecided sets are gone through for each cut, in words of 64 blocks.
            some: whether a chain through some sets is looked for where there are too many.

        Raises:
            UndecidedError: there may be one.
            OutOfTimeError: nor is there time.
        """
        while self.left:
            devices, chain = self.left[0]
            found = chain.found(steps, some=some)
            if found is not None:
                members = (b & ~a for a, b in itertools.pairwise([self.before, *found]))
                return tuple(stage for stage in zip(devices, members, strict=True) if stage[1])
            self.left.pop(0)
        return None
