r"""What blocks count before a cut and behind it, where it is known which devices come before.

Let D be the devices before a cut, c weights of the devices, and I what is before it. What the weighed loads of D have
of I, and those of the others of what is not in I, is not below

    the sum over v in I of the least c[d] * seconds(v, d) of the d in D
    the sum over v not in I of the least c[d] * seconds(v, d) of the d not in D

each of which is no less than with the least over all devices, and as much where times are in proportion. With two
devices both are what these have. A block that may not be on a device, or takes longer there than any load may be,
counts a little more than that, and no less than elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from shardwright.sharder.planning.wide.listing import Cuts, Flags, Floats, Listing, Measure

__all__ = ["Measures", "State", "in_proportion"]

SAME = 1e-13
"""Times that differ by less than this share are in proportion."""
ABOVE = 1.001
"""A block that may not be on a device, or takes longer there, counts so many times the ceiling."""

State = tuple[int, ...]
"""How many devices of each kind are before a cut."""


def in_proportion(seconds: Floats) -> bool:
    """Whether all kinds have the same weighed seconds of each block."""
    return bool(np.all(seconds <= seconds.min(axis=0) * (1 + SAME)))


class Measures:
    """Weighed seconds of sets, by the devices before a cut.

    Args:
        listing: what counts where nothing is known of the devices.
        seconds: by kind and block, weighed; infinite where a block may not be.
        counts: devices of each kind.
        most_s: by kind, what no weighed load is above.
    """

    def __init__(self, listing: Listing, seconds: Floats, counts: Sequence[int], most_s: Sequence[float]) -> None:
        self.listing, self.counts = listing, counts
        self.in_proportion = in_proportion(np.vstack([seconds, listing.work]))
        """Whether every device counts the same."""
        barred = np.maximum(ABOVE * np.array(most_s)[:, None], listing.work)
        self.seconds = np.minimum(seconds, barred)
        most = float(self.seconds.sum(axis=1).max(initial=0.0))
        # So many sums may each be off in their last digit.
        self.slack_s = max(listing.slack_s, len(listing.work) * np.finfo(float).eps * most)
        first, last = (listing.flags(end) for end in listing.ends)
        self._first, self._behind = first, ~last
        self._kinds = [self._measure(row) for row in self.seconds]
        self._before: dict[State, Measure] = {}
        self._after: dict[State, Measure] = {}

    def _measure(self, of_block: Floats) -> Measure:
        return self.listing.inside if self.in_proportion else Measure(of_block, self.listing.words)

    def of_kind(self, kind: int) -> Measure:
        """What devices of this kind have of all blocks."""
        return self._kinds[kind]

    def before(self, state: State) -> Measure:
        """What devices before a cut have of the blocks before it, at least."""
        kinds = tuple(kind for kind, count in enumerate(state) if count)
        if kinds not in self._before:
            # What is before the first stage of all is on other devices.
            self._before[kinds] = self._measure(self._least(kinds, self._first))
        return self._before[kinds]

    def behind(self, state: State) -> Measure:
        """What the others have of the blocks behind it, at least."""
        kinds = tuple(kind for kind, count in enumerate(state) if count < self.counts[kind])
        if kinds not in self._after:
            self._after[kinds] = self._measure(self._least(kinds, self._behind))
        return self._after[kinds]

    def _least(self, kinds: tuple[int, ...], elsewhere: Flags) -> Floats:
        """By block: the least over these kinds; as it is over all where there are none, or it is ``elsewhere``."""
        if not kinds:
            return self.listing.work
        least: Floats = np.where(elsewhere, self.listing.work, self.seconds[list(kinds)].min(axis=0))
        return least

    def early(self, state: State, sets: Cuts) -> Floats:
        """By set before a cut: what is before it."""
        return sets.work_s if self.in_proportion else self.before(state).of(sets.masks)

    def late(self, state: State, sets: Cuts) -> Floats:
        """By set before a cut: all, less what is behind it."""
        return sets.work_s if self.in_proportion else self.behind_of(self.behind(state), sets)

    def behind_of(self, measure: Measure, sets: Cuts) -> Floats:
        """By set: all, less what a measure has of what is not in it."""
        return measure.of(sets.masks) + (self.listing.all_s - float(measure.of_block.sum()))

    def on(self, kind: int, sets: Cuts) -> Floats:
        """By set: what a device of this kind has of it."""
        return sets.work_s if self.in_proportion else self.of_kind(kind).of(sets.masks)
