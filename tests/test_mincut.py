"""The bound with transfers: never above the optimum, above the work alone, and exact where nothing else matters."""

from __future__ import annotations

import dataclasses
import math

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_partition import brute_force, chain, problems

from shardwright.sharder.planning.exact.search import simple_bound_s
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
