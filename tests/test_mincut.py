"""The bound with transfers: never above the optimum, above the work alone, and exact where nothing else matters."""

from __future__ import annotations

import dataclasses
import itertools
import math
import random

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_partition import block, brute_force, chain, problems

from shardwright.sharder.planning.exact.search import simple_bound_s
from shardwright.sharder.planning.partition import partition
from shardwright.sharder.planning.problem import Crossing, bits
from shardwright.sharder.planning.wide import mincut
from shardwright.sharder.planning.wide.flow import Network
from shardwright.sharder.planning.wide.mincut import least_transfer_s, transfer_bound_s


def alike(problem):
    """The problem with every device as the first."""
    times = "forward_s", "backward_s", "update_s", "recompute_s"
    blocks = tuple(
        dataclasses.replace(b, **{key: getattr(b, key)[:1] * len(problem.devices) for key in times})
        for b in problem.blocks
    )
    return dataclasses.replace(problem, blocks=blocks)


@settings(max_examples=60, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
@given(problems(), st.sampled_from([1.0, 1.3, 2.0]))
def test_never_above_the_optimum(problem, share):
    """With any ceiling from the optimum up, whatever links, ties, caps and pins there are."""
    problem = alike(problem)
    expected = brute_force(problem)
    if math.isfinite(expected):
        assert transfer_bound_s(problem, share * expected) <= expected * (1 + 1e-9)


def test_transfers_that_cannot_be_avoided_are_in_it():
    """Two stages of 16 s of work each with one tensor between them, 0.5 s for each of 4 micro-batches and both ways."""
    problem = chain([1.0] * 8, latency=0.5)
    assert simple_bound_s(problem) == 16.0
    assert transfer_bound_s(problem, 20.5) == pytest.approx(16.0 + 4 * 2 * 0.5)


def closed_sets(problem):
    """Flags of each set that has all that its blocks read."""
    for mask in range(1 << len(problem.blocks)):
        if all(problem.predecessors[v] & ~mask == 0 for v in bits(mask)):
            yield np.array([bool(mask >> v & 1) for v in range(len(problem.blocks))])


def lower_hull(points, limit, sign):
    """The least X + p * sign * (work - limit) over all points, at the best price p of those between two of them."""
    prices = {0.0} | {abs((x - y) / (v - w)) for (v, x), (w, y) in itertools.combinations(points, 2) if v != w}
    return max(min(x + p * sign * (w - limit) for w, x in points) for p in prices)


@settings(max_examples=150, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
@given(problems(), st.data())
def test_a_least_cut_is_the_lower_hull_of_all_that_may_be(problem, data):
    """By enumeration: between the blocks that are in it for sure and those that are not, X over work from below."""
    problem = alike(problem)
    whole = sum(seconds[0] for seconds in problem.seconds)
    low = data.draw(st.floats(0, whole))
    high = data.draw(st.floats(low, whole))
    work = np.array([seconds[0] for seconds in problem.seconds])
    cuts = mincut.LeastCuts(problem, max(whole, 1.0), lambda: False, work)
    cuts.price = [data.draw(st.sampled_from([0.0, 1.0, 2.0, 5.0])) for _ in problem.crossings]
    found = cuts.least_s(low, high)
    needed = np.array([min(cuts._work(i) for i in closed_sets(problem) if i[v]) for v in range(len(problem.blocks))])
    without = np.array(
        [max(cuts._work(i) for i in closed_sets(problem) if not i[v]) for v in range(len(problem.blocks))]
    )
    inside, outside = without < low - 1e-9 * whole, needed > high + 1e-9 * whole
    points = {
        (cuts._work(i), cuts._moved_s(i))
        for i in closed_sets(problem)
        if (i >= inside).all() and not (i & outside).any()
    }
    if not points:
        assert found == math.inf
        return
    known = max(lower_hull(points, high, 1), lower_hull(points, low, -1))
    assert found == pytest.approx(known, abs=1e-5 * cuts.ceiling_s)
    assert found <= min((x for w, x in points if low <= w <= high), default=math.inf) + 1e-9


def test_work_that_is_bounded_from_both_sides_makes_cuts_dearer():
    """Four chains from one unit: all before it or behind them costs nothing, and half of the work cuts two of them.

    Nothing but the first unit is before the cut for sure, or behind it, so that without a price the cut is free.
    """
    graph = [[], *([0 if not step else 4 * branch + step] for branch in range(4) for step in range(4))]
    problem = chain([1.0] * len(graph), latency=0.0)
    made = {u for before in graph for u in before}
    problem = dataclasses.replace(
        problem,
        predecessors=tuple(sum(1 << u for u in before) for before in graph),
        crossings=tuple(
            Crossing(f"t{u}", u, sum(1 << v for v, before in enumerate(graph) if u in before), 1 + 9 * (u > 0), 0)
            for u in sorted(made)
        ),
        links=(((0.0, 1.0),) * 2,) * 2,
    )
    optimum = brute_force(problem)
    alone_s = simple_bound_s(problem)
    assert alone_s < transfer_bound_s(problem, optimum) <= optimum * (1 + 1e-9)


def test_tensors_that_no_link_takes_end_the_search_for_a_price():
    """Those with a gradient have no way back here: a price between two sets that both cut such a tensor is none."""
    problem = chain([1.0] * 6, devices=3, latency=0.0)
    times = (1.2, 2.8, 2.8, 0.8, 0.8, 0.4)
    moved = ((0, 44, 1, 0), (1, 4, 9, 2), (1, 4, 0, 1), (3, 32, 9, 0))
    problem = dataclasses.replace(
        problem,
        blocks=tuple(block(time, 3) for time in times),
        predecessors=(0, 0, 3, 1, 0, 9),
        crossings=tuple(Crossing(f"t{i}", *each) for i, each in enumerate(moved)),
        links=tuple(tuple((math.inf, 1.0) if a > b else (0.0, 10.0) for b in range(3)) for a in range(3)),
        transfers="direct",
    )
    looks = []
    assert transfer_bound_s(problem, 15.0, lambda: looks.append(1) or len(looks) > 1000) > 0
    assert len(looks) < 100


def tangled(seed, *, turned=False, count=30, bandwidth=20.0):
    """Blocks that read one or two of the eight before, or the same back to front."""
    random_ = random.Random(seed)
    edges = {(random_.randrange(max(0, v - 8), v), v) for v in range(1, count) for _ in range(2)}
    times = [random_.uniform(0.5, 2.0) for _ in range(count)]
    if turned:
        edges = {(count - 1 - v, count - 1 - u) for u, v in edges}
        times.reverse()
    problem = chain([1.0] * count, devices=4, latency=0.0)
    return dataclasses.replace(
        problem,
        blocks=tuple(block(time, 4) for time in times),
        predecessors=tuple(sum(1 << u for u, w in edges if w == v) for v in range(count)),
        crossings=tuple(Crossing(f"t{u}.{v}", u, 1 << v, 1, 1) for u, v in sorted(edges)),
        links=(((0.0, bandwidth),) * 4,) * 4,
    )


@pytest.mark.parametrize("seed", range(4))
def test_what_other_cuts_cost_leaves_less_room(seed, monkeypatch):
    """Those before a cut and those behind it: cuts gone through again are dearer, and as dear back to front."""
    problem = tangled(seed)
    ceiling_s = 1.05 * partition(problem, limit=1, time_limit_s=1.0).value_s
    found = transfer_bound_s(problem, ceiling_s)
    assert found == pytest.approx(transfer_bound_s(tangled(seed, turned=True), ceiling_s), rel=1e-4)
    monkeypatch.setattr(mincut, "SWEEPS", 1)
    once = [transfer_bound_s(tangled(seed, turned=turned), ceiling_s) for turned in (False, True)]
    assert found > max(once) * 1.001


@pytest.mark.parametrize("transfers", ["relayed", "staged", "direct"])
@pytest.mark.parametrize("overlap", [False, True])
def test_transfers_that_take_as_long_as_compute(transfers, overlap):
    """Of every kind, and beside compute: never above what the exact search proves, and above the work now and then."""
    more = 0
    for seed in range(12):
        problem = tangled(seed, count=10, bandwidth=(3.0, 10.0, 30.0)[seed % 3])
        problem = dataclasses.replace(problem, transfers=transfers, overlap=overlap)
        exact = partition(problem)
        assert exact.exact
        for share in (1.0, 1.0001, 1.2):
            found = transfer_bound_s(problem, share * exact.value_s)
            assert found <= exact.value_s * (1 + 1e-9)
        more += found > 1.01 * simple_bound_s(problem)
    assert more or overlap  # beside compute the work alone is as much as a rule


def test_devices_that_differ_and_no_time_give_no_more_than_is_known():
    """Mixed devices have no such bound; without time it is the work alone."""
    problem = chain([1.0] * 8, latency=0.5)
    assert transfer_bound_s(problem, 20.5, lambda: True) == pytest.approx(16.0)
    mixed = tuple(dataclasses.replace(b, forward_s=(1.0, 2.0)) for b in problem.blocks)
    assert transfer_bound_s(dataclasses.replace(problem, blocks=mixed), 30.0) == 0.0


def test_without_time_no_network_is_made(monkeypatch):
    """There may be a thousand cuts, and the networks of ten thousand blocks take a minute."""
    made = []
    monkeypatch.setattr(mincut, "Network", lambda nodes: made.append(nodes) or Network(nodes))
    problem = chain([1.0] * 8, latency=0.5)
    transfer_bound_s(problem, 20.5)
    assert made
    made.clear()
    assert transfer_bound_s(problem, 20.5, lambda: True) == pytest.approx(16.0)
    assert not made


def test_links_are_gone_through_once_for_all_tensors():
    """The pairs of 64 devices are thousands, and for each tensor anew they would take seconds of any time limit."""

    class Counted(tuple):
        looks = 0

        def __getitem__(self, index):
            Counted.looks += 1
            return super().__getitem__(index)

    problem = chain([1.0] * 200, devices=10, latency=0.5)
    problem = dataclasses.replace(problem, links=tuple(map(Counted, problem.links)))
    assert {least_transfer_s(problem, tensor) for tensor in problem.crossings} == {4 * 2 * 0.5 * 2}
    assert Counted.looks < 10 * len(problem.crossings)
