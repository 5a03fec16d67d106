"""Stopwatches: the host's clock, and a GPU's own."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Protocol

import torch

__all__ = ["CudaStopwatch", "HostStopwatch", "Reading", "Stopwatch", "Timer", "cuda_timer", "host_timer"]

Reading = Callable[[], float]
"""Gives the seconds of something timed, once the stopwatch has finished."""


class Stopwatch(Protocol):
    """Times functions; what it read is known after :meth:`finish`."""

    def time(self, function: Callable[[], Any]) -> tuple[Any, Reading]:
        """Call ``function``; its result, and what will give its seconds."""

    def finish(self) -> None:
        """Wait until all that was timed is done."""


class HostStopwatch:
    """For work that is done when the call returns, as on a CPU."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.clock = clock

    def time(self, function: Callable[[], Any]) -> tuple[Any, Reading]:
        """See :class:`Stopwatch`."""
        start = self.clock()
        result = function()
        seconds = self.clock() - start
        return result, lambda: seconds

    def finish(self) -> None:
        """See :class:`Stopwatch`."""


class CudaStopwatch:
    """Reads the GPU's own clock by events in its queue.

    The queue is not drained in between: as in a real step, the host prepares the next kernels while the last ones run,
    and only where it cannot keep up does the time of a launch count.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def time(self, function: Callable[[], Any]) -> tuple[Any, Reading]:
        """See :class:`Stopwatch`."""
        stream = torch.cuda.current_stream(self.device)
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record(stream)
        result = function()
        end.record(stream)
        return result, lambda: start.elapsed_time(end) / 1e3

    def finish(self) -> None:
        """See :class:`Stopwatch`."""
        torch.cuda.synchronize(self.device)


Timer = Callable[[Callable[[], Any]], tuple[Any, float]]
"""Calls a function on its own; its result and its seconds."""


def host_timer(clock: Callable[[], float] = time.perf_counter) -> Timer:
    """A timer for work that is done when the call returns, as on a CPU."""

    def timer(function: Callable[[], Any]) -> tuple[Any, float]:
        result, reading = HostStopwatch(clock).time(function)
        return result, reading()

    return timer


def cuda_timer(device: torch.device) -> Timer:
    """A timer for work on a GPU, the queue drained before and after."""
    stopwatch = CudaStopwatch(device)

    def timer(function: Callable[[], Any]) -> tuple[Any, float]:
        torch.cuda.synchronize(device)
        result, reading = stopwatch.time(function)
        stopwatch.finish()
        return result, reading()

    return timer
