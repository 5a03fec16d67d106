"""The cost graph in plain dicts, as planning reads it: importing networkx takes as long as a plan does.

Attributes are those of :mod:`shardwright.profiler.graph`, and iteration has the order of networkx.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import networkx as nx

__all__ = ["CostGraph"]

Attributes = dict[str, Any]


class CostGraph:
    """A directed graph whose nodes and edges have attributes; iterated over, it gives its nodes in their order.

    Args:
        attributes: of the graph.
        nodes: name -> attributes.
        edges: source, target and attributes; both ends are among the nodes, and no pair is there twice.
    """

    def __init__(
        self,
        attributes: Mapping[str, Any],
        nodes: Mapping[str, Attributes],
        edges: Iterable[tuple[str, str, Attributes]],
    ) -> None:
        self.graph = dict(attributes)
        self.nodes = dict(nodes)
        self._after: dict[str, dict[str, Attributes]] = {name: {} for name in self.nodes}
        for source, target, data in edges:
            self._after[source][target] = data

    @classmethod
    def of(cls, graph: nx.DiGraph[str]) -> CostGraph:
        """``graph``, whose attributes are shared, not copied."""
        return cls(graph.graph, {name: graph.nodes[name] for name in graph}, graph.edges(data=True))

    def networkx(self) -> nx.DiGraph[str]:
        """The same graph for other tools; the attributes of nodes and edges are copied."""
        import networkx as nx

        made: nx.DiGraph[str] = nx.DiGraph()
        made.graph.update(self.graph)
        for name, data in self.nodes.items():
            made.add_node(name)
            made.nodes[name].update(data)  # as keyword arguments some names would not do
        for source, target, data in self.edges():
            made.add_edge(source, target)
            made.edges[source, target].update(data)
        return made

    def __iter__(self) -> Iterator[str]:
        return iter(self.nodes)

    def __contains__(self, name: object) -> bool:
        return name in self.nodes

    def edges(self) -> Iterator[tuple[str, str, Attributes]]:
        """Source, target and attributes, by source in the order of the nodes."""
        return ((source, target, data) for source, after in self._after.items() for target, data in after.items())

    def edge(self, source: str, target: str) -> Attributes:
        """The attributes of an edge that is there."""
        return self._after[source][target]

    def successors(self, name: str) -> Iterable[str]:
        """The nodes that read ``name``."""
        return self._after[name].keys()

    def predecessors(self, name: str) -> Iterable[str]:
        """The nodes that ``name`` reads, in the order of the nodes."""
        return self._before[name]

    @cached_property
    def _before(self) -> dict[str, list[str]]:
        before: dict[str, list[str]] = {name: [] for name in self.nodes}
        for source, target, _ in self.edges():
            before[target].append(source)
        return before

    def changed(self, attributes: Mapping[str, Any], without: Iterable[tuple[str, str]]) -> CostGraph:
        """The graph with other ``attributes`` of its own, and without some of its edges; the rest is shared."""
        left_out = set(without)
        kept = (edge for edge in self.edges() if edge[:2] not in left_out)
        return CostGraph({**self.graph, **attributes}, self.nodes, kept)
