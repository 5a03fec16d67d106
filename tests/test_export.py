"""A profile for other tools: the tables and the graph that are read back are those of the profile."""

from __future__ import annotations

import sys

import networkx as nx
import pandas
import pytest
from pandas.testing import assert_frame_equal

import shardwright as sw
from shardwright.errors import ShardwrightError
from shardwright.profiler.formats.export import check_parquet, write_csv, write_graphml, write_parquet


@pytest.fixture
def profile(chain_profile):
    """Three units on two devices; the allocator's peak is known for one measurement."""
    made = chain_profile(3)
    first, *rest = made.measurements
    return made.model_copy(update={"measurements": (first.model_copy(update={"peak_bytes": 2**40 + 1}), *rest)})


def test_csv_is_the_frame(profile, tmp_path):
    """The table read back is the frame, whole numbers included."""
    write_csv(profile, tmp_path / "p.csv")
    found = pandas.read_csv(tmp_path / "p.csv", dtype={"peak_bytes": "Int64"})
    assert_frame_equal(found, profile.frame(), check_dtype=False)
    assert f",{2**40 + 1}," in (tmp_path / "p.csv").read_text()


def test_parquet_is_the_frame(profile, tmp_path):
    """The columns keep their types; a peak that was not measured is missing."""
    write_parquet(profile, tmp_path / "p.parquet")
    found = pandas.read_parquet(tmp_path / "p.parquet")
    assert_frame_equal(found, profile.frame())
    assert found.peak_bytes.dtype == "Int64"
    assert found.peak_bytes.notna().sum() == 1


def test_parquet_without_pyarrow(profile, tmp_path, monkeypatch):
    """Without pyarrow one line says what to install, and no file is begun."""
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    says = r"Parquet needs pyarrow, which is not installed: pip install 'shardwright\[parquet\]'"
    for act in (check_parquet, lambda: write_parquet(profile, tmp_path / "p.parquet")):
        with pytest.raises(ShardwrightError, match=says):
            act()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("asked", "is_of"), [(None, 4), (2, 2)])
def test_graphml_is_the_cost_graph(profile, tmp_path, asked, is_of):
    """The graph is of the largest number of micro-batches, or of the one that was asked for, and can be planned."""
    write_graphml(profile, tmp_path / "p.graphml", asked)
    graph = nx.read_graphml(tmp_path / "p.graphml")
    assert graph.graph["microbatches"] == is_of
    assert sw.plan(graph, microbatches=is_of).stages == sw.plan(profile, microbatches=is_of).stages


def test_what_cannot_be_written(profile, tmp_path):
    """A folder that is missing, and a number that was not profiled, leave nothing behind."""
    for write in (write_csv, write_parquet, write_graphml):
        with pytest.raises(ShardwrightError, match=r"cannot write .*: No such file or directory; choose a folder"):
            write(profile, tmp_path / "no" / "p")
    with pytest.raises(ShardwrightError, match="no times at 3 micro-batches; it has 1, 2, 4"):
        write_graphml(profile, tmp_path / "p.graphml", 3)
    assert not list(tmp_path.iterdir())
