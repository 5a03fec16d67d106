"""Units that a person wants on one device: cuts that are forbidden."""

from __future__ import annotations

from collections.abc import Iterable

from shardwright.errors import ShardwrightError
from shardwright.profiler.costgraph import CostGraph
from shardwright.sharder.planning.formulation.patterns import Pinned, matching

__all__ = ["groups_together"]


def groups_together(
    graph: CostGraph, together: Iterable[str | Iterable[str]], pinned: Pinned
) -> tuple[tuple[str, ...], ...]:
    """The nodes of each group that is to share a device, as groups for ``colocate``.

    Args:
        graph: a cost graph.
        together: units, modules or patterns, or groups of them; all units that an entry matches are one group.
        pinned: what pins name.

    Raises:
        ShardwrightError: a pattern matches nothing, or the units of an entry are pinned to several devices.
    """
    names = {node: data.get("unit") or node for node, data in graph.nodes.items()}
    groups = []
    for entry in [together] if isinstance(together, str) else together:
        patterns = [entry] if isinstance(entry, str) else list(entry)
        words = ",".join(patterns)
        units = set[str]()
        for pattern in patterns:
            if not (found := matching(graph, pattern)):
                raise ShardwrightError(f"together {words}: no unit matches {pattern!r}; `profile` lists the units")
            units |= found
        nodes = tuple(node for node, name in names.items() if name in units)
        _refuse_several_devices(words, [names[node] for node in nodes], pinned)
        groups.append(nodes)
    return tuple(groups)


def _refuse_several_devices(words: str, units: Iterable[str], pinned: Pinned) -> None:
    wanted = {device: unit for unit in units for device, named in pinned if unit in named}
    if len(wanted) > 1:
        (one, a), (other, b) = list(wanted.items())[:2]
        raise ShardwrightError(
            f"together {words} has {a}, which is pinned to {one}, and {b}, which is pinned to {other}: pin them alike, "
            "or leave one of them out of the group"
        )
