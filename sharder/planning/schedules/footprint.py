"""Memory of a schedule over time: what each device holds while it works through its operations.

A stage holds a micro-batch from the start of its forward until the end of its backward, and under zero-bubble until the
end of its W, which needs the saved activations and the gradients of the outputs. Each operation takes its workspace
while it runs. Inference holds nothing from one operation to the next. A device has the sum over its stages:

    bytes(t) = static + held * (micro-batches begun and not finished at t) + workspace of the operation that runs at t

How much is held depends on the order of operations alone, so the peak needs no simulation. It is that of a model: what
an engine keeps for longer (buffers of what it sends and receives) belongs to the static bytes, as in problem.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from shardwright.sharder.planning.schedules.schedule import FORWARD, Order
from shardwright.sharder.planning.schedules.timeline import Timeline

__all__ = ["MemoryCurve", "StageMemory", "memory_curve", "peak_bytes"]

_Bytes = npt.NDArray[np.int64]


@dataclass(frozen=True)
class StageMemory:
    """Bytes of one stage."""

    static_bytes: int = 0
    """All through the step: weights, gradients, optimizer state, buffers."""
    held_bytes: int = 0
    """Of each micro-batch, from its forward until nothing of its backward is left to do."""
    forward_workspace_bytes: int = 0
    """While a forward runs, beside all that is held, its own micro-batch included."""
    backward_workspace_bytes: int = 0
    """The same while a backward, or a part of one, runs."""


class MemoryCurve(NamedTuple):
    """A device's memory over a step: ``bytes[i]`` from ``times_s[i]`` until the next time."""

    times_s: npt.NDArray[np.float64]
    bytes: _Bytes


def peak_bytes(order: Order, stages: Sequence[StageMemory]) -> tuple[int, ...]:
    """The most that each device holds at once; ``stages`` by stage."""
    return tuple(int(_running_and_after(order, stages, device)[0].max()) for device in range(order.devices))


def memory_curve(timeline: Timeline, stages: Sequence[StageMemory], device: int) -> MemoryCurve:
    """What ``device`` holds from the start of the step to the end of its last operation; ``stages`` by stage."""
    running, after = _running_and_after(timeline.order, stages, device)
    changes = np.column_stack([timeline.start_s[device], timeline.end_s[device]]).ravel()
    held = np.column_stack([running, after]).ravel()
    return MemoryCurve(np.append(0.0, changes), np.append(_static(timeline.order, stages, device), held))


def _running_and_after(order: Order, stages: Sequence[StageMemory], device: int) -> tuple[_Bytes, _Bytes]:
    """Bytes on ``device`` while each of its operations runs, and after it."""
    kinds = order.kinds[device]
    own = order.stages[device] // order.devices
    here = stages[device :: order.devices]
    held = np.array([stage.held_bytes for stage in here], np.int64)[own]
    forward = np.array([stage.forward_workspace_bytes for stage in here], np.int64)[own]
    backward = np.array([stage.backward_workspace_bytes for stage in here], np.int64)[own]
    last = kinds.max()  # of the kinds that there are, the one after which a micro-batch is no longer held
    begun = np.where(kinds == FORWARD, held, 0)
    finished = np.where(kinds == last, held, 0)
    after = _static(order, stages, device) + np.cumsum(begun - finished)
    return after + finished + np.where(kinds == FORWARD, forward, backward), after


def _static(order: Order, stages: Sequence[StageMemory], device: int) -> int:
    return sum(stage.static_bytes for stage in stages[device :: order.devices])
