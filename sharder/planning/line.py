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

from shardwright.sharder.planning.chain import Cut, Floats, Integers, Line, counted, in_order, least_load, states_needed
from shardwright.sharder.planning.problem import Problem, bits
from shardwright.sharder.planning.search import Stages

__all__ = ["Split", "is_chain", "line_of", "split_line"]

MOST_STATES = 20_000
"""Of the pairs of states that are gone through at each ceiling, at some ten microseconds each."""


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
    line = line_of(problem, order, classes)
    if states_needed(counts) <= MOST_STATES:
        cut = least_load(line, counted(line, counts, problem.most_stages), bound_s, below_s, out_of_time)
        return None if cut is None else _split(order, cut, classes)
    bound_s = max(bound_s, _bound_s(problem, order, classes, out_of_time))
    kind_of = {device: kind for kind, class_ in enumerate(classes) for device in class_}
    best: Split | None = None
    for devices in device_orders:
        kinds = [kind_of[device] for device in devices[: problem.most_stages]]
        cut = least_load(line, in_order(line, kinds), bound_s, below_s, out_of_time)
        if cut is not None and (best is None or cut.value < best.value_s):
            best = _split(order, cut._replace(bound=min(bound_s, cut.value)), classes)
    return best


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
    while len(merged) > 1 and states_needed([len(group) for group in merged]) > MOST_STATES:
        near = [total_s[b[-1]] - total_s[a[0]] for a, b in itertools.pairwise(merged)]
        at = near.index(min(near))
        merged[at : at + 2] = [merged[at] + merged[at + 1]]
    line = line_of(problem, order, merged)
    states = counted(line, [len(group) for group in merged], problem.most_stages)
    cut = least_load(line, states, out_of_time=out_of_time)
    return 0.0 if cut is None else cut.bound


def line_of(problem: Problem, order: Sequence[int], groups: Sequence[Sequence[int]]) -> Line:
    """The blocks of ``problem`` in ``order``; a kind for each group of devices, in all respects the best of them."""
    blocks = [problem.blocks[v] for v in order]
    seconds = np.array([problem.seconds[v] for v in order])
    allowed = np.array([block.allowed for block in blocks])
    barred = [_sums(~allowed[:, group].any(axis=1)) for group in groups]
    return Line(
        work=tuple(_prefixes(np.where(allowed, seconds, np.inf)[:, group].min(axis=1)) for group in groups),
        cuts=_cuts(problem, order, groups),
        units=_sums(np.array([bool(block.units) for block in blocks])),
        barred=tuple(barred) if any(sums[-1] for sums in barred) else (),
    )


def _sums(flags: npt.ArrayLike) -> Integers:
    """How many are true before each position."""
    return np.concatenate([[0], np.cumsum(np.asarray(flags, dtype=np.int64))])


def _prefixes(seconds: Floats) -> Floats:
    """Their sums before each position. Long doubles, where the machine has them, keep ten thousand roundings apart."""
    finite = np.where(np.isfinite(seconds), seconds, 0.0)
    return np.concatenate([[0.0], np.cumsum(finite, dtype=np.longdouble).astype(np.float64)])


class _Crossing(NamedTuple):
    """What crosses the cut at each position."""

    tensors: Floats
    gradients: Floats
    forward_bytes: Floats
    backward_bytes: Floats


def _crossing(problem: Problem, order: Sequence[int]) -> _Crossing:
    """By position in ``order``: each tensor crosses the cuts from behind its producer to before its last reader."""
    place = {v: position for position, v in enumerate(order)}
    ordered = all(v == position for position, v in enumerate(order))
    changes = np.zeros((4, len(order) + 2))
    for tensor in problem.crossings:
        begin = place[tensor.producer] + 1
        end = tensor.readers.bit_length() if ordered else max(place[v] for v in bits(tensor.readers)) + 1
        row = (1, bool(tensor.backward_bytes), tensor.forward_bytes, tensor.backward_bytes)
        if begin < end:
            changes[:, begin] += row
            changes[:, end] -= row
    return _Crossing(*np.cumsum(changes, axis=1)[:, :-1])


def _cuts(problem: Problem, order: Sequence[int], groups: Sequence[Sequence[int]]) -> tuple[tuple[Floats, ...], ...]:
    """By pair of groups: seconds of a step for what crosses each cut, over the link that is fastest there."""
    crossing = _crossing(problem, order)
    known: dict[frozenset[_Pair], Floats] = {}

    def between(a: Sequence[int], b: Sequence[int]) -> Floats:
        pairs = frozenset((problem.links[x][y], problem.links[y][x]) for x in a for y in b if x != y)
        if pairs not in known:
            seconds = [_transfer_s(crossing, pair) * problem.microbatches for pair in pairs]
            known[pairs] = np.min(seconds, axis=0) if seconds else np.full(len(order) + 1, np.inf)
        return known[pairs]

    return tuple(tuple(between(a, b) for b in groups) for a in groups)


_Pair = tuple[tuple[float, float], tuple[float, float]]
"""Latency and bandwidth from one device to another, and back."""


def _transfer_s(crossing: _Crossing, pair: _Pair) -> Floats:
    """By position: seconds of one micro-batch. Where nothing is sent nothing is paid, at infinite latency too."""
    (there_s, there), (back_s, back) = pair
    with np.errstate(invalid="ignore"):
        forward = crossing.tensors * there_s + crossing.forward_bytes / there
        backward = crossing.gradients * back_s + crossing.backward_bytes / back
    return np.where(crossing.tensors > 0, forward, 0.0) + np.where(crossing.gradients > 0, backward, 0.0)
