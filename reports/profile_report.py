"""The profile for a person: what each unit costs on each device, and how that changes with the micro-batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from rich.console import Console, ConsoleOptions, RenderableType
from rich.text import Text

from shardwright.profiler.profile import Device, Measurement, Node, Profile
from shardwright.reports.layout import Column, Glyphs, bar, facts, indented, name_ranges, section, tables
from shardwright.reports.link_report import link_section
from shardwright.reports.measured_report import measured_section
from shardwright.reports.origins import mark, not_measured
from shardwright.reports.quantities import count, memory_of, number_of_bytes, percent, seconds, share, spread

__all__ = ["ProfileReport"]

SMALLEST_GLUE = 0.001
"""Glue below this share of the step is summed up in one row."""


@dataclass(frozen=True)
class _Row:
    """A line of the table of units: one node, or several that are summed."""

    label: str
    type: str
    nodes: tuple[Node, ...]
    style: str = ""
    path: str = ""
    """In the model; the rows below a path are indented under a row that sums them."""
    sums: bool = False
    """A row that sums those below it."""

    def memory(self, quantity: str, microbatches: int) -> int:
        """Bytes of ``quantity``, a field of :class:`Node`."""
        values = [getattr(node, quantity) for node in self.nodes]
        return sum(value.get(microbatches, 0) if isinstance(value, dict) else value for value in values)


class ProfileReport:
    """A profile as a rich renderable, from about 60 columns up."""

    def __init__(self, profile: Profile) -> None:
        self.profile = profile
        self.microbatches = min(profile.microbatches)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        """Header, units, totals, steps, links."""
        glyphs = Glyphs.of(options)
        yield from self._header(glyphs)
        yield from self._units(options, glyphs)
        yield from self._faithful()
        yield from self._memory()
        yield from self._steps(options, glyphs)
        yield from measured_section(self.profile)
        yield from link_section(self.profile.links, options)
        yield from self._engine()

    def _engine(self) -> Iterator[RenderableType]:
        """What a pipeline adds to the units' times."""
        slowest_s = max(device.engine_s for device in self.profile.devices)
        if slowest_s:
            each = "each forward and each backward" if self.profile.train else "each forward"
            text = f"A pipeline's engine takes {seconds(slowest_s)} for {each} of a micro-batch."
            yield indented(Text(text, style="dim"))

    def _header(self, glyphs: Glyphs) -> Iterator[RenderableType]:
        profile = self.profile
        work = f"training with {profile.optimizer}" if profile.train else "inference"
        inputs = [str(spec) if len(profile.inputs) == 1 else f"{spec.name} {spec}" for spec in profile.inputs]
        yield Text(profile.model, style="bold")
        measured = [
            ("step", f"{work}, batch {profile.batch}, torch {profile.torch_version}"),
            ("inputs", ", ".join(inputs)),
        ]
        given = [("step", f"{'training' if profile.train else 'inference'}, costs as given, of no model")]
        yield facts(
            [
                *(measured if profile.of_model else given),
                *((device.name, _describe(device, glyphs)) for device in profile.devices),
            ]
        )
        yield from not_measured(profile, glyphs)

    def _times(self, row: _Row, device: str) -> list[Measurement]:
        found = (self.profile.measurement(node.name, device, self.microbatches) for node in row.nodes)
        return [measurement for measurement in found if measurement is not None]

    def _compute_s(self, row: _Row, device: str) -> float:
        return sum(m.forward_s + m.backward_s for m in self._times(row, device))

    def _rows(self) -> list[_Row]:
        """Units, parameters and glue in the order of the forward, the small glue in one row, and the total."""
        everything = _Row("total", "", self.profile.nodes, "bold")
        wholes = {device.name: self._compute_s(everything, device.name) for device in self.profile.devices}
        calls: dict[str, list[Node]] = {}
        for node in self.profile.nodes:
            if node.kind == "unit":
                calls.setdefault(node.unit, []).append(node)
        rows, small = [], []
        for node in self.profile.nodes:
            if node.kind == "unit":
                if of_unit := calls.pop(node.unit, []):  # all of its calls in one row, where it is first called
                    again = f" ({count(len(of_unit), 'call')})" if len(of_unit) > 1 else ""
                    rows.append(_Row(again, node.type, tuple(of_unit), path=node.unit))
            elif node.kind == "parameter" and node.static_bytes:
                rows.append(_Row("", "parameter", (node,), path=node.unit))
            elif node.kind == "glue":
                glue = _Row(f"glue: {node.name}", node.type, (node,), "dim")
                shares = [self._compute_s(glue, device) / whole for device, whole in wholes.items() if whole]
                if max(shares, default=0.0) >= SMALLEST_GLUE:
                    rows.append(glue)
                else:
                    small.append(node)
            elif node.kind == "output" and any(self._compute_s(_Row("", "", (node,)), name) for name in wholes):
                label = "output and its loss" if self.profile.train else "output"
                rows.append(_Row(label, node.type, (node,), "dim"))
        rest = [_Row(f"glue: {count(len(small), 'small call')}", "", tuple(small), "dim")] if small else []
        return [*_tree(rows), *rest, everything]

    def _units(self, options: ConsoleOptions, glyphs: Glyphs) -> Iterator[RenderableType]:
        rows = self._rows()
        first = self.profile.devices[0].name
        whole = self._compute_s(rows[-1], first)
        shares = [self._compute_s(row, first) / whole if whole else 0.0 for row in rows[:-1]]
        largest = max((part for part, row in zip(shares, rows, strict=False) if not row.sums), default=0.0) or 1.0
        bars = ["" if row.sums else bar(part / largest, 6, glyphs) for part, row in zip(shares, rows, strict=False)]

        def memory(quantity: str) -> list[str]:
            return [
                number_of_bytes(size) if (size := row.memory(quantity, self.microbatches)) else glyphs.none
                for row in rows
            ]

        columns = [
            Column("type", [row.type for row in rows], "left", drop=3),
            Column("params", memory("param_bytes")),
            *([Column("saved", memory("saved_bytes"))] if self.profile.train else []),
            Column("output", memory("output_bytes"), drop=1),
            Column("share", [*(share(part) for part in shares), ""], drop=4),
            Column("", [*bars, ""], "left", "cyan", drop=5, tight=True),
        ]
        batch = "the whole batch" if self.microbatches == 1 else f"one of {count(self.microbatches, 'micro-batch')}"
        yield section("Units", f"{batch}; times are medians" if self.profile.of_model else batch)
        yield from tables(
            Column("unit", [row.label for row in rows], "left"),
            columns,
            [self._device_columns(rows, device.name, glyphs) for device in self.profile.devices],
            options=options,
            row_styles=[row.style for row in rows],
            totals=True,
            legend={
                "share": f"of the time on {first}",
                glyphs.plus_minus: "half the interquartile range of the repeats, in percent of the median",
            },
        )

    def _device_columns(self, rows: Sequence[_Row], device: str, glyphs: Glyphs) -> list[Column]:
        """Forward and backward on ``device``, and their spread; the total has none, as spreads do not add up."""
        directions = ["forward", "backward"] if self.profile.train else ["forward"]
        times = [self._times(row, device) for row in rows]
        columns: list[Column] = []
        for direction in directions:
            medians = [
                mark([m.source for m in row], glyphs) + seconds(sum(getattr(m, f"{direction}_s") for m in row))
                if row
                else glyphs.none
                for row in times
            ]
            columns.append(Column(f"{'' if columns else device}\n{direction}", medians))
        if not self.profile.of_model:
            return columns
        spreads = []
        for row in times[:-1]:
            deviation = sum(m.forward_spread_s + m.backward_spread_s for m in row)
            median = sum(m.forward_s + m.backward_s for m in row)
            timed = median and all(m.source == "measured" for m in row)
            spreads.append(f"{glyphs.plus_minus}{spread(deviation, median)}" if timed else "")
        if not any(spreads):
            return columns
        return [*columns, Column(f"\n{glyphs.plus_minus}", [*spreads, ""], "right", "dim", drop=2, tight=True)]

    def _faithful(self) -> Iterator[RenderableType]:
        """What stands against piping or dividing, and what a pipeline relies on."""
        profile = self.profile
        rows = [("cannot be piped", text) for text in profile.obstacles]
        rows += [("not divided", profile.undivided)] if profile.undivided and not profile.obstacles else []
        rows += [("piped while", text) for text in profile.guards]
        anew = sum(node.checkpointed for node in profile.nodes)
        rows += [("checkpointed", f"{count(anew, 'step')}, computed anew in the backward")] if anew else []
        tied = [f"{tie.name} is used by {count(len(tie.nodes), 'step')}" for tie in profile.ties]
        rows += [("tied", text) for text in tied]
        if rows:
            yield section("Capture", "what the forward does that a pipeline has to know")
            names = ["", *(name for name, _ in rows)]
            yield facts(
                [("" if name == before else name, text) for before, (name, text) in zip(names, rows, strict=False)]
            )

    def _memory(self) -> Iterator[RenderableType]:
        """What the model holds on one device, in one line."""
        whole = _Row("", "", self.profile.nodes)
        parts = [("param_bytes", "parameters"), ("buffer_bytes", "buffers")]
        if self.profile.train:
            # Costs from elsewhere do not tell buffers and optimizer state apart.
            state = "optimizer state" if self.profile.of_model else "optimizer state and buffers"
            parts += [("grad_bytes", "gradients"), ("optimizer_bytes", state), ("saved_bytes", "saved for backward")]
        sizes = [(whole.memory(quantity, self.microbatches), name) for quantity, name in parts]
        parts_text = " + ".join(f"{name} {number_of_bytes(size)}" for size, name in sizes if size)
        yield section("Memory", "of a step on one device, temporaries apart")
        whole_text = Text(number_of_bytes(sum(size for size, _ in sizes)), style="bold")
        yield indented(Text.assemble(whole_text, f" = {parts_text}" if parts_text else ""))

    def _steps(self, options: ConsoleOptions, glyphs: Glyphs) -> Iterator[RenderableType]:
        """The step on each device at each number of micro-batches, against the smallest number."""
        profile = self.profile
        counts = sorted(profile.microbatches)
        measured = {(m.device, m.microbatches) for m in profile.measurements}
        groups = []
        for device in profile.devices:
            steps = [profile.step_s(device.name, c) if (device.name, c) in measured else None for c in counts]
            reference = steps[0]
            changes = [
                percent(100 * (step / reference - 1), signed=True) if step and reference else "" for step in steps
            ]
            sign = mark([m.source for m in profile.measurements if m.device == device.name], glyphs)
            groups.append(
                [
                    Column(device.name, [glyphs.none if step is None else sign + seconds(step) for step in steps]),
                    Column("", ["", *changes[1:]], "right", "dim", drop=1, tight=True),
                ]
            )
        update = "forward, backward and optimizer step" if profile.train else "forward"
        yield section("One device alone", f"the whole batch in micro-batches: {update}")
        yield from tables(
            Column("micro-batches", [str(c) for c in counts], "right"),
            [Column("samples each", [f"{profile.batch / c:.3g}" for c in counts])] if profile.of_model else [],
            groups,
            options=options,
        )


def _tree(rows: Sequence[_Row]) -> Iterator[_Row]:
    """The rows, indented by their paths, with a row for each module that holds several of them."""
    children: dict[str, set[str]] = {}
    for path in {row.path for row in rows if row.path}:
        parts = path.split(".")
        for depth in range(len(parts)):
            children.setdefault(".".join(parts[:depth]), set()).add(parts[depth])
    below: dict[str, list[Node]] = {}
    for row in rows:
        for holder in _holders(row.path, children):
            below.setdefault(holder, []).extend(row.nodes)
    paths: list[str] = []  # of each row, or of the next that has one
    for row in reversed(rows):
        paths.append(row.path or (paths[-1] if paths else ""))
    open_: list[str] = []
    for row, path in zip(rows, reversed(paths), strict=True):
        # Glue is in a module that is open if what comes next is.
        holders = _holders(path, children)
        while open_ and open_[-1] not in holders:
            open_.pop()
        if not row.path:
            yield replace(row, label="  " * len(open_) + row.label)
            continue
        for holder in holders[len(open_) :]:
            nodes = tuple(below.pop(holder, ()))  # summed where it is first met
            yield _Row("  " * len(open_) + _under(open_, holder), "", nodes, "dim", holder, sums=True)
            open_.append(holder)
        yield replace(row, label="  " * len(open_) + _under(open_, row.path) + row.label)


def _holders(path: str, children: dict[str, set[str]]) -> list[str]:
    """The modules above ``path`` that hold more than one thing, outermost first, the model itself left out."""
    parts = path.split(".")
    above = [".".join(parts[:depth]) for depth in range(1, len(parts))]
    return [holder for holder in above if len(children[holder]) > 1]


def _under(holders: Sequence[str], path: str) -> str:
    return path.removeprefix(f"{holders[-1]}.") if holders else path


def _describe(device: Device, glyphs: Glyphs) -> str:
    """What the device is, its cores and its memory."""
    cores = [f"{'cores' if len(device.cores) > 1 else 'core'} {name_ranges([*map(str, device.cores)], glyphs.dots)}"]
    description = [device.description] if device.description else []
    node = [f"on {device.node}"] if device.node else []
    return ", ".join([*description, *node, *(cores if device.cores else []), memory_of(device.memory_bytes)])
