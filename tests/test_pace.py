"""The pace of a device: times are told at one pace, and a run says how fast its devices were."""

import itertools
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_measure import Clock, Takes, subject
from torch import nn

import shardwright as sw
from shardwright.profiler.campaign import Findings
from shardwright.profiler.formats.costs import Costs
from shardwright.profiler.measure import Goal, Pass, measure
from shardwright.profiler.measuring.pace import Pace, pace_of
from shardwright.profiler.measuring.stopwatch import HostStopwatch
from shardwright.profiler.measuring.timing import LEAST_REPEATS, Series, at_pace, summarise
from shardwright.reports.run_report import paces as paces_told
from shardwright.sharder.planning.schedules.foreseen import at_pace as step_at_pace
from shardwright.sharder.planning.schedules.foreseen import timeline_of
from shardwright.sharder.runtime import session
from shardwright.sharder.runtime.record import Paced, Run, Timed
from shardwright.sharder.runtime.turns import Pacing, in_turn

COSTS = Path(__file__).parents[1] / "examples" / "costs.json"
PACES = st.floats(0.1, 10.0)


@pytest.fixture(scope="module")
def a_plan():
    """A plan of several stages whose devices' speeds do not vary."""
    return sw.plan(Costs.load(COSTS).profile())


def test_a_machine_that_changes_its_speed_gives_steady_times():
    """A unit that takes what the machine's pace makes of it is settled at once, at the median pace."""
    clock = Clock()
    speeds = itertools.cycle([1.0, 2.0, 4.0, 0.5, 1.0])
    speed = {"now": 1.0}

    def pace():
        return 0.01 * speed["now"]

    class Unsteady(Takes):
        def forward(self, x):
            clock.now += 3.0 * speed["now"]
            return x * self.weight

    def next_round(_number):
        speed["now"] = next(speeds)

    settled = {}
    unit = Unsteady(clock, 0.0, 0.0)
    totals = measure(
        [Pass({"a": subject(unit, torch.ones(3), train=False)})],
        HostStopwatch(clock),
        Goal(repeats=40),
        on_settled=settled.__setitem__,
        on_round=next_round,
        pace=pace,
        clock=clock,
    )
    series = settled["a"]
    assert series.repeats == LEAST_REPEATS
    assert series.totals() == pytest.approx([3.0 * series.median_pace_s() / 0.01] * LEAST_REPEATS)
    assert totals == pytest.approx([3.0 * s for s in (1.0, 2.0, 4.0, 0.5, 1.0, 1.0)])  # as it was: plans need to know


def test_a_pass_has_the_mean_pace_of_its_begin_and_end():
    """Where there is one clock."""
    clock, readings = Clock(), iter([1.0, 3.0, 3.0, 5.0] * 7)
    passes = [Pass({name: subject(Takes(clock, 2.0, 1.0), torch.ones(3), train=False)}) for name in "ab"]
    settled = {}
    measure(
        passes,
        HostStopwatch(clock),
        Goal(),
        on_settled=settled.__setitem__,
        pace=lambda: next(readings),
        clock=clock,
    )
    assert settled["a"].pace_s == [2.0] * LEAST_REPEATS
    assert settled["b"].pace_s == [4.0] * LEAST_REPEATS


def paced(seconds, paces):
    made = Series()
    for second, pace_s in zip(seconds, paces, strict=True):
        made.add(forward_s=second, backward_s=2 * second, update_s=second, recompute_s=second, pace_s=pace_s)
    return made


@given(st.lists(PACES, min_size=1, max_size=20), PACES)
def test_what_follows_the_pace_is_told_at_any_pace(paces, other):
    """All times of work that takes 7 paces are 7 times the pace they are told at, without spread."""
    timing = summarise(paced([7 * pace_s for pace_s in paces], paces))
    for told in (timing, at_pace(timing, other)):
        assert told.forward_s == told.update_s == pytest.approx(7 * told.pace_s)
        assert told.backward_s == pytest.approx(14 * told.pace_s)
        assert told.recompute_s == pytest.approx(7 * told.pace_s)
        assert told.forward_spread_s == pytest.approx(0.0, abs=1e-9)
    assert at_pace(timing, other).pace_s == other


def test_where_work_is_enqueued_the_host_goes_by_the_pace():
    """The device's own times stay; those of the host are told at another pace."""
    both = Series()
    both.add(forward_s=5.0, backward_s=5.0)
    both.host = paced([7.0, 14.0], [1.0, 2.0])
    timing = at_pace(summarise(both), 3.0)
    assert (timing.forward_s, timing.host.forward_s, timing.pace_s) == (5.0, 21.0, 3.0)


def test_times_of_two_campaigns_are_told_at_one_pace():
    """What the cache knows from a slower day is brought to the pace of the others; another device has its own."""
    findings, unpaced = Findings(), Series()
    unpaced.add(forward_s=5.0)
    for number, (device, pace_s) in enumerate([("cpu:0", 1.0), ("cpu:0", 2.0), ("cpu:0", 1.0), ("cpu:1", 3.0)]):
        findings.timings[device, 1, f"unit{number}"] = summarise(paced([7 * pace_s], [pace_s]))
    findings.timings["cuda:0", 1, "unit0"] = summarise(unpaced)
    findings.level()
    assert findings.paces == {"cpu:0": 1.0, "cpu:1": 3.0}
    assert [timing.forward_s for timing in findings.timings.values()] == [7.0, 7.0, 7.0, 21.0, 5.0]


@given(st.floats(0.2, 5.0))
def test_a_step_on_slower_devices_is_longer_by_what_they_compute(a_plan, factor):
    """At the pace of the profile it is the plan's own; transfers do not change, so it grows by less than the pace."""
    assert step_at_pace(a_plan, {}) == pytest.approx(a_plan.predicted.step_s)
    slower = step_at_pace(a_plan, dict.fromkeys(a_plan.devices, factor))
    ratio = slower / a_plan.predicted.step_s
    assert min(1.0, factor) - 1e-9 <= ratio <= max(1.0, factor) + 1e-9
    stages = tuple(
        stage.model_copy(
            update={"forward_s": factor * stage.forward_s, "backward_s": factor * stage.backward_s}
            | {"update_s": factor * stage.update_s, "engine_s": factor * stage.engine_s}
        )
        for stage in a_plan.stages
    )
    again = timeline_of(a_plan.model_copy(update={"stages": stages})).step_s / timeline_of(a_plan).step_s
    assert ratio == pytest.approx(again)


def test_one_slow_device_alone_sets_its_own_stage_back(a_plan):
    """The others' costs stay as they were."""
    first = a_plan.devices[0]
    assert a_plan.predicted.step_s < step_at_pace(a_plan, {first: 2.0}) < 2 * a_plan.predicted.step_s


def test_each_contender_has_the_paces_at_its_own_steps():
    """The warm-up left out, the median over the steps."""
    now, readings = {}, iter(range(100))

    def step(seconds):
        now["cpu:0"] = seconds * next(readings)
        return seconds

    pacing = Pacing(lambda: dict(now))
    steps = {name: pacing.beside(name, lambda s=s: step(s)) for name, s in (("slow", 10.0), ("fast", 1.0))}
    in_turn(steps, 5, limit_s=0.0)
    taken = {name: [each["cpu:0"] for each in found] for name, found in pacing.found.items()}
    # Rounds begin with one and the other in turn.
    assert taken == {"slow": [0, 30, 40, 70, 80, 110, 120], "fast": [1, 2, 5, 6, 9, 10, 13]}
    assert pacing.of("slow") == {"cpu:0": 80}
    assert pacing.of("fast") == {"cpu:0": 9}


def test_the_pace_is_that_of_work():
    """What is timed is the products themselves, by the clock that is given, once they have warmed up."""
    clock, seconds = Clock(), itertools.chain([4.0] * 5, itertools.repeat(0.5))

    def work():
        clock.now += next(seconds)

    assert Pace(work, 5, clock)() == 2.5
    state = torch.get_rng_state()
    gradients = pace_of(torch.device("cpu")).work()
    assert all(bool(gradient.isfinite().all()) and bool(gradient.count_nonzero()) for gradient in gradients)
    with torch.no_grad():  # as a run in inference is
        assert len(pace_of(torch.device("cpu")).work()) == len(gradients)
    assert torch.equal(torch.get_rng_state(), state)  # a model's random numbers do not know of it
    assert torch.equal(pace_of(torch.device("meta")).work(), torch.ones(4))  # what stands for a GPU has a host


class Twice(nn.Module):
    """Two layers."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))

    def forward(self, x):
        """One after the other."""
        return self.layers(x)


@pytest.mark.parametrize("factor", [1.0, 3.0])
def test_a_run_is_held_against_the_pace_it_had(monkeypatch, tmp_path, factor):
    """Workers whose fixed work takes so many times as long as in the profile: the step is foreseen so much longer."""
    monkeypatch.setenv("SHARDWRIGHT_CACHE", str(tmp_path))
    model, x = Twice(), torch.randn(8, 16)
    profile = sw.profile(model, (x,), devices=["cpu:0", "cpu:1"], microbatches=[2], rounds=6)
    paces = {device.name: device.pace_s for device in profile.devices}
    assert all(pace_s > 0 for pace_s in paces.values())
    assert all(m.backward_input_s is m.backward_weight_s is None for m in profile.measurements)  # not asked for
    plan = sw.plan(profile, microbatches=2, pins={"layers.0": "cpu:0", "layers.1": "cpu:1"})
    assert plan.paces == paces
    monkeypatch.setattr(session.Session, "paces", lambda _, devices: {d: factor * paces[d] for d in devices})
    run = sw.run(model, plan, (x,), steps=1, naive=False)
    assert [(each.device, each.slower) for each in run.paces] == [(d, pytest.approx(factor)) for d in plan.devices]
    assert run.sharded.at_pace_s == pytest.approx(step_at_pace(plan, dict.fromkeys(paces, factor)))
    assert run.baseline.at_pace_s == pytest.approx(factor * plan.predicted.baseline_s)
    assert run.speedup_at_pace == pytest.approx(run.baseline.at_pace_s / run.sharded.at_pace_s)
    error = 100 * (run.sharded.at_pace_s / run.sharded.measured_s - 1)
    assert run.sharded.error_at_pace_percent == pytest.approx(error)
    assert f"cpu:0 {factor:.2f}x, cpu:1 {factor:.2f}x" in paces_told(run)


@pytest.mark.parametrize(("measured_s", "at_pace_s", "told"), [(1.0, 1.25, True), (1.0, 0.95, False)])
def test_a_pace_that_brings_the_prediction_no_nearer_is_said_to_explain_nothing(measured_s, at_pace_s, told):
    """Predicted 12% too short; at the pace of the devices 25% too long, or 5% too short."""
    paces = (Paced(device="cpu:0", profiled_s=1.0, measured_s=1.1),)
    sharded = Timed(predicted_s=0.88, measured_s=measured_s, spread_s=0.0, at_pace_s=at_pace_s)
    run = Run.model_construct(paces=paces, sharded=sharded, baseline=None)
    assert ("no nearer" in paces_told(run)) == told


def test_the_workers_tell_their_own_pace(captured_profile):
    """Without anything planted: a number of seconds for each device, in the run's record."""
    model, x = Twice(), torch.randn(8, 16)
    profile = captured_profile(model, (x,), microbatches=(1, 2))
    plan = sw.plan(profile, microbatches=2).model_copy(update={"paces": {"cpu:0": 0.01, "cpu:1": 0.01}})
    run = sw.run(model, plan, (x,), steps=1, naive=False)
    assert {each.device for each in run.paces} == set(plan.devices)
    assert all(0 < each.measured_s < 60 for each in run.paces)


@given(st.floats(1e-6, 10.0))
def test_short_steps_are_timed_in_a_row(expected_s):
    """A long one alone; of short ones a few, one of them to get the core to work."""
    count = session.steps_in_row(expected_s)
    assert count == 1 if expected_s >= session.LONG_S else 2 <= count <= session.MOST_IN_ROW
    assert session.steps_in_row(expected_s / 2) >= count


def test_the_first_of_a_row_does_not_count(captured_profile, monkeypatch):
    """Each device's seconds of each step: the longest of a step, and the mean of the steps behind the first."""
    model, x = Twice(), torch.randn(8, 16)
    profile = captured_profile(model, (x,), microbatches=(1, 2))
    plan = sw.plan(profile, microbatches=2)
    devices, asked = plan.devices, []

    def call(calls, *, limit_s):
        asked.append((limit_s, {device: args for device, (_, args) in calls.items()}))
        return {device: [9.0, 1.0 + number, 3.0] for number, device in enumerate(calls)}

    held = session.Session(None, model, (x,), {}, [], 5.0)
    monkeypatch.setattr(held, "pool", type("Pool", (), {"call": staticmethod(call)}))
    split = session.Split("plan", plan, (), (0,))
    assert held.step(split) == (max(1.0, len(devices)) + 3.0) / 2
    assert held.step_whole(devices[0], 0.1) == 2.0
    assert held.step_whole(devices[0]) == 2.0
    assert [limit_s for limit_s, _ in asked[1:]] == [5.0 * session.steps_in_row(0.1), 5.0]
    counts = [*(args for _, each in asked for args in each.values())]
    assert counts[-2:] == [(session.steps_in_row(0.1),), (1,)]
    assert {*counts[:-2]} == {(session.steps_in_row(plan.predicted.step_s),)}
