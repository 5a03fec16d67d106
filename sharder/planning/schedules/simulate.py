"""Simulation of a step: each device works through its operations (schedule.py), each waiting for what it needs.

An operation starts when its device is free and its input is there:

    come    = max(arrived of its input, received + into) = received         of what the device receives; else arrived
    start   = max(come, free + receive)
    end     = start + compute
    free    = end + send                                                    of the device, for its next operation
    arrived = max(end, sent) + out + passage;  sent = max(end, sent) + out  of the result at its reader

Serial with compute, a transfer of t seconds keeps its sender busy for t after the operation (send = out = t), and the
receiver for t as well (receive = t, into = 0): at the same time if it waits and afterwards if it does not. So a device
is busy for its load (problem.py) in every step, and the rest of the step is its bubble. Overlapped with compute (send =
receive = 0) a transfer keeps no device from computing, but a device sends one thing after another (sent), and receives
one after another (received, into = t), in the order in which it needs them.

Staged through the host's memory, what is sent is there before it is received, so that the receiver's part adds to the
sender's (passage = t); else both are at it at the same time (passage = 0). What a stage exchanges with stages that are
not its neighbours is played as if it came from, or went to, its neighbour: the sums are those of its load, and what is
longer on its way was sent earlier.

The lists fix which operation waits for which, whatever the times are. So the step is not played event by event but turn
by turn: in each turn every device whose next operation has its input does that one, all of them in a few operations on
arrays, for many draws of the costs at once. The times are those of an event-driven simulation to the last bit
(tests/event_driven.py). There are as many turns as operations on the longest path, which are not many more than one
device has, and the work is linear in the number of all operations.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from shardwright.errors import ShardwrightError
from shardwright.sharder.planning.schedules.draws import drawn
from shardwright.sharder.planning.schedules.schedule import BACKWARD, FORWARD, KINDS, Order, PipelineSchedule, order
from shardwright.sharder.planning.schedules.timeline import Timeline

__all__ = ["StageCost", "Transfers", "expected_step_s", "simulate", "steps_at", "steps_of"]

Transfers = Literal["serial", "overlapped"]

_Floats = npt.NDArray[np.float64]
_Indices = npt.NDArray[np.int32]

AT_ONCE = 2**24
"""Operations, counted once a draw, that are simulated at once: their starts and arrivals take 256 MiB."""


@dataclass(frozen=True)
class StageCost:
    """Seconds of one micro-batch on one stage, and of the transfers to the stage behind it; none is below 0."""

    forward_s: float
    backward_s: float = 0.0
    """The whole backward, where it is not split."""
    update_s: float = 0.0
    send_forward_s: float = 0.0
    """Activations to the next stage."""
    receive_backward_s: float = 0.0
    """Gradients from the next stage."""
    tie_s: float = 0.0
    """Summing the gradients of tied parameters with the other copies, once a step before the update."""
    backward_input_s: float | None = None
    """Under zero-bubble, the backward up to the gradients of the inputs. PyTorch's engine does nothing there on the
    first stage, and that stage's whole backward with the weights."""
    backward_weight_s: float | None = None
    """Under zero-bubble, the gradients of the weights."""
    receive_forward_s: float | None = None
    """Activations that the stage receives; what the stage before sends by default."""
    send_backward_s: float | None = None
    """Gradients that the stage sends; what the stage before receives by default."""
    engine_s: float = 0.0
    """What the engine takes for each operation, a forward or a backward, beside them."""
    sum_s: float = 0.0
    """Summing its gradients with the other replicas, once a step before the update."""


class _Prices(NamedTuple):
    """Seconds, by kind of operation, stage and draw (one column where draws do not differ)."""

    compute: _Floats
    out: _Floats
    """In which the device sends the result."""
    passage: _Floats
    """Further, until it is at its reader."""
    into: _Floats
    """In which the device receives the input, where that is beside compute."""
    send: _Floats
    """Of ``out``, what keeps the device busy."""
    receive: _Floats
    """In which it is busy receiving the input."""
    last: _Floats
    """What comes once, after all operations; by device and draw."""

    def busy_s(self, microbatches: int) -> _Floats:
        """By device and draw."""
        by_stage = microbatches * (self.compute + self.send + self.receive).sum(axis=0)
        busy_s: _Floats = self.last + by_stage.reshape(-1, *self.last.shape).sum(axis=0)
        return busy_s


class _Played(NamedTuple):
    """Arrays of shape (devices, operations of one device, draws); ``free_s`` of shape (devices, draws)."""

    start_s: _Floats
    arrived_s: _Floats
    come_s: _Floats
    """When the input of an operation was received."""
    free_s: _Floats
    """After the last operation."""


def simulate(
    costs: Sequence[StageCost],
    microbatches: int,
    *,
    schedule: PipelineSchedule = "1f1b",
    train: bool = True,
    stages_per_device: int = 1,
    transfers: Transfers = "serial",
    staged: bool = False,
) -> Timeline:
    """Play one step of ``microbatches`` micro-batches through the stages.

    Args:
        costs: by stage; stage p is on device p % devices.
        microbatches: of one step.
        schedule: which order of operations; see schedule.py.
        train: without it there are forwards only.
        stages_per_device: divides the number of stages.
        transfers: whether they keep their ends from computing.
        staged: whether they wait in the host's memory, so that one end comes after the other.

    Raises:
        ShardwrightError: the schedule cannot be made of so many stages and micro-batches, or zero-bubble lacks the
            parts of a stage's backward.
    """
    todo = _order(costs, microbatches, schedule, train, stages_per_device)
    prices = _prices(costs, np.ones((todo.devices, 1)), schedule, train, transfers, staged)
    played = _play(todo, prices)
    start_s = played.start_s[..., 0]
    return Timeline(
        order=todo,
        step_s=float((played.free_s + prices.last).max()),
        busy_s=tuple(prices.busy_s(microbatches)[:, 0].tolist()),
        start_s=start_s,
        end_s=start_s + prices.compute[todo.kinds, todo.stages, 0],
        arrived_s=played.arrived_s[..., 0],
        crossing_s=(prices.out + prices.passage)[..., 0],
        received_s=start_s if transfers == "serial" else played.come_s[..., 0],
    )


def expected_step_s(
    costs: Sequence[StageCost],
    variations: Sequence[Sequence[float]],
    microbatches: int,
    *,
    schedule: PipelineSchedule = "1f1b",
    train: bool = True,
    stages_per_device: int = 1,
    transfers: Transfers = "serial",
    staged: bool = False,
) -> tuple[float, float]:
    """Median and interquartile range of the step when each device's speed varies as it did while it was measured.

    A pipeline waits for whichever device is slow at the moment, so its median step is longer than the step of the
    median times, and never shorter than the largest load. ``variations`` holds for each device the relative times to
    draw from, 1 being the median; the draws are the same every time. The other arguments and the errors are those of
    :func:`simulate`; as many ``variations`` as devices are needed.
    """
    todo = _order(costs, microbatches, schedule, train, stages_per_device)
    if len(variations) != todo.devices:
        raise ShardwrightError(f"there are {todo.devices} devices, and variations of {len(variations)}")
    steps = _steps(costs, drawn(variations), todo, schedule, train, transfers, staged)
    if len(steps) == 1:
        return steps[0], 0.0
    low, median, high = statistics.quantiles(steps, n=4)
    return median, high - low


def steps_at(
    costs: Sequence[StageCost],
    factors: npt.ArrayLike,
    microbatches: int,
    *,
    schedule: PipelineSchedule = "1f1b",
    train: bool = True,
    stages_per_device: int = 1,
    transfers: Transfers = "serial",
    staged: bool = False,
) -> list[float]:
    """The step of each draw: seconds.

    ``factors`` has shape (draws, devices) and multiplies a device's compute and update. The other arguments and the
    errors are those of :func:`simulate`.
    """
    todo = _order(costs, microbatches, schedule, train, stages_per_device)
    return _steps(costs, np.asarray(factors, float), todo, schedule, train, transfers, staged)


def steps_of(
    splits: Sequence[Sequence[StageCost]],
    microbatches: int,
    *,
    schedule: PipelineSchedule = "1f1b",
    train: bool = True,
    stages_per_device: int = 1,
    transfers: Transfers = "serial",
    staged: bool = False,
) -> list[float]:
    """The step of each of ``splits``, which have as many stages each: seconds.

    The other arguments and the errors are those of :func:`simulate`.
    """
    todo = _order(splits[0], microbatches, schedule, train, stages_per_device)
    once = np.ones((todo.devices, 1))
    each = [_prices(costs, once, schedule, train, transfers, staged) for costs in splits]
    prices = _Prices(*(np.concatenate(parts, axis=-1) for parts in zip(*each, strict=True)))
    steps: list[float] = (_play(todo, prices).free_s + prices.last).max(axis=0).tolist()
    return steps


def _steps(
    costs: Sequence[StageCost],
    factors: _Floats,
    todo: Order,
    schedule: PipelineSchedule,
    train: bool,
    transfers: Transfers,
    staged: bool,
) -> list[float]:
    """The steps of draws, as many at once as memory allows."""
    steps: list[float] = []
    at_once = max(1, AT_ONCE // todo.kinds.size)
    for first in range(0, len(factors), at_once):
        prices = _prices(costs, factors[first : first + at_once].T, schedule, train, transfers, staged)
        steps += (_play(todo, prices).free_s + prices.last).max(axis=0).tolist()
    return steps


def _order(
    costs: Sequence[StageCost], microbatches: int, schedule: PipelineSchedule, train: bool, stages_per_device: int
) -> Order:
    """The operations of as many devices as the stages need."""
    devices, left = divmod(len(costs), max(1, stages_per_device))
    if left:
        raise ShardwrightError(f"{len(costs)} stages cannot be {stages_per_device} on each device")
    return order(schedule, devices, microbatches, train=train, stages_per_device=stages_per_device)


def _prices(
    costs: Sequence[StageCost],
    factors: _Floats,
    schedule: PipelineSchedule,
    train: bool,
    transfers: Transfers,
    staged: bool,
) -> _Prices:
    """Prices of every operation, compute and update multiplied by ``factors`` of shape (devices, draws)."""
    devices, draws = factors.shape
    compute = np.zeros((len(KINDS), len(costs)))
    compute[FORWARD] = [cost.forward_s + cost.engine_s for cost in costs]
    if train:
        compute[BACKWARD:] = _backward_s(costs, schedule).T
    out, into = _exchanged_s(costs, devices, train)
    none = np.zeros_like(out)
    passage = none.copy()
    if staged:
        passage[FORWARD, :-1] = into[FORWARD, 1:]
        passage[BACKWARD, 1:] = into[BACKWARD, :-1]
    serial = transfers == "serial"
    by_stage = np.tile(factors, (len(costs) // devices, 1))
    sums, updates = np.array([[cost.tie_s + cost.sum_s, cost.update_s] for cost in costs]).T[..., None]
    once = sums + updates * by_stage
    return _Prices(
        compute[..., None] * by_stage,
        out[..., None],
        passage[..., None],
        (none if serial else into)[..., None],
        (out if serial else none)[..., None],
        (into if serial else none)[..., None],
        once.reshape(-1, devices, draws).sum(axis=0),
    )


def _exchanged_s(costs: Sequence[StageCost], devices: int, train: bool) -> tuple[_Floats, _Floats]:
    """By kind and stage: seconds in which the result is sent, and the input received; none on the same device."""
    out, into = np.zeros((2, len(KINDS), len(costs)))
    if devices == 1:
        return out, into
    out[FORWARD, :-1] = [cost.send_forward_s for cost in costs[:-1]]
    into[FORWARD, 1:] = [
        before.send_forward_s if cost.receive_forward_s is None else cost.receive_forward_s
        for before, cost in itertools.pairwise(costs)
    ]
    if train:
        into[BACKWARD, :-1] = [cost.receive_backward_s for cost in costs[:-1]]
        out[BACKWARD, 1:] = [
            before.receive_backward_s if cost.send_backward_s is None else cost.send_backward_s
            for before, cost in itertools.pairwise(costs)
        ]
    return out, into


def _backward_s(costs: Sequence[StageCost], schedule: PipelineSchedule) -> _Floats:
    """By stage: seconds of B and of W, with the engine's own."""
    if schedule != "zero-bubble":
        return np.array([(cost.backward_s + cost.engine_s, 0.0) for cost in costs])
    parts = [(cost.backward_input_s, cost.backward_weight_s) for cost in costs]
    if any(None in part for part in parts):
        stage = next(stage for stage, part in enumerate(parts) if None in part)
        raise ShardwrightError(
            f"zero-bubble splits the backward: stage {stage} needs backward_input_s and backward_weight_s"
        )
    found: _Floats = np.array(parts, float) + np.array([(cost.engine_s, 0.0) for cost in costs])
    return found


def _play(todo: Order, prices: _Prices) -> _Played:
    """Do all operations, in turns of those that are ready."""
    if todo.devices == 1:
        return _play_alone(todo, prices)
    devices, each = todo.kinds.shape
    columns = each + 1  # the last is an operation that never has its input: a device that has come to it is done
    draws = prices.last.shape[1]
    compute, out, passage, into, send, receive = (part.reshape(-1, part.shape[-1]) for part in prices[:6])
    source, task, queues = _sources(todo), _tasks(todo), bool(into.any())
    started = np.empty((devices * columns, draws))
    come = np.empty_like(started) if queues else started
    arrived = np.full((devices * columns + 1, draws), -1.0)  # not yet
    arrived[-1] = 0.0  # what needs nothing has it from the start
    free, sent, received = np.zeros((3, devices, draws))
    upcoming = np.arange(devices) * columns
    left = todo.kinds.size
    while left:
        inputs = arrived.take(source.take(upcoming), axis=0)
        ready = np.flatnonzero(inputs[:, 0] >= 0)
        assert ready.size, "an order in which devices wait for each other"
        now = upcoming[ready]
        what = task.take(now)
        there = inputs.take(ready, axis=0)
        if queues:
            taken, before = into.take(what, axis=0), received.take(ready, axis=0)
            there = np.where(taken > 0, np.maximum(there, before + taken), there)
            received[ready] = np.where(taken > 0, there, before)
            come[now] = there
        start = np.maximum(there, free.take(ready, axis=0) + receive.take(what, axis=0))
        end = start + compute.take(what, axis=0)
        gone = np.maximum(end, sent.take(ready, axis=0)) + out.take(what, axis=0)
        started[now] = start
        arrived[now] = gone + passage.take(what, axis=0)
        sent[ready] = gone
        free[ready] = end + send.take(what, axis=0)
        upcoming[ready] += 1
        left -= ready.size
    shape = devices, columns, draws
    start, there, come = (part.reshape(shape)[:, :-1] for part in (started, arrived[:-1], come))
    return _Played(start, there, come, free)


def _play_alone(todo: Order, prices: _Prices) -> _Played:
    """Do the operations of a single device, which waits for nobody."""
    compute = prices.compute[todo.kinds, todo.stages]
    end = compute.cumsum(axis=1)
    start = np.concatenate([np.zeros_like(end[:, :1]), end[:, :-1]], axis=1)
    return _Played(start, end, start, end[:, -1])


def _sources(todo: Order) -> _Indices:
    """For each operation, with the closing one of each device, the one that it needs: positions in the arrays of _play.

    The closing operations need themselves.
    """
    devices, each = todo.kinds.shape
    sources = np.arange(devices * (each + 1), dtype=np.int32).reshape(devices, each + 1)
    sources[:, :-1] = np.where(todo.sources < 0, sources.size, todo.sources + todo.sources // each)
    return sources.ravel()


def _tasks(todo: Order) -> _Indices:
    """For each operation, with the closing one of each device, its row among the prices."""
    devices, each = todo.kinds.shape
    tasks = np.zeros((devices, each + 1), np.int32)
    tasks[:, :-1] = todo.kinds * np.int32(todo.stage_count) + todo.stages
    return tasks.ravel()
