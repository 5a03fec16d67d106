"""Other schedules beside a plan by 1F1B that asked for none of them: how long a step would take with each.

They are looked for in a moment only, so that their splits are seldom the best of their kind: with ``--schedule auto``
they are weighed with the time that there is.
"""

from __future__ import annotations

from typing import Literal

from shardwright.profiler.profile import Profile
from shardwright.sharder.planning.clock import clock_s
from shardwright.sharder.planning.options import Asked
from shardwright.sharder.planning.plan import Alternative
from shardwright.sharder.planning.pricing import Option, solve_each
from shardwright.sharder.planning.problem import Problem
from shardwright.sharder.planning.schedules.interleave import possible_devices
from shardwright.sharder.planning.schedules.interleaved_options import as_interleaved
from shardwright.sharder.planning.schedules.zero_bubble import divides
from shardwright.sharder.planning.schedules.zero_bubble_options import as_zero_bubble

__all__ = ["rival_schedules"]

SHARE, MOST_S = 0.1, 0.3
"""Of the time for the search, what is taken, and so many seconds at most."""
MOST_TIMES = 2_000
"""For more blocks times devices nothing is found in a moment."""
PIECES = 2
"""Stages on a device."""


def rival_schedules(
    chosen: Option, asked: Asked, profile: Profile, baseline_s: float | None, deadline_s: float
) -> tuple[Alternative, ...]:
    """The step with interleaved stages, and with zero-bubble where the parts of backwards are known, if splits were
    found.

    Args:
        chosen: a split into several stages of one pipeline under 1F1B.
        asked: what was weighed already.
        deadline_s: of ``clock_s()``.
    """
    problem = chosen.problem
    small = len(problem.devices) * len(problem.blocks) <= MOST_TIMES
    if asked.schedule != "1f1b" or problem.transfers != "relayed" or problem.recompute == "always" or not small:
        return ()
    others: dict[Literal["interleaved", "zero-bubble"], Problem] = {}
    pieces = as_interleaved(problem, PIECES, train=profile.train)
    if possible_devices(pieces):
        others["interleaved"] = pieces
    if profile.train and all(block.parts_s for block in problem.blocks):
        others["zero-bubble"] = as_zero_bubble(problem)
    found = []
    for position, (name, other) in enumerate(others.items()):
        left_s = min(MOST_S, SHARE * max(0.0, deadline_s - clock_s())) / (len(others) - position)
        options, _ = solve_each([other], profile, clock_s() + left_s)
        for option in options:
            devices = len(option.split.stages) // option.problem.stages_per_device
            if devices < 2 or (name == "zero-bubble" and not divides(devices, problem.microbatches)):
                continue
            found.append(
                Alternative(
                    name=name,
                    microbatches=option.problem.batch_microbatches,
                    devices=devices,
                    step_s=option.step_s,
                    speedup=baseline_s / option.step_s if baseline_s and option.step_s else None,
                )
            )
    return tuple(found)
