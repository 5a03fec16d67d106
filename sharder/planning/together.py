"""Units that a person wants on one device: cuts that are forbidden."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from shardwright.errors import ShardwrightError
from shardwright.profiler.costgraph import CostGraph
from shardwright.sharder.planning.patterns import matches

__all__ = ["groups_together"]


def groups_together(
    graph: CostGraph, together: Iterable[str | Iterable[str]], pins: Mapping[str, str]
) -> tuple[tuple[str, ...], ...]:
    """The nodes of each group that is to share a device, as groups for ``colocate``.

    Args:
        graph: a cost graph.
        together: units, modules or patterns, or groups of them; all units that an entry matches are one group.
        pins: unit, module or pattern -> device.

    Raises:
        ShardwrightError: a pattern matches nothing, or the units of an entry are pinned to several devices.
    """
    names = {node: data.get("unit") or node for node, data in graph.nodes.items()}
    groups = []
    for entry in [together] if isinstance(together, str) else together:
        patterns = [entry] if isinstance(entry, str) else list(entry)
        words = ",".join(patterns)
        for pattern in patterns:
            if not any(matches(name, pattern) for name in names.values()):
                raise ShardwrightError(f"together {words}: no unit matches {pattern!r}; `profile` lists the units")
        nodes = tuple(n for n, name in names.items() if any(matches(name, pattern) for pattern in patterns))
        _refuse_several_devices(words, [names[node] for node in nodes], pins)
        groups.append(nodes)
    return tuple(groups)


def _refuse_several_devices(words: str, units: Iterable[str], pins: Mapping[str, str]) -> None:
    pinned = {device: unit for unit in units for pattern, device in pins.items() if matches(unit, pattern)}
    if len(pinned) > 1:
        (one, a), (other, b) = list(pinned.items())[:2]
        raise ShardwrightError(
            f"together {words} has {a}, which is pinned to {one}, and {b}, which is pinned to {other}: pin them alike, "
            "or leave one of them out of the group"
        )
