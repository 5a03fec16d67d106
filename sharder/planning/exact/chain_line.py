"""A line of blocks, and the states that its stages may be in: what chain.py goes through.

The positions between blocks, and what its letters stand for, are explained there.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

__all__ = ["Cut", "Floats", "Integers", "Line", "State", "counted", "in_order", "states_needed"]

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]


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
    kinds = range(len(counts))
    weights: dict[tuple[int, ...], tuple[float, float]] = {}
    states = []
    for used, kind, before in _uses(tuple(counts), most_stages):
        if used not in weights:
            left = sorted((line.speed[c] for c in kinds for _ in range(counts[c] - used[c])), reverse=True)
            behind = sum(line.speed[c] * used[c] for c in kinds)
            weights[used] = behind, sum(left[: most_stages - sum(used)])
        states.append(State(kind, *weights[used], before, not any(used)))
    return states


_Use = tuple[tuple[int, ...], int, tuple[int, ...]]
"""How many devices of each kind are used behind a stage, its own kind, and the numbers of what may be before it."""


@lru_cache(maxsize=4)  # the same devices are planned for at several numbers of micro-batches
def _uses(counts: tuple[int, ...], most_stages: int) -> list[_Use]:
    """The states of :func:`counted` without what depends on the blocks, those with fewer devices used first."""
    every = sorted(itertools.product(*(range(count + 1) for count in counts)), key=sum)
    kinds = range(len(counts))
    index: dict[tuple[tuple[int, ...], int], int] = {}
    for used, kind in itertools.product(every, kinds):
        if sum(used) < most_stages and used[kind] < counts[kind]:
            index[used, kind] = len(index)
    found = []
    for used, kind in index:
        further = tuple(count + (c == kind) for c, count in enumerate(used))
        found.append((used, kind, tuple(index[further, c] for c in kinds if (further, c) in index)))
    return found


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
