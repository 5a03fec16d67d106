"""Alternatives: what one would do without a planner, against the same simulator."""

import dataclasses
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

import shardwright as sw
from shardwright.profiler.graph import costs_at
from shardwright.reports.plan_report import verdict
from shardwright.sharder.planning.exact.even import NAIVE, cut_evenly
from shardwright.sharder.planning.formulation.blocks import problem_from_graph
from shardwright.sharder.planning.formulation.relaxed import unpinned
from shardwright.sharder.planning.plan import WORTHWHILE
from shardwright.sharder.planning.planner import plan
from shardwright.sharder.planning.problem import Block, Problem
from shardwright.sharder.planning.verdict import alternatives
from shardwright.sharder.planning.verdict.alternatives import data_parallel_s


def problem_of(work, *, links=(0.0, math.inf), microbatches=2):
    """Blocks with a forward of so many seconds on each of as many devices as the first has numbers."""
    devices = len(work[0])
    blocks = tuple(
        Block((f"u{i}",), tuple(each), (0.0,) * devices, (0.0,) * devices, 0, (f"u{i}",), (True,) * devices)
        for i, each in enumerate(work)
    )
    before = tuple((1 << i) - 1 for i in range(len(work)))
    names = tuple(f"d{i}" for i in range(devices))
    rows = tuple(tuple(links for _ in names) for _ in names)
    return Problem(blocks, before, (), names, (10**9,) * devices, rows, microbatches)


@pytest.mark.parametrize(
    ("weights", "parts", "ends"),
    [([1, 1, 1, 1], 2, [2, 4]), ([4, 1, 1, 4], 2, [2, 4]), ([9, 1, 1], 3, [1, 2, 3]), ([0, 0, 0], 2, [1, 3])],
)
def test_equal_shares_end_where_the_sum_is_nearest(weights, parts, ends):
    """In the order of the items, and every part has one."""
    assert cut_evenly(weights, parts) == ends


@given(st.lists(st.integers(0, 9), min_size=1, max_size=12), st.integers(1, 12))
def test_every_part_has_an_item(weights, parts):
    """Whatever the weights are."""
    ends = cut_evenly(weights, min(parts, len(weights)))
    assert ends[-1] == len(weights)
    assert all(end > start for start, end in zip([0, *ends], ends, strict=False))


def test_data_parallel_waits_for_the_slowest_and_sums_the_gradients():
    """max(2 + 1, 4 + 2) s of work; a ring of two sends half the gradient twice: 2 * (0.5 + 100 / (2 * 10)) s."""
    problem = problem_of([(2.0, 4.0), (1.0, 2.0)], links=(0.5, 10.0))
    assert data_parallel_s(problem, 100, [(), ()]) == 6.0 + 2 * (0.5 + 5.0)
    assert data_parallel_s(problem, 0, [(), ()]) == 6.0


def test_the_device_with_most_microbatches_is_waited_for():
    """Five over two devices: three times 1 s of forward on the first, 2 s on the second; and the sum."""
    problem = problem_of([(1.0, 2.0)], links=(0.5, 10.0), microbatches=5)
    assert data_parallel_s(problem, 100, [(), ()]) == 6.0 + 2 * (0.5 + 5.0)


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("count", [4, 8, 12])
def test_data_parallel_costs_what_as_many_replicas_as_devices_cost(chain_profile, count, train):
    """Also where one micro-batch a device was not profiled."""
    speed = dict.fromkeys((f"cpu:{i}" for i in range(4)), 1.0)
    profile = chain_profile(6, speed=speed, microbatches=(count,), param_bytes=10**6, train=train)
    [parallel] = [one for one in plan(profile).alternatives if one.name == "data parallel"]
    replicated = plan(profile, replicas=4).predicted
    assert (parallel.microbatches, parallel.devices) == (count, 4)
    assert parallel.step_s == pytest.approx(replicated.step_s)


def test_a_profile_of_a_devices_part_of_the_batch_is_what_data_parallel_is_priced_by(chain_profile):
    """Where there is none, that of the smaller parts with which the step is shortest."""
    profile = chain_profile(8, microbatches=(1, 2, 4, 8))
    assert plan(profile).alternatives[2].microbatches == 2
    coarse = plan(profile.model_copy(update={"microbatches": (1, 4, 8)})).alternatives[2]
    either = [plan(profile.model_copy(update={"microbatches": (n,)})).alternatives[2] for n in (4, 8)]
    assert coarse.step_s == min(one.step_s for one in either)


def test_unsteady_devices_wait_for_each_other():
    """The median of the slowest of two is above the median of each."""
    problem = problem_of([(1.0, 1.0)])
    drawn = [0.5, 1.0, 1.5]
    assert data_parallel_s(problem, 0, [drawn, drawn]) > 1.0


def test_no_alternative_is_better_than_the_proven_plan(chain_profile):
    """The splits are among those that the planner searches; each says at how many micro-batches it is best."""
    result = plan(chain_profile(8))
    assert [one.name for one in result.alternatives] == [*NAIVE, "data parallel", "interleaved"]
    splits = [one for one in result.alternatives if one.name in NAIVE]
    assert all(one.step_s >= result.predicted.step_s * (1 - 1e-9) for one in splits)
    assert all(one.speedup == pytest.approx(result.predicted.baseline_s / one.step_s) for one in splits)


def test_pins_are_no_matter_of_the_alternatives(chain_profile):
    """They are what one would do else."""
    profile = chain_profile(8)
    pinned = plan(profile, microbatches=4, pins={"net.u0": "cpu:1", "net.u7": "cpu:0"})
    assert pinned.alternatives == plan(profile, microbatches=4).alternatives


def test_what_is_not_possible_says_why(chain_profile):
    """A share of the batch that was not profiled; a device that does not hold the whole."""
    profile = chain_profile(8)
    without = plan(profile.model_copy(update={"microbatches": (1,)}))
    assert without.alternatives[2].why == "no profile of 1/2 of the batch, or of less"
    static = sum(node.param_bytes + node.grad_bytes + node.optimizer_bytes for node in profile.nodes)
    tight = plan(profile, memory={"cpu:0": static - 1, "cpu:1": 10 * static + 10**9})
    assert tight.alternatives[2].why == "the whole does not fit on each device"


def test_one_device_has_no_alternative(chain_profile):
    """There is nothing to divide."""
    assert plan(chain_profile(8), devices=["cpu:0"]).alternatives == ()


def test_what_is_not_pinned_stays_as_it_is():
    """With all that it knows of its costs by then; what is pinned may go wherever it fits."""
    free = problem_of([[1.0, 2.0], [3.0, 4.0]])
    assert unpinned(free) is free
    narrow = dataclasses.replace(free.blocks[0], allowed=(False, False), unfit=(True, False))
    loose = unpinned(dataclasses.replace(free, blocks=(narrow, free.blocks[1])))
    assert [block.allowed for block in loose.blocks] == [(False, True), (True, True)]


def test_data_parallel_takes_smaller_micro_batches_where_one_of_a_device_is_too_large():
    """Two units of 40 MiB, and 120 MiB kept for the batch, on devices of 160 MiB: halves do not fit, quarters do."""

    def problem_at(count):
        units = [
            {
                "name": f"u{i}", "forward_s": 1 / count, "backward_s": 2 / count, "param_bytes": 10 * 2**20,
                "static_bytes": 40 * 2**20, "saved_bytes": 120 * 2**20 // count,
            }
            for i in range(2)
        ]  # fmt: skip
        devices = {f"cuda:{d}": {"memory_bytes": 160 * 2**20} for d in range(2)}
        costs = sw.Costs(devices=devices, microbatches=count, units=units, links=[{"bandwidth_bytes_per_s": 1e9}])
        profile = costs.profile()
        return profile, problem_from_graph(costs_at(profile, count), schedule="1f1b")

    (profile, halves), (_, quarters) = problem_at(2), problem_at(4)
    assert alternatives.data_parallel([halves], profile).step_s is None
    found = alternatives.data_parallel([halves, quarters], profile)
    assert found.microbatches == 4
    assert found.step_s == pytest.approx(3.0 + 2 * 20 * 2**20 / 2 / 1e9)


def test_other_schedules_stand_beside_a_plan_that_asked_for_none(chain_profile):
    """Each with the step of the plan that it names; a sentence where it is noticeably shorter, and none else."""
    profile = chain_profile(8, speed={"cpu:0": 1.0, "cpu:1": 1.0}, microbatches=(4,))
    measurements = (
        m.model_copy(update={"backward_input_s": m.backward_s / 2, "backward_weight_s": m.backward_s / 2})
        for m in profile.measurements
    )
    parted = profile.model_copy(update={"measurements": tuple(measurements)})
    found = plan(parted, microbatches=4)
    rivals = {one.name: one for one in found.alternatives if one.name in ("interleaved", "zero-bubble")}
    assert [*rivals] == ["interleaved", "zero-bubble"]
    for name, one in rivals.items():
        asked = plan(parted, microbatches=4, schedule=name)
        assert (one.step_s, one.devices) == (pytest.approx(asked.predicted.step_s), 2)
        assert not [other for other in asked.alternatives if other.name in rivals]
    best = min(rivals.values(), key=lambda one: one.step_s)
    assert best.step_s * WORTHWHILE <= found.predicted.step_s
    said = f"faster by {found.predicted.step_s / best.step_s:.2f}x (--schedule {best.name})"
    assert said in verdict(found).text
    slower = [one.model_copy(update={"step_s": found.predicted.step_s}) for one in found.alternatives]
    assert "--schedule" not in verdict(found.model_copy(update={"alternatives": tuple(slower)})).text
    names = [one.name for one in plan(profile, microbatches=4).alternatives]
    assert "zero-bubble" not in names  # of which the parts of backwards are not known
    assert "interleaved" in names
    assert "interleaved" not in [one.name for one in plan(profile, microbatches=4, transfers="staged").alternatives]
