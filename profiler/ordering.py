"""Orders and components of directed graphs, which are given as each node's successors."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

__all__ = ["connected_groups", "strong_components", "topological_order"]

Node = TypeVar("Node", bound=Hashable)


def topological_order(after: Mapping[Node, Iterable[Node]], rank: Callable[[Node], Any]) -> list[Node]:
    """The nodes, each behind all that come before it, and otherwise by ``rank``, of which no two have the same.

    Of a graph with a cycle, those nodes that no cycle leads to: fewer than there are.
    """
    open_before = dict.fromkeys(after, 0)
    for targets in after.values():
        for target in targets:
            open_before[target] += 1
    ready = [(rank(node), node) for node, count in open_before.items() if not count]
    heapq.heapify(ready)
    order: list[Node] = []
    while ready:
        node = heapq.heappop(ready)[1]
        order.append(node)
        for target in after[node]:
            open_before[target] -= 1
            if not open_before[target]:
                heapq.heappush(ready, (rank(target), target))
    return order


def connected_groups(nodes: Iterable[Node], groups: Iterable[Sequence[Node]]) -> list[set[Node]]:
    """The ``nodes`` in sets: two are in the same one if a chain of ``groups`` joins them."""
    set_of = {node: {node} for node in nodes}
    for group in groups:
        for node in group:
            one, other = set_of[group[0]], set_of[node]
            if one is other:
                continue
            if len(one) < len(other):
                one, other = other, one
            one |= other
            set_of.update(dict.fromkeys(other, one))
    return list({id(set_): set_ for set_ in set_of.values()}.values())


def strong_components(after: Sequence[Iterable[int]]) -> list[list[int]]:
    """The nodes 0, 1, … in lists: two are in the same one if each can be reached from the other.

    By two searches into the depth, the second against the edges, from the nodes that the first one left last
    (Sharir, "A strong-connectivity algorithm and its applications in data flow analysis", 1981).
    """
    before: list[list[int]] = [[] for _ in after]
    for node, targets in enumerate(after):
        for target in targets:
            before[target].append(node)
    taken = [False] * len(after)
    components: list[list[int]] = []
    for root in reversed(_as_left(after)):
        if taken[root]:
            continue
        taken[root] = True
        component = [root]
        for node in component:  # which grows
            for source in before[node]:
                if not taken[source]:
                    taken[source] = True
                    component.append(source)
        components.append(component)
    return components


def _as_left(after: Sequence[Iterable[int]]) -> list[int]:
    """The nodes in the order in which a search into the depth has nothing left behind them."""
    left: list[int] = []
    seen = [False] * len(after)
    for root in range(len(after)):
        path = [] if seen[root] else [(root, iter(after[root]))]
        seen[root] = True
        while path:
            node, targets = path[-1]
            for target in targets:
                if not seen[target]:
                    seen[target] = True
                    path.append((target, iter(after[target])))
                    break
            else:
                left.append(node)
                path.pop()
    return left
