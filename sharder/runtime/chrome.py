"""A run's timelines as a trace that ui.perfetto.dev and chrome://tracing open: Google's Trace Event Format, as JSON.

The measured timeline is one process, the predicted one another, and each stage a thread of both. A slot is a complete
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
    "loss": "loss",
    "update": "update",
    "tie": "tie",
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
    for process, (name, slots, step_s) in enumerate(shown, start=1):
        events += _names(process, f"{name}: a step of {1e3 * step_s:.4g} ms", run.devices)
        events += (_event(process, slot) for slot in slots)
    return {
        "traceEvents": events,
        "displayTimeUnit": "ms",
        "otherData": {"model": run.model, "schedule": run.schedule, "microbatches": run.microbatches},
    }


def _names(process: int, name: str, devices: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Metadata: what the process and its threads are called, and how they are sorted."""

    def metadata(what: str, thread: int, **args: Any) -> dict[str, Any]:
        return {"name": what, "ph": "M", "pid": process, "tid": thread, "ts": 0, "args": args}

    yield metadata("process_name", 0, name=name)
    yield metadata("process_sort_index", 0, sort_index=process)
    for stage, device in enumerate(devices):
        yield metadata("thread_name", stage + 1, name=f"stage {stage}: {device}")
        yield metadata("thread_sort_index", stage + 1, sort_index=stage)


def _event(process: int, slot: Slot) -> dict[str, Any]:
    # Whole nanoseconds, and the length as a difference of them: neighbours then touch and never overlap.
    start_ns, end_ns = round(slot.start_s * 1e9), round(slot.end_s * 1e9)
    number = "" if slot.microbatch is None or slot.what == "wait" else str(slot.microbatch)
    return {
        "name": _NAMES[slot.what] + number,
        "cat": "transfer" if slot.what.startswith(("send", "receive", "tie")) else slot.what,
        "ph": "X",
        "pid": process,
        "tid": slot.stage + 1,
        "ts": start_ns / 1e3,
        "dur": (end_ns - start_ns) / 1e3,
        "args": {} if slot.microbatch is None else {"microbatch": slot.microbatch},
    }
