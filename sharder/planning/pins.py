"""What each pin costs: the largest load without it, the others kept."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Mapping

from shardwright.errors import ShardwrightError
from shardwright.sharder.planning.partition import partition
from shardwright.sharder.planning.plan import PinPrice
from shardwright.sharder.planning.pricing import Option
from shardwright.sharder.planning.problem import Problem

__all__ = ["prices_of_pins"]


def prices_of_pins(
    chosen: Option,
    pins: Mapping[str, str],
    problem_with: Callable[[Mapping[str, str]], Problem],
    deadline_s: float,
) -> tuple[PinPrice, ...]:
    """What the largest load would be without each pin, the others kept.

    Args:
        chosen: the option that obeys all.
        pins: unit name or pattern -> device.
        problem_with: the problem with other pins, at the chosen number of micro-batches.
        deadline_s: of ``time.monotonic()``; pins that it leaves no time for have no price.
    """
    prices = []
    for position, (pattern, device) in enumerate(pins.items()):
        others = {key: value for key, value in pins.items() if key != pattern}
        problem = dataclasses.replace(problem_with(others), schedule=chosen.problem.schedule)
        split = None
        with contextlib.suppress(ShardwrightError):
            split = partition(problem, time_limit_s=max(0.0, deadline_s - time.monotonic()) / (len(pins) - position))
        value_s = None if split is None else min(split.value_s, chosen.split.value_s)
        prices.append(PinPrice(unit=pattern, device=device, without_s=value_s, exact=split is not None and split.exact))
    return tuple(prices)
