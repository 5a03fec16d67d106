"""Memory of a schedule: literal curves, closed forms, and peaks that are those of the curves."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardwright.sharder.planning.problem import in_flight
from shardwright.sharder.planning.schedules.footprint import memory_curve, peak_bytes
from shardwright.sharder.planning.schedules.schedule import order
from shardwright.sharder.planning.schedules.simulate import StageCost, simulate
from shardwright.sharder.planning.stage_memory import StageMemory

COST = StageCost(1.0, 2.0, backward_input_s=1.0, backward_weight_s=1.0)
PARTS = ("forward_bytes", "later_forward_bytes", "input_backward_bytes", "first_backward_bytes", "backward_bytes")
HELD = StageMemory(held_bytes=1, **dict.fromkeys(PARTS, 1))


def test_the_curve_of_one_stage():
    """Weights all through, their gradients from the first backward on; a micro-batch from its forward to the end of its
    backward; what operations and the optimizer take while they are at it."""
    memory = StageMemory(
        static_bytes=100,
        gradient_bytes=50,
        held_bytes=10,
        forward_bytes=11,
        later_forward_bytes=13,
        first_backward_bytes=12,
        backward_bytes=14,
        waiting_bytes=3,
        update_bytes=20,
    )
    curve = memory_curve(simulate([COST], 2), [memory], 0, 1.0)
    assert curve.times_s.tolist() == [0, 0, 1, 1, 3, 3, 4, 4, 6, 6, 7]
    assert curve.bytes.tolist() == [50, 61, 60, 112, 103, 113, 113, 114, 103, 120, 100]
    assert curve.most_bytes(7, 7.0) == [61, 112, 112, 113, 114, 114, 120]
    assert peak_bytes(order("1f1b", 1, 2), [memory]) == (120,)


def test_what_was_sent_waits_for_the_end():
    """Under GPipe: an output and a gradient of each micro-batch that is done."""
    memory = StageMemory(held_bytes=10, sent_bytes=2, sent_gradient_bytes=1, **dict.fromkeys(PARTS, 15))
    curve = memory_curve(simulate([COST], 2, schedule="gpipe"), [memory], 0)
    assert curve.bytes.tolist() == [0, 15, 10, 25, 20, 25, 13, 18, 6, 0, 0]


def test_parts_of_a_backward():
    """Under zero-bubble the second of two devices holds more from B to W, and has gradients of weights from W on."""
    memory = StageMemory(
        static_bytes=8,
        gradient_bytes=8,
        held_bytes=10,
        deferred_bytes=5,
        forward_bytes=10,
        later_forward_bytes=10,
        input_backward_bytes=15,
        first_backward_bytes=16,
        backward_bytes=16,
    )
    timeline = simulate([COST] * 2, 2, schedule="zero-bubble")
    curve = memory_curve(timeline, [memory] * 2, 1)
    assert "".join("FBW"[kind] for kind in timeline.order.kinds[1]) == "FBFBWW"
    assert curve.bytes.tolist() == [0, 10, 10, 15, 15, 25, 25, 30, 30, 39, 23, 24, 8, 8, 8]


def test_inference_lets_go_of_nothing():
    """Until the next step, as the engine does."""
    memory = StageMemory(static_bytes=100, held_bytes=10, forward_bytes=11)
    curve = memory_curve(simulate([COST], 2, train=False), [memory], 0)
    assert curve.bytes.tolist() == [100, 111, 110, 121, 120]


def test_what_lasts_for_no_time_is_seen():
    """An update of no seconds, at the edge between two parts of the step and at its end."""
    memory = StageMemory(static_bytes=1, update_bytes=9)
    curve = memory_curve(simulate([COST], 1), [memory], 0)
    assert curve.most_bytes(2, 6.0) == [1, 10]
    assert curve.most_bytes(3, 3.0) == [1, 1, 10]


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
@pytest.mark.parametrize("devices", [1, 2, 3, 5])
@pytest.mark.parametrize("microbatches", [1, 2, 4, 7])
def test_micro_batches_in_flight(schedule, devices, microbatches):
    """GPipe holds all of them, 1F1B one for each stage from here to the end."""
    expected = tuple(in_flight(schedule, microbatches, devices - 1 - device) for device in range(devices))
    assert peak_bytes(order(schedule, devices, microbatches), [HELD] * devices) == expected


@pytest.mark.parametrize("devices", [1, 2, 3, 5])
def test_zero_bubble_holds_no_more_than_1f1b_at_its_fullest(devices):
    """ZB-H1 delays the gradients of weights on later devices until all hold as many as the first (Qi et al., 2024)."""
    held = peak_bytes(order("zero-bubble", devices, 4 * devices), [HELD] * devices)
    assert held == (devices,) * devices


@pytest.mark.parametrize(("devices", "each"), [(2, 2), (4, 2), (3, 3)])
def test_interleaving_holds_more(devices, each):
    """Micro-batches on a stage: (v - 1) D to warm up, two for each device behind, and one (SC 2021, section 2.2)."""
    held = peak_bytes(order("interleaved", devices, 4 * devices, stages_per_device=each), [HELD] * devices * each)
    assert held == tuple((each - 1) * devices + 2 * (devices - 1 - device) + 1 for device in range(devices))


def test_a_device_has_the_sum_of_its_stages():
    """Weights of two stages, and what each holds: F0.0 F1.0 B1.0 F0.1 B0.0 F1.1 B1.1 B0.1 has one of each at most."""
    stages = [
        StageMemory(static_bytes=100, held_bytes=1, **dict.fromkeys(PARTS, 1)),
        StageMemory(static_bytes=1000, held_bytes=10, **dict.fromkeys(PARTS, 10)),
    ]
    assert peak_bytes(order("interleaved", 1, 2, stages_per_device=2), stages) == (1111,)


@given(
    st.sampled_from([("gpipe", 1), ("1f1b", 1), ("interleaved", 2), ("zero-bubble", 1), ("zero-bubble", 2)]),
    st.integers(1, 4),
    st.integers(1, 3),
    st.booleans(),
    st.data(),
)
@settings(deadline=None)
def test_the_peak_is_the_curves(schedule, devices, rounds, train, data):
    """The order alone tells the most that the curve ever has; it begins without gradients, and ends with all that is
    there all through the step."""
    name, each = schedule
    sizes = st.builds(StageMemory, **dict.fromkeys(StageMemory.model_fields, st.integers(0, 10**12)))
    if not train:
        sizes = sizes.map(lambda memory: memory.model_copy(update={"update_bytes": 0, "gradient_bytes": 0}))
    stages = data.draw(st.lists(sizes, min_size=devices * each, max_size=devices * each))
    keywords = {"schedule": name, "stages_per_device": each, "train": train}
    timeline = simulate([COST] * len(stages), rounds * devices, **keywords)
    peaks = peak_bytes(timeline.order, stages)
    for device in range(devices):
        here = stages[device::devices]
        curve = memory_curve(timeline, stages, device)
        assert curve.bytes.max() == peaks[device]
        assert curve.bytes[0] == sum(stage.static_bytes - stage.gradient_bytes for stage in here)
        assert not train or curve.bytes[-1] == sum(stage.static_bytes for stage in here)
        assert curve.times_s.tolist() == sorted(curve.times_s)
