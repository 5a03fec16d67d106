"""Changes of the task with which a split would be worth it where it is not: a larger batch, faster links, and none of
what the planner was told to keep to."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

from shardwright.errors import ShardwrightError
from shardwright.profiler.profile import Profile
from shardwright.sharder.planning.clock import clock_s
from shardwright.sharder.planning.formulation.relaxed import with_links_times
from shardwright.sharder.planning.plan import WORTHWHILE, Change, Changeable, Gain
from shardwright.sharder.planning.pricing import Option, price, solve, with_short_step
from shardwright.sharder.planning.problem import Problem
from shardwright.sharder.planning.schedules.interleave import possible_devices
from shardwright.sharder.planning.schedules.zero_bubble import divides
from shardwright.sharder.planning.split_loads import stage_loads
from shardwright.sharder.planning.verdict.prices import Wishes

__all__ = ["LINKS", "Lift", "changes_tried", "lifts_of"]

BATCHES = (2, 4, 8, 16, 32)
"""So many times the batch, in micro-batches of the same size."""
LINKS = (2, 4, 10)
"""So many times as fast."""


class Lift(NamedTuple):
    """What the planner was told to keep to, and the problems without that."""

    what: Changeable
    problems: Callable[[], Sequence[Problem]]
    """At the numbers of micro-batches that may be chosen."""


def lifts_of(wishes: Wishes, problems_with: Callable[[Wishes], Sequence[Problem]]) -> list[Lift]:
    """What is asked for of pins and groups, each with the problems without it, and without both."""
    lifts = []
    if wishes.pins:
        lifts.append(Lift("pins", lambda: problems_with(wishes._replace(pins={}))))
    if wishes.groups:
        lifts.append(Lift("groups", lambda: problems_with(wishes._replace(groups=()))))
    if len(lifts) > 1:
        lifts.append(Lift("pins and groups", lambda: problems_with(Wishes({}, ()))))
    return lifts


def changes_tried(
    options: Sequence[Option], baseline: Option, profile: Profile, deadline_s: float, lifts: Sequence[Lift] = ()
) -> tuple[Change, ...]:
    """No pins or groups, larger batches, and faster links, up to the smallest factor with which a split pays.

    A kind of change is left out where no split could be priced with it: none fits, or none was found in the time.

    Args:
        options: the best split at each number of micro-batches.
        baseline: the one device that they do not beat.
        profile: of the costs.
        deadline_s: of ``clock_s()``.
        lifts: what to plan without, pins and groups together last.
    """
    splits = [option for option in options if len(option.split.stages) > 1]
    nearest = min(splits, key=lambda o: o.step_s, default=max(options, key=lambda o: o.problem.microbatches))
    found = [
        *_lifted(lifts, baseline, profile, deadline_s),
        _up_to_one_that_pays(
            "batch",
            _at_batches(splits, baseline, profile)
            if splits
            else _anew_at_batches(nearest.problem, baseline, profile, deadline_s),
        ),
        _up_to_one_that_pays("links", _over_links(nearest.problem, baseline, profile, deadline_s)),
    ]
    return tuple(change for change in found if change is not None)


class _Pair(NamedTuple):
    """With one factor: the best split, and the one device beside it."""

    factor: int
    split: Option | None
    """None where no split is better than one device."""
    alone: Option


def _up_to_one_that_pays(what: Changeable, pairs: Iterable[_Pair]) -> Change | None:
    """The factors of ``pairs`` until a split is worth it; None where there are none."""
    tried = []
    for factor, split, alone in pairs:
        tried.append(factor)
        if split is not None and split.step_s * WORTHWHILE <= alone.step_s:
            gain = Gain(
                factor=factor,
                microbatches=split.problem.batch_microbatches,
                step_s=split.step_s,
                speedup=alone.step_s / split.step_s if split.step_s else 1.0,
            )
            return Change(what=what, tried=tuple(tried), pays=gain)
    return Change(what=what, tried=tuple(tried), pays=None) if tried else None


def _lifted(lifts: Sequence[Lift], baseline: Option, profile: Profile, deadline_s: float) -> list[Change | None]:
    """Planning without pins and without groups; without both only where neither of these is enough."""
    found: list[Change | None] = []
    for lift in lifts:
        if lift.what != "pins and groups" or not any(change is not None and change.pays for change in found):
            found.append(_up_to_one_that_pays(lift.what, _without(lift, baseline, profile, deadline_s)))
    return found


def _without(lift: Lift, baseline: Option, profile: Profile, deadline_s: float) -> Iterator[_Pair]:
    """The best of all splits once that is lifted."""
    problems = lift.problems()
    share_s = (deadline_s - clock_s()) / (len(problems) + len(LINKS))
    options = [option for problem in problems if (option := _solved(problem, profile, share_s)) is not None]
    if options:
        splits = [option for option in options if len(option.split.stages) > 1]
        yield _Pair(1, min(splits, key=lambda option: option.step_s, default=None), baseline)


def _at_batches(splits: Sequence[Option], baseline: Option, profile: Profile) -> Iterator[_Pair]:
    """Filling and draining are paid once a step: more micro-batches of the same size make less of them."""
    for factor in BATCHES:
        alone = _at_batch(baseline, factor, profile)
        priced = [larger for split in splits if (larger := _at_batch(split, factor, profile)) is not None]
        if alone is not None and priced:
            yield _Pair(factor, min(priced, key=lambda option: option.step_s), alone)


def _anew_at_batches(problem: Problem, baseline: Option, profile: Profile, deadline_s: float) -> Iterator[_Pair]:
    """Where one device is the best split: with more micro-batches, which a pipeline needs, another may be."""
    for factor in BATCHES:
        alone = _at_batch(baseline, factor, profile)
        larger = dataclasses.replace(problem, microbatches=problem.microbatches * factor)
        option = None if alone is None else _solved(larger, profile, (deadline_s - clock_s()) / len(BATCHES))
        if alone is not None and option is not None:
            yield _Pair(factor, option if len(option.split.stages) > 1 else None, alone)


def _at_batch(option: Option, factor: int, profile: Profile) -> Option | None:
    """The same split of so many times the batch; None if it does not fit then."""
    problem = dataclasses.replace(option.problem, microbatches=option.problem.microbatches * factor)
    if problem.schedule == "zero-bubble" and not divides(len(option.split.stages), problem.microbatches):
        return None
    if problem.stages_per_device > 1 and len(option.split.stages) // problem.stages_per_device not in possible_devices(
        problem
    ):
        return None  # so many do not go around in equal rounds
    return None if stage_loads(problem, option.split.stages) is None else price(problem, option.split, profile)


def _over_links(problem: Problem, baseline: Option, profile: Profile, deadline_s: float) -> Iterator[_Pair]:
    """Faster links, with the split that is best for them."""
    for factor in LINKS:
        option = _solved(with_links_times(problem, factor), profile, (deadline_s - clock_s()) / len(LINKS))
        if option is not None:
            yield _Pair(factor, option if len(option.split.stages) > 1 else None, baseline)


def _solved(problem: Problem, profile: Profile, time_limit_s: float) -> Option | None:
    """The best split of ``problem``; None if none fits, or none was found in the time."""
    with contextlib.suppress(ShardwrightError):
        option = solve(problem, profile, time_limit_s=max(0.0, time_limit_s))
        return None if option is None else with_short_step(option, profile)
    return None
