"""One order of a problem's blocks as a line, cut by chain.py over the devices of the problem.

What a line leaves out is the memory, and the ties: both only rule splits out, or make them dearer. So its least largest
load is a bound for every split along that order, and it is the optimum where its split turns out to fit and to pay no
tie. Of a problem whose blocks form a chain there is one order only.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from shardwright.sharder.planning.exact.chain import least_load
from shardwright.sharder.planning.exact.chain_line import (
    Cut,
    Floats,
    Integers,
    Line,
    State,
    counted,
    in_order,
    states_needed,
)
from shardwright.sharder.planning.exact.chain_overlapped import Exchange, OverlappedLine, least_load_overlapped
from shardwright.sharder.planning.exact.search import Stages
from shardwright.sharder.planning.exact.transfers import as_staged, is_next_only
from shardwright.sharder.planning.problem import Crossing, Link, Problem, bits

__all__ = ["Split", "is_chain", "line_of", "split_in_order", "split_line"]

MOST_STATES = 20_000
"""Of the pairs of states that are gone through at each ceiling, at some ten microseconds each."""
MOST_OVERLAPPED_STATES = 400
"""The same where transfers overlap with compute, at a few milliseconds each for ten thousand blocks."""


@dataclass(frozen=True)
class Split:
    """The best split of a line that was found, were there no memory to keep to and no ties."""

    stages: Stages
    value_s: float
    bound_s: float
    """No split along this order has a smaller largest load."""


def is_chain(problem: Problem) -> bool:
    """Whether each block has to come before the next, so that there is one order of them."""
    return all(before >> v & 1 for v, before in enumerate(problem.predecessors[1:]))


def split_line(
    problem: Problem,
    order: Sequence[int],
    classes: Sequence[Sequence[int]],
    device_orders: Iterable[Sequence[int]],
    *,
    bound_s: float = 0.0,
    below_s: float = math.inf,
    out_of_time: Callable[[], bool] = lambda: False,
) -> Split | None:
    """Cut the blocks in ``order``; None when no cut of finite load below ``below_s`` was found.

    Args:
        problem: blocks, devices and links.
        order: the blocks in a topological order.
        classes: devices that cannot be told apart.
        device_orders: tried one by one where the classes are too many for every order of theirs.
        bound_s: a proven bound.
        below_s: what is to be beaten; nothing by default.
        out_of_time: asked at each ceiling.
    """
    counts = [len(class_) for class_ in classes]
    line = _Cutting.of(problem, order, classes)
    if states_needed(counts) <= line.most_states:
        cut = line.cut(counted(line.line, counts, problem.most_stages), bound_s, below_s, out_of_time)
        return None if cut is None else _split(order, cut, classes)
    bound_s = max(bound_s, _bound_s(problem, order, classes, out_of_time))
    kind_of = {device: kind for kind, class_ in enumerate(classes) for device in class_}
    best: Split | None = None
    for devices in device_orders:
        kinds = [kind_of[device] for device in devices[: problem.most_stages]]
        cut = line.cut(in_order(line.line, kinds), bound_s, below_s, out_of_time)
        if cut is not None and (best is None or cut.value < best.value_s):
            best = _split(order, cut._replace(bound=min(bound_s, cut.value)), classes)
    return best


def split_in_order(
    problem: Problem, order: Sequence[int], devices: Sequence[int], out_of_time: Callable[[], bool] = lambda: False
) -> Split | None:
    """Cut the blocks in ``order`` for devices in one order of theirs, of which some may be left out.

    Returns:
        None when no cut of finite load was found. The bound is that of such cuts.
    """
    groups = [[device] for device in devices]
    line = _Cutting.of(problem, order, groups)
    cut = line.cut(in_order(line.line, range(len(groups))), 0.0, math.inf, out_of_time)
    return None if cut is None else _split(order, cut, groups)


class _Cutting(NamedTuple):
    """A line, and the solver that its loads are for."""

    line: Line
    overlapped: OverlappedLine | None

    @classmethod
    def of(cls, problem: Problem, order: Sequence[int], groups: Sequence[Sequence[int]]) -> _Cutting:
        if not problem.overlap:
            return cls(line_of(problem, order, groups), None)
        made = overlapped_line_of(problem, order, groups)
        return cls(made.line, made)

    @property
    def most_states(self) -> int:
        return MOST_STATES if self.overlapped is None else MOST_OVERLAPPED_STATES

    def cut(
        self, states: Sequence[State], bound_s: float, below_s: float, out_of_time: Callable[[], bool]
    ) -> Cut | None:
        if self.overlapped is None:
            return least_load(self.line, states, bound_s, below_s, out_of_time)
        return least_load_overlapped(self.overlapped, states, bound_s, below_s, out_of_time)


def _split(order: Sequence[int], cut: Cut, classes: Sequence[Sequence[int]]) -> Split:
    """The cut in terms of the problem; devices of a class are taken in their order."""
    free = [list(class_) for class_ in classes]
    ends = [0, *cut.positions, len(order)]
    stages = tuple(
        (free[kind].pop(0), mask_of(order[begin:end]))
        for kind, (begin, end) in zip(cut.kinds, itertools.pairwise(ends), strict=True)
    )
    return Split(stages, cut.value, cut.bound)


def mask_of(blocks: Iterable[int]) -> int:
    """Bit mask of ``blocks``."""
    digits = bytearray(max(blocks := list(blocks)) // 8 + 1)
    for v in blocks:
        digits[v >> 3] |= 1 << (v & 7)
    return int.from_bytes(digits, "little")


def _bound_s(
    problem: Problem, order: Sequence[int], classes: Sequence[Sequence[int]], out_of_time: Callable[[], bool]
) -> float:
    """A bound on every split along ``order``: devices that are nearly alike count as the best of them in each respect.

    Classes next to each other in speed are merged, the most alike first, until their orders are few enough.
    """
    total_s = problem.total_s
    merged = sorted((list(class_) for class_ in classes), key=lambda class_: total_s[class_[0]])
    most = MOST_OVERLAPPED_STATES if problem.overlap else MOST_STATES
    while len(merged) > 1 and states_needed([len(group) for group in merged]) > most:
        near = [total_s[b[-1]] - total_s[a[0]] for a, b in itertools.pairwise(merged)]
        at = near.index(min(near))
        merged[at : at + 2] = [merged[at] + merged[at + 1]]
    line = _Cutting.of(problem, order, merged)
    states = counted(line.line, [len(group) for group in merged], problem.most_stages)
    cut = line.cut(states, 0.0, math.inf, out_of_time)
    return 0.0 if cut is None else cut.bound


def line_of(problem: Problem, order: Sequence[int], groups: Sequence[Sequence[int]]) -> Line:
    """The blocks of ``problem`` in ``order``; a kind for each group of devices, in all respects the best of them.

    The cuts cost what is exchanged. No stage costs less than in the line: under staged transfers a stage pays for what
    its first block reads and its last one makes at least, which is all where every tensor goes to the next block.
    """
    blocks = [problem.blocks[v] for v in order]
    seconds = np.array([problem.seconds[v] for v in order])
    allowed = np.array([block.allowed for block in blocks])
    barred = [_sums(~allowed[:, group].any(axis=1)) for group in groups]
    closings, openings = _cuts(_Exchanges.of(problem, order), groups)
    return Line(
        work=tuple(_prefixes(np.where(allowed, seconds, np.inf)[:, group].min(axis=1)) for group in groups),
        cuts=closings,
        units=_sums(np.array([bool(block.units) for block in blocks])),
        barred=tuple(barred) if any(sums[-1] for sums in barred) else (),
        openings=openings,
    )


def overlapped_line_of(problem: Problem, order: Sequence[int], groups: Sequence[Sequence[int]]) -> OverlappedLine:
    """The same where transfers overlap with compute."""
    exchanges = _Exchanges.of(problem, order)

    def between(a: Sequence[int], b: Sequence[int]) -> Exchange:
        each = exchanges.between(a, b)
        return Exchange(*(np.min(part, axis=0) for part in zip(*each, strict=True)))

    return OverlappedLine(line_of(problem, order, groups), tuple(tuple(between(a, b) for b in groups) for a in groups))


def _sums(flags: npt.ArrayLike) -> Integers:
    """How many are true before each position."""
    return np.concatenate([[0], np.cumsum(np.asarray(flags, dtype=np.int64))])


def _prefixes(seconds: Floats) -> Floats:
    """Their sums before each position. Long doubles, where the machine has them, keep ten thousand roundings apart."""
    finite = np.where(np.isfinite(seconds), seconds, 0.0)
    return np.concatenate([[0.0], np.cumsum(finite, dtype=np.longdouble).astype(np.float64)])


class _Sums(NamedTuple):
    """Tensors by position."""

    tensors: Floats
    gradients: Floats
    forward_bytes: Floats
    backward_bytes: Floats

    def forward_s(self, link: Link) -> Floats:
        """Seconds of one micro-batch's tensors over ``link``."""
        return _seconds(self.tensors, self.forward_bytes, link)

    def backward_s(self, link: Link) -> Floats:
        """Seconds of their gradients."""
        return _seconds(self.gradients, self.backward_bytes, link)


def _seconds(count: Floats, size: Floats, link: Link) -> Floats:
    """Where nothing is sent nothing is paid, at infinite latency too."""
    with np.errstate(invalid="ignore"):
        return np.where(count > 0, count * link[0] + size / link[1], 0.0)


def _crossing(problem: Problem, order: Sequence[int]) -> _Sums:
    """By position in ``order``: each tensor crosses the cuts from behind its producer to before its last reader."""
    place = {v: position for position, v in enumerate(order)}
    ordered = all(v == position for position, v in enumerate(order))
    changes = np.zeros((4, len(order) + 2))
    for tensor in problem.crossings:
        begin = place[tensor.producer] + 1
        end = tensor.readers.bit_length() if ordered else max(place[v] for v in bits(tensor.readers)) + 1
        if begin < end:
            changes[:, begin] += _row(tensor)
            changes[:, end] -= _row(tensor)
    return _Sums(*np.cumsum(changes, axis=1)[:, :-1])


def _row(tensor: Crossing) -> tuple[int, int, int, int]:
    return 1, int(tensor.backward_bytes > 0), tensor.forward_bytes, tensor.backward_bytes


def _made_and_read(problem: Problem, order: Sequence[int]) -> tuple[_Sums, _Sums]:
    """By position in ``order``: what the block before it makes, and what the block behind it reads, for others."""
    place = {v: position for position, v in enumerate(order)}
    made, read = np.zeros((2, 4, len(order) + 1))
    for tensor in problem.crossings:
        made[:, place[tensor.producer] + 1] += _row(tensor)
        for v in bits(tensor.readers):
            read[:, place[v]] += _row(tensor)
    return _Sums(*made), _Sums(*read)


class _Exchanges(NamedTuple):
    """What a cut at each position makes its two sides exchange, in seconds of a step."""

    problem: Problem
    before: _Sums
    """Sent by the stage before the cut."""
    behind: _Sums
    """Received by the stage behind it."""

    @classmethod
    def of(cls, problem: Problem, order: Sequence[int]) -> _Exchanges:
        """Those of ``problem``, or of a relaxed one."""
        if problem.transfers == "direct" and not is_next_only(order, problem.crossings):
            problem = as_staged(problem)
        if problem.transfers == "staged":
            return cls(problem, *_made_and_read(problem, order))
        crossing = _crossing(problem, order)
        return cls(problem, crossing, crossing)

    def between(self, a: Sequence[int], b: Sequence[int]) -> list[Exchange]:
        """What devices of ``a`` and ``b`` exchange, each of their pairs that differs from the others once."""
        ways = {self._ways(x, y) for x in a for y in b if x != y}
        return [self._over(*way) for way in ways] or [Exchange(*(np.full_like(self.before.tensors, np.inf),) * 4)]

    def _ways(self, x: int, y: int) -> tuple[Link, Link, Link, Link]:
        """Of the stage before the cut, on ``x``: the way out and the way in; and of the one behind it, on ``y``."""
        if self.problem.transfers == "staged":
            return *self.problem.ways[x], *self.problem.ways[y]
        there, back = self.problem.links[x][y], self.problem.links[y][x]
        return there, back, back, there

    def _over(self, out: Link, in_: Link, behind_out: Link, behind_in: Link) -> Exchange:
        each = (
            self.before.forward_s(out),
            self.before.backward_s(in_),
            self.behind.backward_s(behind_out),
            self.behind.forward_s(behind_in),
        )
        return Exchange(*(self.problem.microbatches * seconds for seconds in each))


_Cuts = tuple[tuple[Floats, ...], ...]
"""By pair of groups and position: seconds of a step."""


def _cuts(exchanges: _Exchanges, groups: Sequence[Sequence[int]]) -> tuple[_Cuts, _Cuts]:
    """What each cut costs the stage before it and the stage behind it, over the ways that are fastest there."""
    pairs = [[exchanges.between(a, b) for b in groups] for a in groups]
    closings = (
        tuple(np.min([e.before_sends + e.before_receives for e in each], axis=0) for each in row) for row in pairs
    )
    openings = (
        tuple(np.min([e.behind_receives + e.behind_sends for e in each], axis=0) for each in row) for row in pairs
    )
    return tuple(closings), tuple(openings)
