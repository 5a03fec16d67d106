"""Weights that are brought for each call: the fewest bytes of a stage with which it fits.

A block whose weights stay on its device takes their bytes all the time; one whose weights are brought takes them while
it runs. So a stage of blocks v, with s(v) bytes of weights and p(v) bytes of whatever else is there while v runs, fits
a cap where the blocks B that are brought have

    resident(rest) + max(peak of the stage, max over B of p(v) + s(v)) <= cap

For each block that B may have as the one with the highest peak, the rest is a question of sums: of the blocks that have
no higher peak, the least sum of bytes that is at least what is too much.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

__all__ = ["Brought", "Fetching", "least_brought"]

MOST_SUMS = 2_000
"""Of so many sums the least is found; of more, one that is near to it, and a bound."""


@dataclass(frozen=True)
class Fetching:
    """Which weights may be brought, and how fast."""

    sizes: tuple[int, ...]
    """Bytes by block; 0 = they stay."""
    rates: tuple[float | None, ...]
    """Bytes a second, by device; None: nothing can be brought."""


class Brought(NamedTuple):
    """What a stage has to bring."""

    blocks: tuple[int, ...]
    """With which it fits."""
    size: int
    bound: int
    """Of bytes: it fits with no fewer."""


def least_brought(
    blocks: Sequence[tuple[int, int, int]], stays: Callable[[int], int], cap: int, whole: int
) -> Brought | None:
    """The fewest bytes with which a stage fits ``cap``, found or bounded; None where it fits with none.

    Args:
        blocks: that may be brought: the block, its bytes, and the peak of the stage's forward while it runs.
        stays: bytes of the stage when all of them are brought and its forward has this peak: the larger of what it has
            in any case, and the peak with something constant.
        cap: of the device.
        whole: bytes of all of them.
    """
    least = stays(0)
    if least + whole <= cap:
        return Brought((), 0, 0)
    if least > cap or not blocks:
        return None
    order = sorted(blocks, key=lambda block: block[1] + block[2])
    highest = order[-1][1] + order[-1][2]
    most = stays(highest)
    sums = _Sums(most + whole - cap)
    best, bound = None, math.inf
    for at, (_, size, peak) in enumerate(order):
        sums.add(at, size)
        if at + 1 < len(order) and sum(order[at + 1][1:]) == size + peak:
            continue  # the next one may be brought as well, at no higher a peak
        need = max(least, most - (highest - size - peak)) + whole - cap
        if best is not None and need >= best:
            break
        found = sums.least(need)
        if found is not None:
            best = found if best is None else min(best, found)
            bound = min(bound, need if sums.trimmed else found)
    if best is None:
        return None
    return Brought(tuple(order[at][0] for at in sums.of(best)), best, int(min(best, bound)))


class _Sums:
    """The sums of some sizes, of which one is asked for that is at least ``most`` or less than that."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.trimmed = False
        """Whether some sums were left out."""
        self.total = 0
        self.kept: set[int] = {0}
        self.last: dict[int, tuple[int, int]] = {}
        """By sum: the position of the last of its sizes, and the sum of the others."""

    def add(self, at: int, size: int) -> None:
        """Another size."""
        grown = {before + size for before in self.kept if before < self.most} | {self.total + size}
        grown -= self.kept
        for value in grown:
            self.last.setdefault(value, (at, value - size))
        self.total += size
        self.kept |= grown
        if len(self.kept) > MOST_SUMS:
            self.trimmed = True
            width = max(self.kept) // (MOST_SUMS // 2) + 1
            self.kept = {*{value // width: value for value in self.kept}.values(), 0, self.total}

    def least(self, need: int) -> int | None:
        """The least sum of at least ``need``."""
        return min((value for value in self.kept if value >= need), default=None)

    def of(self, value: int) -> list[int]:
        """The positions of the sizes that make a sum."""
        found = []
        while value:
            at, value = self.last[value]
            found.append(at)
        return found
