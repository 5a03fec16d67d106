"""A run's timelines as a trace: the measured one is one process, the predicted one another; see planning/chrome.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from shardwright.sharder.planning.chrome import Event, events_of, whole_of, write_events
from shardwright.sharder.runtime.record import Accounts, Run

__all__ = ["trace_of", "write_trace"]


def write_trace(run: Run, accounts: Accounts, path: str | Path) -> None:
    """Write :func:`trace_of` as JSON to ``path``."""
    write_events(path, trace_of(run, accounts))


def trace_of(run: Run, accounts: Accounts) -> dict[str, Any]:
    """Both timelines of ``accounts``, in the object form of the format."""
    shown = (
        ("measured", accounts.measured_s, accounts.measured),
        ("predicted", accounts.predicted_s, accounts.predicted),
    )
    depth = len(run.devices) // run.replicas
    interleaved = any(slot.stage >= depth for slot in accounts.predicted)
    events: list[Event] = []
    for process, timeline in enumerate(shown, start=1):
        events += events_of(process, *timeline, run.devices, replicas=run.replicas, interleaved=interleaved)
    return whole_of(events, model=run.model, schedule=run.schedule, microbatches=run.microbatches)
