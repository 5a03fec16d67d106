"""A run's timelines as a trace that ui.perfetto.dev and chrome://tracing open: Google's Trace Event Format, as JSON.

The measured timeline is one process, the predicted one another, and each device a thread of both. A slot is a complete
event (``"ph": "X"``), its ``ts`` and ``dur`` in microseconds; metadata events (``"M"``) give names and order.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from shardwright.files import write_text
from shardwright.sharder.runtime.record import Accounts, Run, Slot, What

__all__ = ["trace_of", "write_trace"]

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


def write_trace(run: Run, accounts: Accounts, path: str | Path) -> None:
    """Write :func:`trace_of` as JSON to ``path``."""
    write_text(path, json.dumps(trace_of(run, accounts), separators=(",", ":")) + "\n")


def trace_of(run: Run, accounts: Accounts) -> dict[str, Any]:
    """Both timelines of ``accounts``, in the object form of the format."""
    shown = (
        ("measured", accounts.measured, accounts.measured_s),
        ("predicted", accounts.predicted, accounts.predicted_s),
    )
    events: list[dict[str, Any]] = []
    depth = len(run.devices) // run.replicas
    interleaved = any(slot.stage >= depth for slot in accounts.predicted)
    for process, (name, slots, step_s) in enumerate(shown, start=1):
        threads = [d if interleaved else f"stage {at % depth}: {d}" for at, d in enumerate(run.devices)]
        if run.replicas > 1:
            threads = [f"replica {at // depth}, {thread}" for at, thread in enumerate(threads)]
        events += _names(process, f"{name}: a step of {1e3 * step_s:.4g} ms", threads)
        events += (_event(process, slot, depth, interleaved=interleaved) for slot in slots)
    return {
        "traceEvents": events,
        "displayTimeUnit": "ms",
        "otherData": {"model": run.model, "schedule": run.schedule, "microbatches": run.microbatches},
    }


def _names(process: int, name: str, threads: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Metadata: what the process and its threads are called, and how they are sorted."""

    def metadata(what: str, thread: int, **args: Any) -> dict[str, Any]:
        return {"name": what, "ph": "M", "pid": process, "tid": thread, "ts": 0, "args": args}

    yield metadata("process_name", 0, name=name)
    yield metadata("process_sort_index", 0, sort_index=process)
    for position, thread in enumerate(threads):
        yield metadata("thread_name", position + 1, name=thread)
        yield metadata("thread_sort_index", position + 1, sort_index=position)


def _event(process: int, slot: Slot, depth: int, *, interleaved: bool) -> dict[str, Any]:
    # Whole nanoseconds, and the length as a difference of them: neighbours then touch and never overlap.
    start_ns, end_ns = round(slot.start_s * 1e9), round(slot.end_s * 1e9)
    number = "" if slot.microbatch is None or slot.what == "wait" else str(slot.microbatch)
    # As PyTorch's own schedules are written, 2F0 is the forward of micro-batch 0 on stage 2.
    stage = str(slot.stage) if interleaved and slot.what in ("forward", "backward", "backward of weights") else ""
    return {
        "name": stage + _NAMES[slot.what] + number,
        "cat": "transfer" if slot.what.startswith(("send", "receive", "tie", "sum")) else slot.what,
        "ph": "X",
        "pid": process,
        "tid": slot.replica * depth + slot.stage % depth + 1,
        "ts": start_ns / 1e3,
        "dur": (end_ns - start_ns) / 1e3,
        "args": {} if slot.microbatch is None else {"microbatch": slot.microbatch, "stage": slot.stage},
    }
