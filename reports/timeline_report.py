"""The step that a plan foresees, drawn: a line for each device, a character for each moment."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from rich.console import ConsoleOptions, RenderableType
from rich.table import Table
from rich.text import Text

from shardwright.reports.layout import INDENT, Glyphs, indented, section
from shardwright.reports.quantities import seconds
from shardwright.sharder.planning.plan import Plan
from shardwright.sharder.planning.schedules.foreseen import timeline_of
from shardwright.sharder.planning.schedules.schedule import BACKWARD, FORWARD, WEIGHTS
from shardwright.sharder.planning.schedules.timeline import Timeline

__all__ = ["timeline_drawn"]

WIDEST, NARROWEST = 100, 24
"""Characters of a line."""
MOST_DEVICES, MOST_OPERATIONS = 16, 4_096
"""Of more nothing could be seen."""
LETTERS = {FORWARD: "0123456789", BACKWARD: "abcdefghij", WEIGHTS: "ABCDEFGHIJ"}
"""By the number of the micro-batch, its last digit."""
STYLES = {FORWARD: "green", BACKWARD: "cyan", WEIGHTS: "magenta"}
ENDS = "="


def timeline_drawn(plan: Plan, options: ConsoleOptions, glyphs: Glyphs) -> Iterator[RenderableType]:
    """The schedule of a pipeline of several stages; nothing for other plans, and for those too long to be seen."""
    operations = len(plan.stages) * plan.pipeline_microbatches
    if not plan.contiguous or plan.depth < 2 or plan.depth > MOST_DEVICES or operations > MOST_OPERATIONS:
        return
    timeline = timeline_of(plan)
    names = [stage.device for stage in plan.stages[: plan.depth]]
    width = min(WIDEST, options.max_width - INDENT - 2 - max(map(len, names)))
    if width < NARROWEST or not timeline.step_s:
        return
    backward = ", letters backward" if plan.train else ""
    weights = ", capitals gradients of weights" if plan.schedule == "zero-bubble" else ""
    ends = f", {ENDS} updates" if plan.train else ""
    times = " at the median times" if plan.of_model else ""
    yield section(
        "Timeline",
        f"one step{times}, {seconds(timeline.step_s)}: by micro-batch, digits forward{backward}{weights}; "
        f"{glyphs.waits} waits and transfers{ends}",
    )
    grid = Table.grid(padding=(0, 2))
    grid.add_column(no_wrap=True)
    grid.add_column(no_wrap=True)
    for device, name in enumerate(names):
        once_s = sum(stage.tie_s + stage.sum_s + stage.update_s for stage in plan.stages[device :: plan.depth])
        grid.add_row(Text(name), _line(timeline, device, once_s, width, glyphs.waits))
    yield indented(grid)


def _line(timeline: Timeline, device: int, once_s: float, width: int, waits: str) -> Text:
    """What a device does at the middle of each of ``width`` equal parts of the step; ``once_s`` its sums and updates,
    which come last."""
    moments = (np.arange(width) + 0.5) * timeline.step_s / width
    started = np.searchsorted(timeline.start_s[device], moments, side="right") - 1
    last_s = float(timeline.end_s[device].max())
    line = Text()
    for moment, at in zip(moments.tolist(), started.tolist(), strict=True):
        if at >= 0 and moment < timeline.end_s[device, at]:
            kind = int(timeline.order.kinds[device, at])
            digit = timeline.order.operation(device, at).microbatch % 10
            line.append(LETTERS[kind][digit], style=STYLES[kind])
        else:
            line.append(ENDS if last_s < moment < last_s + once_s else waits, style="dim")
    return line
