"""Transfers of each kind, beside compute or not, against brute force by the formulas of problem.py alone."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shardwright.errors import ShardwrightError
from shardwright.sharder.planning.exact.transfers import as_staged
from shardwright.sharder.planning.formulation.memory import Ledger, Step
from shardwright.sharder.planning.partition import partition
from shardwright.sharder.planning.problem import Block, Crossing, Problem, Tie
from shardwright.sharder.planning.split_loads import stage_loads
from shardwright.sharder.planning.wide.mincut import transfer_bound_s

KINDS = ["relayed", "staged", "direct"]
CHOICES = {"never": [False], "always": [True], "auto": [False, True]}
"""Whether a stage is computed anew."""
QUIET = {"derandomize": True, "deadline": None, "suppress_health_check": list(HealthCheck)}


@st.composite
def problems(draw, most_blocks=7, kinds=KINDS):
    """Small DAGs over mixed devices: skips, own ways to the host, unusable links, ties, caps that may bind, pins, and
    stages that are computed anew."""
    count, devices = draw(st.integers(1, most_blocks)), draw(st.integers(2, 4))
    time, size = st.integers(0, 9).map(float), st.integers(0, 9)
    alike = draw(st.booleans())
    times = time.map(lambda t: (t,) * devices) if alike else st.tuples(*[time] * devices)
    chained = draw(st.booleans())
    before = [(draw(st.integers(0, (1 << v) - 1)) | (1 << v - 1 if chained else 0)) if v else 0 for v in range(count)]
    only_next = chained and draw(st.booleans())
    blocks = tuple(
        Block(
            nodes=("n",),
            forward_s=draw(times),
            backward_s=draw(times),
            update_s=draw(times),
            static_bytes=draw(size),
            units=draw(st.sampled_from([("u",), ("u",), ()])),
            allowed=draw(st.sampled_from([(True,) * devices] * 4 + [tuple(d == 0 for d in range(devices))])),
        )
        for _ in range(count)
    )
    tensors = []
    for producer in range(count):
        readers = sum(1 << v for v in range(count) if before[v] >> producer & 1)
        kept = readers & draw(st.integers(0, (1 << count) - 1))
        for i, read in enumerate((readers, kept)):
            if mask := read & (2 << producer if only_next else ~0):
                tensors.append(Crossing(f"t{producer}.{i}", producer, mask, draw(size), draw(size)))
    ties = []
    if count > 1 and draw(st.booleans()):
        users = draw(st.sets(st.integers(0, count - 1), min_size=2, max_size=4))
        copy_bytes, gradient_bytes = draw(size), draw(st.sampled_from([0, 3, 30]))
        update_s = blocks[min(users)].update_s if gradient_bytes else ()
        ties.append(Tie("p", sum(1 << v for v in users), min(users), copy_bytes, gradient_bytes, update_s))
    latency = st.sampled_from([0.0, 1.0, 2.0] * 4 + [math.inf])  # infinite: nothing may be sent over it
    one_link = st.tuples(latency, st.sampled_from([1.0, 4.0, 100.0]))
    same = draw(one_link) if alike else None
    hosts = draw(st.sampled_from([(), None]))
    return Problem(
        blocks=blocks,
        predecessors=tuple(before),
        crossings=tuple(tensors),
        devices=tuple(f"d{d}" for d in range(devices)),
        caps=draw(st.one_of(st.just((10**6,) * devices), st.tuples(*[st.integers(10, 120)] * devices))),
        links=tuple(tuple(same or draw(one_link) for _ in range(devices)) for _ in range(devices)),
        microbatches=draw(st.sampled_from([1, 2, 3, 8])),
        schedule=draw(st.sampled_from(["1f1b", "gpipe"])),
        ties=tuple(ties),
        ledger=Ledger(tuple(Step(v, draw(size), draw(size), draw(size)) for v in range(count))),
        transfers=draw(st.sampled_from(kinds)),
        overlap=draw(st.booleans()),
        hosts=() if hosts == () else tuple((draw(one_link), draw(one_link)) for _ in range(devices)),
        recompute=draw(st.sampled_from(["never", "auto", "auto", "always"])),
    )


def assignments(p, stages):
    """Every way to give each block a stage, not before those that it comes behind, with a unit in each stage."""

    def extend(stage_of):
        v = len(stage_of)
        if v == len(p.blocks):
            if {s for s, block in zip(stage_of, p.blocks, strict=True) if block.units} == set(range(stages)):
                yield stage_of
            return
        least = max((stage_of[u] for u in range(v) if p.predecessors[v] >> u & 1), default=0)
        for s in range(least, stages):
            yield from extend((*stage_of, s))

    yield from extend(())


def brute_force(p):
    """The least largest load over every contiguous split, choice of devices for it, and set of stages computed anew.

    Whether a stage is computed anew changes its own load and memory only, so each chooses for itself.
    """
    best, known = math.inf, {}
    most = len(p.devices) if p.schedule == "gpipe" else min(len(p.devices), p.microbatches)

    def least_compute_s(stage_of, s, d, stages):
        key = tuple((at > s) - (at < s) for at in stage_of), d, stages - s
        if key not in known:
            parts = [anew for anew in CHOICES[p.recompute] if fits(p, stage_of, s, d, stages, anew)]
            known[key] = min((compute_s(p, stage_of, s, d, anew) for anew in parts), default=math.inf)
        return known[key]

    for stages in range(1, most + 1):
        for stage_of in assignments(p, stages):
            transfers = list(moves(p, stage_of))
            for order in itertools.permutations(range(len(p.devices)), stages):
                computed = [least_compute_s(stage_of, s, d, stages) for s, d in enumerate(order)]
                if max(computed) < best:
                    best = min(best, max(totals(p, computed, transfers, order)))
    return best


def fits(p, stage_of, s, d, stages, anew):
    """Pins and memory of stage ``s`` on device ``d``."""
    start, end = (sum(1 << v for v, at in enumerate(stage_of) if at < s + i) for i in (0, 1))
    if not all(p.blocks[v].allowed[d] for v, at in enumerate(stage_of) if at == s):
        return False
    return p.memory_bytes(start, end, d, stages - s - 1, recomputed=anew) <= p.caps[d]


def way(p, d, out):
    """The way of a device to the host's memory or from it: given, or as slow as any of its links that is usable."""
    if p.hosts:
        return p.hosts[d][0 if out else 1]
    pairs = [(d, o) if out else (o, d) for o in range(len(p.devices)) if o != d]
    usable = [p.links[a][b] for a, b in pairs if p.links[a][b][0] < math.inf]
    return (max(s for s, _ in usable), min(r for _, r in usable)) if usable else (math.inf, 1.0)


def moves(p, stage_of):
    """Of each tensor, what goes from which stage to which; None is the host."""
    for t in p.crossings:
        made = stage_of[t.producer]
        read = sorted({stage_of[v] for v in range(len(p.blocks)) if t.readers >> v & 1} - {made})
        if not read:
            continue
        if p.transfers == "relayed":
            hops = [(c, c + 1) for c in range(made, read[-1])]
        elif p.transfers == "direct":
            hops = [(made, r) for r in read]
        else:
            hops = [(made, None), *((None, r) for r in read)]
        for a, b in hops:
            yield t.forward_bytes, a, b
            if t.backward_bytes:
                yield t.backward_bytes, b, a


def compute_s(p, stage_of, s, d, anew):
    """Of all micro-batches and the update."""
    mine = [p.blocks[v] for v, at in enumerate(stage_of) if at == s]
    forwards = 2 if anew else 1
    seconds = sum(p.microbatches * (forwards * b.forward_s[d] + b.backward_s[d]) + b.update_s[d] for b in mine)
    members = sum(1 << v for v, at in enumerate(stage_of) if at == s)
    return seconds + p.ties_s(members, d)  # tested with the search of relayed transfers


def totals(p, computed, transfers, order):
    """The load of each stage, of what it computes and ``transfers`` over the links of its device."""
    sends, receives = [0.0] * len(order), [0.0] * len(order)
    for size, a, b in transfers:
        link = None if a is None or b is None else p.links[order[a]][order[b]]
        for s, seconds in ((a, sends), (b, receives)):
            if s is not None:
                latency, rate = link or way(p, order[s], out=seconds is sends)
                seconds[s] += latency + size / rate
    parts = [(c, p.microbatches * sends[s], p.microbatches * receives[s]) for s, c in enumerate(computed)]
    return [max(each) if p.overlap else sum(each) for each in parts]


def loads(p, stage_of, order):
    """The load of each stage, none of them computed anew."""
    computed = [compute_s(p, stage_of, s, d, anew=False) for s, d in enumerate(order)]
    return totals(p, computed, moves(p, stage_of), order)


def check(problem, found, expected):
    if found is None:
        assert expected == math.inf
        return
    assert found.value_s == pytest.approx(expected)
    assert found.exact
    assert found.bound_s == found.value_s
    priced = stage_loads(problem, found.stages)
    assert priced is not None
    assert max(priced) == found.value_s


@settings(max_examples=130, **QUIET)
@given(problems())
def test_the_split_is_the_best_of_all(problem):
    """For every kind of transfers the value is that of brute force, proven; none is found where none exists."""
    check(problem, partition(problem), brute_force(problem))


@settings(max_examples=40, **QUIET)
@given(problems(most_blocks=10))
def test_the_split_of_ten_blocks_is_the_best_of_all(problem):
    """Likewise of more blocks."""
    check(problem, partition(problem), brute_force(problem))


class Clock:
    """Advances by a second whenever it is read."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        self.now += 1.0
        return self.now


@settings(max_examples=120, **QUIET)
@given(problems(most_blocks=6), st.integers(0, 12), st.sampled_from([0.0, 3.0, 30.0]))
def test_a_search_cut_short_is_honest(problem, limit, time_limit_s):
    """Whatever the limits, the bound is at most the optimum and the value at least."""
    expected = brute_force(problem)
    try:
        found = partition(problem, limit=limit, time_limit_s=time_limit_s, clock=Clock())
    except ShardwrightError:
        return
    if found is None:
        assert expected == math.inf
        return
    assert found.bound_s <= expected * (1 + 1e-9)
    assert found.value_s >= expected * (1 - 1e-9)
    assert found.bound_s <= found.value_s
    assert not found.exact or found.bound_s == found.value_s


@settings(max_examples=100, **QUIET)
@given(problems(most_blocks=6), st.sampled_from([1.0, 1.0001, 1.3, 2.0]), st.sampled_from([1, 3, 6, 15, 10_000]))
def test_the_bound_by_cuts_is_never_above_the_optimum(problem, share, looks):
    """With devices alike and any ceiling from the optimum up, and whenever the time passes, as it does in the end."""
    rows = ("forward_s", "backward_s", "update_s")
    count = len(problem.devices)
    blocks = tuple(
        dataclasses.replace(b, **{row: (getattr(b, row)[0],) * count for row in rows}) for b in problem.blocks
    )
    problem = dataclasses.replace(problem, blocks=blocks)
    expected = brute_force(problem)
    if math.isfinite(expected):
        clock = Clock()
        assert transfer_bound_s(problem, share * expected, lambda: clock() > looks) <= expected * (1 + 1e-9)
        assert clock.now < 10_000


@settings(max_examples=130, **QUIET)
@given(problems(most_blocks=6, kinds=["direct"]))
def test_staged_over_the_best_links_is_no_dearer_than_direct(problem):
    """Each stage of any split, and so a staged optimum is a bound on the direct one."""
    relaxed = as_staged(problem)
    for stages in range(1, len(problem.devices) + 1):
        for stage_of in itertools.islice(assignments(problem, stages), 20):
            order = tuple(range(stages))
            pairs = zip(loads(relaxed, stage_of, order), loads(problem, stage_of, order), strict=True)
            assert all(staged <= direct * (1 + 1e-9) for staged, direct in pairs)


def streams(count, transfers, overlap):
    """Two streams of ``count`` blocks each from one source to one sink, which reads the source too."""
    size = 2 * count + 2
    before = [0, 1, 1, *(1 << v - 2 for v in range(3, size - 1)), 1 | 1 << size - 2 | 1 << size - 3]
    readers = [sum(1 << v for v in range(size) if before[v] >> u & 1) for u in range(size - 1)]
    return Problem(
        blocks=tuple(
            Block(("n",), (t,) * 3, (2 * t,) * 3, (0.0,) * 3, 1, ("u",), (True,) * 3)
            for t in (float(1 + v * v % 7) for v in range(size))
        ),
        predecessors=tuple(before),
        crossings=tuple(Crossing(f"t{u}", u, mask, 1 + u % 3, 1 + u % 3) for u, mask in enumerate(readers)),
        devices=("a", "b", "c"),
        caps=(10**6,) * 3,
        links=(((0.1, 2.0),) * 3,) * 3,
        microbatches=4,
        ledger=Ledger(tuple(Step(v, 1, 1, 1) for v in range(size))),
        transfers=transfers,
        overlap=overlap,
    )


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("transfers", KINDS)
def test_a_graph_beyond_the_limit_keeps_its_bound(transfers, overlap):
    """Along some of its orders only, value and bound still enclose the optimum."""
    problem = streams(6, transfers, overlap)
    exact, near = partition(problem), partition(problem, limit=20, time_limit_s=5.0)
    assert exact is not None
    assert near is not None
    assert exact.exact
    assert near.bound_s <= exact.value_s * (1 + 1e-9)
    assert near.value_s >= exact.value_s * (1 - 1e-9)
    assert near.value_s <= 1.2 * exact.value_s


def test_a_skip_costs_each_kind_what_it_moves():
    """A tensor of 8 s that the first of three stages makes and the other two read, with gradients of 4 s."""
    block = Block(("n",), (1.0,) * 3, (0.0,) * 3, (0.0,) * 3, 1, ("u",), (True,) * 3)
    problem = Problem(
        blocks=(block,) * 3,
        predecessors=(0, 1, 3),
        crossings=(Crossing("t", 0, 0b110, 8, 4),),
        devices=("a", "b", "c"),
        caps=(100,) * 3,
        links=(((0.0, 1.0),) * 3,) * 3,
        microbatches=1,
        schedule="gpipe",
        ledger=Ledger(tuple(Step(v, 0, 0, 0) for v in range(3))),
    )
    stages = ((0, 0b001), (1, 0b010), (2, 0b100))

    def priced(**changes):
        return stage_loads(dataclasses.replace(problem, **changes), stages)

    assert priced() == [1 + 12, 1 + 24, 1 + 12]  # passes the second stage
    assert priced(transfers="direct") == [1 + 24, 1 + 12, 1 + 12]
    assert priced(transfers="staged") == [1 + 12, 1 + 12, 1 + 12]
    assert priced(transfers="direct", overlap=True) == [16, 8, 8]  # sends twice, receives two gradients beside
    assert priced(transfers="staged", overlap=True) == [8, 8, 8]
    free = ((0.0, math.inf),) * 2
    own = (free, ((0.0, 2.0), (0.0, 4.0)), ((1.0, 1.0), (0.0, 1.0)))
    assert priced(transfers="staged", hosts=own) == [1, 1 + 8 / 4 + 4 / 2, 1 + 8 + 1 + 4]


def test_staged_stages_hold_no_tensor_that_only_passes():
    """What a stage neither makes nor reads takes memory there where it is relayed, and nowhere else."""
    problem = streams(2, "relayed", overlap=False)
    skip = dataclasses.replace(problem, crossings=(Crossing("t", 0, 1 << 5, 10, 10),))
    relayed, staged = (
        dataclasses.replace(skip, transfers=kind).memory_bytes(0b00001, 0b01111, 1, 1) for kind in ("relayed", "staged")
    )
    assert relayed - staged >= 4 * (10 + 10)
