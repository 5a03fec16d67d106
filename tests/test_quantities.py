"""Quantities as text."""

import pytest

from shardwright.reports.quantities import (
    bandwidth,
    count,
    number_of_bytes,
    per_second,
    percent,
    ratio,
    seconds,
    share,
    signed_seconds,
    spread,
    used_of,
)


@pytest.mark.parametrize(
    ("formatted", "text"),
    [
        (seconds(0), "0 s"),
        (signed_seconds(0.0123), "+12.3 ms"),
        (signed_seconds(-310e-6), "-310 us"),
        (signed_seconds(0.0), "0 s"),
        (per_second(48.04), "48.0/s"),
        (per_second(0.25), "0.25/s"),
        (per_second(0.0996), "0.10/s"),
        (per_second(0.004167), "0.00417/s"),
        (per_second(0.00001), "0.0000100/s"),
        (per_second(0.0), "0.00/s"),
        (seconds(4e-10), "0.40 ns"),
        (seconds(310e-6), "310 us"),
        (seconds(0.00099949), "999 us"),
        (seconds(0.0009996), "1.00 ms"),
        (seconds(0.0123), "12.3 ms"),
        (seconds(0.09996), "100 ms"),
        (seconds(1.236), "1.24 s"),
        (seconds(754), "754 s"),
        (number_of_bytes(0), "0 B"),
        (number_of_bytes(999), "999 B"),
        (number_of_bytes(1000), "0.98 KiB"),
        (number_of_bytes(1536), "1.50 KiB"),
        (number_of_bytes(2**20 - 1), "1.00 MiB"),
        (number_of_bytes(80 * 2**30), "80.0 GiB"),
        (number_of_bytes(5000 * 2**40), "5000 TiB"),
        (used_of(6 * 2**30 // 5, 10 * 2**30), "1.20 of 10.0 GiB"),
        (used_of(12 * 2**20, 10 * 2**30), "12.0 MiB of 10.0 GiB"),
        (bandwidth(3.2e9), "3.20 GB/s"),
        (bandwidth(450e9), "450 GB/s"),
        (percent(0.04), "0%"),
        (percent(3.94), "3.9%"),
        (percent(9.96), "10%"),
        (percent(3.94, signed=True), "+3.9%"),
        (percent(-45.2, signed=True), "-45%"),
        (share(0.1238), "12.4%"),
        (ratio(1.534), "1.53x"),
        (ratio(15.34), "15.3x"),
        (spread(0.4, 10.0), "2%"),
        (spread(0.4, 0.0), ""),
        (count(1, "micro-batch"), "1 micro-batch"),
        (count(8, "micro-batch"), "8 micro-batches"),
        (count(0, "unit"), "0 units"),
    ],
)
def test_quantities(formatted, text):
    """A quantity has three significant digits and the unit in which it has at most three before the point."""
    assert formatted == text
