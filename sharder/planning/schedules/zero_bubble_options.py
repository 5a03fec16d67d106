"""Zero-bubble beside 1F1B: whether it can be asked for, and its best splits.

The schedule is in :mod:`shardwright.sharder.planning.schedules.zero_bubble`.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Sequence

from shardwright.errors import ShardwrightError
from shardwright.profiler.profile import Profile
from shardwright.sharder.planning.clock import clock_s
from shardwright.sharder.planning.exact.search import ROUNDING, simple_bound_s
from shardwright.sharder.planning.formulation.words import name_of
from shardwright.sharder.planning.partition import partition
from shardwright.sharder.planning.plan import Objective
from shardwright.sharder.planning.pricing import Option, solve_each
from shardwright.sharder.planning.problem import Problem, Recompute, Transfers, Wanted
from shardwright.sharder.planning.schedules.replicas import Replicas
from shardwright.sharder.planning.schedules.zero_bubble import divides

__all__ = ["as_zero_bubble", "is_zero_bubble", "parted_asked", "with_zero_bubble"]

ROOM_FOR_ALL = 2**62
MOMENT_S = 0.5
"""So long at least is looked for a bound."""


def parted_asked(
    profile: Profile,
    schedule: Wanted,
    objective: Objective,
    transfers: Transfers,
    *,
    contiguous: bool,
    recompute: Recompute,
    replicas: Replicas,
) -> bool:
    """Whether zero-bubble is to be weighed, as far as the arguments tell.

    Raises:
        ShardwrightError: it is asked for, and something else that is cannot go with it.
    """
    other = (
        "inference, which has no backward"
        if not profile.train
        else f"the objective {objective}"
        if objective != "throughput"
        else "a free assignment"
        if not contiguous
        else f"{transfers} transfers"
        if transfers != "relayed"
        else "stages that are computed anew (recompute 'always')"
        if recompute == "always"
        else f"{replicas} replicas"
        if replicas not in (1, "auto")
        else ""
    )
    if other and schedule == "zero-bubble":
        raise ShardwrightError(
            f"zero-bubble does not go with {other}: it is for training by one pipeline of stages that keep what they "
            "save and relay tensors; leave that out, or ask for --schedule 1f1b"
        )
    return schedule in ("zero-bubble", "auto") and not other


def as_zero_bubble(problem: Problem) -> Problem:
    """The same work with every backward in two parts, and nothing computed anew."""
    return dataclasses.replace(problem, schedule="zero-bubble", recompute="never")


def is_zero_bubble(option: Option) -> bool:
    """Whether the backwards of ``option`` are in two parts."""
    return option.problem.schedule == "zero-bubble"


def with_zero_bubble(
    others: Sequence[Option], problems: Sequence[Problem], profile: Profile, schedule: Wanted, deadline_s: float
) -> list[Option]:
    """The options of ``others`` and, behind them, the best splits of ``problems`` under zero-bubble.

    Raises:
        ShardwrightError: there is none, ``schedule`` asks for one, and it is not that nothing fits at all.
    """
    asked = schedule == "zero-bubble"
    unknown = next((lack for problem in problems if (lack := _without_parts(problem))), "")
    if unknown:
        if not asked:
            return [*others]
        remedy = (
            "profile again with --split-backward (sw.profile(..., split_backward=True))"
            if profile.of_model
            else "give each unit backward_input_s and backward_weight_s"
        )
        raise ShardwrightError(
            f"zero-bubble needs the two parts of each backward, and {profile.model} lacks those of {unknown}: {remedy}"
        )
    options, unfinished = solve_each([as_zero_bubble(problem) for problem in problems], profile, deadline_s)
    options = [_as_proven(o, deadline_s) for o in options if len(o.split.stages) > 1]
    found = [o for o in options if divides(len(o.split.stages), o.problem.microbatches)]
    if asked and not found and options:
        stages, counts = len(options[0].split.stages), ", ".join(str(o.problem.microbatches) for o in options)
        raise ShardwrightError(
            f"{counts} micro-batches cannot go through {stages} stages in equal rounds, as PyTorch's zero-bubble "
            f"schedule takes them: take a multiple of {stages}"
        )
    if asked and not found and others:
        raise unfinished or ShardwrightError(
            "no split into two stages or more under zero-bubble was found to fit, each counted at the place in the "
            "pipeline that holds most, with a smaller largest load than one device: "
            "ask for --schedule 1f1b, which holds fewer micro-batches at once"
        )
    return [*others, *found]


def _as_proven(option: Option, deadline_s: float) -> Option:
    """The option with a bound on all splits, however many stages they have.

    Which stages fit depends on how many there are: the search takes each to be where it holds most, so that its own
    bound is on splits that fit there. A bound on all is that of devices with room for anything.
    """
    problem, split = option.problem, option.split
    if problem.most_stages < 3:  # there is one place each
        return option
    roomy = dataclasses.replace(problem, caps=(ROOM_FOR_ALL,) * len(problem.devices))
    left_s = max(MOMENT_S, (deadline_s - clock_s()) / 4)
    bound_s = simple_bound_s(roomy)
    with contextlib.suppress(ShardwrightError):  # nothing was found in the time
        found = partition(roomy, time_limit_s=left_s)
        bound_s = bound_s if found is None else found.bound_s
    bound_s = min(bound_s, split.value_s)
    exact = bound_s >= split.value_s * (1 - ROUNDING)
    proven = dataclasses.replace(split, bound_s=split.value_s if exact else bound_s, exact=exact)
    return dataclasses.replace(option, split=proven)


def _without_parts(problem: Problem) -> str:
    """A unit, or glue, of whose backward the parts are not known."""
    return next((name_of(block) for block in problem.blocks if not block.parts_s), "")
