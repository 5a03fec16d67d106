r"""Predecessor-closed sets listed by what a cut behind them may cost, without going through all that there are.

Of a closed set I, work(I) is the compute of its blocks and X(I) the transfer seconds of what crosses the cut behind it,
each for one end of the transfers. Listed are all I with

    work(I) - b X(I) >= low        work(I) + a X(I) <= high        X(I) <= most

for weights a and b of the devices before the cut and behind it, 1 where they are alike; or those that may come next
after a set of a family, or before one, with limits of its own for each.

A part of the problem may be asked for: the sets between two given ones, as :meth:`Listing.between` has it. And what is
inside a set may count otherwise than what is not, as :meth:`Listing.measured` has it: the work in the second condition
is that of all blocks, less what is not inside.

Blocks are decided one by one in a topological order, inside or outside, for all undecided sets at once. What is decided
bounds all three: work and transfers only grow, a tensor crosses once its maker is inside and a reader outside, and of
the work that may still come what is behind a block outside is lost. Between a low and a high that are near each
other the blocks that must be inside, or outside, whatever the set, are known from the start.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from shardwright.sharder.planning.exact.search import OutOfTimeError
from shardwright.sharder.planning.exact.transfers import by_block
from shardwright.sharder.planning.problem import Problem, bits
from shardwright.sharder.planning.wide.mincut import least_transfer_s

__all__ = ["Cuts", "Family", "Listing", "Measure", "TooManyError"]

Floats = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]
Masks = npt.NDArray[np.uint64]
"""By set and word of 64 blocks."""
Words = list[tuple[int, np.uint64]]
"""Some blocks: number of the word, and the bits of it."""

AT_ONCE = 200_000
"""So many words of undecided sets are gone through together; the rest waits."""
MOST_WAITING = 60_000_000
"""Hardly more words wait, even if each block parts all sets in two: of many blocks fewer are gone through together."""
MOST_LISTED = 1_000_000
MOST_WORDS = 10_000_000
"""Of the sets that are listed."""
NEVER = 1e300
"""Seconds of a tensor that no link takes, as a number."""
ROUNDING = 1e-12
"""Of the whole work: two sums of the same differ by less."""


class Cuts(NamedTuple):
    """Some closed sets."""

    masks: Masks
    work_s: Floats
    moved_s: Floats
    """X of each."""
    origin: npt.NDArray[np.int64]
    """By set: the index of the one that it comes after, or before, in the family that it was listed from."""

    def first(self, count: int, order: Floats) -> Cuts:
        """So many of them, those with the least ``order``."""
        return self.take(np.argsort(order)[:count])

    def take(self, which: npt.NDArray[np.int64]) -> Cuts:
        """Those of these numbers."""
        return Cuts(self.masks[which], self.work_s[which], self.moved_s[which], self.origin[which])

    def mask(self, index: int) -> int:
        """One of them as bit mask."""
        return sum(int(word) << 64 * k for k, word in enumerate(self.masks[index]))

    def __bool__(self) -> bool:
        return bool(len(self.work_s))


class Family(NamedTuple):
    """Sets beside those that are asked for, with a stage in between."""

    cuts: Cuts
    come: Literal["before", "behind"]
    """Whether the stage comes behind them, or before."""
    limits: Floats
    """By set: ``high`` of those that come behind it, or ``low`` of those before it."""


class TooManyError(Exception):
    """More steps than were allowed, or more sets; ``some`` of these."""

    def __init__(self, some: Cuts) -> None:
        super().__init__()
        self.some = some


class _Undecided(NamedTuple):
    """Sets of which the first so many blocks are decided."""

    inside: Masks
    outside: Masks
    """What is outside, with all that is behind it."""
    work_s: Floats
    left_s: Floats
    """The work of all that is not outside."""
    moved_s: Floats
    origin: npt.NDArray[np.int64]
    excess_s: Floats | None
    """Where blocks count otherwise inside than outside: so much more than all work count those that are decided, and
    the others at least."""

    def take(self, which: slice | Flags) -> _Undecided:
        if not isinstance(which, slice):
            chosen = np.flatnonzero(which)  # numpy takes by numbers several times as fast as by flags
            return self._each(lambda array: array.take(chosen, axis=0))
        return self._each(lambda array: array[which])

    def _each(self, change: Callable[[Any], Any]) -> _Undecided:
        changed: list[Any] = [None if array is None else change(array) for array in self]
        return _Undecided(*changed)

    @classmethod
    def together(cls, parts: Sequence[_Undecided]) -> _Undecided:
        """All sets of all parts."""
        all_: list[Any] = [None if arrays[0] is None else np.concatenate(arrays) for arrays in zip(*parts, strict=True)]
        return cls(*all_)


class Measure:
    """What each block counts, and so sets of them.

    Args:
        of_block: seconds.
        words: of 64 blocks.
    """

    def __init__(self, of_block: Floats, words: int) -> None:
        self.of_block = of_block
        padded = np.zeros(64 * words)
        padded[: len(of_block)] = of_block
        bits_of_byte = (np.arange(256)[:, None] >> np.arange(8) & 1).astype(float)
        self.of_byte = padded.reshape(words, 8, 8) @ bits_of_byte.T

    def of_word(self, words: Masks, k: int) -> Floats:
        """Of the blocks in some masks' word number ``k``."""
        eighths = range(8)
        return sum(
            (self.of_byte[k][b][(words >> np.uint64(8 * b)).astype(np.uint8)] for b in eighths), np.zeros(len(words))
        )

    def of(self, masks: Masks) -> Floats:
        """Of each set."""
        return sum((self.of_word(masks[:, k], k) for k in range(masks.shape[1])), np.zeros(len(masks)))


class _Excess:
    """What blocks count inside and outside beyond the less of both.

    Args:
        inside: what they count there.
        outside: likewise.
        all_s: all work.
        words: of 64 blocks.
    """

    def __init__(self, inside: Floats, outside: Floats, all_s: float, words: int) -> None:
        least = np.minimum(inside, outside)
        self.inside, self.outside = Measure(inside - least, words), Measure(outside - least, words)
        self.least_s = float(least.sum()) - all_s

    def of(self, inside: Masks, outside: Masks) -> Floats:
        """Of sets with so much inside and outside, as :class:`_Undecided` has it."""
        return self.least_s + self.inside.of(inside) + self.outside.of(outside)


class _Window(NamedTuple):
    """What is asked for; ``low`` and ``high`` by origin."""

    low: Floats
    high: Floats
    most: float
    weights: tuple[float, float]
    shut: list[bool]
    """By tensor: whether some reader is outside whatever the set."""

    def keeps(self, sets: _Undecided) -> Flags:
        """Which of the sets may still be what is asked for."""
        before, behind = self.weights
        low, high, moved_s = self.low[sets.origin], self.high[sets.origin], sets.moved_s
        kept: Flags = (
            (moved_s <= self.most) & (sets.left_s - behind * moved_s >= low) & (sets.work_s + before * moved_s <= high)
        )
        if sets.excess_s is not None:  # both of these together, where low and high are of one measure
            kept &= sets.excess_s + (before + behind) * moved_s <= high - low
        return kept


def words_of(blocks: Iterable[int]) -> Words:
    """Some blocks by words."""
    words: dict[int, int] = {}
    for v in map(int, blocks):
        words[v >> 6] = words.get(v >> 6, 0) | 1 << (v & 63)
    return [(k, np.uint64(word)) for k, word in words.items()]


class Listing:
    """The blocks of a problem whose devices are alike, or count so, and what listing has to know of them.

    Args:
        problem: over each pair of devices a tensor counts as over the best. Transfers that are not relayed, or that are
            beside compute, count as nothing, which loads are not below.
        out_of_time: asked at each block.

    Raises:
        OutOfTimeError: the time has passed.
    """

    def __init__(self, problem: Problem, out_of_time: Callable[[], bool] = lambda: False) -> None:
        count = len(problem.blocks)
        self.out_of_time = out_of_time
        self.words = (count + 63) // 64
        self.work = np.array([seconds[0] for seconds in problem.seconds])
        """By block, in seconds."""
        all_s = float(self.work.sum())
        self.all_s, self.slack_s = all_s, ROUNDING * all_s
        summed = problem.transfers == "relayed" and not problem.overlap
        self.price = [
            min(least_transfer_s(problem, tensor) / 2, NEVER) if summed else 0.0 for tensor in problem.crossings
        ]
        self.maker, self.readers, self.made, self.read = by_block(problem)
        before = np.eye(count, dtype=bool)
        for v, direct in enumerate(problem.predecessors):
            self._check_time()
            for u in bits(direct):
                before[v] |= before[u]
        self.before = before
        self.behind = [words_of(np.flatnonzero(before[:, v])) for v in range(count)]
        self.inside = self.outside = Measure(self.work, self.words)
        """What counts in a set, and what is lost outside it."""
        self.excess: _Excess | None = None
        self.needed_s, self.behind_s = before @ self.work, self.work @ before
        self.ends = self._one([]), self._one(range(count))
        """What is before the first stage, and what is behind the last one."""

    def _check_time(self) -> None:
        if self.out_of_time():
            raise OutOfTimeError

    def between(self, before: int, behind: int) -> Listing:
        """The stages behind the closed set ``before`` alone, up to the closed set ``behind``; both are bit masks."""
        part = copy.copy(self)
        part.ends = self._one(list(bits(before))), self._one(list(bits(behind)))
        return part

    def timed(self, out_of_time: Callable[[], bool]) -> Listing:
        """The same with another clock."""
        other = copy.copy(self)
        other.out_of_time = out_of_time
        return other

    def measured(self, inside: Measure, outside: Measure, slack_s: float) -> Listing:
        """The same sets, but blocks inside count by one measure and those outside by another, with some slack."""
        other = copy.copy(self)
        other.inside, other.outside, other.slack_s = inside, outside, slack_s
        other.excess = _Excess(inside.of_block, outside.of_block, self.all_s, self.words)
        other.needed_s, other.behind_s = self.before @ inside.of_block, outside.of_block @ self.before
        return other

    @property
    def whole_s(self) -> float:
        """The work of all that there is to be split."""
        first, last = self.ends
        return float(last.work_s[0] - first.work_s[0])

    def _one(self, blocks: Sequence[int]) -> Cuts:
        """One closed set alone."""
        inside = np.zeros(len(self.work), dtype=bool)
        inside[list(blocks)] = True
        crossing = zip(self.price, self.maker, self.readers, strict=True)
        moved_s = sum(price for price, maker, readers in crossing if inside[maker] and not inside[readers].all())
        work_s = np.full(1, self.work[inside].sum())
        return Cuts(self._mask(blocks)[None, :], work_s, np.full(1, float(moved_s)), np.zeros(1, np.int64))

    def _mask(self, blocks: Iterable[int]) -> Masks:
        mask = np.zeros(self.words, np.uint64)
        for k, word in words_of(blocks):
            mask[k] = word
        return mask

    def flags(self, one: Cuts) -> Flags:
        """By block: whether the only set has it."""
        of_words = np.unpackbits(one.masks[0].view(np.uint8), bitorder="little")
        return of_words[: len(self.work)].astype(bool)

    def sets(
        self,
        low_s: float,
        high_s: float,
        most_s: float,
        steps: int,
        beside: Family | None = None,
        weights: tuple[float, float] = (1.0, 1.0),
    ) -> Cuts:
        """All sets between ``low_s`` and ``high_s``; within the limits of one of ``beside``, if given.

        Args:
            low_s: as above.
            high_s: as above.
            most_s: as above.
            steps: so many undecided sets may be gone through.
            beside: a family.
            weights: those of the devices before the cut and behind it.

        Raises:
            TooManyError: it took more than ``steps`` undecided sets, or there are too many; it has ``some`` of them.
                No more than twice the ``steps`` are taken, but for some two a block.
            OutOfTimeError: the time has passed.
        """
        first, last = (self.flags(end) for end in self.ends)
        forced = (self.all_s - self.behind_s < low_s - self.slack_s) | first
        barred = (self.needed_s > high_s + self.slack_s) | ~last
        if (forced & barred).any():
            return self._cuts([])
        count = 1 if beside is None else len(beside.cuts.work_s)
        low, high = np.full(count, low_s), np.full(count, high_s)
        inside = np.repeat(self._mask(np.flatnonzero(forced))[None, :], count, axis=0)
        outside = np.repeat(self._mask(np.flatnonzero(barred))[None, :], count, axis=0)
        if beside is not None and beside.come == "before":
            high = np.minimum(high, beside.limits)
            inside |= beside.cuts.masks
        elif beside is not None:
            low = np.maximum(low, beside.limits)
            outside |= ~beside.cuts.masks & self._mask(range(len(self.work)))
        shut = [bool(barred[readers].any()) for readers in self.readers]
        moved_s = sum(
            price for price, maker, s in zip(self.price, self.maker, shut, strict=True) if s and forced[maker]
        )
        window = _Window(low - self.slack_s, high + self.slack_s, most_s + self.slack_s, weights, shut)
        apart: Flags = np.all((inside & outside) == 0, axis=1)
        start = _Undecided(
            inside,
            outside,
            self.inside.of(inside),
            self.all_s - self.outside.of(outside),
            np.full(count, float(moved_s)),
            np.arange(count),
            None if self.excess is None else self.excess.of(inside, outside),
        ).take(apart)
        parts: list[Cuts] = []
        left = min(MOST_LISTED, MOST_WORDS // self.words)
        for number, part in self._decided(start, window, np.flatnonzero(~forced & ~barred).tolist(), steps):
            steps -= number
            if part:
                parts.append(part)
                left -= len(part.work_s)
            if steps < 0 or left < 0:
                raise TooManyError(self._cuts(parts))
        return self._cuts(parts)

    def _cuts(self, parts: list[Cuts]) -> Cuts:
        """The sets of all parts, each once."""
        if not parts:
            none = np.zeros(0)
            return Cuts(np.zeros((0, self.words), np.uint64), none, none, np.zeros(0, np.int64))
        self._check_time()
        masks, work_s, moved_s, origin = (np.concatenate(each) for each in zip(*parts, strict=True))
        if not origin.any():  # what begins with one set is parted in others
            return Cuts(masks, work_s, moved_s, origin)
        _, first = np.unique(masks, axis=0, return_index=True)
        return Cuts(masks[first], work_s[first], moved_s[first], origin[first])

    def _decided(
        self, start: _Undecided, window: _Window, free: list[int], allowed: int
    ) -> Iterator[tuple[int, Cuts | None]]:
        """All that becomes of ``start`` once the ``free`` blocks are decided, some at a time, and the steps it took.

        So few go through together that some are decided before the steps that are ``allowed`` are over.
        """
        waiting = [(0, start)]
        blocks = max(1, len(free))
        most = max(2, min(min(AT_ONCE, MOST_WAITING // blocks) // self.words, allowed // (2 * blocks)))
        while waiting:
            at, sets = waiting.pop()
            while at < len(free) and len(sets.work_s):
                if len(sets.work_s) > most:
                    waiting.append((at, sets.take(slice(most // 2, None))))
                    sets = sets.take(slice(0, most // 2))
                sets = self._decide(sets, window, free[at])
                at += 1
                self._check_time()
                yield len(sets.work_s), None
            done = sets.take(window.keeps(sets))
            yield 0, Cuts(done.inside, done.work_s, done.moved_s, done.origin)

    def _decide(self, sets: _Undecided, window: _Window, v: int) -> _Undecided:
        """Each set with block ``v`` outside and, where nothing before it is outside, with it inside."""
        k, bit = v >> 6, np.uint64(1 << (v & 63))
        lost = (sets.outside[:, k] & bit) != 0
        there = (sets.inside[:, k] & bit) != 0
        moved_in = sets.moved_s + sum(self.price[t] for t in self.made[v] if window.shut[t])
        moved_out = sets.moved_s.copy()
        for t in self.read[v]:
            if not window.shut[t]:  # it crosses for this reader if its maker and all readers so far are inside
                moved_out += self.price[t] * self._all_inside(
                    sets, [self.maker[t], *(r for r in self.readers[t] if r < v)]
                )
        enter = sets._replace(
            work_s=np.where(there, sets.work_s, sets.work_s + self.inside.of_block[v]), moved_s=moved_in
        )
        if self.excess is not None and sets.excess_s is not None:
            enter = enter._replace(
                excess_s=np.where(there, sets.excess_s, sets.excess_s + self.excess.inside.of_block[v])
            )
        enter = enter.take(~lost & window.keeps(enter))
        enter.inside[:, k] |= bit
        out = sets._replace(moved_s=moved_out)
        kept = ~there & window.keeps(out)
        stay, leave = out.take(kept & lost), out.take(kept & ~lost)
        left_s, excess_s = leave.left_s, leave.excess_s
        for word, behind in self.behind[v]:
            lose = behind & ~leave.outside[:, word]
            left_s = left_s - self.outside.of_word(lose, word)
            if self.excess is not None and excess_s is not None:
                excess_s = excess_s + self.excess.outside.of_word(lose, word)
            leave.outside[:, word] |= behind
        leave = leave._replace(left_s=left_s, excess_s=excess_s)
        return _Undecided.together([stay, leave.take(window.keeps(leave)), enter])

    def _all_inside(self, sets: _Undecided, blocks: Iterable[int]) -> Flags:
        """By set: whether ``blocks`` are all inside."""
        all_ = np.ones(len(sets.work_s), dtype=bool)
        for k, word in words_of(blocks):
            all_ &= (sets.inside[:, k] & word) == word
        return all_
