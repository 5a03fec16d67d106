"""A run for a person: are the results equal, how long was a step, and was the prediction right."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Console, ConsoleOptions, RenderableType
from rich.text import Text

from shardwright.reports.accounts_report import AccountsReport
from shardwright.reports.interleaved_report import SCHEDULES
from shardwright.reports.layout import Column, Glyphs, section, tables
from shardwright.reports.naive_report import NaiveReport, beside_naive
from shardwright.reports.quantities import count, number_of_bytes, per_second, percent, ratio, seconds, spread
from shardwright.sharder.runtime.record import Run, Timed

__all__ = ["RunReport", "conclusion", "equality", "paces"]

WORTH_EXPLAINING = 5.0
"""Percent that a prediction is off by: below, no reason is looked for."""
HOW = {
    "on the host": "compared with the model in the host's memory",
    "unit by unit": "compared a unit at a time, since nothing here has room for the whole model",
}
"""What is said of a comparison that no device made."""


def equality(run: Run) -> tuple[bool, str]:
    """Whether the sharded model computes what the unsharded one does, in a sentence."""
    found = run.equality
    what = count(found.tensors, "output and gradient" if run.train else "output")
    what = what.replace("output and gradients", "outputs and gradients")
    largest = _tiny(found.outputs)
    if run.train:
        largest = f"outputs {largest}, gradients {_tiny(found.gradients)}"
    how = f"; {HOW[found.how]}" if found.how in HOW else ""
    differences = f"largest relative difference: {largest}; tolerance {_tiny(found.tolerance)}{how}"
    equal = max(found.outputs, found.gradients) <= found.tolerance
    if equal:
        return True, f"Equal to the unsharded model: {what} ({differences})."
    return False, f"NOT equal to the unsharded model: {what} compared ({differences})."


def _tiny(value: float) -> str:
    """A relative difference: ``0``, ``3.1e-07``, ``1e-05``."""
    return f"{value:.2g}"


def conclusion(run: Run) -> str:
    """What was gained, what was promised, and how far apart they are."""
    if run.baseline is None or run.speedup is None:
        step = f"Measured {seconds(run.sharded.measured_s)} a step"
        if run.sharded.predicted_s is not None and run.sharded.error_percent is not None:
            step += (
                f"; predicted {seconds(run.sharded.predicted_s)} ({percent(run.sharded.error_percent, signed=True)})"
            )
        why = run.baseline_why or "No single device holds the model"
        return f"{step}. {why[0].upper()}{why[1:]}, so there is no speedup to state."
    slower = run.speedup < 1
    text = f"measured {ratio(run.speedup)} {'the speed of' if slower else 'over'} {run.baseline_device} alone"
    if run.predicted_speedup is not None:
        error = 100 * (run.predicted_speedup / run.speedup - 1)
        text += f"; predicted {ratio(run.predicted_speedup)} ({percent(error, signed=True)})"
    if slower:
        return f"Slower than one device: {text}."
    return f"{text[0].upper()}{text[1:]}."


def paces(run: Run) -> str:
    """How fast the devices were, beside how fast they were when the step was predicted."""
    each = ", ".join(f"{paced.device} {ratio(paced.slower)}" for paced in run.paces)
    text = f"The same work took so many times as long as in the profile, beside these steps: {each}."
    at_pace_s, error = run.sharded.at_pace_s, run.sharded.error_at_pace_percent
    if at_pace_s is not None and error is not None:
        text += f" At that pace the step is predicted to take {seconds(at_pace_s)} ({percent(error, signed=True)})"
        if run.speedup is not None and run.speedup_at_pace is not None:
            gain = 100 * (run.speedup_at_pace / run.speedup - 1)
            text += f", the speedup to be {ratio(run.speedup_at_pace)} ({percent(gain, signed=True)})"
        text += "."
        as_predicted = run.sharded.error_percent
        if as_predicted is not None and abs(error) >= abs(as_predicted) > WORTH_EXPLAINING:
            text += " That is no nearer, so the pace does not explain the error."
    return text


class RunReport:
    """A run as a rich renderable, from about 60 columns up."""

    def __init__(self, run: Run) -> None:
        self.run = run

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        """Equality, the tables of steps, accounts, memory and naive splits, the conclusion."""
        run, glyphs = self.run, Glyphs.of(options)
        equal, text = equality(run)
        yield Text(text, style="green" if equal else "bold red")
        if run.batch_norm:
            yield Text(f"They were compared in micro-batches: {run.batch_norm}.", style="yellow")
        schedule = SCHEDULES.get(run.schedule, run.schedule)
        how = f"{schedule}, {count(run.microbatches, 'micro-batch')}" if len(run.devices) > 1 else "one stage"
        how = f"{run.replicas} replicas, {how}" if run.replicas > 1 else how
        note = f"{how}, batch {run.batch}; median of {count(run.steps, 'step')} of each, in turn"
        yield section("Run", note)
        yield from self._steps(options, glyphs)
        if run.paces:
            yield Text(paces(run), style="dim")
        if run.accounts is not None:
            yield AccountsReport(run, run.accounts)
        yield from self._memory(options)
        if run.naive:
            yield NaiveReport(run)
        slower = run.speedup is not None and run.speedup < 1
        text = " ".join(filter(None, (conclusion(run), beside_naive(run))))
        yield Text(f"\n{text}", style="bold yellow" if slower else "bold")

    def _memory(self, options: ConsoleOptions) -> Iterator[RenderableType]:
        memory = self.run.memory
        if not memory:
            return
        yield section("Memory", "peak of each device in a step")
        yield from tables(
            Column("", [weighed.device for weighed in memory], "left"),
            [
                Column("predicted", [number_of_bytes(weighed.predicted_bytes) for weighed in memory]),
                Column("measured", [number_of_bytes(weighed.measured_bytes) for weighed in memory]),
                Column("prediction off by", [percent(weighed.error_percent, signed=True) for weighed in memory]),
            ],
            options=options,
        )

    def _steps(self, options: ConsoleOptions, glyphs: Glyphs) -> Iterator[RenderableType]:
        run = self.run

        def row(name: str, timed: Timed) -> tuple[str, str, str, str, str]:
            predicted, error = glyphs.none, ""
            if timed.predicted_s is not None and timed.error_percent is not None:
                predicted, error = seconds(timed.predicted_s), percent(timed.error_percent, signed=True)
            deviation = f"{glyphs.plus_minus}{spread(timed.spread_s, timed.measured_s)}" if timed.measured_s else ""
            return name, seconds(timed.measured_s), deviation, predicted, error

        rows = [row(f"step on {', '.join(run.devices)}", run.sharded)]
        if run.baseline is not None:
            rows.insert(0, row(f"step on {run.baseline_device} alone", run.baseline))
        predicted, error = glyphs.none, ""
        if run.predicted_throughput is not None:
            predicted = per_second(run.predicted_throughput)
            error = percent(100 * (run.predicted_throughput / run.throughput - 1), signed=True)
        rows.append(("samples", per_second(run.throughput), "", predicted, error))
        if run.speedup is not None:
            predicted, error = glyphs.none, ""
            if run.predicted_speedup is not None:
                predicted = ratio(run.predicted_speedup)
                error = percent(100 * (run.predicted_speedup / run.speedup - 1), signed=True)
            rows.append(("speedup", ratio(run.speedup), "", predicted, error))
        names, measured, spreads, predictions, errors = zip(*rows, strict=True)
        yield from tables(
            Column("", names, "left"),
            [
                Column("predicted", predictions),
                Column("measured", measured),
                Column(glyphs.plus_minus, spreads, "right", "dim", tight=True),
                Column("prediction off by", errors),
            ],
            options=options,
            totals=run.speedup is not None,
            legend={glyphs.plus_minus: "half the interquartile range, in percent of the median"},
        )
