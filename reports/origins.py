"""Where numbers come from: the marks of those that were not measured, and what stands behind them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from rich.console import RenderableType

from shardwright.profiler.profile import Estimate, Origin, Profile
from shardwright.reports.layout import Glyphs, facts, section
from shardwright.reports.quantities import percent, seconds

__all__ = ["mark", "not_measured"]


def mark(origins: Iterable[Origin], glyphs: Glyphs) -> str:
    """What stands before a number: nothing if all of it was measured, else the mark of its weakest part."""
    found = set(origins)
    if "estimated" in found:
        return glyphs.estimated
    return glyphs.scaled if "scaled" in found else ""


def not_measured(profile: Profile, glyphs: Glyphs) -> Iterator[RenderableType]:
    """Where the times of the devices come from that are not here; nothing if all are."""
    counted = {estimate.device: estimate for estimate in profile.estimates}
    origins = {measurement.device: measurement.source for measurement in profile.measurements}
    rows: list[tuple[str, str]] = []
    before = ""
    for device in profile.devices:
        if device.declared:
            estimate = counted.get(device.name)
            behind = "as a device of the same model takes here" if estimate is None else _counted_on(estimate)
            text = f"{origins.get(device.name, 'estimated')}: {behind}"
            rows.append((device.name, "likewise" if text == before else text))
            before = text
    if rows:
        yield section(
            "Not measured", f"devices of a cluster file; {glyphs.scaled} scaled, {glyphs.estimated} estimated"
        )
        yield facts(rows)


def _counted_on(estimate: Estimate) -> str:
    """The efficiencies behind a device's times."""
    compute, memory = (percent(100 * part) for part in (estimate.compute_efficiency, estimate.memory_efficiency))
    rates = f"{compute} of the peak arithmetic and {memory} of the memory's bandwidth"
    operation = f"{seconds(estimate.operation_s)} an operator"
    if not estimate.fitted_to:
        return f"{rates}, {operation}, all assumed"
    error = f" ({percent(100 * estimate.median_error)} off there)" if estimate.median_error is not None else ""
    if estimate.efficiencies_fitted:
        return f"{rates}, {operation}, fitted to {estimate.fitted_to}{error}"
    return f"{rates}, assumed; {operation}, fitted to {estimate.fitted_to}{error}"
