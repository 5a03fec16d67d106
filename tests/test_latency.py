"""Finishing times against brute force over all assignments and orders, and what their bounds may say."""

from __future__ import annotations

import dataclasses
import itertools
import math

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_assignment import every_assignment, free_problems
from test_partition import antichain, chain

from shardwright.errors import ShardwrightError
from shardwright.sharder.planning.clock import Budget
from shardwright.sharder.planning.free import fastest as fastest_module
from shardwright.sharder.planning.free.assignment import masks_of, peak_bytes
from shardwright.sharder.planning.free.fastest import Lead, branch_and_bound, fastest, improve_by_cpsat, improved
from shardwright.sharder.planning.free.latency import Race, listed
from shardwright.sharder.planning.problem import Crossing, bits
from shardwright.sharder.planning.solver import has_ortools

needs_ortools = pytest.mark.skipif(not has_ortools(), reason="OR-tools is an extra")
quick = settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def orders(count, before, done=()):
    """All orders that obey ``before``, pairs of an earlier and a later block."""
    if len(done) == count:
        yield done
    for v in range(count):
        if v not in done and all(u in done for u, w in before if w == v):
            yield from orders(count, before, (*done, v))


def crossing_s(p, size, a, b):
    if a == b:
        return 0.0
    if p.transfers == "staged":
        (out, _), (_, into) = p.ways[a], p.ways[b]
        return out[0] + size / out[1] + into[0] + size / into[1]
    return p.links[a][b][0] + size / p.links[a][b][1]


def ends_of(p, of, order, seconds, waits, begin):
    """When each block ends that starts as early as it can in ``order``; ``waits`` = (source, target, bytes or None)."""
    end, free = {}, {}
    for v in order:
        arrivals = [
            end[u] + (0.0 if size is None else crossing_s(p, size, of[u], of[v])) for u, w, size in waits if w == v
        ]
        start = max([begin, free.get(of[v], begin), *arrivals])
        end[v] = free[of[v]] = start + seconds[v][of[v]]
    return end


def waits_of(p):
    """What waits for what, forward and backward: source, target, and the bytes between them or None."""
    ahead = [(u, v, None) for v in range(len(p.blocks)) for u in bits(p.predecessors[v])]
    ahead += [(t.producer, r, t.forward_bytes) for t in p.crossings for r in bits(t.readers)]
    back = [(r, t.producer, t.backward_bytes) for t in p.crossings for r in bits(t.readers) if t.backward_bytes]
    return ahead, back


def brute_force(p):
    p = dataclasses.replace(p, microbatches=1)
    count, best = len(p.blocks), math.inf
    ahead, back = waits_of(p)
    for of in itertools.product(range(len(p.devices)), repeat=count):
        masks = masks_of(of, len(p.devices))
        if not all(p.blocks[v].allowed[d] for v, d in enumerate(of)):
            continue
        if any(peak_bytes(p, m, d) > p.caps[d] for d, m in enumerate(masks)):
            continue
        turn = min(
            max(ends_of(p, of, order, [b.forward_s for b in p.blocks], ahead, 0.0).values())
            for order in orders(count, [(u, v) for u, v, _ in ahead])
        )
        if math.isinf(turn):
            continue
        for order in orders(count, [(u, v) for u, v, _ in back]):
            end = ends_of(p, of, order, [b.backward_s for b in p.blocks], back, turn)
            done = []
            for d, mask in enumerate(masks):
                ties = [t for t in p.ties if t.users & mask and t.users & ~mask and t.gradient_bytes]
                waits = [end[v] for v in bits(mask)] + [end[v] for t in ties for v in bits(t.users)]
                work = sum(p.blocks[v].update_s[d] for v in bits(mask)) + sum(p.sum_s(t, d) for t in ties)
                work += sum(t.update_s[d] for t in ties if t.update_s and not mask >> t.first & 1)
                done.append(max(waits) + work if mask else 0.0)
            best = min(best, *([max(done)] if count else []))
    return best


def every_end(p, of, order, seconds, waits, begin):
    """What :func:`ends_of` says, of many assignments at once: ends by block and assignment."""
    devices, lanes = len(p.devices), np.arange(len(of))
    end, free = np.zeros((of.shape[1], len(of))), np.tile(begin, (devices, 1))
    for v in order:
        start = free[of[:, v], lanes]
        for u, _, size in (wait for wait in waits if wait[1] == v):
            between = [
                [0.0 if size is None else crossing_s(p, size, a, b) for b in range(devices)] for a in range(devices)
            ]
            start = np.maximum(start, end[u] + np.array(between)[of[:, u], of[:, v]])
        free[of[:, v], lanes] = end[v] = start + np.array(seconds[v])[of[:, v]]
    return end


def brute_force_of_many(p):
    """The least finishing time over all orders, each for all assignments at once."""
    p = dataclasses.replace(p, microbatches=1)
    count, devices = len(p.blocks), range(len(p.devices))
    of, _, shares, may = every_assignment(p)
    of = of[may & (shares <= 1)]
    on = [of == d for d in devices]
    ahead, back = waits_of(p)
    begin = np.zeros(len(of))
    turn = np.full(len(of), math.inf)
    for order in orders(count, [(u, v) for u, v, _ in ahead]):
        end = every_end(p, of, order, [b.forward_s for b in p.blocks], ahead, begin)
        turn = np.minimum(turn, end.max(axis=0))
    best = math.inf
    for order in orders(count, [(u, v) for u, v, _ in back]):
        end, last = every_end(p, of, order, [b.backward_s for b in p.blocks], back, turn), np.zeros(len(of))
        for d in devices:
            waits = np.where(on[d].T, end, 0.0).max(axis=0)
            work = on[d] @ np.array([b.update_s[d] for b in p.blocks])
            for tie in (tie for tie in p.ties if tie.gradient_bytes):
                users = [*bits(tie.users)]
                held = on[d][:, users].any(axis=1) & ~on[d][:, users].all(axis=1)
                waits = np.where(held, np.maximum(waits, end[users].max(axis=0)), waits)
                work += np.where(held, p.sum_s(tie, d), 0.0)
                if tie.update_s:
                    work += np.where(held & ~on[d][:, tie.first], tie.update_s[d], 0.0)
            last = np.maximum(last, np.where(on[d].any(axis=1), waits + work, 0.0))
        best = min(best, last.min(initial=math.inf))
    return best


def same(found, value):
    return found == pytest.approx(value, rel=1e-6, abs=1e-9)


@quick
@given(free_problems(blocks=4, devices=3))
def test_brute_force_is_the_same_one_by_one_and_all_at_once(p):
    """Which is how ten blocks can be gone through."""
    assert same(brute_force_of_many(p), brute_force(p))


def few_orders(p, most=40):
    """Whether there are so many orders at most, of the forward and of the backward."""
    return all(
        len([*itertools.islice(orders(len(p.blocks), [(u, v) for u, v, _ in waits]), most + 1)]) <= most
        for waits in waits_of(p)
    )


@needs_ortools
@settings(max_examples=8, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
@given(free_problems(blocks=10, devices=4, least=8).filter(few_orders))
def test_schedules_of_ten_are_the_best_of_all(p):
    """Up to ten blocks on four devices: a million assignments, each in every order.

    What is proven in some seconds is it; of the rest the schedule is no better, and the bound not above.
    """
    value = brute_force_of_many(p)
    try:
        found = fastest(p, Budget(8))
    except ShardwrightError:  # nothing in that time
        return
    if found is None:
        assert math.isinf(value)
    elif found.exact:
        assert same(found.schedule.value_s, value)
    else:
        assert found.bound_s <= value * (1 + 1e-9)
        assert found.schedule.value_s >= value * (1 - 1e-9)


@quick
@given(free_problems(blocks=4, devices=3))
def test_branch_and_bound_finds_what_brute_force_finds(p):
    """All assignments and orders, staged and direct, with ties, pins and caps; without OR-tools."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fastest_module, "has_ortools", lambda: False)
        found, value = fastest(p, Budget(60)), brute_force(p)
    if found is None:
        assert math.isinf(value)
    else:
        assert found.exact
        assert same(found.schedule.value_s, value)


@needs_ortools
@quick
@given(free_problems(blocks=4, devices=3), st.booleans())
def test_cpsat_finds_what_brute_force_finds(p, seeded):
    """From nothing and from lists; its bound is never above the value."""
    lead = Lead(Race(p))
    lead.bound_s = 0.0
    for of in listed(lead.race) if seeded else ():
        lead.offer_assignment(of)
    improve_by_cpsat(lead, Budget(60))
    found, value = lead.result(), brute_force(p)
    if found is None:
        assert lead.closed
        assert math.isinf(value)
    else:
        assert found.bound_s <= found.schedule.value_s
        assert same(found.schedule.value_s, value)


@needs_ortools
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(free_problems(blocks=6, devices=3))
def test_cpsat_and_branch_and_bound_agree(p):
    """An exhausted search of either is a proof."""
    one, other = Lead(Race(p)), Lead(Race(p))
    branch_and_bound(one, Budget(5))
    improve_by_cpsat(other, Budget(60))
    if one.closed and other.schedule is not None:
        assert same(one.value_s, other.value_s)


@quick
@given(free_problems(blocks=4, devices=3))
def test_the_bound_is_below_every_schedule_and_lists_obey_the_rules(p):
    """Longest way and area; what the lists and the moves offer fits."""
    lead, value = Lead(Race(p)), brute_force(p)
    assert lead.bound_s <= value or math.isinf(value)
    for of in listed(lead.race):
        lead.offer_assignment(of)
    improved(lead, Budget(60))
    assert lead.value_s >= value * (1 - 1e-9)
    if lead.schedule:
        assert all(p.blocks[v].allowed[d] for v, d in enumerate(lead.schedule.of))


def test_branches_run_side_by_side():
    """A source, two branches of 3 s and a sink over two devices: 1 + 3 + 1, and not 1 + 3 + 3 + 1."""
    p = antichain(2)
    p = dataclasses.replace(
        p,
        blocks=tuple(
            dataclasses.replace(b, forward_s=(t, t)) for b, t in zip(p.blocks, [1.0, 3.0, 3.0, 1.0], strict=True)
        ),
        crossings=(Crossing("a", 0, 0b110, 0, 0), Crossing("b", 1, 0b1000, 0, 0), Crossing("c", 2, 0b1000, 0, 0)),
        transfers="direct",
    )
    found = fastest(p, Budget(10))
    assert found.schedule.value_s == 5.0
    assert found.exact
    slow = dataclasses.replace(p, links=(((9.0, 1.0),) * 2,) * 2)
    assert fastest(slow, Budget(10)).schedule.value_s == 8.0  # a transfer takes longer than the other branch


def test_no_time_still_gives_a_schedule_with_an_honest_bound():
    """Lists come before any search."""
    found = fastest(dataclasses.replace(chain([4.0, 3.0, 3.0]), transfers="direct"), Budget(0))
    assert found.schedule.value_s == 10.0 >= found.bound_s


def test_ctrl_c_returns_the_best_so_far(monkeypatch):
    """The search is broken off and leaves no time to what comes after."""

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(fastest_module, "improved", interrupted)
    budget = Budget(100)
    found = fastest(dataclasses.replace(antichain(3), transfers="direct"), budget)
    assert len(found.schedule.of) == 5
    assert budget.spent()


@needs_ortools
def test_what_takes_no_time_does_not_wait_for_what_starts_with_it():
    """CP-SAT lets both start at once; in the order of the graph the one of no time would come after 5 s."""
    p = dataclasses.replace(antichain(2, devices=1), transfers="direct")
    p = dataclasses.replace(
        p,
        blocks=tuple(
            dataclasses.replace(b, forward_s=(t,)) for b, t in zip(p.blocks, [1.0, 5.0, 0.0, 2.0], strict=True)
        ),
    )
    lead = Lead(Race(p))
    lead.offer_assignment([0] * 4)
    clocked = fastest_module._Clocked(lead)
    starts = dict(zip(map(id, clocked.starts[0]), [0, 1, 1, 6], strict=True))
    assert clocked.ordered(lead.race.forward, clocked.starts[0], [0] * 4, lambda x: starts[id(x)]) == [0, 2, 1, 3]
