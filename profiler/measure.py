"""Measurement: the time of one step of the forward, its backward and its parameters' update, on one device.

Steps are measured in rounds: each round runs every step once, in the order of the forward, at every number of
micro-batches. So a step finds the caches as it does in the real run, with its inputs just written and its weights cold,
and a slow second of the machine falls on all steps alike instead of spoiling one of them. Rounds go on until every
step's median is known well enough, or the time for it is used up.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from shardwright.profiler.optimizers import make_optimizer
from shardwright.profiler.structure import map_tensors, tensors_in
from shardwright.profiler.timing import LEAST_REPEATS, Series
from shardwright.profiler.unitgraph import Call
from shardwright.profiler.worker import resident

__all__ = [
    "NO_BLANK",
    "Blank",
    "CudaStopwatch",
    "Goal",
    "HostStopwatch",
    "Stopwatch",
    "Subject",
    "Timer",
    "blank",
    "cuda_timer",
    "host_timer",
    "is_out_of_memory",
    "measure",
    "prepare",
]

Key = TypeVar("Key")
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


class Readings(NamedTuple):
    """What one repeat gave; None for what does not take place."""

    forward: Reading
    backward: Reading | None = None
    update: Reading | None = None
    recompute: Reading | None = None


class Subject:
    """A step made ready to be timed over and over: fresh inputs every time, gradients as a training step leaves."""

    def __init__(
        self, call: Call, device: torch.device, *, train: bool, optimizer: str | None, accumulate: bool
    ) -> None:
        self.train = train
        self.accumulate = accumulate
        self.function = call.function.to(device) if isinstance(call.function, nn.Module) else call.function
        self.context = call.context
        self.leaves, self.spec = pytree.tree_flatten((call.args, call.kwargs))
        self.leaves = [self._leaf(leaf, device) for leaf in self.leaves]
        self.parameters: list[nn.Parameter] = []
        if isinstance(self.function, nn.Module):
            self.function.train(train)
            self.parameters = [p for p in self.function.parameters() if p.requires_grad]
        self.optimizer = make_optimizer(optimizer, self.parameters) if train and optimizer else None
        self.grads: list[Tensor] | None = None
        self.device = device
        self.peak_bytes: int | None = None

    def run(self, stopwatch: Stopwatch) -> Readings:
        """One forward, backward and update, and a forward that keeps nothing."""
        if self.device.type != "cuda":
            return self._run(stopwatch)
        held = torch.cuda.memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        readings = self._run(stopwatch)
        self.peak_bytes = max(0, torch.cuda.max_memory_allocated(self.device) - held)
        return readings

    @staticmethod
    def _leaf(leaf: Any, device: torch.device) -> Any:
        if isinstance(leaf, torch.device):
            return device
        return map_tensors(lambda t: t.detach().to(device).requires_grad_(t.requires_grad), leaf)

    def _forward(self, stopwatch: Stopwatch, *, keeping: bool) -> tuple[Any, Reading]:
        # A copy of each input: units may change theirs in place, and a producer would just have written it.
        args, kwargs = pytree.tree_unflatten([map_tensors(Tensor.clone, leaf) for leaf in self.leaves], self.spec)
        with torch.set_grad_enabled(keeping):
            if self.context is None:
                return stopwatch.time(partial(self.function, *args, **kwargs))
            return stopwatch.time(partial(self.context.run, self.function, args, kwargs))

    def _run(self, stopwatch: Stopwatch) -> Readings:
        output, forward = self._forward(stopwatch, keeping=self.train)
        if not self.train:
            return Readings(forward)
        outputs = [t for _, t in tensors_in(output) if t.requires_grad]
        del output
        backward = update = recompute = None
        if outputs:
            if self.grads is None:
                self.grads = [torch.randn_like(t) for t in outputs]
            if not self.accumulate:
                for parameter in self.parameters:
                    parameter.grad = None
            for leaf in self.leaves:
                if isinstance(leaf, Tensor):
                    leaf.grad = None
            _, backward = stopwatch.time(lambda: torch.autograd.backward(outputs, self.grads))
            del outputs
        if self.optimizer is not None:
            _, update = stopwatch.time(self.optimizer.step)
        if isinstance(self.function, nn.Module) and self.context is None:
            _, recompute = self._forward(stopwatch, keeping=False)
        return Readings(forward, backward, update, recompute)


class Blank(NamedTuple):
    """What a call of the backward and of the optimizer costs with nothing to do, in s: once a step, not once a unit."""

    backward_s: float = 0.0
    update_s: float = 0.0


NO_BLANK = Blank()


def blank(stopwatch: Stopwatch, optimizer: str, *, repeats: int = 41) -> Blank:
    """Measure empty calls on the CPU.

    The backward is that of a view of one number; the update is taken from those of one and of nine parameters of one
    number each, on the line through them, at no parameter.
    """

    def median_s(make: Callable[[], Callable[[], Any]]) -> float:
        readings = [stopwatch.time(make())[1] for _ in range(repeats)]
        stopwatch.finish()
        return float(np.median([reading() for reading in readings[1:]]))

    def backward() -> Callable[[], None]:
        leaf = torch.zeros(1, requires_grad=True)
        return partial(torch.autograd.backward, [leaf.view_as(leaf)], [torch.ones(1)])

    def update_s(count: int) -> float:
        parameters = [nn.Parameter(torch.zeros(1)) for _ in range(count)]
        for parameter in parameters:
            parameter.grad = torch.zeros(1)
        made = make_optimizer(optimizer, parameters)
        assert made is not None  # all are trainable
        return median_s(lambda: made.step)

    one = update_s(1)
    return Blank(median_s(backward), max(0.0, one - (update_s(9) - one) / 8))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device, or the host, had no memory left."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and ("out of memory" in text or "can't allocate memory" in text)


@dataclass(frozen=True)
class Goal:
    """When there has been enough measuring."""

    precision: float = 0.02
    """The half width of the median's 95% confidence interval, relative, at which a step is settled."""
    negligible: float = 0.001
    """A step is settled too when that half width is this part of the time of all steps."""
    repeats: int = 31
    """A step is not timed more often than this."""
    budget_s: float = 45.0
    """Past so many seconds no further round begins, once there are as many as a median needs."""


def measure(
    subjects: Mapping[Key, Subject],
    stopwatch: Stopwatch,
    goal: Goal,
    *,
    on_settled: Callable[[Key, Series], None],
    on_refused: Callable[[Key, Exception], None] | None = None,
    on_round: Callable[[int], None] = lambda _: None,
    between: Callable[[Subject], None] = lambda _: None,
    empty: Blank = NO_BLANK,
    clock: Callable[[], float] = time.monotonic,
) -> list[float]:
    """Time all subjects in turn until each is settled, after one round to warm up.

    What is settled goes on running, so that the others find the caches and the machine as before.

    Args:
        on_settled: told each subject's series as soon as it needs no more.
        on_refused: told the subjects that there is no memory for, and the error, which is raised without it.
        on_round: told the number of each round that is done, 0 for the warm-up.
        between: called before each subject, its time not counted.
        empty: is taken off what is read.

    Returns:
        The seconds of each round over all subjects, the warm-up apart.
    """
    subjects = dict(subjects)
    series = {key: Series() for key in subjects}
    open_ = dict.fromkeys(subjects)
    start, totals = clock(), []
    for round_ in range(max(1, goal.repeats) + 1):
        readings = {}
        for key in list(subjects):
            between(subjects[key])
            try:
                readings[key] = subjects[key].run(stopwatch)
            except Exception as error:
                if on_refused is None or not is_out_of_memory(error):
                    raise RuntimeError(f"{key}: {error}") from error
                on_refused(key, error)
                del subjects[key], series[key]
                open_.pop(key, None)
        stopwatch.finish()
        for key, reading in readings.items():
            _note(series[key], reading, subjects[key], empty, first=round_ == 0)
        if round_:
            totals.append(sum(s.totals()[-1] for s in series.values()))
        on_round(round_)
        whole = sum(s.median_s() for s in series.values())
        ended = round_ >= min(goal.repeats, LEAST_REPEATS) and clock() - start > goal.budget_s
        for key in list(open_):
            enough = series[key].is_settled(goal.precision, goal.negligible * whole)
            if round_ and (enough or ended or round_ >= goal.repeats):
                del open_[key]
                on_settled(key, series[key])
        if not open_:
            break
    return totals


def _note(series: Series, readings: Readings, subject: Subject, empty: Blank, *, first: bool) -> None:
    """Add what one repeat gave."""
    forward_s = readings.forward()
    backward_s = max(0.0, readings.backward() - empty.backward_s) if readings.backward is not None else 0.0
    update_s = max(0.0, readings.update() - empty.update_s) if readings.update is not None else 0.0
    assert math.isfinite(forward_s)
    if first:
        series.first_call_s = forward_s + backward_s
        return
    series.forward_s.append(forward_s)
    series.backward_s.append(backward_s)
    series.update_s.append(update_s)
    if readings.recompute is not None:
        series.recompute_s.append(readings.recompute())
    series.peak_bytes = subject.peak_bytes


def prepare(device: str, threads: int) -> None:
    """Make this process ready to measure on ``device``: what a worker does first."""
    torch.manual_seed(0)
    if device.startswith("cpu"):
        torch.set_num_threads(threads)
    else:
        torch.cuda.set_device(torch.device(device))
    resident["device"] = torch.device(device if device.startswith("cuda") else "cpu")
