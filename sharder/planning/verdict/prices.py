"""What each pin, and each group that is to share a device, costs: the value without it, the others kept."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

from shardwright.errors import ShardwrightError
from shardwright.sharder.planning.partition import Partition, partition
from shardwright.sharder.planning.plan import GroupPrice, PinPrice
from shardwright.sharder.planning.pricing import Option
from shardwright.sharder.planning.problem import Problem
from shardwright.sharder.planning.verdict.offload import Rates, offload

__all__ = ["Group", "Value", "Wishes", "load_without", "prices_of"]

Group = str | Iterable[str]
"""Units, modules or patterns that share a device."""


class Wishes(NamedTuple):
    """What the planner is to keep to."""

    pins: Mapping[str, str]
    """Unit, module or pattern -> device."""
    groups: Sequence[Group]


class Value(NamedTuple):
    """The best value that was found, and whether it is proven."""

    value: float
    exact: bool


def prices_of(
    wishes: Wishes, value: float, best_with: Callable[[Wishes, int], Value], *, shares: bool = False
) -> tuple[tuple[PinPrice, ...], tuple[GroupPrice, ...]]:
    """What the value of a plan would be without each of ``wishes``, the others kept.

    Args:
        value: the plan's own: its largest load or finishing time in s, or its peak share.
        best_with: the best that is found with other wishes, in one of so many parts of the time that is left.
        shares: whether values are peak shares.
    """
    left = len(wishes.pins) + len(wishes.groups)
    pins, groups = [], []
    for unit, device in wishes.pins.items():
        others = {other: where for other, where in wishes.pins.items() if other != unit}
        found = _found(partial(best_with, wishes._replace(pins=others), left), value, shares=shares)
        pins.append(PinPrice(unit=unit, device=device, **found))
        left -= 1
    for number, group in enumerate(wishes.groups):
        rest = [*wishes.groups[:number], *wishes.groups[number + 1 :]]
        found = _found(partial(best_with, wishes._replace(groups=rest), left), value, shares=shares)
        groups.append(GroupPrice(units=(group,) if isinstance(group, str) else tuple(group), **found))
        left -= 1
    return tuple(pins), tuple(groups)


def _found(best: Callable[[], Value], value: float, *, shares: bool) -> dict[str, Any]:
    """The fields of a price: the best that was found without something, which the plan's own ``value`` may be."""
    key = "without_share" if shares else "without_s"
    try:
        found = best()
    except ShardwrightError as error:
        return {key: None, "exact": False, "why": str(error)}
    # What is worse than the plan is not proven: the plan, which obeys more, is better.
    return {key: min(found.value, value), "exact": found.exact and found.value <= value * (1 + 1e-9)}


def load_without(chosen: Option, problem: Problem, rates: Rates, time_limit_s: float) -> Value:
    """The smallest largest load of ``problem``, which lacks a wish that ``chosen`` keeps to, under its schedule.

    Of a plan with offloaded weights, more weights may stay on the devices then: such a split is looked for as the
    planner does, first with none offloaded.

    Args:
        rates: how fast offloaded weights come.

    Raises:
        ShardwrightError: none was found in the time.
    """
    problem = dataclasses.replace(
        problem,
        schedule=chosen.problem.schedule,
        stages_per_device=chosen.problem.stages_per_device,
        forward_only=chosen.problem.forward_only,
    )
    split = _split(problem, rates if chosen.tiers else None, time_limit_s)
    return Value(split.value_s, split.exact)


def _split(problem: Problem, rates: Rates | None, time_limit_s: float) -> Partition:
    """The best split that was found; with ``rates``, and where nothing fits, with some weights offloaded.

    With ``rates``, one that fits with all weights on the devices is not proven: with some brought it may be better.

    Raises:
        ShardwrightError: none was found, though one is known to fit.
    """
    split = partition(problem, time_limit_s=time_limit_s if rates is None else time_limit_s / 2)
    if split is None and rates is not None:
        offloaded = offload(problem, rates, time_limit_s=time_limit_s / 2)
        split = None if offloaded is None else offloaded.split
    elif split is not None and rates is not None:
        split = dataclasses.replace(split, exact=False)
    if split is None:
        raise ShardwrightError(
            "no split with weights offloaded was found in the time allowed; allow more with --time-limit"
        )
    return split
