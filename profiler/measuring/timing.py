"""What a series of timings says: the median, how sure it is, how it spreads, and what stands out. No torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import Any, TypeVar

import numpy as np

from shardwright.profiler.profile import Clocked, Timing

__all__ = ["LEAST_REPEATS", "Series", "at_pace", "median_error", "median_ranks", "summarise"]

_Timing = TypeVar("_Timing", bound=Timing)

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
        self.backward_input_s: list[float] = []
        self.backward_weight_s: list[float] = []
        self.recompute_s: list[float] = []
        self.update_s: list[float] = []
        self.pace_s: list[float] = []
        """The pace while each repeat was timed (:mod:`shardwright.profiler.measuring.pace`); empty where none is taken.
        Times are told as they would have been at the median of it."""
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
        backward_input_s: float | None = None,
        backward_weight_s: float | None = None,
        update_s: float = 0.0,
        recompute_s: float | None = None,
        pace_s: float | None = None,
        first: bool = False,
    ) -> None:
        """Add what one repeat took, and the device's pace meanwhile."""
        assert math.isfinite(forward_s)
        if first:
            self.first_call_s = forward_s + backward_s
            return
        self.forward_s.append(forward_s)
        self.backward_s.append(backward_s)
        self.update_s.append(update_s)
        if backward_input_s is not None and backward_weight_s is not None:
            self.backward_input_s.append(backward_input_s)
            self.backward_weight_s.append(backward_weight_s)
        if recompute_s is not None:
            self.recompute_s.append(recompute_s)
        if pace_s is not None:
            self.pace_s.append(pace_s)

    @property
    def repeats(self) -> int:
        """How often it was timed after the first call."""
        return len(self.forward_s)

    def median_pace_s(self) -> float | None:
        """The pace at which the times are told."""
        return float(np.median(self.pace_s)) if self.pace_s else None

    def observed(self) -> list[float]:
        """Forward and backward of each repeat together, at whatever pace they were."""
        return [a + b for a, b in zip(self.forward_s, self._without("backward", self.backward_s), strict=True)]

    def totals(self) -> list[float]:
        """Forward and backward of each repeat together."""
        return self._levelled(self.observed())

    def forwards(self) -> list[float]:
        """The forward of each repeat."""
        return self._levelled(self.forward_s)

    def backwards(self) -> list[float]:
        """The backward of each repeat, as a part of a longer one."""
        return self._levelled(self._without("backward", self.backward_s))

    def input_backwards(self) -> list[float]:
        """The part of the backward of each repeat that comes to the gradients of the inputs, as a part of a longer
        one."""
        return self._levelled(self._without("backward_input", self.backward_input_s))

    def weight_backwards(self) -> list[float]:
        """The rest of each: the engine is entered as often in a longer one."""
        return self._levelled(self.backward_weight_s)

    def recomputes(self) -> list[float]:
        """The recomputed forward of each repeat."""
        return self._levelled(self.recompute_s)

    def updates(self) -> list[float]:
        """The update of each repeat, as a part of a larger one."""
        return self._levelled(self._without("update", self.update_s))

    def _without(self, phase: str, seconds: Sequence[float]) -> list[float]:
        return [max(0.0, each - self.excess_s.get(phase, 0.0)) for each in seconds]

    def _levelled(self, seconds: Sequence[float]) -> list[float]:
        """As they would have been at the median pace."""
        level = self.median_pace_s()
        if level is None:
            return list(seconds)
        return [each * level / pace for each, pace in zip(seconds, self.pace_s, strict=True)]

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
    paced = series.host or series
    return Clocked(**_figures(series), peak_bytes=series.peak_bytes, host=host, pace_s=paced.median_pace_s())


def at_pace(timing: Clocked, pace_s: float) -> Clocked:
    """``timing`` as it would have been at another pace; what was tuned in the first call stays as it was."""
    if timing.pace_s is None:
        return timing
    factor = pace_s / timing.pace_s
    if timing.host is not None:
        return timing.model_copy(update={"host": _scaled(timing.host, factor), "pace_s": pace_s})
    return _scaled(timing, factor).model_copy(update={"pace_s": pace_s})


def _scaled(timing: _Timing, factor: float) -> _Timing:
    told = {name: getattr(timing, name) for name in _PACED}
    return timing.model_copy(update={name: factor * s for name, s in told.items() if s is not None})


_PACED = (
    *("forward_s", "forward_spread_s", "backward_s", "backward_spread_s"),
    *("backward_input_s", "backward_weight_s", "recompute_s", "update_s"),
)


def _figures(series: Series) -> dict[str, Any]:
    totals = series.totals()
    low, high = np.percentile(totals, [25, 75])
    far = FAR * (high - low)
    error, median = median_error(totals), series.median_s()
    return {
        "repeats": series.repeats,
        "forward_s": _median(series.forwards()),
        "forward_spread_s": _spread(series.forwards()),
        "backward_s": _median(series.backwards()),
        "backward_spread_s": _spread(series.backwards()),
        "backward_input_s": _median(series.input_backwards()) if series.backward_input_s else None,
        "backward_weight_s": _median(series.weight_backwards()) if series.backward_weight_s else None,
        "recompute_s": _median(series.recomputes()) if series.recompute_s else None,
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
