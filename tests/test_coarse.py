"""Fewer blocks with the same optimum, against brute force over all splits of both problems."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from test_partition import block, chain
from test_transfers import brute_force, problems

from shardwright.sharder.planning.exact.coarse import coarsened
from shardwright.sharder.planning.exact.search import closed_sets
from shardwright.sharder.planning.partition import partition
from shardwright.sharder.planning.problem import Crossing, Problem, Tie, bits
from shardwright.sharder.planning.split_loads import largest_load_s

often = settings(max_examples=40, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
ROOM = 10**9


def with_idle(problem: Problem, idle: int) -> Problem:
    """Some blocks take no time, and all stages have room; relayed transfers go over one link."""
    none = (0.0,) * len(problem.devices)
    blocks = tuple(
        dataclasses.replace(b, forward_s=none, backward_s=none, update_s=none) if idle >> v & 1 else b
        for v, b in enumerate(problem.blocks)
    )
    links = problem.links
    if problem.transfers == "relayed":
        links = ((links[0][1],) * len(none),) * len(none)
    return dataclasses.replace(problem, blocks=blocks, caps=(ROOM,) * len(none), links=links)


def of_all(problem, coarse):
    """The coarse blocks are those of the problem, each once, and keep its order."""
    assert sum(coarse.members) == (1 << len(problem.blocks)) - 1
    home = {v: i for i, members in enumerate(coarse.members) for v in bits(members)}
    for v, before in enumerate(problem.predecessors):
        for u in bits(before):
            assert home[u] == home[v] or coarse.problem.predecessors[home[v]] >> home[u] & 1
    assert all(not before >> v for v, before in enumerate(coarse.problem.predecessors))


@often
@given(problems(most_blocks=5), st.integers(0, 63))
def test_idle_blocks_join_others_and_the_optimum_stays(problem, idle):
    """With all transfers, overlapped or not, on mixed devices, with pins and ties."""
    problem = with_idle(problem, idle)
    coarse = coarsened(problem, math.inf)
    assume(coarse is not None)
    of_all(problem, coarse)
    expected = brute_force(problem)
    assert brute_force(coarse.problem) == pytest.approx(expected)


@st.composite
def with_idle_readers(draw):
    """A block that takes time, idle ones that read it, and some that read these; several tensors for any of them."""
    readers, last = draw(st.integers(1, 3)), draw(st.integers(1, 2))
    count, first = 1 + readers + last, 1 + readers
    size = st.sampled_from([0, 3, 9])
    tensors = []

    def make(producer, start, end):
        for i in range(draw(st.integers(0 if producer else 1, 2))):
            mask = draw(st.integers(1, (1 << end - start) - 1)) << start
            tensors.append(Crossing(f"t{producer}.{i}", producer, mask, draw(size), draw(size)))

    make(0, 1, first)
    for v in range(1, first):
        make(v, first, count)
    before = [0, *[1] * readers]
    for v in range(first, count):
        before.append(sum({1 << t.producer for t in tensors if t.readers >> v & 1} | {1 << v - 1 if v > first else 0}))
    works = [draw(st.sampled_from([4.0, 9.0])) if v == 0 or v >= first else 0.0 for v in range(count)]
    problem = chain(works, 2, cap=ROOM, microbatches=2)
    link = draw(st.sampled_from([0.0, 1.0])), draw(st.sampled_from([1.0, 4.0]))
    return dataclasses.replace(
        problem,
        predecessors=tuple(before),
        crossings=tuple(tensors),
        links=((link,) * 2,) * 2,
        transfers=draw(st.sampled_from(["relayed", "staged"])),
        overlap=draw(st.booleans()),
    )


@settings(often, max_examples=300)
@given(with_idle_readers())
def test_idle_readers_join_only_where_no_cut_gets_dearer(problem):
    """With several tensors, which some of the readers read or all."""
    coarse = coarsened(problem, math.inf)
    assume(coarse is not None)
    of_all(problem, coarse)
    assert brute_force(coarse.problem) == pytest.approx(brute_force(problem))


@pytest.mark.parametrize("transfers", ["relayed", "staged"])
def test_tensors_that_only_some_readers_read_may_stay_uncut(transfers):
    """The second reader stays with the first block and its tensor, the first goes with what it makes."""
    problem = dataclasses.replace(
        chain([10.0, 0.0, 0.0, 10.0], 2, cap=ROOM, microbatches=2),
        links=(((0.0, 1.0),) * 2,) * 2,
        predecessors=(0, 1, 1, 2),
        transfers=transfers,
        crossings=(Crossing("t1", 0, 2, 0, 0), Crossing("t2", 0, 4, 9, 0), Crossing("T", 1, 8, 9, 0)),
    )
    assert partition(problem).value_s == brute_force(problem) == 20.0


@often
@given(problems(most_blocks=5), st.sampled_from([1, 4, 30]), st.sampled_from([1.0, 1.01, 1.5, 4.0]))
def test_dear_tensors_are_not_cut_and_better_splits_stay(problem, dear, share):
    """Whatever there is of memory: no split that is better than what is known is left out."""
    bytes_ = (
        dataclasses.replace(c, forward_bytes=dear * c.forward_bytes, backward_bytes=dear * c.backward_bytes)
        for c in problem.crossings
    )
    problem = dataclasses.replace(problem, crossings=tuple(bytes_))
    expected = brute_force(problem)
    assume(0 < expected < math.inf)
    coarse = coarsened(problem, share * expected)
    assume(coarse is not None)
    of_all(problem, coarse)
    assert brute_force(coarse.problem) == pytest.approx(expected)


@often
@given(problems(most_blocks=6), st.integers(0, 63), st.data())
def test_splits_of_coarse_blocks_are_splits_of_all(problem, idle, data):
    """Stage by stage with the loads, and the memory, of the original."""
    problem = with_idle(problem, idle)
    coarse = coarsened(problem, data.draw(st.sampled_from([3.0, 20.0, 90.0, math.inf])))
    assume(coarse is not None)
    closed = sorted(closed_sets(coarse.problem.predecessors, 10**4))
    cuts = sorted(data.draw(st.sets(st.sampled_from(closed), max_size=3)), key=int.bit_count)
    chain_ = [0, *(c for c in cuts if c), (1 << len(coarse.members)) - 1]
    assume(all(not a & ~b and a != b for a, b in itertools.pairwise(chain_)) and len(chain_) <= 1 + len(problem.caps))
    stages = tuple((d, b & ~a) for d, (a, b) in enumerate(itertools.pairwise(chain_)))
    loads = largest_load_s(coarse.problem, stages), largest_load_s(problem, coarse.unfolded(stages))
    assert loads[0] == loads[1] or loads[0] == pytest.approx(loads[1])
    start = whole = 0
    for (device, few), (_, many) in zip(stages, coarse.unfolded(stages), strict=True):
        told = coarse.problem.memory_bytes(start, start | few, device, 1)
        assert told == problem.memory_bytes(whole, whole | many, device, 1)
        start, whole = start | few, whole | many


def over_a_link(problem: Problem) -> Problem:
    """A thousand bytes a second."""
    return dataclasses.replace(problem, links=((((0.0, 1e3),) * 2),) * 2)


def fan(leaves: int, work_s: float = 0.0) -> Problem:
    """A chain of four, of which each block has idle leaves that read it."""
    problem = chain([1.0, 2.0, 3.0, 4.0], 2)
    blocks, before, tensors = list(problem.blocks), list(problem.predecessors), list(problem.crossings)
    for v in range(4):
        for leaf in range(leaves):
            tensors.append(Crossing(f"l{v}.{leaf}", v, 1 << len(blocks), 5, 0))
            before.append(1 << v)
            blocks.append(dataclasses.replace(block(work_s, 2), units=("leaf",)))
    return dataclasses.replace(
        problem, blocks=tuple(blocks), predecessors=tuple(before), crossings=tuple(tensors), caps=(ROOM,) * 2
    )


def test_idle_leaves_do_not_make_a_graph_wide():
    """A billion closed sets and more are five: each leaf is where its only tensor is made."""
    problem = fan(8)
    coarse = coarsened(problem, math.inf)
    assert len(coarse.members) == 4
    found = partition(problem)
    assert found.exact
    assert found.value_s == largest_load_s(problem, found.stages) == partition(coarse.problem).value_s


def test_what_may_matter_stays_apart():
    """A leaf that takes time, is tied, is pinned elsewhere, or that memory may be short for."""
    problem = fan(1)
    assert len(coarsened(problem, math.inf).members) == 4
    assert coarsened(fan(1, work_s=1e-9), math.inf) is None
    tied = dataclasses.replace(problem, ties=(Tie("p", 0b1111_0000, 4, 1, 1),))
    assert coarsened(tied, math.inf) is None
    pinned = [dataclasses.replace(b, allowed=(False, True)) if v > 3 else b for v, b in enumerate(problem.blocks)]
    assert coarsened(dataclasses.replace(problem, blocks=tuple(pinned)), math.inf) is None
    heavy = [dataclasses.replace(b, static_bytes=ROOM // 7) for b in problem.blocks]
    assert coarsened(dataclasses.replace(problem, blocks=tuple(heavy)), math.inf) is None


def test_a_tensor_dearer_than_what_is_known_is_not_cut():
    """And what lies between its maker and its reader goes with them, so that no cycle is left."""
    before = [0, 1, 1, 6, 8]
    tensors = [Crossing(f"t{v}", v, sum(1 << w for w in range(5) if before[w] >> v & 1), 1, 0) for v in range(4)]
    dear = Crossing("dear", 0, 1 << 3, 10**6, 0)
    problem = dataclasses.replace(
        over_a_link(chain([1.0] * 5, 2, microbatches=1)), predecessors=tuple(before), crossings=(*tensors, dear)
    )
    assert coarsened(problem, 1002.0) is None  # 1000 seconds for the tensor, and one of work at either end
    assert coarsened(problem, 1000.9).members == (0b1111, 0b10000)


def test_nothing_better_on_coarse_blocks_is_a_proof():
    """Where all that is left is one block, the split that is known is the best."""
    problem = over_a_link(chain([1.0, 1.0], 2, microbatches=1))
    skip = dataclasses.replace(problem, predecessors=(0, 0, 3), blocks=(*problem.blocks, problem.blocks[0]))
    dear = tuple(Crossing(f"t{v}", v, 4, 10**15, 0) for v in range(2))
    found = partition(dataclasses.replace(skip, crossings=dear))
    assert found.exact
    assert len(found.stages) == 1
