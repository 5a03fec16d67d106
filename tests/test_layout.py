"""How tables fit a terminal."""

import io

import pytest
from rich.console import Console

from shardwright.reports.layout import Column, Glyphs, bar, fit, name_ranges, wrap_path


@pytest.mark.parametrize(
    ("names", "text"),
    [
        ([], ""),
        (["stem", "norm"], "stem, norm"),
        (["0", "1", "2", "3", "norm"], "0 … 3, norm"),
        (["0", "1", "5"], "0, 1, 5"),
        (["0", "2", "3", "4"], "0, 2 … 4"),
    ],
)
def test_name_ranges(names, text):
    """Three or more consecutive numbers are written as a range."""
    assert name_ranges(names, "…") == text


def test_columns_go_by_rank_and_groups_move_below():
    """On less width the highest rank goes first; then whole groups move to a second table, with room for their rest."""
    names = Column("unit", ["abcd"])
    columns = [Column("type", ["x"], drop=2), Column("size", ["y"])]
    groups = [[Column(f"dev{i}", ["1"]), Column("±", ["2"], drop=1, tight=True)] for i in range(2)]

    def headers(width):
        return [[column.header for column in table] for table in fit(names, columns, groups, width)]

    assert headers(32) == [["unit", "type", "size", "dev0", "±", "dev1", "±"]]
    assert headers(31) == [["unit", "size", "dev0", "±", "dev1", "±"]]
    assert headers(25) == [["unit", "size", "dev0", "dev1"]]
    assert headers(21) == [["unit", "size", "dev0", "±"], ["unit", "dev1", "±"]]


def test_long_paths_break_at_their_dots():
    """A path too long for its column is broken after a dot, and what follows is indented."""
    assert wrap_path("model.layers.0.self_attention", 16) == "model.layers.0.\n  self_attention"
    assert wrap_path("net1.block11", 16) == "net1.block11"


def test_bars_are_never_longer_than_their_length():
    """A bar fills its length at 1, shows something for anything above 0, and nothing for 0."""
    terminal = Glyphs.of(Console(file=io.TextIOWrapper(io.BytesIO(), encoding="utf-8")).options)
    assert [bar(share, 4, terminal) for share in (0, 0.001, 0.5, 0.625, 1, 2)] == ["", "▏", "██", "██▌", "████", "████"]
    assert bar(0.5, 4, terminal, track=True) == "██░░"
