"""Many orders of a graph with too many closed sets: each valid, none worse, near what the exact search finds."""

from __future__ import annotations

import dataclasses
import math

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_partition import block, chain, problems

from shardwright.sharder.planning.partition import partition
from shardwright.sharder.planning.problem import bits
from shardwright.sharder.planning.split_loads import stage_loads
from shardwright.sharder.planning.wide.orders import best_of_orders, topological


@settings(max_examples=100, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
@given(problems(), st.randoms(use_true_random=False))
def test_orders_are_topological(problem, random_):
    """Whatever the keys are, each block comes once and behind those that it needs."""
    order = topological(problem, [random_.random() for _ in problem.blocks])
    assert sorted(order) == list(range(len(problem.blocks)))
    for position, v in enumerate(order):
        assert not problem.predecessors[v] & ~sum(1 << u for u in order[:position])


def test_keys_decide_among_what_is_ready():
    """Of three blocks side by side the one with the smallest key comes first."""
    problem = dataclasses.replace(chain([1.0] * 4), predecessors=(0, 0, 0, 0b111))
    assert topological(problem, [3.0, 1.0, 2.0, 0.0]) == [1, 2, 0, 3]


def streams(count, width):
    """``width`` streams of ``count`` blocks each between a source and a sink, of uneven times; nothing is sent."""
    whole = chain([1.0] * (count * width + 2), 3)
    before = [0, *(1 if v <= width else 1 << v - width for v in range(1, count * width + 1))]
    before.append((1 << count * width + 1) - 1)
    blocks = tuple(block(float(1 + v * v % 13), 3) for v in range(count * width + 2))
    return dataclasses.replace(whole, predecessors=tuple(before), crossings=(), blocks=blocks)


def test_splits_only_improve_and_each_is_valid():
    """Each split that comes is feasible and better than the one before."""
    problem = streams(8, 4)
    first = tuple((d, sum(1 << v for v in range(34) if v * 3 // 34 == d)) for d in range(3))
    loads = stage_loads(problem, first)
    assert loads is not None
    value = max(loads)
    best = [(first, value)]
    for stages in best_of_orders(problem, [[0, 1, 2]], [[0, 1, 2]], lambda: best[-1], 0.0, lambda: False):
        closed = 0
        for _, members in stages:
            closed |= members
            assert all(not problem.predecessors[v] & ~closed for v in bits(members))
        loads = stage_loads(problem, stages)
        assert loads is not None
        assert max(loads) < value
        value = max(loads)
        best.append((stages, value))
    assert value < math.inf


def test_graph_beyond_the_limit_comes_near_its_optimum():
    """Cut short at a hundred closed sets, the value is within one and a half per cent of that of the exact search."""
    problem = streams(8, 4)
    exact, near = partition(problem), partition(problem, limit=100)
    assert exact is not None
    assert near is not None
    assert exact.exact
    assert exact.value_s <= near.value_s <= 1.015 * exact.value_s


def test_time_ends_the_orders():
    """With no time left no order is tried."""
    problem = streams(8, 4)
    first = ((0, (1 << 34) - 1),)
    assert list(best_of_orders(problem, [[0, 1, 2]], [[0, 1, 2]], lambda: (first, 1e9), 0.0, lambda: True)) == []
