"""Which of many sets have one of many others in them: lists of cuts joined to stages.

    inner[i] is a subset of outer[j]   and   start[i] >= needed[j]

One pair after another would be looked at for hours where both are hundreds of thousands. So both are parted by a block
that many of the inner sets have and many of the outer ones lack, which leaves

    inner with it, outer with it        inner without it, outer with or without it

and spares the pairs between inner sets that have it and outer ones that lack it, and again until there are few pairs. A
part whose starts are all too small for what is needed is dropped, and an outer set that has an inner one is done with.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from shardwright.sharder.planning.exact.search import OutOfTimeError

__all__ = ["TooManyPairsError", "stage_between", "within_each"]

Masks = npt.NDArray[np.uint64]
Floats = npt.NDArray[np.float64]
Indices = npt.NDArray[np.int64]

FEW_PAIRS = 300_000
"""So many are looked at without parting them: they take about a millisecond."""
LOOKED_AT = 500
"""So many sets tell how many have a block."""
WORTH = 0.02
"""A block that spares a smaller share of the pairs is not worth the parting."""


class TooManyPairsError(Exception):
    """More pairs than were allowed; ``some`` as :func:`within_each` has it, -1 where it is not known."""

    def __init__(self, some: Indices) -> None:
        super().__init__()
        self.some = some


def within_each(
    inner: Masks,
    start: Floats,
    outer: Masks,
    needed: Floats,
    *,
    pairs: int,
    out_of_time: Callable[[], bool] = lambda: False,
    one_is_enough: bool = False,
) -> Indices:
    """By outer set: the index of an inner one that is in it and starts late enough, or -1 where there is none.

    Args:
        inner: bit masks, by set and word of 64.
        start: by inner set.
        outer: bit masks in as many words.
        needed: by outer set.
        pairs: how many may be looked at.
        out_of_time: asked now and then.
        one_is_enough: whether all but the first pairs that are found may be left out.

    Raises:
        TooManyPairsError: they were too few.
        OutOfTimeError: the time has passed.
    """
    found = np.full(len(outer), -1, np.int64)
    waiting = [(np.argsort(-start), np.argsort(needed))]
    while waiting:
        some, others = waiting.pop()
        others = others[found[others] < 0]
        if not len(some) or not len(others):
            continue
        others = others[: np.searchsorted(needed[others], start[some[0]], side="right")]
        if not len(others):
            continue
        some = some[: np.searchsorted(-start[some], -needed[others[0]], side="right")]
        if out_of_time():
            raise OutOfTimeError
        if len(some) * len(others) > FEW_PAIRS and (block := _parting(inner[some], outer[others])) is not None:
            has, have = _with(inner[some], block), _with(outer[others], block)
            waiting += [(some[has], others[have]), (some[~has], others)]
            continue
        pairs -= len(some) * len(others)
        if pairs < 0:
            raise TooManyPairsError(found)
        rows = max(1, FEW_PAIRS // len(others))
        for first in range(0, len(some), rows):
            if out_of_time():
                raise OutOfTimeError
            _look(inner, start, outer, needed, found, some[first : first + rows], others)
            left = others[found[others] < 0]
            if one_is_enough and len(left) < len(others):
                return found
            others = left
            if not len(others):
                break
    return found


def stage_between(
    before: tuple[Masks, Floats],
    behind: tuple[Masks, Floats],
    *,
    turned: bool,
    pairs: int,
    out_of_time: Callable[[], bool],
    one_is_enough: bool,
) -> Indices:
    """By set behind a stage, or before it if ``turned``: the number of one of the other, or -1, as in within_each.

    Args:
        before: sets that may come before the stage, and the latest that it may end behind each.
        behind: sets that may come behind it, and when it ends with each.
        turned: which of the two is asked for.
        pairs: as there.
        out_of_time: as there.
        one_is_enough: as there.
    """
    (inner, latest), (outer, end) = before, behind
    if turned:  # the other way round: what is not in those behind is not in these either
        inner, latest, outer, end = ~outer, -end, ~inner, -latest
    return within_each(inner, latest, outer, end, pairs=pairs, out_of_time=out_of_time, one_is_enough=one_is_enough)


def _look(
    inner: Masks, start: Floats, outer: Masks, needed: Floats, found: Indices, some: Indices, others: Indices
) -> None:
    """Note in ``found`` which of ``some`` inner sets are in the ``others``."""
    fits = start[some][:, None] >= needed[others]
    for word in range(inner.shape[1]):
        fits &= inner[some, word][:, None] & ~outer[others, word] == 0
    there = fits.any(axis=0)
    found[others[there]] = some[fits[:, there].argmax(axis=0)]


def _with(masks: Masks, block: int) -> npt.NDArray[np.bool_]:
    """Whether sets have a block."""
    has: npt.NDArray[np.bool_] = masks[:, block >> 6] & np.uint64(1 << (block & 63)) != 0
    return has


def _parting(inner: Masks, outer: Masks) -> int | None:
    """The block that spares most pairs; None where none is worth it."""
    with_it, theirs = _shares(inner), _shares(outer)
    spared = with_it * (1 - theirs)
    block = int(spared.argmax())
    return block if spared[block] > WORTH else None


def _shares(masks: Masks) -> Floats:
    """By block: the share of the sets that have it, by some of them."""
    some = np.ascontiguousarray(masks[:: -(-len(masks) // LOOKED_AT)])
    shares: Floats = np.unpackbits(some.view(np.uint8), axis=1, bitorder="little").mean(axis=0)
    return shares
