"""What no free assignment is below, found without search; the statement is in assignment.py."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from shardwright.sharder.planning.problem import Problem
from shardwright.sharder.planning.wide.device_weights import best_weights

__all__ = ["bound_s", "fluid_bound_s", "grain_bound_s"]


def _work_s(problem: Problem) -> list[list[float]]:
    """By block and device; infinite where a block may not be."""
    return [
        [problem.work_s(v, d) if ok else math.inf for d, ok in enumerate(block.allowed)]
        for v, block in enumerate(problem.blocks)
    ]


def bound_s(problem: Problem) -> float:
    """The work alone, shared out as if it could be divided."""
    return fluid_bound_s(_work_s(problem))


def fluid_bound_s(work_s: Sequence[Sequence[float]]) -> float:
    """What no assignment of divisible work is below; ``work_s`` by block and device, infinite where it may not be."""
    if not work_s:
        return 0.0
    largest = max(min(row) for row in work_s)
    if math.isinf(largest):
        return largest
    by_device = np.array(work_s).T
    weights = np.array(best_weights(by_device, [1] * len(by_device)))
    shared = float((weights[:, None] * by_device).min(axis=0).sum())
    return max(largest, shared) * (1 - 1e-12)  # sums in another order


def grain_bound_s(problem: Problem, ceiling_s: float) -> float:
    """What an assignment with a smaller largest load than ``ceiling_s`` is not below, for whole blocks.

    Such an assignment has no block where it takes longer than the ceiling. Of n blocks that leaves on k devices, one
    device has n / k of them or more, and works at least as long as so many of the smallest take, each where it is
    fastest. The n are those with the most work, for every n.
    """
    work_s = [[s if s < ceiling_s else math.inf for s in row] for row in _work_s(problem)]
    work_s.sort(key=min, reverse=True)
    homes: set[int] = set()
    best = 0.0
    for count, row in enumerate(work_s, start=1):
        homes |= {d for d, s in enumerate(row) if math.isfinite(s)}
        if not homes:
            return math.inf
        together = -(-count // len(homes))
        best = max(best, sum(min(other) for other in work_s[count - together : count]))
    return best * (1 - 1e-12)  # sums in another order
