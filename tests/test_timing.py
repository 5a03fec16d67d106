"""Statistics of timings: medians, and how far they can be trusted."""

import math
import random
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardwright.profiler.measuring.timing import LEAST_REPEATS, Series, median_error, median_ranks, summarise

SECONDS = st.floats(1e-7, 1e3, allow_nan=False)


def series(forward, backward=None):
    made = Series()
    made.forward_s = list(forward)
    made.backward_s = list(backward or [0.0] * len(made.forward_s))
    made.update_s = [0.0] * len(made.forward_s)
    return made


@pytest.mark.parametrize("count", range(LEAST_REPEATS, 60))
def test_the_interval_has_its_confidence_and_no_smaller_one_has(count):
    """By the binomial distribution: the median lies below half of the numbers' ranks like a fair coin falls."""
    low, high = median_ranks(count)
    assert high == count - 1 - low

    def confidence(low):
        return 1 - 2 * sum(math.comb(count, k) for k in range(low + 1)) / 2**count

    assert confidence(low) >= 0.95
    assert confidence(low + 1) < 0.95


def test_the_interval_holds_the_true_median_as_often_as_it_says():
    """Of a skewed distribution whose median is known, in 2,000 samples."""
    generator = random.Random(1)
    held = 0
    for _ in range(2000):
        sample = sorted(generator.expovariate(math.log(2)) for _ in range(15))
        low, high = median_ranks(15)
        held += sample[low] <= 1.0 <= sample[high]
    assert 0.94 <= held / 2000 <= 0.985


@given(st.lists(SECONDS, max_size=LEAST_REPEATS - 1))
def test_too_few_numbers_say_nothing(seconds):
    """No interval of fewer than six has 95% confidence."""
    assert median_error(seconds) == math.inf
    assert not series(seconds).is_settled(1.0, 1.0) or not seconds


@given(st.lists(SECONDS, min_size=LEAST_REPEATS, max_size=40), st.floats(0.5, 20))
def test_the_error_is_in_the_unit_of_the_times(seconds, factor):
    """Twice as slow a machine is twice as uncertain, and order does not matter."""
    scaled = [factor * s for s in reversed(seconds)]
    assert median_error(scaled) == pytest.approx(factor * median_error(seconds))


@given(st.lists(st.tuples(SECONDS, SECONDS), min_size=1, max_size=40))
def test_a_summary_has_the_medians(pairs):
    """Forward and backward each have their own median and interquartile range."""
    timing = summarise(series(*zip(*pairs, strict=True)))
    assert timing.repeats == len(pairs)
    assert timing.forward_s == pytest.approx(statistics.median(f for f, _ in pairs))
    assert timing.backward_s == pytest.approx(statistics.median(b for _, b in pairs))
    assert timing.forward_spread_s >= 0


def test_outliers_are_counted_and_kept():
    """One slow repeat is told, and is part of all figures."""
    timing = summarise(series([1.0, 1.1, 0.9, 1.0, 1.05, 0.95, 9.0]))
    assert timing.outliers == 1
    assert timing.repeats == 7
    assert summarise(series([1.0] * 7)).outliers == 0


def test_an_unknown_error_is_none():
    """Fewer repeats than a median needs have no error that could be told."""
    assert summarise(series([1.0, 2.0])).median_error is None
    assert summarise(series([1.0] * 6)).median_error == 0.0
