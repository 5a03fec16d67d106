"""Memory of a schedule over time: what each device holds while it works through its operations.

While an operation runs, with f forwards, b backwards and w of them done for good (W under zero-bubble, else B) before
it on a stage, that stage holds, with the terms of stage_memory.py and the operation's own micro-batch apart,

    static + (f - b) * held + (b - w) * (held + deferred) + w * sent + b * sent gradients
        + waiting once b > 0  - gradients until w > 0  + what the operation itself takes

and a device has the sum over its stages; behind its operations, in the optimizer's step, static + update. Inference has
forwards alone, and lets go of nothing before the next step. So the peak is the one that the planner counts: for 1F1B
and GPipe problem.py has it in closed form, interleaved_memory.py and zero_bubble.py by operation. It is that of the
order of operations alone, and needs no simulation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from shardwright.sharder.planning.schedules.schedule import BACKWARD, FORWARD, Order
from shardwright.sharder.planning.schedules.timeline import Timeline
from shardwright.sharder.planning.stage_memory import StageMemory

__all__ = ["MemoryCurve", "memory_curve", "peak_bytes"]

_Bytes = npt.NDArray[np.int64]


class MemoryCurve(NamedTuple):
    """A device's memory over a step: ``bytes[i]`` from ``times_s[i]`` until the next time."""

    times_s: npt.NDArray[np.float64]
    bytes: _Bytes

    def most_bytes(self, parts: int, whole_s: float) -> list[int]:
        """The most in each of so many equal ``parts`` of ``whole_s`` seconds, whatever lasts for no time included."""
        at = np.round(self.times_s * (parts / whole_s), 6)  # sums of times that should be at an edge are
        edges = np.arange(parts + 1)
        first = np.searchsorted(at, edges[:-1], side="left")
        first -= at[np.minimum(first, len(at) - 1)] != edges[:-1]  # what is there when the part begins
        behind = np.searchsorted(at, edges[1:], side="left")
        behind[-1] = len(at)
        return [int(self.bytes[a : max(b, a + 1)].max()) for a, b in zip(first, behind, strict=True)]


def peak_bytes(order: Order, stages: Sequence[StageMemory]) -> tuple[int, ...]:
    """The most that each device holds at once; ``stages`` by stage."""
    found = []
    for device in range(order.devices):
        running, after = _running_and_after(order, stages, device)
        found.append(max(int(running.max()), int(after.max()), _updating(order, stages, device)))
    return tuple(found)


def memory_curve(timeline: Timeline, stages: Sequence[StageMemory], device: int, once_s: float = 0.0) -> MemoryCurve:
    """What ``device`` holds over the step; ``stages`` by stage.

    Args:
        once_s: how long it sums gradients and updates, after its last operation.
    """
    running, after = _running_and_after(timeline.order, stages, device)
    changes = np.column_stack([timeline.start_s[device], timeline.end_s[device]]).ravel()
    held = np.column_stack([running, after]).ravel()
    here = stages[device :: timeline.order.devices]
    static, made = (sum(stage.static_bytes for stage in here), sum(stage.gradient_bytes for stage in here))
    last_s = changes[-1]
    if (timeline.order.kinds[device] == FORWARD).all():  # which has no update, and keeps what it has
        return MemoryCurve(np.append(0.0, changes), np.append(static - made, held))
    ends = np.array([_updating(timeline.order, stages, device), static])
    return MemoryCurve(
        np.concatenate([[0.0], changes, [last_s, last_s + once_s]]), np.concatenate([[static - made], held, ends])
    )


def _updating(order: Order, stages: Sequence[StageMemory], device: int) -> int:
    here = stages[device :: order.devices]
    return sum(stage.static_bytes + stage.update_bytes for stage in here)


def _running_and_after(order: Order, stages: Sequence[StageMemory], device: int) -> tuple[_Bytes, _Bytes]:
    """Bytes on ``device`` while each of its operations runs, and after it."""
    kinds = order.kinds[device]
    own = order.stages[device] // order.devices
    last = int(kinds.max())  # of the kinds that there are, the one after which a micro-batch is done
    running, after = np.zeros((2, len(kinds)), np.int64)
    for number, stage in enumerate(stages[device :: order.devices]):
        mine = own == number
        does = [mine & (kinds == kind) for kind in (FORWARD, BACKWARD, last)]
        if last == FORWARD:
            does[2] = does[1]  # never
        done = [np.cumsum(each) for each in does]
        f, b, w = (count - each for count, each in zip(done, does, strict=True))
        parted = last not in (FORWARD, BACKWARD)
        # Its own micro-batch, which a backward has from the forward, and W from B, is in what it takes itself.
        others = f - b - does[1], b - w - does[2] if parted else np.zeros_like(b)
        held = _held(stage, *others, b, w) - np.where((w == 0) & ~does[2], stage.gradient_bytes, 0)
        running += held + np.where(mine, _takes(stage, does, b, w), np.where(b > 0, stage.waiting_bytes, 0))
        f, b, w = done
        after += _held(stage, f - b, b - w, b, w) - np.where(w == 0, stage.gradient_bytes, 0)
        after += np.where(b > 0, stage.waiting_bytes, 0)
    # What an operation leaves was there while it ran, also where its own figure, as in costs, does not say so.
    return running, np.minimum(after, running)


def _held(stage: StageMemory, begun: _Bytes, parted: _Bytes, backwards: _Bytes, done: _Bytes) -> _Bytes:
    """All through the step and of micro-batches, of which so many wait for B, and so many for W."""
    waiting = begun * stage.held_bytes + parted * (stage.held_bytes + stage.deferred_bytes)
    held: _Bytes = stage.static_bytes + waiting + done * stage.sent_bytes + backwards * stage.sent_gradient_bytes
    return held


def _takes(stage: StageMemory, does: Sequence[npt.NDArray[np.bool_]], b: _Bytes, w: _Bytes) -> _Bytes:
    """What each operation of the stage takes itself."""
    forward = np.where(b > 0, stage.later_forward_bytes, stage.forward_bytes)
    finishing = np.where(w == 0, stage.first_backward_bytes, stage.backward_bytes)
    return np.where(does[0], forward, np.where(does[2], finishing, stage.input_backward_bytes))
