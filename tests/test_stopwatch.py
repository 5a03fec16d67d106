"""Timing work that is enqueued, on a device whose queue is simulated: what a thing takes in a row of others."""

from contextlib import contextmanager

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shardwright.profiler.measuring.stopwatch import CudaStopwatch, QueueFiller


class Queue(CudaStopwatch):
    """A host that launches kernels one by one, and a device that runs them in order; times in s.

    Not more than ``depth`` kernels wait in the queue: then the host waits too. While the device was told to do nothing,
    a launch takes ``behind`` times as long.
    """

    def __init__(self, depth=1000, behind=1.0):
        super().__init__(torch.device("cpu"), lambda: self.now)
        self.now = 0.0  # on the host
        self.free = 0.0  # when the device has done everything
        self.ends = []  # of all kernels
        self.depth = depth
        self.behind, self.idle_until = behind, 0.0

    def _idle(self, seconds):
        self._enqueue(seconds)
        self.idle_until = self.free

    def _mark(self):
        return max(self.free, self.now)

    def _between_s(self, start, end):
        return end - start

    def _enqueue(self, seconds):
        if len(self.ends) >= self.depth:
            self.now = max(self.now, self.ends[-self.depth])
        self.free = max(self.free, self.now) + seconds
        self.ends.append(self.free)

    @contextmanager
    def watching(self):
        self.places = []
        yield self.places

    def finish(self):
        self.now = max(self.now, self.free)

    def kernels(self, kernels):
        """A function that launches each after so long, to run for so long; one that waits has the host wait for it."""

        def function():
            for launch_s, run_s, waits in kernels:
                self.now += launch_s * (self.behind if self.now < self.idle_until else 1.0)
                self._enqueue(run_s)
                if waits:
                    self.places.append("here")
                    self.now = max(self.now, self.free)

        return function


SECONDS = st.integers(1, 50).map(lambda n: n / 1024)
KERNELS = st.lists(st.tuples(SECONDS, SECONDS, st.just(False)), min_size=1, max_size=8)


@given(st.lists(KERNELS, min_size=1, max_size=5))
def test_device_and_host_are_told_apart(steps):
    """Timed one by one on an idle device, as soon as it is known how long the host takes: the device's time in a full
    queue, and the host's time to fill it."""
    queue, fillers = Queue(), [QueueFiller() for _ in steps]
    QueueFiller.MOST_S, before = 10.0, QueueFiller.MOST_S
    try:
        for _ in range(2):
            readings = []
            for filler, kernels in zip(fillers, steps, strict=True):
                readings.append(filler.time(queue, queue.kernels(kernels))[1])
    finally:
        QueueFiller.MOST_S = before
    for reading, kernels in zip(readings, steps, strict=True):
        launched, run = (sum(kernel[side] for kernel in kernels) for side in (0, 1))
        assert reading() == pytest.approx(run)
        assert reading.host_s == pytest.approx(launched)


@given(st.lists(KERNELS, min_size=1, max_size=5), st.integers(8, 12))
def test_a_queue_has_an_end(steps, depth):
    """The host's time is that of an empty queue: neither is it stopped by what is in it, nor slower behind it."""
    queue, fillers = Queue(depth, behind=1.25), [QueueFiller() for _ in steps]
    for _ in range(3):
        for clock in queue.clocks():
            for filler, kernels in zip(fillers, steps, strict=True):
                _, reading = filler.time(queue, queue.kernels(kernels))
                if clock == "host":
                    assert reading.host_s == pytest.approx(sum(launch_s for launch_s, _, _ in kernels))


def test_without_a_full_queue_the_device_waits_for_launches():
    """The first call, of which nothing is known: 1 s for each launch and kernel in turn, but for the last kernels."""
    queue = Queue()
    _, reading = QueueFiller().time(queue, queue.kernels([(1.0, 0.5, False)] * 4))
    assert reading() == 4.5


def test_what_waits_for_the_device_is_timed_as_it_is():
    """A function that reads a value back empties the queue: nothing is filled in, whatever it takes."""
    queue, filler = Queue(), QueueFiller()
    for _ in range(4):
        _, reading = filler.time(queue, queue.kernels([(1.0, 2.0, True), (1.0, 1.0, False)]))
        assert (reading(), reading.host_s) == (5.0, 4.0)  # launch, run and wait, launch, and run


@given(st.lists(st.integers(1, 400), min_size=1, max_size=8))
def test_the_host_is_read_as_it_is(milliseconds):
    """However much longer it takes than before, and than the queue is ever filled for."""
    queue, filler = Queue(), QueueFiller()
    for each in milliseconds:
        _, reading = filler.time(queue, queue.kernels([(each / 1024, 1 / 1024, False)]))
        assert reading.host_s == pytest.approx(each / 1024)
