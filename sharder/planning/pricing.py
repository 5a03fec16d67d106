"""Prices: what a split costs in a step, simulated, and the one device that a split has to beat."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from shardwright.errors import ShardwrightError
from shardwright.profiler.profile import Profile
from shardwright.sharder.planning.clock import clock_s
from shardwright.sharder.planning.exact.search import ROUNDING
from shardwright.sharder.planning.partition import Partition, partition
from shardwright.sharder.planning.problem import Problem
from shardwright.sharder.planning.schedules.replicas import expected_step_of_replicas_s
from shardwright.sharder.planning.schedules.simulate import StageCost, expected_step_s, simulate
from shardwright.sharder.planning.schedules.stage_costs import Stages, rules_of, shares_of, stage_costs, stages_anew
from shardwright.sharder.planning.schedules.step_search import shortest_step
from shardwright.sharder.planning.schedules.timeline import Timeline
from shardwright.sharder.planning.split_loads import stage_loads

__all__ = [
    "LEAST_SHORTER",
    "Option",
    "attempts_at",
    "baseline_of",
    "noise_s",
    "price",
    "solve",
    "solve_each",
    "with_short_step",
]

LEAST_NOISE = 0.05
"""One device counts as faster than an earlier one from this relative difference on, however steady both were."""
LEAST_GAIN = 0.01
"""For less than this part of the step no stage is computed anew where a split fits without."""
LEAST_SHORTER = 0.001
"""For less than this part of the step no split has a larger largest load than it need have."""


@dataclass(frozen=True)
class Option:
    """A split at one number of micro-batches, priced."""

    problem: Problem
    split: Partition
    loads: list[float]
    costs: tuple[StageCost, ...]
    timeline: Timeline
    """Of the median times."""
    step_s: float
    """The median step of devices whose speed varies."""
    step_spread_s: float
    tiers: Mapping[int, str] = dataclasses.field(default_factory=dict)
    """Blocks whose weights stay elsewhere -> where."""
    resident: Problem | None = None
    """Where there are such blocks: the problem in which their weights are on their devices."""
    kept: Option | None = None
    """Where some stages are computed anew by choice: the best split in which none is, if one was found."""
    why_none_kept: str = ""
    """Why there is none."""

    least: Option | None = None
    """Where this one has the shorter step: the split with the least largest load that was found."""
    proven_step_s: float | None = None
    """Where it is proven: no split of several stages, one a device, has a shorter step at the median times, with so
    many micro-batches and replicas and under this schedule."""
    narrowed: bool = False
    """Whether the problem leaves out stages computed anew, which were allowed."""
    shorter: Option | None = None
    """With the shortest step that was found, where it has been looked for: itself or another."""

    @property
    def of_least_load(self) -> Option:
        """The split with the least largest load."""
        return self.least or self

    @property
    def shortest(self) -> Option:
        """The one with the shortest step, as far as it has been looked for."""
        return self.shorter or self

    @property
    def anew(self) -> list[bool]:
        """Of each stage, whether it is computed anew."""
        return stages_anew(self.problem, self.split.stages)


def solve(problem: Problem, profile: Profile, *, time_limit_s: float) -> Option | None:
    """The best split of ``problem``, under GPipe if 1F1B leaves too few stages to fit; None when nothing fits.

    Stages are computed anew by choice only where that makes the step noticeably shorter.
    """
    deadline_s = clock_s() + time_limit_s
    best = _solved(problem, profile, time_limit_s)
    if best is None or problem.recompute != "auto" or not any(best.anew):
        return best
    try:
        left_s = max(0.0, deadline_s - clock_s())
        kept = _solved(dataclasses.replace(problem, recompute="never"), profile, left_s)
    except ShardwrightError:
        return _told_again(best, why_none_kept="none was found in the time allowed")
    if kept is None:
        return _told_again(best, why_none_kept="no split fits")
    looked = bool(kept.shorter or best.shorter)
    kept_s, best_s = ((with_short_step(each, profile) if looked else each).step_s for each in (kept, best))
    if kept_s > best_s * (1 + LEAST_GAIN):
        return _told_again(best, kept=kept.shortest)
    # It is the better one for its step; the certificate is over all splits, of a smaller largest load.
    bound_s = min(kept.split.bound_s, best.split.bound_s)
    exact = kept.split.exact and bound_s == kept.split.value_s
    return _told_again(kept, split=dataclasses.replace(kept.split, bound_s=bound_s, exact=exact), narrowed=True)


def _told_again(option: Option, **more: Any) -> Option:
    """The option with ``more`` to say, which its split with the shortest step has to say as well."""
    return dataclasses.replace(option, **more, shorter=None)


def solve_each(
    problems: Sequence[Problem], profile: Profile, deadline_s: float
) -> tuple[list[Option], ShardwrightError | None]:
    """The best split of each of ``problems`` in which one fits, and why one was not looked through, if so.

    Args:
        deadline_s: of ``clock_s()``; what is left is shared out as each is begun.
    """
    options: list[Option] = []
    unfinished: ShardwrightError | None = None
    for position, problem in enumerate(problems):
        share_s = max(0.0, deadline_s - clock_s()) / (len(problems) - position)
        try:
            option = solve(problem, profile, time_limit_s=share_s)
        except ShardwrightError as error:
            unfinished = error
            continue
        if option is not None:
            options.append(option)
    return options, unfinished


def attempts_at(problem: Problem) -> Iterator[Problem]:
    """The problem, and that under GPipe where 1F1B, which needs a micro-batch for each stage, leaves too few stages."""
    yield problem
    if problem.schedule == "1f1b" and problem.most_stages < len(problem.devices):
        yield dataclasses.replace(problem, schedule="gpipe")


def _solved(problem: Problem, profile: Profile, time_limit_s: float) -> Option | None:
    """The split with the least largest load of the attempt in which the shortest step is found."""
    attempts = list(attempts_at(problem))
    options: list[Option] = []
    unfinished: ShardwrightError | None = None
    for attempt in attempts:
        try:
            split = partition(attempt, time_limit_s=time_limit_s / len(attempts))
        except ShardwrightError as error:
            unfinished = error
            continue
        if split is not None:
            options.append(price(attempt, split, profile))
    if len(options) > 1:
        both = [(option, with_short_step(option, profile)) for option in options]
        option, shorter = min(both, key=lambda pair: pair[1].step_s)  # of equal ones the first, by 1F1B
        return dataclasses.replace(option, shorter=shorter)
    if options:
        return options[0]
    if unfinished is not None:
        raise unfinished
    return None


def with_short_step(option: Option, profile: Profile) -> Option:
    """``option``, or a split of the same problem whose step is noticeably shorter; not of interleaved stages, whose
    search has looked for that, nor with weights offloaded."""
    problem, split = option.problem, option.split
    if option.shorter is not None:
        return option.shorter
    if problem.stages_per_device > 1 or option.tiers:
        return option
    found = shortest_step(problem, split.stages, train=profile.train)
    if found.proven and not option.narrowed and _is_of_all(problem):
        option = dataclasses.replace(option, proven_step_s=found.step_s)
    varied = any(len(set(variation.relative)) > 1 for variation in profile.variations)
    others = [
        price(problem, _partition_of(problem, split, stages), profile)
        for stages in (found.stages, *(found.others if varied else ()))
        if stages != split.stages
    ]
    if not others:
        return option
    other = min(others, key=lambda one: one.step_s)
    larger = other.split.value_s > split.value_s * (1 + ROUNDING)
    anew_by_choice = problem.recompute == "auto" and any(other.anew)
    first_anew = anew_by_choice and not any(option.anew)
    if larger and other.step_s > option.step_s * (1 - (LEAST_GAIN if first_anew else LEAST_SHORTER)):
        return option
    kept = option if first_anew else option.kept
    return dataclasses.replace(
        other,
        least=option if larger else None,
        proven_step_s=option.proven_step_s,
        kept=kept and with_short_step(kept, profile) if anew_by_choice and not first_anew else kept,
        why_none_kept=option.why_none_kept,
        narrowed=option.narrowed,
    )


def _partition_of(problem: Problem, least: Partition, stages: Stages) -> Partition:
    """Another split of the problem, with the bound of the one that has the ``least`` largest load."""
    loads = stage_loads(problem, stages)
    assert loads is not None, "a split that was found is feasible"
    value_s = max(loads)
    bound_s = min(least.bound_s, value_s)
    return Partition(tuple(stages), value_s, bound_s, exact=value_s <= bound_s * (1 + ROUNDING))


def _is_of_all(problem: Problem) -> bool:
    """Whether what the search of steps proves holds for the plan: a stage under zero-bubble is counted where it holds
    most, and replicas at the slowest one's times."""
    if problem.schedule == "zero-bubble" and problem.most_stages > 2:
        return False
    return all(replica.seconds == problem.replicas[0].seconds for replica in problem.replicas)


def price(problem: Problem, split: Partition, profile: Profile) -> Option:
    """Loads, costs of each stage, and the simulated step."""
    loads = stage_loads(problem, split.stages)
    assert loads is not None, "a split that was found is feasible"
    costs = stage_costs(problem, split.stages, stages_anew(problem, split.stages))
    rules = rules_of(problem, train=profile.train)
    timeline = simulate(costs, problem.microbatches, **rules)
    varied = {variation.device: variation.relative for variation in profile.variations}
    if problem.replicas:
        step_s, spread_s = expected_step_of_replicas_s(problem, split.stages, costs, varied, **rules)
        return Option(problem, split, loads, costs, timeline, step_s, spread_s)
    devices = [device for device, _ in shares_of(split.stages, problem.stages_per_device)]
    relative = [varied.get(problem.devices[device], ()) for device in devices]
    step_s, spread_s = expected_step_s(costs, relative, problem.microbatches, **rules)
    return Option(problem, split, loads, costs, timeline, step_s, spread_s)


def baseline_of(problems: Iterable[Problem], profile: Profile) -> Option | None:
    """One device alone: the fastest that holds the model, in the first of ``problems`` in which one does.

    That has the largest micro-batches, which compute best. Of costs from elsewhere it need not hold: there all count.
    """
    best: Option | None = None
    for problem in problems:
        for device in _unlike(problem, profile):
            alone = problem.alone(device)
            if not all(block.allowed[0] for block in alone.blocks):
                continue
            whole = ((0, (1 << len(alone.blocks)) - 1),)
            loads = stage_loads(alone, whole)
            if loads is None:
                continue
            option = price(alone, Partition(whole, loads[0], loads[0], exact=True), profile)
            if best is None or option.step_s < best.step_s - noise_s(option, best):
                best = option
        if best is not None and profile.of_model:
            break
    return best


def _unlike(problem: Problem, profile: Profile) -> list[int]:
    """The devices without those on which the model would take the same time and memory as on an earlier one."""
    rows = zip(*(b.forward_s + b.backward_s + b.update_s + b.unfit for b in problem.blocks), strict=True)
    columns, count = list(rows), len(problem.devices)
    varied = {variation.device: variation.relative for variation in profile.variations}
    first: dict[tuple[object, ...], int] = {}
    for device, (name, cap) in enumerate(zip(problem.devices, problem.caps, strict=True)):
        together = problem.updates_together[device : device + 1]
        first.setdefault((cap, together, varied.get(name), *columns[device::count]), device)
    return list(first.values())


def noise_s(one: Option, other: Option) -> float:
    """The difference of two steps that says nothing about their devices: their spread while they were measured."""
    return max(LEAST_NOISE * other.step_s, one.step_spread_s, other.step_spread_s)
