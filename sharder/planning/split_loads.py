"""What the stages of a split take, by the formulas of problem.py."""

from __future__ import annotations

import math
from collections.abc import Sequence

from shardwright.sharder.planning.exact.transfers import load_s, traffic_of
from shardwright.sharder.planning.problem import Problem, bits
from shardwright.sharder.planning.schedules.interleave import device_loads, piece_loads

__all__ = ["largest_load_s", "stage_loads"]


def stage_loads(problem: Problem, stages: Sequence[tuple[int, int]]) -> list[float] | None:
    """The load of each stage in seconds of a step, or None when a stage has no unit, breaks a pin or does not fit."""
    if problem.stages_per_device > 1:
        return piece_loads(problem, tuple(stages))
    work_s = []
    closed = 0
    for position, (device, members) in enumerate(stages):
        after = len(stages) - 1 - position
        blocks = [problem.blocks[v] for v in bits(members)]
        if not any(block.units for block in blocks) or not all(block.allowed[device] for block in blocks):
            return None
        more_s = problem.more_s(closed, closed | members, device, after)
        if math.isinf(more_s):
            return None
        closed |= members
        work_s.append(sum(problem.work_s(v, device) for v in bits(members)) + problem.ties_s(members, device) + more_s)
    return [load_s(problem, *parts) for parts in zip(work_s, traffic_of(problem, stages), strict=True)]


def largest_load_s(problem: Problem, stages: Sequence[tuple[int, int]]) -> float | None:
    """The largest load of a device, or None where a stage has no unit, breaks a pin or does not fit."""
    loads = stage_loads(problem, stages)
    if loads is not None and problem.stages_per_device > 1:
        loads = device_loads(problem, tuple(stages))
    return None if loads is None else max(loads)
