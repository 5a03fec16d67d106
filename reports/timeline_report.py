"""The step that a plan foresees, drawn: a line for each device, a character for each moment, and its memory below."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from rich.console import ConsoleOptions, RenderableType
from rich.table import Table
from rich.text import Text

from shardwright.profiler.formats.given_devices import AMPLE_BYTES
from shardwright.reports.layout import INDENT, Glyphs, indented, section
from shardwright.reports.quantities import number_of_bytes, percent, seconds
from shardwright.sharder.planning.plan import Plan
from shardwright.sharder.planning.schedules.footprint import MemoryCurve
from shardwright.sharder.planning.schedules.foreseen import memory_of, once_s_of, timeline_of
from shardwright.sharder.planning.schedules.schedule import BACKWARD, FORWARD, WEIGHTS
from shardwright.sharder.planning.schedules.timeline import Timeline

__all__ = ["timeline_drawn"]

WIDEST, NARROWEST = 100, 24
"""Characters of a line."""
WIDE = 56
"""With fewer, the peak is said in fewer words."""
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
    room = options.max_width - INDENT - 2 - max(map(len, names))
    if room < NARROWEST or not timeline.step_s:
        return
    curves = memory_of(plan, timeline) or ()
    memories = [_Memory.of(plan, device, curve) for device, curve in enumerate(curves) if curve.bytes.max()]
    words = _that_fit(memories, room)
    width = min(WIDEST, room - (2 + max(map(len, words)) if any(words) else 0))
    backward = ", letters backward" if plan.train else ""
    weights = ", capitals gradients of weights" if plan.schedule == "zero-bubble" else ""
    ends = f", {ENDS} updates" if plan.train else ""
    times = " at the median times" if plan.of_model else ""
    yield section(
        "Timeline",
        f"one step{times}, {seconds(timeline.step_s)}: by micro-batch, digits forward{backward}{weights}; "
        f"{glyphs.waits} waits and transfers{ends}{_of_what(memories)}",
    )
    grid = Table.grid(padding=(0, 2))
    for _ in range(3 if any(words) else 2):
        grid.add_column(no_wrap=True)
    below = {memory.device: (memory, said) for memory, said in zip(memories, words, strict=True)}
    for device, name in enumerate(names):
        grid.add_row(Text(name), _line(timeline, device, once_s_of(plan, device), width, glyphs.waits))
        if device in below:
            memory, said = below[device]
            most = memory.curve.most_bytes(width, timeline.step_s)
            grid.add_row("", Text(_heights(most, memory.whole, glyphs.heights), style="blue"), Text(said, style="dim"))
    yield indented(grid)


class _Memory(NamedTuple):
    """What is drawn of a device's memory."""

    device: int
    curve: MemoryCurve
    peak: int
    cap: int | None
    """In bytes, if it has one."""

    @classmethod
    def of(cls, plan: Plan, device: int, curve: MemoryCurve) -> _Memory:
        cap = min(stage.memory_cap_bytes for stage in plan.stages[device :: plan.depth])
        return cls(device, curve, int(curve.bytes.max()), None if cap >= AMPLE_BYTES else cap)

    @property
    def whole(self) -> int:
        """What a character of full height stands for: its cap, or what it has at most."""
        return self.cap or self.peak

    @property
    def words(self) -> tuple[str, str]:
        """The peak, and in fewer words."""
        if self.cap is None:
            return (f"peak {number_of_bytes(self.peak)}",) * 2
        short = f"peak {percent(100 * self.peak / self.cap)}"
        return f"{short} of {number_of_bytes(self.cap)}", short


def _that_fit(memories: Sequence[_Memory], room: int) -> list[str]:
    """What is said of each peak beside a line that has ``room`` for both."""
    for least, at in ((WIDE, 0), (NARROWEST, 1)):
        said = [memory.words[at] for memory in memories]
        if said and room - 2 - max(map(len, said)) >= least:
            return said
    return [""] * len(memories)


def _of_what(memories: Sequence[_Memory]) -> str:
    """What the heights below the operations are parts of."""
    capped = {memory.cap is not None for memory in memories}
    if not capped:
        return ""
    whole = " or ".join([*(["the cap"] if True in capped else []), *(["the peak"] if False in capped else [])])
    return f"; below, the memory, as a share of {whole}"


def _heights(most: Sequence[int], whole: int, heights: str) -> str:
    """A character for each number of bytes; only none of them is a blank."""
    steps = len(heights)
    return "".join(heights[min(steps, -(-size * steps // whole)) - 1] if size else " " for size in most)


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
