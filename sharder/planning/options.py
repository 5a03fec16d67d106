"""The options of a plan: the best splits at each number of micro-batches and of replicas, and under each schedule.

What only a refusal or several replicas need is imported there, as in planner.py.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import NamedTuple

from shardwright.errors import ShardwrightError
from shardwright.profiler.profile import Profile
from shardwright.sharder.planning.clock import clock_s
from shardwright.sharder.planning.pricing import LEAST_SHORTER, Option, price, solve_each, with_short_step
from shardwright.sharder.planning.problem import Problem, Wanted
from shardwright.sharder.planning.schedules.interleaved_options import with_interleaved
from shardwright.sharder.planning.schedules.replicas import Replicas, possible_replicas
from shardwright.sharder.planning.schedules.zero_bubble_options import with_zero_bubble
from shardwright.sharder.planning.verdict.offload import Offload, Rates, offload_least
from shardwright.sharder.planning.verdict.offload import offload as offload_some

__all__ = ["Asked", "nothing_fits", "options_of", "rates_of"]


MAY_WIN = 1.3
"""For an option whose step is longer than so many times the shortest, no split with a shorter one is looked for."""


class Asked(NamedTuple):
    """What is weighed."""

    schedule: Wanted
    pieces: int
    """Stages on a device."""
    parted: bool
    """Whether backwards in two parts are."""
    replicas: Replicas
    offload: bool


def options_of(problems: list[Problem], profile: Profile, asked: Asked, deadline_s: float) -> list[Option]:
    """The best splits for each number of replicas, at each number of micro-batches; those of one stage a device first.

    Raises:
        ShardwrightError: there is none.
    """
    auto = asked.replicas == "auto"
    counts = [1, *possible_replicas(len(problems[0].devices))] if asked.replicas == "auto" else [asked.replicas]
    found: list[Option] = []
    unfinished: ShardwrightError | None = None
    for position, count in enumerate(counts):
        now_s = clock_s()
        until_s = now_s + max(0.0, deadline_s - now_s) / (len(counts) - position)
        try:
            if count == 1:
                options, error = _solved(problems, profile, asked, until_s)
            else:
                from shardwright.sharder.planning.schedules.replicated import with_replicas

                rest = asked._replace(offload=False, parted=False)
                solved = partial(_solved, profile=profile, asked=rest, deadline_s=until_s)
                options, error = with_replicas(problems, profile, count, solved)
        except ShardwrightError:
            if not auto or count == 1:
                raise
            continue  # so many cannot share the micro-batches, or cannot sum
        found += options
        unfinished = unfinished or error
    if not found and unfinished is None and counts[0] > 1:
        from shardwright.sharder.planning.schedules.replicated import nothing_fits_in

        raise nothing_fits_in(problems, counts[0])
    if not found:
        raise unfinished or nothing_fits(problems, profile, deadline_s, offload=asked.offload)
    most_s = MAY_WIN * min(option.shortest.step_s for option in found)
    found = [with_short_step(o, profile) if o.shortest.step_s <= most_s else o.shortest for o in found]
    return sorted(found, key=lambda option: option.problem.stages_per_device)


def _solved(
    problems: list[Problem], profile: Profile, asked: Asked, deadline_s: float
) -> tuple[list[Option], ShardwrightError | None]:
    """The best split of each of ``problems``, and of each in several stages a device if asked for."""
    now_s = clock_s()
    more = (asked.pieces > 1) + asked.parted
    share_s = max(0.0, deadline_s - now_s) / (1 + more)
    options, unfinished = solve_each(problems, profile, now_s + share_s)
    if not options and asked.offload and not profile.train:
        options = _offloaded(problems, profile, deadline_s)
    if asked.pieces > 1:
        until_s = deadline_s - share_s * asked.parted
        options = with_interleaved(options, problems, profile, asked.schedule, asked.pieces, until_s)
    if asked.parted:
        options = with_zero_bubble(options, problems, profile, asked.schedule, deadline_s)
    return options, unfinished


def nothing_fits(
    problems: list[Problem], profile: Profile, deadline_s: float, *, offload: bool = False
) -> ShardwrightError:
    """Why no split of ``problems`` fits, and what would; with ``offload``, what the host lacks for that."""
    from shardwright.sharder.planning.verdict.infeasible import why_nothing_fits

    why = why_nothing_fits(problems, deadline_s, batch=profile.batch, train=profile.train)
    more = _room_on_host(problems, profile, deadline_s) if offload and not profile.train else ""
    return ShardwrightError(f"{why}{more}")


def _room_on_host(problems: list[Problem], profile: Profile, deadline_s: float) -> str:
    """How much free memory of the host would let weights stay there, so that a split fits; nothing if none does."""
    from shardwright.sharder.planning.formulation.words import size_of

    problem = max(problems, key=lambda p: p.microbatches)
    ample = rates_of(profile, problem)._replace(host_bytes=sum(block.static_bytes for block in problem.blocks))
    if not any(ample.fetch):
        return ""
    left_s = max(0.5, deadline_s - clock_s()) / 2
    try:
        some = offload_some(problem, ample, time_limit_s=left_s)
        found = some and (offload_least(problem, ample, some, time_limit_s=left_s) or some)
    except ShardwrightError:
        return ""
    if found is None:
        return ""
    needed = sum(problem.blocks[v].static_bytes for v, tier in found.tiers.items() if tier == "cpu")
    return (
        f"; or free {size_of(needed)} of the host's memory for weights to stay there ({size_of(profile.host_bytes)} "
        "are free)"
    )


def _offloaded(problems: list[Problem], profile: Profile, deadline_s: float) -> list[Option]:
    """The last resort: at each number of micro-batches a split with the weights of some blocks elsewhere."""
    options = []
    for position, problem in enumerate(problems):
        rates = rates_of(profile, problem)
        share_s = max(0.5, (deadline_s - clock_s()) / (len(problems) - position)) / 2
        found = offload_some(problem, rates, time_limit_s=share_s)
        if found is None:
            continue
        option = _priced(problem, found, profile)
        options.append(option)
        if len(problem.devices) == 1:
            continue  # a step is the load
        fewer = offload_least(problem, rates, found, time_limit_s=share_s)
        other = option if fewer is None else _priced(problem, fewer, profile)
        if other.step_s < option.step_s * (1 - LEAST_SHORTER):
            larger = other.split.value_s > option.split.value_s
            options[-1] = dataclasses.replace(other, least=option if larger else None)
    return options


def _priced(problem: Problem, found: Offload, profile: Profile) -> Option:
    option = price(found.problem, found.split, profile)
    return dataclasses.replace(option, tiers=found.tiers, resident=problem)


def rates_of(profile: Profile, problem: Problem) -> Rates:
    """How fast offloaded weights come to the devices of ``problem``."""
    fetch = {device.name: device.fetch_bytes_per_s for device in profile.devices}
    return Rates(tuple(fetch[name] for name in problem.devices), profile.disk_bytes_per_s, profile.host_bytes)
