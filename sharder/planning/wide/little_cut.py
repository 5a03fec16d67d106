"""The closed sets whose cut costs little, as the cuts of a good split do, listed once for all questions."""

from __future__ import annotations

import copy
import math

import numpy as np

from shardwright.sharder.planning.wide.listing import Listing, TooManyError

__all__ = ["LittleCut"]

KNOWN_STEPS = 2_000_000
"""So many undecided sets are gone through."""
FIRST_KNOWN, MORE_KNOWN = 1e-3, 1.3
"""The transfers of a cut, as a share of all work at first, and how many times as much then, while the steps suffice."""


class LittleCut:
    """All closed sets with little X, by their work.

    Raises:
        OutOfTimeError: the time has passed.
    """

    def __init__(self, listing: Listing) -> None:
        self.listing = listing
        self.most_s = 0.0
        """X of no other set is less."""
        self.sets = listing.ends[0]
        allowed = FIRST_KNOWN * listing.whole_s
        while allowed < 2 * listing.whole_s:
            try:
                # Of whatever work: by weights X may well be more than it.
                sets = listing.sets(-math.inf, math.inf, allowed, KNOWN_STEPS, weights=(0.0, 0.0))
            except TooManyError:
                return
            self.most_s, self.sets = allowed, sets.first(len(sets.work_s), sets.work_s)
            allowed *= MORE_KNOWN

    def of(self, listing: Listing) -> LittleCut:
        """The same of a listing with another clock."""
        other = copy.copy(self)
        other.listing = listing
        return other

    def between(self, before: int, behind: int) -> LittleCut:
        """Those that have ``before`` and are in ``behind``; both are bit masks."""
        part = copy.copy(self)
        part.listing = self.listing.between(before, behind)
        first, last = (end.masks[0] for end in part.listing.ends)
        masks = self.sets.masks
        inside = np.all((masks & first == first) & (masks & ~last == 0), axis=1)
        part.sets = self.sets.take(np.flatnonzero(inside))
        return part
