"""The pace of a device's processor: what a fixed piece of work takes there at the moment.

A core of a shared machine computes at one speed now and at another a few seconds later: others use what it shares with
them, and its clock goes up and down. That is not the model's doing. So the pace is taken along
with every round of measuring and with every step of a run: times are compared at one pace, and a run can say whether
the machine or the prediction was off.

A CPU worker's pace is that of a training step of two small layers: products of matrices, what is done by element, and
calls. No one piece of work goes up and down exactly as another does: on two cores of a virtual machine the steps of
five models followed this one with a correlation of 0.8 to 0.9, as its power of 0.6 to 1.0 (products of matrices alone:
0.7 to 1.7; see docs/accuracy.md). A GPU's clock is steady, while the processor that enqueues its work is not: the pace
there is that of calling small operations, and it is the host's times that go by it.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from shardwright.profiler.workers.worker import resident

__all__ = ["Pace", "pace_now", "pace_of"]

SIZE = 256
"""Rows and columns: such matrices stay in the caches next to a core, so that what else is in memory is no matter."""
LAYERS, STEPS = 2, 2
CALLS = 2000


class Pace:
    """Seconds that a number of calls of ``work`` take in this process, after as many that warm up.

    What ran before leaves the caches without what these calls need, some work more than other; right after a round of
    measuring they took a tenth longer than after themselves. It is to be asked while the core is at work: of one that
    was idle for a tenth of a second, the first milliseconds take twice as long, and the next ones a quarter longer.

    Args:
        clock: seconds.
    """

    def __init__(self, work: Callable[[], object], calls: int, clock: Callable[[], float] = time.perf_counter) -> None:
        self.work, self.calls, self.clock = work, calls, clock

    def __call__(self) -> float:
        """Seconds, now."""
        for _ in range(self.calls):
            self.work()
        start = self.clock()
        for _ in range(self.calls):
            self.work()
        return self.clock() - start


def pace_of(device: torch.device) -> Pace:
    """The pace that times on ``device`` go by: of its own products, or of the host that enqueues its work."""
    if device.type == "cpu":
        return Pace(_small_step(), STEPS)
    small = torch.zeros(4)
    return Pace(lambda: small + 1, CALLS)


def _small_step() -> Callable[[], tuple[Tensor, ...]]:
    """Forward and backward of some layers, by tensors that take no random number to make."""
    x = torch.linspace(-1.0, 1.0, SIZE * SIZE).reshape(SIZE, SIZE)
    weights = [torch.eye(SIZE).requires_grad_() for _ in range(LAYERS)]

    def work() -> tuple[Tensor, ...]:
        with torch.enable_grad():
            y = x
            for weight in weights:
                y = F.gelu(F.layer_norm(y @ weight, (SIZE,)))
            return torch.autograd.grad(y.sum(), weights)

    return work


def pace_now() -> float:
    """Seconds, of this worker's device."""
    if "pace" not in resident:
        resident["pace"] = pace_of(resident["device"])
    pace: Pace = resident["pace"]
    return pace()
