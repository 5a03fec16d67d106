r"""Cutting a line of blocks into stages whose transfers overlap with compute: three sums, each at most T.

With the names of chain.py, and of a cut at j between d before it and e behind it the seconds that d sends, A[d, e, j],
and receives, B[d, e, j], and that e sends, C[d, e, j], and receives, D[d, e, j]:

    load(i, j on d, after c, before e) <= T    <=>    W[d, j] - W[d, i] <= T,    C[c, d, i] + A[d, e, j] <= T,
                                                      D[c, d, i] + B[d, e, j] <= T

The first leaves a start i a window of ends, the others bound A and B in it: whether some end of the window keeps both
is mostly told by the end with the least A, or the one with the least B, which sparse tables find (Bender and
Farach-Colton, "The LCA problem revisited", LATIN 2000); else the window is read. States and orders of devices are
those of chain.py. Where T fails it is a bound, where it holds the split found has a largest load; T halves between the
two until no number is left there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from shardwright.sharder.planning.exact.chain_line import Cut, Floats, Integers, Line, State

__all__ = ["Exchange", "OverlappedLine", "least_load_overlapped"]

Flags = npt.NDArray[np.bool_]

CLOSE = 1e-13
"""Bound and value that differ by less than this share are the same: the sums are no more precise."""


class Exchange(NamedTuple):
    """By position: seconds that a cut makes both its sides send and receive."""

    before_sends: Floats
    before_receives: Floats
    behind_sends: Floats
    behind_receives: Floats


@dataclass(frozen=True)
class OverlappedLine:
    """A line whose cuts cost nothing by themselves, and what they exchange by the kinds before and behind them."""

    line: Line
    exchanges: tuple[tuple[Exchange, ...], ...]


class _Edge(NamedTuple):
    """The ends that a stage in some state may have with one choice of what is behind it."""

    behind: int
    """The state of the stage behind; -1 = none."""
    sends: Floats
    """By position; infinite where no stage may end."""
    receives: Floats


def least_load_overlapped(
    overlapped: OverlappedLine,
    states: Sequence[State],
    bound: float = 0.0,
    below: float = math.inf,
    out_of_time: Callable[[], bool] = lambda: False,
) -> Cut | None:
    """The cut with the least largest load; arguments and result are those of chain.least_load."""
    best: Cut | None = None
    low, slack = bound, 1e-3
    dearest = _dearest(overlapped)
    while (high := min(best.value if best else dearest, below)) > low * (1 + CLOSE) and not out_of_time():
        ceiling = low + (high - low) / 2 if best is not None else min(low * (1 + slack), high) if low > 0 else high
        found = _Ends(overlapped, states, ceiling).cut()
        if found is not None and found.value < high:
            best = found
        elif ceiling >= high:
            break
        else:
            low, slack = ceiling, 4 * slack
    if best is None:
        return None
    return best._replace(bound=best.value if best.value <= low * (1 + CLOSE) else min(low, best.value))


def _dearest(overlapped: OverlappedLine) -> float:
    """As much as any finite load."""
    parts = [part for row in overlapped.exchanges for exchange in row for part in exchange]
    finite = [float(part[np.isfinite(part)].max(initial=0.0)) for part in parts]
    return 2.0 * float(max(work[-1] for work in overlapped.line.work)) + 2.0 * max(finite, default=0.0)


class _Ends:
    """By state, where its stage may end for the rest to stay at or below a ceiling; from the end of the line."""

    def __init__(self, overlapped: OverlappedLine, states: Sequence[State], ceiling: float) -> None:
        self.line, self.exchanges, self.states = overlapped.line, overlapped.exchanges, states
        self.ceiling = ceiling
        self.edges: list[list[_Edge]] = [[] for _ in states]
        self.last = [self._last_ends(kind) for kind in range(len(self.line.work))]

    def _last_ends(self, kind: int) -> Integers:
        """By start: the last end that the work on a device of ``kind``, and what is barred there, allow."""
        work = self.line.work[kind]
        last = np.searchsorted(work, work + self.ceiling, side="right") - 1
        # W is rounded: the difference itself is what has to stay below the ceiling.
        last = np.where(work[last] - work > self.ceiling, last - 1, last)
        if self.line.barred:
            barred = self.line.barred[kind]
            last = np.minimum(last, np.searchsorted(barred, barred, side="right") - 1)
        return last

    def cut(self) -> Cut | None:
        """A cut with no load above the ceiling, or None."""
        count = self.line.blocks + 1
        for number, state in enumerate(self.states):
            if state.last:
                ends = np.full(count, np.inf)
                ends[-1] = 0.0
                self.edges[number].append(_Edge(-1, ends, ends))
            if not self.edges[number]:
                continue
            none = np.zeros(1)
            if self._some_end(number, none, none)[0]:
                return self._cut(number)
            for other in state.before:
                kind = self.states[other].kind
                exchange = self.exchanges[kind][state.kind]
                good = self._some_end(number, exchange.behind_sends, exchange.behind_receives)
                if good.any():
                    sends = np.where(good, exchange.before_sends, np.inf)
                    self.edges[other].append(_Edge(number, sends, exchange.before_receives))
        return None

    def _some_end(self, number: int, sends: Floats, receives: Floats) -> Flags:
        """By start, whether a stage in a state may end anywhere, with what its start makes it send and receive."""
        kind, count = self.states[number].kind, len(sends)
        first, last = self.line.first_end[:count], self.last[kind][:count]
        good = np.zeros(count, bool)
        for edge in self.edges[number]:
            starts = np.flatnonzero(~good & (first <= last) & np.isfinite(sends) & np.isfinite(receives))
            if not starts.size:
                break
            good[starts] = _keeps_both(
                edge, first[starts], last[starts], self.ceiling - sends[starts], self.ceiling - receives[starts]
            )
        return good

    def _cut(self, number: int) -> Cut:
        """The cut whose first stage is in the state ``number``."""
        position, sends, receives, value = 0, 0.0, 0.0, 0.0
        positions: list[int] = []
        kinds: list[int] = []
        while True:
            kind = self.states[number].kind
            kinds.append(kind)
            edge, end = self._end(number, position, sends, receives)
            work = self.line.work[kind]
            value = max(value, work[end] - work[position], sends + edge.sends[end], receives + edge.receives[end])
            if edge.behind < 0:
                return Cut(tuple(positions), tuple(kinds), float(value), 0.0)
            positions.append(end)
            exchange = self.exchanges[kind][self.states[edge.behind].kind]
            sends, receives = exchange.behind_sends[end], exchange.behind_receives[end]
            number, position = edge.behind, end

    def _end(self, number: int, start: int, sends: float, receives: float) -> tuple[_Edge, int]:
        """An end of the stage from ``start`` that keeps all below the ceiling."""
        kind = self.states[number].kind
        window = slice(int(self.line.first_end[start]), int(self.last[kind][start]) + 1)
        for edge in self.edges[number]:
            good = (sends + edge.sends[window] <= self.ceiling) & (receives + edge.receives[window] <= self.ceiling)
            if good.any():
                return edge, window.start + int(np.flatnonzero(good)[-1])
        raise AssertionError("some end was found before")


def _keeps_both(edge: _Edge, first: Integers, last: Integers, sends: Floats, receives: Floats) -> Flags:
    """By window ``first`` to ``last``: whether one end in it has no more of either than allowed."""
    least_sends = _least_in(edge.sends, first, last)
    good = (edge.sends[least_sends] <= sends) & (edge.receives[least_sends] <= receives)
    least_receives = _least_in(np.where(np.isfinite(edge.sends), edge.receives, np.inf), first, last)
    good |= (edge.sends[least_receives] <= sends) & (edge.receives[least_receives] <= receives)
    open_ = ~good & (edge.sends[least_sends] <= sends) & (edge.receives[least_receives] <= receives)
    for at in np.flatnonzero(open_):
        window = slice(first[at], last[at] + 1)
        good[at] = bool(((edge.sends[window] <= sends[at]) & (edge.receives[window] <= receives[at])).any())
    return good


def _least_in(values: Floats, first: Integers, last: Integers) -> Integers:
    """By window ``first`` to ``last``, neither empty: the position of the least of ``values``."""
    length = last - first + 1
    level = np.frexp(length.astype(float))[1] - 1  # the largest power of two that is in it
    best = np.arange(len(values))
    found = np.empty(len(first), np.int64)
    for power in range(int(level.max(initial=0)) + 1):
        if power:
            half = 1 << (power - 1)
            other = best[np.minimum(np.arange(len(best)) + half, len(best) - 1)]
            best = np.where(values[other] < values[best], other, best)
        of_level = level == power
        left, right = best[first[of_level]], best[last[of_level] + 1 - (1 << power)]
        found[of_level] = np.where(values[right] < values[left], right, left)
    return found
