"""Lists of cuts: all that may be, no chain of them where no split is, and bounds that no split is below."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import random
import tracemalloc

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from test_mincut import alike
from test_partition import antichain, block, brute_force, chain, problems
from test_shifting import plain, tangled

from shardwright.sharder.planning.exact.search import OutOfTimeError, closed_sets
from shardwright.sharder.planning.partition import partition
from shardwright.sharder.planning.problem import bits
from shardwright.sharder.planning.split_loads import stage_loads
from shardwright.sharder.planning.wide import listing as listing_module
from shardwright.sharder.planning.wide import shifting
from shardwright.sharder.planning.wide.ceilings import ASKED, NEAR, _next_ceiling_s, narrowed
from shardwright.sharder.planning.wide.listing import Family, Listing, TooManyError
from shardwright.sharder.planning.wide.lists import Lists
from shardwright.sharder.planning.wide.windows import ChainSearch, Row, UndecidedError

MANY = 10**6
TIMES = "forward_s", "backward_s", "update_s"
often = settings(max_examples=12, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))


def one_link(problem):
    """The problem with room for all, no ties or pins, devices alike, and the same link between any two."""
    problem = alike(plain(problem))
    count = len(problem.devices)
    link = next(row[-1] for row in problem.links)
    blocks = tuple(dataclasses.replace(b, allowed=(True,) * count) for b in problem.blocks)
    return dataclasses.replace(
        problem, blocks=blocks, links=((link if math.isfinite(link[0]) else (1.0, 2.0),) * count,) * count
    )


def weights(problem, closed):
    """Work of a closed set, and the transfers of the cut behind it."""
    work_s = sum(problem.seconds[v][0] for v in bits(closed))
    if closed == (1 << len(problem.blocks)) - 1 or len(problem.devices) == 1:
        return work_s, 0.0
    return work_s, problem.microbatches * sum(problem.transfer_s(problem.crossing(closed), 0, 1))


def alike_rows(*counts):
    """So many stages on devices that are alike."""
    return [Row(tuple(range(count)), (1.0,) * count) for count in counts]


def masks_of(cuts):
    """All that are listed, as integers."""
    return sorted(cuts.mask(i) for i in range(len(cuts.work_s)))


@often
@given(problems(), st.tuples(*[st.integers(1, 999).map(lambda n: n / 997.3)] * 3))
def test_every_closed_set_that_is_asked_for_is_listed(problem, shares):
    """And no other, held against all closed sets; their work and transfers are those of the problem."""
    problem = one_link(problem)
    listing = Listing(problem)
    low, high, most = (share * listing.whole_s for share in shares)  # which sums rarely hit, and are left out if so
    sets = listing.sets(low, high, most, MANY)
    expected = []
    for closed in closed_sets(problem.predecessors, MANY):
        work_s, moved_s = weights(problem, closed)
        near = 1e-9 * (1 + listing.whole_s)
        assume(min(abs(work_s - moved_s - low), abs(work_s + moved_s - high), abs(moved_s - most)) > near)
        if work_s - moved_s >= low and work_s + moved_s <= high and moved_s <= most:
            expected.append(closed)
    assert masks_of(sets) == sorted(expected)
    for i, (work_s, moved_s) in enumerate(zip(sets.work_s, sets.moved_s, strict=True)):
        assert (work_s, moved_s) == pytest.approx(weights(problem, sets.mask(i)))


@often
@given(problems(), st.floats(0.2, 1.2), st.booleans(), st.integers(2, 6))
def test_sets_next_to_a_family_are_a_stage_away(problem, share, forwards, at_once):
    """Those behind some set of the family, or before one, with a load below the ceiling, also where they are gone
    through a few at a time."""
    problem = one_link(problem)
    listing = Listing(problem)
    listing_module_at_once, listing_module.AT_ONCE = listing_module.AT_ONCE, at_once
    try:
        ceiling_s = share * listing.whole_s
        family = listing.sets(0.3 * listing.whole_s, 0.7 * listing.whole_s, math.inf, MANY)
        assume(family)
        kind = "before" if forwards else "behind"
        limits = family.work_s - family.moved_s + ceiling_s if forwards else family.work_s + family.moved_s - ceiling_s
        sets = listing.sets(-math.inf, math.inf, math.inf, MANY, Family(family, kind, limits))
    finally:
        listing_module.AT_ONCE = listing_module_at_once
    expected = set()
    for closed, other in itertools.product(closed_sets(problem.predecessors, MANY), masks_of(family)):
        first, last = (other, closed) if forwards else (closed, other)
        (begin_s, in_s), (end_s, out_s) = weights(problem, first), weights(problem, last)
        load = end_s - begin_s + in_s + out_s
        assume(first & ~last or abs(load - ceiling_s) > 1e-9 * (1 + load))
        if not first & ~last and load <= ceiling_s:
            expected.add(closed)
    assert masks_of(sets) == sorted(expected)
    for i, origin in enumerate(sets.origin):
        first, last = (family.mask(origin), sets.mask(i)) if forwards else (sets.mask(i), family.mask(origin))
        assert not first & ~last


@often
@given(problems(), st.randoms(use_true_random=False))
def test_a_part_lists_what_is_between_its_ends(problem, random_):
    """Work and transfers are those of the whole problem, of its ends too."""
    problem = one_link(problem)
    closed = sorted(closed_sets(problem.predecessors, MANY))
    before, behind = random_.choice(closed), random_.choice(closed)
    assume(not before & ~behind)
    part = Listing(problem).between(before, behind)
    sets = part.sets(-math.inf, math.inf, math.inf, MANY)  # what they send may count for more than their work
    assert masks_of(sets) == [one for one in closed if not before & ~one and not one & ~behind]
    for cuts in (sets, *part.ends):
        for i in range(len(cuts.work_s)):
            expected = weights(problem, cuts.mask(i))
            assert (cuts.work_s[i], cuts.moved_s[i]) == pytest.approx(expected, rel=1e-9, abs=1e-12)


@often
@given(problems())
def test_there_is_a_chain_just_where_there_is_a_split(problem):
    """Below the optimum of all splits there is none, with any number of stages; at it there is one with such loads."""
    problem = one_link(problem)
    exact = partition(problem)  # which is held against brute force in its own tests
    assume(exact is not None and exact.exact and exact.value_s > 0)
    optimum = exact.value_s
    listing = Listing(problem)
    rows = alike_rows(*range(1, problem.most_stages + 1))
    assert ChainSearch(listing, rows, optimum * (1 - 1e-6)).stages(MANY) is None
    stages = ChainSearch(listing, rows, optimum).stages(MANY)
    assert stages is not None
    assert max(stage_loads(problem, stages)) <= optimum * (1 + 1e-9)


@often
@given(problems(), st.sampled_from([1.0, 1.05, 1.5]), st.sampled_from([3, MANY]))
def test_bounds_are_never_above_the_optimum(problem, share, most_listed):
    """Whatever transfers, links, ties, caps and pins there are, and whether sets are too many or not."""
    problem = alike(problem)
    expected = brute_force(problem)
    assume(0 < expected < math.inf)
    kept, listing_module.MOST_LISTED = listing_module.MOST_LISTED, most_listed
    ticks = itertools.count()
    try:
        best = ((0, 1),), share * expected
        for narrow in narrowed(Lists(problem), lambda: best, 0.0, lambda: next(ticks) > 300):
            assert narrow.bound <= expected * (1 + 1e-9)
    finally:
        listing_module.MOST_LISTED = kept


def test_too_few_steps_and_no_time_leave_it_open():
    """It is not said that there is no chain where not all sets were looked at."""
    problem = tangled(0, units=24)
    optimum = partition(problem)
    assert optimum.exact
    below = optimum.value_s * 0.999
    assert ChainSearch(Listing(problem), alike_rows(3), below).stages(MANY) is None
    for some in (False, True):
        asked = ChainSearch(Listing(problem), alike_rows(3), below)
        with pytest.raises(UndecidedError):
            asked.stages(5, some=some)
    with pytest.raises(UndecidedError):  # that it has gone on with some of the sets
        asked.stages(MANY)
    with pytest.raises(OutOfTimeError):
        ChainSearch(Listing(problem, lambda: True), alike_rows(3), below).stages(MANY)
    with pytest.raises(TooManyError) as error:
        Listing(problem).sets(0.0, math.inf, math.inf, 5)
    closed = closed_sets(problem.predecessors, MANY)
    assert all(mask in closed for mask in masks_of(error.value.some))


@pytest.mark.parametrize(("share", "there"), [(0.999, False), (1.0, True)])
def test_what_was_listed_is_kept_until_there_are_more_steps(share, there):
    """Asked again and again with more steps the answer is that of one call with many, for no more steps in all."""
    problem = tangled(0, units=24)
    ceiling_s = share * partition(problem).value_s

    def counted():
        listing = Listing(problem)
        real, taken = listing.sets, []
        listing.sets = lambda low, high, *rest, **weights: taken.append(low) or real(low, high, *rest, **weights)
        return ChainSearch(listing, alike_rows(3), ceiling_s), taken

    asked, taken = counted()
    for steps in (5, 50, 500, 5_000, MANY):
        with contextlib.suppress(UndecidedError):
            found = asked.stages(steps, some=False)
            break
        taken.clear()
    at_once, all_ = counted()
    assert (found is not None) == there == (at_once.stages(MANY) is not None)
    assert 0 < len(taken) < len(all_)


@pytest.mark.parametrize("steps", [500, 20_000])
def test_steps_are_kept_to_where_each_block_parts_all_sets(monkeypatch, steps):
    """Sixty blocks side by side have more undecided sets than there is time for: twice the steps are the most."""
    taken = []
    decide = Listing._decide

    def counting(*arguments):
        sets = decide(*arguments)
        taken.append(len(sets.work_s))
        return sets

    monkeypatch.setattr(Listing, "_decide", counting)
    with pytest.raises(TooManyError) as error:
        Listing(antichain(60)).sets(-math.inf, math.inf, math.inf, steps)
    assert steps < sum(taken) <= 2 * steps
    assert error.value.some


def test_making_a_listing_looks_at_the_clock():
    """Closing the sets of many blocks takes long enough for the time to pass meanwhile."""
    left = iter(range(30))
    with pytest.raises(OutOfTimeError):
        Listing(antichain(60), lambda: next(left, None) is None)


def test_what_waits_stays_small_where_each_block_parts_all_sets(monkeypatch):
    """Sixty blocks side by side: what is undecided after each is set aside, and must not pile up."""
    monkeypatch.setattr(listing_module, "MOST_WAITING", 60 * 50)
    problem = antichain(60)
    tracemalloc.start()
    try:
        with pytest.raises(TooManyError) as error:
            Listing(problem).sets(-math.inf, math.inf, math.inf, 20_000)
        _, most_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert error.value.some
    assert most_bytes < 2 * 10**6


@pytest.mark.parametrize("seed", range(2))
def test_wide_graphs_beyond_the_limit_are_split_exactly(seed, monkeypatch):
    """With far fewer closed sets allowed than there are, the value is that of the search through all, and proven."""
    monkeypatch.setattr(shifting, "PATIENCE", 2)  # few moves: lists have to do it
    problem = tangled(seed, units=16)
    exact, cut = partition(problem), partition(problem, limit=30)
    assert (cut.exact, exact.exact) == (True, True)
    assert cut.value_s == pytest.approx(exact.value_s, rel=1e-9)
    assert cut.bound_s == pytest.approx(exact.bound_s, rel=1e-9)


@pytest.mark.parametrize("transfers", ["staged", "direct", "relayed"])
def test_work_alone_is_split_exactly_whatever_the_transfers(transfers, monkeypatch):
    """Where they take no time, or less than the compute that they are beside, lists of work prove the optimum."""
    monkeypatch.setattr(shifting, "PATIENCE", 2)
    problem = dataclasses.replace(tangled(0, units=16), transfers=transfers, overlap=transfers == "relayed")
    if not problem.overlap:
        problem = dataclasses.replace(problem, crossings=())
    exact, cut = partition(problem), partition(problem, limit=30)
    assert (cut.exact, exact.exact) == (True, True)
    assert cut.value_s == pytest.approx(exact.value_s, rel=1e-9)


@settings(max_examples=60, derandomize=True, deadline=None)
@given(
    st.floats(0.001, 1000.0),
    st.floats(0.0, 1.0),
    st.lists(st.sampled_from(["bound", "undecided", "split"]), min_size=60, max_size=60),
    st.floats(0.1, 0.999),
)
def test_ceilings_lie_between_what_is_known_and_come_to_an_end(value_s, share, answers, better):
    """Whatever is answered to each: a ceiling is a bound from then on, or undecided, or there is a better split.

    None is above the best or below the bound, or falls towards 0 where that is the bound; and each answer but a better
    split leaves less to ask for, so that after few of them there is none.
    """
    slack_s = 1e-12 * value_s
    bound_s, undecided_s, asked = share * value_s, math.inf, 0
    for answer in answers:
        ceiling_s = _next_ceiling_s(bound_s, value_s, undecided_s, slack_s)
        if ceiling_s is None:
            break
        asked += 1
        assert bound_s < ceiling_s < min(value_s, undecided_s)
        assert ceiling_s >= max(min(value_s, undecided_s), NEAR * value_s) * ASKED[0]
        if answer == "bound":
            bound_s = ceiling_s
        elif answer == "undecided":
            undecided_s = ceiling_s
        else:  # found by a chain below the ceiling; or, should ties be dear, this is undecided
            value_s, undecided_s = max(bound_s, better * ceiling_s), math.inf
            slack_s = 1e-12 * value_s
    else:
        ceiling_s = _next_ceiling_s(bound_s, value_s, undecided_s, slack_s)
        assert ceiling_s is None or answers.count("split") > 5
    if "split" not in answers[:asked]:
        # Less by a fifth at least, from at most the whole to NEAR of it; halved below what is undecided.
        assert asked <= 4 + math.log(1 / NEAR) / math.log(1 / (1 - ASKED[0]))


@often
@given(problems(), st.sampled_from([1.0, 1.05, 1.5]))
def test_bounds_of_devices_that_differ_are_never_above_the_optimum(problem, share):
    """With times in proportion or not, and whatever transfers, links, ties, caps and pins there are."""
    expected = brute_force(problem)
    assume(0 < expected < math.inf)
    ticks = itertools.count()
    best = ((0, 1),), share * expected
    for narrow in narrowed(Lists(problem), lambda: best, 0.0, lambda: next(ticks) > 3_000):
        assert narrow.bound <= expected * (1 + 1e-9)


def in_proportion(problem, speeds):
    """The problem with devices so many times as fast as the first."""
    blocks = (
        dataclasses.replace(b, **{key: tuple(getattr(b, key)[0] / s for s in speeds) for key in TIMES})
        for b in problem.blocks
    )
    return dataclasses.replace(problem, blocks=tuple(blocks))


@pytest.mark.parametrize("seed", range(3))
def test_wide_graphs_on_devices_that_differ_are_split_exactly(seed, monkeypatch):
    """As for devices alike: every order of theirs is asked for."""
    monkeypatch.setattr(shifting, "PATIENCE", 2)
    problem = in_proportion(tangled(seed, units=16), (1.0, 2.1, 0.7))
    exact, cut = partition(problem), partition(problem, limit=30)
    assert (cut.exact, exact.exact) == (True, True)
    assert cut.value_s == pytest.approx(exact.value_s, rel=1e-9)
    assert {d for d, _ in cut.stages} == {0, 1, 2}


@pytest.mark.parametrize("slow", [1e-2, 1e-6, 1e-8])
def test_rounding_hides_no_split_on_devices_that_are_far_slower(slow):
    """Every device has blocks that take a second there: that split is found at a ceiling just above its load."""
    for seed in range(20):
        random_ = random.Random(seed)
        speeds = (1.0, slow * random_.uniform(0.5, 2), slow * random_.uniform(0.5, 2), random_.uniform(0.5, 2))
        rows = []
        for own in speeds:
            part = random_.random()
            shares = (part, 1 - part) if rows else (part, 1 - part, 0.0)
            rows += [tuple(share * own / speed for speed in speeds) for share in shares]
        blocks = tuple(dataclasses.replace(block(0.0, 4), forward_s=times, units=("u",)) for times in rows)
        problem = dataclasses.replace(chain([1.0] * 9, 4), crossings=(), blocks=blocks)
        value_s = max(stage_loads(problem, [(0, 7), *((d, 6 << 2 * d) for d in range(1, 4))]))
        lists = Lists(problem)
        assert lists.classes == [[0], [1], [2], [3]]
        row = Row((0, 1, 2, 3), tuple(lists.weights))
        for above in (1e-12, 1e-11, 1e-10, 1e-9):
            ceiling_s = value_s * (1 + above)
            assert lists.searched(range(4), ceiling_s, None, lambda: False).stages(MANY) is not None
            assert ChainSearch(lists.listing(lambda: False), [row], ceiling_s).stages(MANY) is not None


def test_few_kinds_of_devices_can_be_listed():
    """Devices that are alike, of two kinds, or few; not ten that all differ."""
    problem = tangled(0)
    ten = dataclasses.replace(
        problem,
        blocks=tuple(dataclasses.replace(block, allowed=(True,) * 10) for block in problem.blocks),
        devices=(*"abcdefghij",),
        caps=problem.caps[:1] * 10,
        links=((problem.links[0][1],) * 10,) * 10,
    )
    assert Lists(in_proportion(ten, (1.0,) * 10)).possible
    assert Lists(in_proportion(ten, (1.0, 2.0) * 5)).possible
    assert not Lists(in_proportion(ten, tuple(1.0 + d for d in range(10)))).possible
    nine = dataclasses.replace(ten, devices=ten.devices[:9], caps=ten.caps[:9], links=((problem.links[0][1],) * 9,) * 9)
    assert Lists(in_proportion(nine, tuple(1.0 + d for d in range(9)))).possible
