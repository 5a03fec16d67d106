"""Slots: what a stage is at from when to when in a step, one after the other; those of a simulated step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import NonNegativeFloat, NonNegativeInt

from shardwright.files import Record
from shardwright.sharder.planning.schedules.simulate import StageCost
from shardwright.sharder.planning.schedules.timeline import Timeline

__all__ = ["Slot", "What", "exchanged_s", "of_replicas", "predicted_slots"]

What = Literal[
    "forward",
    "loss",
    "backward",
    "backward of weights",
    "update",
    "tie",
    "sum",
    "send activations",
    "receive activations",
    "send gradients",
    "receive gradients",
    "wait",
]
"""What a stage is at. A transfer begins when both its ends are at it; until then the one that came first waits."""


class Slot(Record):
    """When a stage was at something, in seconds from the start of the step. The slots of a device do not overlap."""

    stage: NonNegativeInt
    what: What
    microbatch: NonNegativeInt | None
    """None: it is not of one micro-batch. Each replica counts its own."""
    start_s: NonNegativeFloat
    end_s: NonNegativeFloat
    replica: NonNegativeInt = 0

    @property
    def duration_s(self) -> float:
        """Seconds."""
        return self.end_s - self.start_s


def predicted_slots(timeline: Timeline, costs: Sequence[StageCost], *, serial: bool) -> tuple[Slot, ...]:
    """The slots of a simulated step; ``serial``: transfers keep both ends from computing.

    What is of no stage, as a device's wait for the end, is put down to the device's first one.
    """
    free_s = [0.0] * timeline.order.devices
    slots: list[Slot] = []

    def add(device: int, stage: int, what: What, microbatch: int | None, start_s: float, seconds: float) -> None:
        if start_s > free_s[device]:
            slots.append(_slot(stage, "wait", microbatch, free_s[device], start_s))
            free_s[device] = start_s
        if seconds > 0:
            slots.append(_slot(stage, what, microbatch, free_s[device], free_s[device] + seconds))
            free_s[device] += seconds

    for slot in timeline.slots:
        at, number = (slot.device, slot.operation.stage), slot.operation.microbatch
        if slot.operation.kind == "W":
            add(*at, "backward of weights", number, slot.start_s, slot.end_s - slot.start_s)
            free_s[slot.device] = slot.end_s
            continue
        forward = slot.operation.kind == "F"
        into_s, out_s = exchanged_s(costs, slot.operation.stage, forward=forward) if serial else (0.0, 0.0)
        crossing = "activations" if forward else "gradients"
        receive: What = "receive activations" if crossing == "activations" else "receive gradients"
        send: What = "send activations" if crossing == "activations" else "send gradients"
        add(*at, receive, number, slot.start_s - into_s, into_s)
        engine_s = costs[slot.operation.stage].engine_s
        add(*at, "forward" if forward else "backward", number, slot.start_s, slot.end_s - slot.start_s - engine_s)
        free_s[slot.device] = slot.end_s
        add(*at, send, number, slot.end_s, out_s)
    for device in range(timeline.order.devices):
        mine = costs[device :: timeline.order.devices]
        add(device, device, "tie", None, free_s[device], sum(cost.tie_s for cost in mine))
        add(device, device, "sum", None, free_s[device], sum(cost.sum_s for cost in mine))
        add(device, device, "update", None, free_s[device], sum(cost.update_s for cost in mine))
        add(device, device, "wait", None, timeline.step_s, 0.0)
    return tuple(slots)


def of_replicas(slots: Sequence[Slot], replicas: int) -> tuple[Slot, ...]:
    """The same for each of so many replicas."""
    return tuple(
        slot.model_copy(update={"replica": replica}) if replica else slot
        for replica in range(replicas)
        for slot in slots
    )


def _slot(stage: int, what: What, microbatch: int | None, start_s: float, end_s: float) -> Slot:
    return Slot(stage=stage, what=what, microbatch=microbatch, start_s=start_s, end_s=end_s)


def exchanged_s(costs: Sequence[StageCost], stage: int, *, forward: bool) -> tuple[float, float]:
    """Seconds in which ``stage`` receives the input of an operation and sends its result, as in simulate.py."""
    cost, first, last = costs[stage], stage == 0, stage == len(costs) - 1
    if forward:
        into_s = 0.0 if first else _or(cost.receive_forward_s, costs[stage - 1].send_forward_s)
        return into_s, 0.0 if last else cost.send_forward_s
    out_s = 0.0 if first else _or(cost.send_backward_s, costs[stage - 1].receive_backward_s)
    return 0.0 if last else cost.receive_backward_s, out_s


def _or(own_s: float | None, other_s: float) -> float:
    return other_s if own_s is None else own_s
