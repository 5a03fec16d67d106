"""How pins and groups name units."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Sequence
from fnmatch import fnmatchcase

from shardwright.profiler.costgraph import CostGraph

__all__ = ["Pinned", "matching"]

Pinned = Sequence[tuple[str, Collection[str]]]
"""Of each pin its device, and the units that it names."""


def matching(graph: CostGraph, pattern: str) -> set[str]:
    """The names that a shell pattern is of: of units and other nodes, and of the units in a module that it is of.

    A unit may be in another, as a layer that a forward calls past the module around it: the path of that is its own.
    """
    units = {path for data in graph.nodes.values() if (path := data.get("unit"))}
    names = {data.get("unit") or name for name, data in graph.nodes.items()}
    within = {unit for unit in units if any(fnmatchcase(p, pattern) for p in _modules_around(unit) if p not in units)}
    return within | {name for name in names if fnmatchcase(name, pattern)}


def _modules_around(path: str) -> list[str]:
    """The paths of the modules that a unit is in."""
    return list(itertools.accumulate(path.split(".")[:-1], "{}.{}".format))
