"""Finishing times against brute force over all assignments and orders, and what their bounds may say."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_assignment import free_problems
from test_partition import antichain, chain

from shardwright.sharder.planning.free import fastest as fastest_module
from shardwright.sharder.planning.free.assignment import Budget, masks_of, peak_bytes
from shardwright.sharder.planning.free.cpsat import has_ortools
from shardwright.sharder.planning.free.fastest import Lead, branch_and_bound, fastest, improve_by_cpsat, improved
from shardwright.sharder.planning.free.latency import Race, listed
from shardwright.sharder.planning.problem import Crossing, bits

needs_ortools = pytest.mark.skipif(not has_ortools(), reason="OR-tools is an extra")
quick = settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def orders(count, before):
    """All orders that obey ``before``, pairs of an earlier and a later block."""
    for order in itertools.permutations(range(count)):
        place = {v: i for i, v in enumerate(order)}
        if all(place[u] < place[v] for u, v in before):
            yield order


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


def brute_force(p):
    p = dataclasses.replace(p, microbatches=1)
    count, best = len(p.blocks), math.inf
    ahead = [(u, v, None) for v in range(count) for u in bits(p.predecessors[v])]
    ahead += [(t.producer, r, t.forward_bytes) for t in p.crossings for r in bits(t.readers)]
    back = [(r, t.producer, t.backward_bytes) for t in p.crossings for r in bits(t.readers) if t.backward_bytes]
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
                done.append(max(waits) + work if mask else 0.0)
            best = min(best, *([max(done)] if count else []))
    return best


def same(found, value):
    return found == pytest.approx(value, rel=1e-6, abs=1e-9)


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
    """On more blocks than brute force manages; an exhausted search of either is a proof."""
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
