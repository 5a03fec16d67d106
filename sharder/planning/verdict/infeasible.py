"""Why nothing fits, and the smallest changes with which something would."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator

from shardwright.errors import ShardwrightError
from shardwright.profiler.formats.given_devices import AMPLE_BYTES
from shardwright.sharder.planning.clock import clock_s
from shardwright.sharder.planning.formulation.relaxed import (
    all_usable,
    checkpointed,
    unpinned,
    with_another,
    with_caps_times,
    with_smaller_microbatches,
    without_caps,
)
from shardwright.sharder.planning.formulation.words import (
    lack_of,
    links_in_words,
    mib_of,
    name_of,
    size_of,
    together_in_words,
)
from shardwright.sharder.planning.partition import partition
from shardwright.sharder.planning.pricing import attempts_at
from shardwright.sharder.planning.problem import Problem
from shardwright.sharder.planning.verdict.pinned_memory import Lack, lack_of_pinned, proven_not_to_fit

__all__ = ["changes_that_fit", "why_nothing_fits"]

MOST_ADDED = 4
"""So many more devices are tried."""
MOST_PARTS = 8
"""Micro-batches are made so many times smaller at most."""
CAPS_WITHIN = 0.01
"""How near the smallest sufficient factor of the memory caps is found."""


def why_nothing_fits(problems: list[Problem], deadline_s: float, *, batch: int, train: bool) -> str:
    """Which block or whole exceeds the memory, at the smallest micro-batch, or that the pins leave nothing.

    Args:
        problems: at each number of micro-batches.
        deadline_s: of ``clock_s()``; what would fit is looked for until then.
        batch: samples of a step, which micro-batches divide.
        train: whether there is a backward.
    """
    problem = max(problems, key=lambda p: p.microbatches)
    for v, block in enumerate(problem.blocks):
        rooms = [
            (problem.caps[d], name, problem.least_bytes(v, d))
            for d, name in enumerate(problem.devices)
            if block.allowed[d]
        ]
        if not rooms:
            return f"{name_of(block)} is pinned to where it does not fit, not even alone: remove the pin"
        room, device, need = max(rooms)
        if need > room and block.pinned and (lack := lack_of_pinned(problem, deadline_s)) is not None:
            return _why_pinned_lacks(problem, lack, deadline_s, batch=batch, train=train)
        if need > room:
            which = "where it is pinned" if block.pinned else "the roomiest device that it may be on"
            changes = [*changes_that_fit(problem, deadline_s, batch=batch, train=train)]
            return (
                f"at {problem.microbatches} micro-batches {together_in_words(block)} at least {size_of(need)}; "
                f"{device}, {which}, has {size_of(room)}, {lack_of(need - room)} too little: "
                + ("; or ".join(changes) if changes else "profile more micro-batches, or use a larger device")
            )
    if problem.unusable and _fits(all_usable(problem), deadline_s):
        return (
            f"no split fits without corrupt links ({links_in_words(problem)}), which change what they carry: give the "
            "devices more memory with --memory, or mend the links; `report` on the profile says how"
        )
    if any(block.pinned for block in problem.blocks):
        return _why_not_as_pinned(problem, deadline_s, batch=batch, train=train)
    return _why_not(problem, deadline_s, batch=batch, train=train)


def _why_not_as_pinned(problem: Problem, deadline_s: float, *, batch: int, train: bool) -> str:
    """Whether it is where the pins are, or the memory of which device, and what would do."""
    fits_unpinned = _fits(unpinned(problem), deadline_s)
    without = "though one without them fits" if fits_unpinned else "and none that fits was found without them either"
    if proven_not_to_fit(without_caps(problem, range(len(problem.devices))), deadline_s):
        links = f" (corrupt links are not used: {links_in_words(problem)})" if problem.unusable else ""
        return (
            f"no split obeys the pins, {without}{links}: each device takes one piece of the forward, "
            "in its order; pin neighbours alike, or remove a pin"
        )
    lack = lack_of_pinned(problem, deadline_s)
    if lack is None:
        fewer = "; or leave the pins out, since a split without them fits" if fits_unpinned else ""
        return f"{_why_not(problem, deadline_s, batch=batch, train=train)}{fewer}"
    return _why_pinned_lacks(problem, lack, deadline_s, batch=batch, train=train)


def _why_pinned_lacks(problem: Problem, lack: Lack, deadline_s: float, *, batch: int, train: bool) -> str:
    """Which device lacks how much for what is pinned to it, and what would do."""
    changes = [f"--memory {lack.device}={mib_of(lack.need)}MiB is enough"] if lack.enough else []
    if _fits(unpinned(problem), deadline_s):
        changes.append("leave the pins out, since a split without them fits")
    factor = _no_factor if lack.enough else _least_factor
    changes += changes_that_fit(problem, deadline_s, batch=batch, train=train, least_factor=factor)
    return f"no split fits as pinned: {lack.in_words(problem)}: {'; or '.join(changes) or 'remove a pin'}"


def _why_not(problem: Problem, deadline_s: float, *, batch: int, train: bool) -> str:
    """What the model takes, what the devices have, and what would do."""
    static = sum(block.static_bytes for block in problem.blocks)
    whole = problem.memory_bytes(0, (1 << len(problem.blocks)) - 1, 0, 0)
    caps = ", ".join(f"{device} {size_of(cap)}" for device, cap in zip(problem.devices, problem.caps, strict=True))
    changes = [*changes_that_fit(problem, deadline_s, batch=batch, train=train)]
    return (
        f"no split fits{', not even with stages computed anew' if problem.recompute == 'auto' else ''}: "
        f"at {problem.microbatches} micro-batches the model needs {size_of(whole)} in one piece "
        f"({size_of(static)} of it weights, gradients and optimizer state); the devices have {caps}: "
        + ("; or ".join(changes) if changes else "add devices, raise --memory, or profile more micro-batches")
    )


def changes_that_fit(
    problem: Problem,
    deadline_s: float,
    *,
    batch: int,
    train: bool,
    fits: Callable[[Problem, float], bool] | None = None,
    least_factor: Callable[[Problem, float], float | None] | None = None,
) -> Iterator[str]:
    """The smallest change of each kind with which a split was found, in words; arguments as above, and

    Args:
        problem: in which nothing fits.
        deadline_s: as above.
        batch: as above.
        train: as above.
        fits: whether something fits a problem, until a time of ``clock_s()``; by default a chain of stages.
        least_factor: of the memory caps with which something does; None where more memory for all is not asked for.
    """
    fits = fits or _fits
    times = (least_factor or _least_factor)(problem, deadline_s)
    if times is not None:
        raised = with_caps_times(problem, times).caps
        more = " ".join(
            f"--memory {name}={mib_of(cap)}MiB"
            for name, cap in zip(problem.devices, raised, strict=True)
            if cap < AMPLE_BYTES
        )
        yield f"give each device {math.ceil(100 * (times - 1))}% more memory ({more})"
    roomiest = max(range(len(problem.devices)), key=problem.caps.__getitem__)
    added = problem
    for count in range(1, MOST_ADDED + 1):
        added = with_another(added, roomiest)
        if fits(added, deadline_s):
            yield f"add {count} device{'s' * (count > 1)} like {problem.devices[roomiest]}"
            break
    parts = 2
    while parts <= MOST_PARTS and batch % (problem.microbatches * parts) == 0:
        if fits(with_smaller_microbatches(problem, parts), deadline_s):
            yield f"profile --microbatches {problem.microbatches * parts}, which should fit (estimated)"
            break
        parts *= 2
    if train and problem.recompute == "never" and fits(dataclasses.replace(problem, recompute="auto"), deadline_s):
        yield "let stages be computed anew in the backward (--recompute auto)"
    elif train and fits(checkpointed(problem), deadline_s):
        yield "compute activations anew in the backward (torch.utils.checkpoint around each unit), which should fit"


def _no_factor(_problem: Problem, _deadline_s: float) -> None:
    """Where more memory for one device is enough, more for all is not asked for."""


def _least_factor(problem: Problem, deadline_s: float) -> float | None:
    """The smallest factor of all memory caps with which a split was found, to one part in a hundred."""
    low, high = 1.0, 1.0 + CAPS_WITHIN
    while not _fits(with_caps_times(problem, high), deadline_s):
        low, high = high, 1 + 2 * (high - 1)
        if high > 2**10 or clock_s() > deadline_s:
            return None
    while high / low > 1 + CAPS_WITHIN and clock_s() < deadline_s:
        middle = (low + high) / 2
        if _fits(with_caps_times(problem, middle), deadline_s):
            high = middle
        else:
            low = middle
    return high


def _fits(problem: Problem, deadline_s: float) -> bool:
    """Whether some split of ``problem`` was found in the time that is left."""
    for attempt in attempts_at(problem):
        with contextlib.suppress(ShardwrightError):
            if partition(attempt, time_limit_s=max(0.0, min(5.0, deadline_s - clock_s()))) is not None:
                return True
    return False
