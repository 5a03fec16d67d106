"""Stopwatches: the host's clock, and a GPU's own."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch

__all__ = [
    "CudaStopwatch",
    "Enqueued",
    "HostStopwatch",
    "QueueFiller",
    "Reading",
    "Stopwatch",
    "Timer",
    "cuda_timer",
    "host_timer",
]

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


class Enqueued:
    """The reading of work that the host handed to a queue: its seconds there, and the host's."""

    def __init__(self, device_s: Reading, host_s: float) -> None:
        self.device_s = device_s
        self.host_s = host_s
        """What the host took to enqueue it."""

    def __call__(self) -> float:
        """Seconds on the device."""
        return self.device_s()


class CudaStopwatch:
    """Reads the GPU's own clock by events in its queue.

    In a training loop the host is ahead of the GPU, and a kernel begins when the one before it ends. A function timed
    by itself finds an idle GPU instead, which then waits for each launch. So the GPU is told to do nothing for as long
    as the host will take (``ahead_s``), and the function's kernels wait in the queue when the first of them begins.
    """

    CALIBRATION_CYCLES = 2_000_000

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.cycles_per_s = 0.0
        """Of the GPU's clock while it does nothing."""

    def time(self, function: Callable[[], Any], ahead_s: float = 0.0) -> tuple[Any, Enqueued]:
        """See :class:`Stopwatch`.

        Args:
            ahead_s: what the host is expected to take.
        """
        stream = torch.cuda.current_stream(self.device)
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        if ahead_s:
            torch.cuda._sleep(int(ahead_s * self._cycles_per_s()))
        start.record(stream)
        begin = time.perf_counter()
        result = function()
        host_s = time.perf_counter() - begin
        end.record(stream)
        return result, Enqueued(lambda: start.elapsed_time(end) / 1e3, host_s)

    @contextmanager
    def watching(self) -> Iterator[list[str]]:
        """Fill the list with the places in the block at which the host waits for the GPU, as far as PyTorch tells."""
        places: list[str] = []
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                yield places
        finally:
            torch.cuda.set_sync_debug_mode(before)
        places += [f"{warning.filename}:{warning.lineno}" for warning in caught if "synchroniz" in str(warning.message)]

    def finish(self) -> None:
        """See :class:`Stopwatch`."""
        torch.cuda.synchronize(self.device)

    def _cycles_per_s(self) -> float:
        if not self.cycles_per_s:
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            torch.cuda._sleep(self.CALIBRATION_CYCLES)  # brings the clock up
            start.record(torch.cuda.current_stream(self.device))
            torch.cuda._sleep(self.CALIBRATION_CYCLES)
            end.record(torch.cuda.current_stream(self.device))
            self.finish()
            self.cycles_per_s = self.CALIBRATION_CYCLES / (start.elapsed_time(end) / 1e3)
        return self.cycles_per_s


class QueueFiller:
    """Times one thing again and again; where it is enqueued, the queue is filled for as long as the host took before.

    What waits for the GPU empties the queue in a training loop too, and is timed as it is. Nothing is changed on a
    host's stopwatch.
    """

    MORE = 1.2
    """Times what the host took before: it takes longer now and then."""
    MOST_S = 0.05
    """What is made or tuned in a first call takes long, and would be waited for in the next one."""

    def __init__(self) -> None:
        self.host_s = 0.0
        self.waits: bool | None = None
        """Whether the host waits for the GPU in between; not known before the first call."""

    def time(self, stopwatch: Stopwatch, function: Callable[[], Any]) -> tuple[Any, Reading]:
        """See :class:`Stopwatch`."""
        if not isinstance(stopwatch, CudaStopwatch):
            return stopwatch.time(function)
        if self.waits is None:
            with stopwatch.watching() as places:
                result, enqueued = stopwatch.time(function)
            self.waits = bool(places)
        else:
            ahead_s = 0.0 if self.waits else min(self.MORE * self.host_s, self.MOST_S)
            result, enqueued = stopwatch.time(function, ahead_s)
        self.host_s = enqueued.host_s
        return result, enqueued


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
