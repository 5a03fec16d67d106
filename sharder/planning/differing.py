r"""A bound with the transfers that no split avoids, for devices that differ.

Let w be weights of the devices with sum 1, f(v) the least w[d] * work of block v on d over all d, W the sum of f over
all blocks, and all loads at most T. With D the devices before a cut, the last of them d, e the next one, I the blocks
before the cut and X(I) the transfer seconds of what crosses it, each for one end,

    f(I) + w[d] X(I) + sum over the cuts C before of (w of both sides) X(C)  <=  T w(D)
    W - f(I) + w[e] X(I) + sum over the cuts C behind of (w of both sides) X(C)  <=  T (1 - w(D))

where devices that are not used count as idle. So f(I) is in a range, and X(I) no less than the least X of the closed
sets in it. Those are listed once (listing.py), for ranges of f side by side. The least sums over the orders of the
devices follow from each other as in Held and Karp, "A dynamic programming approach to sequencing problems", Journal of
SIAM 1962; they narrow the ranges, and so raise each other. Where no order is left, no split has loads of T at most.
Memory and ties only rule out more.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from shardwright.sharder.planning.listing import Listing, TooManyError
from shardwright.sharder.planning.problem import Problem
from shardwright.sharder.planning.relaxed import in_shares
from shardwright.sharder.planning.search import OutOfTimeError, fluid_s
from shardwright.sharder.planning.shifting import can_shift

__all__ = ["differing_bound_s"]

Floats = npt.NDArray[np.float64]

MOST_DEVICES = 9
"""The sets of more are too many to be gone through for each ceiling."""
RANGES = 64
STEPS = 200_000
"""So many undecided sets are gone through for one range and one X."""
TRIED = 3
"""So many ranges without an answer are enough."""
ROUNDS = 4
"""So often the ranges are narrowed."""
NEAR = 1e-4
"""The bound is told as nearly as that share of it."""


def differing_bound_s(
    problem: Problem, bound_s: float, ceiling_s: float, out_of_time: Callable[[], bool] = lambda: False
) -> float:
    """What no largest load is below, at least ``bound_s``; ``ceiling_s`` is some split's largest load.

    No more than ``bound_s`` where transfers are not relayed, or overlap, or the devices are many.
    """
    devices = range(len(problem.devices))
    share = fluid_s(problem, devices)
    if not can_shift(problem) or not 1 < len(devices) <= MOST_DEVICES or not math.isfinite(sum(share)):
        return bound_s
    if not all(problem.total_s) or not bound_s < ceiling_s < math.inf:
        return bound_s
    speed = np.array([1 / whole for whole in problem.total_s])
    orders = _Orders(speed / speed.sum(), float(sum(share)))
    try:
        orders.list_ranges(in_shares(problem, share), ceiling_s, out_of_time)
    except OutOfTimeError:
        return bound_s
    low, high = bound_s, ceiling_s
    while high - low > NEAR * low and not out_of_time():
        middle = (low + high) / 2
        if orders.any_within(middle):
            high = middle
        else:
            low = middle
    return low


class _Orders:
    """Which orders of devices are left; sets of devices are bit masks."""

    def __init__(self, weights: Floats, whole: float) -> None:
        self.weights, self.whole = weights.tolist(), whole
        count = len(weights)
        self.every = (1 << count) - 1
        inside = np.arange(self.every + 1)[:, None] >> np.arange(count) & 1 == 1
        self.weight = np.where(inside, weights, 0.0).sum(axis=1)
        self.lightest = np.where(inside, weights, np.inf).min(axis=1)
        self.lightest[0] = 0.0  # there is no cut before all devices
        self.members = [np.flatnonzero(row).tolist() for row in inside]
        self.edges = np.linspace(0.0, whole, RANGES + 1)
        self.least = np.zeros(RANGES)

    def list_ranges(self, problem: Problem, ceiling_s: float, out_of_time: Callable[[], bool]) -> None:
        """Find the least X in each range of f, as far as it may be with a largest load of ``ceiling_s``.

        Nothing is found where the sets of some ranges in the middle are too many, as most are there.
        """
        listing = Listing(problem, out_of_time)
        most = (ceiling_s - self.whole) / sum(sorted(self.weights)[:2])
        for tried, number in enumerate(sorted(range(RANGES), key=lambda number: abs(2 * number + 1 - RANGES))):
            if tried == TRIED and not self.least.any():
                return
            self.least[number] = self._least_in(listing, number, most)

    def _least_in(self, listing: Listing, number: int, most: float) -> float:
        low, high = self.edges[number : number + 2] + np.array([-1, 1]) * listing.slack_s
        allowed, known = most / 64, 0.0
        while True:
            try:
                sets = listing.sets(low - allowed, high + allowed, allowed, STEPS)
            except TooManyError:
                return known
            there = (sets.work_s >= low) & (sets.work_s <= high)
            if there.any():
                return max(known, float(sets.moved_s[there].min()) - listing.slack_s)
            known = allowed
            if allowed >= most:
                return known
            allowed = min(1.4 * allowed, most)

    def any_within(self, ceiling_s: float) -> bool:
        """Whether some order of the devices may have all loads at most ``ceiling_s``."""
        slack = 1e-9 * ceiling_s
        idle = ceiling_s * (1 - self.weight)
        before, behind = np.zeros(self.every + 1), np.zeros(self.every + 1)
        for _ in range(ROUNDS):
            high = ceiling_s * self.weight - before + slack
            low = self.whole - idle + behind - slack
            rest = self.lightest[::-1]  # that of the other devices
            may = self.edges[:-1] + self.lightest[:, None] * self.least <= high[:, None]
            may &= self.edges[1:] - rest[:, None] * self.least >= low[:, None]
            cut = np.where(may, self.least, np.inf).min(axis=1).tolist()
            before = np.array(self._sums_before(cut))
            if (self.whole + before[1:] + idle[1:]).min() > ceiling_s + slack:
                return False
            behind = np.array(self._sums_behind(cut, idle.tolist()))
        return True

    def _sums_before(self, cut: list[float]) -> list[float]:
        """By set of devices: the least of its cuts but for the one behind it, over all orders."""
        count, w = len(self.weights), self.weights
        least = [0.0] + [math.inf] * self.every
        last = [[math.inf] * count for _ in least]
        for d in range(count):
            last[1 << d][d] = 0.0
        for used in range(1, self.every + 1):
            least[used] = min(last[used])
            for e in self.members[self.every ^ used]:
                further = min(last[used][d] + (w[d] + w[e]) * cut[used] for d in self.members[used])
                last[used | 1 << e][e] = min(last[used | 1 << e][e], further)
        return least

    def _sums_behind(self, cut: list[float], idle: list[float]) -> list[float]:
        """By set of devices: the least of the cuts behind the one behind it, and what stays idle, over all orders."""
        count, w = len(self.weights), self.weights
        least = [0.0] * (self.every + 1)
        following = [[math.inf] * count for _ in least]
        for used in range(self.every - 1, 0, -1):
            others = self.members[self.every ^ used]
            for e in others:
                further = used | 1 << e
                rest = self.members[self.every ^ further]
                more = [following[further][k] + (w[e] + w[k]) * cut[further] for k in rest]
                following[used][e] = min([idle[further], *more])
            least[used] = min(following[used])
        return least
