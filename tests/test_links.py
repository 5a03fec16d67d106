"""Links: the fitted line."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardwright.profiler.links import SIZES, disk_rate, fit


@settings(max_examples=100, deadline=None, derandomize=True)
@given(latency=st.floats(0, 1e-2), bandwidth=st.floats(1e6, 1e12))
def test_a_line_is_found_again(latency, bandwidth):
    """Messages that take latency + bytes / bandwidth give back both."""
    seconds = [latency + size / bandwidth for size in SIZES]
    found_latency, found_bandwidth = fit(SIZES, seconds)
    assert found_latency == pytest.approx(latency, rel=1e-3, abs=1e-6 * max(seconds))
    predicted = [found_latency + size / found_bandwidth for size in SIZES]
    assert np.allclose(predicted, seconds, rtol=1e-3)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(seconds=st.lists(st.floats(1e-6, 1.0), min_size=len(SIZES), max_size=len(SIZES)))
def test_noise_never_gives_an_impossible_link(seconds):
    """Whatever the times, latency is not negative and bandwidth positive and finite."""
    latency, bandwidth = fit(SIZES, seconds)
    assert latency >= 0
    assert 0 < bandwidth < float("inf")


def test_small_messages_count_as_much_as_large_ones():
    """A latency of 100 us is found beside a message of 4 ms."""
    seconds = [1e-4 + size / 1e9 for size in SIZES]
    seconds[-1] *= 1.02
    assert fit(SIZES, seconds)[0] == pytest.approx(1e-4, rel=0.1)


def test_the_disk_is_timed(tmp_path):
    """Reading a file that is not in memory has a rate, and leaves nothing behind."""
    rate = disk_rate(tmp_path)
    assert rate is None or rate > 0
    assert list(tmp_path.iterdir()) == []
