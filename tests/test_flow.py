"""Flows against those of networkx, and what is left of them when the time passes."""

from __future__ import annotations

import networkx as nx
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shardwright.sharder.planning.wide.flow import Network

NODES = 8
edges = st.lists(
    st.tuples(st.integers(0, NODES - 1), st.integers(0, NODES - 1), st.sampled_from([0, 1, 2, 3, 7, 10**12])),
    max_size=40,
)
often = settings(max_examples=300, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))


def network_of(found):
    network = Network(NODES)
    for source, target, capacity in found:
        network.join(source, target, capacity)
    return network


def least_cut(found):
    """As networkx has it, edges between the same nodes added up."""
    graph = nx.DiGraph()
    graph.add_nodes_from(range(NODES))
    for source, target, capacity in found:
        known = graph.get_edge_data(source, target, {"capacity": 0})["capacity"]
        graph.add_edge(source, target, capacity=known + capacity)
    return nx.minimum_cut_value(graph, 0, NODES - 1)


@often
@given(edges)
def test_the_largest_flow_is_the_least_cut(found):
    """With loops, several edges between two nodes, turned ones, and nodes that nothing leads to."""
    assert network_of(found).largest_flow(0, NODES - 1) == least_cut(found)


@often
@given(edges, st.integers(0, 4))
def test_once_the_time_has_passed_what_flows_is_a_bound(found, looks):
    """No more than the least cut, and all of it when it goes on afterwards."""
    network = network_of(found)
    left = iter(range(looks))
    first = network.largest_flow(0, NODES - 1, lambda: next(left, None) is None)
    assert 0 <= first <= least_cut(found)
    assert first + network.largest_flow(0, NODES - 1) == least_cut(found)


@often
@given(edges)
def test_what_is_reached_afterwards_is_a_least_cut(found):
    """The edges that leave it hold what flows, and the sink is not in it."""
    network = network_of(found)
    flow = network.largest_flow(0, NODES - 1)
    reached = network.reached_from(0)
    assert reached[0]
    assert not reached[NODES - 1]
    assert flow == sum(capacity for source, target, capacity in found if reached[source] and not reached[target])
