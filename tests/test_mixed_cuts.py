"""The bound with transfers for devices that differ: never above the optimum, and above the work alone."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_mincut import tangled
from test_partition import brute_force, chain, problems

from shardwright.sharder.planning.partition import partition
from shardwright.sharder.planning.wide import mixed_cuts
from shardwright.sharder.planning.wide.mincut import transfer_bound_s
from shardwright.sharder.planning.wide.mixed_cuts import mixed_transfer_bound_s

TIMES = "forward_s", "backward_s", "update_s", "recompute_s"


def relayed(problem):
    """The problem as the bound knows it: transfers from neighbour to neighbour, not beside compute."""
    return dataclasses.replace(problem, transfers="relayed", overlap=False)


def at_speeds(problem, speeds):
    """The problem with devices of these speeds, 1 being that of its first."""
    blocks = tuple(
        dataclasses.replace(
            b, **{key: tuple(s / f for s, f in zip(getattr(b, key), speeds, strict=False)) for key in TIMES}
        )
        for b in problem.blocks
    )
    return dataclasses.replace(problem, blocks=blocks)


def alone_s(problem, speeds):
    """What the work alone takes, shared as the devices are fast."""
    return sum(seconds[0] * speeds[0] for seconds in problem.seconds) / sum(speeds)


@settings(max_examples=150, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
@given(problems(), st.sampled_from([1.0, 1.3, 2.0]), st.data())
def test_never_above_the_optimum(problem, share, data):
    """With any weights and any ceiling from the optimum up, whatever times, links, ties, caps and pins there are."""
    problem = relayed(problem)
    expected = brute_force(problem)
    weights = [data.draw(st.sampled_from([0.1, 1.0, 2.0, 3.0])) for _ in problem.devices]
    if math.isfinite(expected):
        assert mixed_transfer_bound_s(problem, weights, share * expected) <= expected * (1 + 1e-9)


def test_transfers_that_cannot_be_avoided_are_in_it():
    """24 s of work on a device, another twice as fast, one tensor between them: 2 s for both ways of 4 micro-batches.

    So of 24 + 2 + 2 * 2 s, the slow one's counted once and the fast one's twice, a third is the least; with a ceiling
    above the 12 s of the fast one alone nothing need be sent.
    """
    problem = at_speeds(chain([1.0] * 6, latency=0.25), (1.0, 2.0))
    assert alone_s(problem, (1.0, 2.0)) == 8.0
    assert mixed_transfer_bound_s(problem, (1.0, 2.0), 11.0) == pytest.approx(8.0 + 2.0)
    assert mixed_transfer_bound_s(problem, (1.0, 2.0), 13.0) == pytest.approx(8.0)


@pytest.mark.parametrize("speeds", [(1.0, 2.0, 3.0, 5.0), (1.0, 1.0, 3.0, 3.0), (1.0, 1.5, 1.5, 2.0)])
def test_transfers_beside_the_exact_search(speeds):
    """Never above what the exact search proves, and above the work alone now and then."""
    more = 0
    for seed in range(8):
        problem = at_speeds(tangled(seed, count=14, bandwidth=(30.0, 100.0)[seed % 2]), speeds)
        exact = partition(problem)
        assert exact.exact
        for share in (1.0, 1.0001, 1.2):
            found = mixed_transfer_bound_s(problem, speeds, share * exact.value_s)
            assert found <= exact.value_s * (1 + 1e-9)
        more += found > 1.01 * alone_s(problem, speeds)
    assert more


@pytest.mark.parametrize("seed", range(3))
def test_what_other_cuts_cost_leaves_less_room(seed, monkeypatch):
    """Cuts that are gone through again are dearer."""
    speeds = (1.0, 2.0, 2.5, 3.0)
    problem = at_speeds(tangled(seed), speeds)
    ceiling_s = 1.05 * partition(problem, limit=1, time_limit_s=1.0).value_s
    found = mixed_transfer_bound_s(problem, speeds, ceiling_s)
    monkeypatch.setattr(mixed_cuts, "SWEEPS", 1)
    assert found > mixed_transfer_bound_s(problem, speeds, ceiling_s) * 1.001 > alone_s(problem, speeds)


@pytest.mark.parametrize("seed", range(3))
def test_devices_alike_have_about_the_bound_of_their_own(seed):
    """Which is found in the same way, but for the order in which cuts are gone through."""
    problem = tangled(seed)
    ceiling_s = 1.05 * partition(problem, limit=1, time_limit_s=1.0).value_s
    found = mixed_transfer_bound_s(problem, (1.0,) * 4, ceiling_s)
    assert found == pytest.approx(transfer_bound_s(problem, ceiling_s), rel=2e-3)


def test_sets_that_share_a_window_have_the_widest(monkeypatch):
    """With fewer windows the bound is lower, and one all the same."""
    speeds = tuple(1 + 0.37 * d for d in range(4))
    problem = at_speeds(tangled(5), speeds)
    ceiling_s = 1.05 * partition(problem, limit=1, time_limit_s=1.0).value_s
    found = []
    for groups in (1, 3, 64):
        monkeypatch.setattr(mixed_cuts, "GROUPS", groups)
        found.append(mixed_transfer_bound_s(problem, speeds, ceiling_s))
    assert all(low <= high * (1 + 1e-9) for low, high in itertools.pairwise(found))
    assert alone_s(problem, speeds) * (1 - 1e-9) <= found[0] < found[-1] <= ceiling_s


def test_what_is_not_summed_and_too_many_devices_have_no_such_bound():
    """And without time it is the work alone."""
    problem = at_speeds(chain([1.0] * 6, latency=0.25), (1.0, 2.0))
    assert mixed_transfer_bound_s(dataclasses.replace(problem, overlap=True), (1.0, 2.0), 100.0) == 0.0
    assert mixed_transfer_bound_s(dataclasses.replace(problem, transfers="staged"), (1.0, 2.0), 100.0) == 0.0
    assert mixed_transfer_bound_s(chain([1.0] * 20, 17), (1.0,) * 17, 100.0) == 0.0
    found = mixed_transfer_bound_s(problem, (1.0, 2.0), 100.0, lambda: True)
    assert found == pytest.approx(alone_s(problem, (1.0, 2.0)))
