"""Interleaved stages beside one a device: whether they can be asked for, and their best splits."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import get_args

from shardwright.errors import ShardwrightError
from shardwright.profiler.profile import Profile
from shardwright.sharder.planning.plan import Objective
from shardwright.sharder.planning.pricing import Option, solve_each
from shardwright.sharder.planning.problem import Problem, Recompute, Transfers, Wanted
from shardwright.sharder.planning.schedules.interleave import possible_devices

__all__ = ["as_interleaved", "pieces_asked", "with_interleaved"]


def pieces_asked(
    schedule: Wanted,
    asked: int | None,
    objective: Objective,
    transfers: Transfers,
    *,
    contiguous: bool,
    recompute: Recompute = "never",
) -> int:
    """How many stages a device are to be weighed, beside one.

    Raises:
        ShardwrightError: the schedule is not known or does not know so many, or what else is asked for knows one only.
    """
    if schedule not in (known := get_args(Wanted)):
        raise ShardwrightError(f"schedule {schedule!r} is not known; the planner has: {', '.join(known)}")
    if schedule in ("1f1b", "gpipe", "zero-bubble"):
        if asked not in (None, 1):
            raise ShardwrightError(f"{schedule} has one stage a device, not {asked}: ask for --schedule interleaved")
        return 1
    if asked is not None and asked < 2:
        raise ShardwrightError(f"interleaved stages are 2 or more on each device, not {asked}; for 1 ask for 1f1b")
    if recompute == "always" and schedule == "interleaved":
        raise ShardwrightError(
            "interleaved stages are not computed anew: leave out recompute 'always', or ask for 1f1b"
        )
    fits = objective == "throughput" and contiguous and transfers == "relayed" and recompute != "always"
    if not fits and schedule == "interleaved":
        asked_for = f"{objective}, {'' if contiguous else 'free assignment, '}{transfers} transfers"
        raise ShardwrightError(
            "interleaved stages are planned for the objective throughput with relayed transfers, as the pipeline "
            f"engine sends them; not for {asked_for}: leave these out, or the schedule"
        )
    return (asked or 2) if fits else 1


def as_interleaved(problem: Problem, stages_per_device: int, *, train: bool) -> Problem:
    """The same work in so many stages a device, none of them computed anew."""
    return dataclasses.replace(
        problem,
        schedule="interleaved",
        stages_per_device=stages_per_device,
        forward_only=not train,
        recompute="never",
    )


def with_interleaved(
    plain: Sequence[Option],
    problems: Sequence[Problem],
    profile: Profile,
    schedule: Wanted,
    stages_per_device: int,
    deadline_s: float,
) -> list[Option]:
    """The ``plain`` options and, behind them, the best interleaved splits of ``problems``.

    Raises:
        ShardwrightError: there is none, ``schedule`` asks for one, and it is not that nothing fits at all.
    """
    pieces = [as_interleaved(problem, stages_per_device, train=profile.train) for problem in problems]
    try:
        found = _options(pieces, profile, deadline_s)
    except ShardwrightError:
        if schedule == "interleaved" and plain:
            raise
        found = []
    if not found and plain and schedule == "interleaved":
        raise _why_not(pieces)
    return [*plain, *found]


def _options(problems: Sequence[Problem], profile: Profile, deadline_s: float) -> list[Option]:
    """The best split at each number of micro-batches that interleaved rounds can divide, where one fits.

    Args:
        problems: interleaved.
        deadline_s: of ``clock_s()``.

    Raises:
        ShardwrightError: none was found at any number, and at one of them not all were looked at.
    """
    possible = [problem for problem in problems if possible_devices(problem)]
    options, unfinished = solve_each(possible, profile, deadline_s)
    if unfinished is not None and not options:
        raise unfinished
    return options


def _why_not(problems: Sequence[Problem]) -> ShardwrightError:
    """Why no split of ``problems`` has so many stages a device."""
    v, devices, replicas = problems[0].stages_per_device, len(problems[0].devices), max(1, len(problems[0].replicas))
    units = max(sum(bool(block.units) for block in problem.blocks) for problem in problems)
    counts = ", ".join(str(problem.batch_microbatches) for problem in problems)
    if devices < 2 and replicas > 1:
        return ShardwrightError(
            f"interleaved stages need two devices or more in each replica, and each of {replicas} has {devices}: ask "
            "for fewer with --replicas, or plan with --schedule 1f1b"
        )
    if devices < 2:
        return ShardwrightError(f"interleaved stages need two devices or more, and there is {devices}; plan for others")
    if units < 2 * v:
        return ShardwrightError(
            f"{v} stages on each of two devices need {2 * v} units that can be parted, and there are {units}: ask for "
            "fewer with --stages-per-device, or profile smaller units with --depth"
        )
    if not any(possible_devices(problem) for problem in problems):
        where = f"{devices} devices" if replicas == 1 else f"the {devices} devices of each of {replicas} replicas"
        return ShardwrightError(
            f"{counts} micro-batches cannot go around {where} in equal rounds: take a multiple of {devices * replicas}"
        )
    return ShardwrightError(
        f"no split with {v} stages on each device fits the memory, the pins and the links that may be used, at "
        f"{counts} micro-batches: ask for fewer with --stages-per-device, or plan with --schedule 1f1b, which holds "
        "fewer at once"
    )
