"""Several stages on each device, for a person: what they add up to, and what they were weighed against."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import ConsoleOptions, RenderableType

from shardwright.reports.layout import Column, Glyphs, bar, section, tables
from shardwright.reports.quantities import count, number_of_bytes, percent, ratio, seconds, used_of
from shardwright.sharder.planning.plan import WORTHWHILE, OtherSchedule, Plan

__all__ = [
    "SCHEDULES",
    "device_loads_s",
    "devices_of_interleaved",
    "rival_schedule_in_words",
    "schedule_in_words",
    "weighed",
]


SCHEDULES = {"1f1b": "1F1B", "gpipe": "GPipe", "interleaved": "interleaved 1F1B", "zero-bubble": "zero-bubble"}


def schedule_in_words(schedule: str, stages_per_device: int) -> str:
    """``1F1B``, ``interleaved 1F1B (2 stages a device)``."""
    name = SCHEDULES[schedule]
    return f"{name} ({stages_per_device} stages a device)" if stages_per_device > 1 else name


def weighed(plan: Plan, other: OtherSchedule) -> str:
    """The plan's schedule against the best with another, and why the one is shorter."""
    own = schedule_in_words(plan.schedule, plan.stages_per_device)
    theirs = schedule_in_words(other.schedule, other.stages_per_device)
    if other.microbatches != plan.microbatches:
        theirs += f" with {count(other.microbatches, 'micro-batch')}"
    if other.devices != len(plan.devices):
        theirs += f" on {other.devices} devices"
    bubbles = f"a bubble of {percent(100 * plan.predicted.bubble)} instead of {percent(100 * other.bubble)}"
    transfers = f"transfers of {seconds(other.own_transfer_s)} instead of {seconds(other.transfer_s)}"
    slower = other.step_s < plan.predicted.step_s
    # What speaks for the shorter step is said first.
    by_bubble = (plan.predicted.bubble < other.bubble) != slower or other.own_transfer_s == other.transfer_s
    reasons = " and ".join([bubbles, transfers] if by_bubble else [transfers, bubbles])
    (pieces, fewer), (_, more) = sorted(
        [(plan.stages_per_device, len(plan.devices)), (other.stages_per_device, other.devices)], reverse=True
    )
    if fewer < more:  # neither bubbles nor transfers compare then
        each = f" with {pieces} stages on each" if pieces > 1 else ""
        reasons = f"no better split{each} of more than {fewer} was found"
    return (
        f"{'Its schedule is not the fastest: a' if slower else 'A'} step takes {seconds(plan.predicted.step_s)} with "
        f"{own} and {seconds(other.step_s)} with {theirs}: {reasons}."
    )


def rival_schedule_in_words(plan: Plan) -> str:
    """The fastest of the schedules that were not asked for, where it is noticeably faster."""
    rivals = [one for one in plan.alternatives if one.name in ("interleaved", "zero-bubble") and one.step_s]
    best = min(rivals, key=lambda one: one.step_s or 0.0, default=None)
    if best is None or not best.step_s or best.step_s * WORTHWHILE > plan.predicted.step_s:
        return ""
    theirs = schedule_in_words(best.name, 2 if best.name == "interleaved" else 1)
    return (
        f" {theirs[0].upper()}{theirs[1:]} would take {seconds(best.step_s)}: faster by "
        f"{ratio(plan.predicted.step_s / best.step_s)} (--schedule {best.name})."
    )


def device_loads_s(plan: Plan) -> list[float]:
    """By device: seconds of a step in which it computes or transfers; where these overlap, the longest of the three."""
    loads = [[0.0, 0.0, 0.0] for _ in range(plan.depth)]
    for stage in plan.stages:
        before = plan.stages[stage.index - 1] if stage.index else None
        came_s = before.send_forward_s if before is not None else 0.0
        went_s = before.receive_backward_s if before is not None else 0.0
        received_s = came_s if stage.receive_forward_s is None else stage.receive_forward_s
        returned_s = went_s if stage.send_backward_s is None else stage.send_backward_s
        mine, each = loads[stage.index % plan.depth], plan.pipeline_microbatches
        mine[0] += each * (stage.forward_s + stage.backward_s) + stage.update_s + stage.tie_s + stage.sum_s
        mine[1] += each * (stage.send_forward_s + returned_s)
        mine[2] += each * (received_s + stage.receive_backward_s)
    return [max(parts) if plan.overlap else sum(parts) for parts in loads]


def devices_of_interleaved(plan: Plan, options: ConsoleOptions, glyphs: Glyphs) -> Iterator[RenderableType]:
    """What the stages of each device add up to."""
    pieces = [plan.stages[position :: plan.depth] for position in range(plan.depth)]
    memory = plan.memory()
    used = [used_of(memory[mine[0].device], mine[0].memory_cap_bytes) for mine in pieces]
    loads = device_loads_s(plan)
    largest = max(loads) or 1.0
    note = "load and predicted peak of its stages together; in flight: micro-batches that each holds at once"
    yield section("Devices", note)
    yield from tables(
        Column("device", plan.pipelines[0], "left"),
        [
            Column("stages", [", ".join(str(stage.index) for stage in mine) for mine in pieces], "left"),
            Column("load", [seconds(load) for load in loads]),
            Column("", [bar(s / largest, 12, glyphs) for s in loads], "left", "cyan", drop=3, tight=True),
            Column("params", [number_of_bytes(sum(stage.param_bytes for stage in mine)) for mine in pieces], drop=1),
            Column("in flight", [" + ".join(str(stage.in_flight) for stage in mine) for mine in pieces], drop=2),
            Column("memory", used),
        ],
        options=options,
    )
