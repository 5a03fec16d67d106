"""Blocks that move from stage to stage: loads as they are priced, valid splits, near what the exact search finds."""

from __future__ import annotations

import dataclasses
import math
import random

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from test_partition import block, chain, problems

from shardwright.sharder.planning.formulation.memory import Ledger
from shardwright.sharder.planning.partition import partition
from shardwright.sharder.planning.problem import Crossing, bits
from shardwright.sharder.planning.split_loads import stage_loads
from shardwright.sharder.planning.wide import shifting
from shardwright.sharder.planning.wide.shifting import Annealing, Shifts, shifted


def plain(problem):
    """The problem with room for all, a unit in each block, and without ties."""
    blocks = tuple(dataclasses.replace(b, units=("u",)) for b in problem.blocks)
    caps = (10**9,) * len(problem.caps)
    return dataclasses.replace(problem, blocks=blocks, caps=caps, ties=(), transfers="relayed", overlap=False)


def is_split(problem, stages):
    """Whether every block is in one stage, and none is before what it needs."""
    closed = 0
    for _, members in stages:
        assert not closed & members
        closed |= members
        if any(problem.predecessors[v] & ~closed for v in bits(members)):
            return False
    return closed == (1 << len(problem.blocks)) - 1


@settings(max_examples=40, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
@given(problems(), st.randoms(use_true_random=False))
def test_loads_are_those_that_a_split_is_priced_at(problem, random_):
    """After any moves, each block by one stage, as often as it may."""
    problem = plain(problem)
    count = min(len(problem.devices), len(problem.blocks))
    assume(count > 1)
    ends = [len(problem.blocks) * s // count for s in range(count + 1)]
    first = tuple((s, (1 << ends[s + 1]) - (1 << ends[s])) for s in range(count))
    assume((loads := stage_loads(problem, first)) is not None and all(map(math.isfinite, loads)))
    shifts = Shifts(problem, first)
    assert shifts.loads == pytest.approx(loads)
    for _ in range(30):
        v = random_.randrange(len(problem.blocks))
        to = shifts.stage[v] + random_.choice((-1, 1))
        if not shifts.may(v, to) or not all(map(math.isfinite, change := shifts.change(v, to))):
            continue
        shifts.move(v, to, change)
        stages = shifts.stages(shifts.stage)
        assert is_split(problem, stages)
        assert shifts.loads == pytest.approx(stage_loads(problem, stages))


@settings(max_examples=35, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
@given(problems(), st.data())
def test_a_move_is_refused_only_where_it_makes_no_split(problem, data):
    """An order that breaks, a pin, an empty stage, or a stage that does not exist."""
    problem = plain(problem)
    assume(len(problem.blocks) > 1)
    end = data.draw(st.integers(1, len(problem.blocks) - 1))
    first = ((0, (1 << end) - 1), (1, (1 << len(problem.blocks)) - (1 << end)))
    shifts = Shifts(problem, first)
    v, to = data.draw(st.integers(0, len(problem.blocks) - 1)), data.draw(st.integers(-1, 2))
    assume(abs(to - shifts.stage[v]) == 1)
    moved = shifts.stages([to if u == v else s for u, s in enumerate(shifts.stage)]) if 0 <= to < 2 else ()
    split = bool(moved) and all(members for _, members in moved) and is_split(problem, moved)
    assert shifts.may(v, to) == (split and problem.blocks[v].allowed[to])


def tangled(seed, units=12, devices=3):
    """Blocks of very uneven times that read one or two of any before, over links that cost something."""
    random_ = random.Random(seed)
    times = [random_.lognormvariate(0, 1) for _ in range(units)]
    before = [0] + [sum(1 << u for u in {random_.randrange(v) for _ in range(2)}) for v in range(1, units)]
    readers = [sum(1 << v for v in range(units) if before[v] >> u & 1) for u in range(units)]
    return dataclasses.replace(
        chain([1.0] * units, devices),
        blocks=tuple(block(time, devices) for time in times),
        predecessors=tuple(before),
        crossings=tuple(Crossing(f"t{u}", u, mask, 1, 1) for u, mask in enumerate(readers) if mask),
        links=(((0.0, 50.0),) * devices,) * devices,
    )


@pytest.mark.parametrize("seed", range(3))
def test_moves_come_near_the_best_split(seed):
    """From an equal split, within one per cent of what the search over all closed sets proves, by valid splits only."""
    problem = tangled(seed)
    exact = partition(problem)
    assert exact.exact
    cut = len(problem.blocks) // 3
    first = tuple((d, (1 << cut * d + cut) - (1 << cut * d)) for d in range(3))
    best = [(first, max(stage_loads(problem, first)))]
    for stages in shifted(problem, lambda: best[-1], 0.0, lambda: False):
        assert is_split(problem, stages)
        value_s = max(stage_loads(problem, stages))
        assert value_s < best[-1][1]
        best.append((stages, value_s))
    assert exact.value_s * (1 - 1e-9) <= best[-1][1] <= 1.01 * exact.value_s


def test_time_ends_the_moves_and_other_transfers_have_none():
    """No split comes with no time left, nor where loads are no sums of work and relayed transfers."""
    problem = tangled(0)
    stages = ((0, 1), (1, (1 << 12) - 2))
    assert list(shifted(problem, lambda: (stages, 1e9), 0.0, lambda: True)) == []
    for other in ({"transfers": "staged"}, {"overlap": True}):
        changed = dataclasses.replace(problem, **other)
        assert list(shifted(changed, lambda: (stages, 1e9), 0.0, lambda: False)) == []


@settings(max_examples=40, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
@given(problems(), st.randoms(use_true_random=False))
def test_bytes_are_those_of_the_problem(problem, random_):
    """At first the peak of each stage; where no block keeps anything, after any moves, what stays and the engine's
    buffers, to the byte, and what was beside these at first."""
    problem = plain(problem)
    count = min(len(problem.devices), len(problem.blocks))
    assume(count > 1)
    ends = [len(problem.blocks) * s // count for s in range(count + 1)]
    first = tuple((s, (1 << ends[s + 1]) - (1 << ends[s])) for s in range(count))
    shifts, anew = Shifts(problem, first), problem.recompute != "never"
    for s, (device, _) in enumerate(first):
        start, end = (1 << ends[s]) - 1, (1 << ends[s + 1]) - 1
        peak = problem.memory_bytes(start, end, device, count - 1 - s, recomputed=anew)
        assert shifts.bytes[s] == pytest.approx(peak)
    problem = dataclasses.replace(problem, ledger=Ledger((), (), ()))
    shifts = Shifts(problem, first)
    for _ in range(20):
        v = random_.randrange(len(problem.blocks))
        to = shifts.stage[v] + random_.choice((-1, 1))
        if shifts.may(v, to):
            shifts.move(v, to, (0.0, 0.0), shifts.change_of_bytes(v, to))
    closed = 0
    for s, (_, members) in enumerate(shifts.stages(shifts.stage)):
        received, sent = problem.received(closed, members), problem.sent(closed | members, members)
        buffers = sum(c.forward_bytes for c in received) + sum(c.backward_bytes for c in sent)
        static = sum(problem.blocks[v].static_bytes for v in bits(members))
        assert shifts.bytes[s] - shifts.beside[s] == static + problem.microbatches * buffers
        closed |= members


def test_stages_that_keep_nothing_take_their_gradients_too():
    """Those that they receive and work on are in the peak at first, though no block brings them."""
    problem = dataclasses.replace(tangled(0, units=12), ledger=Ledger(()))
    first = tuple((d, 0b1111 << 4 * d) for d in range(3))
    closed, peaks = 0, []
    for s, (device, members) in enumerate(first):
        peaks.append(problem.memory_bytes(closed, closed | members, device, 2 - s))
        closed |= members
    shifts = Shifts(problem, first)
    assert shifts.bytes == pytest.approx(peaks)
    assert any(shifts.beside)


def test_moves_find_a_split_that_fits_where_none_was_known():
    """Where the halves by number do not fit, blocks are moved until each device holds what it has room for."""
    sizes = [9, 9, 9, 9, 1, 1, 1, 1]
    whole = chain([1.0] * 8, cap=30)
    blocks = tuple(dataclasses.replace(b, static_bytes=s) for b, s in zip(whole.blocks, sizes, strict=True))
    problem = dataclasses.replace(whole, blocks=blocks, crossings=(), caps=(30, 30))
    halves = ((0, 0b1111), (1, 0b11110000))
    assert stage_loads(problem, halves) is None
    best = [((), math.inf)]
    for stages in shifted(problem, lambda: best[-1], 20.0, lambda: False, halves):
        loads = stage_loads(problem, stages)
        assert loads is not None
        best.append((stages, max(loads)))
    assert best[-1][1] == 4 * 5.0


@pytest.mark.parametrize("seed", range(4))
def test_moves_go_on_from_a_stage_that_is_far_too_full(seed, monkeypatch):
    """Its power is so large that nothing else counts beside it; once it is gone the others' have to be known again."""
    monkeypatch.setattr(shifting, "PATIENCE", 1)
    random_, units = random.Random(seed), 60
    problem = tangled(seed, units, devices=4)
    sizes = [random_.randint(1, 1000) for _ in range(units)]
    blocks = tuple(dataclasses.replace(b, static_bytes=s) for b, s in zip(problem.blocks, sizes, strict=True))
    problem = dataclasses.replace(problem, blocks=blocks, caps=(sum(sizes) * 3 // 10,) * 4)
    first = ((0, 1), (1, 2), (2, 4), (3, (1 << units) - 8))
    found = list(shifted(problem, lambda: ((), math.inf), 0.0, lambda: False, first))
    assert found
    assert all(is_split(problem, stages) and stage_loads(problem, stages) is not None for stages in found)


@pytest.mark.parametrize("seed", [2, 3, 5, 7])
def test_a_stage_may_be_left_with_no_work(seed, monkeypatch):
    """Where what moved away leaves a load of nothing but rounding, above nothing or below."""
    monkeypatch.setattr(shifting, "PATIENCE", 1)
    random_ = random.Random(seed)
    times = [random_.choice([0.0, 0.0, random_.random()]) for _ in range(12)]
    problem = dataclasses.replace(plain(tangled(seed)), crossings=(), predecessors=(0,) * 12)
    blocks = (dataclasses.replace(b, forward_s=(t, t * 1.1, t / 3)) for b, t in zip(problem.blocks, times, strict=True))
    problem = dataclasses.replace(problem, blocks=tuple(blocks))
    first = ((0, 0b1111), (1, 0b1111 << 4), (2, 0b1111 << 8))
    values = [max(stage_loads(problem, first))]
    for stages in shifted(problem, lambda: (first, values[-1]), 0.0, lambda: False):
        assert is_split(problem, stages)
        values.append(max(stage_loads(problem, stages)))
    assert values[-1] < values[0]


def test_runs_begin_all_over_the_range_and_then_near_those_that_ended_best(monkeypatch):
    """The first heats leave no third of the range out; later two of three are around the best that changed a split."""
    begun = []
    monkeypatch.setattr(Annealing, "_cooled", lambda _self, _shifts, *given: begun.append(given[3]) or given[:0])
    annealing = Annealing(random.Random(0))
    problem = tangled(0, units=400, devices=4)
    shifts = Shifts(problem, tuple((d, ((1 << 100) - 1) << 100 * d) for d in range(4)))
    for _ in range(shifting.ALL_OVER):
        assert list(annealing.run(shifts, 1.0, lambda: False)) == []
    low, high = shifting.HOT
    parts = {min(2, int(3 * math.log(heat / low) / math.log(high / low))) for heat in begun}
    assert parts == {0, 1, 2}
    assert annealing.ended == []  # no run has changed anything
    annealing.ended = [(1.0, 1e-4)]
    for _ in range(30):
        list(annealing.run(shifts, 1.0, lambda: False))
    around = [heat for heat in begun[shifting.ALL_OVER :] if 1e-4 / 5 < heat < 1e-4 * 5]
    assert 20 <= len(around) < 30


def test_what_ends_best_is_remembered():
    """A few of them, the best first, with the heats at which they began."""
    problem = tangled(1, units=60, devices=4)
    first = tuple((d, ((1 << 15) - 1) << 15 * d) for d in range(4))
    annealing = Annealing(random.Random(0))
    for _ in range(shifting.NEAR_BEST + 2):
        list(annealing.run(Shifts(problem, first), math.inf, lambda: False))
    assert len(annealing.ended) == shifting.NEAR_BEST
    assert annealing.ended == sorted(annealing.ended)
    assert annealing.ended[0][0] < max(Shifts(problem, first).loads)


def test_a_split_that_is_a_little_too_large_is_made_to_fit():
    """What a stage takes is known of the split at the begin, and is another once blocks have moved: known anew, a short
    run brings it below the caps."""
    problem = tangled(1, units=60, devices=4)
    sizes = [random.Random(v).randint(1, 100) for v in range(60)]
    blocks = tuple(dataclasses.replace(b, static_bytes=s) for b, s in zip(problem.blocks, sizes, strict=True))
    problem = dataclasses.replace(problem, blocks=blocks)
    first = tuple((d, ((1 << 15) - 1) << 15 * d) for d in range(4))
    shifts = Shifts(problem, first)
    problem = dataclasses.replace(problem, caps=(int(max(shifts.bytes)) - 1,) * 4)
    assert stage_loads(problem, first) is None
    shifts = Shifts(problem, first)
    assert not shifts.fits
    found = list(Annealing(random.Random(0)).mend(shifts, math.inf, lambda: False))
    assert found
    assert all(stage_loads(problem, stages) is not None for stages in found)


def test_a_run_that_ends_too_large_is_mended(monkeypatch):
    """Until it fits or is no better than the best; without that no split would come of runs that end so."""
    problem = dataclasses.replace(tangled(1, units=60, devices=4), caps=(40,) * 4)
    first = tuple((d, ((1 << 15) - 1) << 15 * d) for d in range(4))
    called = []

    def run(_self, _shifts, below_s, *_):
        called.append(("run", below_s))
        return iter(())

    def mend(_self, _shifts, below_s, *_):
        called.append(("mend", below_s))
        return iter(())

    monkeypatch.setattr(Annealing, "run", run)
    monkeypatch.setattr(Annealing, "mend", mend)
    monkeypatch.setattr(Shifts, "fits", False)
    monkeypatch.setattr(shifting, "PATIENCE", 1)
    list(shifted(problem, lambda: ((), math.inf), 0.0, lambda: False, first))
    assert called == [("run", math.inf)] + [("mend", math.inf)] * shifting.MENDED
    called.clear()
    list(shifted(problem, lambda: (first, 1e-9), 0.0, lambda: False))
    assert called == [("run", 1e-9)]
