"""Free assignments against brute force over all of them, and what their bounds may say."""

from __future__ import annotations

import dataclasses
import itertools
import math

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_partition import chain, problems

from shardwright.sharder.planning.clock import Budget
from shardwright.sharder.planning.free import assign as assign_module
from shardwright.sharder.planning.free import fastest as fastest_module
from shardwright.sharder.planning.free.assign import assign, branch_and_bound, improved, listed
from shardwright.sharder.planning.free.assignment import Best, Holdings, loads_of, masks_of, peak_bytes, static_bytes
from shardwright.sharder.planning.free.bounds import bound_s, grain_bound_s
from shardwright.sharder.planning.free.cpsat import improve_by_cpsat
from shardwright.sharder.planning.free.fastest import Lead, fastest
from shardwright.sharder.planning.free.latency import Race
from shardwright.sharder.planning.free.least_memory import least_share_freely
from shardwright.sharder.planning.free.tally import Tally
from shardwright.sharder.planning.partition import partition
from shardwright.sharder.planning.problem import bits
from shardwright.sharder.planning.solver import has_ortools
from shardwright.sharder.planning.split_loads import stage_loads

needs_ortools = pytest.mark.skipif(not has_ortools(), reason="OR-tools is an extra")
quick = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@st.composite
def free_problems(draw, blocks=5, devices=3, least=1):
    p = draw(problems(least, max(7, blocks)).filter(lambda p: len(p.blocks) <= blocks and len(p.devices) <= devices))
    p = dataclasses.replace(p, recompute="never")  # only a chain of stages has some that are computed anew
    hosts = ()
    if draw(st.booleans()):
        way = st.tuples(st.sampled_from([0.0, 1.0]), st.sampled_from([1.0, 3.0, math.inf]))
        hosts = tuple(draw(st.tuples(way, way)) for _ in p.devices)
    return dataclasses.replace(
        p, transfers=draw(st.sampled_from(["staged", "direct"])), overlap=draw(st.booleans()), hosts=hosts
    )


def load_by_hand(p, of, device):
    """By the words at the head of the module, tensor by tensor."""
    mine = {v for v, d in enumerate(of) if d == device}
    compute = sum(
        p.microbatches * (p.blocks[v].forward_s[device] + p.blocks[v].backward_s[device]) + p.blocks[v].update_s[device]
        for v in mine
    )
    for tie in p.ties:
        users = set(bits(tie.users))
        if users & mine and users - mine:
            compute += p.sum_s(tie, device)
        if users & mine and tie.first not in mine and tie.update_s:
            compute += tie.update_s[device]
    out = into = 0.0
    for t in p.crossings:
        home, targets = of[t.producer], {of[r] for r in bits(t.readers)} - {of[t.producer]}
        for a, b, seen in [(home, target, i) for i, target in enumerate(sorted(targets))]:
            if p.transfers == "staged":
                if device == a and not seen:
                    out += p.ways[a][0][0] + t.forward_bytes / p.ways[a][0][1]
                    into += (p.ways[a][1][0] + t.backward_bytes / p.ways[a][1][1]) if t.backward_bytes else 0
                if device == b:
                    into += p.ways[b][1][0] + t.forward_bytes / p.ways[b][1][1]
                    out += (p.ways[b][0][0] + t.backward_bytes / p.ways[b][0][1]) if t.backward_bytes else 0
            else:
                there = p.links[a][b][0] + t.forward_bytes / p.links[a][b][1]
                back = (p.links[b][a][0] + t.backward_bytes / p.links[b][a][1]) if t.backward_bytes else 0
                if device == a:
                    out, into = out + there, into + back
                if device == b:
                    out, into = out + back, into + there
    out, into = p.microbatches * out, p.microbatches * into
    return max(compute, out, into) if p.overlap else compute + out + into


def brute_force(p):
    best = math.inf
    for of in itertools.product(range(len(p.devices)), repeat=len(p.blocks)):
        if not all(p.blocks[v].allowed[d] for v, d in enumerate(of)):
            continue
        if any(peak_bytes(p, m, d) > p.caps[d] for d, m in enumerate(masks_of(of, len(p.devices)))):
            continue
        best = min(best, max(load_by_hand(p, of, d) for d in range(len(p.devices))))
    return best


def every_load(p):
    """The same of all assignments at once, allowed or not: these, and their loads by device."""
    count, devices = len(p.blocks), len(p.devices)
    of = np.stack([np.arange(devices**count) // devices**v % devices for v in range(count)], axis=1).astype(np.int8)
    on = [[of[:, v] == d for v in range(count)] for d in range(devices)]
    compute, out, into = (np.zeros((devices, len(of))) for _ in range(3))
    for d, v in itertools.product(range(devices), range(count)):
        block = p.blocks[v]
        compute[d] += on[d][v] * (p.microbatches * (block.forward_s[d] + block.backward_s[d]) + block.update_s[d])
    for tie, d in itertools.product(p.ties, range(devices)):
        here = np.stack([on[d][v] for v in bits(tie.users)])
        compute[d, here.any(axis=0) & ~here.all(axis=0)] += p.sum_s(tie, d)
        compute[d, here.any(axis=0) & ~on[d][tie.first]] += tie.update_s[d] if tie.update_s else 0.0
    for t in p.crossings:
        reads = [np.any([on[d][r] for r in bits(t.readers)], axis=0) for d in range(devices)]
        seen = np.zeros(len(of), bool)
        for a, b in itertools.permutations(range(devices), 2):
            sent = on[a][t.producer] & reads[b]
            if p.transfers == "staged":
                (a_out, a_in), (b_out, b_in) = p.ways[a], p.ways[b]
                back = bool(t.backward_bytes)
                out[a, sent & ~seen] += a_out[0] + t.forward_bytes / a_out[1]
                into[a, sent & ~seen] += back and a_in[0] + t.backward_bytes / a_in[1]
                into[b, sent] += b_in[0] + t.forward_bytes / b_in[1]
                out[b, sent] += back and b_out[0] + t.backward_bytes / b_out[1]
                seen |= sent
            else:
                there = p.links[a][b][0] + t.forward_bytes / p.links[a][b][1]
                back_s = (p.links[b][a][0] + t.backward_bytes / p.links[b][a][1]) if t.backward_bytes else 0
                for one, other, seconds in ((out[a], into[b], there), (into[a], out[b], back_s)):
                    one[sent] += seconds
                    other[sent] += seconds
    out, into = p.microbatches * out, p.microbatches * into
    return of, np.maximum(np.maximum(compute, out), into) if p.overlap else compute + out + into


def every_assignment(p):
    """These, their loads by device, the part of the fullest device's memory that they take, and whether pins allow."""
    of, loads = every_load(p)
    devices = range(len(p.devices))
    masks = [((of == d) << np.arange(of.shape[1], dtype=np.int64)).sum(axis=1) for d in devices]
    peaks = [np.array([peak_bytes(p, mask, d) for mask in range(1 << of.shape[1])]) for d in devices]
    shares = np.max([peaks[d][masks[d]] / p.caps[d] for d in devices], axis=0)
    return of, loads, shares, np.all([np.array(block.allowed)[of[:, v]] for v, block in enumerate(p.blocks)], axis=0)


def brute_force_of_many(p):
    """The least largest load, and the smallest share of a device that is full, of all that are allowed and fit."""
    _, loads, shares, may = every_assignment(p)
    may, most = may & (shares <= 1), loads.max(axis=0)
    may_send = may & np.isfinite(most)
    return most[may].min(initial=math.inf), shares[may_send].min(initial=math.inf)


def same(found, value):
    return found == pytest.approx(value, rel=1e-6, abs=1e-9)


@quick
@given(free_problems())
def test_branch_and_bound_finds_what_brute_force_finds(p):
    """Each transfer model, overlap, pins, ties, caps and mixed devices; without OR-tools."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(assign_module, "has_ortools", lambda: False)
        found, value = assign(p, Budget(60)), brute_force(p)
    if found is None:
        assert math.isinf(value)
    else:
        assert found.exact
        assert same(found.value, value)
        assert same(max(load_by_hand(p, found.of, d) for d in range(len(p.devices))), value)


@given(free_problems())
@settings(max_examples=20, deadline=None)
def test_brute_force_is_the_same_one_by_one_and_all_at_once(p):
    """Which is how ten blocks can be gone through."""
    assert same(brute_force_of_many(p)[0], brute_force(p))


@needs_ortools
@settings(max_examples=8, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
@given(free_problems(blocks=10, devices=4, least=8))
def test_assignments_of_ten_are_the_best_of_all(p):
    """Up to ten blocks on four devices, a million assignments: the least largest load, and the least full memory."""
    load_s, share = brute_force_of_many(p)
    for found, value in ((assign(p, Budget(120)), load_s), (least_share_freely(p, Budget(120)), share)):
        if found is None:
            assert math.isinf(value)
        else:
            assert found.bound <= found.value
            assert same(found.value, value)


@needs_ortools
@quick
@given(free_problems(blocks=6), st.booleans())
def test_cpsat_finds_what_brute_force_finds(p, seeded):
    """From nothing and from lists; its bound is never above the value."""
    best = Best(p, 0.0)
    for of in listed(p) if seeded else ():
        best.offer(of)
    improve_by_cpsat(best, Budget(60))
    found, value = best.result(), brute_force(p)
    if found is None:
        assert best.closed
        assert math.isinf(value)
    else:
        assert found.bound <= found.value
        assert same(found.value, value)
        assert found.exact or value == 0


@quick
@given(free_problems())
def test_the_simple_bound_is_below_every_assignment(p):
    """Also where the devices are of different speeds."""
    value = brute_force(p)
    assert bound_s(p) <= value
    for above in (value, value * 1.5, value + 1):
        assert grain_bound_s(p, above + 1e-9) <= value


@quick
@given(free_problems(), st.data())
def test_a_tally_that_is_moved_about_says_what_the_formulas_say(p, data):
    """In any order, blocks that are nowhere among them."""
    tally = Tally(p)
    places = st.tuples(st.integers(0, len(p.blocks) - 1), st.integers(-1, len(p.devices) - 1))
    for v, d in [*data.draw(st.lists(places, max_size=12)), *enumerate([0] * len(p.blocks))]:
        tally.move(v, d)
    of = [data.draw(st.integers(0, len(p.devices) - 1)) for _ in p.blocks]
    for v, d in enumerate(of):
        tally.move(v, d)
    loads = loads_of(p, of)
    assert bool(tally.barred) == any(map(math.isinf, loads))
    if not tally.barred:
        assert tally.loads_s() == pytest.approx(loads, abs=1e-6)


@quick
@given(free_problems(blocks=6), st.integers(0, 1))
def test_local_moves_never_lose_and_never_break_a_rule(p, which):
    """Pins and caps hold after them."""
    best = Best(p, 0.0)
    for of in itertools.islice(listed(p), which, None):
        best.offer(of)
    before = best.value
    improved(best, Budget(60))
    assert best.value <= before
    if best.of:
        assert all(p.blocks[v].allowed[d] for v, d in enumerate(best.of))
        assert all(peak_bytes(p, m, d) <= p.caps[d] for d, m in enumerate(masks_of(best.of, len(p.devices))))


@quick
@given(problems().filter(lambda p: len(p.blocks) <= 6 and len(p.devices) <= 3), st.sampled_from(["staged", "direct"]))
def test_under_gpipe_a_chain_of_stages_is_a_free_assignment(p, transfers):
    """Same loads, so that free is never worse than contiguous where both fit; memory is the pipeline engine's there."""
    p = dataclasses.replace(p, transfers=transfers, schedule="gpipe", caps=(10**9,) * len(p.devices))
    split = partition(p)
    if split is None or math.isinf(split.value_s):
        return
    of = [0] * len(p.blocks)
    for device, members in split.stages:
        for v in bits(members):
            of[v] = device
    assert sorted(loads_of(p, of), reverse=True)[: len(split.stages)] == pytest.approx(
        sorted(stage_loads(p, split.stages), reverse=True)
    )
    found = assign(p, Budget(60), [of])
    assert found.value <= split.value_s * (1 + 1e-9)


def test_a_free_assignment_beats_every_chain_of_stages():
    """Of 3, 1, 1, 3, 2 both make 5 and 5; of 4, 3, 3, 2, 2, 4 only units that are no neighbours make 9 and 9."""
    p = dataclasses.replace(chain([3.0, 1.0, 1.0, 3.0, 2.0], microbatches=1), transfers="direct")
    contiguous = partition(dataclasses.replace(p, schedule="gpipe"))
    assert max(loads_of(p, assign(p, Budget(10)).of)) == 5.0 == contiguous.value_s
    p = dataclasses.replace(chain([4.0, 3.0, 3.0, 2.0, 2.0, 4.0], microbatches=1), transfers="direct")
    contiguous = partition(dataclasses.replace(p, schedule="gpipe"))
    assert contiguous.value_s == 10.0
    assert assign(p, Budget(10)).value == 9.0


def test_whole_blocks_are_known_not_to_divide():
    """Seven of 3 s on two devices: one has four of them, which divided work does not know."""
    p = dataclasses.replace(chain([3.0] * 7, microbatches=1), transfers="staged")
    assert bound_s(p) == pytest.approx(10.5)
    assert grain_bound_s(p, 15.0) == pytest.approx(12.0)


def test_no_time_still_gives_an_assignment_with_an_honest_bound():
    """Lists come before any search."""
    p = dataclasses.replace(chain([4.0, 3.0, 3.0, 2.0, 2.0, 4.0], microbatches=1), transfers="direct")
    found = assign(p, Budget(0))
    assert found.bound <= 9.0 <= found.value


def test_ctrl_c_returns_the_best_so_far(monkeypatch):
    """The search is broken off and leaves no time to what comes after."""

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(assign_module, "improved", interrupted)
    budget = Budget(100)
    found = assign(dataclasses.replace(chain([4.0, 3.0, 2.0]), transfers="staged"), budget)
    assert len(found.of) == 3
    assert budget.spent()


@quick
@given(free_problems(), st.randoms(use_true_random=False))
def test_running_sums_of_bytes_are_those_of_the_members(p, random):
    """In whatever order the blocks come, with the copies of ties."""
    held, members = Holdings(p), [0] * len(p.devices)
    for v in random.sample(range(len(p.blocks)), len(p.blocks)):
        found = [held.with_block(v, d) for d in range(len(p.devices))]
        assert found == [static_bytes(p, mask | 1 << v) for mask in members]
        device = random.randrange(len(p.devices))
        held.add(v, device)
        members[device] |= 1 << v
    assert held.bytes == [static_bytes(p, mask) for mask in members]


@pytest.mark.parametrize("solve", [assign, fastest])
def test_without_time_the_first_that_fits_is_taken(solve):
    """Nothing further is even made: on thousands of units each takes seconds."""

    def seeds():
        yield [0, 0, 0]
        raise AssertionError("another was asked for")

    assert solve(dataclasses.replace(chain([4.0, 3.0, 3.0]), transfers="direct"), Budget(0), seeds()) is not None


def test_long_graphs_are_left_to_other_searches():
    """Branch and bound calls itself for each block: of 1,500 Python would say that this is too deep."""
    p = dataclasses.replace(chain([2.0] * 1_500), transfers="direct")
    best, lead = Best(p, bound_s(p)), Lead(Race(p))
    branch_and_bound(best, Budget(10))
    fastest_module.branch_and_bound(lead, Budget(10))
    assert not best.closed
    assert not lead.closed
