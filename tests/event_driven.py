"""A plain event-driven simulation of a step, one operation at a time: what simulate.py of the planning must equal."""

import heapq
from dataclasses import dataclass, field

from shardwright.sharder.planning.schedules.schedule import Operation, operations


@dataclass
class Played:
    step_s: float = 0.0
    busy_s: list = field(default_factory=list)
    slots: list = field(default_factory=list)
    """(device, operation, start, end)"""


def play(costs, microbatches, *, schedule="1f1b", train=True, stages_per_device=1, transfers="serial", staged=False):
    """One step: whenever a device becomes free, or an input arrives, the device's next operation starts if it can."""
    devices, serial = len(costs) // stages_per_device, transfers == "serial"
    shape = {"train": train, "stages_per_device": stages_per_device}
    todo = [operations(schedule, device, devices, microbatches, **shape)[::-1] for device in range(devices)]
    played = Played(busy_s=[0.0] * devices)
    free, sent, received, arrived = [0.0] * devices, [0.0] * devices, [0.0] * devices, {}
    events = [(0.0, device) for device in range(devices)]
    while events:
        _, device = heapq.heappop(events)
        if not todo[device]:
            continue
        operation = todo[device][-1]
        needed = source(operation, len(costs))
        if needed and needed not in arrived:
            continue  # its arrival will be the event
        into = into_s(costs, operation, devices)
        come = arrived[needed] if needed else 0.0
        if into and not serial:
            come = received[device] = max(come, received[device] + into)
        receive = into if serial else 0.0
        start = max(come, free[device] + receive)
        end = start + compute_s(costs, operation, schedule)
        reader = target(operation, len(costs))
        out = out_s(costs, operation, devices)
        if reader:
            sent[device] = max(end, sent[device]) + out
            arrived[operation] = sent[device] + (into_s(costs, reader, devices) if staged else 0.0)
            heapq.heappush(events, (arrived[operation], reader.stage % devices))
        free[device] = end + (out if serial else 0.0)
        played.busy_s[device] += receive + free[device] - start
        played.slots.append((device, operation, start, end))
        todo[device].pop()
        heapq.heappush(events, (free[device], device))
    assert not any(todo), "devices wait for each other"
    last = [sum(cost.tie_s + cost.update_s for cost in costs[device::devices]) for device in range(devices)]
    played.step_s = max(f + once for f, once in zip(free, last, strict=True))
    played.busy_s = [busy + once for busy, once in zip(played.busy_s, last, strict=True)]
    played.slots.sort(key=lambda slot: (slot[2], slot[0]))
    return played


def source(operation, stages):
    """The operation on another stage whose result this one needs."""
    kind, stage, microbatch = operation
    if kind == "F" and stage > 0:
        return Operation("F", stage - 1, microbatch)
    return Operation("B", stage + 1, microbatch) if kind == "B" and stage + 1 < stages else None


def target(operation, stages):
    """The operation on another stage that needs this one's result."""
    kind, stage, microbatch = operation
    if kind == "F" and stage + 1 < stages:
        return Operation("F", stage + 1, microbatch)
    return Operation("B", stage - 1, microbatch) if kind == "B" and stage > 0 else None


def compute_s(costs, operation, schedule):
    """Seconds of the operation itself."""
    cost = costs[operation.stage]
    if operation.kind == "F":
        return cost.forward_s + cost.engine_s
    if operation.kind == "W":
        return cost.backward_weight_s
    return (cost.backward_input_s if schedule == "zero-bubble" else cost.backward_s) + cost.engine_s


def out_s(costs, operation, devices):
    """Seconds in which the result is sent to the stage that needs it."""
    kind, stage, _ = operation
    if devices == 1 or not target(operation, len(costs)):
        return 0.0
    if kind == "F":
        return costs[stage].send_forward_s
    own = costs[stage].send_backward_s
    return costs[stage - 1].receive_backward_s if own is None else own


def into_s(costs, operation, devices):
    """Seconds in which what the operation needs is received."""
    kind, stage, _ = operation
    if devices == 1 or not source(operation, len(costs)):
        return 0.0
    if kind == "B":
        return costs[stage].receive_backward_s
    own = costs[stage].receive_forward_s
    return costs[stage - 1].send_forward_s if own is None else own
