"""Graphs with too many closed sets: ceilings are asked for until the best split and its bound meet.

Where devices are alike chains of cuts are looked for (windows.py), else those of all orders at once (device_sets.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

from shardwright.sharder.planning.device_sets import MOST_STATES, DeviceSetSearch, how_many_states
from shardwright.sharder.planning.listing import Listing
from shardwright.sharder.planning.little_cut import LittleCut
from shardwright.sharder.planning.mincut import least_transfer_s
from shardwright.sharder.planning.problem import Problem
from shardwright.sharder.planning.relaxed import in_shares
from shardwright.sharder.planning.search import OutOfTimeError, Stages, fluid_s
from shardwright.sharder.planning.windows import ChainSearch, Row, UndecidedError

__all__ = ["NEAR", "Narrowed", "can_list", "listed_with_transfers", "listing_of", "narrowed", "within"]

STEPS = (2_000_000, 20_000_000, 150_000_000)
"""So many undecided sets are gone through for what one cut may be, in words of 64 blocks: at first, and when what was
left undecided is asked for again."""
LOWER = 3
"""Where devices differ: so many ceilings that are undecided are followed by a lower one before there are more steps."""
AIM = 0.0098
"""A ceiling that is so much below the best split is asked for: if nothing is under it, the gap is below 1%."""
ASKED = 0.2, 0.35
"""But none nearer to the bound than so much of the gap, as it would tell little, nor farther: the lower a ceiling is
the fewer sets there are, and a split that is found is as good as a higher bound."""
CLOSE = 3e-3
"""A gap that is no wider is asked for as a whole."""
NEAR = 2e-4
"""Between a ceiling that is proven and one that is undecided nothing is tried if they are nearer than that."""

SAME = 1e-9
"""Loads that differ by less than this share are the same, summed up in another order."""


class Narrowed(NamedTuple):
    """One answer: a split to be looked at, or a bound."""

    stages: Stages
    bound: float
    """No largest load is below: seconds, or whatever the loads of the problem are."""


def can_list(problem: Problem) -> bool:
    """Whether the devices are alike, or few."""
    classes = _classes(problem)
    return len(classes) == 1 or (all(problem.total_s) and how_many_states(classes) <= MOST_STATES)


def listed_with_transfers(problem: Problem) -> bool:
    """Whether the loads by which sets are listed have all transfers in them; else the bounds are on work alone."""
    summed = problem.transfers == "relayed" and not problem.overlap
    return summed or not any(least_transfer_s(problem, tensor) for tensor in problem.crossings)


def _classes(problem: Problem) -> list[list[int]]:
    """Devices with the same times."""
    classes: dict[tuple[float, ...], list[int]] = {}
    for device, times in enumerate(zip(*problem.seconds, strict=True)):
        classes.setdefault(times, []).append(device)
    return list(classes.values())


def listing_of(problem: Problem, out_of_time: Callable[[], bool]) -> tuple[Listing, list[float]] | None:
    """What is asked for chains, and the weight of each device; None where blocks are pinned so that no work is left.

    Raises:
        OutOfTimeError: the time has passed.
    """
    devices = range(len(problem.devices))
    if len(_classes(problem)) == 1:
        return Listing(problem, out_of_time), [1.0 for _ in devices]
    share = fluid_s(problem, devices)
    if not math.isfinite(sum(share)) or not all(problem.total_s):
        return None
    whole = sum(1 / total_s for total_s in problem.total_s)
    weights = [1 / total_s / whole for total_s in problem.total_s]
    return Listing(in_shares(problem, share), out_of_time), weights


class _Asked(NamedTuple):
    """What ceilings are asked of."""

    search: Callable[[float], ChainSearch | DeviceSetSearch]
    """For a ceiling."""
    slack_s: float
    """Loads nearer than that to a ceiling are not told from it: what rounding may take from work, on any device."""
    lower: int = 0
    """So many ceilings that are undecided are followed by a lower one before the next of the ``STEPS``."""


def _asked_of(problem: Problem, out_of_time: Callable[[], bool]) -> _Asked | None:
    """What is asked; None where blocks are pinned so that no work is left.

    Raises:
        OutOfTimeError: the time has passed.
    """
    if (found := listing_of(problem, out_of_time)) is None:
        return None
    listing, weights = found
    slack_s = 4 * listing.slack_s / min(weights)
    classes, counts = _classes(problem), range(problem.most_stages, 0, -1)
    if len(classes) == 1:
        rows = [Row(tuple(range(count)), (1.0,) * count) for count in counts]
        return _Asked(partial(ChainSearch, listing, rows), slack_s)
    little = LittleCut(listing)
    return _Asked(partial(DeviceSetSearch, little, classes, weights, problem.most_stages), slack_s, LOWER)


def within(problem: Problem, ceiling_s: float, out_of_time: Callable[[], bool]) -> Narrowed | None:
    """A split with loads of ``ceiling_s`` at most, as :func:`narrowed` has it, or a bound above that where none has.

    Returns:
        None where this is not decided.
    """
    if not can_list(problem):
        return None
    try:
        if (asked := _asked_of(problem, out_of_time)) is None:
            return None
        found = asked.search(ceiling_s).stages(STEPS[0])
    except (OutOfTimeError, UndecidedError):
        return None
    return Narrowed((), math.nextafter(ceiling_s, math.inf)) if found is None else Narrowed(found, 0.0)


def narrowed(
    problem: Problem,
    best: Callable[[], tuple[Stages, float]],
    bound_s: float,
    out_of_time: Callable[[], bool],
    *,
    quick: bool = False,
) -> Iterator[Narrowed]:
    """Better splits, were there no memory, ties and pins, and bounds on all splits, until they meet or time is up.

    There are none where the sets cannot be listed.

    Args:
        best: the stages of the best split that was taken, and its largest load.
        bound_s: a proven bound.
        quick: whether the first question that is not decided within the first of the ``STEPS`` is the last one.
    """
    if not can_list(problem) or not 0 < best()[1] < math.inf:
        return
    try:
        asked = _asked_of(problem, out_of_time)
    except OutOfTimeError:
        return
    if asked is None:
        return
    slack_s = asked.slack_s
    latest: tuple[float, ChainSearch | DeviceSetSearch] | None = None
    for steps in STEPS[:1] if quick else STEPS:
        last = steps == STEPS[-1]
        undecided_s, undecided = math.inf, 0
        while (ceiling_s := _next_ceiling_s(bound_s, best()[1], undecided_s, slack_s)) is not None:
            if undecided > (0 if quick else asked.lower) and not last:
                break
            value_s = best()[1]
            try:
                # Where nothing can be proven a split may still be found.
                some = last and undecided_s == math.inf
                if latest is None or latest[0] != ceiling_s:
                    latest = ceiling_s, asked.search(ceiling_s)
                found = latest[1].stages(steps, some=some)
            except OutOfTimeError:
                return
            except UndecidedError:
                undecided_s, undecided = ceiling_s, undecided + 1
                continue
            if found is None:
                bound_s = value_s if ceiling_s >= value_s * (1 - SAME) else ceiling_s
                yield Narrowed((), bound_s)
                continue
            yield Narrowed(found, bound_s)
            if best()[1] >= value_s:  # it does not fit, or ties are dear
                undecided_s = ceiling_s
        if undecided_s == math.inf:
            return


def _next_ceiling_s(bound_s: float, value_s: float, undecided_s: float, slack_s: float) -> float | None:
    """A ceiling to ask for, between the bound and what is undecided, or the best; None where those are near."""
    last_s = value_s - slack_s
    if undecided_s > last_s:
        if value_s - bound_s <= CLOSE * value_s:
            return last_s if bound_s < last_s else None
        low, high = (bound_s + share * (value_s - bound_s) for share in ASKED)
        return min(max(low, value_s * (1 - AIM)), high)
    return (bound_s + undecided_s) / 2 if undecided_s - bound_s > NEAR * value_s else None
