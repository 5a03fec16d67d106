"""Replicas of pipelines: meshes against brute force, their step against a simulation of each replica, and the plan."""

from __future__ import annotations

import dataclasses
import itertools

import event_driven
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shardwright.errors import ShardwrightError
from shardwright.profiler.graph import cost_graph
from shardwright.profiler.profile import Link, Tie, Variation
from shardwright.reports.plan_report import verdict
from shardwright.sharder.planning.exact.search import closed_sets
from shardwright.sharder.planning.formulation.blocks import problem_from_graph
from shardwright.sharder.planning.partition import partition
from shardwright.sharder.planning.plan import Plan
from shardwright.sharder.planning.planner import plan
from shardwright.sharder.planning.pricing import price
from shardwright.sharder.planning.problem import bits
from shardwright.sharder.planning.schedules.foreseen import timeline_of
from shardwright.sharder.planning.schedules.replicas import meshes, on_meshes, possible_replicas

FOUR = dict.fromkeys(("cpu:0", "cpu:1", "cpu:2", "cpu:3"), 1.0)
FIXTURES = settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])


def with_links(profile, seconds):
    """The profile with links that take ``seconds(source, target)``: latency, and for each byte."""
    links = tuple(
        Link(source=a, target=b, latency_s=seconds(a, b)[0], bandwidth_bytes_per_s=1 / seconds(a, b)[1])
        for a, b in itertools.permutations([device.name for device in profile.devices], 2)
    )
    return profile.model_copy(update={"links": links})


def problem_at(profile, count, **options):
    return problem_from_graph(cost_graph(profile, count), **options)


@st.composite
def wirings(draw):
    """Small graphs: each unit reads some of those before it."""
    count = draw(st.integers(2, 5))
    return {
        f"u{i}": sorted({f"u{draw(st.integers(0, i - 1))}" for _ in range(draw(st.integers(1, 2)))}) if i else ["x"]
        for i in range(count)
    }


@st.composite
def tasks(draw):
    """What :func:`conftest._make_profile` takes, links by pair, how many micro-batches and replicas."""
    devices = draw(st.integers(2, 4))
    times = st.integers(1, 9).map(float)
    edges = draw(wirings())
    options = {
        "forward_s": {name: draw(times) for name in edges},
        "speed": {f"cpu:{d}": draw(st.sampled_from([1.0, 1.0, 2.0, 3.0])) for d in range(devices)},
        "microbatches": (1, 2, 3, 4),
        "memory_bytes": draw(st.sampled_from([10**9, 10**9, 9_000, 6_000])),
        "tensor_bytes": draw(st.sampled_from([0, 80])),
    }
    pairs = {
        (f"cpu:{a}", f"cpu:{b}"): (draw(st.integers(0, 9)) / 1e3, draw(st.integers(1, 9)) / 1e3)
        for a, b in itertools.permutations(range(devices), 2)
    }
    replicas = draw(st.sampled_from(possible_replicas(devices)))
    count = draw(st.sampled_from([m for m in (2, 3, 4) if m % replicas == 0]))
    return edges, options, pairs, count, replicas


def least_load(profile, problem, mesh, closed):
    """The least largest load of all splits over ``mesh``, from the devices themselves; None where none fits."""
    replicas, last = len(mesh[0]), (1 << len(problem.blocks)) - 1
    each = problem.microbatches // replicas
    gradients = {node.name: node.grad_bytes for node in profile.nodes}
    inputs = profile.tensors[0].bytes[1]
    # Gradients are copied to be summed, all of them, since they are few.
    ledger = dataclasses.replace(problem.ledger, copied=10**9)
    part = dataclasses.replace(problem, microbatches=each, ledger=ledger)

    def fits(start, end, members, after):
        here = inputs - inputs // replicas if end & ~start & 1 else 0
        return all(part.memory_bytes(start, end, d, after) - here <= problem.caps[d] for d in members)

    def compute_s(v, members):
        b = problem.blocks[v]
        passes = max(b.forward_s[d] for d in members) + max(b.backward_s[d] for d in members)
        rate = min(problem.links[x][y][1] for x, y in itertools.permutations(members, 2))
        size = sum(gradients[node] for node in b.nodes)
        return each * passes + max(b.update_s[d] for d in members) + 2 * (replicas - 1) / replicas * size / rate

    def cut_s(end, these, those):
        total = 0.0
        for tensor in problem.crossing(end):
            for sources, targets, size in (
                (these, those, tensor.forward_bytes),
                (those, these, tensor.backward_bytes),
            ):
                links = [problem.links[a][b] for a, b in zip(sources, targets, strict=True)]
                if size or sources is these:  # a tensor may be empty, and where there is no gradient none is sent
                    total += each * (max(s for s, _ in links) + size / min(rate for _, rate in links))
        return total

    best = None
    for stages in range(1, min(len(mesh), each) + 1):
        for ends in itertools.combinations([c for c in closed if 0 < c < last], stages - 1):
            cuts = [0, *ends, last]
            if any(a & ~b for a, b in itertools.pairwise(cuts)):
                continue
            if not all(any(problem.blocks[v].units for v in bits(b & ~a)) for a, b in itertools.pairwise(cuts)):
                continue
            for order in itertools.permutations(mesh, stages):
                parts = list(zip(cuts, cuts[1:], order, strict=False))
                if not all(fits(a, b, members, stages - 1 - i) for i, (a, b, members) in enumerate(parts)):
                    continue
                loads = [sum(compute_s(v, members) for v in bits(b & ~a)) for a, b, members in parts]
                for i, end in enumerate(ends):
                    crossing = cut_s(end, order[i], order[i + 1])
                    loads[i] += crossing
                    loads[i + 1] += crossing
                best = max(loads) if best is None else min(best, max(loads))
    return best


@FIXTURES
@given(task=tasks())
def test_a_mesh_is_solved_exactly(make_profile, task):
    """No split over the joint devices has a smaller largest load, counted from the real devices and their links."""
    edges, options, pairs, count, replicas = task
    profile = with_links(make_profile(edges, **options), lambda a, b: pairs[a, b])
    problem = problem_at(profile, count)
    closed = list(closed_sets(problem.predecessors, 10**6))
    for mesh, joint in zip(meshes(problem, replicas), on_meshes([problem], profile, replicas), strict=False):
        names = [tuple(problem.devices[d] for d in members) for members in mesh]
        if names != list(zip(*(replica.devices for replica in joint.replicas), strict=True)):
            continue  # a mesh like an earlier one was left out
        found, expected = partition(joint), least_load(profile, problem, mesh, closed)
        assert (found is None) == (expected is None)
        if found is not None:
            assert found.exact
            assert found.value_s == pytest.approx(expected, rel=1e-9)


@FIXTURES
@given(edges=wirings(), speeds=st.lists(st.sampled_from([1.0, 1.5, 2.0]), min_size=4, max_size=4), data=st.data())
def test_the_step_is_that_of_the_slowest_replica(make_profile, edges, speeds, data):
    """Each replica is played event by event on its own devices, and all wait for the slowest."""
    times = {name: float(data.draw(st.integers(1, 9))) for name in edges}
    speed = dict(zip(FOUR, speeds, strict=True))
    profile = make_profile(edges, forward_s=times, speed=speed)
    for joint in on_meshes([problem_at(profile, 4)], profile, 2):
        option = price(joint, partition(joint), profile)
        steps = []
        for replica in joint.replicas:
            own = []
            for (device, members), cost in zip(option.split.stages, option.costs, strict=True):
                whole_s = sum(times.get(node, 0.0) for v in bits(members) for node in joint.blocks[v].nodes)
                forward_s = whole_s / 4 / speed[replica.devices[device]]
                own.append(dataclasses.replace(cost, forward_s=forward_s, backward_s=2 * forward_s, tie_s=cost.sum_s))
            steps.append(event_driven.play(own, 2).step_s)
        assert all(cost.sum_s > 0 for cost in option.costs)
        assert option.step_s == pytest.approx(max(steps), rel=1e-9)


def test_members_are_alike_where_there_are_such(chain_profile):
    """Devices of one speed and memory stand for each other, in two ways: pipelines of neighbours, or sums of them."""
    speeds = [1.0, 2.0] * 4
    profile = chain_profile(8, speed={f"cpu:{d}": s for d, s in enumerate(speeds)})
    found = meshes(problem_at(profile, 4), 2)
    assert found == [((1, 5), (3, 7), (0, 4), (2, 6)), ((1, 3), (5, 7), (0, 2), (4, 6))]
    odd = chain_profile(8, speed={"cpu:0": 1.0, "cpu:1": 2.0, "cpu:2": 1.0, "cpu:3": 1.0})
    assert meshes(problem_at(odd, 4), 2) == [((0, 2), (1, 3))]


def test_pipelines_or_sums_are_among_neighbours_by_their_links(chain_profile):
    """In two nodes of two, large activations stay in a node, and so do the gradients of large weights."""

    def linked(a, b):
        return 1e-6, 1e-9 if int(a[-1]) // 2 == int(b[-1]) // 2 else 1e-7

    light = with_links(chain_profile(8, speed=FOUR, tensor_bytes=10**6, param_bytes=1), linked)
    heavy = with_links(chain_profile(8, speed=FOUR, tensor_bytes=1, param_bytes=10**6), linked)
    assert plan(light, microbatches=4, replicas=2).pipelines == (("cpu:0", "cpu:1"), ("cpu:2", "cpu:3"))
    assert plan(heavy, microbatches=4, replicas=2).pipelines == (("cpu:0", "cpu:2"), ("cpu:1", "cpu:3"))


def test_the_record(chain_profile):
    """Two replicas of two stages: devices, micro-batches, memory and the step agree with each other, also on disk."""
    profile = chain_profile(8, speed=FOUR, param_bytes=10**6)
    found = plan(profile, microbatches=4, replicas=2)
    assert (found.replicas, found.depth, found.microbatches, found.pipeline_microbatches) == (2, 2, 4, 2)
    assert found.devices == ("cpu:0", "cpu:1", "cpu:2", "cpu:3")
    assert [stage.replica_devices for stage in found.stages] == [("cpu:2",), ("cpu:3",)]
    assert [stage.in_flight for stage in found.stages] == [2, 1]
    assert timeline_of(found).step_s == pytest.approx(found.predicted.step_s)
    each = 2 * 0.5 * (1e-6 + 0.0)  # a ring of two: both latencies, and the bytes once
    for stage in found.stages:
        units = len(stage.units)
        assert stage.sum_s == pytest.approx(2 * each + units * 10**6 / 1e9)
        assert stage.load_s == pytest.approx(2 * units * 3 / 4 + units * 10**6 / 1e9, rel=1e-4)
    assert max(stage.load_s for stage in found.stages) == found.certificate.value_s
    memory = found.memory()
    assert list(memory) == list(found.devices)
    assert memory["cpu:0"] == memory["cpu:2"] == found.stages[0].memory_bytes
    assert Plan.model_validate_json(found.model_dump_json()) == found
    first = found.first_replica
    assert (first.devices, first.microbatches, first.replicas) == (("cpu:0", "cpu:1"), 2, 1)
    assert (first.batch, found.batch) == (found.batch // 2, profile.batch)
    assert found.placement()["net.u7"] == "cpu:1"


def test_a_replica_holds_its_part_of_the_inputs(chain_profile):
    """The stage that reads the batch holds half of it with two replicas, as in a pipeline of half the batch."""
    profile = chain_profile(4, speed=FOUR, tensor_bytes=8_000, microbatches=(1, 2, 4))
    half = chain_profile(4, speed=dict.fromkeys(("cpu:0", "cpu:1"), 1.0), tensor_bytes=4_000, saved_bytes=400)
    found = plan(profile, microbatches=4, replicas=2)
    alone = plan(half.model_copy(update={"batch": 4}), microbatches=2)
    assert [stage.memory_bytes for stage in found.stages] == [stage.memory_bytes for stage in alone.stages]


def test_one_replica_is_the_plan_as_ever(chain_profile):
    """``replicas=1`` is the default, and all replicas there can be are data parallel as its rival is priced."""
    profile = chain_profile(8, speed=FOUR, param_bytes=10**6)
    default = plan(profile)
    assert plan(profile, replicas=1) == default
    parallel = next(one for one in default.alternatives if one.name == "data parallel")
    found = plan(profile, microbatches=4, replicas=4)
    assert (found.depth, len(found.stages)) == (1, 1)
    assert found.predicted.step_s == pytest.approx(parallel.step_s)
    assert parallel.name not in {one.name for one in found.alternatives}
    assert verdict(found).text.startswith("Shard this in 4 replicas of the whole model over cpu:0, cpu:1, cpu:2 and")


def test_large_sums_bind(chain_profile):
    """Where gradients take long to sum, the certificate says what the largest load would be without."""
    found = plan(chain_profile(8, speed=FOUR, param_bytes=10**9, memory_bytes=10**12), microbatches=4, replicas=2)
    assert found.certificate.binds.startswith("the sums of gradients over 2 replicas: without them the largest load ")


def test_auto_takes_the_best_number(chain_profile):
    """Of one, two and four replicas that with the shortest step; the sum of large gradients speaks against them."""
    for param_bytes in (1, 10**8, 3 * 10**9):
        profile = chain_profile(8, speed=FOUR, param_bytes=param_bytes, memory_bytes=10**12)
        steps = {count: plan(profile, replicas=count).predicted.step_s for count in (1, 2, 4)}
        found = plan(profile, replicas="auto")
        assert found.predicted.step_s == min(steps.values())
        assert steps[found.replicas] == found.predicted.step_s
        assert {candidate.replicas for candidate in found.candidates} == {1, 2, 4}
    assert found.replicas == 1


def test_the_verdict_says_what_replicas_were_chosen_against(chain_profile):
    """Where all were weighed, the next best number of replicas; where none was asked for, that they would be faster."""
    profile = chain_profile(8, speed=FOUR, memory_bytes=80_000, param_bytes=3_000, microbatches=(1, 2, 4, 8))
    narrow = dict.fromkeys(FOUR, 60_000)
    found = plan(profile, replicas="auto", memory=narrow)
    others = [c for c in found.candidates if c.replicas != found.replicas and c.stages > 1]
    assert found.replicas > 1
    assert others
    assert " A step takes " in verdict(found).text
    plain = plan(profile, memory=narrow)
    rival = next(one for one in plain.alternatives if one.name == "replicas")
    best = plan(profile, memory=narrow, replicas=2)
    assert (rival.replicas, rival.devices, rival.microbatches) == (2, 4, best.microbatches)
    assert rival.step_s == best.predicted.step_s
    assert f"2 replicas of 2 stages with {rival.microbatches} micro-batches would take" in verdict(plain).text


def test_no_rival_that_is_slower_or_not_to_be_had(chain_profile):
    """Gradients too large to be summed in time, three devices, or less memory than two replicas need."""
    heavy = chain_profile(8, speed=FOUR, param_bytes=10**10, memory_bytes=10**12)
    three = chain_profile(8, speed=dict.fromkeys(("cpu:0", "cpu:1", "cpu:2"), 1.0), microbatches=(1, 3, 6))
    tight = chain_profile(8, speed=FOUR, memory_bytes=6_500)
    for profile in (heavy, three, tight):
        assert all(one.name != "replicas" for one in plan(profile).alternatives)


def test_pins_hold_in_one_replica(chain_profile):
    """A pinned unit is on its device, or on the one that goes with it in another replica."""
    profile = chain_profile(8, speed=FOUR)
    for unit, device in (("net.u0", "cpu:3"), ("net.u7", "cpu:1")):
        found = plan(profile, microbatches=4, replicas=2, pins={unit: device})
        stage = next(stage for stage in found.stages if unit in stage.units)
        assert device in (stage.device, *stage.replica_devices)
        assert found.pins[0].without_s <= found.certificate.value_s


def test_every_device_is_slow_in_its_own_time(chain_profile):
    """All replicas wait for the slowest device, so that two of them wait longer than one alone would."""
    profile = chain_profile(8, speed=FOUR)
    variations = tuple(Variation(device=device, relative=(0.9, 1.0, 1.0, 1.1, 1.5)) for device in FOUR)
    varied = profile.model_copy(update={"variations": variations})
    steady, unsteady = (plan(one, microbatches=4, replicas=2).predicted for one in (profile, varied))
    one = plan(varied.model_copy(update={"microbatches": (2,)}), microbatches=2, devices=["cpu:0", "cpu:1"]).predicted
    assert steady.step_spread_s == 0
    assert unsteady.step_spread_s > 0
    assert unsteady.step_s / steady.step_s > one.step_s / (2 * steady.step_s)


def test_the_uncertainty_is_that_of_the_real_devices(chain_profile):
    """Members of which one is slower at some units and the other at others: the step, and its draws, are below what
    the slowest at each unit would take, which is the load."""
    profile = chain_profile(8, speed=FOUR)
    rows = []
    for row in profile.measurements:
        factor = 1.05 if row.node != "x" and int(row.node[-1:] or 0) % 2 == int(row.device[-1]) // 2 else 1.0
        times = {"forward_s": factor * row.forward_s, "backward_s": factor * row.backward_s, "median_error": 0.01}
        rows.append(row.model_copy(update=times))
    found = plan(profile.model_copy(update={"measurements": tuple(rows)}), microbatches=4, replicas=4)
    assert found.predicted.step_s < 0.98 * found.certificate.value_s
    assert found.sensitivity.step_low_s < 1.01 * found.predicted.step_s < 1.02 * found.sensitivity.step_high_s
    assert found.sensitivity.step_low_s > 0.98 * found.predicted.step_s


def test_ties_are_summed_in_each_replica_and_over_them(chain_profile):
    """A tied parameter of both stages: each holder sums its copies first, and then with those that hold the same."""
    tie = Tie(name="net.w", nodes=("u0", "u7"), copy_bytes=3_000, gradient_bytes=10**6)
    profile = chain_profile(8, speed=FOUR).model_copy(update={"ties": (tie,)})
    bare, found = (
        plan(chain_profile(8, speed=FOUR), microbatches=4, replicas=2),
        plan(profile, microbatches=4, replicas=2),
    )
    assert found.ties[0].stages == (0, 1)
    assert all(stage.tie_s > 0 for stage in found.stages)
    # Its own gradient is among those of its first stage; the other has a copy of it.
    assert found.stages[0].sum_s == pytest.approx(bare.stages[0].sum_s)
    assert found.stages[1].sum_s == pytest.approx(bare.stages[1].sum_s + 10**6 / 1e9)


@pytest.mark.parametrize(
    "options",
    [
        {"schedule": "gpipe"},
        {"schedule": "interleaved"},
        {"overlap": True},
        {"transfers": "staged"},
        {"transfers": "direct"},
        {"recompute": "always"},
    ],
)
def test_with_everything_that_a_pipeline_knows(chain_profile, options):
    """Other schedules, transfers and stages computed anew go together with replicas; the record agrees with itself."""
    found = plan(chain_profile(8, speed=FOUR, microbatches=(1, 2, 4, 8)), microbatches=8, replicas=2, **options)
    assert (found.replicas, found.depth) == (2, 2)
    assert timeline_of(found).step_s == pytest.approx(found.predicted.step_s)
    assert len(found.stages) == 2 * found.stages_per_device


@pytest.mark.parametrize("replicas", [2, 4])
def test_the_engine_takes_what_the_slowest_member_says(chain_profile, replicas):
    """Replicas of the whole model run on it too."""
    profile = chain_profile(8, speed=FOUR)
    engines = dict(zip(FOUR, (1e-3, 2e-3, 5e-3, 4e-3), strict=True))
    devices = tuple(device.model_copy(update={"engine_s": engines[device.name]}) for device in profile.devices)
    found = plan(profile.model_copy(update={"devices": devices}), microbatches=4, replicas=replicas)
    for stage in found.stages:
        assert stage.engine_s == max(engines[device] for device in (stage.device, *stage.replica_devices))
    assert timeline_of(found).step_s == pytest.approx(found.predicted.step_s)


def test_inference_sums_nothing(chain_profile):
    """Replicas without training take their micro-batches, and that is all."""
    found = plan(chain_profile(8, speed=FOUR, train=False), microbatches=4, replicas=2)
    assert found.replicas == 2
    assert all(stage.sum_s == 0 for stage in found.stages)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"replicas": 0}, "replicas 0 is no number of pipelines; it is 1 or more, or auto"),
        ({"replicas": 3}, "3 does not divide 4: name 3 with --devices"),
        ({"replicas": 2, "microbatches": 1}, "micro-batches each, and 2 does not divide 1: take 2, 4, or auto"),
        ({"replicas": 4, "schedule": "interleaved"}, "in each replica, and each of 4 has 1: ask for fewer with"),
        ({"replicas": 2, "objective": "memory"}, "and not for the objective memory: leave them out"),
        ({"replicas": 2, "objective": "latency"}, "and not for the objective latency: leave them out"),
        ({"replicas": 2, "contiguous": False}, "and not for a free assignment: leave them out"),
        ({"replicas": 4, "memory": dict.fromkeys(FOUR, 9_000)}, "no pipeline of 1 stage fits in 4 replicas: each"),
    ],
)
def test_refusals_say_why(chain_profile, options, message):
    """What cannot be planned with replicas is refused in one line."""
    with pytest.raises(ShardwrightError) as error:
        plan(chain_profile(8, speed=FOUR, param_bytes=3_000), **options)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (8, "4 does not divide 1, 2: profile --microbatches 4, or a multiple of it"),
        (2, "4 replicas take equal parts of a batch, and 4 does not divide 2 samples: profile a batch that it divides"),
    ],
)
def test_micro_batches_that_were_not_profiled(chain_profile, batch, message):
    """What is to be profiled is said, and that is no number of micro-batches where the batch itself has no parts."""
    profile = chain_profile(8, speed=FOUR, microbatches=(1, 2)).model_copy(update={"batch": batch})
    with pytest.raises(ShardwrightError, match=message):
        plan(profile, replicas=4)


def test_interleaved_rounds_are_those_of_each_replica(chain_profile):
    """Fourteen micro-batches are seven for each of two replicas, which have no equal rounds over three devices."""
    six = {f"cpu:{d}": 1.0 for d in range(6)}
    profile = chain_profile(8, speed=six, microbatches=(1, 14))
    with pytest.raises(ShardwrightError, match=r"14 micro-batches .* the 3 devices of each .* a multiple of 6"):
        plan(profile, microbatches=14, replicas=2, schedule="interleaved")


def test_replicas_on_some_devices_are_not_data_parallel_over_all(chain_profile):
    """Two replicas of the whole model on two of four devices: a replica on each device is another thing, and told."""
    found = plan(chain_profile(1, speed=FOUR), microbatches=2, replicas=2)
    assert (len(found.devices), len(found.stages)) == (2, 1)
    parallel = next(one for one in found.alternatives if one.name == "data parallel")
    assert parallel.devices == 4
    assert "Data parallel over 4 devices" in verdict(found).text


def test_auto_with_what_knows_one_only(chain_profile):
    """``"auto"`` is one where no other number can be planned."""
    profile = chain_profile(4, speed=FOUR)
    assert plan(profile, replicas="auto", objective="memory").replicas == 1
    assert plan(profile, replicas="auto", contiguous=False).replicas == 1


def test_a_corrupt_link_among_members_bars_their_mesh(chain_profile):
    """Gradients are summed over links that may be used: the other mesh is taken, or none is there."""
    profile = chain_profile(8, speed=FOUR)

    def corrupt(*pairs):
        links = tuple(
            link.model_copy(update={"probed_bytes": 9, "wrong_bytes": 1})
            if {link.source, link.target} in pairs
            else link
            for link in profile.links
        )
        return profile.model_copy(update={"links": links})

    found = plan(corrupt({"cpu:0", "cpu:2"}), microbatches=4, replicas=2)
    assert found.pipelines in ((("cpu:0",), ("cpu:1",)), (("cpu:2",), ("cpu:3",)))
    with pytest.raises(ShardwrightError, match="corrupt"):
        plan(corrupt({"cpu:0", "cpu:2"}, {"cpu:0", "cpu:1"}), microbatches=4, replicas=2)
