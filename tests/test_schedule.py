"""The simulator against closed forms and a literal table."""

from __future__ import annotations

import itertools
import random

import pytest

from shardwright.sharder.planning.problem import in_flight
from shardwright.sharder.planning.schedule import StageCost, expected_step_s, operations, simulate

SHAPES = list(itertools.product([1, 2, 3, 5], [1, 2, 4, 7]))


def drawn(timeline, stages):
    """The timeline as text, a column for each second."""
    rows = [[".."] * int(timeline.step_s) for _ in range(stages)]
    for slot in timeline.slots:
        rows[slot.stage][int(slot.start_s)] = f"{slot.operation.kind}{slot.operation.microbatch}"
    return [" ".join(row).rstrip(" .") for row in rows]


def test_1f1b_on_three_stages():
    """The schedule drawn in the module's docstring is the one that is simulated."""
    timeline = simulate([StageCost(1.0, 1.0)] * 3, 4)
    assert drawn(timeline, 3) == [
        "F0 F1 F2 .. .. B0 F3 B1 .. B2 .. B3",
        ".. F0 F1 .. B0 F2 B1 F3 B2 .. B3",
        ".. .. F0 B0 F1 B1 F2 B2 F3 B3",
    ]


def test_gpipe_on_two_stages():
    """GPipe runs all forwards before the first backward."""
    timeline = simulate([StageCost(1.0, 1.0)] * 2, 3, schedule="gpipe")
    assert drawn(timeline, 2) == ["F0 F1 F2 .. .. B0 B1 B2", ".. F0 F1 F2 B0 B1 B2"]


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
@pytest.mark.parametrize(("stages", "microbatches"), SHAPES)
def test_equal_stages_without_transfers(schedule, stages, microbatches):
    """A step takes (M + S - 1)(f + b), and (S - 1) / (M + S - 1) of it is bubble."""
    timeline = simulate([StageCost(2.0, 3.0)] * stages, microbatches, schedule=schedule)
    assert timeline.step_s == (microbatches + stages - 1) * 5.0
    assert timeline.bubble == pytest.approx((stages - 1) / (microbatches + stages - 1))


@pytest.mark.parametrize(("stages", "microbatches"), SHAPES)
def test_inference_has_forwards_only(stages, microbatches):
    """Without training a step takes (M + S - 1) f, whatever the backward would cost."""
    timeline = simulate([StageCost(2.0, 3.0)] * stages, microbatches, schedule="gpipe", train=False)
    assert timeline.step_s == (microbatches + stages - 1) * 2.0
    assert {slot.operation.kind for slot in timeline.slots} == {"F"}


def test_transfers_keep_both_ends_busy():
    """One micro-batch passes forward, link, forward, backward, link, backward one after the other."""
    timeline = simulate([StageCost(1.0, 2.0, send_forward_s=0.5, receive_backward_s=0.25), StageCost(3.0, 4.0)], 1)
    assert timeline.step_s == 1 + 0.5 + 3 + 4 + 0.25 + 2
    assert timeline.busy_s == (3.75, 7.75)


def test_busy_receiver_takes_the_transfer_afterwards():
    """A tensor that arrives while its receiver computes costs the receiver its time once it is free."""
    timeline = simulate([StageCost(1.0, send_forward_s=1.0), StageCost(5.0)], 2, schedule="gpipe", train=False)
    # F0 is there at 2; F1 arrives at 4, is received from 7 to 8 and computed until 13.
    assert [(slot.start_s, slot.end_s) for slot in timeline.slots if slot.stage == 1] == [(2, 7), (8, 13)]


def test_update_comes_once_at_the_end_of_each_stage():
    """The step ends with the last update; an update hidden behind another stage's work costs nothing."""
    costs = [StageCost(1.0, 1.0, update_s=2.0), StageCost(1.0, 1.0, update_s=3.0)]
    plain = simulate([StageCost(1.0, 1.0)] * 2, 4)
    timeline = simulate(costs, 4)
    assert timeline.step_s == plain.step_s + 2.0
    assert timeline.busy_s == (10.0, 11.0)


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
def test_step_is_never_shorter_than_the_largest_load(schedule, train):
    """Over random costs the busy time of a stage is its load, no stage does two things at once, and all is done."""
    random_ = random.Random(5)
    for _ in range(100):
        stages, microbatches = random_.randint(1, 5), random_.randint(1, 6)
        costs = [StageCost(*(random_.choice([0.0, 0.5, 1.0, 3.0]) for _ in range(5))) for _ in range(stages - 1)]
        costs.append(StageCost(random_.random(), random_.random(), random_.random()))
        timeline = simulate(costs, microbatches, schedule=schedule, train=train)
        for s, cost in enumerate(costs):
            ends = [costs[s - 1]] * (s > 0) + [cost] * (s < stages - 1)
            load = cost.forward_s + sum(end.send_forward_s for end in ends)
            load += (cost.backward_s + sum(end.receive_backward_s for end in ends)) if train else 0.0
            assert timeline.busy_s[s] == pytest.approx(microbatches * load + cost.update_s)
            mine = [slot for slot in timeline.slots if slot.stage == s]
            assert len(mine) == microbatches * (2 if train else 1)
            assert all(a.end_s <= b.start_s for a, b in itertools.pairwise(mine))
        assert timeline.step_s >= max(timeline.busy_s) - 1e-9
        assert timeline.bubble + 1e-9 >= 0


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
@pytest.mark.parametrize(("stages", "microbatches"), SHAPES)
def test_in_flight_is_what_the_operations_hold(schedule, stages, microbatches):
    """The micro-batches that memory is counted for are the most forwards that ever wait for their backward."""
    for stage in range(stages):
        held = itertools.accumulate(
            1 if op.kind == "F" else -1 for op in operations(schedule, stage, stages, microbatches, train=True)
        )
        assert max(held) == in_flight(schedule, microbatches, stages - 1 - stage)


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
@pytest.mark.parametrize(("stages", "microbatches"), SHAPES)
def test_every_operation_comes_once_and_in_order(schedule, stages, microbatches):
    """Each stage does the forward of each micro-batch before its backward, both in order, and nothing else."""
    for stage in range(stages):
        todo = operations(schedule, stage, stages, microbatches, train=True)
        for kind in "FB":
            assert [op.microbatch for op in todo if op.kind == kind] == list(range(microbatches))
        assert all(todo.index(("F", m)) < todo.index(("B", m)) for m in range(microbatches))


def test_steady_devices_step_as_simulated():
    """Without variation the expected step is the simulated one, and has no spread."""
    costs = [StageCost(1.0, 2.0), StageCost(1.0, 2.0)]
    assert expected_step_s(costs, [(), (1.0, 1.0)], 4) == (simulate(costs, 4).step_s, 0.0)


def test_a_pipeline_waits_for_the_device_that_is_slow_at_the_moment():
    """When each device is at times faster and slower, the median step is longer than that of the median times."""
    costs = [StageCost(1.0, 2.0), StageCost(1.0, 2.0)]
    varied, spread = expected_step_s(costs, [(0.8, 1.0, 1.2)] * 2, 8)
    assert varied > simulate(costs, 8).step_s
    assert spread > 0
    assert expected_step_s(costs, [(0.8, 1.0, 1.2)] * 2, 8) == (varied, spread)


def test_one_stage_varies_around_its_median():
    """A device alone waits for nobody: its expected step is its median step."""
    assert expected_step_s([StageCost(1.0, 2.0)], [(0.5, 1.0, 1.0, 1.0, 1.5)], 2)[0] == pytest.approx(6.0)
