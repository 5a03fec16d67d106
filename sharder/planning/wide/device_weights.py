"""How much the load of each device counts in a bound on the largest.

For any weights of the devices with sum 1 the largest load is no less than the weighed mean of the loads, and that no
less than the sum over blocks of the least weight * seconds: the dual of the linear relaxation in which blocks may be
divided. Weights of 1 / (seconds of all blocks) are the best where times are in proportion. Where they are not, weights
are moved towards devices that the least have too much on, which is the multiplicative weights method: Plotkin, Shmoys
and Tardos, "Fast approximation algorithms for fractional packing and covering problems", Mathematics of Operations
Research 1995.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

__all__ = ["best_weights", "weights_by_speed"]

Floats = npt.NDArray[np.float64]

ROUNDS = 200
PACE = 0.5
"""The first step, as a share of a weight that has twice its part of the load; later ones are smaller."""


def best_weights(seconds: Floats, counts: Sequence[int]) -> list[float]:
    """The weight of each device of a kind.

    Args:
        seconds: by kind and block, infinite where a block may not be; on one kind at least it may be.
        counts: devices of each kind.
    """
    many = np.array(counts, dtype=float)
    weights: Floats = np.array(weights_by_speed(seconds, counts))
    best, best_bound = weights, -1.0
    for number in range(ROUNDS):
        weighed = weights[:, None] * seconds
        where = weighed.argmin(axis=0)
        bound = float(weighed.min(axis=0).sum())
        if bound > best_bound * (1 + 1e-12):
            best, best_bound = weights, bound
        loads = np.bincount(where, np.take_along_axis(seconds, where[None], axis=0)[0], len(counts)) / many
        mean = float((weights * loads * many).sum())  # the bound itself, as weights have the sum 1
        if not mean:
            break
        moved = weights * np.exp(PACE / (1 + number / 10) * np.clip(loads / mean - 1, -1, 1))
        weights = moved / float((moved * many).sum())
    return [float(weight) for weight in best]


def weights_by_speed(seconds: Floats, counts: Sequence[int]) -> list[float]:
    """The weights for times in proportion, of the same arguments; equal ones where a device has nothing to do."""
    many = np.array(counts, dtype=float)
    finite = np.where(np.isfinite(seconds), seconds, 0.0).sum(axis=1)
    speed: Floats = 1 / finite if finite.all() else np.ones(len(many))
    return [float(weight) for weight in speed / (speed @ many)]
