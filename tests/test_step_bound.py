"""The bound on steps, against all splits."""

import dataclasses
import math
from unittest.mock import patch

import pytest
from hypothesis import assume, given, settings
from test_step_search import chain_of, splits, step_s, tasks

from shardwright.sharder.planning.planner import plan
from shardwright.sharder.planning.schedules import step_search
from shardwright.sharder.planning.schedules.step_bound import step_bound_s
from shardwright.sharder.planning.schedules.step_search import shortest_step


@settings(max_examples=20)
@given(tasks())
def test_no_split_has_a_shorter_step(problem):
    """Of any kind of problem, pins, memory and links aside."""
    steps = [step_s(problem, stages) for stages in splits(problem)]
    assume(steps)
    bound_s = step_bound_s(problem)
    assert bound_s is not None
    assert bound_s <= min(steps) * (1 + 1e-9)


@pytest.mark.parametrize(("speeds", "microbatches", "gap"), [((1, 1), 16, 0.03), ((1, 3), 16, 0.05), ((1, 1), 4, 0.08)])
def test_it_is_near_where_units_are_small(speeds, microbatches, gap):
    """On a chain of many equal units, to within what the bounds leave out: how waits and work alternate."""
    units = 200
    rows = [(tuple(1 / s for s in speeds), tuple(2 / s for s in speeds))] * units
    problem = chain_of(rows, microbatches=microbatches)
    half = units // 2
    found = shortest_step(problem, ((0, (1 << half) - 1), (1, (1 << units) - (1 << half))), train=True)
    shortest_s = step_s(problem, found.stages)
    assert shortest_s / (1 + gap) < step_bound_s(problem) <= shortest_s


def test_inference_is_bounded_by_the_longest_stage_and_the_way():
    """Two forwards of 1 s and 3 s on either device, four micro-batches: 4 s through and three times 3 s more; divided
    evenly it would be 4 s and three times 2 s."""
    problem = chain_of([((1.0, 1.0), (0.0, 0.0)), ((3.0, 3.0), (0.0, 0.0))], microbatches=4)
    assert step_s(problem, ((0, 1), (1, 2)), train=False) == 13
    assert 9 < step_bound_s(problem) <= 10


def test_the_engine_is_in_every_forward_and_backward():
    """Two equal halves, eight micro-batches: half a second more for each there and back, nine times."""
    for backward_s, ways in ((2.0, 2), (0.0, 1)):
        problem = chain_of([((1.0, 1.0), (backward_s, backward_s))] * 10, microbatches=8)
        engine = dataclasses.replace(problem, engine_s=(0.5, 0.5))
        assert step_bound_s(engine) - step_bound_s(problem) == pytest.approx(9 * ways * 0.5, rel=0.1)


def test_devices_in_too_many_rows_have_no_bound():
    """Seven devices that all differ."""
    speeds = range(1, 8)
    problem = chain_of([(tuple(1 / s for s in speeds), tuple(2 / s for s in speeds))] * 10, microbatches=8)
    assert step_bound_s(problem) is None


def test_a_plan_says_how_far_its_step_can_be_above_the_shortest(make_profile):
    """Thirty units side by side have too many closed sets for a proof, and a bound."""
    wide = {f"u{i}": ["x"] for i in range(30)}
    found = plan(make_profile(wide), microbatches=4, time_limit_s=1.0)
    assert 0 < found.certificate.step_gap_percent < 10
    interleaved = plan(make_profile(wide), microbatches=4, schedule="interleaved", time_limit_s=1.0)
    assert interleaved.certificate.step_gap_percent is None
    assert math.isfinite(interleaved.predicted.step_s)


def test_under_zero_bubble_loads_say_nothing_of_the_step(chain_profile):
    """A backward in two parts may take less than the whole, of which loads are: what is said of the step is true."""
    profile = chain_profile(
        6, forward_s={f"u{i}": 1.0 + i % 3 for i in range(6)}, speed=dict.fromkeys(("a", "b", "c"), 1.0)
    )
    parts = tuple(
        m.model_copy(update={"backward_input_s": m.backward_s / 4, "backward_weight_s": m.backward_s / 4})
        for m in profile.measurements
    )
    with patch.object(step_search, "MOST_CUTS", 0):
        found = plan(profile.model_copy(update={"measurements": parts}), microbatches=4, schedule="zero-bubble")
    assert found.certificate.step_gap_percent > 0


def test_what_is_computed_anew_counts_twice():
    """Where every stage is."""
    rows = [((1.0, 1.0), (2.0, 2.0))] * 6
    kept = chain_of(rows, microbatches=8)
    always = dataclasses.replace(kept, recompute="always")
    assert step_bound_s(always) > 1.25 * step_bound_s(kept)
    assert step_bound_s(dataclasses.replace(kept, recompute="auto")) == step_bound_s(kept)
