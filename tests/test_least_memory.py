"""The smallest peak share against brute force, contiguous and free."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_assignment import free_problems
from test_partition import chain, problems
from test_transfers import assignments

from shardwright.sharder.planning.clock import Budget
from shardwright.sharder.planning.free import least_memory
from shardwright.sharder.planning.free.assignment import Best, loads_of, masks_of, peak_bytes
from shardwright.sharder.planning.free.least_memory import (
    assignment_fits,
    fullest,
    larger_batch,
    largest_batch,
    least_share,
    least_share_freely,
    share_of,
    stages_fit,
)
from shardwright.sharder.planning.solver import has_ortools
from shardwright.sharder.planning.split_loads import stage_loads

needs_ortools = pytest.mark.skipif(not has_ortools(), reason="OR-tools is an extra")
quick = settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def contiguous_brute_force(p):
    """Over every assignment of blocks to an ordered choice of devices."""
    count, best = len(p.blocks), math.inf
    for parts in range(1, p.most_stages + 1):
        for devices in itertools.permutations(range(len(p.devices)), parts):
            for of in assignments(p, parts):
                stages = tuple((d, sum(1 << v for v in range(count) if of[v] == s)) for s, d in enumerate(devices))
                loads = stage_loads(p, stages)
                if loads is not None and not any(map(math.isinf, loads)):
                    best = min(best, share_of(p, stages))
    return best


def free_brute_force(p):
    best = math.inf
    for of in itertools.product(range(len(p.devices)), repeat=len(p.blocks)):
        masks = masks_of(of, len(p.devices))
        shares = [peak_bytes(p, m, d) / p.caps[d] for d, m in enumerate(masks)]
        if max(shares) <= 1 and all(p.blocks[v].allowed[d] for v, d in enumerate(of)):
            best = min(best, math.inf if any(map(math.isinf, loads_of(p, of))) else max(shares))
    return best


@quick
@given(problems().filter(lambda p: len(p.blocks) <= 5 and len(p.devices) <= 3))
def test_the_contiguous_share_is_that_of_brute_force(p):
    """Proven, over pins, ties, both schedules and links that are not to be used."""
    check_contiguous(p)


@settings(max_examples=8, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(problems(8, 10))
def test_the_contiguous_share_of_ten_is_that_of_brute_force(p):
    """Likewise of up to ten blocks on four devices."""
    check_contiguous(p)


def check_contiguous(p):
    """The least share is that of brute force, and proven."""
    found, value = least_share(p, Budget(60)), contiguous_brute_force(p)
    if found is None:
        assert math.isinf(value)
    else:
        assert found.exact
        assert found.value == pytest.approx(value, rel=1e-9)
        assert share_of(p, found.stages) == found.value


@quick
@given(free_problems())
def test_the_free_share_is_that_of_brute_force_without_ortools(p):
    """By branch and bound."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(least_memory, "has_ortools", lambda: False)
        found, value = least_share_freely(p, Budget(60)), free_brute_force(p)
    if found is None:
        assert math.isinf(value)
    else:
        assert found.exact
        assert found.value == pytest.approx(value, rel=1e-9)


@needs_ortools
@quick
@given(free_problems())
def test_the_free_share_is_that_of_brute_force_by_cpsat(p):
    """Whose linear bounds are cut until they meet the peaks."""
    best = Best(p, 0.0, price=fullest)
    for device in range(len(p.devices)):
        best.offer([device] * len(p.blocks))
    least_memory._improve_by_cpsat(best, Budget(60))
    found, value = best.result(), free_brute_force(p)
    if found is None:
        assert best.closed
        assert math.isinf(value)
    else:
        assert found.bound <= found.value
        assert found.value == pytest.approx(value, rel=1e-6)


@quick
@given(problems().filter(lambda p: len(p.blocks) <= 5), st.integers(1, 8))
def test_the_largest_batch_fits_and_one_more_micro_batch_does_not(p, samples):
    """At the size of the profiled micro-batch."""
    whole = [(1 << len(p.blocks)) - 1]
    stages = ((0, whole[0]),)
    fit = stages_fit(stages, p.caps)
    if not fit(p):
        return
    batch = largest_batch(p, samples * p.microbatches, fit)
    if batch is not None:
        assert fit(dataclasses.replace(p, microbatches=batch // samples))
        assert not fit(dataclasses.replace(p, microbatches=batch // samples + 1))


def test_a_free_assignment_needs_no_more_memory_than_halves():
    """Static bytes 1, 2, 3, 4 on two devices of 10: the free share is 5 of 10, that of a chain 6 of 10."""
    p = chain([1.0] * 4, cap=10, microbatches=1)
    sized = tuple(dataclasses.replace(b, static_bytes=s) for b, s in zip(p.blocks, [1, 2, 3, 4], strict=True))
    p = dataclasses.replace(p, blocks=sized, crossings=(), transfers="direct", schedule="gpipe")
    assert least_share(p, Budget(10)).value == 0.6
    assert least_share_freely(p, Budget(10)).value == 0.5
    assert assignment_fits([0, 1, 1, 0])(p)


@quick
@given(problems(most=4).filter(lambda p: len(p.devices) <= 3), st.integers(1, 4))
def test_no_split_holds_a_larger_batch_than_the_largest_of_any(p, samples):
    """Against every split at one micro-batch more, and up to as many as let 1F1B have all its stages; brute force."""
    p = dataclasses.replace(p, recompute="never")
    found = least_share(p, Budget(60))
    if found is None:
        return
    own = largest_batch(p, samples * p.microbatches, stages_fit(found.stages, p.caps))
    larger = larger_batch(p, samples * p.microbatches, own, Budget(60))
    batch = larger.batch if larger else own
    if larger:
        assert larger.proven
        assert larger.batch is None or larger.batch > own
        count = 2**16 if larger.batch is None else larger.batch // samples
        assert stages_fit(larger.stages, p.caps)(dataclasses.replace(p, microbatches=count))
    if batch is not None:
        more = batch // samples + 1
        for count in range(more, max(more, len(p.devices)) + 1):
            assert contiguous_brute_force(dataclasses.replace(p, microbatches=count)) > 1
