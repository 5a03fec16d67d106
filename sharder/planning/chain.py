r"""Cutting a line of blocks into stages, at ten thousand blocks: the largest load, the least it can be.

Given positions 0 .. n between the blocks, kinds d of devices, W[d, j] = seconds of the blocks before j on a device of
kind d, X[d, e, j] = seconds that a cut at j costs the stage on d before it, and Y[d, e, j] the one on e behind it;
choose positions 0 = j(0) < j(1) < .. < j(S) = n and a device for each stage, so that each stage has a unit and the
largest load is least:

    load(i, j on d, after c, before e) = Y[c, d, i] + W[d, j] - W[d, i] + X[d, e, j]
    load <= T      <=>      (W[d, j] + X[d, e, j]) - (W[d, i] - Y[c, d, i]) <= T

The first bracket belongs to the end of a stage and what is behind it, the second to its start and what is before it.
So of all the ends that a stage may have only the smallest first bracket counts. With U the devices used behind:

    V(U, d, j) = the smallest W[d, j] + X[d, e, j], over all e for which the blocks from j on go on U, the first on e
    V(U + d, c, i) has W[c, i] + X[c, d, i]   <=>   min over j > i of V(U, d, j) - (W[d, i] - Y[c, d, i]) <= T

which is one running minimum for each state (U, d): O(n) a state and a ceiling T. A greedy choice of the longest stage
would be wrong, as a longer stage may end in a dearer cut. Devices of a kind are counted, not named: k devices alike
make k states. That the states are so few is what cutting a line has over cutting a graph (search.py).

Ceilings are halved towards the optimum. Where T fails, all larger ceilings below the smallest difference that was too
large fail as well, since every comparison has the same outcome; where T holds, the split that was found has a largest
load, at most T. So both ends of the interval are loads, and they meet in the optimum after some twenty ceilings.

In a state only those positions are looked at that leave no side more than it can do (:class:`Line`, ``even``).
For chains of tasks on equal processors without transfers: Pinar and Aykanat, "Fast optimal load balancing algorithms
for 1D partitioning", JPDC 2004, whose probes these are, made for cuts that cost and for devices that differ.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

__all__ = ["Cut", "Line", "State", "counted", "in_order", "least_load", "solve", "states_needed"]

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]

ROUNDING = 1e-9
"""A share by which windows are widened, so that no rounding closes them to a position that counts."""


@dataclass(frozen=True)
class Line:
    """Blocks in a row, by the positions between them: arrays have n + 1 entries, and 0 costs nothing to cut."""

    work: tuple[Floats, ...]
    """W: by kind, the seconds of all blocks before a position."""
    cuts: tuple[tuple[Floats, ...], ...]
    """X: ``cuts[d][e]``, the seconds of a cut for the device of kind d before it, with one of kind e behind it."""
    units: Integers
    """How many blocks before a position have a unit."""
    barred: tuple[Integers, ...] = ()
    """By kind: how many blocks before a position may not be on it; nothing = none on any."""
    openings: tuple[tuple[Floats, ...], ...] = ()
    """Y: the seconds of the same cuts for the device of kind e; nothing = as many."""

    @property
    def blocks(self) -> int:
        """How many there are."""
        return len(self.units) - 1

    @cached_property
    def first_end(self) -> Integers:
        """By position: the first where a stage from there may end, as it has a unit then; n + 1 where there is none."""
        return np.searchsorted(self.units, self.units, side="right")

    def end(self, kind: int, behind: int, at: slice) -> Floats:
        """W + X at some positions: what the end of a stage before one of the kind ``behind`` adds to its load."""
        return self.work[kind][at] + self.cuts[kind][behind][at]

    def start(self, kind: int, before: int, at: slice) -> Floats:
        """W - Y at some positions: what the start of a stage behind one of the kind ``before`` takes from its load."""
        return self.work[kind][at] - (self.openings or self.cuts)[before][kind][at]

    @cached_property
    def speed(self) -> list[float]:
        """By kind: a weight for bounds, which may be any; 1 / its time for all blocks makes them sharp."""
        return [1 / whole[-1] if whole[-1] > 0 else 0.0 for whole in self.work]

    @cached_property
    def even(self) -> Floats:
        """By position: what the blocks before it add to the weighted sum of all loads, wherever they are.

        Blocks with so much of it on devices whose weights have the sum s leave one of them a load of even / s or more.
        """
        weighted = []
        for d, work in enumerate(self.work):
            seconds = self.speed[d] * np.diff(work)
            weighted.append(np.where(np.diff(self.barred[d]) > 0, np.inf, seconds) if self.barred else seconds)
        least = np.min(weighted, axis=0)
        return np.concatenate([[0.0], np.cumsum(np.where(np.isfinite(least), least, 0.0))])


class State(NamedTuple):
    """A stage that ends somewhere, on a device of some kind, with certain devices used behind it."""

    kind: int
    behind: float
    """Weight of the devices used behind it."""
    ahead: float
    """Weight of all that may still be used, its own device included."""
    before: tuple[int, ...]
    """The states that a stage just before it may be in; they come later in the list."""
    last: bool
    """Whether it may be the last stage of the line, with nothing behind it."""


class Cut(NamedTuple):
    """The positions where stages begin, but for the first, and the kinds of all stages in order."""

    positions: tuple[int, ...]
    kinds: tuple[int, ...]
    value: float
    """The largest load."""
    bound: float
    """No cut of the line over the same states has a smaller one."""


def states_needed(counts: Sequence[int]) -> int:
    """How many pairs of states :func:`counted` makes at most, in proportion to which the time is that they take."""
    return math.prod(count + 1 for count in counts) * len(counts) ** 2


def counted(line: Line, counts: Sequence[int], most_stages: int) -> list[State]:
    """The states of every order of ``counts[d]`` devices of each kind d, with ``most_stages`` stages at most."""
    used = sorted(itertools.product(*(range(count + 1) for count in counts)), key=sum)
    kinds = range(len(counts))
    index: dict[tuple[tuple[int, ...], int], int] = {}
    for u, d in itertools.product(used, kinds):
        if sum(u) < most_stages and u[d] < counts[d]:
            index[u, d] = len(index)
    states = []
    for u, d in index:
        further = tuple(count + (c == d) for c, count in enumerate(u))
        left = sorted((line.speed[c] for c in kinds for _ in range(counts[c] - u[c])), reverse=True)
        states.append(
            State(
                kind=d,
                behind=sum(line.speed[c] * u[c] for c in kinds),
                ahead=sum(left[: most_stages - sum(u)]),
                before=tuple(index[further, c] for c in kinds if (further, c) in index),
                last=not any(u),
            )
        )
    return states


def in_order(line: Line, order: Sequence[int]) -> list[State]:
    """The states of the one order of devices whose kinds are ``order``; devices may be left out."""
    speeds = [line.speed[d] for d in order]
    last = len(order) - 1
    return [
        State(
            kind=order[last - x],
            behind=sum(speeds[last - x + 1 :]),
            ahead=sum(speeds[: last - x + 1]),
            before=tuple(range(x + 1, len(order))),
            last=True,
        )
        for x in range(len(order))
    ]


def solve(times: Sequence[float], stages: int, cuts: Sequence[float] | None = None) -> list[int]:
    """Where to cut blocks of ``times`` on ``stages`` devices alike: ``solve([4, 1, 1, 4], 2) == [2]``.

    ``cuts[j]`` is what a cut before block j costs both stages that it parts; nothing by default.
    """
    cost = np.zeros(len(times) + 1) if cuts is None else np.array([*cuts, 0.0])
    work = np.concatenate([[0.0], np.cumsum(times)])
    line = Line((work,), ((cost,),), np.arange(len(times) + 1))
    found = least_load(line, counted(line, [stages], stages))
    assert found is not None, "one stage is a split"
    return list(found.positions)


def least_load(
    line: Line,
    states: Sequence[State],
    bound: float = 0.0,
    below: float = math.inf,
    out_of_time: Callable[[], bool] = lambda: False,
) -> Cut | None:
    """The cut of ``line`` with the least largest load, over the orders of devices that ``states`` stand for.

    Args:
        line: the blocks.
        states: what :func:`counted` or :func:`in_order` made for it; each before those that it names.
        bound: a largest load that no cut is below.
        below: a largest load that is to be beaten.
        out_of_time: asked at each ceiling; after it the best cut so far is returned, with its bound.

    Returns None when no cut of finite load was found that is below ``below``.
    """
    probe = _Probe(line, states)
    best: Cut | None = None
    low, slack = bound, 1e-3
    dearest = min(_dearest(line), math.nextafter(below, 0.0))
    while low <= dearest and not out_of_time():
        if best is not None:
            ceiling = low + (best.value - low) / 2
            ceiling = ceiling if ceiling < best.value else low
        elif math.isfinite(below) or not low > 0 or slack > 10:
            ceiling = dearest
        else:
            ceiling = min(low * (1 + slack), dearest)  # the optimum is mostly close to the bound
        if best is None:
            probe.open(ceiling)
        found, next_load = probe.below(ceiling)
        if found is not None:
            best = found
            dearest = math.nextafter(best.value, -math.inf)
            probe.open(best.value)
        else:
            low, slack = max(next_load if best else 0.0, math.nextafter(ceiling, math.inf)), 4 * slack
    return None if best is None else best._replace(bound=min(low, best.value))


def _dearest(line: Line) -> float:
    """More than any finite load."""
    finite = [cut[np.isfinite(cut)].max(initial=0.0) for row in (*line.cuts, *line.openings) for cut in row]
    return 2.0 * float(max(work[-1] for work in line.work) + 2 * max(finite))


class _Probe:
    """Whether the line can be cut below a ceiling, by going through the states from the end of the line."""

    def __init__(self, line: Line, states: Sequence[State]) -> None:
        self.line = line
        self.states = states
        self.behind: list[list[int]] = [[] for _ in states]
        for number, state in enumerate(states):
            for other in state.before:
                self.behind[other].append(number)
        self.weights = np.array([(state.behind, state.ahead) for state in states]).reshape(-1, 2).T
        self.windows: list[tuple[int, int]] = []
        self.edges: dict[tuple[int, int], tuple[Floats, Floats]] = {}
        self.values: list[Floats | None] = []

    def open(self, ceiling: float) -> None:
        """Look only at positions that can be in a cut with no load above ``ceiling``."""
        even, most = self.line.even, ceiling * (1 + ROUNDING)
        behind, ahead = most * self.weights
        lows = np.searchsorted(even, even[-1] * (1 - ROUNDING) - behind)
        highs = np.searchsorted(even, ahead + even[-1] * ROUNDING, side="right")
        self.windows = list(zip(lows.tolist(), highs.tolist(), strict=True))
        self.edges.clear()

    def _edges_before(self, number: int, behind: int) -> tuple[Floats, Floats]:
        """In the window of a state, with one of the kind ``behind`` next: starts of that, and ends of its own stage."""
        if (number, behind) not in self.edges:
            kind, at = self.states[number].kind, slice(*self.windows[number])
            self.edges[number, behind] = self.line.start(behind, kind, at), self.line.end(kind, behind, at)
        return self.edges[number, behind]

    def below(self, ceiling: float) -> tuple[Cut | None, float]:
        """A cut with no load above ``ceiling``, or None and the smallest ceiling at which that might change."""
        line = self.line
        self.values = [None] * len(self.states)
        too_large = math.inf
        for number, state in enumerate(self.states):
            if state.last:
                self._offer(number, line.blocks, line.work[state.kind][-1:])
            if self.values[number] is None:
                continue
            smallest = self._smallest(number)
            whole = float(self._ends(number, smallest, slice(0, 1))[0])
            if whole <= ceiling:
                return self._cut(number, ceiling), ceiling
            too_large = min(too_large, whole)
            for other in state.before:
                first, last = self.windows[other]
                if first >= last:
                    continue
                starts, ends = self._edges_before(other, state.kind)
                loads = self._ends(number, smallest, slice(first, last)) - starts
                low = loads <= ceiling
                most = np.count_nonzero(low)
                if most < len(low):
                    too_large = min(too_large, float(loads[~low].min()))
                if most:
                    self._offer(other, first, ends if most == len(low) else np.where(low, ends, np.inf))
        return None, too_large

    def _offer(self, number: int, first: int, values: Floats) -> None:
        """Take the smaller values for a state, from position ``first`` on."""
        low, high = self.windows[number]
        if first < low or first + len(values) > high:
            return
        known = self.values[number]
        if known is None:
            known = self.values[number] = np.full(high - low, np.inf)
        part = known[first - low : first - low + len(values)]
        np.minimum(part, values, out=part)

    def _smallest(self, number: int) -> Floats:
        """By position in the window of a state: the smallest value from there to the next barred block."""
        values = self.values[number]
        assert values is not None, "only states that can be reached are gone through"
        smallest = np.empty(len(values) + 1)
        smallest[:-1], smallest[-1] = values, np.inf  # behind the window is nothing
        edges = [0, len(values)]
        if self.line.barred:
            low, high = self.windows[number]
            edges[1:1] = (np.flatnonzero(np.diff(self.line.barred[self.states[number].kind][low:high])) + 1).tolist()
        for begin, end in itertools.pairwise(edges):
            part = smallest[begin:end]
            part[:] = np.minimum.accumulate(part[::-1])[::-1]
        return smallest

    def _ends(self, number: int, smallest: Floats, starts: slice) -> Floats:
        """By position among ``starts``: the smallest value of the ends that a stage from there may have."""
        low, _ = self.windows[number]
        at = np.minimum(np.maximum(self.line.first_end[starts] - low, 0), len(smallest) - 1)
        found = smallest[at]
        if self.line.barred:
            barred = self.line.barred[self.states[number].kind]
            apart = barred[np.minimum(at + low, self.line.blocks)] != barred[starts]
            found = np.where(apart, np.inf, found)
        return found

    def _cut(self, number: int, ceiling: float) -> Cut:
        """The cut whose first stage is in the state ``number`` and has no load above ``ceiling``."""
        line, position, received = self.line, 0, 0.0
        positions: list[int] = []
        kinds: list[int] = []
        value = 0.0
        while True:
            kind = self.states[number].kind
            kinds.append(kind)
            end, closing = self._closest_end(number, position)
            value = max(value, closing - received)
            if end == line.blocks:
                return Cut(tuple(positions), tuple(kinds), value, 0.0)
            positions.append(end)
            number = self._following(number, end, closing, ceiling)
            received = float(line.start(self.states[number].kind, kind, slice(end, end + 1))[0])
            position = end

    def _closest_end(self, number: int, start: int) -> tuple[int, float]:
        """Where a stage from ``start`` ends with the smallest value, which follows."""
        values = self.values[number]
        assert values is not None, "the state was reached"
        low, high = self.windows[number]
        first = max(int(self.line.first_end[start]), low)
        if self.line.barred:
            barred = self.line.barred[self.states[number].kind]
            high = min(high, int(np.searchsorted(barred, barred[start], side="right")))
        end = first + int(values[first - low : high - low].argmin())
        return end, float(values[end - low])

    def _following(self, number: int, start: int, closing: float, ceiling: float) -> int:
        """The state of the stage from ``start`` behind one in the state ``number`` that closes with such a value."""
        kind, at = self.states[number].kind, slice(start, start + 1)
        for other in self.behind[number]:
            following = self.states[other].kind
            if self.values[other] is None or self.line.end(kind, following, at)[0] != closing:
                continue
            ends = self._ends(other, self._smallest(other), at)
            if ends[0] - self.line.start(following, kind, at)[0] <= ceiling:
                return other
        raise AssertionError("a value comes from a state behind")
