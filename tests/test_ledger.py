"""The memory of a stage, held against walks that are written out storage by storage and micro-batch by micro-batch."""

from __future__ import annotations

import math

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import shardwright as sw
from shardwright.profiler.profile import Profile
from shardwright.sharder.planning.formulation.blocks import problem_from_graph
from shardwright.sharder.planning.formulation.memory import Gradient, Ledger, Step, Storage
from shardwright.sharder.planning.problem import Block, Crossing, Problem, in_flight


def test_forward_holds_what_is_saved_and_what_waits():
    """Three nodes in a row: saved bytes add up, an output goes with its last reader unless it is saved."""
    steps = (Step(0, 0, 10, 0), Step(1, 10, 15, 0), Step(2, 3, 4, 0))
    # Node 1 saves the 10 bytes that it reads from node 0, and makes 5 that node 2 reads without saving them.
    storages = (Storage(10, 0, (1,), saver=1), Storage(5, 1, (2,)))
    walk = Ledger(steps, storages).walk(0b111)
    assert walk.forward == 10 + 15
    assert walk.kept == 10 + 3


def test_backward_gives_back_and_gradients_wait():
    """Saved bytes go with the backward of their node; a gradient waits for the node that made the tensor."""
    steps = (Step(0, 8, 8, 2), Step(1, 4, 4, 6), Step(2, 2, 2, 7))
    gradients = (Gradient(5, (2,), 0, 5), Gradient(1, (2,), 1, 1))
    walk = Ledger(steps, (), gradients).walk(0b111)
    assert walk.kept == 14
    assert walk.backward == max(14 + 7, 12 + 6 + 6, 8 + 5 + 2)


def test_what_a_stage_sends_stays():
    """A tensor with a reader in a later stage, or one that the model returns, is held until the backward is done."""
    steps = tuple(Step(v, 0, 4, 0) for v in range(3))
    sent = Ledger(steps, (Storage(4, 0, (1, 2)),))
    assert (sent.walk(0b111).kept, sent.walk(0b011).kept, sent.walk(0b110).kept) == (0, 4, 0)
    assert Ledger(steps, (Storage(4, 0, (1,), returned=True),)).walk(0b111).kept == 4


def test_received_tensors_are_not_kept_twice():
    """What a node saves of a tensor that its stage receives is in the engine's buffer already."""
    ledger = Ledger((Step(0, 0, 6, 0), Step(1, 9, 3, 0)), (Storage(6, 0, (1,), saver=1),))
    assert (ledger.walk(0b11).kept, ledger.walk(0b10).kept) == (9, 3)


def test_shared_weights_wait_for_their_first_user():
    """The gradient of the last user waits for the first one in the stage, which adds its own to it."""
    steps = tuple(Step(v, 0, 0, 1) for v in range(3))
    ledger = Ledger(steps, (), (Gradient(10, (0, 2), None, 10),))
    assert ledger.walk(0b111).backward == 10 + 1 + 10
    assert ledger.walk(0b110).backward == 1


def test_optimizer_one_after_another_or_together():
    """One after another, the largest needs its room beside what the one before has left; together all need theirs."""
    steps = tuple(Step(v, 0, 0, 0, 2 * size, size, 3 * size) for v, size in enumerate((4, 0, 5)))
    walk = Ledger(steps).walk(0b111)
    assert (walk.update, walk.update_together) == (4 + 10, 27)


@st.composite
def ledgers(draw):
    """Small ledgers of up to six nodes in up to four blocks, closed in their order."""
    count = draw(st.integers(1, 6))
    size = st.integers(0, 9)
    saved = [draw(size) for _ in range(count)]
    storages, gradients = [], []
    for maker in range(count - 1):
        for _ in range(draw(st.integers(0, 2))):
            readers = tuple(sorted(draw(st.sets(st.integers(maker + 1, count - 1), min_size=1))))
            held, saver = draw(size), draw(st.sampled_from([None, maker, *readers]))
            storages.append(Storage(held, maker, readers, saver, draw(st.booleans())))
            if saver is not None:
                saved[saver] += held
            gradients.append(Gradient(draw(size), readers, draw(st.sampled_from([maker, None])), draw(size)))
    blocks = sorted(draw(st.integers(0, 3)) for _ in range(count))
    steps = tuple(Step(blocks[v], saved[v], *(draw(size) for _ in range(6))) for v in range(count))
    return Ledger(steps, tuple(storages), tuple(gradients))


def spelled_out(ledger, inside):
    """Kept, and both peaks, from the first and the last moment of each thing; 2n moments, forward and then back."""
    count = len(ledger.steps)

    def back(v):
        return 2 * count - 1 - v

    lives = []  # first moment after which it is held, last moment at which it is, bytes
    for v, step in enumerate(ledger.steps):
        of_others = sum(s.size for s in ledger.storages if s.saver == v)
        lives.append((v, back(v), step.saved - of_others) if v in inside else (0, -1, 0))
    for storage in ledger.storages:
        if storage.maker in inside:
            end = storage.readers[-1] if storage.saver is None else back(storage.saver)
            if storage.returned or not inside.issuperset(storage.readers):
                end = math.inf
            lives.append((storage.maker, end, storage.size))
    extra = dict.fromkeys(range(2 * count), 0)
    for gradient in ledger.gradients:
        users = [v for v in gradient.readers if v in inside]
        if users:
            goal = users[0] if gradient.maker is None else gradient.maker
            lives.append((back(users[-1]), back(goal) if goal in inside else math.inf, gradient.size))
            for v in users[:-1]:
                extra[back(v)] = max(extra[back(v)], gradient.added)

    def held(moment):
        return sum(size for first, last, size in lives if first < moment <= last)

    def made(moment):
        return sum(ledger.steps[v].gradient for v in inside if back(v) < moment)

    forward = max((held(v) + ledger.steps[v].forward for v in inside), default=0)
    peaks = {back(v): held(back(v)) + ledger.steps[v].backward + extra[back(v)] for v in inside}
    ends = [held(count - 0.5), held(2 * count) + made(2 * count)]
    first = max([*ends, *(peak + made(moment) for moment, peak in peaks.items())])
    return ends[0], forward, max(peaks.values(), default=0), first


@settings(max_examples=400, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
@given(ledgers(), st.integers(0, 3), st.integers(0, 3))
def test_the_walk_is_that_of_each_storage(ledger, first, last):
    """Whatever the stage, the walk is what one finds by following each storage from its making to its end."""
    members = sum(1 << v for v in range(first, last + 1))
    inside = {i for i, step in enumerate(ledger.steps) if members >> step.block & 1}
    kept, forward, backward, first = spelled_out(ledger, inside)
    found = ledger.walk(members)
    assert (found.kept, found.forward, found.first) == (kept, forward, first)
    assert found.backward == max(backward, kept)


@settings(max_examples=200, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
@given(ledgers(), st.integers(0, 3), st.integers(0, 3), st.integers(1, 4), st.sampled_from(["1f1b", "gpipe"]))
def test_the_least_of_a_block_is_below_every_stage(ledger, first, last, microbatches, schedule):
    """No stage that has a block takes less than what is said to be its least."""
    problem = problem_of(ledger, (), microbatches, schedule)
    start, end = (1 << first) - 1, (2 << max(first, last)) - 1
    for after in range(3):
        stage = problem.memory_bytes(start, end, 0, after)
        assert all(problem.least_bytes(v, 0) <= stage for v in range(first, max(first, last) + 1))


def problem_of(ledger, crossings, microbatches, schedule):
    """Four blocks in a row, each of 100 static bytes."""
    row = {"forward_s": (1.0,), "backward_s": (1.0,), "update_s": (0.0,), "static_bytes": 100, "allowed": (True,)}
    return Problem(
        blocks=tuple(Block(nodes=(str(v),), units=("u",), **row) for v in range(4)),
        predecessors=(0, 1, 3, 7),
        crossings=tuple(crossings),
        devices=("d",),
        caps=(10**6,),
        links=(((0.0, 1.0),),),
        microbatches=microbatches,
        schedule=schedule,
        ledger=ledger,
    )


def engine(schedule, count, after):
    """Each operation of a step, its micro-batch, and what others hold then: as the engine's own variables do."""
    sent, output, gradient, cache = None, None, None, set()  # a work, two variables of the loop, the stage's cache
    done, held = 0, in_flight(schedule, count, after)

    def others(own):
        names = {(what, m) for m in cache for what in ("kept", "out")} | {sent, output, gradient}
        return {name for name in names if name is not None and name[1] != own}

    if schedule == "gpipe":
        yield from (("F", f, {(what, m) for m in range(f) for what in ("kept", "out")}) for f in range(count))
        for b in range(count):  # all works, of outputs and of gradients, wait for the end
            ahead = {(what, m) for m in range(b + 1, count) for what in ("kept", "out")}
            works = {(what, m) for m in range(b) for what in ("gradient", "out") if what == "gradient" or after}
            yield "B", b, ahead | works
        return
    for f in range(count):
        if f >= held:
            yield "B", done, others(done)
            cache.remove(done)
            gradient = "gradient", done
            done += 1
        yield "F", f, others(f)
        cache.add(f)
        output = "out", f
        if f < held - 1:
            sent = "out", f
    while done < count:
        yield "B", done, others(done)
        cache.remove(done)
        sent = gradient = "gradient", done
        done += 1


def scheduled(problem, members, after, received, sent, relayed):
    """The peak of a stage, operation by operation."""
    count, walk = problem.microbatches, problem.walk(members)
    sizes = {"kept": walk.kept - walk.sent, "out": walk.sent, "gradient": received[1] + relayed[1]}
    static = 100 * members.bit_count()
    buffers = count * (received[0] + relayed[0] + sent[1] + relayed[1])
    peak = static + buffers + walk.update
    for what, own, names in engine(problem.schedule, count, after):
        begun = what == "B" and own > 0
        now = walk.forward if what == "F" else relayed[1] + (walk.backward if begun else walk.first)
        finished = begun or any(name == "gradient" for name, _ in names)
        held = static - (0 if finished else walk.gradients) + sum(sizes[name] for name, _ in names)
        peak = max(peak, buffers + held + now)
    return peak


BYTES = st.tuples(st.integers(0, 9), st.integers(0, 9))


@settings(max_examples=400, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
@given(ledgers(), BYTES, BYTES, BYTES, st.integers(1, 9), st.integers(0, 4), st.sampled_from(["1f1b", "gpipe"]))
def test_the_peak_is_that_of_the_engine(ledger, received, sent, relayed, microbatches, after, schedule):
    """The peak of a stage is the largest moment of all its micro-batches' forwards and backwards, in their order."""
    crossings = [
        Crossing("in", 0, 0b0010, *received),
        Crossing("out", 2, 0b1000, *sent),
        Crossing("relayed", 0, 0b1000, *relayed),
    ]
    problem = problem_of(ledger, crossings, microbatches, schedule)
    found = problem.memory_bytes(0b0001, 0b0111, 0, after)
    assert found == scheduled(problem, 0b0110, after, received, sent, relayed)


def test_views_hold_nothing_and_keep_what_they_show(make_profile):
    """A view has no memory of its own, but its reader keeps the tensor that it is a view of."""
    profile = make_profile({"a": ["x"], "v": ["a"], "b": ["v"]}, microbatches=(1,), kinds={"v": "glue"})
    tensors = {tensor.name: tensor for tensor in profile.tensors}
    tensors["v"] = tensors["v"].model_copy(update={"storage": "a", "held_bytes": {1: 0}})
    ledger = problem_from_graph(profile.model_copy(update={"tensors": tuple(tensors.values())}).graph(1)).ledger
    assert [(s.size, s.maker, s.readers) for s in ledger.storages] == [(80, 1, (2, 3)), (80, 3, (4,))]


def test_an_addition_hands_back_one_gradient(make_profile):
    """Where a node gives its inputs the same storage as gradients, the one that was made first holds it."""
    profile = make_profile({"a": ["x"], "b": ["a"], "add": ["a", "b"]}, microbatches=(1,), kinds={"add": "glue"})
    nodes = [n.model_copy(update={"input_gradient_bytes": {1: 80}}) if n.name == "add" else n for n in profile.nodes]
    ledger = problem_from_graph(profile.model_copy(update={"nodes": tuple(nodes)}).graph(1)).ledger
    assert [(g.size, g.readers, g.maker) for g in ledger.gradients] == [(80, (2, 3), 1), (80, (4,), 3)]


def test_inputs_are_held_whole(make_profile):
    """The first stage has the whole batch, however many micro-batches it is divided into."""
    graph = make_profile({"a": ["x"]}, microbatches=(1, 4), tensor_bytes=80).graph(4)
    assert graph.nodes["x"]["static_bytes"] == 80


def test_workspace_binds_the_cap(chain_profile):
    """A unit whose backward takes more than a device has is refused by name, and fits where there is room."""
    profile: Profile = chain_profile(4, microbatches=(4,))
    nodes = [n.model_copy(update={"backward_peak_bytes": {4: 10**6}}) if n.name == "u2" else n for n in profile.nodes]
    profile = profile.model_copy(update={"nodes": tuple(nodes)})
    with pytest.raises(sw.ShardwrightError, match=r"at 4 micro-batches net\.u2 needs at least 978\.\d KiB"):
        sw.plan(profile, memory={"cpu:0": 10**5, "cpu:1": 10**5})
    plan = sw.plan(profile, memory={"cpu:0": 10**5, "cpu:1": 1_100_000})
    assert {s.device: s.memory_bytes > 10**6 for s in plan.stages} == {"cpu:0": False, "cpu:1": True}


def test_update_together_on_a_gpu(chain_profile):
    """On a GPU the optimizer works on all parameters at once: their workspaces add up there."""
    profile = chain_profile(2, speed={"cpu:0": 1.0, "cuda:0": 1.0}, microbatches=(1,))
    devices = [d.model_copy(update={"kind": d.name.partition(":")[0]}) for d in profile.devices]
    peaks = {"update_peak_bytes": {"cpu": 10**6, "cuda": 10**6}}
    nodes = [n.model_copy(update=peaks) if n.kind == "unit" else n for n in profile.nodes]
    profile = profile.model_copy(update={"devices": tuple(devices), "nodes": tuple(nodes)})
    problem = problem_from_graph(profile.graph(1))
    whole = (1 << len(problem.blocks)) - 1
    assert problem.memory_bytes(0, whole, 1, 0) - problem.memory_bytes(0, whole, 0, 0) == 10**6
