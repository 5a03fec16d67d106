"""From a profile to a plan: choice, certificate, refusals, files, and no torch."""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest

from shardwright.errors import ShardwrightError
from shardwright.profiler.profile import Misfit, Profile, Tie, Variation
from shardwright.reports.plan_report import verdict
from shardwright.sharder.planning.partition import partition
from shardwright.sharder.planning.plan import Plan
from shardwright.sharder.planning.planner import plan
from shardwright.sharder.planning.schedules.foreseen import timeline_of
from shardwright.sharder.planning.schedules.simulate import StageCost, simulate

MIXED = {f"cuda:{d}": speed for d, speed in enumerate([1.0, 2.1, 1.4, 0.7, 1.1, 1.9, 0.9, 1.3])}


def two_streams(count):
    """Wiring of two parallel streams of ``count`` units each, joined at the end."""
    edges = {f"{s}{i}": [f"{s}{i - 1}" if i else "x"] for i in range(count) for s in "ab"}
    return edges | {"join": [f"a{count - 1}", f"b{count - 1}"], "head": ["join"]}


def random_dag(count, seed=0):
    """Wiring in which each unit reads one or two of the 40 before it."""
    random_ = random.Random(seed)
    return {
        f"u{i}": sorted({f"u{random_.randrange(max(0, i - 40), i)}" for _ in range(random_.randint(1, 2))})
        if i
        else ["x"]
        for i in range(count)
    }


def some_times(names, seed=1):
    random_ = random.Random(seed)
    return {name: random_.uniform(0.5, 2.0) for name in names}


def test_even_chain_over_two_devices(chain_profile):
    """A chain of eight equal units is halved, proven, and its step is that of the simulated pipeline."""
    result = plan(chain_profile(8), microbatches=4)
    assert [stage.units for stage in result.stages] == [
        tuple(f"net.u{i}" for i in part) for part in (range(4), range(4, 8))
    ]
    assert result.devices == ("cpu:0", "cpu:1")
    assert result.certificate.exact
    assert result.certificate.gap_percent == 0
    assert result.certificate.binds == "the work itself: stage 0 on cpu:0 holds an even share of it"
    assert result.predicted.baseline_s == 24.0
    assert result.predicted.speedup == pytest.approx(2 * 4 / 5, rel=1e-4)
    assert result.schedule == "1f1b"
    assert [stage.in_flight for stage in result.stages] == [2, 1]


def test_few_microbatches_are_split_by_gpipe_where_that_is_shorter(chain_profile):
    """1F1B needs a micro-batch for each stage, GPipe does not: with one, two devices share the update."""
    profile = chain_profile(2, microbatches=(1,))
    rows = tuple(m.model_copy(update={"update_s": 5.0}) for m in profile.measurements if m.node.startswith("u"))
    updated = profile.model_copy(update={"measurements": rows})
    result = plan(updated, microbatches=1)
    assert (result.schedule, len(result.stages)) == ("gpipe", 2)
    assert result.predicted.step_s == plan(updated, microbatches=1, schedule="gpipe").predicted.step_s
    assert result.predicted.baseline_s == pytest.approx(result.predicted.step_s + 5.0, rel=1e-5)
    whole = plan(chain_profile(2, microbatches=(1,)), microbatches=1)
    assert (whole.schedule, len(whole.stages)) == ("1f1b", 1)


@pytest.mark.parametrize("seed", range(6))
def test_gpipe_where_its_short_steps_are_shorter(chain_profile, seed):
    """Both schedules are weighed by the shortest steps of their splits, not by those of their least loads."""
    random_ = random.Random(seed)
    profile = chain_profile(6, microbatches=(1,), speed={"cpu:0": 1.0, "cpu:1": 0.7})
    updates_s = {f"u{i}": random_.choice([0.0, 0.0, 1.0]) for i in range(6)}
    rows = tuple(m.model_copy(update={"update_s": updates_s[m.node]}) for m in profile.measurements)
    updated = profile.model_copy(update={"measurements": rows})
    step_s = plan(updated, microbatches=1).predicted.step_s
    assert step_s <= plan(updated, microbatches=1, schedule="gpipe").predicted.step_s


@pytest.mark.parametrize("seed", range(6))
def test_no_schedule_is_better_than_the_default_for_few_microbatches(chain_profile, seed):
    """At any number of micro-batches, with stages computed anew where memory asks for it, a plan is as fast as GPipe's
    but for what is too little to matter."""
    random_ = random.Random(seed)
    speed = {"cpu:0": 1.0, "cpu:1": random_.choice([0.7, 1.0]), "cpu:2": random_.choice([0.5, 1.0])}
    profile = chain_profile(
        6, microbatches=(1, 2), speed=speed, saved_bytes=6_000, memory_bytes=random_.choice([40_000, 60_000])
    )
    updates_s = {f"u{i}": random_.choice([0.0, 0.5, 1.0]) for i in range(6)}
    rows = tuple(m.model_copy(update={"update_s": updates_s[m.node]}) for m in profile.measurements)
    updated = profile.model_copy(update={"measurements": rows})
    for count in (1, 2):
        asked = {"microbatches": count, "recompute": "auto"}
        step_s, of_gpipe_s = (plan(updated, **asked, **more).predicted.step_s for more in ({}, {"schedule": "gpipe"}))
        assert step_s <= 1.01 * of_gpipe_s


def test_calls_of_one_module_bind_a_plan_and_are_named(chain_profile):
    """Where the calls of a module are most of the work, they keep it on one device, and why they do is told."""
    profile = chain_profile(4, forward_s={"u0": 10.0, "u1": 10.0, "u2": 10.0, "u3": 0.5})
    nodes = tuple(n.model_copy(update={"unit": "net.u0"}) if n.name in ("u1", "u2") else n for n in profile.nodes)
    looped = profile.model_copy(update={"nodes": nodes, "colocate": (("u0", "u1", "u2"),)})
    result = plan(looped)
    assert result.devices == ("cpu:0",)
    block = "net.u0 and 2 nodes that stay with it (all calls of net.u0 share a device)"
    assert result.certificate.binds == f"in the best split {block}, which is stage 0 on cpu:0 alone and cannot be split"
    with pytest.raises(ShardwrightError, match=f"{re.escape(block)} needs at least"):
        plan(looped, memory={"cpu:0": 2_000, "cpu:1": 2_000})


def test_a_split_that_is_not_worth_it_is_not_planned(chain_profile):
    """A split that is faster by less than 3% leaves the plan on one device, and is told beside it."""
    speed = {"cpu:0": 1.0, "cpu:1": 0.05}
    result = plan(chain_profile(50, speed=speed, microbatches=(32,)))
    assert (result.devices, result.predicted.speedup) == (("cpu:0",), 1.0)
    (candidate,) = result.candidates
    assert 1 < candidate.speedup < 1.03
    assert verdict(result) == (
        False,
        "Do not shard this: keep it on cpu:0, 150 s a step. The best split, over 2 devices with 32 micro-batches, "
        f"would take {candidate.step_s:.0f} s ({candidate.speedup:.2f}x).",
    )
    pinned = plan(chain_profile(50, speed=speed, microbatches=(32,)), microbatches=32)
    assert len(pinned.stages) == 2


def tied(profile, *nodes, gradient_bytes=10**9, name="net.w"):
    """The profile with a parameter that ``nodes`` share; a copy on one of its links takes 2 s for each 10^9 bytes."""
    tie = Tie(name=name, nodes=nodes, copy_bytes=3_000, gradient_bytes=gradient_bytes)
    return profile.model_copy(update={"ties": (*profile.ties, tie)})


@pytest.mark.parametrize("ties", [(), ("a0", "head")])
def test_record_agrees_with_itself(make_profile, ties):
    """Loads, step, memory, placement and in-edges of a plan are those of its own stages and of the profile."""
    edges = two_streams(6)
    profile = make_profile(edges, forward_s=some_times(edges))
    result = plan(tied(profile, *ties) if ties else profile)
    costs = [
        StageCost(s.forward_s, s.backward_s, s.update_s, s.send_forward_s, s.receive_backward_s, s.tie_s)
        for s in result.stages
    ]
    assert any(cost.tie_s for cost in costs) == bool(ties)
    timeline = simulate(costs, result.microbatches, schedule=result.schedule)
    assert timeline.step_s == pytest.approx(result.predicted.step_s)
    assert timeline.busy_s == pytest.approx([stage.load_s for stage in result.stages])
    assert max(stage.load_s for stage in result.stages) == result.certificate.value_s
    assert all(stage.memory_bytes <= stage.memory_cap_bytes for stage in result.stages)
    assert sum(stage.param_bytes for stage in result.stages) == 1_000 * len(edges)
    stage_of = {node.node: node.stage for node in result.nodes}
    assert all(stage_of[source] <= node.stage for node in result.nodes for source in node.inputs)
    assert result.placement() == {f"net.{n.node}": result.devices[n.stage] for n in result.nodes if n.kind == "unit"}
    assert [c.microbatches for c in result.candidates if c.chosen] == [result.microbatches]
    assert result.predicted.step_s == min(c.step_s for c in result.candidates)


def test_number_of_microbatches_is_chosen_by_the_step(chain_profile):
    """More micro-batches shrink the bubble until their overhead eats the gain; the shortest step wins."""
    cheap = plan(chain_profile(8, microbatches=(1, 2, 4, 8), overhead_s=0.001))
    dear = plan(chain_profile(8, microbatches=(1, 2, 4, 8), overhead_s=0.25))
    assert cheap.microbatches == 8
    assert dear.microbatches < 8
    assert [c.microbatches for c in cheap.candidates] == [1, 2, 4, 8]


def test_one_device_when_no_split_is_faster(chain_profile):
    """When the overhead of micro-batches eats every gain the plan is one device, and says that the rest is slower."""
    result = plan(chain_profile(2, microbatches=(1, 2), overhead_s=3.0))
    assert result.devices == ("cpu:0",)
    assert result.microbatches == 1
    assert result.predicted.speedup == 1.0
    asked = plan(chain_profile(2, microbatches=(1, 2), overhead_s=3.0), microbatches=2)
    assert len(asked.stages) == 2
    assert asked.predicted.speedup is not None
    assert asked.predicted.speedup < 1


def test_one_large_unit_binds(chain_profile):
    """When one unit is a stage by itself the certificate names it."""
    result = plan(chain_profile(3, forward_s={"u0": 1.0, "u1": 9.0, "u2": 1.0}), microbatches=4)
    assert "u1" in result.certificate.binds
    alone = plan(chain_profile(2, forward_s={"u0": 9.0, "u1": 1.0}), microbatches=4)
    assert "net.u0" in alone.certificate.binds
    assert "cannot be split" in alone.certificate.binds


def test_memory_caps_bind(chain_profile):
    """A cap that forces a worse split is named, with what it costs."""
    profile = chain_profile(6, saved_bytes=0, tensor_bytes=0)
    result = plan(profile, microbatches=4, memory={"cpu:0": 4_000, "cpu:1": "1GiB"})
    assert sorted(len(stage.units) for stage in result.stages) == [2, 4]
    assert result.certificate.binds == "the memory caps: without them the largest load would be 75% of this"
    assert result.predicted.baseline_device == "cpu:1"


def test_what_fits_no_single_device_has_no_speedup(chain_profile):
    """A model that no device holds alone is split, with nothing to compare with."""
    result = plan(chain_profile(4), memory={"cpu:0": 7_000, "cpu:1": 7_000})
    assert len(result.stages) == 2
    assert (result.predicted.baseline_device, result.predicted.baseline_s, result.predicted.speedup) == (
        None,
        None,
        None,
    )


def test_gpipe_where_1f1b_has_too_few_stages(chain_profile):
    """With fewer micro-batches than the stages that the memory needs, GPipe takes over."""
    speed = {"a": 1.0, "b": 1.0, "c": 1.0}
    profile = chain_profile(3, speed=speed, microbatches=(2,), memory_bytes=4_000)
    result = plan(profile)
    assert (result.schedule, len(result.stages)) == ("gpipe", 3)
    assert [stage.in_flight for stage in result.stages] == [2, 2, 2]


def test_unit_larger_than_every_device_is_refused_by_name(chain_profile):
    """The error names the unit, what it needs, the roomiest device and what that has."""
    with pytest.raises(ShardwrightError) as caught:
        plan(chain_profile(2, param_bytes=2**30), memory={"cpu:0": "1GiB", "cpu:1": "1.5GiB"}, microbatches=4)
    assert str(caught.value) == (
        "at 4 micro-batches net.u0 needs at least 2 GiB; cpu:1, the roomiest device that it may be on, has 1.5 GiB, "
        "513 MiB too little: give each device 103% more memory (--memory cpu:0=2069MiB --memory cpu:1=3103MiB)"
    )


def test_model_larger_than_all_devices_is_refused_with_both_numbers(chain_profile):
    """The error has what the model needs and what each device has."""
    with pytest.raises(ShardwrightError, match=r"needs 16 MiB in one piece .*cpu:0 5 MiB, cpu:1 6 MiB: give "):
        plan(chain_profile(8, param_bytes=2**20), memory={"cpu:0": "5MiB", "cpu:1": "6MiB"})


def test_pins_are_obeyed_and_stay_a_split(chain_profile):
    """A pinned unit is where it was pinned, even if that costs time."""
    result = plan(chain_profile(8, speed={"cpu:0": 1.0, "cpu:1": 3.0}), pins={"net.u[0-5]": "cpu:0"})
    assert all(result.placement()[f"net.u{i}"] == "cpu:0" for i in range(6))
    free = plan(chain_profile(8, speed={"cpu:0": 1.0, "cpu:1": 3.0}))
    assert free.predicted.step_s < result.predicted.step_s


def test_pins_that_leave_no_split_are_told_from_memory(chain_profile):
    """Pins that would send the data back to an earlier device are refused as pins."""
    with pytest.raises(ShardwrightError, match="no split obeys the pins, though one without them fits"):
        plan(chain_profile(3), pins={"net.u0": "cpu:0", "net.u1": "cpu:1", "net.u2": "cpu:0"})


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"microbatches": 3}, "no times at 3 micro-batches"),
        ({"objective": "beauty"}, "objective 'beauty' is not known"),
        ({"devices": ["cuda:9"]}, "unknown device cuda:9"),
        ({"pins": {"net.u7": "cpu:0"}}, "no unit matches 'net.u7'"),
        ({"memory": {"cpu:0": "all"}}, "'all' is not a size in bytes"),
    ],
)
def test_arguments_that_cannot_be(chain_profile, options, says):
    """Whatever the profile does not have is refused in one line."""
    with pytest.raises(ShardwrightError, match=says) as caught:
        plan(chain_profile(2), **options)
    assert "\n" not in str(caught.value)


def test_inference_has_no_backward(chain_profile):
    """A profile without training is planned without gradients, on GPipe's forwards."""
    result = plan(chain_profile(8, train=False), microbatches=4)
    assert result.schedule == "gpipe"
    assert all((stage.backward_s, stage.receive_backward_s, stage.in_flight) == (0, 0, 1) for stage in result.stages)
    assert result.predicted.speedup == pytest.approx(2 * 4 / 5, rel=1e-4)
    assert plan(chain_profile(8, train=False, microbatches=(1,))).devices == ("cpu:0",)


def test_model_that_takes_no_time(chain_profile):
    """A profile of nothing but zeros gives a plan and no division by zero."""
    profile = chain_profile(3, forward_s=0.0)
    free = profile.model_copy(update={"links": tuple(li.model_copy(update={"latency_s": 0.0}) for li in profile.links)})
    result = plan(free)
    assert result.certificate.gap_percent == 0
    assert plan(profile).predicted.speedup == 1.0


def test_one_device_is_a_plan_with_proof(chain_profile):
    """With a single device the whole model is one stage, exactly."""
    result = plan(chain_profile(5), devices=["cpu:1"])
    assert result.devices == ("cpu:1",)
    assert result.certificate.exact


def test_tied_units_share_a_stage(chain_profile):
    """Units tied across half of the chain are on one device with all between them."""
    result = plan(chain_profile(8, colocate=[("u0", "u4")]), microbatches=4)
    assert len({result.placement()[f"net.u{i}"] for i in range(5)}) == 1


def test_tied_language_model_is_split(chain_profile):
    """An embedding and a head that share their weight part: both stages hold a copy and sum its gradient once."""
    free, result = plan(chain_profile(8), microbatches=4), plan(tied(chain_profile(8), "u0", "u7"), microbatches=4)
    assert [(tie.name, tie.stages) for tie in result.ties] == [("net.w", (0, 1))]
    assert [stage.units for stage in result.stages] == [stage.units for stage in free.stages]
    assert [stage.tie_s for stage in result.stages] == pytest.approx([2.0, 2.0], rel=1e-5)
    assert [a.load_s - b.load_s for a, b in zip(result.stages, free.stages, strict=True)] == pytest.approx(
        [2.0, 2.0], rel=1e-5
    )
    assert [a.memory_bytes - b.memory_bytes for a, b in zip(result.stages, free.stages, strict=True)] == [0, 3_000]
    assert result.predicted.step_s == pytest.approx(free.predicted.step_s + 2.0, rel=1e-5)
    assert result.certificate.exact
    assert result.certificate.binds == "the copies of net.w: without them the largest load would be 86% of this"


def test_tied_parameter_with_a_huge_gradient_keeps_its_users_together(chain_profile):
    """Where the sum takes longer than the work that a split saves, the users share a stage: the only one if need be."""
    room = {"memory_bytes": 10**11}
    result = plan(tied(chain_profile(8, **room), "u0", "u7", gradient_bytes=10**10), microbatches=4)
    assert (len(result.stages), result.ties) == (1, ())
    assert result.certificate.exact
    assert result.certificate.binds == "the copies of net.w: without them the largest load would be 50% of this"
    near = plan(tied(chain_profile(8, **room), "u3", "u4", gradient_bytes=10**10), microbatches=4)
    assert sorted(len(stage.units) for stage in near.stages) == [3, 5]
    assert (near.ties, [stage.tie_s for stage in near.stages]) == ((), [0.0, 0.0])


def test_search_for_what_binds_may_find_nothing(chain_profile, monkeypatch):
    """When no time is left to split without the ties the plan stands, and something else is said to bind."""
    from shardwright.sharder.planning.verdict import explain

    def no_time_without_ties(problem, **options):
        if not problem.ties:
            raise ShardwrightError("no split that fits was found in the time allowed")
        return partition(problem, **options)

    monkeypatch.setattr(explain, "partition", no_time_without_ties)
    result = plan(tied(chain_profile(8), "u0", "u7"), microbatches=4)
    assert result.certificate.exact
    assert "copies" not in result.certificate.binds


def test_copies_of_constants_are_no_ties_of_the_plan(make_profile):
    """A constant that both stages read is copied; the plan's ties are parameters alone."""
    edges = {"k": [], **{f"u{i}": [f"u{i - 1}" if i else "x", "k"] for i in range(4)}}
    profile = make_profile(edges, kinds={"k": "parameter"})
    nodes = tuple(n.model_copy(update={"type": "constant"}) if n.name == "k" else n for n in profile.nodes)
    result = plan(profile.model_copy(update={"nodes": nodes}), microbatches=4)
    assert [len(stage.units) for stage in result.stages] == [2, 2]
    assert result.ties == ()
    assert len(plan(profile, microbatches=4).stages) == 1


def test_inference_copies_a_tied_parameter_for_nothing(chain_profile):
    """Without training the copies have nothing to sum, and the plan still names the stages that hold one."""
    result = plan(tied(chain_profile(8, train=False), "u0", "u7", gradient_bytes=0), microbatches=4)
    assert [stage.tie_s for stage in result.stages] == [0.0, 0.0]
    assert [(tie.name, tie.stages) for tie in result.ties] == [("net.w", (0, 1))]


def test_round_trip_and_schema(chain_profile, tmp_path):
    """A plan read back equals the one that was saved, and its JSON obeys the published schema."""
    result = plan(tied(chain_profile(4), "u0", "u3"))
    assert result.ties
    result.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == result
    schema = Plan.model_json_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(json.loads((tmp_path / "plan.json").read_text()), schema)


def test_wrong_plan_files_are_one_clear_line(chain_profile, tmp_path):
    """A truncated plan, a newer one, one without its stages, and a profile in its place are refused."""
    profile = chain_profile(4)
    path = tmp_path / "plan.json"
    text = plan(profile).model_dump_json()
    content = json.loads(text)
    del content["stages"]
    for wrong, says in [
        (text[:-30], "is not complete JSON"),
        (text.replace('"version":1', '"version":9'), "has plan version 9; this shardwright reads up to 1"),
        (json.dumps(content), "is a damaged plan: stages: it is missing"),
        (profile.model_dump_json(), "is not a plan: its format is 'shardwright.profile'"),
    ]:
        path.write_text(wrong)
        with pytest.raises(ShardwrightError, match=says) as caught:
            Plan.load(path)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("devices", [2, 3, 4])
def test_hundred_units_are_split_exactly(chain_profile, devices):
    """Of a chain of 100 units on mixed devices at four numbers of micro-batches the least largest load is proven."""
    times = some_times([f"u{i}" for i in range(100)])
    profile = chain_profile(100, forward_s=times, speed=dict(list(MIXED.items())[:devices]), microbatches=(1, 2, 4, 8))
    result = plan(profile)
    certificate = result.certificate
    assert certificate.bound_s == (certificate.least_s or certificate.value_s)
    assert len(result.stages) == devices


def test_two_streams_are_split_exactly(make_profile):
    """Two parallel streams of ten units are split exactly."""
    edges = two_streams(9)
    profile = make_profile(edges, forward_s=some_times(edges), microbatches=(1, 2, 4, 8))
    result = plan(profile)
    assert result.certificate.exact


@pytest.mark.timeout(90)  # without the limit it would take many minutes
@pytest.mark.parametrize("wiring", ["chain", "random"])
def test_time_limit_holds_for_any_graph(make_profile, wiring):
    """Thousands of units in a row, or hundreds in a tangle, on eight mixed devices end in time with an honest gap."""
    edges = {f"u{i}": [f"u{i - 1}" if i else "x"] for i in range(1500)} if wiring == "chain" else random_dag(300)
    profile = make_profile(edges, forward_s=some_times(edges), speed=MIXED, microbatches=(8,))
    result = plan(profile, time_limit_s=1.0)
    certificate = result.certificate
    assert certificate.bound_s <= certificate.value_s
    assert (certificate.least_s or certificate.value_s) < 1.15 * certificate.bound_s
    assert len(result.stages) == 8


@pytest.mark.parametrize(
    "code",
    [
        "import shardwright.sharder.planning.planner",
        "import shardwright.profiler.profile",
        "import shardwright.profiler.graph",
        "from shardwright.profiler.profile import Profile\n"
        "from shardwright.sharder.planning.planner import plan\n"
        "plan(Profile.load(sys.argv[1])).save(sys.argv[2])",
    ],
)
def test_planning_does_not_import_torch(chain_profile, tmp_path, code):
    """Reading a profile, planning and writing the plan leave torch, and pandas with it, alone."""
    profile: Profile = chain_profile(4)
    profile.save(tmp_path / "profile.json")
    script = f"import sys\n{code}\nassert not {{'torch', 'pandas'}} & set(sys.modules)"
    home = Path(sys.modules["shardwright.errors"].__file__ or "").parent
    link = tmp_path / "path" / "shardwright"
    link.parent.mkdir()
    link.symlink_to(home)
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "profile.json"), str(tmp_path / "plan.json")],
        env={"PYTHONPATH": str(link.parent)},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    if "save" in code:
        assert Plan.load(tmp_path / "plan.json") == plan(profile)


def test_devices_that_differ_by_noise_count_as_equal(make_profile):
    """The first device is the baseline unless another is faster by more than both varied while they were measured."""
    profile = make_profile({"a": ["x"], "b": ["a"]}, speed={"cpu:0": 1.0, "cpu:1": 1.15})
    assert plan(profile).predicted.baseline_device == "cpu:1"
    shaky = tuple(Variation(device=d, relative=(0.8, 0.9, 1.0, 1.1, 1.2)) for d in ("cpu:0", "cpu:1"))
    assert plan(profile.model_copy(update={"variations": shaky})).predicted.baseline_device == "cpu:0"


def test_a_unit_is_not_put_where_it_does_not_fit(make_profile):
    """What did not fit on a device, even alone, goes to another; with none left the unit is named."""
    profile = make_profile({"a": ["x"], "b": ["a"], "c": ["b"]}, microbatches=(1,))

    def without(*cases):
        lacking = {(node, device) for node, device in cases}
        rows = tuple(m for m in profile.measurements if (m.node, m.device) not in lacking)
        misfits = tuple(
            Misfit(node=node, device=device, microbatches=1, reason="out of memory") for node, device in cases
        )
        return profile.model_copy(update={"measurements": rows, "misfits": misfits})

    placement = plan(without(("b", "cpu:0"))).placement()
    assert placement["net.b"] == "cpu:1"
    with pytest.raises(ShardwrightError, match=r"net\.b fits on none of cpu:0, cpu:1, not even alone"):
        plan(without(("b", "cpu:0"), ("b", "cpu:1")))


def corrupt(profile, *pairs):
    """The profile with links over which bytes were found to change."""
    links = (
        link.model_copy(update={"probed_bytes": 99, "wrong_bytes": 3}) if (link.source, link.target) in pairs else link
        for link in profile.links
    )
    return profile.model_copy(update={"links": tuple(links)})


@pytest.mark.parametrize("pair", [("cpu:0", "cpu:1"), ("cpu:1", "cpu:0")])
def test_a_corrupt_link_is_not_used_in_either_direction(chain_profile, pair):
    """In training activations go one way and gradients the other: with either spoilt, the two devices share nothing."""
    profile = chain_profile(8)
    assert len(plan(profile).stages) == 2
    result = plan(corrupt(profile, pair))
    assert len(result.stages) == 1
    assert f"corrupt links, which are not used ({pair[0]} -> {pair[1]})" in result.certificate.binds


def test_inference_may_still_use_the_other_direction(chain_profile):
    """Without gradients a pair with one corrupt direction is used in the other."""
    result = plan(corrupt(chain_profile(8, train=False), ("cpu:0", "cpu:1")), microbatches=4)
    assert result.devices == ("cpu:1", "cpu:0")


def test_stages_go_around_a_corrupt_link(chain_profile):
    """Of three devices all are used, in an order in which the corrupt pair are not neighbours."""
    speed = {"cpu:0": 1.0, "cpu:1": 1.0, "cpu:2": 1.0}
    result = plan(corrupt(chain_profile(9, speed=speed), ("cpu:0", "cpu:1")), microbatches=4)
    assert len(result.stages) == 3
    assert result.devices[1] == "cpu:2"


def test_what_only_a_corrupt_link_could_do_is_refused_by_its_name(chain_profile):
    """A model that no device holds alone, over two devices that cannot talk, is refused with the link and a remedy."""
    profile = chain_profile(8, memory_bytes=13_000)
    assert len(plan(profile).stages) == 2
    with pytest.raises(ShardwrightError, match=r"no split fits without corrupt links \(cpu:0 -> cpu:1\)") as caught:
        plan(corrupt(profile, ("cpu:0", "cpu:1")))
    assert "\n" not in str(caught.value)


def anew(found):
    """Which stages are computed anew."""
    return [stage.recompute for stage in found.stages]


def test_a_stage_is_computed_anew_where_nothing_fits_otherwise(chain_profile, tmp_path):
    """The first stage, which holds two micro-batches at once: its forward comes twice, and the plan says why."""
    profile = chain_profile(6, saved_bytes=8 * 2**20, tensor_bytes=2**16, microbatches=(4,))
    caps = {"cpu:0": "7MiB", "cpu:1": "7MiB"}
    found = plan(profile, memory=caps)
    assert anew(found) == [True, False]
    assert all(stage.memory_bytes <= 7 * 2**20 for stage in found.stages)
    first, last = found.stages
    assert (first.forward_s, first.backward_s) == (last.forward_s, last.forward_s + last.backward_s)
    assert found.certificate.exact
    assert found.certificate.value_s == pytest.approx(4 * 4 * first.forward_s, rel=1e-3)
    assert timeline_of(found).step_s == pytest.approx(found.predicted.step_s)
    (against,) = [one for one in found.alternatives if one.name == "nothing anew"]
    assert (against.step_s, against.why) == (None, "no split fits")
    assert "Stage 0 keeps no activations and computes them anew in the backward: without that, no split fits." in (
        verdict(found).text
    )
    path = tmp_path / "plan.json"
    found.save(path)
    assert Plan.load(path) == found
    with pytest.raises(ShardwrightError, match=r"let stages be computed anew in the backward \(--recompute auto\)"):
        plan(profile, memory=caps, recompute="never")


def test_a_stage_is_computed_anew_where_that_is_faster(chain_profile):
    """Three stages of twelve units: kept, a cap of seven units leaves two, three and seven of them."""
    speed = dict.fromkeys(("cpu:0", "cpu:1", "cpu:2"), 1.0)
    options = {"saved_bytes": 8 * 2**20, "tensor_bytes": 2**10, "microbatches": (8,), "speed": speed}
    profile = chain_profile(12, **options)
    caps = dict.fromkeys(speed, str(15 * 2**19))
    found, kept = (plan(profile, memory=caps, recompute=recompute) for recompute in ("auto", "never"))
    assert [len(stage.units) for stage in kept.stages] == [2, 3, 7]
    assert not any(anew(kept))
    assert any(anew(found))
    assert found.certificate.value_s < kept.certificate.value_s
    (against,) = [one for one in found.alternatives if one.name == "nothing anew"]
    assert against.step_s == kept.predicted.step_s > found.predicted.step_s
    assert "the best split without that takes" in verdict(found).text


def test_nothing_is_computed_anew_where_all_fits(chain_profile):
    """By itself never; asked for, every stage."""
    profile = chain_profile(6)
    assert not any(anew(plan(profile)))
    always = plan(profile, microbatches=4, recompute="always")
    assert anew(always) == [True, True]
    assert "Every stage keeps no activations and computes them anew in the backward, as was asked for." in (
        verdict(always).text
    )
    assert always.certificate.exact
    assert always.certificate.value_s == pytest.approx(
        4 / 3 * plan(profile, microbatches=4).certificate.value_s, rel=1e-3
    )


def test_the_forward_that_keeps_nothing_is_priced_as_measured(chain_profile):
    """Where it takes another time than the forward: first the one that keeps nothing, then the forward again."""
    profile = chain_profile(6, microbatches=(4,))
    timed = [m.model_copy(update={"recompute_s": 0.5 * m.forward_s}) for m in profile.measurements]
    found = plan(profile.model_copy(update={"measurements": tuple(timed)}), recompute="always")
    assert [stage.backward_s / stage.forward_s for stage in found.stages] == pytest.approx([6.0, 6.0])
    assert found.certificate.value_s == pytest.approx(4 * 7 * found.stages[0].forward_s, rel=1e-3)


def test_the_peak_share_is_made_least_by_keeping_less_only_if_nothing_fits(chain_profile):
    """Objective memory: a stage computed anew takes less nearly always, and longer always."""
    profile = chain_profile(6, saved_bytes=8 * 2**20, tensor_bytes=2**16, microbatches=(4,))
    roomy, tight = ({"cpu:0": size, "cpu:1": size} for size in ("13MiB", "7MiB"))
    assert not any(anew(plan(profile, objective="memory", memory=roomy)))
    found = plan(profile, objective="memory", memory=tight)
    assert any(anew(found))
    assert found.peak.value <= 1
    every = plan(profile, objective="memory", memory=roomy, recompute="always")
    assert all(anew(every))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"recompute": "sometimes"}, "recompute 'sometimes' is not known; the planner has: auto, never, always"),
        ({"recompute": "always", "contiguous": False}, "is for a chain of stages"),
        ({"recompute": "always", "objective": "latency"}, "is for a chain of stages"),
    ],
)
def test_what_cannot_be_computed_anew_is_refused(chain_profile, options, says):
    """Only a chain of stages in training has anything to compute anew."""
    with pytest.raises(ShardwrightError, match=says):
        plan(chain_profile(4), **options)
    with pytest.raises(ShardwrightError, match="the profile is of inference"):
        plan(chain_profile(4, train=False), recompute="always")
    assert not any(anew(plan(chain_profile(4, train=False))))
