"""The accounts of a run for a person: what each stage spent a step on, and which predicted costs were off."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from rich.console import Console, ConsoleOptions, RenderableType

from shardwright.reports.layout import Column, Glyphs, section, tables
from shardwright.reports.quantities import count, percent, seconds, signed_seconds
from shardwright.sharder.runtime.record import Account, Accounts, Off, Run

__all__ = ["AccountsReport"]

LEAST_SHARE = 0.01
"""A cost that changes the step by a smaller part of it is not shown."""
MOST_SHOWN = 6
_PARTS: tuple[tuple[str, Callable[[Account], float]], ...] = (
    ("compute", lambda account: account.compute_s),
    ("transfer", lambda account: account.transfer_s),
    ("waiting", lambda account: account.bubble_s),
)


class AccountsReport:
    """Accounts as a rich renderable, from about 60 columns up."""

    def __init__(self, run: Run, accounts: Accounts) -> None:
        self.run, self.accounts = run, accounts

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        """Two rows a stage, predicted and measured; then what the prediction was off by."""
        accounts, glyphs = self.accounts, Glyphs.of(options)
        note = (
            f"of a step of {seconds(accounts.measured_s)}, the median of {count(len(accounts.noted_s), 'step')} noted"
        )
        if (more := self.run.disturbance_percent) is not None:
            note += f" apart, {percent(abs(more))} {'longer' if more > 0 else 'shorter'} than those timed"
        yield section("Accounts", note)
        rows = [
            (f"{stage.device} {name}", account)
            for stage in accounts.stages
            for name, account in (("predicted", stage.predicted), ("measured", stage.measured))
        ]
        shown = [Column(name, [seconds(part(account)) for _, account in rows]) for name, part in _PARTS]
        other = [seconds(account.other_s) if account.other_s else glyphs.none for _, account in rows]
        step = [seconds(account.step_s) for _, account in rows]
        yield from tables(
            Column("", [name for name, _ in rows], "left"),
            [*shown, Column("other", other), Column("step", step)],
            options=options,
            row_styles=["dim", ""] * len(accounts.stages),
            legend={"waiting": "for other stages", "other": "the engine's own work"},
        )
        yield from self._off(options, glyphs)

    def _off(self, options: ConsoleOptions, glyphs: Glyphs) -> Iterator[RenderableType]:
        """The costs that explain the difference."""
        accounts = self.accounts
        # Rows that cancel out would say little of a prediction that was right: the least is of the step, not of them.
        shown = [each for each in accounts.off if abs(each.step_s) >= LEAST_SHARE * accounts.measured_s][:MOST_SHOWN]
        whole_s = sum(each.step_s for each in accounts.off)
        if not shown:
            return
        left_s = whole_s - sum(each.step_s for each in shown)
        names, differences = [_cost(each) for each in shown], [each.step_s for each in shown]
        predicted = [_priced(each.predicted_s, glyphs) for each in shown]
        measured = [_priced(each.measured_s, glyphs) for each in shown]
        if len(shown) < len(accounts.off):
            names, differences = [*names, "smaller ones"], [*differences, left_s]
        names, differences = [*names, "all"], [*differences, whole_s]
        blank = [""] * (len(names) - len(shown))
        sums = ", ties and sums" if self.run.replicas > 1 else " and ties"
        yield section("Where the prediction was off", f"costs of a micro-batch; update{sums} of a step")
        yield from tables(
            Column("", names, "left"),
            [
                Column("predicted", [*predicted, *blank]),
                Column("measured", [*measured, *blank]),
                Column("step longer by", [signed_seconds(value) for value in differences]),
            ],
            options=options,
            totals=True,
        )


def _priced(value_s: float | None, glyphs: Glyphs) -> str:
    return glyphs.none if value_s is None else seconds(value_s)


def _cost(off: Off) -> str:
    """A cost in words."""
    if off.what == "variation":
        return "devices' varying speed"
    if off.what == "rest":
        return "uneven micro-batches"
    if off.what == "transfers":
        return f"transfers {' - '.join(off.devices)}"
    return f"{off.what} on {off.devices[0]}"
