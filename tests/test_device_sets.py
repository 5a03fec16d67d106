"""Devices that differ, all their orders at once: a split just where there is one, and bounds that no split is below."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import random

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from test_afresh import mixed
from test_partition import brute_force, problems
from test_windows import MANY, in_proportion, masks_of, one_link, weights

from shardwright.sharder.planning.exact.search import OutOfTimeError, closed_sets
from shardwright.sharder.planning.partition import partition
from shardwright.sharder.planning.problem import bits
from shardwright.sharder.planning.split_loads import stage_loads
from shardwright.sharder.planning.wide import device_sets, little_cut, shifting
from shardwright.sharder.planning.wide import listing as listing_module
from shardwright.sharder.planning.wide.ceilings import narrowed
from shardwright.sharder.planning.wide.device_sets import DeviceSetSearch, how_many_states
from shardwright.sharder.planning.wide.device_weights import best_weights
from shardwright.sharder.planning.wide.listing import Listing
from shardwright.sharder.planning.wide.lists import Lists
from shardwright.sharder.planning.wide.little_cut import LittleCut
from shardwright.sharder.planning.wide.windows import UndecidedError

often = settings(max_examples=25, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
SPEEDS = 1.0, 2.1, 1.0, 0.7, 2.1


def search(problem, ceiling_s, out_of_time=lambda: False):
    """What is asked whether there is a split below the ceiling."""
    found = Lists(problem).searched(range(len(problem.devices)), ceiling_s, None, out_of_time)
    assert isinstance(found, DeviceSetSearch)  # two devices differ at least
    return found


def differing(problem):
    """The problem without memory, ties, pins and other links, on devices of two speeds or three."""
    problem = one_link(problem)
    assume(len(problem.devices) > 1)
    blocks = tuple(dataclasses.replace(block, recompute_s=()) for block in problem.blocks)
    problem = dataclasses.replace(problem, blocks=blocks, recompute="never")
    return in_proportion(problem, SPEEDS[: len(problem.devices)])


def with_own_times(problem, seed, pins=0.0):
    """Each block takes its own times on each device, some far longer, and is barred from some but the first."""
    random_ = random.Random(seed)
    blocks = []
    for block in problem.blocks:
        rows = [
            tuple(s * random_.choice((0.3, 0.7, 1.0, 1.0, 1.6, 40.0)) for s in times)
            for times in (block.forward_s, block.backward_s, block.update_s)
        ]
        allowed = [True, *(random_.random() >= pins for _ in block.allowed[1:])]
        fields = dict(zip(("forward_s", "backward_s", "update_s"), rows, strict=True))
        blocks.append(dataclasses.replace(block, **fields, allowed=tuple(allowed)))
    return dataclasses.replace(problem, blocks=tuple(blocks))


@often
@given(problems(), st.sampled_from([None, 0, 1, 2]), st.sampled_from([0.0, 0.3]))
def test_there_is_a_split_just_where_one_is_found(problem, seed, pins):
    """Below the optimum of all splits there is none, on any of the devices; at it there is one with such loads.

    Where devices' times are in proportion, or where they are not, and with pins.
    """
    problem = differing(problem)
    if seed is not None:
        problem = with_own_times(problem, seed, pins)
        assume(Lists(problem).possible and not Lists(problem).alike)
    exact = partition(problem)  # which is held against brute force in its own tests
    assume(exact is not None and exact.exact and exact.value_s > 0)
    optimum = exact.value_s
    assert search(problem, optimum * (1 - 1e-6)).stages(MANY) is None
    stages = search(problem, optimum).stages(MANY)
    assert stages is not None
    assert max(stage_loads(problem, stages)) <= optimum * (1 + 1e-9)


def cuts_are_possible(problem, asked, stages):
    """What is before each cut of a split below the ceiling may be, and its transfers are not below the least."""
    state, closed = [0] * len(asked.kinds), 0
    for device, members in stages[:-1]:
        state[next(kind for kind, devices in enumerate(asked.kinds) if device in devices)] += 1
        closed |= members
        assert tuple(state) in asked.alive
        assert asked.least[tuple(state)] <= weights(problem, closed)[1] * (1 + 1e-9) + 1e-12


@pytest.mark.parametrize("speeds", [(1.0, 0.1, 3.0), (1.0, 40.0), (0.05, 1.0, 1.0, 0.3), (1.0, 2.1, 0.7, 1.4, 0.2)])
@pytest.mark.parametrize("known_steps", [60, MANY])
def test_no_split_is_overlooked_on_devices_that_are_far_slower(speeds, known_steps, monkeypatch):
    """There transfers are soon more than the work of a stage. At any ceiling from the optimum on one is found.

    The sets with little transfer are few, or all that there are.
    """
    monkeypatch.setattr(little_cut, "KNOWN_STEPS", known_steps)
    for seed in range(4):
        problem = mixed(seed, 7 + seed % 4, speeds)
        dear = (problem.links[0][1][0], problem.links[0][1][1] / (1, 3, 9)[seed % 3])
        problem = dataclasses.replace(problem, links=((dear,) * len(speeds),) * len(speeds))
        optimum = partition(problem)
        assert optimum.exact
        for share in (1 - 1e-6, 1.0, 1.003, 1.02, 1.1):
            asked = search(problem, share * optimum.value_s)
            stages = asked.stages(MANY)
            assert (stages is not None) == (share >= 1)
            if share >= 1:
                cuts_are_possible(problem, asked, optimum.stages)
            assert stages is None or max(stage_loads(problem, stages)) <= share * optimum.value_s * (1 + 1e-9)


@often
@given(problems(), st.sampled_from([0.9, 1.0, 1.1]), st.sampled_from([4, 30]), st.sampled_from([2, 30]))
def test_some_of_too_many_sets_prove_nothing(problem, share, most_listed, most_kept):
    """With a few of the sets gone on with there is a split that is below the ceiling, or it is left open."""
    problem = differing(problem)
    exact = partition(problem)
    assume(exact is not None and exact.exact and exact.value_s > 0)
    ceiling_s = share * exact.value_s
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(listing_module, "MOST_LISTED", most_listed)
        patch.setattr(device_sets, "MOST_KEPT", most_kept)
        try:
            stages = search(problem, ceiling_s).stages(MANY)
        except UndecidedError:
            return
    assert (stages is not None) == (share >= 1)
    if stages is not None:
        assert max(stage_loads(problem, stages)) <= ceiling_s * (1 + 1e-9)


@settings(often, max_examples=12)
@given(problems(), st.sampled_from([1.0, 1.05, 1.5]), st.sampled_from([3, MANY]))
def test_bounds_are_never_above_the_optimum(problem, share, most_listed):
    """With times in proportion or not, and whatever transfers, links, ties, caps and pins there are."""
    expected = brute_force(problem)
    assume(0 < expected < math.inf)
    ticks = itertools.count()
    best = ((0, 1),), share * expected
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(listing_module, "MOST_LISTED", most_listed)
        for narrow in narrowed(Lists(problem), lambda: best, 0.0, lambda: next(ticks) > 3_000):
            assert narrow.bound <= expected * (1 + 1e-9)


@pytest.mark.parametrize("speeds", [(1.0, 2.1, 0.7), (1.0, 2.1, 1.4, 0.7, 1.1), (1.0, 2.0, 1.0, 2.0)])
def test_wide_graphs_are_split_exactly(speeds, monkeypatch):
    """With far fewer closed sets allowed than there are, the value is that of the search through all, and proven."""
    monkeypatch.setattr(shifting, "PATIENCE", 2)  # few moves: lists have to do it
    problem = mixed(1, 16, speeds)
    exact, cut = partition(problem), partition(problem, limit=30)
    assert (cut.exact, exact.exact) == (True, True)
    assert cut.value_s == pytest.approx(exact.value_s, rel=1e-9)


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("pins", [0.0, 0.2])
def test_times_that_are_not_in_proportion_are_split_exactly(count, pins, monkeypatch):
    """As if there were few closed sets: what is before a cut takes the times of the devices there."""
    monkeypatch.setattr(shifting, "PATIENCE", 2)
    for seed in range(3):
        problem = with_own_times(mixed(seed, 16, (1.0, 2.1, 0.7)[:count]), seed, pins)
        exact, cut = partition(problem), partition(problem, limit=30)
        assert (cut.exact, exact.exact) == (True, True)
        assert cut.value_s == pytest.approx(exact.value_s, rel=1e-9)


def least_load(problem, before, behind):
    """The least largest load of stages between two closed sets, by work and transfers alone; each device has one."""
    lattice = [c for c in closed_sets(problem.predecessors, MANY) if not before & ~c and not c & ~behind]

    def load(first, last, device):
        blocks = [v for v in range(len(problem.blocks)) if (last & ~first) >> v & 1]
        if not all(problem.blocks[v].allowed[device] for v in blocks):
            return math.inf
        work_s = sum(problem.seconds[v][device] for v in blocks)
        return work_s + weights(problem, first)[1] + weights(problem, last)[1]

    @functools.cache
    def best(first, free):
        if first == behind:
            return 0.0
        larger = [c for c in lattice if c != first and not first & ~c]
        return min((max(load(first, c, d), best(c, free - {d})) for c in larger for d in free), default=math.inf)

    return best(before, frozenset(range(len(problem.devices))))


@pytest.mark.parametrize("small_family", [0, 4000])
@pytest.mark.parametrize("count", [2, 3, 4])
def test_a_part_is_split_just_where_it_can_be(count, small_family, monkeypatch):
    """Between any two closed sets, on devices with times of their own, and pins; listed from few sets, or all at once.

    What is elsewhere counts for none of the devices.
    """
    monkeypatch.setattr(device_sets, "SMALL_FAMILY", small_family)
    random_ = random.Random(count)
    for seed in range(12):
        problem = with_own_times(mixed(seed, 7, (1.0, 2.1, 0.7, 1.4)[:count]), seed, random_.choice((0.0, 0.3)))
        closed = sorted(closed_sets(problem.predecessors, MANY))
        before = random_.choice([0, random_.choice(closed)])
        behind = random_.choice([closed[-1], random_.choice([c for c in closed if not before & ~c])])
        if before == behind:
            continue
        expected = least_load(problem, before, behind)
        lists = Lists(problem)
        for share in (1 - 1e-6, 1.0, 1.3):
            asked = lists.searched(range(count), share * expected, (before, behind), lambda: False)
            stages = asked.stages(MANY)
            assert (stages is not None) == (share >= 1)
            closed_, most = before, 0.0
            for device, members in stages or ():
                ends_s = weights(problem, closed_)[1] + weights(problem, closed_ | members)[1]
                own = [problem.seconds[v][device] for v in bits(members)]
                assert all(problem.blocks[v].allowed[device] for v in bits(members))
                closed_, most = closed_ | members, max(most, sum(own) + ends_s)
            assert stages is None or (closed_ == behind and most <= share * expected * (1 + 1e-9))


@pytest.mark.parametrize("pins", [0.0, 0.4])
def test_what_is_before_a_cut_and_behind_it_is_counted_by_its_devices(pins):
    """No less than on any device, and no more than on those that are there; with two devices, just that."""
    for seed in range(5):
        problem = with_own_times(mixed(seed, 9, (1.0, 2.1, 0.7)[: 2 + seed % 2]), seed, pins)
        lists = Lists(problem)
        kinds = len(lists.classes)
        ceiling_s = partition(problem).value_s
        asked = lists.searched(range(kinds), ceiling_s, None, lambda: False)
        measures, listing, weight = asked.measures, asked.listing, asked.weights
        sets = listing.sets(-math.inf, math.inf, math.inf, MANY)
        allowed = np.array([block.allowed for block in problem.blocks])
        seconds = np.where(allowed, np.array(problem.seconds), math.inf)
        for state in itertools.product((0, 1), repeat=kinds):
            early, late = measures.early(state, sets), measures.late(state, sets)
            assert np.all(early >= sets.work_s - measures.slack_s)
            assert np.all(late <= sets.work_s + measures.slack_s)
            for i in range(len(sets.work_s)):
                inside = [v for v in range(9) if sets.mask(i) >> v & 1]
                outside = [v for v in range(9) if not sets.mask(i) >> v & 1]
                for part, devices, counted in (
                    (inside, [k for k in range(kinds) if state[k]], early[i]),
                    (outside, [k for k in range(kinds) if not state[k]], listing.all_s - late[i]),
                ):
                    if devices and part:
                        most = sum(min(weight[k] * seconds[v, k] for k in devices) for v in part)
                        assert counted <= most * (1 + 1e-9) + measures.slack_s
                        if len(devices) == 1 and most <= weight[devices[0]] * ceiling_s:
                            assert counted == pytest.approx(most, abs=measures.slack_s)


@often
@given(st.integers(1, 4), st.integers(1, 12), st.integers(0, 999), st.sampled_from([0.0, 0.3, 2.0]))
def test_weights_have_the_sum_one_and_good_bounds(kinds, blocks, seed, spread):
    """None by chance, or by speed, has a better one by far: it is the best of a concave function, nearly."""
    random_ = np.random.default_rng(seed)
    seconds = random_.lognormal(0, 1, blocks) * random_.lognormal(0, spread, (kinds, blocks))
    counts = random_.integers(1, 4, kinds)

    def bound(weights):
        return float((weights[:, None] * seconds).min(axis=0).sum())

    weights = np.array(best_weights(seconds, counts.tolist()))
    assert float(weights @ counts) == pytest.approx(1.0)
    speed = 1 / seconds.sum(axis=1)
    others = [speed, *random_.lognormal(0, 1, (30, kinds))]
    for other in others:
        assert bound(weights) >= bound(other / (other @ counts)) * 0.99


def test_too_few_steps_and_no_time_leave_it_open(monkeypatch):
    """It is not said that there is no split where not all sets were looked at."""
    monkeypatch.setattr(little_cut, "KNOWN_STEPS", 2)
    problem = mixed(0, 24)
    below = partition(problem).value_s * 0.999
    assert search(problem, below).stages(MANY) is None
    for some in (False, True):
        asked = search(problem, below)
        with pytest.raises(UndecidedError):
            asked.stages(5, some=some)
    with pytest.raises(UndecidedError):  # that it has gone on with some of the sets
        asked.stages(MANY)
    with pytest.raises(OutOfTimeError):
        search(problem, below, lambda: True)
    left = iter(range(60))
    with pytest.raises(OutOfTimeError):
        search(problem, below, lambda: next(left, None) is None).stages(MANY)


@often
@given(problems(), st.sampled_from([2, 20, MANY]), st.randoms(use_true_random=False))
def test_all_sets_with_little_transfer_are_known(problem, steps, random_):
    """Those with less than is said, by their work; and in a part of the problem, those that are in it."""
    problem = one_link(problem)
    listing = Listing(problem)
    assume(listing.whole_s > 0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(little_cut, "KNOWN_STEPS", steps)
        little = LittleCut(listing)
    closed = sorted(closed_sets(problem.predecessors, MANY))
    least = [one for one in closed if weights(problem, one)[1] < little.most_s * (1 - 1e-9)]
    assert set(least) <= set(masks_of(little.sets))
    assert np.all(np.diff(little.sets.work_s) >= 0)
    before, behind = random_.choice(closed), random_.choice(closed)
    assume(not before & ~behind)
    part = little.between(before, behind)
    assert masks_of(part.sets) == [m for m in masks_of(little.sets) if not before & ~m and not m & ~behind]
    assert part.listing.whole_s == pytest.approx(listing.between(before, behind).whole_s)


def test_kinds_have_few_states():
    """Sixteen devices of two kinds have 81, where each of nine is another there are 512."""
    assert how_many_states([range(8), range(8)]) == 81
    assert how_many_states([range(1)] * 9) == 512
