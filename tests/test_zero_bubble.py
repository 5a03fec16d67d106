"""Zero-bubble planned: its memory against its operations, its split against brute force, and the plan that says why."""

from __future__ import annotations

import dataclasses
import json
import math
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_partition import brute_force
from test_partition import problems as chains_and_graphs
from test_reports import text_of

from shardwright.errors import ShardwrightError
from shardwright.reports.plan_report import PlanReport, verdict
from shardwright.sharder.planning.formulation.memory import Walk
from shardwright.sharder.planning.partition import partition
from shardwright.sharder.planning.plan import Plan
from shardwright.sharder.planning.planner import plan
from shardwright.sharder.planning.schedules.foreseen import at_pace, costs_of, timeline_of
from shardwright.sharder.planning.schedules.schedule import operations
from shardwright.sharder.planning.schedules.zero_bubble import divides, held_at_most, peak_bytes
from shardwright.sharder.planning.schedules.zero_bubble_options import as_zero_bubble

FOUR = dict.fromkeys(("cpu:0", "cpu:1", "cpu:2", "cpu:3"), 1.0)


def in_parts(profile, weights=0.5, more=0.0):
    """``profile`` with backwards in two parts: of each so much is of the weights, and both take so much more."""
    return profile.model_copy(
        update={
            "measurements": tuple(
                m.model_copy(
                    update={
                        "backward_input_s": (1 - weights) * (1 + more) * m.backward_s,
                        "backward_weight_s": weights * (1 + more) * m.backward_s,
                    }
                )
                for m in profile.measurements
            )
        }
    )


sizes = st.integers(0, 50)
walks = st.builds(
    lambda kept, forward, backward, first, gradients, sent, deferred, parted: Walk(
        kept, kept + forward, kept + backward, 0, 0, kept + backward + first, gradients, sent, deferred, kept + parted
    ),
    *[sizes] * 8,
)


def held_by_operations(one, stages, position, microbatches, gradients, relayed):
    """The most at once, each micro-batch followed by itself; and how many are in flight at most."""
    state, most, in_flight = {}, 0, 0
    for kind, _, m in operations("zero-bubble", position, stages, microbatches):
        made = "W" in state.values() or kind == "W"
        now = 0 if made else -one.gradients
        for other, done in state.items():
            if other != m:
                now += one.kept if done in "FB" else 0
                now += one.deferred if done == "B" and position else 0
                now += one.sent if done == "W" and position < stages - 1 else 0
            now += gradients if done in "BW" else 0
        if kind == "F":
            now += one.forward
        elif position:
            now += relayed + one.parted
        elif kind == "B":
            now += one.kept
        else:
            now += one.backward if "W" in state.values() else one.first - one.gradients
        state[m] = kind
        most = max(most, now)
        in_flight = max(in_flight, sum(done != "W" for done in state.values()) + (kind == "W"))
    return most, in_flight


@given(walks, st.integers(2, 5), st.data(), st.integers(1, 9), sizes)
def test_a_stage_holds_what_its_operations_hold(one, stages, data, microbatches, relayed):
    """At every position: nothing of the first stage is deferred, and nothing sent by the last one stays."""
    position = data.draw(st.integers(0, stages - 1))
    gradients = relayed + data.draw(sizes) if position else 0
    relayed = relayed if position else 0
    most, in_flight = held_by_operations(one, stages, position, microbatches, gradients, relayed)
    where = {"stages": stages, "position": position, "microbatches": microbatches}
    assert peak_bytes(one, **where, gradients=gradients, relayed=relayed) == most
    assert held_at_most(stages, position, microbatches) == in_flight == min(stages, microbatches)


@settings(max_examples=60, deadline=None)
@given(chains_and_graphs())
def test_the_split_is_that_of_brute_force(problem):
    """With its memory, wherever caps bind: the search knows the schedule."""
    problem = as_zero_bubble(dataclasses.replace(problem, schedule="1f1b", transfers="relayed", overlap=False))
    best, found = brute_force(problem), partition(problem)
    if found is None:
        assert math.isinf(best)
    else:
        assert found.exact
        assert found.value_s == pytest.approx(best)


def test_the_memory_of_any_number_of_stages_before_is_enough(chain_profile):
    """What the search counts is no less than what the plan reports of each stage."""
    result = plan(in_parts(chain_profile(8, speed=FOUR)), microbatches=4, schedule="zero-bubble")
    assert [stage.in_flight for stage in result.stages] == [4] * 4
    plain = plan(chain_profile(8, speed=FOUR), microbatches=4)
    assert all(one.memory_bytes >= other.memory_bytes for one, other in zip(result.stages, plain.stages, strict=True))


def test_a_split_that_memory_forces_is_not_said_to_be_proven(chain_profile):
    """Another number of stages, each of which holds less, might fit with smaller loads: the bound is that of room for
    all."""
    profile = in_parts(chain_profile(8, speed=FOUR))
    roomy = plan(profile, microbatches=4, schedule="zero-bubble")
    assert roomy.certificate.exact
    least = min(stage.memory_bytes for stage in roomy.stages)
    small = dict.fromkeys(("cpu:0", "cpu:1"), f"{least - 1}B")
    tight = plan(profile, microbatches=4, schedule="zero-bubble", memory=small)
    assert tight.certificate.value_s > roomy.certificate.value_s
    assert not tight.certificate.exact
    assert tight.certificate.bound_s == pytest.approx(roomy.certificate.value_s)


def test_the_plan_says_why(chain_profile):
    """A smaller bubble for the same loads: the record agrees with its own simulation, and 1F1B is named beside it."""
    profile = in_parts(chain_profile(8, speed=FOUR))
    result, plain = plan(profile, microbatches=4, schedule="zero-bubble"), plan(profile, microbatches=4)
    assert (result.schedule, result.stages_per_device, len(result.stages)) == ("zero-bubble", 1, 4)
    first, *others = result.stages
    assert (first.backward_input_s, first.backward_weight_s) == (0.0, first.backward_s)
    assert all(stage.backward_input_s == stage.backward_weight_s == stage.backward_s / 2 for stage in others)
    assert timeline_of(result).step_s == pytest.approx(result.predicted.step_s)
    assert max(timeline_of(result).busy_s) == pytest.approx(result.certificate.value_s)
    assert result.certificate.value_s == plain.certificate.value_s
    assert (result.certificate.exact, result.certificate.gap_percent) == (True, 0.0)
    other = result.other_schedule
    assert other is not None
    assert (other.schedule, other.step_s) == ("1f1b", plain.predicted.step_s)
    assert result.predicted.step_s < other.step_s
    assert result.predicted.bubble < other.bubble
    assert [(c.zero_bubble, c.chosen) for c in result.candidates] == [(False, False), (True, True)]
    assert re.search(r"with zero-bubble and .* with 1F1B: a bubble of \S+% instead of \S+%", verdict(result).text)
    text = " ".join(text_of(PlanReport(result), 100).split())
    assert "load of a whole step, zero-bubble" in text
    assert "of weights" in text
    slower = at_pace(result, dict.fromkeys(result.devices, 2.0))
    assert 1.9 * result.predicted.step_s < slower <= 2 * result.predicted.step_s


def test_a_step_of_even_stages_is_that_of_the_paper(chain_profile):
    """Where F, B and W take as long, filling and draining leave (D - 1) (F + B - W): a third of 1F1B's (ZB-H1)."""
    profile = in_parts(chain_profile(8, speed=FOUR, tensor_bytes=0))
    links = tuple(link.model_copy(update={"latency_s": 0.0}) for link in profile.links)
    profile = profile.model_copy(update={"links": links})
    result, plain = (plan(profile, microbatches=4, schedule=s) for s in ("zero-bubble", "1f1b"))
    one = result.stages[1].forward_s
    assert plain.predicted.step_s == pytest.approx((4 + 3) * 3 * one)
    # The first stage has its whole backward with the weights, which nobody waits for.
    assert result.predicted.step_s == pytest.approx(4 * 3 * one + 3 * one)


@pytest.mark.parametrize(("more", "schedule"), [(0.0, "zero-bubble"), (1.0, "1f1b")])
def test_auto_takes_what_is_faster(chain_profile, more, schedule):
    """Backwards that take much longer in two parts are not divided."""
    profile = in_parts(chain_profile(5, speed=FOUR), more=more)
    result = plan(profile, microbatches=4, schedule="auto")
    assert result.schedule == schedule
    assert result.other_schedule is not None
    assert result.predicted.step_s <= result.other_schedule.step_s
    assert costs_of(result)


def test_auto_knows_no_parts_where_there_are_none(chain_profile):
    """An older profile is weighed without them; asked for, they are missed in one line with the remedy."""
    profile = chain_profile(5, speed=FOUR)
    assert not any(c.zero_bubble for c in plan(profile, microbatches=4, schedule="auto").candidates)
    with pytest.raises(ShardwrightError, match=r"lacks those of net.u0: profile again with --split-backward") as error:
        plan(profile.model_copy(update={"structure": "x"}), microbatches=4, schedule="zero-bubble")
    assert "\n" not in str(error.value)
    with pytest.raises(ShardwrightError, match=r"give each unit backward_input_s and backward_weight_s"):
        plan(profile.model_copy(update={"structure": ""}), microbatches=4, schedule="zero-bubble")


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"stages_per_device": 2}, "zero-bubble has one stage a device, not 2"),
        ({"objective": "latency"}, "does not go with the objective latency"),
        ({"contiguous": False}, "does not go with a free assignment"),
        ({"transfers": "staged"}, "does not go with staged transfers"),
        ({"recompute": "always"}, "does not go with stages that are computed anew"),
        ({"replicas": 2}, "does not go with 2 replicas"),
        ({"microbatches": 1}, "into two stages or more under zero-bubble was found to fit"),
    ],
)
def test_what_cannot_be_is_refused_in_words(chain_profile, asked, words):
    """One line each."""
    profile = in_parts(chain_profile(8, speed=FOUR))
    with pytest.raises(ShardwrightError, match=words) as error:
        plan(profile, **{"microbatches": 4, "schedule": "zero-bubble"} | asked)
    assert "\n" not in str(error.value)


def test_inference_has_no_backward_to_divide(chain_profile):
    """It is refused by name; auto goes without."""
    profile = chain_profile(8, train=False)
    with pytest.raises(ShardwrightError, match="does not go with inference, which has no backward"):
        plan(profile, schedule="zero-bubble")
    assert plan(profile, schedule="auto", microbatches=4).schedule != "zero-bubble"


def test_micro_batches_that_no_round_divides(chain_profile):
    """PyTorch's engine takes equal rounds only: 5 are not two of them, and that is said."""
    assert [m for m in range(1, 9) if divides(2, m)] == [1, 2, 3, 4, 6, 8]
    profile = in_parts(chain_profile(8, microbatches=(1, 4, 5)))
    with pytest.raises(ShardwrightError, match="5 micro-batches cannot go through 2 stages in equal rounds"):
        plan(profile, microbatches=5, schedule="zero-bubble")
    found = plan(profile, schedule="zero-bubble").candidates
    assert {c.microbatches for c in found if c.zero_bubble} == {4}


def test_memory_that_is_enough_for_1f1b_alone(chain_profile):
    """Where caps leave no room for what waits for its weights, zero-bubble is refused and 1F1B planned."""
    profile = in_parts(chain_profile(4, speed=FOUR, saved_bytes=10**8, param_bytes=10, memory_bytes=10**9))
    roomy = plan(profile, microbatches=4, schedule="zero-bubble")
    plain = plan(profile, microbatches=4)
    caps = {stage.device: stage.memory_bytes for stage in plain.stages}
    assert any(stage.memory_bytes > caps[stage.device] for stage in roomy.stages)
    assert plan(profile, microbatches=4, memory=caps, schedule="auto").schedule == "1f1b"
    with pytest.raises(ShardwrightError, match="ask for --schedule 1f1b, which holds fewer"):
        plan(profile, microbatches=4, memory=caps, schedule="zero-bubble", recompute="never")


def test_a_plan_survives_its_file(chain_profile, tmp_path):
    """JSON and back: equal; a file of before backwards had parts has none."""
    result = plan(in_parts(chain_profile(8)), microbatches=4, schedule="zero-bubble")
    result.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == result
    old = json.loads(plan(chain_profile(8), microbatches=4).model_dump_json())
    for stage in old["stages"]:
        del stage["backward_input_s"], stage["backward_weight_s"]
    assert Plan.model_validate(old).stages[0].backward_weight_s is None
