"""The splits that one would make without a planner, beside the plan in the same run."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Console, ConsoleOptions, RenderableType
from rich.text import Text

from shardwright.reports.layout import Column, Glyphs, section, tables
from shardwright.reports.quantities import count, percent, ratio, seconds, spread
from shardwright.sharder.runtime.record import Naive, Run

__all__ = ["NaiveReport", "beside_naive"]


class NaiveReport:
    """The naive splits of a run as a rich renderable, from about 60 columns up."""

    def __init__(self, run: Run) -> None:
        self.run = run

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        """A row a split that was run, and why others were not."""
        glyphs = Glyphs.of(options)
        timed = [naive for naive in self.run.naive if naive.timed is not None]
        yield section("Naive splits", "over the same devices, in turn with the plan; gain: how much faster the plan is")
        if timed:
            names = [self._named(naive) for naive in timed]
            yield from tables(Column("", names, "left"), self._columns(timed, glyphs), options=options)
        for naive in self.run.naive:
            if naive.timed is None:
                yield Text(f"  {naive.name}: not run, {naive.why}", style="dim")

    def _columns(self, timed: list[Naive], glyphs: Glyphs) -> list[Column]:
        run, found = self.run, [naive.timed for naive in timed if naive.timed is not None]
        predicted = [glyphs.none if each.predicted_s is None else seconds(each.predicted_s) for each in found]
        spreads = [f"{glyphs.plus_minus}{spread(each.spread_s, each.measured_s)}" for each in found]
        errors = [
            glyphs.none if each.error_percent is None else percent(each.error_percent, signed=True) for each in found
        ]
        promised = [run.predicted_gain_over(naive) for naive in timed]
        gained = [run.gain_over(naive) for naive in timed]
        return [
            Column("predicted", predicted),
            Column("measured", [seconds(each.measured_s) for each in found]),
            Column(glyphs.plus_minus, spreads, "right", "dim", tight=True),
            Column("off by", errors, drop=1),
            Column("gain\npredicted", [glyphs.none if gain is None else ratio(gain) for gain in promised]),
            Column("gain\nmeasured", [glyphs.none if gain is None else ratio(gain) for gain in gained]),
        ]

    def _named(self, naive: Naive) -> str:
        """With what it has other than the plan."""
        notes = [count(naive.microbatches, "micro-batch")] if naive.microbatches != self.run.microbatches else []
        notes += [count(naive.steps, "step")] if naive.steps != self.run.steps else []
        return f"{naive.name} ({', '.join(notes)})" if notes else naive.name


def beside_naive(run: Run) -> str:
    """A sentence on the fastest naive split that was run; empty without one.

    Steps differ where their medians are further apart than half the interquartile ranges of both together.
    """
    fastest = min((n for n in run.naive if n.timed is not None), key=lambda n: run.gain_over(n) or 0.0, default=None)
    if fastest is None or fastest.timed is None:
        return ""
    gain = run.gain_over(fastest) or 0.0
    noise_s = (run.sharded.spread_s + fastest.timed.spread_s) / 2
    if abs(run.sharded.measured_s - fastest.timed.measured_s) <= noise_s:
        return f"As fast as the split by {_by(fastest)}, within the noise."
    if gain < 1:
        return f"The split by {_by(fastest)} was faster: {ratio(1 / gain)} the speed of the plan."
    return f"{ratio(gain)} over the split by {_by(fastest)}."


def _by(naive: Naive) -> str:
    return naive.name.removeprefix("by ")
