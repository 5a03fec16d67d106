"""A profile for other tools: tables as CSV or Parquet, the cost graph as GraphML. Each file is written whole or not."""

from __future__ import annotations

import importlib.util
import io
from pathlib import Path

from shardwright.errors import ShardwrightError
from shardwright.files import write_bytes, write_text
from shardwright.profiler.formats.graphml import graphml
from shardwright.profiler.profile import Profile

__all__ = ["check_parquet", "write_csv", "write_graphml", "write_parquet"]


def write_csv(profile: Profile, path: str | Path) -> None:
    """Write ``profile.frame()`` as CSV: a row for each node, device and number of micro-batches."""
    write_text(path, profile.frame().to_csv(index=False))


def write_parquet(profile: Profile, path: str | Path) -> None:
    """Write ``profile.frame()`` as Parquet.

    Raises:
        ShardwrightError: pyarrow is not installed.
    """
    check_parquet()
    buffer = io.BytesIO()
    profile.frame().to_parquet(buffer, engine="pyarrow", index=False)
    write_bytes(path, buffer.getvalue())


def check_parquet() -> None:
    """Refuse where Parquet cannot be written: better said before a measurement than after it.

    Raises:
        ShardwrightError: pyarrow is not installed.
    """
    try:
        found = importlib.util.find_spec("pyarrow")
    except ValueError:  # a module without a spec stands in its place
        found = None
    if found is None:
        raise ShardwrightError("Parquet needs pyarrow, which is not installed: pip install 'shardwright[parquet]'")


def write_graphml(profile: Profile, path: str | Path, microbatches: int | None = None) -> None:
    """Write the cost graph as GraphML, which ``networkx.read_graphml`` reads and ``sw.plan`` takes.

    Args:
        profile: what to write.
        path: where to.
        microbatches: at which of the profiled numbers; the largest by default, for a pipeline has them all in it.

    Raises:
        ShardwrightError: that number was not profiled, or the file cannot be written.
    """
    write_text(path, graphml(profile.graph(max(profile.microbatches) if microbatches is None else microbatches)))
