"""Changes of the task with which a split would be worth it where it is not: a larger batch, faster links."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Sequence
from typing import Literal

from shardwright.errors import ShardwrightError
from shardwright.profiler.profile import Profile
from shardwright.sharder.planning.partition import stage_loads
from shardwright.sharder.planning.plan import WORTHWHILE, Change
from shardwright.sharder.planning.pricing import Option, price, solve
from shardwright.sharder.planning.problem import Problem
from shardwright.sharder.planning.relaxed import with_links_times

__all__ = ["changes_that_pay"]

BATCHES = (2, 4, 8, 16, 32)
"""So many times the batch, in micro-batches of the same size."""
LINKS = (2, 4, 10)
"""So many times as fast."""


def changes_that_pay(
    options: Sequence[Option], baseline: Option, profile: Profile, deadline_s: float
) -> tuple[Change, ...]:
    """The smallest larger batch, and the slowest faster links, with which a split would be worth it.

    Args:
        options: the best split at each number of micro-batches.
        baseline: the one device that they do not beat.
        profile: of the costs.
        deadline_s: of ``time.monotonic()``.
    """
    splits = [option for option in options if len(option.split.stages) > 1]
    nearest = min(splits, key=lambda o: o.step_s, default=max(options, key=lambda o: o.problem.microbatches))
    found = (_with_batch(splits, baseline, profile), _with_links(nearest.problem, baseline, profile, deadline_s))
    return tuple(change for change in found if change is not None)


def _with_batch(splits: Sequence[Option], baseline: Option, profile: Profile) -> Change | None:
    """Filling and draining are paid once a step: more micro-batches of the same size make less of them."""
    for factor in BATCHES:
        alone = _at_batch(baseline, factor, profile)
        priced = [larger for split in splits if (larger := _at_batch(split, factor, profile)) is not None]
        if alone is not None and priced:
            change = _if_it_pays("batch", factor, min(priced, key=lambda option: option.step_s), alone)
            if change is not None:
                return change
    return None


def _at_batch(option: Option, factor: int, profile: Profile) -> Option | None:
    """The same split of so many times the batch; None if it does not fit then."""
    problem = dataclasses.replace(option.problem, microbatches=option.problem.microbatches * factor)
    return None if stage_loads(problem, option.split.stages) is None else price(problem, option.split, profile)


def _with_links(problem: Problem, baseline: Option, profile: Profile, deadline_s: float) -> Change | None:
    """Faster links, with the split that is best for them."""
    for factor in LINKS:
        option = None
        with contextlib.suppress(ShardwrightError):
            time_limit_s = max(0.0, deadline_s - time.monotonic()) / len(LINKS)
            option = solve(with_links_times(problem, factor), profile, time_limit_s=time_limit_s)
        if option is not None and len(option.split.stages) > 1:
            change = _if_it_pays("links", factor, option, baseline)
            if change is not None:
                return change
    return None


def _if_it_pays(what: Literal["batch", "links"], factor: int, split: Option, alone: Option) -> Change | None:
    """The change with which ``split`` is worth it beside one device ``alone``; None if it is not."""
    if split.step_s * WORTHWHILE > alone.step_s:
        return None
    return Change(
        what=what,
        factor=factor,
        microbatches=split.problem.microbatches,
        step_s=split.step_s,
        speedup=alone.step_s / split.step_s if split.step_s else 1.0,
    )
