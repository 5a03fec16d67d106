"""Quantities as text: three significant digits and the unit that a reader would choose. Pure functions."""

from __future__ import annotations

import math

from shardwright.profiler.formats.given_devices import AMPLE_BYTES

__all__ = [
    "bandwidth",
    "count",
    "memory_of",
    "number_of_bytes",
    "per_second",
    "percent",
    "ratio",
    "seconds",
    "share",
    "signed_seconds",
    "spread",
    "used_of",
]

_TIMES = ((1.0, "s"), (1e-3, "ms"), (1e-6, "us"), (1e-9, "ns"))
_BANDWIDTHS = ((1e12, "TB/s"), (1e9, "GB/s"), (1e6, "MB/s"), (1e3, "kB/s"), (1.0, "B/s"))
_BINARY = ("KiB", "MiB", "GiB", "TiB")
_ROUNDS_UP = 0.9995
"""From this share of a unit on, three digits round up to the unit itself."""


def _three_digits(value: float) -> str:
    """``value`` with three significant digits, none of them an exponent."""
    if value < 9.995:
        return f"{value:.2f}"
    return f"{value:.1f}" if value < 99.95 else f"{value:.0f}"


def _in_units(value: float, units: tuple[tuple[float, str], ...]) -> str:
    """``value`` in the largest of ``units`` that it reaches, or else in the smallest."""
    size, name = next((unit for unit in units if value >= _ROUNDS_UP * unit[0]), units[-1])
    return f"{_three_digits(value / size)} {name}"


def seconds(value: float) -> str:
    """A time: ``1.24 s``, ``12.3 ms``, ``310 us``."""
    return _in_units(value, _TIMES) if value else "0 s"


def signed_seconds(value: float) -> str:
    """A difference of times: ``+12.3 ms``, ``-310 us``."""
    return f"{'+' if value > 0 else '-'}{seconds(abs(value))}" if value else seconds(0.0)


def per_second(value: float) -> str:
    """How many of something a second: ``48.0/s``, ``0.25/s``, ``0.00417/s``."""
    if 0 < value < 0.0995:
        return f"{value:.{2 - math.floor(math.log10(value))}f}/s"  # as many digits of what is rare
    return f"{_three_digits(value)}/s"


def bandwidth(bytes_per_s: float) -> str:
    """A bandwidth, in powers of 1000 as links are sold: ``12.3 GB/s``."""
    return _in_units(bytes_per_s, _BANDWIDTHS)


def _binary_unit(value: float) -> int:
    """The power of 1024 in which ``value`` has at most three digits before the point."""
    power = 0
    while power < len(_BINARY) and value / 1024**power >= 999.5:
        power += 1
    return power


def number_of_bytes(value: int) -> str:
    """An amount of memory, in powers of 1024: ``512 B``, ``1.50 KiB``, ``12.3 GiB``."""
    power = _binary_unit(value)
    return f"{_three_digits(value / 1024**power)} {_BINARY[power - 1]}" if power else f"{value} B"


def memory_of(cap: int) -> str:
    """What a device holds; nothing said of it is no cap."""
    return "no cap" if cap >= AMPLE_BYTES else number_of_bytes(cap)


def used_of(used: int, whole: int) -> str:
    """Part of an amount of memory: ``1.20 of 10.0 GiB``, or ``12.3 MiB of 10.0 GiB`` where the units differ."""
    text = number_of_bytes(used)
    if whole >= AMPLE_BYTES:
        return f"{text}, no cap"
    if _binary_unit(used) == _binary_unit(whole):
        text = text.partition(" ")[0]
    return f"{text} of {number_of_bytes(whole)}"


def percent(value: float, *, signed: bool = False) -> str:
    """A percentage, given as such: ``3.9%``, ``12%``; with ``signed``, ``+3.9%``."""
    if abs(value) < 0.05:
        return "0%"
    return f"{value:{'+' if signed else ''}.{1 if abs(value) < 9.95 else 0}f}%"


def share(fraction: float) -> str:
    """A part of 1 as a percentage with one decimal, for columns: ``2.9%``, ``12.4%``."""
    return f"{100 * fraction:.1f}%"


def ratio(value: float) -> str:
    """One quantity over another: ``1.53x``."""
    return f"{_three_digits(value)}x"


def spread(interquartile_range: float, median: float) -> str:
    """Half the interquartile range as a whole percentage of the median; nothing for a median of 0."""
    return f"{50 * interquartile_range / median:.0f}%" if median else ""


def count(number: int, noun: str) -> str:
    """A number and its noun: ``1 unit``, ``7 units``, ``2 micro-batches``."""
    if number == 1:
        return f"1 {noun}"
    return f"{number} {noun}{'es' if noun.endswith('batch') else 's'}"
