"""Orders of unlike devices one by one: bounds never above what brute force finds, and the best split of all."""

from __future__ import annotations

import dataclasses
import itertools
import math
import random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_mincut import tangled
from test_partition import assignments, brute_force, largest_load, problems, sets_anew
from test_transfers import brute_force as brute_force_of_transfers
from test_transfers import problems as of_transfers

from shardwright.sharder.planning.clock import Budget
from shardwright.sharder.planning.partition import partition
from shardwright.sharder.planning.solver import has_ortools
from shardwright.sharder.planning.split_loads import stage_loads
from shardwright.sharder.planning.wide import device_orders, incumbent
from shardwright.sharder.planning.wide.device_orders import device_by_device, possible

pytestmark = pytest.mark.skipif(not has_ortools(), reason="OR-tools is an extra")
many = settings(max_examples=60, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))


def relayed(problem):
    """The problem with transfers that are counted, and a micro-batch for every stage."""
    count = max(problem.microbatches, len(problem.devices))
    return dataclasses.replace(problem, transfers="relayed", overlap=False, microbatches=count)


def with_own_times(problem, seed):
    """Each block takes its own times on each device."""
    draw = random.Random(seed)
    blocks = tuple(
        dataclasses.replace(b, forward_s=tuple(s * draw.uniform(0.5, 2) for s in b.forward_s)) for b in problem.blocks
    )
    return dataclasses.replace(problem, blocks=blocks)


def gone_through(problem, time_limit_s=60.0):
    """The best split that came and fits, and the last bound; each answer is looked at on the way."""
    start = next(
        (
            ((d, (1 << len(problem.blocks)) - 1),)
            for d in range(len(problem.devices))
            if stage_loads(problem, ((d, (1 << len(problem.blocks)) - 1),))
        ),
        None,
    )
    if start is None:
        return None
    best = [start, max(stage_loads(problem, start))]
    bounds = [0.0]
    for found in device_by_device(problem, lambda: tuple(best), time_limit_s):
        loads = stage_loads(problem, found.stages) if found.stages else None
        if loads and max(loads) < best[1]:
            best[:] = found.stages, max(loads)
        bounds.append(found.bound)
    return best[1], max(bounds)


@pytest.fixture(autouse=True)
def whole_bytes(monkeypatch):
    """These problems are small."""
    monkeypatch.setattr(device_orders, "PAGE", 1)


@many
@given(of_transfers().filter(lambda p: len(p.devices) < 4 and len(p.blocks) < 6))
def test_bounds_hold_whatever_the_transfers(problem):
    """Those that are not counted, beside compute or through the host."""
    if problem.most_stages == len(problem.devices) and possible(problem) and (found := gone_through(problem)):
        assert found[1] <= brute_force_of_transfers(problem) * (1 + 1e-9)


@many
@given(problems())
def test_bounds_are_never_above_the_optimum_and_reach_it_where_memory_is_no_matter(problem):
    """Whatever times, links, ties, caps, pins and recomputation there are."""
    problem = relayed(problem)
    found = gone_through(problem) if possible(problem) else None
    if found is None:
        return
    value_s, bound_s = found
    expected = brute_force(problem)
    assert bound_s <= expected * (1 + 1e-9)
    roomy = problem.caps[0] == 10**6 and not problem.ties and problem.recompute != "always"
    if roomy and all(block.units for block in problem.blocks):
        assert value_s == pytest.approx(expected, rel=1e-6)
        assert bound_s == pytest.approx(expected, rel=1e-6)


@many
@given(problems(most=5), st.data())
def test_groups_bound_all_splits_over_their_orders(problem, data):
    """The linear programme of any groups of devices, against all splits in whose order they stand so."""
    problem = relayed(problem)
    order = data.draw(st.permutations(range(len(problem.devices))))
    ends = sorted(data.draw(st.sets(st.integers(1, len(order) - 1), max_size=len(order) - 1)))
    groups = tuple(tuple(sorted(order[a:b])) for a, b in itertools.pairwise([0, *ends, len(order)]))
    place = {d: number for number, group in enumerate(groups) for d in group}
    least = math.inf
    for stages in range(1, len(order) + 1):
        for row in itertools.permutations(order, stages):
            unused = [d for d in order if d not in row]
            whole = [place[d] for d in (*row, *sorted(unused, key=place.__getitem__))]
            if whole != sorted(whole):
                continue
            for stage_of in assignments(problem, stages):
                loads = [largest_load(problem, stage_of, row, anew) for anew in sets_anew(problem, stages)]
                least = min([least, *(load for load in loads if load is not None)])
    if 0 < least < math.inf:
        ceiling_s = least * data.draw(st.sampled_from([1.0, 1.2, 3.0]))
        assert device_orders._Programme(problem, groups, ceiling_s).least_s() <= least * (1 + 1e-9)


def test_of_unlike_devices_a_wide_graph_is_split_exactly(monkeypatch):
    """Where sets are too many to be gone through the split is that of the search that goes through them all."""
    monkeypatch.setattr(incumbent, "shifted", lambda *_, **__: iter(()))  # nothing is moved
    problem = relayed(with_own_times(tangled(3, count=20), 3))
    expected, found = partition(problem, time_limit_s=300), partition(problem, limit=100, time_limit_s=300)
    assert expected.exact
    assert found.exact
    assert found.value_s == pytest.approx(expected.value_s, rel=1e-6)


def test_no_time_leaves_an_honest_bound():
    """Zero, where nothing was asked."""
    problem = relayed(with_own_times(tangled(1, count=12), 1))
    value_s, bound_s = gone_through(problem, 0.0)
    assert 0 <= bound_s <= value_s


def test_what_does_not_fit_is_no_split_but_its_bound_holds():
    """Each device holds a quarter of the static bytes, which the programme knows as a sum."""
    problem = relayed(with_own_times(tangled(2, count=8), 2))
    blocks = tuple(dataclasses.replace(b, static_bytes=2**20) for b in problem.blocks)
    tight = dataclasses.replace(problem, blocks=blocks, caps=(2 * 2**20,) * 4)
    programme = device_orders._Programme(tight, ((0, 1), (2,), (3,)), 1e9)
    free = device_orders._Programme(problem, ((0, 1), (2,), (3,)), 1e9)
    assert programme.least_s() >= free.least_s()
    assert len(programme.rows) == len(free.rows) + 4


def test_many_devices_alike_are_halved_by_how_many_of_each_kind():
    """One that is slow and 25 that cannot be told apart: two kinds of halves, and not ten million."""
    problem = relayed(with_own_times(tangled(1, count=30), 1))
    keys = "forward_s", "backward_s", "update_s"
    blocks = tuple(
        dataclasses.replace(
            b,
            allowed=(True,) * 26,
            **{key: (2 * getattr(b, key)[0], *(getattr(b, key)[1],) * 25) for key in keys},
        )
        for b in problem.blocks
    )
    links = (((0.0, 20.0),) * 26,) * 26
    problem = dataclasses.replace(
        problem, blocks=blocks, devices=tuple(map(str, range(26))), caps=(10**9,) * 26, links=links, microbatches=26
    )
    orders = device_orders._Orders(problem, lambda: ((), 1e9), Budget(60))
    halves = [*orders._halves(range(26))]
    assert halves == [tuple(range(1, 14)), tuple(range(13))]


def test_a_bound_near_the_value_is_not_yet_exact():
    """One part in a thousand is told from it, one in ten million is not."""
    orders = device_orders._Orders(relayed(with_own_times(tangled(2, count=8), 2)), lambda: ((), 1.0), Budget(60))
    orders._waiting = []
    orders._done = {((0,), (1,), (2,), (3,)): 0.999}
    assert orders.bound_s == 0.999
    orders._done = {((0,), (1,), (2,), (3,)): 1 - 1e-7}
    assert orders.bound_s == 1.0
