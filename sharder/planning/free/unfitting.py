"""Why no free assignment fits, and the smallest changes with which one would: as infeasible.py for chains of stages."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Sequence

from shardwright.errors import ShardwrightError
from shardwright.sharder.planning.clock import Budget, clock_s
from shardwright.sharder.planning.formulation.relaxed import timeless, unpinned, with_caps_times
from shardwright.sharder.planning.formulation.words import (
    count_of,
    lack_of,
    links_in_words,
    mib_of,
    name_of,
    size_of,
    together_in_words,
    units_in_words,
)
from shardwright.sharder.planning.free.assign import assign
from shardwright.sharder.planning.free.assignment import held_at_once, peak_bytes
from shardwright.sharder.planning.free.least_memory import least_share_freely
from shardwright.sharder.planning.problem import Block, Problem
from shardwright.sharder.planning.verdict.infeasible import CAPS_WITHIN, changes_that_fit

__all__ = ["why_no_assignment_fits"]

MOST_S = 3.0
"""For one question at most."""
MOST_TIMES = 2**10
"""So many times the memory caps, a smallest factor of them is looked for."""


def why_no_assignment_fits(
    problems: Sequence[Problem], deadline_s: float, *, batch: int, train: bool, latency: bool
) -> str:
    """Which unit, set of pinned units or whole exceeds the memory, and what would fit.

    Args:
        problems: at each number of micro-batches, with the transfers of a free assignment.
        deadline_s: of ``clock_s()``; what would fit is looked for until then.
        batch: samples of a step, which micro-batches divide.
        train: whether there is a backward.
        latency: whether one input comes through at a time.
    """
    asked = max(problems, key=lambda p: p.microbatches)
    problem = _at_once(asked, latency=latency)
    count = held_at_once(problem)
    held = f", with {count_of(count, 'micro-batch')} held at once"
    lacks = _pinned_that_lack(problem, deadline_s) or _block_that_lacks(problem)
    changes = [lacks.change] if lacks is not None and lacks.change else []
    one_is_enough = bool(changes)
    if any(block.pinned for block in problem.blocks) and _fits(unpinned(asked), deadline_s, latency=latency):
        changes.append("leave the pins out, since an assignment without them fits")
    changes += changes_that_fit(
        asked,
        deadline_s,
        batch=batch,
        train=train,
        fits=lambda changed, until_s: _fits(changed, until_s, latency=latency),
        least_factor=lambda changed, until_s: (
            None if one_is_enough else _least_factor(changed, until_s, latency=latency)
        ),
    )
    links = f"; corrupt links are not used ({links_in_words(problem)})" if problem.unusable else ""
    remedy = "; or ".join(changes) or "raise --memory, add devices, or profile smaller micro-batches"
    words = lacks.words if lacks is not None else _whole(problem)
    if lacks is not None and lacks.of_all and not latency:
        held = ""  # one device alone holds what its schedule says
    return f"no free assignment fits{held}: {words}{links}: {remedy}"


def _at_once(problem: Problem, *, latency: bool) -> Problem:
    """The problem of what is on its way at once: under latency one micro-batch."""
    return dataclasses.replace(problem, microbatches=1) if latency else problem


@dataclasses.dataclass(frozen=True)
class _Lack:
    """What does not fit where it may be."""

    words: str
    change: str = ""
    """What alone is enough."""
    of_all: bool = False
    """Whether it is the whole model."""


def _block_that_lacks(problem: Problem) -> _Lack | None:
    """A block that is too large for every device that it may be on, with as many micro-batches as a part holds."""
    parted = dataclasses.replace(problem, schedule="gpipe", microbatches=held_at_once(problem))
    for v, block in enumerate(problem.blocks):
        rooms = [(problem.caps[d], d) for d, allowed in enumerate(block.allowed) if allowed]
        if not rooms:
            return _Lack(f"{name_of(block)} is pinned to where it does not fit, not even alone", "remove the pin")
        cap, device = max(rooms)
        need = min(parted.least_bytes(v, device), _alone_bytes(problem, device))
        if need > cap:
            return _Lack(_too_large(block, need, problem.devices[device], cap))
    return None


def _alone_bytes(problem: Problem, device: int) -> int:
    """What the whole model takes on a device, which may hold fewer micro-batches than a part does at once; endless
    where it may not be there."""
    if not all(block.allowed[device] for block in problem.blocks):
        return sys.maxsize
    return peak_bytes(problem, (1 << len(problem.blocks)) - 1, device)


def _too_large(block: Block, need: int, device: str, cap: int) -> str:
    which = "where it is pinned" if block.pinned else "the roomiest device that it may be on"
    return (
        f"{together_in_words(block)} at least {size_of(need)}, {lack_of(need - cap)} more than the {size_of(cap)} "
        f"of {device}, {which}"
    )


def _pinned_that_lack(problem: Problem, deadline_s: float) -> _Lack | None:
    """What is pinned to a device that does not hold it, without anything else there."""
    for device, name in enumerate(problem.devices):
        members = sum(1 << v for v, b in enumerate(problem.blocks) if b.pinned and b.allowed[device])
        need, cap = min(peak_bytes(problem, members, device), _alone_bytes(problem, device)), problem.caps[device]
        if not members or need <= cap:
            continue
        units = [unit for v, b in enumerate(problem.blocks) if members >> v & 1 for unit in b.units]
        caps = (*problem.caps[:device], need, *problem.caps[device + 1 :])
        enough = _fits(dataclasses.replace(problem, caps=caps), deadline_s)
        return _Lack(
            f"{units_in_words(units)}, as pinned, {'takes' if len(units) == 1 else 'take'} {size_of(need)} on {name}, "
            f"{lack_of(need - cap)} more than the {size_of(cap)} that it has",
            f"--memory {name}={mib_of(need)}MiB is enough" if enough else "",
            of_all=members == (1 << len(problem.blocks)) - 1,
        )
    return None


def _whole(problem: Problem) -> str:
    """What the model takes with so many micro-batches held, and what there is."""
    static = sum(block.static_bytes for block in problem.blocks)
    all_held = dataclasses.replace(problem, schedule="gpipe", microbatches=held_at_once(problem))
    whole = peak_bytes(all_held, (1 << len(problem.blocks)) - 1, 0)
    caps = ", ".join(f"{name} {size_of(cap)}" for name, cap in zip(problem.devices, problem.caps, strict=True))
    return (
        f"the model takes {size_of(whole)} then ({size_of(static)} of it weights, gradients and optimizer state); the "
        f"devices have {caps}"
    )


def _fits(problem: Problem, deadline_s: float, *, latency: bool = False) -> bool:
    """Whether some assignment of ``problem`` was found in the time that is left; none has stages computed anew."""
    if problem.recompute != "never":
        return False
    with contextlib.suppress(ShardwrightError):
        budget = Budget(max(0.0, min(MOST_S, deadline_s - clock_s())))
        return assign(timeless(_at_once(problem, latency=latency)), budget) is not None
    return False


def _least_factor(problem: Problem, deadline_s: float, *, latency: bool) -> float | None:
    """The smallest factor of all memory caps with which an assignment was found."""
    roomy = with_caps_times(_at_once(timeless(problem), latency=latency), MOST_TIMES)
    with contextlib.suppress(ShardwrightError):
        share = least_share_freely(roomy, Budget(max(0.0, min(MOST_S, deadline_s - clock_s()))))
        if share is not None:
            return share.value * MOST_TIMES * (1 + CAPS_WITHIN / 100)
    return None
