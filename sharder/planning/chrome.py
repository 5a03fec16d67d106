"""Timelines as a trace that ui.perfetto.dev and chrome://tracing open: Google's Trace Event Format, as JSON.

A timeline is a process, and each device a thread of it. A slot is a complete event (``"ph": "X"``), its ``ts`` and
``dur`` in microseconds; metadata events (``"M"``) give names and order; counters (``"C"``) give what a device's memory
holds, in bytes. The trace of a plan has the step that it foresees, that of a run (runtime/chrome.py) the measured one
beside it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from shardwright.errors import ShardwrightError
from shardwright.files import write_text
from shardwright.sharder.planning.plan import Plan
from shardwright.sharder.planning.schedules.footprint import MemoryCurve
from shardwright.sharder.planning.schedules.foreseen import costs_of, memory_of, timeline_of
from shardwright.sharder.planning.schedules.slots import Slot, What, of_replicas, predicted_slots

__all__ = ["Event", "events_of", "no_timeline", "trace_of_plan", "whole_of", "write_events", "write_plan_trace"]

Event = dict[str, Any]

_NAMES: dict[What, str] = {
    "forward": "F",
    "backward": "B",
    "backward of weights": "W",
    "loss": "loss",
    "update": "update",
    "tie": "tie",
    "sum": "sum",
    "send activations": "send F",
    "receive activations": "recv F",
    "send gradients": "send B",
    "receive gradients": "recv B",
    "wait": "wait",
}


def no_timeline(plan: Plan) -> str:
    """Why ``plan`` has no timeline, and what to do; the empty string where it has one."""
    if plan.timeline:
        return ""
    if not plan.contiguous:
        return (
            "a free assignment has no pipeline and so no timeline: plan without --free, or with --objective latency, "
            "for one"
        )
    if len(plan.devices) == 1:
        return (
            f"the plan is the model on {plan.devices[0]} alone, which has no timeline of a pipeline: "
            "--pin UNIT=DEVICE asks for a split"
        )
    return ""


def write_plan_trace(plan: Plan, path: str | Path) -> None:
    """Write :func:`trace_of_plan` as JSON to ``path``."""
    write_events(path, trace_of_plan(plan))


def write_events(path: str | Path, trace: dict[str, Any]) -> None:
    """Write a trace as JSON to ``path``."""
    write_text(path, json.dumps(trace, separators=(",", ":")) + "\n")


def trace_of_plan(plan: Plan) -> dict[str, Any]:
    """The step that ``plan`` foresees, at the median times, in the object form of the format.

    Raises:
        ShardwrightError: it has no timeline.
    """
    why = no_timeline(plan)
    if why:
        raise ShardwrightError(f"there is no trace to write: {why}")
    events = _of_latency(plan) if plan.timeline else _of_pipeline(plan)
    return whole_of(list(events), model=plan.model, schedule=plan.schedule, microbatches=plan.microbatches)


def whole_of(events: list[Event], *, model: str, schedule: str, microbatches: int) -> dict[str, Any]:
    """``events`` with what they are of."""
    other = {"model": model, "schedule": schedule, "microbatches": microbatches}
    return {"traceEvents": events, "displayTimeUnit": "ms", "otherData": other}


def events_of(
    process: int,
    name: str,
    step_s: float,
    slots: Sequence[Slot],
    devices: Sequence[str],
    *,
    replicas: int,
    interleaved: bool,
) -> Iterator[Event]:
    """A timeline of a step of ``step_s`` seconds: its process is called by ``name``, its threads by the ``devices``.

    Args:
        process: its number.
        devices: one replica after another.
        interleaved: whether a device has several stages.
    """
    depth = len(devices) // replicas
    threads = [d if interleaved else f"stage {at % depth}: {d}" for at, d in enumerate(devices)]
    if replicas > 1:
        threads = [f"replica {at // depth}, {thread}" for at, thread in enumerate(threads)]
    yield from _names(process, _title(name, step_s), threads)
    yield from (_event(process, slot, depth, interleaved=interleaved) for slot in slots)


def _title(name: str, step_s: float) -> str:
    return f"{name}: a step of {1e3 * step_s:.4g} ms"


def _of_pipeline(plan: Plan) -> Iterator[Event]:
    costs = costs_of(plan)
    timeline = timeline_of(plan, costs)
    slots = of_replicas(predicted_slots(timeline, costs, serial=not plan.overlap), plan.replicas)
    yield from events_of(
        1,
        "predicted",
        timeline.step_s,
        slots,
        plan.devices,
        replicas=plan.replicas,
        interleaved=plan.stages_per_device > 1,
    )
    curves = memory_of(plan, timeline) or ()
    for pipeline in plan.pipelines:
        for device, curve in zip(pipeline, curves, strict=bool(curves)):
            yield from _counters(1, f"memory of {device}", curve)


def _of_latency(plan: Plan) -> Iterator[Event]:
    """One pass of one input: what stays together is one event, named by its units, else by its nodes."""
    yield from _names(1, _title("predicted", plan.predicted.step_s), plan.devices)
    threads = {device: position + 1 for position, device in enumerate(plan.devices)}
    for timed in plan.timeline:
        name = ", ".join(timed.units or timed.nodes)
        named = name if timed.phase == "forward" else f"{name} {timed.phase}"
        nodes = {"nodes": list(timed.nodes), "units": list(timed.units)}
        yield _complete(1, threads[timed.device], named, timed.phase, timed.start_s, timed.end_s, nodes)


def _counters(process: int, name: str, curve: MemoryCurve) -> Iterator[Event]:
    """What a device holds, where that changes; of what there is at the same moment, the most, and then what stays."""
    times_ns = [round(seconds * 1e9) for seconds in curve.times_s.tolist()]
    held: list[tuple[int, int]] = []
    for at_ns, size in zip(times_ns, curve.bytes.tolist(), strict=True):
        while held and held[-1][0] == at_ns and held[-1][1] <= size:
            held.pop()
        held.append((at_ns, size))
    shown = [held[0], *(after for before, after in pairwise(held) if after[1] != before[1])]
    for at_ns, size in shown:
        yield {
            "name": name,
            "cat": "memory",
            "ph": "C",
            "pid": process,
            "tid": 0,
            "ts": at_ns / 1e3,
            "args": {"bytes": size},
        }


def _names(process: int, name: str, threads: Sequence[str]) -> Iterator[Event]:
    """Metadata: what the process and its threads are called, and how they are sorted."""

    def metadata(what: str, thread: int, **args: Any) -> Event:
        return {"name": what, "ph": "M", "pid": process, "tid": thread, "ts": 0, "args": args}

    yield metadata("process_name", 0, name=name)
    yield metadata("process_sort_index", 0, sort_index=process)
    for position, thread in enumerate(threads):
        yield metadata("thread_name", position + 1, name=thread)
        yield metadata("thread_sort_index", position + 1, sort_index=position)


def _event(process: int, slot: Slot, depth: int, *, interleaved: bool) -> Event:
    number = "" if slot.microbatch is None or slot.what == "wait" else str(slot.microbatch)
    # As PyTorch's own schedules are written, 2F0 is the forward of micro-batch 0 on stage 2.
    stage = str(slot.stage) if interleaved and slot.what in ("forward", "backward", "backward of weights") else ""
    category = "transfer" if slot.what.startswith(("send", "receive", "tie", "sum")) else slot.what
    of = {} if slot.microbatch is None else {"microbatch": slot.microbatch, "stage": slot.stage}
    thread = slot.replica * depth + slot.stage % depth + 1
    return _complete(process, thread, stage + _NAMES[slot.what] + number, category, slot.start_s, slot.end_s, of)


def _complete(
    process: int, thread: int, name: str, category: str, start_s: float, end_s: float, args: dict[str, Any]
) -> Event:
    # Whole nanoseconds, and the length as a difference of them: neighbours then touch and never overlap.
    start_ns, end_ns = round(start_s * 1e9), round(end_s * 1e9)
    return {
        "name": name,
        "cat": category,
        "ph": "X",
        "pid": process,
        "tid": thread,
        "ts": start_ns / 1e3,
        "dur": (end_ns - start_ns) / 1e3,
        "args": args,
    }
