"""The pace of a CPU worker: what a fixed piece of work takes there at the moment.

A core of a shared machine computes at one speed now and at another a few seconds later: others use what it shares with
them, and its clock goes up and down. That is not the model's doing, and it is the same for all work: on two cores of a
virtual machine the steps of four models followed the pace with a correlation of 0.8 to 0.9, and in proportion to it
(docs/accuracy.md). So the pace is taken along with every round of measuring and with every step of a run: times are
compared at one pace, and a run can say whether the machine or the prediction was off.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

__all__ = ["Pace", "pace_here"]

SIZE = 256
"""Rows and columns: three such matrices stay in the caches next to a core, so that what else is in memory is no
matter."""
PRODUCTS = 20


class Pace:
    """Seconds of a fixed number of products of small matrices, on this process's cores.

    Args:
        clock: seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.clock = clock
        self.factor = torch.full((SIZE, SIZE), 1.0 / SIZE)
        self.product = torch.empty(SIZE, SIZE)

    def __call__(self) -> float:
        """Seconds, now."""
        with torch.no_grad():
            start = self.clock()
            for _ in range(PRODUCTS):
                torch.mm(self.factor, self.factor, out=self.product)
            return self.clock() - start


def pace_here() -> float:
    """The pace of this process: what a worker is asked for between steps."""
    return Pace()()
