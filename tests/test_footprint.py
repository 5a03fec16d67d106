"""Memory of a schedule: literal curves, closed forms, and peaks that are those of the curves."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardwright.sharder.planning.problem import in_flight
from shardwright.sharder.planning.schedules.footprint import StageMemory, memory_curve, peak_bytes
from shardwright.sharder.planning.schedules.schedule import order
from shardwright.sharder.planning.schedules.simulate import StageCost, simulate

COST = StageCost(1.0, 2.0, backward_input_s=1.0, backward_weight_s=1.0)
HELD = StageMemory(held_bytes=1)


def test_the_curve_of_one_stage():
    """Weights all through; a micro-batch from its forward to the end of its backward; workspaces while used."""
    memory = StageMemory(static_bytes=100, held_bytes=10, forward_workspace_bytes=1, backward_workspace_bytes=2)
    curve = memory_curve(simulate([COST], 2), [memory], 0)
    assert curve.times_s.tolist() == [0, 0, 1, 1, 3, 3, 4, 4, 6]
    assert curve.bytes.tolist() == [100, 111, 110, 112, 100, 111, 110, 112, 100]
    assert peak_bytes(order("1f1b", 1, 2), [memory]) == (112,)


def test_inference_holds_nothing_between_operations():
    """A micro-batch's tensors are there while its forward runs."""
    memory = StageMemory(static_bytes=100, held_bytes=10, forward_workspace_bytes=1)
    curve = memory_curve(simulate([COST], 2, train=False), [memory], 0)
    assert curve.bytes.tolist() == [100, 111, 100, 111, 100]


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
    stages = [StageMemory(static_bytes=100, held_bytes=1), StageMemory(static_bytes=1000, held_bytes=10)]
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
    """The order alone tells the most that the curve ever has, and all but the weights is given back."""
    name, each = schedule
    sizes = st.builds(StageMemory, *[st.integers(0, 10**12)] * 4)
    stages = data.draw(st.lists(sizes, min_size=devices * each, max_size=devices * each))
    keywords = {"schedule": name, "stages_per_device": each, "train": train}
    timeline = simulate([COST] * len(stages), rounds * devices, **keywords)
    peaks = peak_bytes(timeline.order, stages)
    for device in range(devices):
        curve = memory_curve(timeline, stages, device)
        assert curve.bytes.max() == peaks[device]
        assert curve.bytes[0] == curve.bytes[-1] == sum(stage.static_bytes for stage in stages[device::devices])
        assert curve.times_s.tolist() == sorted(curve.times_s)
