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
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from shardwright.sharder.planning.exact.chain_line import Cut, Floats, Integers, Line, State, counted

__all__ = ["least_load", "solve"]

ROUNDING = 1e-9
"""A share by which windows are widened, so that no rounding closes them to a position that counts."""


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


AT_ONCE = 1 << 17
"""So many positions of states are gone through together; more would only fill the memory."""


class _Moves(NamedTuple):
    """The pairs of a state of one level, and one of a later level that may be before it; by pair unless said."""

    level: int
    """That of the states behind."""
    behind: Integers
    """The state behind, by its place in its level."""
    before: Integers
    """The state before it, likewise; those with the same follow each other."""
    first: Integers
    """By state before: its first pair."""
    cut: Integers
    """The row of the tables of starts and ends."""


class _Probe:
    """Whether the line can be cut below a ceiling, by going through the states from the end of the line.

    States that follow each other and lead to none of each other make a level, and are gone through together: of a
    hundred blocks few positions are in the window of a state, and there are a thousand states.
    """

    def __init__(self, line: Line, states: Sequence[State]) -> None:
        self.line = line
        self.states = states
        self.weights = np.array([(state.behind, state.ahead) for state in states]).reshape(-1, 2).T
        self.kinds = np.array([state.kind for state in states], dtype=np.int64)
        self.barred = np.stack(line.barred) if line.barred else None
        self.levels = _levels(states)
        self.level_of = np.repeat(np.arange(len(self.levels)), [last - first for first, last in self.levels])
        self._pair_up()
        none = np.zeros(len(states), dtype=np.int64)
        self.lows, self.highs, self.widths = none, none, [0] * len(self.levels)
        self.values: list[Floats] = []
        """By level: row by state, column by position in its window; infinite behind it."""
        self.smallest: list[Floats] = []
        self.reached: list[npt.NDArray[np.bool_]] = []

    def _pair_up(self) -> None:
        """The moves by the level of the states before, and the tables of what starts and ends add to loads."""
        befores = [np.array(state.before, dtype=np.int64) for state in self.states]
        before = np.concatenate([np.zeros(0, np.int64), *befores])
        behind = np.repeat(np.arange(len(self.states)), [len(some) for some in befores])
        order = np.lexsort((before, self.level_of[behind], self.level_of[before]))
        self.before, self.behind = before, behind = before[order], behind[order]
        # Of the tables only those rows are made whose kinds do follow each other.
        count = len(self.line.work)
        cuts, rows = np.unique(self.kinds[before] * count + self.kinds[behind], return_inverse=True)
        kinds, whole = [divmod(int(cut), count) for cut in cuts], slice(None)
        none = np.zeros((0, self.line.blocks + 1))
        self.starts = np.stack([self.line.start(b, d, whole) for d, b in kinds]) if kinds else none
        self.ends = np.stack([self.line.end(d, b, whole) for d, b in kinds]) if kinds else none
        self.moves: list[list[_Moves]] = [[] for _ in self.levels]
        firsts = np.array([first for first, _ in self.levels])
        both = self.level_of[before] * len(self.levels) + self.level_of[behind]
        for part in np.split(np.arange(len(both)), np.flatnonzero(np.diff(both)) + 1) if len(both) else []:
            level, behind_level = divmod(int(both[part[0]]), len(self.levels))
            here = before[part] - firsts[level]
            first = np.flatnonzero(np.diff(here, prepend=-1))
            moves = _Moves(behind_level, behind[part] - firsts[behind_level], here, first, rows[part])
            self.moves[level].append(moves)

    def open(self, ceiling: float) -> None:
        """Look only at positions that can be in a cut with no load above ``ceiling``."""
        even, most = self.line.even, ceiling * (1 + ROUNDING)
        behind, ahead = most * self.weights
        self.lows = np.searchsorted(even, even[-1] * (1 - ROUNDING) - behind)
        self.highs = np.searchsorted(even, ahead + even[-1] * ROUNDING, side="right")
        widths = self.highs - self.lows
        self.widths = [max(0, int(widths[first:last].max())) for first, last in self.levels]

    def below(self, ceiling: float) -> tuple[Cut | None, float]:
        """A cut with no load above ``ceiling``, or None and the smallest ceiling at which that might change."""
        too_large = math.inf
        self.values, self.smallest, self.reached = [], [], []
        for level, (first, last) in enumerate(self.levels):
            values = np.full((last - first, self.widths[level] + 1), np.inf)
            for moves in self.moves[level] if self.widths[level] else []:
                too_large = min(too_large, self._move(values, level, moves, ceiling))
            self._close(values, level)
            self.values.append(values)
            self.reached.append(np.isfinite(values).any(axis=1))
            self.smallest.append(self._smallest_of(level))
            wholes = self._ends_of(level, np.arange(last - first), np.zeros(last - first, np.int64))
            low = np.flatnonzero(wholes <= ceiling)
            if len(low):
                return self._cut(first + int(low[0]), ceiling), ceiling
            too_large = min(too_large, float(wholes.min()))
        return None, too_large

    def _move(self, values: Floats, level: int, moves: _Moves, ceiling: float) -> float:
        """Take what states before some others can have at most ``ceiling`` with; the least load above that."""
        too_large = math.inf
        ends = [*moves.first.tolist(), len(moves.before)]
        together = max(1, AT_ONCE // self.widths[level] * (len(ends) - 1) // ends[-1])
        for at in range(0, len(ends) - 1, together):
            begin, end = ends[at], ends[min(at + together, len(ends) - 1)]
            some = slice(begin, end)
            if not self.reached[moves.level][moves.behind[some]].any():
                continue
            states = self.levels[level][0] + moves.before[some, None]
            positions = self.lows[states] + np.arange(self.widths[level])
            inside = positions < self.highs[states]
            np.minimum(positions, self.line.blocks, out=positions)
            loads = self._ends_of(moves.level, moves.behind[some, None], positions)
            loads -= self.starts[moves.cut[some, None], positions]
            low = inside & (loads <= ceiling)
            too_large = min(too_large, float(loads.min(initial=np.inf, where=inside & ~low)))
            taken = np.where(low, self.ends[moves.cut[some, None], positions], np.inf)
            least = np.minimum.reduceat(taken, moves.first[at : at + together] - begin, axis=0)
            rows = moves.before[moves.first[at : at + together]]
            values[rows, :-1] = np.minimum(values[rows, :-1], least)
        return too_large

    def _close(self, values: Floats, level: int) -> None:
        """Let stages of ``level`` end with the line where they may."""
        blocks = self.line.blocks
        first, last = self.levels[level]
        for number in range(first, last):
            if self.states[number].last and self.lows[number] <= blocks < self.highs[number]:
                end = (number - first, blocks - int(self.lows[number]))
                values[end] = min(values[end], self.line.work[self.states[number].kind][-1])

    def _smallest_of(self, level: int) -> Floats:
        """By state and position in its window: the smallest value from there to the next barred block."""
        values = self.values[level]
        smallest = np.minimum.accumulate(values[:, ::-1], axis=1)[:, ::-1]
        if self.barred is None:
            return smallest
        first, last = self.levels[level]
        for row, number in enumerate(range(first, last)):
            barred = self.barred[self.kinds[number], self.lows[number] : self.highs[number]]
            edges = (np.flatnonzero(np.diff(barred)) + 1).tolist()
            for begin, end in itertools.pairwise([0, *edges, values.shape[1]]) if edges else []:
                smallest[row, begin:end] = np.minimum.accumulate(values[row, begin:end][::-1])[::-1]
        return smallest

    def _ends_of(self, level: int, rows: Integers, starts: Integers) -> Floats:
        """For some states of a level, by position among ``starts``: the smallest value of the ends that may be."""
        lows = self.lows[self.levels[level][0] + rows]
        at = np.minimum(np.maximum(self.line.first_end[starts] - lows, 0), self.widths[level])
        found: Floats = self.smallest[level][rows, at]
        if self.barred is not None:
            kinds = self.kinds[self.levels[level][0] + rows]
            apart = self.barred[kinds, np.minimum(at + lows, self.line.blocks)] != self.barred[kinds, starts]
            found[apart] = np.inf
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
        level = int(self.level_of[number])
        values = self.values[level][number - self.levels[level][0]]
        low, high = int(self.lows[number]), int(self.highs[number])
        first = max(int(self.line.first_end[start]), low)
        if self.barred is not None:
            barred = self.barred[self.kinds[number]]
            high = min(high, int(np.searchsorted(barred, barred[start], side="right")))
        end = first + int(values[first - low : high - low].argmin())
        return end, float(values[end - low])

    def _following(self, number: int, start: int, closing: float, ceiling: float) -> int:
        """The state of the stage from ``start`` behind one in the state ``number`` that closes with such a value."""
        kind, at = self.states[number].kind, slice(start, start + 1)
        for other in map(int, self.behind[self.before == number]):
            following, level = self.states[other].kind, int(self.level_of[other])
            if self.line.end(kind, following, at)[0] != closing:
                continue
            row = np.array([other - self.levels[level][0]])
            ends = self._ends_of(level, row, np.array([start]))
            if ends[0] - self.line.start(following, kind, at)[0] <= ceiling:
                return other
        raise AssertionError("a value comes from a state behind")


def _levels(states: Sequence[State]) -> list[tuple[int, int]]:
    """Where levels begin and end."""
    edges, nearest = [0], len(states)
    for number, state in enumerate(states):
        if number == nearest:
            edges.append(number)
            nearest = len(states)
        nearest = min([nearest, *state.before])
    return list(itertools.pairwise([*edges, len(states)]))
