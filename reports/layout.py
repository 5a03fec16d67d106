"""Tables that choose what to show by the width they are given.

A table is a list of columns. Every column has a natural width. Columns with a ``drop`` rank go, highest rank first,
until the rest fits. Columns in groups (a device's times) stay together; groups that do not fit beside the others follow
in a further table under the same names. So nothing is cut off: on a narrow terminal there is less, or it stands below.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Literal

from rich.box import Box
from rich.cells import cell_len
from rich.console import ConsoleOptions, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

__all__ = [
    "Column",
    "Glyphs",
    "bar",
    "facts",
    "fit",
    "indented",
    "listing",
    "name_ranges",
    "section",
    "tables",
    "wrap_path",
]

INDENT = 2
SHORTEST_NAMES = 24
"""Longer names are wrapped at their dots down to this width before a column is dropped for them."""

_RULES = " {0}{0} "
_BOX_LINES = ("    ", "    ", _RULES, "    ", _RULES, _RULES, "    ", "    ")


@dataclass(frozen=True)
class Glyphs:
    """The few characters beyond ASCII, with what stands for them on a terminal that has none."""

    plus_minus: str
    dots: str
    none: str
    full: str
    empty: str
    parts: str
    """A bar's last character, from the emptiest to the fullest; may be empty."""
    chosen: str
    rule: str
    arrow: str
    scaled: str
    waits: str
    """A moment in which nothing is done."""
    heights: str
    """Of eight steps, from the lowest."""
    estimated: str = "~"

    @classmethod
    def of(cls, options: ConsoleOptions) -> Glyphs:
        """Those that the console can show."""
        return _ASCII if options.ascii_only else _UNICODE

    @property
    def box(self) -> Box:
        """Rules under the header and before the totals, and no other line."""
        return Box("".join(line.format(self.rule) + "\n" for line in _BOX_LINES), ascii=self.rule == "-")


_UNICODE = Glyphs("±", "…", "–", "█", "░", "▏▎▍▌▋▊▉", "◀", "─", "→", "≈", "·", "▁▂▃▄▅▆▇█")  # noqa: RUF001  the dash is meant
_ASCII = Glyphs("+-", "...", "-", "#", ".", "", "<", "-", "->", "=", ".", "_.:-=+*#")


@dataclass(frozen=True)
class Column:
    """One column: a header (of one or two lines) and a cell for every row."""

    header: str
    cells: Sequence[str]
    justify: Literal["left", "right"] = "right"
    style: str = ""
    drop: int = 0
    """0 stays; otherwise the highest rank is dropped first."""
    tight: bool = False
    """It belongs to the column before it: one blank between them, not two."""

    @property
    def content_width(self) -> int:
        """The longest line of its cells and its header."""
        return max(cell_len(line) for cell in (self.header, *self.cells) for line in cell.split("\n"))

    @property
    def width(self) -> int:
        """What it takes beside another: its content and the blanks before it."""
        return self.content_width + (1 if self.tight else 2)


def wrap_path(path: str, width: int) -> str:
    """Break a dotted ``path`` after its dots into lines of at most ``width``, the later ones indented by two."""
    lines, line = [], ""
    parts = path.split(".")
    for index, part in enumerate(parts):
        piece = part + ("." if index + 1 < len(parts) else "")
        if line.strip() and cell_len(line + piece) > width:
            lines.append(line)
            line = "  "
        line += piece
    return "\n".join([*lines, line])


def bar(share: float, length: int, glyphs: Glyphs, *, track: bool = False) -> str:
    """``share`` (0 to 1) of ``length`` characters; with ``track``, the rest of the length is shown too."""
    steps = len(glyphs.parts) + 1
    filled = round(min(max(share, 0.0), 1.0) * length * steps)
    if share > 0:
        filled = max(filled, 1)
    text = glyphs.full * (filled // steps) + (glyphs.parts[filled % steps - 1] if filled % steps else "")
    return text + glyphs.empty * (length - len(text)) if track else text


def name_ranges(names: Sequence[str], dots: str) -> str:
    """``names`` in a list in which consecutive numbers are a range: ``0 … 39, norm``."""
    pieces: list[str] = []
    # Consecutive numbers less their position are one constant; a name that is no number is its own key.
    keyed = [((int(name) - at) if name.isdecimal() else name, name) for at, name in enumerate(names)]
    for _, run in groupby(keyed, key=lambda pair: pair[0]):
        members = [name for _, name in run]
        pieces += [f"{members[0]} {dots} {members[-1]}"] if len(members) > 2 else members
    return ", ".join(pieces)


def _total_width(names: Column, columns: Sequence[Column]) -> int:
    """The width of a table whose names are wrapped as far as they may be."""
    return min(names.content_width, SHORTEST_NAMES) + sum(column.width for column in columns)


def fit(names: Column, columns: Sequence[Column], groups: Sequence[Sequence[Column]], width: int) -> list[list[Column]]:
    """Choose the tables that show ``groups`` within ``width``; ``columns`` stand in the first, ``names`` in each."""
    found = []
    beside = list(columns)
    waiting = list(groups)
    while beside or waiting:
        taken: list[Sequence[Column]] = []
        needed = [column for column in beside if not column.drop]
        while waiting and (
            not (taken or needed) or _total_width(names, [*needed, *(c for c in waiting[0] if not c.drop)]) <= width
        ):
            taken.append(waiting.pop(0))
            needed += [column for column in taken[-1] if not column.drop]
        shown = [*beside, *(column for group in taken for column in group)]
        while _total_width(names, shown) > width and any(column.drop for column in shown):
            highest = max(column.drop for column in shown)
            shown = [column for column in shown if column.drop < highest]
        room = max(width - sum(column.width for column in shown), min(names.content_width, SHORTEST_NAMES))
        found.append([replace(names, tight=True, cells=[wrap_path(cell, room) for cell in names.cells]), *shown])
        beside = []
    return found


def tables(
    names: Column,
    columns: Sequence[Column],
    groups: Sequence[Sequence[Column]] = (),
    *,
    options: ConsoleOptions,
    row_styles: Sequence[str] = (),
    totals: bool = False,
    legend: Mapping[str, str] | None = None,
) -> Iterator[RenderableType]:
    """The tables of :func:`fit` under each other, indented.

    Args:
        names: the first column of every table.
        columns: what stands beside it in the first.
        groups: columns that stay together; a group that does not fit goes to a further table.
        options: of the console, for its width and its characters.
        row_styles: a style for each row.
        totals: the last row stands under a rule.
        legend: last line of a header -> what it means; said below where such a column is shown.
    """
    explained: dict[str, None] = {}
    for at, shown in enumerate(fit(names, columns, groups, options.max_width - INDENT)):
        table = Table(
            box=Glyphs.of(options).box, show_edge=False, padding=0, pad_edge=False, header_style="bold", safe_box=False
        )
        lines = max(column.header.count("\n") for column in shown)
        for column in shown:
            table.add_column(
                _text(column, "\n" * (lines - column.header.count("\n")) + column.header),
                justify=column.justify,
                style=column.style,
                width=None if column is shown[0] else column.width - 1,
                overflow="fold",
            )
        for row, style in enumerate(row_styles or [""] * len(names.cells)):
            if totals and row == len(names.cells) - 1:
                table.add_section()
            table.add_row(*(_text(column, column.cells[row]) for column in shown), style=style)
        if at:
            yield ""
        yield indented(table)
        headers = [column.header.rpartition("\n")[2] for column in shown]
        explained |= dict.fromkeys(f"{header} {legend[header]}" for header in headers if legend and header in legend)
    if explained:
        yield indented(Text("; ".join(explained), style="dim"))


def _text(column: Column, text: str) -> Text:
    """``text`` with the blank of a ``column`` that is not tight, beside the one that the box sets between columns."""
    own = " " if column.justify == "left" and not column.tight else ""
    return Text(own + text.replace("\n", f"\n{own}"), justify=column.justify)


def indented(renderable: RenderableType) -> Padding:
    """``renderable`` below its section's title."""
    return Padding(renderable, (0, 0, 0, INDENT), expand=False)


def section(title: str, note: str = "") -> Text:
    """A blank line and a title, with what a reader must know about the numbers below it."""
    text = Text("\n").append(title, style="bold")
    return text.append(f"  {note}", style="dim") if note else text


def facts(pairs: Sequence[tuple[str, str]]) -> Padding:
    """Names and their values, a line each."""
    grid = Table.grid(padding=(0, 2))
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    for name, value in pairs:
        grid.add_row(Text(name, style="dim"), Text(value))
    return indented(grid)


def listing(header: Sequence[str], rows: Sequence[Sequence[str]]) -> Padding:
    """A table whose last column wraps; a first cell that repeats the one above it is left blank."""
    table = Table.grid(padding=(0, 2))
    for _ in header:
        table.add_column(overflow="fold")
    table.add_row(*(Text(name, style="dim") for name in header))
    for at, row in enumerate(rows):
        first = "" if at and rows[at - 1][0] == row[0] else row[0]
        table.add_row(Text(first, style="bold"), *map(Text, row[1:]))
    return indented(table)
