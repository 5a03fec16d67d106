"""Graphs with too many closed sets: ceilings are asked for until the best split and its bound meet.

Where devices are alike chains of cuts are looked for (windows.py), else those of all orders at once (device_sets.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

from shardwright.sharder.planning.exact.search import OutOfTimeError, Stages
from shardwright.sharder.planning.problem import Problem
from shardwright.sharder.planning.wide.device_sets import DeviceSetSearch
from shardwright.sharder.planning.wide.lists import Lists
from shardwright.sharder.planning.wide.windows import ChainSearch, UndecidedError

__all__ = ["NEAR", "Narrowed", "narrowed", "within"]

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


def within(problem: Problem, ceiling_s: float, out_of_time: Callable[[], bool]) -> Narrowed | None:
    """A split with loads of ``ceiling_s`` at most, as :func:`narrowed` has it, or a bound above that where none has.

    Returns:
        None where this is not decided.
    """
    lists = Lists(problem)
    if not lists.possible:
        return None
    try:
        found = lists.searched(range(len(problem.devices)), ceiling_s, None, out_of_time).stages(STEPS[0])
    except (OutOfTimeError, UndecidedError):
        return None
    return Narrowed((), math.nextafter(ceiling_s, math.inf)) if found is None else Narrowed(found, 0.0)


def narrowed(
    lists: Lists,
    best: Callable[[], tuple[Stages, float]],
    bound_s: float,
    out_of_time: Callable[[], bool],
    *,
    quick: bool = False,
) -> Iterator[Narrowed]:
    """Better splits, were there no memory, ties and pins, and bounds on all splits, until they meet or time is up.

    There are none where the sets cannot be listed.

    Args:
        lists: of the problem.
        best: the stages of the best split that was taken, and its largest load.
        bound_s: a proven bound.
        quick: whether the first question that is not decided within the first of the ``STEPS`` is the last one.
    """
    if not lists.possible or not 0 < best()[1] < math.inf:
        return
    devices, lower = range(len(lists.problem.devices)), 0 if quick or lists.alike else LOWER
    try:
        slack_s = lists.slack_s(best()[1], out_of_time)
    except OutOfTimeError:
        return
    latest: tuple[float, ChainSearch | DeviceSetSearch] | None = None
    for steps in STEPS[:1] if quick else STEPS:
        last = steps == STEPS[-1]
        undecided_s, undecided = math.inf, 0
        while (ceiling_s := _next_ceiling_s(bound_s, best()[1], undecided_s, slack_s)) is not None:
            if undecided > lower and not last:
                break
            value_s = best()[1]
            try:
                # Where nothing can be proven a split may still be found.
                some = last and undecided_s == math.inf
                if latest is None or latest[0] != ceiling_s:
                    latest = ceiling_s, lists.searched(devices, ceiling_s, None, out_of_time)
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
