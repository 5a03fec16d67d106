r"""The exact search where a stage's transfers are not those of its cuts alone: staged transfers, and overlapped ones.

It asks the question R of search.py. For staged transfers the load of a stage I' \ I on e follows from I, I' and e, so
that no device before or behind it is in the state:

    R(I, e, U, k, c) = some closed I' > I and f in U have load(I' \ I on e) < c, memory(I' \ I) within the cap of e,
                       and R(I', f, U - f, k - 1, c)

Relayed transfers that overlap with compute have two sums that must each stay below c, what is sent and what is
received, and the device before is in the state.

With n(t, I) the readers of tensor t in I, a stage receives the tensors that cross the cut behind I with
n(t, I') > n(t, I), and sends those that cross the cut behind I', but for those that cross both. So what a stage
I' \ I exchanges follows for all I' at once from the few tensors that cross behind one I: numbers of tensors and bytes,
which are whole, so that no difference loses digits. All ends of one start are weighed together, as arrays over the
closed sets in the order of their work.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from shardwright.sharder.planning.exact.search import (
    ROUNDING,
    Done,
    Lattice,
    OutOfTimeError,
    Stages,
    fluid_s,
    most_held,
    tied_of,
)
from shardwright.sharder.planning.problem import Crossing, Link, Problem, bits

__all__ = ["Stagewise"]

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]
Bytes = npt.NDArray[np.uint8]

MARGIN = 1e-9
"""A share by which bounds are lowered, so that no rounding rules a split out."""


class _Sums(NamedTuple):
    """Tensors and bytes that are exchanged, by closed set or by end."""

    tensors: Integers
    gradients: Integers
    forward_bytes: Integers
    backward_bytes: Integers

    def at(self, where: Integers) -> _Sums:
        """Those of some closed sets."""
        return _Sums(*(part[where] for part in self))

    def forward_s(self, link: Link) -> Floats:
        """Seconds of the tensors themselves over ``link``."""
        return _seconds(self.tensors, self.forward_bytes, link)

    def backward_s(self, link: Link) -> Floats:
        """Seconds of their gradients."""
        return _seconds(self.gradients, self.backward_bytes, link)


def _seconds(count: Integers, size: Integers, link: Link) -> Floats:
    """Where nothing is sent nothing is paid, at infinite latency too."""
    with np.errstate(invalid="ignore"):
        return np.where(count > 0, count * link[0] + size / link[1], 0.0)


class Ends(NamedTuple):
    """Where a stage from one start on one device may end; the most work first."""

    at: Integers
    """Positions of the closed sets."""
    compute_s: Floats
    """Ties included, of one step."""
    out_s: Floats
    """What is sent, of one step; under relayed transfers to the stage before only."""
    in_s: Floats


class Stagewise:
    """The question R over one lattice of closed sets and one choice of device orders.

    Args:
        problem: blocks, devices and links; its transfers are staged, or relayed and overlapped.
        lattice: the closed sets at which a stage may end.
        sums: theirs.
        classes: devices in classes; within a class they are used in the order given.
        out_of_time: asked in every state.
    """

    def __init__(
        self,
        problem: Problem,
        lattice: Lattice,
        sums: Mapping[int, Done],
        classes: Sequence[Sequence[int]],
        out_of_time: Callable[[], bool],
    ) -> None:
        self.problem = problem
        self.classes = classes
        self.out_of_time = out_of_time
        self.staged = problem.transfers == "staged"
        self.ceiling_s = 0.0
        self.failed: dict[tuple[int, ...], Bytes] = {}
        self.rests: dict[int, Floats] = {}
        self.closed = list(lattice)
        self.everything = len(self.closed) - 1
        self.prefixes = len(self.closed) == len(problem.blocks) + 1
        self.size = np.array([closed.bit_count() for closed in self.closed])
        place = {closed: position for position, closed in enumerate(self.closed)}
        self.steps = [(place[c], v, place[larger]) for c, steps in lattice.items() for v, larger in steps]
        done = [sums[closed] for closed in self.closed]
        self.work = np.array([one.work_s for one in done]).T
        self.by_work = np.argsort(self.work, axis=1, kind="stable")
        self.work_in_order = np.take_along_axis(self.work, self.by_work, axis=1)
        self.least = np.array([one.least_s for one in done])
        self.static = np.array([one.static_bytes for one in done], object)  # whole numbers of any size
        self.done = done
        self.crossing = _Sums(*np.array([one[4:] for one in done], dtype=np.int64).T)
        self.units = self.counts(sum(1 << v for v, block in enumerate(problem.blocks) if block.units))
        self.barred = [
            self.counts(sum(1 << v for v, block in enumerate(problem.blocks) if not block.allowed[d]))
            for d in range(len(problem.devices))
        ]
        self.most_at_once = problem.ledger.most_at_once()
        self.ties = [(tied, self.counts(tied.users), self.counts(tied.first)) for tied in tied_of(problem)]
        self.total = {tensor.name: tensor.readers.bit_count() for tensor in problem.crossings}
        self.readers = lru_cache(maxsize=4096)(self._readers)

    def counts(self, blocks: int) -> Integers:
        """By closed set: how many of ``blocks``, a bit mask, are in it."""
        if self.prefixes:
            return np.searchsorted(np.array(list(bits(blocks)), dtype=np.int64), np.arange(len(self.closed)))
        return np.array([(closed & blocks).bit_count() for closed in self.closed])

    def _readers(self, tensor: Crossing) -> Integers:
        return self.counts(tensor.readers)

    @cached_property
    def words(self) -> npt.NDArray[np.uint64]:
        """The closed sets as rows of 64 blocks each."""
        count = max(1, (len(self.problem.blocks) + 63) // 64)
        whole = b"".join(closed.to_bytes(8 * count, "little") for closed in self.closed)
        return np.frombuffer(whole, dtype="<u8").reshape(-1, count)

    def begin(self, ceiling_s: float) -> None:
        """Take a ceiling: what failed under a larger one fails under it."""
        if ceiling_s > self.ceiling_s:
            self.failed.clear()
        self.ceiling_s = ceiling_s

    def below(self, ceiling_s: float) -> Stages | None:
        """A split with every load below ``ceiling_s``, or None when this search has none."""
        self.begin(ceiling_s)
        every = (1 << len(self.problem.devices)) - 1
        for after in reversed(range(self.problem.most_stages)):
            if self.least[self.everything] * (1 - ROUNDING) >= ceiling_s * (after + 1):
                break
            for device in self.candidates(every):
                found = self.extend(0, -1, device, every & ~(1 << device), after)
                if found is not None:
                    return found
        return None

    def candidates(self, free: int) -> list[int]:
        """The first free device of each class."""
        firsts = (next((d for d in class_ if free >> d & 1), None) for class_ in self.classes)
        return [d for d in firsts if d is not None]

    def extend(self, start: int, before: int, device: int, free: int, after: int) -> Stages | None:
        """Stages from ``start`` on, the first on ``device`` and ``after`` more behind it, or None."""
        failed = self.failed_from(before, device, free, after)
        if failed[start >> 3] >> (start & 7) & 1:
            return None
        if self.out_of_time():
            raise OutOfTimeError
        ends = self.ends(start, before, device, free, after)
        behind = self.behind(device, free, after)
        for position, end in enumerate(ends.at.tolist()):
            following = [
                (other, left)
                for other, left, gone in behind
                if not gone[end >> 3] >> (end & 7) & 1 and (self.staged or self.passes(ends, position, device, other))
            ]
            if (after and not following) or not self.stays_low(ends, position, start, device, after):
                continue
            members = self.closed[end] & ~self.closed[start]
            if after == 0:
                return ((device, members),)
            for other, left in following:
                rest = self.extend(end, device, other, left, after - 1)
                if rest is not None:
                    return ((device, members), *rest)
        failed[start >> 3] |= 1 << (start & 7)
        return None

    def failed_from(self, before: int, device: int, free: int, after: int) -> Bytes:
        """A bit for each closed set from which the question was answered with no."""
        key = (device, free, after) if self.staged else (before, device, free, after)
        if key not in self.failed:
            self.failed[key] = np.zeros(len(self.closed) // 8 + 1, np.uint8)
        return self.failed[key]

    def behind(self, device: int, free: int, after: int) -> list[tuple[int, int, Bytes]]:
        """The devices that may follow ``device``, with those that are free then, and from where they have failed."""
        if after == 0:
            return []
        left = [(other, free & ~(1 << other)) for other in self.candidates(free)]
        return [(other, rest, self.failed_from(device, other, rest, after - 1)) for other, rest in left]

    def passes(self, ends: Ends, position: int, device: int, following: int) -> bool:
        """Whether a stage stays below the ceiling with what it exchanges with the one behind it, on ``following``."""
        end = ends.at[position]
        there_s, back_s = self.across(device, following)
        return bool(
            ends.out_s[position] + there_s[end] < self.ceiling_s and ends.in_s[position] + back_s[end] < self.ceiling_s
        )

    def across(self, source: int, target: int) -> tuple[Floats, Floats]:
        """By closed set: seconds of a step for what is relayed across the cut behind it, and for the gradients."""
        pair = self.problem.links[source][target], self.problem.links[target][source]
        if pair not in self._across:
            count = self.problem.microbatches
            there_s, back_s = self.crossing.forward_s(pair[0]), self.crossing.backward_s(pair[1])
            self._across[pair] = count * there_s, count * back_s
        return self._across[pair]

    @cached_property
    def _across(self) -> dict[tuple[Link, Link], tuple[Floats, Floats]]:
        return {}

    def ends(self, start: int, before: int, device: int, free: int, after: int) -> Ends:
        """The ends of a stage from ``start`` on ``device`` that time, pins and what is left behind them allow."""
        at = self._in_reach(start, device, free, after)
        compute_s = self.work[device][at] - self.work[device][start]
        for tied, users, first in self.ties:
            inside = users[at] - users[start]
            held = (inside > 0) & (inside < tied.users.bit_count())
            copied = (inside > 0) & (first[at] == first[start])
            compute_s = (
                compute_s + np.where(held, tied.sum_s[device], 0.0) + np.where(copied, tied.update_s[device], 0.0)
            )
        out_s, in_s = self._traffic(start, before, device, at)
        if self.problem.overlap:
            low = (compute_s < self.ceiling_s) & (out_s < self.ceiling_s) & (in_s < self.ceiling_s)
        else:
            low = out_s + in_s + compute_s < self.ceiling_s
        return Ends(*(part[low] for part in (at, compute_s, out_s, in_s)))

    def _in_reach(self, start: int, device: int, free: int, after: int) -> Integers:
        """The closed sets that may end a stage by its work, pins, units, and by what is left for the others."""
        if after == 0:
            at = np.array([self.everything])
        else:
            work, order = self.work_in_order[device], self.by_work[device]
            done_s = self.work[device][start]
            low, high = np.searchsorted(work, [done_s * (1 - MARGIN), done_s + self.ceiling_s])
            at = order[low:high][::-1]
            at = at[(self.size[at] > self.size[start]) & (at != self.everything)]
            gone = [failed[at >> 3] >> (at & 7) & 1 for _, _, failed in self.behind(device, free, after)]
            at = at[~np.bitwise_and.reduce(gone, axis=0).astype(bool)] if gone else at[:0]
            at = at[self._left_s(at, free, after) * (1 - MARGIN) < self.ceiling_s]
        at = at[(self.units[at] > self.units[start]) & (self.barred[device][at] == self.barred[device][start])]
        if after and not self.prefixes:
            for word in range(self.words.shape[1]):
                own = self.words[start, word]
                if own:
                    at = at[(self.words[at, word] & own) == own]
        found: Integers = at
        return found

    def _left_s(self, at: Integers, free: int, after: int) -> Floats:
        """By closed set: a bound on the largest load of what is behind it, over ``after`` of the ``free`` devices."""
        if free not in self.rests:
            share = fluid_s(self.problem, list(bits(free)))
            rest = np.zeros(len(self.closed))
            for position, v, larger in reversed(self.steps):
                rest[position] = rest[larger] + share[v]
            room = sum(self.problem.caps[d] for d in bits(free))
            rest[(self.static[-1] - self.static > room).astype(bool)] = np.inf
            self.rests[free] = rest
        left: Floats = np.maximum(self.rests[free][at], (self.least[-1] - self.least[at]) / after)
        return left

    def _traffic(self, start: int, before: int, device: int, at: Integers) -> tuple[Floats, Floats]:
        """Seconds of a step that stages from ``start`` to each of the ends ``at`` send and receive."""
        if not self.staged:  # what is relayed to the stage behind depends on that: see passes
            if before < 0:
                return np.zeros(len(at)), np.zeros(len(at))
            there_s, back_s = self.across(before, device)
            return np.full(len(at), back_s[start]), np.full(len(at), there_s[start])
        sent, received = self.exchanged(start, at)
        there, back = self.problem.ways[device]
        count = self.problem.microbatches
        out_s = count * (sent.forward_s(there) + received.backward_s(there))
        in_s = count * (received.forward_s(back) + sent.backward_s(back))
        return out_s, in_s

    def exchanged(self, start: int, at: Integers) -> tuple[_Sums, _Sums]:
        """What stages from ``start`` to each of the ends ``at`` send, each tensor once, and what they receive."""
        sent = [part.copy() for part in self.crossing.at(at)]
        received = [np.zeros(len(at), np.int64) for _ in range(4)]
        for tensor in self.problem.crossing(self.closed[start]):
            read = self.readers(tensor)
            row = (1, int(tensor.backward_bytes > 0), tensor.forward_bytes, tensor.backward_bytes)
            now = read[at]
            passes, reads = now < self.total[tensor.name], now > read[start]
            for number, size in enumerate(row):
                if size:
                    sent[number] -= size * passes
                    received[number] += size * reads
        return _Sums(*sent), _Sums(*received)

    def stays_low(self, ends: Ends, position: int, start: int, device: int, after: int) -> bool:
        """Whether a stage from ``start`` to one of its ``ends`` fits, and is below the ceiling with what that takes."""
        more_s = self.more_s(start, int(ends.at[position]), device, after)
        beside_s = 0.0 if self.problem.overlap else float(ends.out_s[position] + ends.in_s[position])
        return beside_s + float(ends.compute_s[position]) + more_s < self.ceiling_s

    def more_s(self, start: int, end: int, device: int, after: int) -> float:
        """As :meth:`Problem.more_s`, of the stage from ``start`` to ``end``."""
        problem, first, last = self.problem, self.done[start], self.done[end]
        cap, count = problem.caps[device], problem.microbatches
        members = self.closed[end] & ~self.closed[start]
        size = last.static_bytes - first.static_bytes
        size += sum(tied.copy_bytes for tied, *_ in self.ties if members & tied.users and not members & tied.first)
        if size > cap:
            return math.inf
        # What is at most received and at most sent settles most stages; the others are walked through.
        coming = most_held(problem, after) * (last.coming_bytes - first.coming_bytes)
        buffers = count * (first.forward_bytes + first.backward_bytes + last.backward_bytes)
        if size + buffers + coming + self.most_at_once <= cap and problem.fetching is None:
            return 0.0
        return problem.more_s(self.closed[start], self.closed[end], device, after)
