"""A step that no split is below, whatever its blocks, of so many micro-batches.

The bounds (1) to (3) of step_search.py are sums over blocks of what each takes on the stage where it is, times a number
that hangs on the two stages alone: for a given row of devices

    step >= max over the bounds k of  sum over blocks v of  A(k, s(v)) * forward(v) + B(k, s(v)) * backward(v)

and for any weights of the bounds with sum 1 no less than the sum over v of the least that a stage makes of the weighed
mean. Which is the dual of the linear relaxation in which blocks may be divided and nothing is said of order and memory.
Weights are found as in device_weights.py. The bound is the least over all rows of devices that can be told apart.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from shardwright.sharder.planning.device_classes import alike_devices
from shardwright.sharder.planning.problem import Problem, in_flight
from shardwright.sharder.planning.step_search import least_times
from shardwright.sharder.planning.zero_bubble import divides

__all__ = ["step_bound_s"]

Floats = npt.NDArray[np.float64]

MOST_ROWS = 64
ROUNDS, PACE = 200, 0.5
"""Of weights; PACE as in device_weights.py."""
MOST_TIMES = 40_000
"""For more blocks times devices there is no bound: it would take seconds."""


def step_bound_s(problem: Problem) -> float:
    """Seconds that no step of a split into several stages, one a device, takes less than at the median times.

    It is 0 where the devices can be in too many rows, or units are too many.
    """
    if len(problem.blocks) * len(problem.devices) > MOST_TIMES:
        return 0.0
    forwards, backwards = (np.array(each, dtype=float).T for each in least_times(problem))
    forwards = np.where(np.array([block.allowed for block in problem.blocks]).T, forwards, np.inf)
    rows = [*itertools.islice(_rows(problem), MOST_ROWS + 1)]
    if len(rows) > MOST_ROWS:
        return 0.0
    least_s = np.inf
    for row in sorted(rows, key=len, reverse=True):
        if np.isfinite(forwards[row]).any(axis=0).all():
            least_s = min(least_s, _bound_s(*_numbers(problem, len(row)), forwards[row], backwards[row], least_s))
    return float(least_s) if np.isfinite(least_s) else 0.0


def _rows(problem: Problem) -> Iterator[list[int]]:
    """Several devices in a row, as far as they can be told apart."""
    classes = alike_devices(problem)

    def after(row: list[int]) -> Iterator[list[int]]:
        if len(row) > 1 and (problem.schedule != "zero-bubble" or divides(len(row), problem.microbatches)):
            yield row
        if len(row) < problem.most_stages:
            for class_ in classes:
                device = next((device for device in class_ if device not in row), None)
                if device is not None:
                    yield from after([*row, device])

    yield from after([])


def _numbers(problem: Problem, stages: int) -> tuple[Floats, Floats]:
    """A and B: by bound and stage, how often it has the stage's forward and its backward."""
    count, drains = problem.microbatches, problem.schedule != "zero-bubble"
    own, before = np.eye(stages), np.tri(stages, k=-1)
    forward, backward = [before + count * own], [drains * before + count * own]
    if drains:
        first = [in_flight(problem.schedule, count, stages - 1 - stage) for stage in range(stages)]
        forward += [1 + np.diag([float(count - each) for each in first]), 1 + (count - 1) * own]
        backward += [1 + (count - 1) * own, np.ones((stages, stages))]
    return np.concatenate(forward), np.concatenate(backward)


def _bound_s(many: Floats, more: Floats, forwards: Floats, backwards: Floats, enough_s: float) -> float:
    """The bound of one row of devices; or any that is not below ``enough_s``.

    Args:
        many, more: A and B.
        forwards, backwards: by stage and block.
    """
    times = np.stack([forwards, backwards])
    numbers = np.stack([many, more])

    def at(weights: Floats) -> tuple[float, npt.NDArray[np.intp]]:
        by_stage = weights @ numbers
        weighed = by_stage[0, :, None] * times[0] + by_stage[1, :, None] * times[1]
        where = weighed.argmin(axis=0)
        return float(weighed[where, blocks].sum()), where

    blocks = np.arange(forwards.shape[1])
    log, total, best_s = np.zeros(len(many)), np.zeros(len(many)), 0.0
    for number in range(1, ROUNDS + 1):
        weights = np.exp(log - log.max())
        weights /= weights.sum()
        total += weights
        bound_s, where = at(weights)
        best_s = max(best_s, bound_s)
        if number % 10 == 0:  # the mean of all settles, while each of them goes to and fro
            best_s = max(best_s, at(total / number)[0])
        if best_s >= enough_s or not bound_s:
            break
        sums = [np.bincount(where, own[where, blocks], len(forwards)) for own in times]
        log = log + PACE / number**0.5 * ((many @ sums[0] + more @ sums[1]) / bound_s - 1)
    return best_s
