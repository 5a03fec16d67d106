"""The exact split against brute force, and what its certificate may say."""

from __future__ import annotations

import dataclasses
import itertools
import math
import tracemalloc

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_transfers import assignments

from shardwright.errors import ShardwrightError
from shardwright.sharder.planning.exact.search import closed_sets, simple_bound_s
from shardwright.sharder.planning.formulation.memory import Gradient, Ledger, Step, Storage
from shardwright.sharder.planning.partition import partition
from shardwright.sharder.planning.problem import Block, Crossing, Problem, Tie, bits
from shardwright.sharder.planning.split_loads import stage_loads


def block(time, devices=2, **changes):
    fields = {
        "nodes": ("n",),
        "forward_s": (time,) * devices,
        "backward_s": (0.0,) * devices,
        "update_s": (0.0,) * devices,
        "static_bytes": 1,
        "units": ("n",),
        "allowed": (True,) * devices,
    }
    return Block(**(fields | changes))


def chain(times, devices=2, *, cap=10**6, latency=0.0, microbatches=4, saved_bytes=0, **changes):
    """A chain of blocks over devices that are alike, with one tensor of 1 byte between neighbours."""
    return Problem(
        blocks=tuple(block(time, devices, **changes) for time in times),
        predecessors=tuple(1 << v - 1 if v else 0 for v in range(len(times))),
        crossings=tuple(Crossing(f"t{v}", v, 2 << v, 1, 1) for v in range(len(times) - 1)),
        devices=tuple(f"cpu:{d}" for d in range(devices)),
        caps=(cap,) * devices,
        links=(((latency, math.inf),) * devices,) * devices,
        microbatches=microbatches,
        schedule="1f1b",
        ledger=Ledger(tuple(Step(v, saved_bytes, saved_bytes, 0) for v in range(len(times)))),
    )


def antichain(count, devices=2):
    """A source, ``count`` blocks side by side, and a sink."""
    whole = chain([1.0] * (count + 2), devices)
    return dataclasses.replace(whole, predecessors=(0, *[1] * count, (1 << count + 1) - 1), crossings=())


class Clock:
    """Advances by ``tick`` seconds whenever it is read."""

    def __init__(self, tick):
        self.now, self.tick = 0.0, tick

    def __call__(self):
        self.now += self.tick
        return self.now


@st.composite
def problems(draw, least=1, most=7):
    """Small DAGs over mixed devices, unequal and unusable links, ties, caps that may bind, pins, both schedules.

    Stages may be computed anew, or all are.
    """
    count, devices = draw(st.integers(least, most)), draw(st.integers(2, 4))
    time = st.integers(0, 9).map(float)
    times = st.tuples(*[time] * devices)
    size = st.integers(0, 9)
    before = [0] + [draw(st.integers(0, (1 << v) - 1)) for v in range(1, count)]
    alike = draw(st.booleans())
    blocks = []
    for _ in range(count):
        allowed = draw(st.sampled_from([(True,) * devices] * 4 + [tuple(d == 0 for d in range(devices))]))
        row = times if not alike else time.map(lambda t: (t,) * devices)
        blocks.append(
            Block(
                nodes=("n",),
                forward_s=draw(row),
                backward_s=draw(row),
                update_s=draw(row),
                static_bytes=draw(size),
                units=draw(st.sampled_from([("u",), ("u",), ()])),
                allowed=allowed,
                recompute_s=draw(st.one_of(st.just(()), row)),
            )
        )
    tensors = []
    for producer in range(count):
        readers = sum(1 << v for v in range(count) if before[v] >> producer & 1)
        kept = readers & draw(st.integers(0, (1 << count) - 1))
        tensors += [
            Crossing(f"t{producer}.{i}", producer, mask, draw(size), draw(size))
            for i, mask in enumerate((readers, kept))
            if mask
        ]
    ties = []
    for name in range(draw(st.sampled_from([1, 2, 3, 1, 0])) if count > 1 else 0):
        users = draw(st.sets(st.integers(0, count - 1), min_size=2, max_size=4))
        mask, first = sum(1 << v for v in users), draw(st.sampled_from(sorted(users)))
        if ties and draw(st.booleans()):  # a second parameter of the same users
            mask, first = ties[-1].users, ties[-1].first
        # Without a gradient it is a constant of which every reader has a copy.
        copy_bytes, gradient_bytes = draw(size), draw(st.sampled_from([0, 1, 3, 9, 90]))
        update_s = blocks[first].update_s if gradient_bytes > 1 else ()
        ties.append(Tie(f"p{name}", mask, first, copy_bytes, gradient_bytes, update_s))
    latency = st.sampled_from([0.0, 1.0, 2.0] * 4 + [math.inf])  # infinite: nothing may be sent over it
    one_link = st.tuples(latency, st.sampled_from([1.0, 4.0, 100.0]))
    same_link = draw(one_link) if alike else None
    links = tuple(tuple(same_link or draw(one_link) for _ in range(devices)) for _ in range(devices))
    caps = draw(st.one_of(st.just((10**6,) * devices), st.tuples(*[st.integers(10, 120)] * devices)))
    return Problem(
        blocks=tuple(blocks),
        predecessors=tuple(before),
        crossings=tuple(tensors),
        devices=tuple(f"d{d}" for d in range(devices)),
        caps=caps,
        links=links,
        microbatches=draw(st.sampled_from([1, 2, 3, 8])),
        schedule=draw(st.sampled_from(["1f1b", "gpipe"])),
        ties=tuple(ties),
        ledger=draw(ledgers(count, tensors)),
        updates_together=tuple(draw(st.booleans()) for _ in range(devices)),
        recompute=draw(st.sampled_from(["never", "auto", "auto", "always"])),
    )


@st.composite
def ledgers(draw, count, tensors):
    """What each block takes, as one node; the tensors that cross are held, saved, waited for, or none of it."""
    size = st.integers(0, 5)
    storages, gradients, saved = [], [], [draw(size) for _ in range(count)]
    for tensor in tensors:
        readers = tuple(bits(tensor.readers))
        held, saver = draw(size), draw(st.sampled_from([None, tensor.producer, *readers]))
        storages.append(Storage(held, tensor.producer, readers, saver, draw(st.booleans())))
        if saver is not None:
            saved[saver] += held
        if tensor.backward_bytes:
            gradients.append(Gradient(tensor.backward_bytes, readers, tensor.producer, tensor.backward_bytes))
    if count > 1:
        users = tuple(sorted(draw(st.sets(st.integers(0, count - 1), min_size=2))))
        gradients.append(Gradient(draw(size), users, None, draw(size)))
    steps = tuple(Step(v, saved[v], *(draw(size) for _ in range(6))) for v in range(count))
    return Ledger(steps, tuple(storages), tuple(gradients))


def brute_force(p):
    """The least largest load over every assignment of blocks to an ordered choice of devices, and over every set of
    stages that are computed anew, by the formulas alone."""
    best = math.inf
    most = len(p.devices) if p.schedule == "gpipe" else min(len(p.devices), p.microbatches)
    for stages in range(1, most + 1):
        for stage_of in assignments(p, stages):
            for order in itertools.permutations(range(len(p.devices)), stages):
                for anew in sets_anew(p, stages):
                    value = largest_load(p, stage_of, order, anew)
                    if value is not None:
                        best = min(best, value)
    return best


def sets_anew(p, stages):
    """Which stages are computed anew: as the problem says of all, or any of them."""
    return itertools.product({"never": [False], "always": [True], "auto": [False, True]}[p.recompute], repeat=stages)


def slowest_s(p, d, size):
    """Seconds of ``size`` bytes over the slowest link that device ``d`` has."""
    ends = [pair for o in range(len(p.devices)) for pair in ((d, o), (o, d)) if o != d]
    return max(p.links[a][b][0] + size / p.links[a][b][1] for a, b in ends)


def largest_load(p, stage_of, order, anew):
    m, stages = p.microbatches, len(order)
    loads = []
    for s, d in enumerate(order):
        mine = [p.blocks[v] for v in range(len(p.blocks)) if stage_of[v] == s]
        if not all(b.allowed[d] for b in mine):
            return None
        load = sum(m * (b.forward_s[d] + b.backward_s[d]) + b.update_s[d] for b in mine)
        load += sum(m * (b.recompute_s or b.forward_s)[d] for b in mine) if anew[s] else 0
        for t in p.crossings:
            last = max(stage_of[v] for v in range(len(p.blocks)) if t.readers >> v & 1)
            first = stage_of[t.producer]
            for cut in range(first, last):  # the tensor passes from stage `cut` to the one behind it
                if s not in (cut, cut + 1):
                    continue
                (there_s, there), (back_s, back) = (
                    p.links[order[cut]][order[cut + 1]],
                    p.links[order[cut + 1]][order[cut]],
                )
                load += m * (there_s + t.forward_bytes / there)
                load += m * (back_s + t.backward_bytes / back) if t.backward_bytes else 0
        start, end = (sum(1 << v for v in range(len(p.blocks)) if stage_of[v] < s + i) for i in (0, 1))
        for tie in p.ties:
            at = {stage_of[v] for v in range(len(p.blocks)) if tie.users >> v & 1}
            if s in at and at != {s}:
                load += 2 * slowest_s(p, d, tie.gradient_bytes) if tie.gradient_bytes else 0
                load += tie.update_s[d] if tie.update_s and stage_of[tie.first] != s else 0
        if p.memory_bytes(start, end, d, stages - s - 1, recomputed=anew[s]) > p.caps[d]:
            return None
        loads.append(load)
    return max(loads)


@settings(max_examples=150, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
@given(problems())
def test_the_split_is_the_best_of_all(problem):
    """On small DAGs the value is that of brute force, proven, and no split is found where none exists."""
    check_split(problem)


@settings(max_examples=20, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
@given(problems(8, 10))
def test_the_split_of_ten_is_the_best_of_all(problem):
    """The same of DAGs of up to ten blocks, which have up to a few hundred thousand splits."""
    check_split(problem)


def check_split(problem):
    """``partition`` finds what brute force does, and proves it."""
    expected = brute_force(problem)
    found = partition(problem)
    if found is None:
        assert expected == math.inf
        return
    assert found.value_s == pytest.approx(expected)
    assert found.exact
    assert found.bound_s == found.value_s
    loads = stage_loads(problem, found.stages)
    assert loads is not None
    assert max(loads) == found.value_s


@settings(max_examples=60, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
@given(problems(), st.integers(0, 12), st.sampled_from([0.0, 3.0, 30.0]))
def test_a_search_cut_short_is_honest(problem, limit, time_limit_s):
    """Whatever the limits, the bound is at most the optimum, the value at least, and failing to search is no proof."""
    expected = brute_force(problem)
    try:
        found = partition(problem, limit=limit, time_limit_s=time_limit_s, clock=Clock(1.0))
    except ShardwrightError:
        return
    if found is None:
        assert expected == math.inf
        return
    assert found.bound_s <= expected * (1 + 1e-9)
    assert found.value_s >= expected * (1 - 1e-9)
    assert found.bound_s <= found.value_s
    assert not found.exact or found.bound_s == found.value_s


def test_pinned_blocks_larger_than_their_device_are_seen_without_search():
    """Together they are, and none of them alone: no time is needed to say so, however wide the graph."""
    wide = antichain(40)
    blocks = tuple(dataclasses.replace(b, static_bytes=10, allowed=(True, v >= 30)) for v, b in enumerate(wide.blocks))
    pinned = dataclasses.replace(wide, blocks=blocks, caps=(299, 10**6))
    assert partition(pinned, time_limit_s=0.0) is None
    with pytest.raises(ShardwrightError, match="found"):
        partition(dataclasses.replace(pinned, caps=(320, 10**6)), time_limit_s=0.0)


def test_closed_sets_of_wide_graphs_are_too_many_at_once():
    """Seen from the blocks that may come next, of which any may be in, without listing as many sets as are allowed."""
    side_by_side = 10
    assert len(closed_sets(antichain(side_by_side).predecessors, 2**side_by_side + 2)) == 2**side_by_side + 2
    assert closed_sets(antichain(side_by_side).predecessors, 2**side_by_side + 1) is None
    tracemalloc.start()
    try:
        assert closed_sets(antichain(400).predecessors, 50_000) is None
        _, most_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert most_bytes < 10**6


@pytest.mark.parametrize(
    ("times", "devices", "value"),
    [
        ([4, 1, 1, 4], 2, 5),
        ([1, 1, 1, 1], 2, 2),
        ([7], 2, 7),
        ([1, 2, 3, 4, 5, 6], 3, 9),
        ([5, 1, 1, 1, 5], 4, 5),
    ],
)
def test_chains_with_known_optima(times, devices, value):
    """Chains of small integers are cut where a person would cut them."""
    found = partition(chain(times, devices))
    assert found is not None
    assert (found.value_s, found.exact) == (4 * value, True)


def test_slower_device_gets_less():
    """On a device of a third of the speed there is a quarter of the work."""
    whole = chain([1.0] * 8)
    blocks = tuple(dataclasses.replace(b, forward_s=(3.0, 1.0)) for b in whole.blocks)
    found = partition(dataclasses.replace(whole, blocks=blocks))
    assert found is not None
    assert found.value_s == 4 * 6.0
    assert sorted((d, m.bit_count()) for d, m in found.stages) == [(0, 2), (1, 6)]


def test_slow_link_keeps_the_model_in_one_piece():
    """Where a transfer costs more than the work that it saves, there is one stage."""
    found = partition(chain([1, 1], latency=5.0))
    assert found is not None
    assert len(found.stages) == 1


def test_faster_direction_of_a_link_decides_the_order():
    """Of two devices that are alike but for their link, the one that sends faster comes first."""
    problem = dataclasses.replace(chain([1, 1]), links=(((0.0, 1.0), (9.0, 1.0)), ((0.0, 1.0), (0.0, 1.0))))
    one_way = tuple(dataclasses.replace(t, forward_bytes=0, backward_bytes=0) for t in problem.crossings)
    found = partition(dataclasses.replace(problem, crossings=one_way))
    assert found is not None
    assert found.stages == ((1, 0b01), (0, 0b10))


def test_slow_way_into_a_stage_does_not_rule_out_a_faster_one():
    """The last block must be on device 2: from device 1 that is slow, so device 0 goes between them."""
    problem = chain([4.5, 2, 5], devices=3)
    links = (((0.0, math.inf),) * 3, ((0.0, math.inf), (0.0, math.inf), (3.0, math.inf)), ((0.0, math.inf),) * 3)
    last = dataclasses.replace(problem.blocks[2], allowed=(False, False, True))
    found = partition(dataclasses.replace(problem, links=links, blocks=(*problem.blocks[:2], last)))
    assert found is not None
    assert found.stages == ((1, 0b001), (0, 0b010), (2, 0b100))
    assert (found.value_s, found.exact) == (4 * 5, True)


UNUSABLE = (math.inf, 1.0)


def test_parts_that_exchange_nothing_need_no_link():
    """Blocks side by side are evened out over devices that cannot talk, as nothing crosses between them."""
    whole = chain([3, 3, 1, 1])
    problem = dataclasses.replace(whole, predecessors=(0,) * 4, crossings=(), links=((UNUSABLE,) * 2,) * 2)
    found = partition(problem)
    assert found is not None
    assert (found.value_s, found.exact) == (4 * 4, True)


def test_what_has_no_gradient_needs_no_way_back():
    """Tensors without gradients go over the one direction that is usable, and over that one only."""
    whole = chain([3, 3, 1, 1])
    sent = Crossing("t", 0, 0b10, 1, 0)
    links = (((0.0, 1.0), (0.0, math.inf)), (UNUSABLE, (0.0, 1.0)))
    found = partition(dataclasses.replace(whole, predecessors=(0, 1, 0, 0), crossings=(sent,), links=links))
    assert found is not None
    assert [device for device, _ in found.stages] == [0, 1]
    assert (found.value_s, found.exact) == (4 * 4, True)
    trained = dataclasses.replace(sent, backward_bytes=1)
    alone = partition(dataclasses.replace(whole, predecessors=(0, 1, 0, 0), crossings=(trained,), links=links))
    assert alone is not None
    assert math.isfinite(alone.value_s)
    assert not any(members >> 0 & 1 != members >> 1 & 1 for _, members in alone.stages)


def test_roomier_device_takes_the_end_where_the_weights_are():
    """Of two devices that are alike but for their memory, the small one comes first when the first blocks are small."""
    problem = dataclasses.replace(chain([1] * 4), caps=(100, 10))
    blocks = tuple(dataclasses.replace(b, static_bytes=s) for b, s in zip(problem.blocks, (1, 1, 40, 40), strict=True))
    found = partition(dataclasses.replace(problem, blocks=blocks))
    assert found is not None
    assert found.stages == ((1, 0b0011), (0, 0b1100))


def test_tight_memory_is_met_by_every_device():
    """Where each device holds one block only, each gets one, however uneven the work is."""
    found = partition(dataclasses.replace(chain([1, 1, 6], devices=3, static_bytes=9, cap=11), crossings=()))
    assert found is not None
    assert [m for _, m in found.stages] == [0b001, 0b010, 0b100]


def test_1f1b_has_no_more_stages_than_microbatches():
    """Two micro-batches make at most two stages under 1F1B, and as many as devices under GPipe."""
    problem = chain([1, 1, 1, 1], devices=4, microbatches=2)
    found = partition(problem)
    assert found is not None
    assert len(found.stages) == 2
    found = partition(dataclasses.replace(problem, schedule="gpipe"))
    assert found is not None
    assert len(found.stages) == 4


def test_every_closed_set_is_listed_once():
    """A diamond has six predecessor-closed sets, and each step to a larger one adds one ready block."""
    lattice = closed_sets((0b0, 0b1, 0b1, 0b110), limit=6)
    assert lattice is not None
    assert list(lattice) == [0b0, 0b1, 0b11, 0b101, 0b111, 0b1111]
    assert lattice[0b1] == [(1, 0b11), (2, 0b101)]
    assert closed_sets((0b0, 0b1, 0b1, 0b110), limit=5) is None


def test_too_many_closed_sets_leave_a_gap_that_is_said():
    """Beyond the limit the split of one order is returned with a valid bound, and is not called exact."""
    problem = antichain(9)
    problem = dataclasses.replace(problem, blocks=tuple(block(float(3 + v * v % 7)) for v in range(11)))
    best, cut = partition(problem), partition(problem, limit=20)
    assert best is not None
    assert cut is not None
    assert best.exact
    assert not cut.exact or cut.value_s == best.value_s
    assert cut.bound_s <= best.value_s <= cut.value_s


def test_no_time_at_all_gives_the_even_split():
    """With no time to search there is a split, a bound below it, and no claim that it is the best."""
    problem = chain([9, 1, 1, 1, 1, 1, 1, 7, 8, 2, 5], devices=3)
    found = partition(problem, time_limit_s=0.0)
    assert found is not None
    assert not found.exact
    assert found.bound_s == simple_bound_s(problem) < found.value_s


def test_no_time_and_nothing_found_is_an_error():
    """When the time ends before a split that fits is found, the error says so and what to do."""
    problem = chain([9, 1, 1, 1], cap=5)
    blocks = tuple(dataclasses.replace(b, static_bytes=s) for b, s in zip(problem.blocks, (1, 2, 1, 4), strict=True))
    problem = dataclasses.replace(problem, blocks=blocks, crossings=())
    assert partition(problem) is not None
    with pytest.raises(ShardwrightError, match="in the time allowed; allow more with --time-limit"):
        partition(problem, time_limit_s=0.0)


def test_time_running_out_keeps_what_was_proven():
    """A search that is stopped half way reports a bound between the simple one and the optimum."""
    times = [float(3 + v * v % 11) for v in range(14)]
    problem = chain(times, devices=4, latency=0.3)
    optimum = partition(problem)
    assert optimum is not None
    bounds = []
    for ticks in range(0, 200, 5):
        found = partition(problem, time_limit_s=float(ticks), clock=Clock(1.0))
        assert found is not None
        assert simple_bound_s(problem) <= found.bound_s <= optimum.value_s <= found.value_s
        bounds.append(found.bound_s)
    assert min(bounds) < max(bounds)


def test_memory_is_refused_without_search():
    """A block that is larger than every cap, or weights beyond all caps together, have no split, at no time at all."""
    assert partition(chain([1, 1], static_bytes=7, cap=6), time_limit_s=0.0) is None
    assert partition(chain([1] * 8, static_bytes=2, cap=7), time_limit_s=0.0) is None


def test_activations_in_flight_bind_the_first_stage_most():
    """Under 1F1B the first of two stages holds two micro-batches: it gets the smaller share."""
    found = partition(dataclasses.replace(chain([1] * 6, saved_bytes=10, static_bytes=0, cap=46), crossings=()))
    assert found is not None
    assert [m.bit_count() for _, m in found.stages] == [2, 4]
    assert found.value_s == 4 * 4.0


def tied(times, users, *, devices=2, gradient_bytes=6, copy_bytes=1, first=None, **changes):
    """A chain without transfers of which ``users`` share a parameter; summing it takes 2 * (1 + gradient / 2) s."""
    slow = (((1.0, 2.0),) * devices,) * devices
    first = users[0] if first is None else first
    tie = Tie("w", sum(1 << v for v in users), first, copy_bytes, gradient_bytes)
    return dataclasses.replace(chain(times, devices, **changes), crossings=(), links=slow, ties=(tie,))


def test_each_holder_of_a_copy_pays_once_a_step():
    """Two stages of 4 * 4 s of work that share 6 bytes of gradient pay 2 * (1 s + 6 / 2 s) each, and still gain."""
    problem = tied([2] * 4, (0, 3))
    found = partition(problem)
    assert found is not None
    assert (found.value_s, found.bound_s, found.exact) == (16.0 + 8.0, 24.0, True)
    assert stage_loads(problem, found.stages) == [24.0, 24.0]


def test_stage_between_the_copies_pays_nothing():
    """The stage without a user takes over what the two with a copy lose by the 12 s of their sum."""
    problem = tied([1] * 12, (0, 11), devices=3, gradient_bytes=10)
    found = partition(problem)
    assert found is not None
    assert [m.bit_count() for _, m in found.stages] == [3, 6, 3]
    assert stage_loads(problem, found.stages) == [12 + 12, 24, 12 + 12]


def test_stage_with_every_user_pays_nothing():
    """Two users side by side stay together although the even cut is between them; far apart from there it is made."""
    together = tied([1] * 8, (3, 4))
    found = partition(together)
    assert found is not None
    assert found.value_s == 4 * 5
    assert {m.bit_count() for _, m in found.stages} == {5, 3}
    elsewhere = partition(tied([1] * 8, (5, 6)))
    assert elsewhere is not None
    assert elsewhere.value_s == 4 * 4


@pytest.mark.parametrize(("gradient_bytes", "stages", "value_s"), [(0, 2, 16.0), (13, 2, 31.0), (15, 1, 32.0)])
def test_price_of_a_tie_decides_whether_the_chain_is_split(gradient_bytes, stages, value_s):
    """First and last block share a parameter: they part as long as its sum takes less than the work that it saves."""
    found = partition(tied([2] * 4, (0, 3), gradient_bytes=gradient_bytes))
    assert found is not None
    assert (len(found.stages), found.value_s, found.exact) == (stages, value_s, True)


def test_slowest_link_of_each_device_is_paid():
    """A copy on a device with a slow link to any other pays for that, in either direction."""
    links = (((0.0, 1.0), (1.0, 2.0), (0.0, 4.0)), ((0.0, 4.0), (0.0, 1.0), (5.0, 4.0)), ((0.0, 4.0),) * 3)
    problem = dataclasses.replace(tied([2] * 4, (0, 3), devices=3, gradient_bytes=8), links=links)
    assert [problem.ties_s(0b0011, device) for device in range(3)] == [2 * (1 + 4), 2 * (5 + 2), 2 * (5 + 2)]
    assert problem.ties_s(0b1001, 0) == problem.ties_s(0b0110, 0) == 0.0


def test_copy_takes_memory_beside_the_first():
    """The stage without the block that counts the parameter has a copy more; where that does not fit they stay."""
    problem = tied([1] * 4, (0, 3), copy_bytes=5, gradient_bytes=0, cap=7)
    assert [problem.memory_bytes(*cuts, 0, 0) for cuts in ((0, 0b0011), (0b0011, 0b1111), (0, 0b1111))] == [2, 7, 4]
    found = partition(problem)
    assert found is not None
    assert [m.bit_count() for _, m in found.stages] == [2, 2]
    tight = partition(dataclasses.replace(problem, caps=(7, 6)))
    assert tight is not None
    assert tight.stages == ((1, 0b0011), (0, 0b1100))
    tightest = partition(dataclasses.replace(problem, caps=(6, 5)))
    assert tightest is not None
    assert tightest.stages == ((1, 0b0111), (0, 0b1000))


def test_copies_of_two_parameters_add_up():
    """Two parameters of the same users cost the time and the memory of both."""
    one = tied([1] * 4, (0, 3), copy_bytes=5, gradient_bytes=2, cap=7)
    two = dataclasses.replace(one, ties=one.ties * 2)
    assert (one.ties_s(0b0011, 0), two.ties_s(0b0011, 0)) == (4.0, 8.0)
    found, together = partition(one), partition(two)
    assert found is not None
    assert together is not None
    assert (found.value_s, len(found.stages)) == (12.0, 2)
    assert (together.value_s, len(together.stages)) == (16.0, 1)
    halves = partition(dataclasses.replace(two, ties=tuple(dataclasses.replace(t, gradient_bytes=0) for t in two.ties)))
    assert halves is not None
    assert (halves.exact, len(halves.stages)) == (True, 1)


def test_copy_that_fits_nowhere_keeps_the_users_in_one_piece():
    """A block that would not fit with a copy of its own fits beside the block that counts it."""
    found = partition(tied([1, 1], (0, 1), copy_bytes=9, cap=5))
    assert found is not None
    assert found.stages == ((0, 0b11),)


def test_three_copies_of_one_parameter():
    """Each of three stages with a user pays, and the two without the first one have a copy more."""
    problem = tied([3] * 3, (0, 1, 2), devices=3, first=1, gradient_bytes=2, copy_bytes=10)
    stages = ((0, 0b001), (1, 0b010), (2, 0b100))
    assert stage_loads(problem, stages) == [12 + 4] * 3
    assert [problem.memory_bytes(m - 1, 2 * m - 1, 0, 0) for _, m in stages] == [11, 1, 11]


def test_tied_chain_on_mixed_devices_is_exact():
    """Ninety-six blocks on eight devices, the first and the last sharing a parameter, are split with proof."""
    speeds = [1.0, 2.1, 1.4, 0.7, 1.1, 1.9, 0.9, 1.3]
    problem = tied([1.0] * 96, (0, 95), devices=8, gradient_bytes=4, microbatches=8)
    blocks = tuple(
        dataclasses.replace(b, forward_s=tuple((0.5 + (7 * v % 11) / 8) / speed for speed in speeds))
        for v, b in enumerate(problem.blocks)
    )
    found = partition(dataclasses.replace(problem, blocks=blocks))
    assert found is not None
    assert (found.exact, len(found.stages)) == (True, 8)


@pytest.mark.timeout(90)  # without the limit it would take many minutes
@pytest.mark.parametrize("devices", [2, 8])
def test_wide_and_long_graphs_keep_to_the_time(devices):
    """Hundreds of blocks side by side on mixed devices end within the limit, with a split and an honest gap."""
    problem = antichain(300, devices)
    blocks = tuple(
        block(1.0, devices, forward_s=tuple(1.0 + (7 * v + 3 * d) % 5 + d / 10 for d in range(devices)))
        for v in range(302)
    )
    found = partition(dataclasses.replace(problem, blocks=blocks, microbatches=8), time_limit_s=1.0)
    assert found is not None
    assert found.bound_s <= found.value_s


def test_devices_that_differ_in_the_optimizers_memory_alone_are_told_apart():
    """The second block, whose updates are too large all at once, fits only where they come one after another."""
    p = chain([1.0, 1.0], cap=10, microbatches=2)
    steps = (Step(0, 0, 0, 0), Step(1, 0, 0, 0, update=1, update_left=0, update_together=100))
    for slow in (0, 1):
        together = tuple(d == slow for d in range(2))
        split = partition(dataclasses.replace(p, ledger=Ledger(steps), updates_together=together))
        assert split.stages == ((slow, 0b01), (1 - slow, 0b10))
