"""How well a profile's times are known: repeats, confidence, outliers, first calls, and what did not fit."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence

from rich.console import RenderableType
from rich.text import Text

from shardwright.profiler.profile import Measurement, Misfit, Profile
from shardwright.reports.layout import facts, indented, section
from shardwright.reports.quantities import count, percent, seconds

__all__ = ["measured_section"]

SHOWN = 5
"""So many misfits are listed one by one."""


def measured_section(profile: Profile) -> Iterator[RenderableType]:
    """A line for each device that was measured, and one for each step that fits nowhere near."""
    rows = []
    for device in profile.devices:
        times = [m for m in profile.measurements if m.device == device.name and m.source == "measured"]
        if any(m.median_error is not None for m in times):
            rows.append((device.name, _sureness(times)))
    if rows:
        yield section("Measured", "how sure the medians are, with 95% confidence, weighted by time")
        yield facts(rows)
    for device in profile.devices:
        counts = sorted({m.microbatches for m in profile.measurements if m.device == device.name and m.host_bound})
        if counts:
            at = f"at {', '.join(map(str, counts))} micro-batches" if counts != [1] else "with the whole batch"
            text = (
                f"{device.name} waits for its host {at}: that takes longer to launch the kernels than the GPU to run "
                "them; larger micro-batches cost little more there"
            )
            yield indented(Text(text, style="yellow"))
    yield from _misfits(profile.misfits)


def _sureness(times: Sequence[Measurement]) -> str:
    known = [m for m in times if m.median_error is not None]
    whole = sum(m.forward_s + m.backward_s for m in known)
    error = sum((m.median_error or 0.0) * (m.forward_s + m.backward_s) for m in known) / whole if whole else 0.0
    repeats = statistics.median(m.repeats for m in times)
    outliers = sum(m.outliers for m in times)
    first = sum(m.first_call_s - m.forward_s - m.backward_s for m in times)
    parts = [f"{percent(100 * error)} either way", f"{repeats:.0f} repeats", count(outliers, "outlier")]
    return ", ".join([*parts, *([f"first calls {seconds(first)} longer"] if first > 0 else [])])


def _misfits(misfits: Sequence[Misfit]) -> Iterator[RenderableType]:
    for misfit in misfits[:SHOWN]:
        at = f" at {count(misfit.microbatches, 'micro-batch')}" if misfit.microbatches > 1 else ""
        text = f"{misfit.node} does not fit on {misfit.device}{at}: {misfit.reason}"
        yield indented(Text(text, style="yellow"))
    if len(misfits) > SHOWN:
        yield indented(Text(f"and {len(misfits) - SHOWN} more do not fit", style="yellow"))
