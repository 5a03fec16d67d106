"""Plans that are no chain of stages, and plans of the objectives latency and memory: from problems to records."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Sequence

from shardwright.errors import ShardwrightError
from shardwright.profiler.profile import Profile
from shardwright.sharder.planning.clock import Budget, clock_s
from shardwright.sharder.planning.formulation.relaxed import unpinned, with_links_times
from shardwright.sharder.planning.free.assign import assign
from shardwright.sharder.planning.free.assignment import Assignment, as_free
from shardwright.sharder.planning.free.fastest import fastest
from shardwright.sharder.planning.free.free_alternatives import alternatives_freely
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
    WORTHWHILE,
    Change,
    Changeable,
    Gain,
    LargerBatch,
    Objective,
    Plan,
)
from shardwright.sharder.planning.pricing import Option, baseline_of
from shardwright.sharder.planning.problem import Problem, bits
from shardwright.sharder.planning.verdict.changes import LINKS
from shardwright.sharder.planning.verdict.prices import Value, Wishes, prices_of

__all__ = ["for_memory", "least_of", "plan_freely"]


def plan_freely(
    profile: Profile,
    problem_at: Callable[[int, Wishes], Problem],
    counts: Sequence[int],
    wishes: Wishes,
    objective: Objective,
    deadline_s: float,
) -> Plan:
    """The best plan that puts each unit on any device, with what one would do else, the price of each wish, and what
    would change its verdict.

    Args:
        profile: times and sizes.
        problem_at: the problem at a profiled number of micro-batches, with what it is to keep to.
        counts: the numbers of micro-batches that may be chosen.
        wishes: what is asked for.
        objective: see :func:`~shardwright.sharder.planning.planner.plan`.
        deadline_s: of ``clock_s()``, for all of it; after it, or Ctrl-C, the best so far with an honest gap.

    Raises:
        ShardwrightError: nothing fits, or nothing was found in the time.
    """

    def best_with(wishes: Wishes, parts: int, faster: int, *, others: bool = True) -> Plan:
        """The best with these wishes, and links so many times as fast, in one of so many parts of the time left.

        The plan itself comes out of no time, too, ``others`` than it do not.
        """
        if others and clock_s() >= deadline_s:
            raise ShardwrightError("no time was left; allow more with --time-limit")
        every = [problem_at(count, wishes) for count in sorted(profile.microbatches)]
        every = [with_links_times(one, faster) for one in every] if faster > 1 else every
        problems = [one for one in every if one.microbatches in counts]
        left_s = max(0.0, deadline_s - clock_s())
        return _best(profile, problems, every, objective=objective, time_limit_s=left_s / parts)

    def value_with(wishes: Wishes, parts: int) -> Value:
        return _value(best_with(wishes, parts, 1))

    written = best_with(wishes, 1, 1, others=False)
    pins, groups = prices_of(wishes, _value(written).value, value_with, shares=objective == "memory")
    several = len(problem_at(counts[0], wishes).devices) > 1
    changes = _changes(written, wishes, best_with, deadline_s) if several else None
    return written.model_copy(update={"pins": pins, "groups": groups, "changes": changes})


def _value(written: Plan) -> Value:
    """What the objective makes least."""
    if written.peak is not None:
        return Value(written.peak.value, written.peak.exact)
    return Value(written.certificate.value_s, written.certificate.exact)


def _changes(
    written: Plan, wishes: Wishes, best_with: Callable[[Wishes, int, int], Plan], deadline_s: float
) -> tuple[Change, ...] | None:
    """What would make a plan worth it that is not: nothing to keep to, else faster links. None where nothing is to be
    changed."""
    alone_s, few = written.predicted.baseline_s, len(written.stages) == 1
    if written.objective == "memory" or (alone_s is None and not few):
        return None
    if not few and (written.predicted.speedup or 0.0) >= WORTHWHILE:
        return None
    asked: list[tuple[Changeable, tuple[int, ...], Wishes]] = []
    if wishes.pins or wishes.groups:
        asked.append((_asked(wishes), (1,), Wishes({}, ())))
    if written.certificate.exact:  # else one may be worth it over these links
        asked.append(("links", LINKS, wishes))
    found: list[Change] = []
    for position, (what, factors, others) in enumerate(asked):
        tried: list[int] = []
        pays = None
        for factor in factors:
            if clock_s() >= deadline_s:
                break
            try:
                other = best_with(others, len(asked) - position + len(LINKS), factor)
            except ShardwrightError:  # none was found in the time that is left
                break
            tried.append(factor)
            if (pays := _gain(other, factor)) is not None:
                break
        if tried:
            found.append(Change(what=what, tried=tuple(tried), pays=pays))
        if pays is not None:
            break
    return tuple(found)


def _asked(wishes: Wishes) -> Changeable:
    return "pins and groups" if wishes.pins and wishes.groups else "pins" if wishes.pins else "groups"


def _gain(other: Plan, factor: int) -> Gain | None:
    """What ``other`` gains over one device, if that is worth it."""
    step_s, alone_s = other.predicted.step_s, other.predicted.baseline_s
    if len(other.stages) == 1 or not alone_s or not step_s or step_s * WORTHWHILE > alone_s:
        return None
    return Gain(factor=factor, microbatches=other.microbatches, step_s=step_s, speedup=alone_s / step_s)


def _best(
    profile: Profile,
    problems: Sequence[Problem],
    every: Sequence[Problem],
    *,
    objective: Objective,
    time_limit_s: float,
) -> Plan:
    """The best plan of ``problems`` that puts each unit on any device.

    Args:
        problems: at the numbers of micro-batches that may be chosen.
        every: at all profiled numbers, for the baseline and data parallel.

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
    alone = _baseline(profile, best, every)
    written = Writer(profile, best).plan(objective, alone)
    others = alternatives_freely(best, every, profile, alone.step_s)
    return written.model_copy(update={"alternatives": others})


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
    """The best chain of stages, if a fifth of the time finds one; none where blocks read of later ones."""
    if any(reader <= tensor.producer for tensor in problem.crossings for reader in bits(tensor.readers)):
        return []
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
