"""Accounts of steps: the parts add up to the step, waits are cut where a transfer begins, differences are explained."""

import itertools
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardwright.profiler.formats.costs import Costs
from shardwright.sharder.planning.planner import plan
from shardwright.sharder.planning.schedules.foreseen import costs_of, timeline_of
from shardwright.sharder.planning.schedules.simulate import StageCost, simulate
from shardwright.sharder.runtime.accounts import (
    Mark,
    Noted,
    account,
    accounts_of,
    measured_costs,
    measured_slots,
    off,
    predicted_slots,
)

COSTS = Path(__file__).parents[1] / "examples" / "costs.json"
SECONDS = st.floats(0, 10, allow_subnormal=False)
COMPUTE = ("forward", "loss", "backward", "update")
TRANSFERS = ("send activations", "receive activations", "send gradients", "receive gradients", "tie")


@pytest.fixture(scope="module")
def a_plan():
    """A plan of several stages whose devices' speeds do not vary."""
    made = plan(Costs.load(COSTS).profile())
    assert len(made.stages) > 1
    return made


@st.composite
def notes(draw, origin=1e4):
    """What one stage noted: marks one after the other, with posts anywhere."""
    at = start = origin + draw(SECONDS)
    marks, posts = [], []
    for what in draw(st.lists(st.sampled_from(COMPUTE + TRANSFERS), max_size=8)):
        number = None if what in ("update", "tie") else draw(st.integers(0, 2))
        begin = at + draw(SECONDS)
        at = begin + draw(SECONDS)
        marks.append(Mark(what, number, begin, at))
        if what in TRANSFERS:
            posted = origin + draw(SECONDS)
            posts.append(Mark(what, number, posted, posted))
    return Noted(start, at + draw(SECONDS), tuple(marks), tuple(posts))


@given(st.lists(notes(), min_size=1, max_size=4))
def test_the_parts_of_each_stage_add_up_to_the_step(noted):
    """Whatever was noted; and no slot overlaps another of its stage, or computes less than its mark."""
    step_s, slots = measured_slots(noted)
    for stage, each in enumerate(noted):
        own = [slot for slot in slots if slot.stage == stage]
        found = account(own, step_s)
        assert found.step_s == pytest.approx(step_s)
        compute_s = sum(mark.end_s - mark.start_s for mark in each.marks if mark.what in COMPUTE)
        assert found.compute_s == pytest.approx(compute_s, abs=1e-8)
        assert all(before.end_s <= after.start_s for before, after in itertools.pairwise(own))
        assert not own or (own[0].start_s >= 0 and own[-1].end_s <= step_s)


def test_a_wait_is_cut_where_both_ends_have_come():
    """The receiver waits 3 s for the sender's compute and 1 s for the link; the sender, who came last, for nobody."""
    sender = Noted(
        100.0,
        106.0,
        (Mark("forward", 0, 100.0, 104.0), Mark("send activations", 0, 104.0, 105.0)),
        (Mark("send activations", 0, 104.0, 104.0),),
    )
    receiver = Noted(
        101.0,
        107.0,
        (Mark("receive activations", 0, 101.0, 105.0), Mark("forward", 0, 105.0, 107.0)),
        (Mark("receive activations", 0, 101.0, 101.0),),
    )
    step_s, slots = measured_slots([sender, receiver])
    assert step_s == 7.0
    assert [(s.stage, s.what, s.microbatch, s.start_s, s.end_s) for s in slots] == [
        (0, "forward", 0, 0.0, 4.0),
        (0, "send activations", 0, 4.0, 5.0),
        (0, "wait", None, 6.0, 7.0),
        (1, "wait", None, 0.0, 1.0),
        (1, "wait", 0, 1.0, 4.0),
        (1, "receive activations", 0, 4.0, 5.0),
        (1, "forward", 0, 5.0, 7.0),
    ]
    first, second = (account([s for s in slots if s.stage == stage], step_s) for stage in (0, 1))
    assert (first.forward_s, first.transfer_s, first.bubble_s, first.other_s) == (4.0, 1.0, 1.0, 1.0)
    assert (second.forward_s, second.transfer_s, second.bubble_s, second.other_s) == (2.0, 1.0, 4.0, 0.0)


def test_replicas_wait_for_each_other_at_the_sum_of_gradients_alone():
    """The first replica waits for the second to come to the sum; messages of one are none of the other's."""
    marks = [(Mark("send activations", 0, 0.0, 1.0), Mark("sum", None, 1.0, 4.0)), (Mark("sum", None, 3.0, 4.0),)]
    posts = [
        (Mark("send activations", 0, 0.0, 0.0), Mark("sum", None, 1.0, 1.0)),
        (Mark("receive activations", 0, 0.5, 0.5), Mark("sum", None, 3.0, 3.0)),
    ]
    noted = [Noted(0.0, 4.0, m, p) for m, p in zip(marks, posts, strict=True)]
    _, slots = measured_slots(noted, 1)
    assert [(s.replica, s.what, s.start_s, s.end_s) for s in slots] == [
        (0, "send activations", 0.0, 1.0),
        (0, "wait", 1.0, 3.0),
        (0, "sum", 3.0, 4.0),
        (1, "sum", 3.0, 4.0),
    ]


def test_gradients_go_the_other_way():
    """A gradient that stage 1 sends is the one that stage 0 receives, not another of the same micro-batch."""
    posts = [Mark("receive gradients", 0, 0.0, 0.0)], [Mark("send gradients", 0, 2.0, 2.0)]
    marks = [Mark("receive gradients", 0, 0.0, 3.0)], [Mark("send gradients", 0, 2.0, 3.0)]
    noted = [Noted(0.0, 3.0, tuple(m), tuple(p)) for m, p in zip(marks, posts, strict=True)]
    _, slots = measured_slots(noted)
    assert [(s.what, s.start_s, s.end_s) for s in slots if s.stage == 0] == [
        ("wait", 0.0, 2.0),
        ("receive gradients", 2.0, 3.0),
    ]


def test_each_tie_is_awaited_by_its_own_devices():
    """The tie of stages 0 and 1 does not wait for stage 2, which comes to a tie with stage 0 seconds later."""
    both, later = Mark("tie", 0, 1.0, 2.0), Mark("tie", 1, 2.0, 5.0)
    posts = [each._replace(end_s=each.start_s) for each in (both, later)]
    last = Mark("tie", 1, 4.0, 5.0)
    noted = [
        Noted(0.0, 5.0, (both, later), tuple(posts)),
        Noted(0.0, 5.0, (both,), (posts[0],)),
        Noted(0.0, 5.0, (last,), (last._replace(end_s=4.0),)),
    ]
    _, slots = measured_slots(noted)
    assert [(s.what, s.microbatch, s.start_s, s.end_s) for s in slots if s.stage == 0] == [
        ("tie", None, 1.0, 2.0),
        ("wait", None, 2.0, 4.0),
        ("tie", None, 4.0, 5.0),
    ]
    assert next((s.what, s.start_s, s.end_s) for s in slots if s.stage == 1) == ("tie", 1.0, 2.0)


@given(
    st.lists(st.builds(StageCost, *[SECONDS] * 6), min_size=1, max_size=4),
    st.integers(1, 6),
    st.sampled_from(["1f1b", "gpipe"]),
    st.booleans(),
    st.booleans(),
)
def test_a_predicted_account_is_the_simulations(costs, microbatches, schedule, train, serial):
    """Its parts add up to the simulated step, and what is no bubble is what the simulation calls busy."""
    transfers = "serial" if serial else "overlapped"
    timeline = simulate(costs, microbatches, schedule=schedule, train=train, transfers=transfers)
    slots = predicted_slots(timeline, costs, serial=serial)
    for stage, busy_s in enumerate(timeline.busy_s):
        found = account((slot for slot in slots if slot.stage == stage), timeline.step_s)
        assert found.step_s == pytest.approx(timeline.step_s)
        assert found.compute_s + found.transfer_s == pytest.approx(busy_s, abs=1e-6)
        assert found.other_s == pytest.approx(0.0, abs=1e-6)


def test_a_plan_foresees_its_step_without_the_profile(a_plan):
    """The plan's own numbers give the step that the planner simulated."""
    assert timeline_of(a_plan).step_s == pytest.approx(a_plan.predicted.step_s)


def steady(plan, costs):
    """What would be noted if every micro-batch took exactly ``costs``; what a stage waits for is noted as such."""
    timeline = timeline_of(plan, costs)
    slots = predicted_slots(timeline, costs, serial=True)
    return [
        Noted(
            5.0,
            5.0 + timeline.step_s,
            tuple(Mark(s.what, s.microbatch, 5.0 + s.start_s, 5.0 + s.end_s) for s in slots if s.stage == stage),
            (),
        )
        for stage in range(len(costs))
    ]


def test_a_step_as_foreseen_is_off_by_nothing(a_plan):
    """Predicted and measured accounts are equal, and no part of the difference is more than rounding."""
    found = accounts_of(a_plan, [steady(a_plan, costs_of(a_plan))])
    for stage in found.stages:
        for field in ("forward_s", "backward_s", "update_s", "transfer_s"):
            assert getattr(stage.measured, field) == pytest.approx(getattr(stage.predicted, field), abs=1e-9)
    assert all(abs(each.step_s) < 1e-9 for each in found.off)


def test_one_wrong_cost_is_named_and_explains_all(a_plan):
    """A backward that takes twice as long on one stage is what the prediction was off by."""
    costs = list(costs_of(a_plan))
    costs[1] = StageCost(**{**vars(costs[1]), "backward_s": 2 * costs[1].backward_s})
    found = accounts_of(a_plan, [steady(a_plan, costs)])
    worst, *others = found.off
    assert (worst.what, worst.devices) == ("backward", (a_plan.devices[1],))
    assert worst.measured_s == pytest.approx(2 * worst.predicted_s)
    assert worst.step_s == pytest.approx(found.measured_s - found.predicted_s)
    assert worst.step_s > 0
    assert all(abs(each.step_s) < 1e-9 for each in others)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_what_was_off_adds_up_to_the_difference(a_plan, data):
    """Of any measured costs and any measured step."""
    stages = len(a_plan.stages)
    measured = [data.draw(st.builds(StageCost, *[SECONDS] * 6)) for _ in range(stages)]
    step_s = data.draw(SECONDS)
    parts = off(a_plan, measured, step_s)
    assert sum(part.step_s for part in parts) == pytest.approx(step_s - a_plan.predicted.step_s, abs=1e-6)
    sizes = [abs(part.step_s) for part in parts]
    assert sizes == sorted(sizes, reverse=True)


def test_an_engine_that_was_not_foreseen_is_named(a_plan):
    """What no slot covers is the engine's; it explains the difference where a plan says that there is none."""
    costs = [StageCost(**{**vars(cost), "engine_s": 1e-3}) for cost in costs_of(a_plan)]
    found = accounts_of(a_plan, [steady(a_plan, costs)])
    operations = 2 * a_plan.microbatches
    for stage in found.stages:
        assert (stage.predicted.other_s, stage.measured.other_s) == (0.0, pytest.approx(1e-3 * operations))
    engine = [each for each in found.off if each.what == "engine"]
    assert [each.measured_s for each in engine] == pytest.approx([2e-3] * len(costs))
    assert sum(each.step_s for each in engine) == pytest.approx(found.measured_s - found.predicted_s)


def test_a_foreseen_engine_is_off_by_nothing(a_plan):
    """Where the plan has it, it is in the account that was foreseen, and nothing is to be explained."""
    stages = tuple(stage.model_copy(update={"engine_s": 1e-3}) for stage in a_plan.stages)
    slower = a_plan.model_copy(update={"stages": stages})
    step_s = timeline_of(slower).step_s
    slower = slower.model_copy(update={"predicted": a_plan.predicted.model_copy(update={"step_s": step_s})})
    found = accounts_of(slower, [steady(slower, costs_of(slower))])
    for stage in found.stages:
        assert stage.predicted.other_s == pytest.approx(1e-3 * 2 * slower.microbatches)
        assert stage.measured.other_s == pytest.approx(stage.predicted.other_s)
    assert all(abs(each.step_s) < 1e-9 for each in found.off)


def test_the_step_of_median_length_is_shown(a_plan):
    """Of three noted steps the middle one; all lengths are kept."""
    costs = costs_of(a_plan)
    once, twice, thrice = (
        steady(a_plan, [StageCost(**{**vars(c), "forward_s": n * c.forward_s}) for c in costs]) for n in (1, 2, 3)
    )
    found = accounts_of(a_plan, [thrice, once, twice])
    assert found.measured_s == sorted(found.noted_s)[1] == found.noted_s[2]
    measured = measured_costs(found.measured, a_plan, found.measured_s)
    assert [c.forward_s for c in measured] == pytest.approx([2 * c.forward_s for c in costs])
