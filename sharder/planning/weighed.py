"""Interleaved stages and zero-bubble weighed against 1F1B: which schedule has the shorter step, and why."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Sequence
from typing import Literal, get_args

from shardwright.errors import ShardwrightError
from shardwright.profiler.profile import Profile
from shardwright.sharder.planning.interleave import possible_devices
from shardwright.sharder.planning.partition import partition
from shardwright.sharder.planning.plan import WORTHWHILE, Objective, OtherSchedule
from shardwright.sharder.planning.pricing import Option, solve_each
from shardwright.sharder.planning.problem import Problem, Recompute, Transfers
from shardwright.sharder.planning.replicas import Replicas
from shardwright.sharder.planning.search import ROUNDING, simple_bound_s
from shardwright.sharder.planning.stage_costs import shares_of
from shardwright.sharder.planning.transfers import traffic_of
from shardwright.sharder.planning.words import name_of
from shardwright.sharder.planning.zero_bubble import divides

__all__ = [
    "Wanted",
    "as_interleaved",
    "as_zero_bubble",
    "better_of",
    "compared",
    "is_zero_bubble",
    "parted_asked",
    "pieces_asked",
    "with_interleaved",
    "with_zero_bubble",
]

Wanted = Literal["1f1b", "gpipe", "interleaved", "zero-bubble", "auto"]
"""``"auto"``: 1F1B, interleaved, or zero-bubble where the profile has the parts of backwards, whichever has the shorter
step."""
WORDS = get_args(Wanted)
ROOM_FOR_ALL = 2**62
MOMENT_S = 0.5
"""So long at least is looked for a bound."""


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
    if schedule not in WORDS:
        raise ShardwrightError(f"schedule {schedule!r} is not known; the planner has: {', '.join(WORDS)}")
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
        raise ShardwrightError(
            "interleaved stages are planned for the objective throughput with relayed transfers, as the pipeline "
            f"engine sends them; not for {objective}, {'' if contiguous else 'free assignment, '}{transfers} transfers"
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
    left_s = max(MOMENT_S, (deadline_s - time.monotonic()) / 4)
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
        deadline_s: of ``time.monotonic()``.

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


def _kind(option: Option) -> tuple[int, int, bool]:
    """By what options differ, the plainest first."""
    return len(option.problem.replicas), option.problem.stages_per_device, is_zero_bubble(option)


def better_of(options: Sequence[Option]) -> Option:
    """The option with the shortest step; more replicas or stages a device have to be worth it, which add messages, and
    backwards in two parts, which hold more."""

    bests = [
        min((option for option in options if _kind(option) == one), key=lambda option: option.step_s)
        for one in sorted(set(map(_kind, options)))
    ]
    found = bests[0]
    for option in bests[1:]:
        found = option if option.step_s * WORTHWHILE <= found.step_s else found
    return found


def compared(chosen: Option, options: Sequence[Option]) -> OtherSchedule | None:
    """The best of the ``options`` with another schedule than ``chosen``; None if there is none."""
    replicas = len(chosen.problem.replicas)
    others = [
        option
        for option in options
        if _kind(option)[1:] != _kind(chosen)[1:]
        and len(option.split.stages) > 1
        and len(option.problem.replicas) == replicas
    ]
    if not others or len(chosen.split.stages) == 1:
        return None
    best = min(others, key=lambda option: option.step_s)
    schedule = best.problem.schedule
    return OtherSchedule(
        schedule=schedule,
        stages_per_device=best.problem.stages_per_device,
        devices=len(shares_of(best.split.stages, best.problem.stages_per_device)) * max(1, replicas),
        microbatches=best.problem.batch_microbatches,
        step_s=best.step_s,
        bubble=max(0.0, best.timeline.bubble),
        transfer_s=_transfer_s(best),
        own_transfer_s=_transfer_s(chosen),
    )


def _transfer_s(option: Option) -> float:
    """Seconds of a step that the device which is longest at it sends and receives."""
    problem, stages = option.problem, option.split.stages
    traffic, count = traffic_of(problem, stages), len(stages) // problem.stages_per_device
    return problem.microbatches * max(
        sum(each.out_s + each.in_s for each in traffic[position::count]) for position in range(count)
    )
