r"""Devices that differ: whether any split is below a ceiling, for all orders of the devices at once.

Each order by itself (windows.py) is one of 40,320 for eight devices, but what a cut may be depends on which devices
come before it and not on their order: of these sets there are 256, and where some devices are alike the numbers of
each kind tell them. Let D be such numbers, c the kind of the device before a cut and e that of the one behind it, w
their weights, and T the ceiling, all as in windows.py. Closed sets I are listed that D may be before, with

    early(I) + w[c] X(I)  <=  the latest that a stage on c may end        for some c of D
    late(I) - w[e] X(I)   >=  the earliest that a stage on e may begin    for some e that is left

where early(I) is what D have of I at least, and late(I) all work less what the others have of what is not in I
(measures.py). The latest ends follow from the left: that of D is the latest begin of some D without c, and T w[c]
later; a begin behind D is w[c] + w[e] times the least X of D before the end. The earliest begins follow from the right.
Where there is no I within both, D is not what comes before a cut. As in the dynamic programme over sets of Held and
Karp, "A dynamic programming approach to sequencing problems", Journal of SIAM 1962, no order is gone through twice. The
sets with little X are listed once for all ceilings, and tell the least X of each D.

What the cuts are that leave from either end is listed then, from D to D, and joined to the sets of the D before or
behind by what the device between them takes, until the ends meet. Devices that are not used come last, with empty
stages: all blocks may be before any D.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from shardwright.sharder.planning.exact.search import OutOfTimeError, Stages
from shardwright.sharder.planning.wide.listing import Cuts, Family, Listing, Measure, TooManyError
from shardwright.sharder.planning.wide.little_cut import LittleCut
from shardwright.sharder.planning.wide.measures import Measures, State
from shardwright.sharder.planning.wide.nesting import Floats, TooManyPairsError, stage_between
from shardwright.sharder.planning.wide.windows import MOST_KEPT, PAIRS_A_STEP, SMALL_FAMILY, UndecidedError

__all__ = ["MOST_STATES", "DeviceSetSearch", "how_many_states"]

Ends = dict[State, dict[int, float]]
"""By state and kind."""
Flags = npt.NDArray[np.bool_]

MOST_STATES = 512
AT_ONCE = 4_000
"""So many sets with little X are looked at together, those with least first."""
ROUNDS = 6
"""So often the least X are raised."""


def how_many_states(kinds: Sequence[Sequence[int]]) -> int:
    """Of devices of these kinds."""
    return math.prod(len(kind) + 1 for kind in kinds)


class _Span(NamedTuple):
    """What the sets of a state are within, as :meth:`Listing.sets` has it."""

    low_s: float
    high_s: float
    most_s: float
    weights: tuple[float, float]


class _NoneError(Exception):
    """No split is below the ceiling."""


class DeviceSetSearch:
    """Whether there is a split below one ceiling.

    Args:
        little: of the listing that is asked.
        kinds: devices, those together that are alike.
        seconds: weighed, by kind and block; infinite where a block may not be.
        weights: of each kind.
        most: stages.
        ceiling_s: no load is above, by work and transfers alone.
    """

    def __init__(
        self,
        little: LittleCut,
        kinds: Sequence[Sequence[int]],
        seconds: Floats,
        weights: Sequence[float],
        most: int,
        ceiling_s: float,
    ) -> None:
        self.little, self.listing, self.kinds, self.ceiling_s = little, little.listing, kinds, ceiling_s
        self.weights = weights
        self.measures = Measures(
            self.listing, seconds, [len(kind) for kind in kinds], [weight * ceiling_s for weight in weights]
        )
        self.slack_s = self.measures.slack_s
        first, last = self.listing.ends
        self.levels: list[list[State]] = [[tuple(0 for _ in kinds)]]
        for _ in range(most):
            self.levels.append(sorted({following for state in self.levels[-1] for _, following in self._after(state)}))
        self.steps, self.some = 0, False
        self.left, self.right = 0, most
        self.sets: list[dict[State, Cuts]] = [{} for _ in self.levels]
        """By number of devices and state: what was listed from the left, by what is before, or from the right."""
        self.sets[0][self.levels[0][0]] = first
        self.sets[most] = dict.fromkeys(self.levels[most], last)
        self.least = {state: 0.0 for level in self.levels for state in level}
        """What X is not below."""
        self.alive = set(self.least)
        """Those that may be before a cut."""
        self.complete = True
        """Whether every split goes through the sets that are listed."""

    def stages(self, steps: int, *, some: bool = True) -> Stages | None:
        """A split with no load above the ceiling, by work and transfers alone; None where there is none.

        Args:
            steps: so many undecided sets are gone through for each state, in words of 64 blocks.
            some: whether a split through some sets is looked for where there are too many.

        Raises:
            UndecidedError: there may be one.
            OutOfTimeError: nor is there time.
        """
        if not self.complete:
            raise UndecidedError
        self.steps, self.some = steps // self.listing.words, some
        found = None
        try:
            ends, begins = self._narrow()
            while self.left + 1 < self.right:
                self._extend(ends, begins)
                ends, begins = self._narrow()
            found = self._joined()
        except _NoneError:
            pass
        if found is None and not self.complete:
            raise UndecidedError
        return found

    def _after(self, state: State) -> Iterator[tuple[int, State]]:
        """Kinds of which a device is left, and the state with it."""
        for kind, count in enumerate(state):
            if count < len(self.kinds[kind]):
                yield kind, (*state[:kind], count + 1, *state[kind + 1 :])

    def _before(self, state: State) -> Iterator[tuple[int, State]]:
        """Kinds of which there is a device, and the state without it."""
        for kind, count in enumerate(state):
            if count:
                yield kind, (*state[:kind], count - 1, *state[kind + 1 :])

    def _starts(self, work_s: Floats, moved_s: Floats, kind: int) -> Floats:
        """By set: where a stage behind it on a device of that kind begins, in work."""
        return work_s - self.weights[kind] * moved_s

    def _stops(self, work_s: Floats, moved_s: Floats, kind: int) -> Floats:
        """By set: where a stage before it on a device of that kind ends."""
        return work_s + self.weights[kind] * moved_s

    def _both(self, kind: int, other: int, state: State) -> float:
        """What the least X of a state takes in the stages before it and behind it, on devices of these kinds."""
        return (self.weights[kind] + self.weights[other]) * self.least[state]

    def _latest_ends(self) -> Ends:
        """By state in the middle and kind of its last device."""
        ends: Ends = {}
        for level in range(self.left, self.right):
            for state in self.levels[level]:
                if level > self.left and state not in ends:
                    continue
                for kind, following in self._after(state):
                    if level == self.left:
                        sets = self.sets[level].get(state)
                        start = float(self._starts(sets.work_s, sets.moved_s, kind).max()) if sets else -math.inf
                    else:
                        start = max(end - self._both(last, kind, state) for last, end in ends[state].items())
                    if following in self.alive and start > -math.inf:
                        ends.setdefault(following, {})[kind] = start + self.weights[kind] * self.ceiling_s
        return ends

    def _earliest_begins(self) -> Ends:
        """By state in the middle and kind of the device behind it."""
        begins: Ends = {}
        for level in range(self.right, self.left, -1):
            for state in self.levels[level]:
                if state not in self.alive:
                    continue
                for kind, before in self._before(state):
                    if level == self.right:
                        sets = self.sets[level].get(state)
                        stop = float(self._stops(sets.work_s, sets.moved_s, kind).min()) if sets else math.inf
                    else:
                        after = begins.get(state, {}).items()
                        stops = (begin + self._both(kind, behind, state) for behind, begin in after)
                        stop = min(stops, default=math.inf)
                    if before in self.alive and stop < math.inf:
                        begins.setdefault(before, {})[kind] = stop - self.weights[kind] * self.ceiling_s
        return begins

    def _span(self, state: State, ends: Ends, begins: Ends) -> _Span | None:
        """What the sets of a state are within; None where nothing is."""
        if state not in ends or state not in begins:
            return None
        before, behind = ends[state], begins[state]
        low, high = min(behind.values()), max(before.values())
        weights = min(self.weights[kind] for kind in before), min(self.weights[kind] for kind in behind)
        most = (high - low + 2 * self.slack_s) / sum(weights)
        return _Span(low, high, most, weights) if most >= 0 else None

    def _may_be(self, state: State, sets: Cuts, ends: Ends, begins: Ends) -> Flags:
        """Whether sets end and begin in time, for some kinds."""
        stops, starts = (np.zeros(len(sets.work_s), dtype=bool) for _ in range(2))
        early, late = self.measures.early(state, sets), self.measures.late(state, sets)
        for kind, end in ends[state].items():
            stops |= self._stops(early, sets.moved_s, kind) <= end + self.slack_s
        for kind, begin in begins[state].items():
            starts |= self._starts(late, sets.moved_s, kind) >= begin - self.slack_s
        return stops & starts

    def _narrow(self) -> tuple[Ends, Ends]:
        """Raise the least X of the states in the middle, and drop those that cannot be; their ends and begins."""
        for _ in range(ROUNDS):
            ends, begins = self._latest_ends(), self._earliest_begins()
            raised = False
            for level in range(self.left + 1, self.right):
                for state in self.alive.intersection(self.levels[level]):
                    least = self._least_of(state, ends, begins)
                    if least is None:
                        self.alive.discard(state)
                    raised |= least is None or least > 1.02 * self.least[state]
                    self.least[state] = max(self.least[state], least or 0.0)
                if not self.alive.intersection(self.levels[level]):
                    raise _NoneError
            if not raised:
                break
        return ends, begins

    def _least_of(self, state: State, ends: Ends, begins: Ends) -> float | None:
        """What X of a state is not below; None where there is no set for it."""
        if self.listing.out_of_time():
            raise OutOfTimeError
        span = self._span(state, ends, begins)
        if span is None:
            return None
        low, high, most, _ = span
        known = self.little.sets
        first = int(np.searchsorted(known.work_s, low - self.slack_s))
        last = int(np.searchsorted(known.work_s, high + self.slack_s, side="right"))
        by_transfer = first + np.argsort(known.moved_s[first:last], kind="stable")
        for start in range(0, last - first, AT_ONCE):
            some = known.take(by_transfer[start : start + AT_ONCE])
            may_be = self._may_be(state, some, ends, begins)
            if may_be.any():
                return float(some.moved_s[may_be.argmax()]) - self.slack_s
        return self.little.most_s if most > self.little.most_s else None

    def _extend(self, ends: Ends, begins: Ends) -> None:
        """List what is next from the end that has fewer sets; of too many, some."""
        from_left = self._listed(self.left) <= self._listed(self.right)
        level = self.left + 1 if from_left else self.right - 1
        for state in self.alive.intersection(self.levels[level]):
            sets = self._beside(state, ends, begins, from_left=from_left)
            if sets:
                self.sets[level][state] = sets
            else:
                self.alive.discard(state)
        if from_left:
            self.left = level
        else:
            self.right = level
        if not self.sets[level]:
            raise _NoneError

    def _listed(self, level: int) -> int:
        return sum(len(sets.work_s) for sets in self.sets[level].values())

    def _beside(self, state: State, ends: Ends, begins: Ends, *, from_left: bool) -> Cuts:
        """What a state may be that is a stage away from what was listed on that side."""
        span = self._span(state, ends, begins)
        assert span is not None  # it is alive
        others = self.sets[self.left if from_left else self.right]
        near = self._before(state) if from_left else self._after(state)
        beside = [(kind, others[other]) for kind, other in near if other in others]
        try:
            if sum(len(sets.work_s) for _, sets in beside) <= SMALL_FAMILY:
                sets = self._next_to_few(state, span, beside, from_left=from_left)
            else:
                low, high, most, weights = span
                listing = self._listing(self.measures.before(state), self.measures.behind(state))
                sets = listing.sets(low, high, most, self.steps, weights=weights)
                sets = sets.take(np.flatnonzero(self._may_be(state, sets, ends, begins)))
                sets = self._next_to(sets, beside, from_left=from_left)
        except TooManyError as error:
            if not self.some:
                raise UndecidedError from None
            self.complete = False
            sets = self._next_to(error.some, beside, from_left=from_left)
            # Those that leave least to the other stages.
            if from_left:
                keys = -self.measures.late(state, sets) + span.weights[1] * sets.moved_s
            else:
                keys = self.measures.early(state, sets) + span.weights[0] * sets.moved_s
            sets = sets.first(MOST_KEPT, keys)
        sets = sets.take(np.flatnonzero(self._may_be(state, sets, ends, begins)))
        work_s = self.measures.early(state, sets) if from_left else self.measures.late(state, sets)
        return sets._replace(work_s=work_s)

    def _listing(self, inside: Measure, outside: Measure) -> Listing:
        """What is listed by these."""
        if self.measures.in_proportion:
            return self.listing
        return self.listing.measured(inside, outside, self.slack_s)

    def _next_to_few(self, state: State, span: _Span, beside: list[tuple[int, Cuts]], *, from_left: bool) -> Cuts:
        """All sets within the span that are a stage away from some few."""
        low, high, most, (before, behind) = span
        measures, found = self.measures, []
        for kind, sets in beside:
            weight, on = self.weights[kind], measures.of_kind(kind)
            if from_left:
                latest = self._starts(measures.on(kind, sets), sets.moved_s, kind) + weight * self.ceiling_s
                family, weights = Family(sets, "before", latest), (weight, behind)
                listing = self._listing(on, measures.behind(state))
                span_s = low, high if measures.in_proportion else math.inf
            else:
                work_s = sets.work_s if measures.in_proportion else measures.behind_of(on, sets)
                earliest = self._stops(work_s, sets.moved_s, kind) - weight * self.ceiling_s
                family, weights = Family(sets, "behind", earliest), (before, weight)
                listing = self._listing(measures.before(state), on)
                span_s = low if measures.in_proportion else -math.inf, high
            found.append(listing.sets(*span_s, most, self.steps, family, weights))
        return _together(found)

    def _next_to(self, sets: Cuts, beside: list[tuple[int, Cuts]], *, from_left: bool) -> Cuts:
        """Those of ``sets`` that are a stage away from one of those beside.

        Raises:
            UndecidedError: there are too many pairs.
        """
        there = np.zeros(len(sets.work_s), dtype=bool)
        for kind, others in beside:
            left = np.flatnonzero(~there)
            rest = sets.take(np.flatnonzero(~there))
            before, behind = (others, rest) if from_left else (rest, others)
            found = self._stage_between(before, behind, kind, turned=not from_left)
            there[left[found >= 0]] = True
        return sets.take(np.flatnonzero(there))

    def _stage_between(
        self, before: Cuts, behind: Cuts, kind: int, *, turned: bool = False, one: bool = False
    ) -> npt.NDArray[np.int64]:
        """By set behind a stage, or before it if ``turned``: one of the other that it makes a stage with, or -1."""
        start = self._starts(self.measures.on(kind, before), before.moved_s, kind) + 2 * self.slack_s
        stop = self._stops(self.measures.on(kind, behind), behind.moved_s, kind)
        try:
            return stage_between(
                (before.masks, start + self.weights[kind] * self.ceiling_s),
                (behind.masks, stop),
                turned=turned,
                pairs=PAIRS_A_STEP * self.steps,
                out_of_time=self.listing.out_of_time,
                one_is_enough=one,
            )
        except TooManyPairsError:
            raise UndecidedError from None

    def _joined(self) -> Stages | None:
        """A split through one of the sets on the left and one on the right that is a stage away from it."""
        for state, before in self.sets[self.left].items():
            for kind, following in self._after(state):
                behind = self.sets[self.right].get(following)
                if behind is None:
                    continue
                found = self._stage_between(before, behind, kind, one=True)
                last = int(found.argmax())
                if found[last] >= 0:
                    return self._traced(state, int(found[last]), kind, following, last)
        return None

    def _traced(self, state: State, first: int, kind: int, following: State, last: int) -> Stages:
        """The split through two sets with a stage between them."""
        sets, index = self.sets[self.left][state], first
        kinds, cuts = [kind], [sets.mask(index)]
        for level in range(self.left - 1, -1, -1):
            one = sets.take(np.array([index]))
            kind, state, index = self._neighbour(one, self._before(state), self.sets[level], from_left=True)
            sets = self.sets[level][state]
            kinds.insert(0, kind)
            cuts.insert(0, sets.mask(index))
        sets, state, index = self.sets[self.right][following], following, last
        cuts.append(sets.mask(index))
        for level in range(self.right + 1, len(self.levels)):
            one = sets.take(np.array([index]))
            kind, state, index = self._neighbour(one, self._after(state), self.sets[level], from_left=False)
            sets = self.sets[level][state]
            kinds.append(kind)
            cuts.append(sets.mask(index))
        left = [list(kind) for kind in self.kinds]
        stages = []
        for kind, (before, behind) in zip(kinds, itertools.pairwise(cuts), strict=True):
            device = left[kind].pop(0)
            if behind & ~before:
                stages.append((device, behind & ~before))
        return tuple(stages)

    def _neighbour(
        self, one: Cuts, near: Iterator[tuple[int, State]], others: Mapping[State, Cuts], *, from_left: bool
    ) -> tuple[int, State, int]:
        """A set that is a stage away from the only one: the kind of that stage's device, the set's state and index."""
        for kind, state in near:
            if state in others:
                sets = others[state]
                before, behind = (sets, one) if from_left else (one, sets)
                found = self._stage_between(before, behind, kind, turned=not from_left)
                if found[0] >= 0:
                    return kind, state, int(found[0])
        raise AssertionError("what was listed is a stage away from something")


def _together(parts: Sequence[Cuts]) -> Cuts:
    """The sets of all parts, each once."""
    masks, work_s, moved_s, origin = (np.concatenate(each) for each in zip(*parts, strict=True))
    _, first = np.unique(masks, axis=0, return_index=True)
    return Cuts(masks, work_s, moved_s, origin).take(first)
