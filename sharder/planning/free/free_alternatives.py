"""What one would do without a planner, beside a plan that is no chain of stages, priced as that plan is.

The naive splits are assignments like any other: under latency each device runs its part in the order of the forward,
else the largest load is what counts. Data parallel, under latency, shares one input out over the devices.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Literal

from shardwright.profiler.profile import Profile
from shardwright.sharder.planning.exact.even import NAIVE, cut_evenly
from shardwright.sharder.planning.formulation.relaxed import unpinned
from shardwright.sharder.planning.free.assignment import largest_load_s, obeys
from shardwright.sharder.planning.free.free_record import Found
from shardwright.sharder.planning.free.latency import Race
from shardwright.sharder.planning.plan import Alternative
from shardwright.sharder.planning.problem import Problem
from shardwright.sharder.planning.verdict.alternatives import data_parallel, with_speedups

__all__ = ["alternatives_freely"]


def alternatives_freely(
    found: Found, every: Sequence[Problem], profile: Profile, baseline_s: float | None
) -> tuple[Alternative, ...]:
    """The alternatives to ``found``, pins aside; none where there is one device.

    Args:
        every: the problems at all profiled numbers of micro-batches.
        baseline_s: what one device takes.
    """
    problem = unpinned(found.problem)
    devices = len(problem.devices)
    if devices < 2:
        return ()
    if found.schedule is None:
        value_s: Callable[[Sequence[int]], float] = lambda of: largest_load_s(problem, of)  # noqa: E731
        shared = every
    else:
        race = Race(problem)
        value_s = lambda of: race.schedule(of, race.forward.order, race.backward.order).value_s  # noqa: E731
        parts = [one for one in every if one.microbatches == devices * found.microbatches]
        shared = [dataclasses.replace(one, microbatches=devices) for one in parts]
    naive = [_naive(name, problem, value_s, found.microbatches) for name in NAIVE]
    if shared:
        parallel = data_parallel(shared, profile)
    else:
        why = f"no profile of 1/{devices} of an input: {devices * found.microbatches} micro-batches"
        parallel = Alternative(name="data parallel", microbatches=1, devices=devices, step_s=None, why=why)
    if found.schedule is not None:
        parallel = parallel.model_copy(update={"microbatches": found.microbatches})
    return with_speedups([*naive, parallel], baseline_s)


def _naive(
    name: Literal["equal count", "by parameters"],
    problem: Problem,
    value_s: Callable[[Sequence[int]], float],
    microbatches: int,
) -> Alternative:
    """The naive split of that ``name`` over most of the devices that hold their parts."""
    weights, most = [NAIVE[name](block) for block in problem.blocks], min(len(problem.devices), len(problem.blocks))
    why = "none fits that gives each device a unit"
    for count in range(most, 1, -1):
        ends = cut_evenly(weights, count)
        of = [sum(end <= v for end in ends) for v in range(len(weights))]
        if not obeys(problem, of):
            continue
        if math.isinf(step_s := value_s(of)):
            why = "a link is not to be used"
            continue
        return Alternative(name=name, microbatches=microbatches, devices=count, step_s=step_s)
    return Alternative(name=name, microbatches=microbatches, devices=max(most, 1), step_s=None, why=why)
