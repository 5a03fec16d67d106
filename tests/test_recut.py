"""Neighbours split anew: valid splits, each better than the one before, and as good as all stages together can be."""

from __future__ import annotations

import dataclasses
import itertools
import math
from functools import partial

import pytest
from hypothesis import HealthCheck, assume, given, settings
from test_afresh import mixed
from test_partition import problems
from test_shifting import is_split, tangled

from shardwright.sharder.planning.exact.even import even_splits
from shardwright.sharder.planning.formulation.device_classes import orders_to_try
from shardwright.sharder.planning.partition import partition
from shardwright.sharder.planning.split_loads import stage_loads
from shardwright.sharder.planning.wide import recut as recut_module
from shardwright.sharder.planning.wide.lists import Lists
from shardwright.sharder.planning.wide.recut import AIMS, Neighbours

often = settings(max_examples=25, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))


def first_split(problem):
    """The even split that fits with most stages, and its largest load, or None."""
    fit = ((split.stages, stage_loads(problem, split.stages)) for split in even_splits(problem, orders_to_try(problem)))
    return max(((stages, max(loads)) for stages, loads in fit if loads), key=lambda one: len(one[0]), default=None)


def followed(problem, best, out_of_time=lambda: False):
    """The splits in turn, from ``best`` on, each with its largest load, which is smaller than the one before."""
    found = [best]
    for stages in Neighbours(Lists(problem), partial(stage_loads, problem), out_of_time).split_anew(best[0]):
        loads = stage_loads(problem, stages)
        assert loads is not None
        assert max(loads) < found[-1][1]
        found.append((stages, max(loads)))
    return found


@pytest.mark.parametrize("speeds", [(1.0, 1.0, 1.0), (1.0, 2.0, 0.7), (1.0, 2.0, 1.0)])
@pytest.mark.parametrize("seed", range(3))
def test_all_stages_together_come_near_the_optimum(seed, speeds):
    """As near as the last aim, from an even split; on the way each split is better."""
    problem = mixed(seed, 14, speeds) if len(set(speeds)) > 1 else tangled(seed, 14)
    optimum = partition(problem)
    assert optimum.exact
    start = first_split(problem)
    assert len(start[0]) == len(speeds) <= recut_module.WIDEST
    found = followed(problem, start)
    assert all(is_split(problem, stages) for stages, _ in found)
    assert optimum.value_s * (1 - 1e-9) <= found[-1][1] <= optimum.value_s / (1 - AIMS[-1]) * (1 + 1e-9)


@pytest.mark.parametrize("seed", range(3))
def test_two_at_a_time_are_better_than_none(seed, monkeypatch):
    """Of six stages two are split anew, then two others."""
    monkeypatch.setattr(Neighbours.split_anew, "__defaults__", (2,))
    problem = mixed(seed, 24, (1.0, 2.0, 0.7, 1.3, 0.9, 1.6))
    start = first_split(problem)
    found = followed(problem, start)
    assert all(is_split(problem, stages) for stages, _ in found)
    assert found[-1][1] < 0.98 * start[1]


@often
@given(problems())
def test_whatever_there_is_it_yields_splits_that_fit(problem):
    """With ties, caps, pins, links of all kinds and transfers that are not listed."""
    start = first_split(problem)
    assume(start is not None)
    for stages, _ in followed(problem, start):
        assert is_split(problem, stages)


@pytest.mark.parametrize("latency_s", [0.0, math.inf])
def test_where_no_load_is_a_time_nothing_is_better(latency_s):
    """Where all loads are 0, or no link may be used, no load is above any ceiling, and the search ends."""
    problem = tangled(0, 14)
    nothing = (0.0,) * len(problem.devices)
    free = {"forward_s": nothing, "backward_s": nothing, "update_s": nothing, "recompute_s": ()}
    blocks = tuple(dataclasses.replace(block, **free) for block in problem.blocks)
    links = tuple(tuple((latency_s, math.inf) for _ in row) for row in problem.links)
    idle = dataclasses.replace(problem, blocks=blocks, links=links)
    stages = first_split(problem)[0]
    assert max(stage_loads(idle, stages)) == latency_s
    assert not [
        *itertools.islice(Neighbours(Lists(idle), partial(stage_loads, idle), lambda: False).split_anew(stages), 1)
    ]


def test_what_is_not_listed_is_left():
    """Other transfers than those that are relayed and summed up, one stage, and no time."""
    problem = tangled(0, 14)
    start = first_split(problem)
    for other in (dataclasses.replace(problem, transfers="staged"), dataclasses.replace(problem, overlap=True)):
        assert followed(other, start) == [start]
    assert followed(problem, (((0, (1 << 14) - 1),), 1e9)) == [(((0, (1 << 14) - 1),), 1e9)]
    assert followed(problem, start, lambda: True) == [start]


@pytest.mark.parametrize("speeds", [(1.0, 1.0, 1.0, 1.0), (1.0, 2.0, 0.7, 1.3)])
def test_what_there_is_between_two_cuts_is_found(speeds):
    """Some stages of the best split, for the largest load among them."""
    problem = mixed(1, 16, speeds) if len(set(speeds)) > 1 else tangled(1, 16, 4)
    stages = partition(problem).stages
    loads = stage_loads(problem, stages)
    neighbours = Neighbours(Lists(problem), partial(stage_loads, problem), lambda: False)
    for first, last in itertools.combinations(range(len(stages) + 1), 2):
        before = sum(members for _, members in stages[:first])
        behind = before | sum(members for _, members in stages[first:last])
        devices = tuple(device for device, _ in stages[first:last])
        ceiling_s = max(loads[first:last])
        anew = neighbours._anew(before, behind, devices, ceiling_s * (1 + 1e-12))
        found = stage_loads(problem, (*stages[:first], *anew, *stages[last:]))
        assert max(found[first : first + len(anew)]) <= ceiling_s * (1 + 1e-9)
