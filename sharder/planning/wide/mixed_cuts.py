r"""A bound with the transfers that no split avoids, for devices that differ; mincut.py has that for devices alike.

Give each device d a weight w(d), all of sum 1, and each block the least that it counts on any, m(v) = min w(d) s(v, d).
Let all loads be at most T, the devices of a set D be those before a cut, I the blocks before it, and X(I) what crosses
it, in seconds for each end. With f(D) the least that the stages on D pay for transfers, weighed, and r(D) the most that
is left for work behind the cut,

    f(D)  =  min over k in D of   f(D - k) + w(k) (X(D - k) + X(D))                   where X(D) is the least X(I)
    r(D)  =  max over k not in D of   T w(k) - w(k) X(D) + max(0, r(D + k) - w(k) X(D + k))

    m(all) - r(D)  <=  m(I)  <=  T w(D) - f(D)                                        or no split has D before a cut

and that leaves less room for X(D), which is a minimum cut as in mincut.py, and so on in turn. If D are all devices that
are used and k has the last stage

    T  >=  (m(all) + f(D - k) + w(k) X(D - k)) / w(D)

and the least of these over all D and k is the bound. Sets of nearly the same weight share one window for m(I), the
widest that any of them needs, since a minimum cut for each of up to 2^16 would take too long.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from shardwright.sharder.planning.problem import Problem
from shardwright.sharder.planning.wide.mincut import LeastCuts

__all__ = ["mixed_transfer_bound_s"]

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]

MOST_DEVICES = 16
"""There is no bound for more: they have too many sets."""
GROUPS = 64
"""Sets of devices share so many windows at most."""
SWEEPS = 4
"""So often all windows are gone through at most, each time with what was found of the others."""
WORTH = 1e-5
"""And no more where the last time the bound rose by no more than this share."""


def mixed_transfer_bound_s(
    problem: Problem, weights: Sequence[float], ceiling_s: float, out_of_time: Callable[[], bool] = lambda: False
) -> float:
    """What no largest load is below; ``ceiling_s``, some split's largest load, where none is better.

    0 where transfers are not relayed or go on beside compute, or where there are too many devices.

    Args:
        problem: blocks, devices and links.
        weights: of the devices, all above 0.
        ceiling_s: seconds of a step.
        out_of_time: asked now and then; cuts count as what was found of them until then.
    """
    summed = problem.transfers == "relayed" and not problem.overlap
    if not summed or len(weights) > MOST_DEVICES or not 0 < ceiling_s < math.inf:
        return 0.0
    sets = _DeviceSets(problem, weights, ceiling_s, out_of_time)
    bound_s = 0.0
    for _ in range(SWEEPS):
        before_s, bound_s = bound_s, sets.bound_s()
        if out_of_time() or bound_s >= ceiling_s or (before_s and bound_s - before_s <= WORTH * ceiling_s):
            break
        sets.narrow()
    return min(ceiling_s, sets.bound_s()) * (1 - 1e-12)


class _DeviceSets:
    """The least transfers over a cut, by the devices before it, each set a number whose bits are its devices."""

    def __init__(
        self, problem: Problem, weights: Sequence[float], ceiling_s: float, out_of_time: Callable[[], bool]
    ) -> None:
        self.weights, self.ceiling_s, self.out_of_time = np.array(weights) / sum(weights), ceiling_s, out_of_time
        self.devices = range(len(weights))
        allowed = np.array([block.allowed for block in problem.blocks], bool)
        least = np.min(np.where(allowed, np.array(problem.seconds), np.inf) * self.weights, axis=1)
        self.whole_s = float(least.sum())
        self.cuts = LeastCuts(problem, ceiling_s, out_of_time, least)
        numbers = np.arange(1 << len(weights))
        self.set_weights = sum(((numbers >> d & 1) * w for d, w in enumerate(self.weights)), np.zeros(len(numbers)))
        self.sizes = np.array([number.bit_count() for number in numbers.tolist()])
        self.most_stages = problem.most_stages
        self.by_size = [np.flatnonzero(self.sizes == size) for size in range(len(weights) + 1)]
        self.cut_s: Floats = np.zeros(len(numbers))
        """X, for one end; infinite where no split has the set before a cut."""
        self.groups = self._grouped()

    def _grouped(self) -> list[Integers]:
        """The sets that a cut may be behind, in groups of nearly the same weight."""
        inner = np.flatnonzero((self.sizes > 0) & (self.sizes < len(self.weights)))
        values = np.unique(np.round(self.set_weights[inner], 12))
        if len(values) > GROUPS:
            slots = ((self.set_weights[inner] - values[0]) / (values[-1] - values[0]) * (GROUPS - 1)).astype(int)
        else:
            slots = np.searchsorted(values, np.round(self.set_weights[inner], 12))
        return [inner[slots == slot] for slot in np.unique(slots)]

    def bound_s(self) -> float:
        """The bound, by what is known of the cuts."""
        paid_s = self._paid_s()
        least_s = math.inf
        for k in self.devices:
            before = self._without(k)
            whole = before | 1 << k
            may = (self.sizes[whole] <= self.most_stages) & np.isfinite(paid_s[before])
            if may.any():
                sums = self.whole_s + paid_s[before[may]] + self.weights[k] * self.cut_s[before[may]]
                least_s = min(least_s, float((sums / self.set_weights[whole[may]]).min()))
        return least_s

    def narrow(self) -> None:
        """Find the cuts once more, in the room that is left by what was found of the others."""
        room_s = self.ceiling_s * self.set_weights - self._paid_s()
        left_s = self._left_s()
        for group in self.groups:
            possible = group[room_s[group] + left_s[group] >= self.whole_s * (1 - 1e-9)]
            self.cut_s[np.setdiff1d(group, possible)] = np.inf
            if len(possible) and not self.out_of_time():
                least_s = self.cuts.least_s(self.whole_s - left_s[possible].max(), room_s[possible].max())
                self.cut_s[possible] = np.maximum(self.cut_s[possible], least_s)

    def _without(self, device: int) -> Integers:
        return np.flatnonzero(~np.arange(len(self.set_weights)) >> device & 1)

    def _paid_s(self) -> Floats:
        """By set: f, what the stages on it pay at least."""
        paid_s = np.full(len(self.set_weights), np.inf)
        paid_s[0] = 0.0
        for sets in self.by_size[1:]:
            for k in self.devices:
                with_k = sets[sets >> k & 1 == 1]
                before = with_k ^ 1 << k
                own_s = self.weights[k] * (self.cut_s[before] + self.cut_s[with_k])
                paid_s[with_k] = np.minimum(paid_s[with_k], paid_s[before] + own_s)
        return paid_s

    def _left_s(self) -> Floats:
        """By set: r, the most work that may be behind it."""
        left_s = np.full(len(self.set_weights), -np.inf)
        for sets in reversed(self.by_size[:-1]):
            for k in self.devices:
                without = sets[sets >> k & 1 == 0]
                behind = without | 1 << k
                more_s = np.maximum(0.0, left_s[behind] - self.weights[k] * self.cut_s[behind])
                own_s = self.weights[k] * (self.ceiling_s - self.cut_s[without])
                left_s[without] = np.maximum(left_s[without], own_s + more_s)
        return left_s
