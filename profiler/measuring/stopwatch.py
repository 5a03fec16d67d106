"""Stopwatches: the host's clock, and a GPU's own."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal, Protocol

import torch

__all__ = [
    "Clock",
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


Clock = Literal["device", "host"]


class Stopwatch(Protocol):
    """Times functions; what it read is known after :meth:`finish`."""

    def clocks(self) -> Iterator[Clock]:
        """The clocks that there are, one at a time: what is timed until the next is meant for this one.

        On a device that computes as it is called both are the same, and there is the device's alone.
        """

    def time(self, function: Callable[[], Any]) -> tuple[Any, Reading]:
        """Call ``function``; its result, and what will give its seconds."""

    def finish(self) -> None:
        """Wait until all that was timed is done."""


class HostStopwatch:
    """For work that is done when the call returns, as on a CPU."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.clock = clock

    def clocks(self) -> Iterator[Clock]:
        """See :class:`Stopwatch`."""
        yield "device"

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
    """Reads the GPU's own clock by events in its queue, and the host's.

    Where the GPU sets the pace of a training loop, the host is ahead of it, and a kernel begins when the one before it
    ends. A function timed by itself finds an idle GPU instead, which then waits for each launch. So for the device's
    clock the GPU is told to do nothing for as long as the host will take (``ahead_s``), and the function's kernels wait
    in the queue when the first of them begins.

    Where the host sets the pace, the queue is all but empty, and to enqueue is cheaper than behind a GPU that does
    nothing. So for the host's clock the queue is left empty.
    """

    CALIBRATION_CYCLES = 2_000_000

    def __init__(self, device: torch.device, clock: Callable[[], float] = time.perf_counter) -> None:
        self.device = device
        self.clock = clock
        self.reads: Clock = "device"
        """The clock that is read; for the device's the queue is filled ahead."""
        self.cycles_per_s = 0.0
        """Of the GPU's clock while it does nothing."""

    def clocks(self) -> Iterator[Clock]:
        """See :class:`Stopwatch`."""
        clocks: tuple[Clock, ...] = ("device", "host")
        for self.reads in clocks:
            yield self.reads
        self.reads = "device"

    def time(self, function: Callable[[], Any], ahead_s: float = 0.0) -> tuple[Any, Enqueued]:
        """See :class:`Stopwatch`. What was enqueued before is waited for: a queue that is full stops the host.

        Args:
            ahead_s: what the host is expected to take.
        """
        self.finish()
        if ahead_s:
            self._idle(ahead_s)
        start = self._mark()
        begin = self.clock()
        result = function()
        host_s = self.clock() - begin
        end = self._mark()
        return result, Enqueued(partial(self._between_s, start, end), host_s)

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

    def _idle(self, seconds: float) -> None:
        """Have the GPU do nothing for so long."""
        torch.cuda._sleep(int(seconds * self._cycles_per_s()))

    def _mark(self) -> Any:
        """A moment in the GPU's queue."""
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def _between_s(self, start: Any, end: Any) -> float:
        seconds: float = start.elapsed_time(end) / 1e3
        return seconds

    def _cycles_per_s(self) -> float:
        if not self.cycles_per_s:
            torch.cuda._sleep(self.CALIBRATION_CYCLES)  # brings the clock up
            start = self._mark()
            torch.cuda._sleep(self.CALIBRATION_CYCLES)
            end = self._mark()
            self.finish()
            self.cycles_per_s = self.CALIBRATION_CYCLES / self._between_s(start, end)
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
            stopwatch.finish()  # which waits for the GPU itself
            with stopwatch.watching() as places:
                result, enqueued = stopwatch.time(function)
            self.waits = bool(places)
        elif stopwatch.reads == "host":
            return stopwatch.time(function)
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
        result, reading = stopwatch.time(function)
        stopwatch.finish()
        return result, reading()

    return timer
