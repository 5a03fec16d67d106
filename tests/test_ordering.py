"""Orders and components against those of networkx."""

import networkx as nx
from hypothesis import given
from hypothesis import strategies as st

from shardwright.profiler.costgraph import CostGraph
from shardwright.profiler.ordering import connected_groups, strong_components, topological_order

NODES = 9
GRAPHS = st.lists(st.tuples(st.integers(0, NODES - 1), st.integers(0, NODES - 1)), max_size=20)


def after(edges):
    return {node: [target for source, target in edges if source == node] for node in range(NODES)}


def as_networkx(edges):
    graph = nx.DiGraph()
    graph.add_nodes_from(range(NODES))
    graph.add_edges_from(edges)
    return graph


@given(GRAPHS, st.permutations(range(NODES)))
def test_topological_order_is_that_of_networkx(edges, ranks):
    """Of graphs without a cycle; of one with, it has those nodes that no cycle leads to, each behind its sources."""
    graph, order = as_networkx(edges), topological_order(after(edges), ranks.__getitem__)
    if nx.is_directed_acyclic_graph(graph):
        assert order == list(nx.lexicographical_topological_sort(graph, key=ranks.__getitem__))
        return
    turning = {node for node in graph if any(node in nx.descendants(graph, t) or node == t for t in graph[node])}
    led_to = turning.union(*(nx.descendants(graph, node) for node in turning))
    assert order == list(
        nx.lexicographical_topological_sort(graph.subgraph(set(graph) - led_to), key=ranks.__getitem__)
    )


@given(GRAPHS)
def test_strong_components_are_those_of_networkx(edges):
    """Each node is in one list, beside all that it reaches and that reach it."""
    found = strong_components([after(edges)[node] for node in range(NODES)])
    assert sorted(map(sorted, found)) == sorted(map(sorted, nx.strongly_connected_components(as_networkx(edges))))


@given(st.lists(st.lists(st.integers(0, NODES - 1), max_size=3), max_size=5))
def test_groups_are_joined_where_they_have_a_node_in_common(groups):
    """As an undirected graph of paths through the groups has it, in the order of the nodes."""
    graph = nx.Graph()
    graph.add_nodes_from(range(NODES))
    for group in groups:
        nx.add_path(graph, group)
    assert connected_groups(range(NODES), groups) == list(nx.connected_components(graph))


@given(st.lists(st.tuples(st.sampled_from("abcde"), st.sampled_from("abcde")), max_size=12, unique=True))
def test_a_cost_graph_is_the_same_in_networkx(edges):
    """There and back every name, attribute and order stays; edges that are left out are gone."""
    graph = nx.DiGraph(name="g")
    graph.add_nodes_from("edcba", size=1)
    graph.add_edges_from(edges, tensors={})
    plain = CostGraph.of(graph)
    assert list(plain) == list(graph)
    assert list(plain.edges()) == list(graph.edges(data=True))
    assert all(list(plain.successors(node)) == list(graph.successors(node)) for node in graph)
    assert all(set(plain.predecessors(node)) == set(graph.predecessors(node)) for node in graph)
    again = plain.networkx()
    assert (again.graph, list(again.nodes(data=True))) == (graph.graph, list(graph.nodes(data=True)))
    assert list(again.edges(data=True)) == list(graph.edges(data=True))
    cut = plain.changed({"train": True}, without=edges[:1])
    assert cut.graph == {"name": "g", "train": True}
    assert [edge[:2] for edge in cut.edges()] == [edge for edge in graph.edges if edge not in edges[:1]]
    assert list(plain.edges()) == list(graph.edges(data=True))
