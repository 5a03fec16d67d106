"""Measurement: the time of one step of the forward, its backward and its parameters' update, on one device.

Steps are measured in rounds: each round runs every step once, in the order of the forward, at every number of
micro-batches. So a step finds the caches as it does in the real run, with its inputs just written and its weights cold,
and a slow second of the machine falls on all steps alike instead of spoiling one of them.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from shardwright.profiler.optimizers import OPTIMIZERS, make_optimizer, optimizer_state_bytes
from shardwright.profiler.structure import map_tensors, tensors_in
from shardwright.profiler.unitgraph import Call
from shardwright.profiler.worker import report, resident

__all__ = [
    "OPTIMIZERS",
    "Samples",
    "Subject",
    "Timer",
    "host_timer",
    "make_optimizer",
    "measure",
    "optimizer_state_bytes",
    "summary",
]

LEAST_ROUNDS = 3
"""So many are timed even when the budget is used up: a median and a spread need them."""

Timer = Callable[[Callable[[], Any]], tuple[Any, float]]
"""Calls a function and returns its result and the seconds it took."""


def host_timer(clock: Callable[[], float] = time.perf_counter) -> Timer:
    """A timer for work that is done when the call returns, as on a CPU."""

    def timer(function: Callable[[], Any]) -> tuple[Any, float]:
        start = clock()
        result = function()
        return result, clock() - start

    return timer


def cuda_timer(device: torch.device) -> Timer:
    """A timer that reads the device's own clock with events, the queue before them drained."""

    def timer(function: Callable[[], Any]) -> tuple[Any, float]:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize(device)
        start.record(torch.cuda.current_stream(device))
        result = function()
        end.record(torch.cuda.current_stream(device))
        torch.cuda.synchronize(device)
        return result, start.elapsed_time(end) / 1e3

    return timer


@dataclass
class Samples:
    """Seconds of every repeat."""

    forward_s: list[float] = field(default_factory=list)
    backward_s: list[float] = field(default_factory=list)
    update_s: list[float] = field(default_factory=list)
    peak_bytes: int | None = None


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

    def run(self, timer: Timer) -> tuple[float, float, float]:
        """Seconds of one forward, backward and update (0 for what does not take place)."""
        if self.device.type != "cuda":
            return self._run(timer)
        held = torch.cuda.memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        seconds = self._run(timer)
        self.peak_bytes = max(0, torch.cuda.max_memory_allocated(self.device) - held)
        return seconds

    @staticmethod
    def _leaf(leaf: Any, device: torch.device) -> Any:
        if isinstance(leaf, torch.device):
            return device
        return map_tensors(lambda t: t.detach().to(device).requires_grad_(t.requires_grad), leaf)

    def _run(self, timer: Timer) -> tuple[float, float, float]:
        # A copy of each input: units may change theirs in place, and a producer would just have written it.
        args, kwargs = pytree.tree_unflatten([map_tensors(Tensor.clone, leaf) for leaf in self.leaves], self.spec)
        with torch.set_grad_enabled(self.train):
            if self.context is None:
                output, forward_s = timer(partial(self.function, *args, **kwargs))
            else:
                output, forward_s = timer(partial(self.context.run, self.function, args, kwargs))
        del args, kwargs
        if not self.train:
            return forward_s, 0.0, 0.0
        outputs = [t for _, t in tensors_in(output) if t.requires_grad]
        backward_s = update_s = 0.0
        if outputs:
            if self.grads is None:
                self.grads = [torch.randn_like(t) for t in outputs]
            if not self.accumulate:
                for parameter in self.parameters:
                    parameter.grad = None
            for leaf in self.leaves:
                if isinstance(leaf, Tensor):
                    leaf.grad = None
            _, backward_s = timer(lambda: torch.autograd.backward(outputs, self.grads))
        if self.optimizer is not None:
            _, update_s = timer(self.optimizer.step)
        return forward_s, backward_s, update_s


def measure(
    subjects: dict[Any, Subject],
    timer: Timer,
    *,
    rounds: int,
    on_round: Callable[[int], None],
    budget_s: float = float("inf"),
    clock: Callable[[], float] = time.monotonic,
) -> dict[Any, Samples]:
    """Time every subject ``rounds`` times, in turn, after one round to warm up.

    Past ``budget_s`` seconds no further round begins, once there are three (or ``rounds``, if that is fewer).
    """
    samples = {key: Samples() for key in subjects}
    start = clock()
    for round_ in range(rounds + 1):
        if round_ > LEAST_ROUNDS and clock() - start > budget_s:
            break
        for key, subject in subjects.items():
            try:
                forward_s, backward_s, update_s = subject.run(timer)
            except Exception as error:
                raise RuntimeError(f"{key}: {error}") from error
            if round_:
                samples[key].forward_s.append(forward_s)
                samples[key].backward_s.append(backward_s)
                samples[key].update_s.append(update_s)
                samples[key].peak_bytes = subject.peak_bytes
        on_round(round_)
    return samples


def summary(seconds: list[float]) -> tuple[float, float]:
    """Median and interquartile range."""
    low, median, high = np.percentile(seconds, [25, 50, 75])
    return float(median), float(high - low)


# What the profiler calls inside a worker.


def prepare(device: str, threads: int) -> None:
    """Make this process ready to measure on ``device``."""
    torch.manual_seed(0)
    if device.startswith("cpu"):
        torch.set_num_threads(threads)
    else:
        torch.cuda.set_device(torch.device(device))
    resident["subjects"] = {}
    resident["device"] = torch.device(device if device.startswith("cuda") else "cpu")


def add_subject(name: str, calls: dict[int, Call], *, train: bool, optimizer: str) -> None:
    """Take in one step, with its call at each number of micro-batches; they share the module.

    The update is timed with the first of them only: it is one a batch, whatever the number of micro-batches.
    """
    for position, (microbatches, call) in enumerate(calls.items()):
        resident["subjects"][microbatches, name] = Subject(
            call,
            resident["device"],
            train=train,
            optimizer=optimizer if position == 0 else None,
            accumulate=microbatches > 1,
        )


def measure_all(rounds: int, budget_s: float) -> dict[tuple[int, str], Samples]:
    """Measure everything that was taken in, largest micro-batch first."""
    device: torch.device = resident["device"]
    timer = host_timer() if device.type == "cpu" else cuda_timer(device)
    subjects = dict(sorted(resident["subjects"].items(), key=lambda item: item[0][0]))
    return measure(subjects, timer, rounds=rounds, on_round=report, budget_s=budget_s)
