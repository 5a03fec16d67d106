"""Chains: cuts against brute force over all of them, against the search over closed sets, and at ten thousand units."""

from __future__ import annotations

import dataclasses
import itertools
import math
import random

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_partition import brute_force, problems

from shardwright.sharder.planning.exact import line as lines
from shardwright.sharder.planning.exact.chain import least_load, solve
from shardwright.sharder.planning.exact.chain_line import Line, counted, in_order
from shardwright.sharder.planning.exact.line import is_chain, split_line
from shardwright.sharder.planning.partition import partition
from shardwright.sharder.planning.problem import Block, Crossing, Problem
from shardwright.sharder.planning.split_loads import stage_loads


@pytest.mark.parametrize(
    ("times", "stages", "cuts"),
    [
        ([4, 1, 1, 4], 2, [2]),
        ([1, 2, 3, 4, 5, 6], 3, [3, 5]),
        ([7], 2, []),
        ([0, 0], 2, []),
        ([1, 1, 9, 1, 1], 3, [2, 3]),
    ],
)
def test_integers_are_cut_where_a_person_would(times, stages, cuts):
    """The largest load is least, with no more stages than that takes."""
    assert solve(times, stages) == cuts


def test_longer_stage_may_be_wrong():
    """Up to a load of 8 the first stage could end later, but not where the cut is cheap."""
    assert solve([4, 2, 1, 1, 4], 2) == [2]
    assert solve([4, 2, 1, 1, 4], 2, cuts=[0, 9, 3, 1, 9]) == [3]


@st.composite
def small_lines(draw):
    """A few blocks, kinds of devices, dear and impossible cuts, blocks without units, and barred ones."""
    blocks, kinds = draw(st.integers(1, 7)), draw(st.integers(1, 3))
    counts = draw(st.tuples(*[st.integers(1, 2)] * kinds))
    time = st.sampled_from([0.0, 0.5, 1.0, 2.0, 5.0, 9.0])
    inner = st.lists(st.sampled_from([0.0, 0.5, 1.0, 3.0, math.inf]), min_size=blocks - 1, max_size=blocks - 1)

    def sums(one):
        return np.concatenate([[0], np.cumsum(draw(st.lists(one, min_size=blocks, max_size=blocks)))])

    units = sums(st.sampled_from([0, 1, 1]))
    units[-1] = max(units[-1], 1)
    line = Line(
        work=tuple(sums(time).astype(float) for _ in range(kinds)),
        cuts=tuple(tuple(np.array([0.0, *draw(inner), 0.0]) for _ in range(kinds)) for _ in range(kinds)),
        units=units,
        barred=tuple(sums(st.sampled_from([0, 0, 0, 1])) for _ in range(kinds)) if draw(st.booleans()) else (),
    )
    return line, counts, draw(st.integers(1, sum(counts)))


def every_value(line, orders):
    """The least largest load over all cuts, by the formulas alone."""
    best = math.inf
    for kinds in orders:
        for inner in itertools.combinations(range(1, line.blocks), len(kinds) - 1):
            ends = (0, *inner, line.blocks)
            loads = []
            for s, (d, i, j) in enumerate(zip(kinds, ends, ends[1:], strict=False)):
                load = line.work[d][j] - line.work[d][i]
                load += line.cuts[kinds[s - 1]][d][i] if s else 0
                load += line.cuts[d][kinds[s + 1]][j] if s + 1 < len(kinds) else 0
                bad = line.units[i] == line.units[j] or (line.barred and line.barred[d][i] != line.barred[d][j])
                loads.append(math.inf if bad else load)
            best = min(best, max(loads))
    return best


@settings(max_examples=100, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
@given(small_lines(), st.sampled_from([0.0, 0.5, 2.0]))
def test_every_order_of_counted_devices(case, share):
    """The value is that of all cuts and all orders of the devices, from whatever bound below it the search starts."""
    line, counts, most = case
    expected = every_value(
        line,
        {
            order
            for size in range(1, most + 1)
            for order in itertools.product(range(len(counts)), repeat=size)
            if all(order.count(d) <= count for d, count in enumerate(counts))
        },
    )
    bound = expected if share == 2.0 else share * expected
    found = least_load(line, counted(line, counts, most), bound if math.isfinite(bound) else 0.0)
    if found is None:
        assert expected == math.inf
        return
    assert found.value == pytest.approx(expected)
    assert found.bound == found.value
    assert every_value(line, [found.kinds]) == pytest.approx(expected)


@settings(max_examples=150, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
@given(small_lines())
def test_one_order_of_devices_some_left_out(case):
    """Along one order the value is that of every selection from it."""
    line, counts, _ = case
    order = [d for d, count in enumerate(counts) for _ in range(count)]
    expected = every_value(line, {c for size in range(1, len(order) + 1) for c in itertools.combinations(order, size)})
    found = least_load(line, in_order(line, order))
    assert (math.inf if found is None else found.value) == pytest.approx(expected)


@settings(max_examples=100, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
@given(small_lines(), st.integers(0, 6))
def test_time_that_runs_out_leaves_an_honest_interval(case, ceilings):
    """After any number of ceilings the value is at least the optimum, and the bound at most."""
    line, counts, most = case
    states = counted(line, counts, most)
    best = least_load(line, states)
    left = iter(range(ceilings))
    found = least_load(line, states, out_of_time=lambda: next(left, None) is None)
    if found is not None:
        assert best is not None
        assert found.bound <= best.value <= found.value


@st.composite
def chains(draw):
    """The problems of test_partition.py with their blocks in one row."""
    problem = draw(problems())
    everything = tuple((1 << v) - 1 for v in range(len(problem.blocks)))
    return dataclasses.replace(problem, predecessors=everything)


@settings(max_examples=90, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
@given(chains())
def test_chains_with_ties_caps_and_pins(problem):
    """On chains with all that a problem may have, the value is that of brute force."""
    expected = brute_force(problem)
    found = partition(problem)
    assert (math.inf if found is None else found.value_s) == pytest.approx(expected)
    assert found is None or (found.exact and found.bound_s == found.value_s)


@settings(max_examples=150, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
@given(chains())
def test_line_is_a_bound_when_orders_are_too_many(problem):
    """Merged kinds of devices bound the value of every order, and one order of the devices is above it."""
    free = dataclasses.replace(problem, ties=(), caps=(10**9,) * len(problem.devices))
    devices = range(len(problem.devices))
    exact = split_line(free, range(len(free.blocks)), [[d] for d in devices], [])
    most = lines.MOST_STATES
    lines.MOST_STATES = 4
    try:
        near = split_line(free, range(len(free.blocks)), [[d] for d in devices], [list(devices)])
    finally:
        lines.MOST_STATES = most
    if near is not None:
        assert exact is not None
        assert near.bound_s <= exact.value_s * (1 + 1e-12)
        assert exact.value_s <= near.value_s * (1 + 1e-12)


def long_chain(count, speeds, seed=0):
    """Units with heavy tails, in training, on devices of these speeds with links between them alike."""
    random_ = random.Random(seed)
    times = [random_.lognormvariate(0, 1) for _ in range(count)]
    return Problem(
        blocks=tuple(
            Block(
                nodes=("n",),
                forward_s=tuple(time / speed for speed in speeds),
                backward_s=tuple(2 * time / speed for speed in speeds),
                update_s=(0.0,) * len(speeds),
                static_bytes=1,
                units=("n",),
                allowed=(True,) * len(speeds),
            )
            for time in times
        ),
        predecessors=tuple(1 << v - 1 if v else 0 for v in range(count)),
        crossings=tuple(
            Crossing(f"t{v}", v, 2 << v, size, size)
            for v in range(count - 1)
            for size in [int(random_.lognormvariate(12, 1.5))]
        ),
        devices=tuple(f"d{d}" for d in range(len(speeds))),
        caps=(10**14,) * len(speeds),
        links=(((1e-5, 1e9),) * len(speeds),) * len(speeds),
        microbatches=4 * len(speeds),
    )


def test_ten_thousand_units_on_sixty_four_devices():
    """The largest chain that is asked of us is exact; benchmarks/planner.py says in how many seconds."""
    problem = long_chain(10_000, [1.0] * 64)
    found = partition(problem)
    assert found is not None
    assert (found.exact, len(found.stages)) == (True, 64)
    loads = stage_loads(problem, found.stages)
    assert loads is not None
    assert max(loads) == found.value_s == found.bound_s


@pytest.mark.parametrize("speeds", [[1.0] * 6 + [2.0] * 6, [1.0, 2.1, 1.4, 0.7, 1.1, 1.9]])
def test_mixed_devices(speeds):
    """Two kinds of devices in any order, and six that all differ, are exact on a thousand units."""
    found = partition(long_chain(1_000, speeds))
    assert found is not None
    assert found.exact


def test_many_devices_that_all_differ_leave_a_small_gap():
    """Sixteen devices that differ by a few per cent have too many orders: the gap is proven, and small."""
    found = partition(long_chain(2_000, [1 + d / 400 for d in range(16)]), time_limit_s=5.0)
    assert found is not None
    assert found.bound_s <= found.value_s <= 1.02 * found.bound_s


def test_chains_are_recognised():
    """A row of blocks is a chain, whether or not edges skip some; two side by side are none."""
    row = long_chain(3, [1.0])
    assert is_chain(row)
    assert is_chain(dataclasses.replace(row, predecessors=(0, 1, 0b11)))
    assert not is_chain(dataclasses.replace(row, predecessors=(0, 0, 0b11)))
