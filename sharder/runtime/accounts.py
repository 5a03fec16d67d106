"""Accounts of a step: what each device spends it on, as predicted and as measured, and which costs were off.

Each device's slots are put on one clock. A transfer begins when both ends have posted it, or with its send where the
receives of a step are posted ahead (prompt_stage.py); the wait for it is cut there:

    sender     | F3 ......... |post     send F3     |
    receiver   | B1 ... |post     wait    | recv F3 | F3 ...

Before the cut the receiver waits for the sender's compute, which is its bubble, and afterwards for the link. What no
slot covers between a device's start and end is the engine's own work. So its parts add up to the step.

The difference of the steps is explained by simulating the step with one measured cost after the other in place of the
predicted one, first the one that changes the step most. The changes add up to all that costs can explain.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from shardwright.sharder.planning.plan import Plan
from shardwright.sharder.planning.schedules.foreseen import costs_of, timeline_of
from shardwright.sharder.planning.schedules.simulate import StageCost
from shardwright.sharder.planning.schedules.slots import Slot, What, exchanged_s, of_replicas, predicted_slots
from shardwright.sharder.runtime.record import Account, Accounts, Off, StageAccounts

__all__ = ["Mark", "Noted", "account", "accounts_of", "measured_costs", "measured_slots", "off", "predicted_slots"]

_FIELDS: dict[What, str] = {
    "forward": "forward_s",
    "loss": "forward_s",
    "backward": "backward_s",
    "backward of weights": "backward_s",
    "update": "update_s",
    "tie": "transfer_s",
    "sum": "transfer_s",
    "send activations": "transfer_s",
    "receive activations": "transfer_s",
    "send gradients": "transfer_s",
    "receive gradients": "transfer_s",
    "wait": "bubble_s",
}

ROUNDING = 1e-9
"""What is left of a step by less than this part of it is left by adding up."""


class Mark(NamedTuple):
    """Something that a stage noted, in seconds of the host's clock."""

    what: What
    microbatch: int | None
    """Of a tie its number: each is a sum of its own devices."""
    start_s: float
    end_s: float
    piece: int = 0
    """Which of the device's stages, in their order."""


@dataclass(frozen=True)
class Noted:
    """What one device noted in a step, all in seconds of the host's clock."""

    start_s: float
    end_s: float
    marks: tuple[Mark, ...]
    """In the order of time, without overlaps."""
    posts: tuple[Mark, ...]
    """When it came to a transfer: ``start_s`` and ``end_s`` are the same."""


def accounts_of(plan: Plan, steps: Sequence[Sequence[Noted]]) -> Accounts:
    """The accounts of the step of median length (the shorter of two) among noted ``steps``, each by device."""
    lengths = [max(n.end_s for n in step) - min(n.start_s for n in step) for step in steps]
    shown = steps[lengths.index(statistics.median_low(lengths))]
    measured_s, measured = measured_slots(shown, plan.depth)
    costs = costs_of(plan)
    timeline = timeline_of(plan, costs)
    predicted = of_replicas(predicted_slots(timeline, costs, serial=not plan.overlap), plan.replicas)

    def of(device: int, slots: Iterable[Slot], step_s: float) -> Account:
        replica, position = divmod(device, plan.depth)
        return account((s for s in slots if s.replica == replica and s.stage % plan.depth == position), step_s)

    return Accounts(
        noted_s=tuple(lengths),
        measured_s=measured_s,
        predicted_s=timeline.step_s,
        stages=tuple(
            StageAccounts(
                device=device,
                predicted=of(number, predicted, timeline.step_s),
                measured=of(number, measured, measured_s),
            )
            for number, device in enumerate(plan.devices)
        ),
        off=off(plan, measured_costs(measured, plan, measured_s), measured_s),
        predicted=predicted,
        measured=measured,
    )


def account(slots: Iterable[Slot], step_s: float) -> Account:
    """The account of one device whose ``slots`` do not overlap, in a step of ``step_s`` seconds."""
    parts = dict.fromkeys(_FIELDS.values(), 0.0)
    for slot in slots:
        parts[_FIELDS[slot.what]] += slot.duration_s
    other_s = step_s - sum(parts.values())
    return Account(**parts, other_s=other_s if other_s > ROUNDING * step_s else 0.0)


def measured_slots(noted: Sequence[Noted], depth: int = 0) -> tuple[float, tuple[Slot, ...]]:
    """The step's seconds and its slots, from what each device noted.

    Args:
        depth: devices of one replica; by default there is one.
    """
    count = depth or len(noted)
    start_s, end_s = min(n.start_s for n in noted), max(n.end_s for n in noted)
    ready: dict[_Message, float] = {}
    for number, each in enumerate(noted):
        replica, device = divmod(number, count)
        for post in each.posts:
            key = _message(replica, device + count * post.piece, post)
            ready[key] = max(post.start_s, ready.get(key, post.start_s))
    slots: list[Slot] = []
    for number, each in enumerate(noted):
        replica, device = divmod(number, count)
        parts = [Mark("wait", None, start_s, each.start_s)]
        for mark in each.marks:
            posted_s = ready.get(_message(replica, device + count * mark.piece, mark), mark.start_s)
            both_s = min(max(posted_s, mark.start_s), mark.end_s)
            shown = mark._replace(microbatch=None) if mark.what == "tie" else mark
            parts += [shown._replace(what="wait", end_s=both_s), shown._replace(start_s=both_s)]
        parts.append(Mark("wait", None, max(each.end_s, parts[-1].end_s), end_s))
        at_s = start_s
        for part in parts:
            # Events of a GPU may be a little off the host's clock at the ends.
            begin_s, until_s = max(part.start_s, at_s), min(part.end_s, end_s)
            if until_s > begin_s:
                at = (begin_s - start_s, until_s - start_s)
                slots.append(_slot(device + count * part.piece, part, *at, replica=replica))
                at_s = until_s
    return end_s - start_s, tuple(slots)


def _slot(stage: int, mark: Mark, start_s: float, end_s: float, replica: int = 0) -> Slot:
    return Slot(stage=stage, what=mark.what, microbatch=mark.microbatch, start_s=start_s, end_s=end_s, replica=replica)


_Message = tuple[str, int, int, int | None]
"""Its kind, the replica (-1: all), the earlier stage of its link, its micro-batch."""


def _message(replica: int, stage: int, mark: Mark) -> _Message:
    """What both ends of a transfer call it."""
    how, _, kind = mark.what.partition(" ")
    if how == "sum":
        return how, -1, stage, None
    if not kind:
        # A tie is one sum for all its devices.
        return (how, replica, -1 if how == "tie" else stage, mark.microbatch)
    towards_next = (how == "send") == (kind == "activations")
    return kind, replica, stage if towards_next else stage - 1, mark.microbatch


def measured_costs(slots: Sequence[Slot], plan: Plan, step_s: float) -> tuple[StageCost, ...]:
    """What each stage of ``plan`` cost in a measured step of ``step_s`` seconds: means over its micro-batches, those
    of all replicas.

    What no slot of a device covers is the engine's, the same for each operation.
    """
    microbatches, replicas, depth = plan.microbatches, plan.replicas, plan.depth
    operations = microbatches * (1 + plan.train) * plan.stages_per_device
    parted = plan.schedule == "zero-bubble"

    def spent_s(stage: int, *what: What) -> float:
        return sum(slot.duration_s for slot in slots if slot.stage == stage and slot.what in what)

    def other_s(position: int) -> float:
        mine = [slot for slot in slots if slot.stage % depth == position]
        return sum(account((s for s in mine if s.replica == number), step_s).other_s for number in range(replicas))

    return tuple(
        StageCost(
            forward_s=spent_s(stage, "forward", "loss") / microbatches,
            backward_s=spent_s(stage, "backward", "backward of weights") / microbatches,
            backward_input_s=spent_s(stage, "backward") / microbatches if parted else None,
            backward_weight_s=spent_s(stage, "backward of weights") / microbatches if parted else None,
            update_s=spent_s(stage, "update") / replicas,
            send_forward_s=spent_s(stage, "send activations") / microbatches,
            receive_backward_s=spent_s(stage, "receive gradients") / microbatches,
            tie_s=spent_s(stage, "tie") / replicas,
            engine_s=other_s(stage % depth) / operations,
            receive_forward_s=spent_s(stage, "receive activations") / microbatches,
            send_backward_s=spent_s(stage, "send gradients") / microbatches,
            sum_s=spent_s(stage, "sum") / replicas,
        )
        for stage in range(len(plan.stages))
    )


class _Change(NamedTuple):
    """A measured cost in place of a predicted one: (stage, field of StageCost) of each of its parts."""

    what: Literal["forward", "backward", "update", "ties", "sums", "transfers", "engine"]
    devices: tuple[str, ...]
    parts: tuple[tuple[int, str], ...]

    def seconds(self, costs: Sequence[StageCost]) -> float:
        return float(sum(getattr(costs[stage], field) for stage, field in self.parts))

    def made(self, costs: Sequence[StageCost], measured: Sequence[StageCost]) -> tuple[StageCost, ...]:
        changed = list(costs)
        for stage, field in self.parts:
            changed[stage] = dataclasses.replace(changed[stage], **{field: getattr(measured[stage], field)})
        return tuple(changed)


def off(plan: Plan, measured: Sequence[StageCost], measured_s: float) -> tuple[Off, ...]:
    """What explains the difference of a measured step of ``measured_s`` seconds from the plan's; see this module.

    ``measured`` are the stages' costs in that step. Together the parts are the difference, whatever the costs are.
    """
    costs, measured = _all_own(costs_of(plan)), _all_own(measured)
    predicted, step_s = costs, timeline_of(plan, costs).step_s
    # Varying speeds are in the plan's step, not in that of its median times; the measured costs have them in them.
    found = [_unpriced("variation", step_s - plan.predicted.step_s)]
    changes = [c for c in _changes(plan) if c.seconds(predicted) or c.seconds(measured)]
    alone_s = {c: timeline_of(plan, c.made(costs, measured)).step_s - step_s for c in changes}
    for change in sorted(changes, key=lambda c: -abs(alone_s[c])):
        costs = change.made(costs, measured)
        now_s = timeline_of(plan, costs).step_s
        found.append(
            Off(
                what=change.what,
                devices=change.devices,
                predicted_s=change.seconds(predicted),
                measured_s=change.seconds(measured),
                step_s=now_s - step_s,
            )
        )
        step_s = now_s
    found.append(_unpriced("rest", measured_s - step_s))
    return tuple(sorted(found, key=lambda each: -abs(each.step_s)))


def _unpriced(what: Literal["variation", "rest"], step_s: float) -> Off:
    return Off(what=what, devices=(), predicted_s=None, measured_s=None, step_s=step_s)


def _all_own(costs: Sequence[StageCost]) -> tuple[StageCost, ...]:
    """``costs`` with both ends of each transfer in numbers of their own, so that one can change alone."""
    return tuple(
        dataclasses.replace(
            cost,
            receive_forward_s=exchanged_s(costs, stage, forward=True)[0],
            send_backward_s=exchanged_s(costs, stage, forward=False)[1],
        )
        for stage, cost in enumerate(costs)
    )


def _changes(plan: Plan) -> list[_Change]:
    """Every cost that may be off: of a device, or of the link from it to the next."""
    found = []
    count, last = plan.depth, len(plan.stages) - 1
    parted = plan.schedule == "zero-bubble"
    backwards = ("backward_input_s", "backward_weight_s") if parted else ("backward_s",)
    for position, device in enumerate(plan.pipelines[0]):
        mine = range(position, len(plan.stages), count)
        found += [
            _Change("forward", (device,), tuple((stage, "forward_s") for stage in mine)),
            _Change("backward", (device,), tuple((stage, part) for stage in mine for part in backwards)),
            _Change("update", (device,), tuple((stage, "update_s") for stage in mine)),
            _Change("ties", (device,), tuple((stage, "tie_s") for stage in mine)),
            _Change("engine", (device,), tuple((stage, "engine_s") for stage in mine for _ in range(1 + plan.train))),
            _Change("sums", (device,), tuple((stage, "sum_s") for stage in mine)),
        ]
        crossed = [stage for stage in mine if stage < last]
        if crossed:
            ends = ((s, field) for s in crossed for field in ("send_forward_s", "receive_backward_s"))
            others = ((s + 1, field) for s in crossed for field in ("receive_forward_s", "send_backward_s"))
            found.append(_Change("transfers", (device, plan.stages[crossed[0] + 1].device), (*ends, *others)))
    return found
