"""What each pin costs: the largest load without it, the others kept."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

from shardwright.errors import ShardwrightError
from shardwright.sharder.planning.clock import clock_s
from shardwright.sharder.planning.partition import Partition, partition
from shardwright.sharder.planning.plan import PinPrice, Plan
from shardwright.sharder.planning.pricing import Option
from shardwright.sharder.planning.problem import Problem
from shardwright.sharder.planning.verdict.offload import Rates, offload

__all__ = ["prices_of_pins", "prices_of_pins_freely"]


def prices_of_pins(
    chosen: Option,
    pins: Mapping[str, str],
    problem_with: Callable[[Mapping[str, str]], Problem],
    rates: Rates,
    deadline_s: float,
) -> tuple[PinPrice, ...]:
    """What the largest load would be without each pin, the others kept.

    Without a pin of a plan with offloaded weights, more weights may stay on the devices: such a plan is looked for as
    the planner does, first with none offloaded.

    Args:
        chosen: the option that obeys all.
        pins: unit, module or pattern -> device.
        problem_with: the problem with other pins, at the chosen number of micro-batches.
        rates: how fast offloaded weights come.
        deadline_s: of ``clock_s()``; a pin for which nothing was found until then has no price, and says why.
    """
    prices = []
    for position, (pattern, device) in enumerate(pins.items()):
        others = {key: value for key, value in pins.items() if key != pattern}
        problem = dataclasses.replace(
            problem_with(others),
            schedule=chosen.problem.schedule,
            stages_per_device=chosen.problem.stages_per_device,
            forward_only=chosen.problem.forward_only,
        )
        time_limit_s = max(0.0, deadline_s - clock_s()) / (len(pins) - position)
        try:
            split = _split(problem, rates if chosen.tiers else None, time_limit_s)
        except ShardwrightError as error:
            prices.append(PinPrice(unit=pattern, device=device, without_s=None, exact=False, why=str(error)))
            continue
        without_s = min(split.value_s, chosen.of_least_load.split.value_s)
        prices.append(PinPrice(unit=pattern, device=device, without_s=without_s, exact=split.exact))
    return tuple(prices)


def prices_of_pins_freely(
    written: Plan, pins: Mapping[str, str], plan_with: Callable[[Mapping[str, str], int], Plan]
) -> tuple[PinPrice, ...]:
    """What the value of a plan that is no chain of stages would be without each pin, the others kept.

    Args:
        written: the plan that obeys all.
        pins: unit, module or pattern -> device.
        plan_with: the plan with other pins, in one of so many parts of the time that is left.
    """
    prices = []
    for position, (pattern, device) in enumerate(pins.items()):
        others = {key: value for key, value in pins.items() if key != pattern}
        try:
            found = plan_with(others, len(pins) - position).certificate
        except ShardwrightError as error:
            prices.append(PinPrice(unit=pattern, device=device, without_s=None, exact=False, why=str(error)))
            continue
        without_s = min(found.value_s, written.certificate.value_s)
        prices.append(PinPrice(unit=pattern, device=device, without_s=without_s, exact=found.exact))
    return tuple(prices)


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
