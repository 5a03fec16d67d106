"""What a series of timings says: the median, how sure it is, how it spreads, and what stands out. No torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np

from shardwright.profiler.profile import Clocked, Timing

__all__ = ["LEAST_REPEATS", "Series", "median_error", "median_ranks", "summarise"]

CONFIDENCE = 0.95
LEAST_REPEATS = 6
"""Of fewer numbers, not even the smallest and the largest enclose the median with 95% confidence."""
FAR = 3.0
"""A time this many interquartile ranges outside the quartiles is an outlier (Tukey's "far out")."""


@cache
def median_ranks(count: int) -> tuple[int, int]:
    """The positions, from 0, of the two of ``count`` sorted numbers that enclose the median with 95% confidence.

    Distribution free, by the binomial distribution (Conover, Practical Nonparametric Statistics, 3.2); fewer than
    :data:`LEAST_REPEATS` numbers are enclosed by all of them, with less confidence.
    """
    below = 0.0  # the chance that at most `low` numbers lie below the median
    for low in range(count // 2):
        below += math.comb(count, low) / 2**count
        if 2 * below > 1 - CONFIDENCE:
            return max(low - 1, 0), count - 1 - max(low - 1, 0)
    return (count - 1) // 2, count // 2


def median_error(seconds: Sequence[float]) -> float:
    """Half the width of the median's 95% confidence interval, in s; infinite for too few numbers."""
    if len(seconds) < LEAST_REPEATS:
        return math.inf
    ordered = sorted(seconds)
    low, high = median_ranks(len(ordered))
    return (ordered[high] - ordered[low]) / 2


class Series:
    """The timings of one step on one device, in s; the first call is kept apart."""

    def __init__(self) -> None:
        self.first_call_s = 0.0
        self.forward_s: list[float] = []
        self.backward_s: list[float] = []
        self.recompute_s: list[float] = []
        self.update_s: list[float] = []
        self.peak_bytes: int | None = None
        self.excess_s: dict[str, float] = {}
        """By phase, what a repeat takes too long because the step was called by itself."""
        self.host: Series | None = None
        """Where work is enqueued, what the host takes for it; these here are the device's times then."""

    def add(
        self,
        *,
        forward_s: float,
        backward_s: float = 0.0,
        update_s: float = 0.0,
        recompute_s: float | None = None,
        first: bool = False,
    ) -> None:
        """Add what one repeat took."""
        assert math.isfinite(forward_s)
        if first:
            self.first_call_s = forward_s + backward_s
            return
        self.forward_s.append(forward_s)
        self.backward_s.append(backward_s)
        self.update_s.append(update_s)
        if recompute_s is not None:
            self.recompute_s.append(recompute_s)

    @property
    def repeats(self) -> int:
        """How often it was timed after the first call."""
        return len(self.forward_s)

    def totals(self) -> list[float]:
        """Forward and backward of each repeat together."""
        return [a + b for a, b in zip(self.forward_s, self.backwards(), strict=True)]

    def backwards(self) -> list[float]:
        """The backward of each repeat, as a part of a longer one."""
        return [max(0.0, seconds - self.excess_s.get("backward", 0.0)) for seconds in self.backward_s]

    def updates(self) -> list[float]:
        """The update of each repeat, as a part of a larger one."""
        return [max(0.0, seconds - self.excess_s.get("update", 0.0)) for seconds in self.update_s]

    @property
    def slower(self) -> Series:
        """The times that count when such steps follow one another: the device's, or the host's."""
        return self.host if self.host is not None and self.host.median_s() > self.median_s() else self

    def median_s(self) -> float:
        """The median of :meth:`totals`; 0 before the first."""
        return float(np.median(self.totals())) if self.forward_s else 0.0

    def is_settled(self, precision: float, negligible_s: float) -> bool:
        """Whether the median is known to ``precision`` (relative), or to ``negligible_s``."""
        error = median_error(self.totals())
        return error <= max(precision * self.median_s(), negligible_s)


def summarise(series: Series) -> Clocked:
    """Medians, spreads, and how far they can be trusted."""
    host = Timing(**_figures(series.host)) if series.host is not None else None
    return Clocked(**_figures(series), peak_bytes=series.peak_bytes, host=host)


def _figures(series: Series) -> dict[str, Any]:
    totals = series.totals()
    low, high = np.percentile(totals, [25, 75])
    far = FAR * (high - low)
    error, median = median_error(totals), series.median_s()
    return {
        "repeats": series.repeats,
        "forward_s": _median(series.forward_s),
        "forward_spread_s": _spread(series.forward_s),
        "backward_s": _median(series.backwards()),
        "backward_spread_s": _spread(series.backwards()),
        "recompute_s": _median(series.recompute_s) if series.recompute_s else None,
        "update_s": _median(series.updates()),
        "first_call_s": series.first_call_s,
        "median_error": error / median if math.isfinite(error) and median else None,
        "outliers": sum(not low - far <= total <= high + far for total in totals),
    }


def _median(seconds: Sequence[float]) -> float:
    return float(np.median(seconds)) if seconds else 0.0


def _spread(seconds: Sequence[float]) -> float:
    """The interquartile range."""
    low, high = np.percentile(seconds, [25, 75]) if seconds else (0.0, 0.0)
    return float(high - low)
