"""Estimates: the roofline by hand, and that calibration finds what made the times."""

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from shardwright.errors import ShardwrightError
from shardwright.profiler.estimates.catalogue import Rates
from shardwright.profiler.estimates.estimate import (
    ASSUMED,
    NOMINAL,
    Efficiency,
    _non_negative,
    demand_of,
    fit,
    roofline_s,
)
from shardwright.profiler.estimates.on_gpu import LAUNCHES, as_on_gpu
from shardwright.profiler.recording.operations import Operation

RATES = Rates(peak_flops={"float32": 1e12, "bfloat16": 4e12}, memory_bytes_per_s=1e11)
WHOLE = Efficiency(compute=1.0, memory=1.0, operation_s=0.0)


def operation(flops, moved, dtype=torch.float32, name="aten.mm.default"):
    return Operation(name, flops, moved, dtype, "")


def test_an_operator_takes_its_arithmetic_or_its_bytes():
    """Whichever is longer, by its dtype's rate, divided by the efficiency, with a launch for each."""
    product, copy = operation(4 * 10**9, 10**6), operation(0, 10**9)
    assert roofline_s(demand_of([product]), RATES, WHOLE) == pytest.approx(4e-3)
    assert roofline_s(demand_of([product._replace(dtype=torch.bfloat16)]), RATES, WHOLE) == pytest.approx(1e-3)
    assert roofline_s(demand_of([copy]), RATES, WHOLE) == pytest.approx(1e-2)
    half = Efficiency(compute=0.5, memory=0.25, operation_s=1e-3)
    assert roofline_s(demand_of([product, copy, copy]), RATES, half) == pytest.approx(8e-3 + 2 * 4e-2 + 3e-3)
    assert roofline_s(demand_of([]), RATES, half) == 0


def test_tf32_is_used_where_torch_is_told_to():
    """Convolutions do by default, products do not; a device without tf32 computes in float32."""
    rates = RATES.model_copy(update={"peak_flops": {"float32": 1e12, "tf32": 8e12}})
    product = operation(8 * 10**9, 0)
    convolution = product._replace(name="aten.convolution.default")
    assert roofline_s(demand_of([product]), rates, WHOLE) == pytest.approx(8e-3)
    assert roofline_s(demand_of([convolution]), rates, WHOLE) == pytest.approx(1e-3)
    assert roofline_s(demand_of([convolution]), RATES, WHOLE) == pytest.approx(8e-3)
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        assert roofline_s(demand_of([product]), rates, WHOLE) == pytest.approx(1e-3)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False


def test_a_missing_rate_is_named():
    """Float16 is not guessed from another dtype; what only moves bytes needs no rate."""
    with pytest.raises(
        ShardwrightError, match="computes in float16, and a declared device has no rate for it, only float32"
    ):
        roofline_s(demand_of([operation(1, 1, torch.float16)]), RATES, WHOLE)
    assert roofline_s(demand_of([operation(0, 10**11, torch.float16)]), RATES, WHOLE) == pytest.approx(1)


def test_a_gpu_launches_convolutions_in_parts():
    """A convolution asks for no more than it does, but for several launches; no other operator does."""
    product = operation(100, 30)
    assert [*as_on_gpu([product])] == [product]
    for name, launches in LAUNCHES.items():
        convolution = product._replace(name=name)
        found = demand_of(as_on_gpu([convolution]))
        assert found.count.sum() == launches
        assert (found.flops.sum(), found.bytes.sum()) == (convolution.flops, convolution.bytes)
        assert roofline_s(found, RATES, Efficiency(1.0, 1.0, 1.0)) == pytest.approx(launches, rel=1e-6)


# Calibration

efficiencies = st.builds(
    Efficiency,
    compute=st.floats(0.05, 1),
    memory=st.floats(0.05, 1),
    operation_s=st.floats(1e-6, 1e-4),
)


def steps(seed, count=25):
    """Steps of a few operators each, some bound by arithmetic and some by bytes."""
    random = np.random.default_rng(seed)
    sizes = 10 ** random.uniform(3, 10, (count, 4, 2))
    return [demand_of(operation(int(flops), int(moved)) for flops, moved in step) for step in sizes]


@settings(max_examples=15, deadline=None, derandomize=True)
@given(efficiencies, st.integers(0, 1000))
def test_a_fit_finds_what_made_the_times(true, seed):
    """Times that a roofline gave are given again, whatever its efficiencies were."""
    demands = steps(seed)
    seconds = [roofline_s(demand, RATES, true) for demand in demands]
    found = fit(demands, seconds, RATES)
    assert found.median_error < 0.02
    again = [roofline_s(demand, RATES, found.efficiency) for demand in demands]
    assert np.median(np.abs(np.array(again) / seconds - 1)) < 0.02


@settings(max_examples=10, deadline=None, derandomize=True)
@given(efficiencies, st.integers(0, 1000))
def test_a_fit_is_not_led_astray_by_noise(true, seed):
    """With times a tenth off, the efficiencies are positive and others' times come out about as well."""
    random = np.random.default_rng(seed)
    demands = steps(seed)
    seconds = [roofline_s(demand, RATES, true) * random.uniform(0.9, 1.1) for demand in demands]
    found = fit(demands, seconds, RATES).efficiency
    assert found.compute > 0
    assert found.memory > 0
    assert found.operation_s >= 0
    others = steps(seed + 1)
    expected = np.array([roofline_s(demand, RATES, true) for demand in others])
    assert np.median(np.abs([roofline_s(d, RATES, found) for d in others] / expected - 1)) < 0.15


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.lists(st.tuples(*[st.floats(0, 10)] * 3), min_size=3, max_size=8))
def test_the_non_negative_solution_is_the_least(rows):
    """No point of a grid over the positive octant comes nearer."""
    design = np.array(rows)
    assume(np.abs(design).max() > 1e-3)
    found = _non_negative(design, np.ones(len(design)))
    least = np.sum((design @ found - 1) ** 2)
    assert found.min() >= 0
    grid = np.array(np.meshgrid(*[[0, 0.03, 0.1, 0.3, 1, 3]] * 3)).reshape(3, -1)
    assert least <= np.sum((design @ grid - 1) ** 2, axis=0).min() + 1e-6


def test_what_no_time_shows_is_assumed():
    """A model without arithmetic says nothing about it."""
    demands = [demand_of([operation(0, size)]) for size in (10**5, 10**7, 10**9)]
    found = fit(demands, [roofline_s(d, RATES, Efficiency(0.5, 0.5, 1e-5)) for d in demands], RATES)
    assert found.efficiency.compute == ASSUMED.compute
    assert found.efficiency.memory == pytest.approx(0.5)
    assert found.efficiency.operation_s == pytest.approx(1e-5)
    assert found.bound_by == (False, True)


def test_nothing_timed_is_refused():
    """A fit needs at least one time."""
    with pytest.raises(ShardwrightError, match="no operator was timed"):
        fit([demand_of([])], [1.0], NOMINAL)
