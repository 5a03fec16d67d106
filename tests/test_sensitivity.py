"""How the plan moves within the uncertainty of the profile: against closed forms and the planner itself."""

import json

import pytest

from shardwright.profiler.profile import Estimate
from shardwright.sharder.planning.plan import Plan
from shardwright.sharder.planning.planner import plan


def unsure(profile, error, *, source="measured", **changes):
    """The profile with medians that are known to one part in ``1 / error``."""
    rows = (m.model_copy(update={"median_error": error, "source": source}) for m in profile.measurements)
    return profile.model_copy(update={"measurements": tuple(rows), **changes})


def test_nothing_is_said_of_costs_that_do_not_say_how_sure_they_are(chain_profile):
    """Costs by hand have no uncertainty."""
    assert plan(chain_profile(4)).sensitivity is None


@pytest.mark.parametrize("error", [0.01, 0.05, 0.2])
def test_the_step_moves_as_far_as_its_times(chain_profile, error):
    """All units share one measurement: the step moves with it, 5% to 95% of a normal distribution are 3.29 sd apart."""
    result = plan(unsure(chain_profile(4), error), microbatches=1)
    found = result.sensitivity
    width = 3.29 * error / 1.96
    assert (found.step_high_s - found.step_low_s) / result.predicted.step_s == pytest.approx(width, rel=0.25)
    assert found.step_low_s < result.predicted.step_s < found.step_high_s


def test_measurements_of_their_own_even_out(chain_profile):
    """Sixteen units with a measurement each leave the sum four times as sure as one."""
    shared = plan(unsure(chain_profile(16, forward_s=1.0), 0.1), microbatches=1).sensitivity
    apart = {f"u{i}": 1.0 + 1e-6 * i for i in range(16)}
    own = plan(unsure(chain_profile(16, forward_s=apart), 0.1), microbatches=1).sensitivity
    ratio = (shared.step_high_s - shared.step_low_s) / (own.step_high_s - own.step_low_s)
    assert 2.0 < ratio < 8.0


def test_a_plan_that_is_best_by_far_is_surely_best(chain_profile):
    """Two devices halve the step; medians are known to 2%."""
    found = plan(unsure(chain_profile(8), 0.02)).sensitivity
    assert found.faster_share == 1.0
    assert found.rival


def test_a_plan_that_is_best_by_a_hair_is_not(chain_profile):
    """Numbers of micro-batches within a thousandth of each other, medians known to 20%."""
    profile = chain_profile(8, microbatches=(4, 8), overhead_s=0.05)
    found = plan(unsure(profile, 0.2)).sensitivity
    assert 0.2 < found.faster_share < 0.9
    assert "micro-batches" in found.rival


def test_what_estimates_were_off_by_counts(chain_profile):
    """An estimated device has the error of its fit, whatever the rows say."""
    profile = chain_profile(4)
    estimates = tuple(
        Estimate(device=d, compute_efficiency=1, memory_efficiency=1, operation_s=0, median_error=0.3)
        for d in ("cpu:0", "cpu:1")
    )
    assert plan(unsure(profile, None, source="estimated")).sensitivity is None
    found = plan(unsure(profile, None, source="estimated", estimates=estimates)).sensitivity
    assert found.step_high_s > 1.3 * found.step_low_s


def test_planning_anew_finds_other_splits_where_units_are_unsure(chain_profile):
    """Sure times leave the split as it is; very unsure ones move it, and what was lost is a share of the load."""
    times = {f"u{i}": 1.0 + 0.01 * i for i in range(12)}
    sure = plan(unsure(chain_profile(12, forward_s=times), 1e-4), replans=8).sensitivity.replans
    assert (sure.planned, sure.others) == (8, 0)
    assert sure.most_lost_percent == pytest.approx(0, abs=0.1)
    vague = plan(unsure(chain_profile(12, forward_s=times), 0.6), replans=8).sensitivity.replans
    assert vague.planned == 8
    assert 0 < vague.others <= 8
    assert 0 < vague.most_lost_percent < 100


def test_the_draws_are_the_same_every_time(chain_profile):
    """So is the plan, and it survives its file."""
    profile = unsure(chain_profile(8, microbatches=(1, 4)), 0.1)
    once = plan(profile, replans=3)
    assert once == plan(profile, replans=3)
    assert Plan.parse(json.dumps(json.loads(once.model_dump_json())), source="plan.json") == once
