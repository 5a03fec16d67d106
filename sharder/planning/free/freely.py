"""Plans that are no chain of stages, and plans of the objectives latency and memory: from problems to records."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Sequence

from shardwright.errors import ShardwrightError
from shardwright.profiler.profile import Profile
from shardwright.sharder.planning.clock import clock_s
from shardwright.sharder.planning.formulation.relaxed import unpinned
from shardwright.sharder.planning.free.assign import assign
from shardwright.sharder.planning.free.assignment import (
    Assignment,
    Budget,
    as_free,
)
from shardwright.sharder.planning.free.fastest import fastest
from shardwright.sharder.planning.free.free_record import Alone, Found, Writer, peak_share
from shardwright.sharder.planning.free.latency import Race
from shardwright.sharder.planning.free.least_memory import (
    LeastShare,
    larger_batch,
    largest_batch,
    least_share,
    least_share_freely,
    stages_fit,
    within_share,
)
from shardwright.sharder.planning.partition import partition
from shardwright.sharder.planning.plan import (
    LargerBatch,
    Objective,
    Plan,
)
from shardwright.sharder.planning.pricing import Option, baseline_of
from shardwright.sharder.planning.problem import Problem, bits

__all__ = ["for_memory", "least_of", "plan_freely"]


def plan_freely(
    profile: Profile,
    problems: Sequence[Problem],
    every: Sequence[Problem],
    *,
    objective: Objective,
    time_limit_s: float,
) -> Plan:
    """The best plan that puts each unit on any device.

    Args:
        profile: times and sizes.
        problems: at the numbers of micro-batches that may be chosen.
        every: at all profiled numbers, for the baseline.
        objective: see :func:`~shardwright.sharder.planning.planner.plan`.
        time_limit_s: for all of it; after it, or Ctrl-C, the best so far with an honest gap.

    Raises:
        ShardwrightError: nothing fits, or nothing was found in the time.
    """
    budget = Budget(time_limit_s)
    found: list[Found] = []
    unfinished: ShardwrightError | None = None
    for position, problem in enumerate(map(as_free, problems)):
        with budget.part(len(problems) - position) as part:
            try:
                one = _solve(problem, objective, part)
            except ShardwrightError as error:
                unfinished = error
                continue
            if one is not None:
                found.append(one)
    if not found:
        raise unfinished or _nothing_fits(profile, [*map(as_free, problems)], objective, budget)
    best = min(found, key=lambda one: one.rank)
    return Writer(profile, best).plan(objective, _baseline(profile, best, every))


def _nothing_fits(
    profile: Profile, problems: Sequence[Problem], objective: Objective, budget: Budget
) -> ShardwrightError:
    """Why no assignment fits, and what would; only a refusal imports that."""
    from shardwright.sharder.planning.free.unfitting import why_no_assignment_fits

    until_s, latency = clock_s() + budget.left_s, objective == "latency"
    why = why_no_assignment_fits(problems, until_s, batch=profile.batch, train=profile.train, latency=latency)
    return ShardwrightError(why)


def _solve(problem: Problem, objective: Objective, budget: Budget) -> Found | None:
    if sum(block.static_bytes for block in problem.blocks) > sum(problem.caps):
        return None
    seeds = _seeds(problem, budget)
    if objective == "latency":
        quickest = fastest(problem, budget, seeds)
        if quickest is None:
            return None
        schedule = quickest.schedule
        found = Assignment(schedule.of, schedule.value_s, quickest.bound_s, quickest.exact)
        return Found(
            dataclasses.replace(problem, microbatches=1), found, schedule=schedule, microbatches=problem.microbatches
        )
    if objective == "memory":
        with budget.part(2) as part:
            share = least_share_freely(problem, part, seeds)
        if share is None:
            return None
        lightest = assign(within_share(problem, share.value), budget, [share.of])
        return None if lightest is None else Found(problem, lightest, share, None, problem.microbatches)
    lightest = assign(problem, budget, seeds)
    return None if lightest is None else Found(problem, lightest, None, None, problem.microbatches)


def _seeds(problem: Problem, budget: Budget) -> list[list[int]]:
    """The best chain of stages, if a fifth of the time finds one."""
    with contextlib.suppress(ShardwrightError):
        split = partition(problem, time_limit_s=budget.left_s / 5)
        if split is not None:
            stage_of = {v: device for device, members in split.stages for v in bits(members)}
            return [[stage_of[v] for v in range(len(problem.blocks))]]
    return []


def _baseline(profile: Profile, found: Found, every: Sequence[Problem]) -> Alone:
    """The fastest single device: of one input under latency, else of a step."""
    if found.schedule is None:
        option = baseline_of(every, profile)
        return Alone(option.problem.devices[0], option.problem.microbatches, option.step_s) if option else Alone()
    problem = unpinned(found.problem)
    race, order = Race(problem), range(len(problem.blocks))
    ends = [
        (race.schedule([d] * len(order), race.forward.order, race.backward.order).value_s, d)
        for d in range(len(problem.devices))
        if race.may([d] * len(order))
    ]
    step_s, device = min(ends, default=(None, 0))
    return Alone() if step_s is None else Alone(problem.devices[device], found.microbatches, step_s)


def least_of(problems: Sequence[Problem], deadline_s: float) -> tuple[Problem, LeastShare] | None:
    """The number of micro-batches and the split with the smallest peak share; None when none fits.

    Under GPipe where 1F1B leaves too few stages to fit.

    Raises:
        ShardwrightError: nothing that fits was found in the time.
    """
    found: list[tuple[Problem, LeastShare]] = []
    unfinished: ShardwrightError | None = None
    for position, problem in enumerate(problems):
        budget = Budget(max(0.0, deadline_s - clock_s()) / (len(problems) - position + 1))
        attempts = [problem]
        if problem.most_stages < len(problem.devices):
            attempts.append(dataclasses.replace(problem, schedule="gpipe"))
        for attempt in attempts:
            try:
                share = least_share(attempt, budget)
            except ShardwrightError as error:
                unfinished = error
                continue
            if share is not None:
                found.append((attempt, share))
                break
    if not found and unfinished is not None:
        raise unfinished
    return min(found, key=lambda pair: pair[1].value, default=None)


def for_memory(written: Plan, option: Option, problem: Problem, share: LeastShare, deadline_s: float) -> Plan:
    """The plan of a split that was found within caps of ``share``, with the caps of ``problem`` and the certificate.

    Until ``deadline_s`` of ``clock_s()`` it is looked for what other splits hold.
    """
    caps = dict(zip(problem.devices, problem.caps, strict=True))
    stages = tuple(stage.model_copy(update={"memory_cap_bytes": caps[stage.device]}) for stage in written.stages)
    # A link that no plan may use makes a split worthless that needs it.
    assert math.isfinite(option.split.value_s)
    largest = largest_batch(option.problem, written.batch, stages_fit(option.split.stages, problem.caps))
    budget = Budget(max(0.0, deadline_s - clock_s()))
    larger = larger_batch(dataclasses.replace(option.problem, caps=problem.caps), written.batch, largest, budget)
    peak = peak_share(stages, share.bound, exact=share.exact, largest=largest)
    if larger is not None:
        devices = tuple(problem.devices[device] for device, _ in larger.stages)
        other = LargerBatch(batch=larger.batch, devices=devices, proven=larger.proven)
        peak = peak.model_copy(update={"larger": other})
    # The caps within which the load was made least are the share's.
    binds = written.certificate.binds.replace("the memory caps: without them", "the peak share: with full caps")
    certificate = written.certificate.model_copy(update={"binds": binds})
    changed = {"objective": "memory", "stages": stages, "peak": peak, "certificate": certificate}
    return written.model_copy(update=changed)
