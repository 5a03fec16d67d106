"""The bound for devices that differ: never above the optimum, and above the one from work alone where cuts are dear."""

from __future__ import annotations

import dataclasses
import math

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_afresh import mixed
from test_partition import brute_force, problems

from shardwright.sharder.planning import differing
from shardwright.sharder.planning.differing import differing_bound_s
from shardwright.sharder.planning.partition import partition
from shardwright.sharder.planning.search import simple_bound_s


@settings(max_examples=60, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
@given(problems(), st.sampled_from([1.0, 1.3, 4.0]), st.sampled_from([3, 10]))
def test_it_is_never_above_the_optimum(problem, above, ranges):
    """With ties, caps, pins and links of all kinds, from whatever split's largest load it is asked."""
    problem = dataclasses.replace(problem, transfers="relayed", stages_per_device=1)
    optimum = brute_force(problem)
    if not 0 < optimum < math.inf:
        return
    start_s = min(simple_bound_s(problem), optimum)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(differing, "RANGES", ranges)
        found = differing_bound_s(problem, start_s, above * optimum)
    assert start_s <= found <= optimum * (1 + 1e-9)


@pytest.mark.parametrize("seed", range(4))
def test_it_counts_transfers_that_no_split_avoids(seed):
    """Of graphs whose every cut is dear it is above what work alone says, and no split is below it."""
    problem = mixed(seed)
    optimum = partition(problem)
    assert optimum.exact
    simple_s = simple_bound_s(problem)
    found = differing_bound_s(problem, simple_s, optimum.value_s)
    assert simple_s * 1.01 < found <= optimum.value_s


def test_what_it_is_not_for_is_left_as_it_was():
    """Other transfers, too many devices, a bound that is met already, and no time."""
    problem = mixed(0)
    for changed in (
        dataclasses.replace(problem, transfers="staged"),
        dataclasses.replace(problem, overlap=True),
        mixed(0, speeds=tuple(1.0 + d for d in range(10))),
    ):
        assert differing_bound_s(changed, 1.0, 1e3) == 1.0
    assert differing_bound_s(problem, 2.0, 2.0) == 2.0
    assert differing_bound_s(problem, 1.0, 1e3, lambda: True) == 1.0
