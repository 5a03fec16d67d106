"""Bounds on a step: of given stages, and of every split.

Under 1F1B and GPipe a stage begins when the first micro-batch has come through those before it, and the last one's
gradients go through those once more when it has ended. Its own first backward cannot come before the first micro-batch
has been through all stages. So with M micro-batches, f(s) and b(s) the forward and backward of one on stage s, and W(s)
forwards of that stage before its first backward, a step takes at least, for every s,

    sum over the r before s of (f(r) + b(r))  +  M (f(s) + b(s))                                                    (1)
    sum over all r of (f(r) + b(r))  +  (M - 1) b(s)  +  (M - W(s)) f(s)                                            (2)
    sum over all r of (f(r) + b(r))  +  (M - 1) f(s)                                                                (3)

Under zero-bubble, whose stages have the gradients of weights left to compute while others' drain, (1) holds without the
b(r). What the engine takes for each of them is in f and b; transfers are left out.

These are sums over blocks of what each takes on the stage where it is, times a number that hangs on the two stages
alone. So of every split over a given row of devices, with E(k) for the engine's part

    step >= max over the bounds k of  E(k) + sum over blocks v of  A(k, s(v)) * forward(v) + B(k, s(v)) * backward(v)

and for any weights of the bounds with sum 1 no less than the sum over v of the least that a stage makes of the weighed
mean. Which is the dual of the linear relaxation in which blocks may be divided and nothing is said of order and memory.
Weights are found as in device_weights.py. The bound is the least over all rows of devices that can be told apart.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from shardwright.sharder.planning.formulation.device_classes import alike_devices
from shardwright.sharder.planning.problem import Problem, in_flight
from shardwright.sharder.planning.schedules.zero_bubble import divides

__all__ = ["bound_s", "engine_times", "least_times", "step_bound_s"]

Floats = npt.NDArray[np.float64]

MOST_ROWS, MOST_TIMES = 64, 60_000
"""For more rows of devices, or rows times blocks, there is no bound: it would take seconds."""
ROUNDS, PACE = 200, 0.5
"""Of weights; PACE as in device_weights.py."""


def least_times(problem: Problem) -> tuple[list[tuple[float, ...]], list[tuple[float, ...]]]:
    """By block and device, seconds of the forward and of the backward of a micro-batch, for (1) to (3).

    A backward in two parts takes the sum of them or the whole. A stage that may be computed anew has another forward,
    and its own once more in the backward: that makes none of the three smaller.
    """
    blocks, devices = problem.blocks, range(len(problem.devices))
    forwards, backwards = [block.forward_s for block in blocks], [block.backward_s for block in blocks]
    if problem.recompute == "always":
        forwards = [tuple(map(block.again_s, devices)) for block in blocks]
        backwards = [tuple(map(operator.add, block.backward_s, block.forward_s)) for block in blocks]
    if problem.schedule == "zero-bubble":
        backwards = [tuple(map(min, block.backward_s, map(sum, block.parts_s))) for block in blocks]
    return forwards, backwards


def engine_times(problem: Problem) -> list[tuple[float, float]]:
    """By device, seconds of the engine for the forward and for the backward of a micro-batch on a stage there."""
    if not problem.engine_s:
        return [(0.0, 0.0)] * len(problem.devices)
    backward = any(any(block.backward_s) for block in problem.blocks)
    return [(engine_s, engine_s * backward) for engine_s in problem.engine_s]


def bound_s(problem: Problem, works: Sequence[tuple[float, float]], rest_s: float = 0.0, more: int = 0) -> float:
    """A step is no shorter whose first stages compute so long, forward and backward of a micro-batch: (1) to (3).

    Args:
        works: of these stages, with the engine's part.
        rest_s: what all others compute of a micro-batch, at least.
        more: so many others there may be.
    """
    count, drains = problem.microbatches, problem.schedule != "zero-bubble"
    through_s = sum(forward_s + backward_s for forward_s, backward_s in works) + rest_s
    least_s = before_s = 0.0
    for position, (forward_s, backward_s) in enumerate(works):
        least_s = max(least_s, before_s + count * (forward_s + backward_s))
        if drains:
            first = in_flight(problem.schedule, count, len(works) - 1 - position + more)
            own_s = (count - 1) * backward_s + (count - first) * forward_s
            least_s = max(least_s, through_s + max(own_s, (count - 1) * forward_s))
        before_s += forward_s + drains * backward_s
    # One of the others has an equal part of what is left, or more.
    return max(least_s, before_s + count * rest_s / more) if more else least_s


def step_bound_s(problem: Problem) -> float | None:
    """Seconds that no step of a split into several stages, one a device, takes less than at the median times.

    None where there are too many rows of devices or blocks, or no row may have all blocks.
    """
    forwards, backwards = (np.array(each, dtype=float).T for each in least_times(problem))
    forwards = np.where(np.array([block.allowed for block in problem.blocks]).T, forwards, np.inf)
    rows = [*itertools.islice(_rows(problem), MOST_ROWS + 1)]
    if len(rows) > MOST_ROWS or len(rows) * len(problem.blocks) > MOST_TIMES:
        return None
    engine_s, least_s = np.array(engine_times(problem)), np.inf
    for row in sorted(rows, key=len, reverse=True):
        if np.isfinite(forwards[row]).any(axis=0).all():
            times = np.stack([forwards[row], backwards[row]])
            numbers = _numbers(problem, len(row))
            own_s = np.einsum("nks,sn->k", numbers, engine_s[row])
            least_s = min(least_s, _bound_s(numbers, times, own_s, least_s))
    return float(least_s) if np.isfinite(least_s) else None


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


def _numbers(problem: Problem, stages: int) -> Floats:
    """A and B: by bound and stage, how often it has the stage's forward, and its backward."""
    count, drains = problem.microbatches, problem.schedule != "zero-bubble"
    own, before = np.eye(stages), np.tri(stages, k=-1)
    of_forward, of_backward = [before + count * own], [drains * before + count * own]
    if drains:
        first = [in_flight(problem.schedule, count, stages - 1 - stage) for stage in range(stages)]
        of_forward += [1 + np.diag([float(count - each) for each in first]), 1 + (count - 1) * own]
        of_backward += [1 + (count - 1) * own, np.ones((stages, stages))]
    return np.stack([np.concatenate(of_forward), np.concatenate(of_backward)])


def _bound_s(numbers: Floats, times: Floats, own_s: Floats, enough_s: float) -> float:
    """The bound of one row of devices; or any that is not below ``enough_s``.

    Args:
        numbers: A and B.
        times: forwards and backwards by stage and block.
        own_s: E.
    """
    blocks, stages = np.arange(times.shape[2]), times.shape[1]

    def at(weights: Floats) -> tuple[float, npt.NDArray[np.intp]]:
        """The bound by these weights, and by block the stage that makes least of it."""
        often = weights @ numbers
        weighed = often[0, :, None] * times[0] + often[1, :, None] * times[1]
        where = weighed.argmin(axis=0)
        return float(weights @ own_s + weighed[where, blocks].sum()), where

    log, total, best_s = np.zeros(numbers.shape[1]), np.zeros(numbers.shape[1]), 0.0
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
        sums = np.stack([np.bincount(where, own[where, blocks], stages) for own in times])
        log = log + PACE / number**0.5 * ((own_s + numbers[0] @ sums[0] + numbers[1] @ sums[1]) / bound_s - 1)
    return best_s
