"""How the plan moves within the uncertainty of the profile: against closed forms and the planner itself."""

import io
import json

import pytest
from rich.console import Console

from shardwright.profiler.profile import Estimate
from shardwright.reports.plan_report import PlanReport
from shardwright.sharder.planning.plan import Plan
from shardwright.sharder.planning.planner import plan


def unsure(profile, error, *, source="measured", **changes):
    """The profile with medians that are known to one part in ``1 / error``."""
    rows = (m.model_copy(update={"median_error": error, "source": source}) for m in profile.measurements)
    return profile.model_copy(update={"measurements": tuple(rows), **changes})


def text_of(result):
    """The plan's report, as a wide console would show it."""
    stream = io.StringIO()
    Console(file=stream, width=200).print(PlanReport(result))
    return stream.getvalue()


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
    """Two devices halve the step; medians are known to 2%. Data parallel sums for long."""
    profile = chain_profile(8, microbatches=(1, 4), param_bytes=10**10, memory_bytes=10**13)
    found = plan(unsure(profile, 0.02)).sensitivity
    assert found.faster_share == 1.0
    assert "alone" in found.rival


@pytest.mark.parametrize(("param_bytes", "said"), [(2 * 10**8, "Best only by noise"), (10**8, "Not the fastest")])
def test_data_parallel_is_a_rival(chain_profile, param_bytes, said):
    """It has nothing to fill and drain, but sums; how sure the plan beats it is said."""
    result = plan(unsure(chain_profile(8, microbatches=(1, 2, 8), param_bytes=param_bytes, memory_bytes=10**12), 0.2))
    found = result.sensitivity
    parallel = next(one for one in result.alternatives if one.name == "data parallel")
    assert (found.rival, found.rival_step_s) == ("data parallel over 2 devices", parallel.step_s)
    assert 0.2 < found.faster_share < 0.9
    assert f"{said}: with costs drawn within their uncertainty, data parallel over 2 devices" in text_of(result)


def test_the_sums_of_data_parallel_are_not_drawn(chain_profile):
    """Of 4.5 s each, the split computes 4.5 and data parallel 3: one wins when units are faster, the other if not."""
    profile = chain_profile(2, microbatches=(2,), param_bytes=3 * 10**9 // 4, memory_bytes=10**12)
    result = plan(unsure(profile, 0.1))
    found = result.sensitivity
    assert found.rival == "data parallel over 2 devices"
    assert found.rival_step_s == pytest.approx(result.predicted.step_s, rel=1e-5)
    assert found.faster_share == pytest.approx(0.5, abs=0.15)


def test_a_time_from_a_device_of_the_same_model_is_as_sure_as_there(chain_profile):
    """Both stages move with one measurement, and with them the step."""
    profile = unsure(chain_profile(8, microbatches=(8,)), 0.1)
    twin = [m.model_copy(update={"source": "scaled"}) if m.device == "cpu:1" else m for m in profile.measurements]
    result = plan(profile.model_copy(update={"measurements": tuple(twin)}))
    assert len(result.stages) == 2
    found = result.sensitivity
    width = 3.29 * 0.1 / 1.96
    assert (found.step_high_s - found.step_low_s) / result.predicted.step_s == pytest.approx(width, rel=0.25)


def test_an_estimate_is_not_as_sure_as_a_measurement_of_the_same_length(chain_profile):
    """Of two units that take as long, the estimated one moves the step."""
    profile = unsure(chain_profile(2), 0.001)
    rows = [
        m.model_copy(update={"source": "estimated", "median_error": None}) if m.node == "u1" else m
        for m in profile.measurements
    ]
    estimates = (Estimate(device="cpu:0", compute_efficiency=1, memory_efficiency=1, operation_s=0, median_error=0.1),)
    unlike = profile.model_copy(update={"measurements": tuple(rows), "estimates": estimates})
    result = plan(unlike, microbatches=1, devices=["cpu:0"])
    width = 3.29 * 0.1 / 0.6745 / 2
    found = result.sensitivity
    assert (found.step_high_s - found.step_low_s) / result.predicted.step_s == pytest.approx(width, rel=0.25)


def test_only_compute_is_drawn_where_weights_are_brought(chain_profile):
    """Three of eight units wait ten seconds for their weights, whatever the draw."""
    speed = {"cuda:0": 1.0, "cuda:1": 1.0}
    profile = chain_profile(8, train=False, speed=speed, memory_bytes=3_400, param_bytes=1_000, tensor_bytes=8)
    devices = tuple(device.model_copy(update={"fetch_bytes_per_s": 100.0}) for device in profile.devices)
    result = plan(unsure(profile, 0.1, devices=devices, host_bytes=10**6), microbatches=1)
    assert len(result.offloaded) == 3
    assert result.predicted.step_s == pytest.approx(8 + 3 * 10)
    found = result.sensitivity
    assert found.step_high_s - found.step_low_s == pytest.approx(8 * 3.29 * 0.1 / 1.96, rel=0.25)


def test_a_plan_that_is_best_by_a_hair_is_not(chain_profile):
    """Numbers of micro-batches within a thousandth of each other, medians known to 20%."""
    profile = chain_profile(8, microbatches=(4, 8), overhead_s=0.05, param_bytes=10**10, memory_bytes=10**13)
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
