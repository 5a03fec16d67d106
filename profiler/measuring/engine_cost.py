"""What PyTorch's pipeline engine takes for itself: a pipeline of the CPU workers whose own work is timed inside it.

Between a stage's own forwards and backwards the engine divides, checks and hands on tensors, makes up messages, posts
them and lets go of what is done. Each worker is a stage that goes through memory, as a real one does, so that the
engine finds the caches as in a real step, and times what it does itself. What is left of the worker's step, when its
own work and the waits for messages are taken off, is the engine's; it is the same for each forward and each backward.

The clock is the processor time of the thread. By a clock on the wall the threads that send and receive on the same core
count too, whenever they come between; with so little work beside them that is two to five times the engine's own time,
and another in each step.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

__all__ = ["LEAST_MICROBATCHES", "Spent", "engine_s_of", "engine_steps"]

LEAST_MICROBATCHES = 8
STEPS, WARMUP = 9, 2
MEMORY_BYTES = 1 << 22
"""What each forward and backward goes through: more than the caches of one core hold."""
MESSAGE_SHAPE = (4, 64)


class Spent:
    """Seconds of one step that were spent on something, added up."""

    def __init__(self, clock: Callable[[], float] = time.thread_time) -> None:
        self.clock = clock
        self.seconds = 0.0

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Add what the block takes."""
        start = self.clock()
        try:
            yield
        finally:
            self.seconds += self.clock() - start


class _Work(torch.autograd.Function):
    """Hands on what it gets, there and back, and goes through memory meanwhile."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, memory: Tensor, spent: Spent) -> Tensor:
        ctx.memory, ctx.spent = memory, spent
        with spent.timed():
            memory.add_(1)
            return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        with ctx.spent.timed():
            ctx.memory.add_(1)
            return gradients[0].clone(), None, None


class _Stage(nn.Module):
    """A stage of one number and the work."""

    def __init__(self, spent: Spent) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.memory = torch.zeros(MEMORY_BYTES, dtype=torch.uint8)
        self.spent = spent

    def forward(self, x: Tensor) -> Tensor:
        """Hand on the product of the two."""
        found: Tensor = _Work.apply(x * self.scale, self.memory, self.spent)  # type: ignore[no-untyped-call]
        return found


def engine_s_of(steps: dict[str, list[float]]) -> float:
    """Seconds of the engine for each operation: the median over the steps of each worker, then their mean."""
    return statistics.fmean(statistics.median(each) for each in steps.values())


# What runs inside the workers.


def engine_steps(rank: int, size: int, train: bool, clock: Callable[[], float] = time.thread_time) -> list[float]:
    """Take steps as stage ``rank`` of ``size``; of each, without the warm-up, the engine's seconds for an operation.

    The worker is in a process group of so many. An operation is a forward or, in training, a backward of one
    micro-batch: by 1F1B, and in inference by GPipe.
    """
    from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe, schedules

    microbatches = max(LEAST_MICROBATCHES, 2 * size)
    operations = (1 + train) * microbatches
    own, waits = Spent(clock), Spent(clock)
    example = torch.zeros(MESSAGE_SHAPE, requires_grad=train and rank > 0)
    device = torch.device("cpu")
    output = torch.zeros(MESSAGE_SHAPE, requires_grad=train)
    stage = PipelineStage(_Stage(own), rank, size, device, input_args=(example,), output_args=(output,))

    def loss(output: Tensor, target: Tensor) -> Tensor:
        return (output * target).sum()

    schedule = (
        Schedule1F1B(stage, microbatches, loss_fn=loss, scale_grads=False)
        if train
        else ScheduleGPipe(stage, microbatches)
    )
    batch = torch.ones(microbatches * MESSAGE_SHAPE[0], MESSAGE_SHAPE[1])
    inputs = [batch] if rank == 0 else []
    found = []
    wait = schedules._wait_batch_p2p

    def timed_wait(works: list[dist.Work]) -> None:
        with waits.timed():
            wait(works)

    schedules._wait_batch_p2p = timed_wait  # type: ignore[assignment]  # it returns None too
    try:
        for _ in range(WARMUP + STEPS):
            own.seconds = waits.seconds = 0.0
            start = clock()
            with torch.set_grad_enabled(train):
                schedule.step(*inputs, target=batch if train and rank == size - 1 else None, return_outputs=False)
            found.append((clock() - start - own.seconds - waits.seconds) / operations)
    finally:
        schedules._wait_batch_p2p = wait
    return [max(0.0, seconds) for seconds in found[WARMUP:]]
