"""What keeps every split from obeying the pins: their places, or the memory of a device that they fill."""

from __future__ import annotations

import contextlib
import dataclasses
from typing import NamedTuple

from shardwright.errors import ShardwrightError
from shardwright.sharder.planning.clock import clock_s
from shardwright.sharder.planning.formulation.relaxed import timeless, without_caps
from shardwright.sharder.planning.formulation.words import lack_of, size_of, units_in_words
from shardwright.sharder.planning.partition import partition
from shardwright.sharder.planning.pricing import attempts_at
from shardwright.sharder.planning.problem import Problem, bits

__all__ = ["Lack", "lack_of_pinned", "proven_not_to_fit"]

NEAR_BYTES = 2**20
"""How near the smallest sufficient cap of a device is found."""
MOST_S = 5.0
"""For one question at most."""


class Lack(NamedTuple):
    """A device on which the memory does not do for what the pins put there."""

    device: str
    members: int
    """Bit mask of the blocks that it holds in the split for which its memory has to grow least."""
    need: int
    """Bytes that these take there."""
    cap: int
    enough: bool
    """Whether a split fits once the device has so much, and the others what they have."""

    def in_words(self, problem: Problem) -> str:
        """Who lacks how much."""
        units = [unit for v in bits(self.members) for unit in problem.blocks[v].units]
        pinned = [unit for v in bits(self.members) for unit in problem.blocks[v].units if problem.blocks[v].pinned]
        others = f" (pinned there: {units_in_words(pinned)})" if pinned and pinned != units else ""
        takes = "takes" if len(units) == 1 else "take"
        return (
            f"at {problem.microbatches} micro-batches {units_in_words(units)}{others} {takes} {size_of(self.need)} on "
            f"{self.device}, {lack_of(self.need - self.cap)} more than the {size_of(self.cap)} that it has"
        )


def lack_of_pinned(problem: Problem, deadline_s: float) -> Lack | None:
    """The device whose memory is what the pins lack; None where it is none alone.

    A device lacks memory if no split obeys the pins with any memory of the others. Where that is none, one does that
    has to be given the least for a split to fit.
    """
    devices = range(len(problem.devices))
    pinned_to = [d for d in devices if any(b.pinned and b.allowed[d] for b in problem.blocks)]
    for device in pinned_to:
        roomy = without_caps(problem, [d for d in devices if d != device])
        if proven_not_to_fit(roomy, deadline_s):
            lack = _least(problem, device, deadline_s)
            return lack or _least(roomy, device, deadline_s, enough=False)
    lacks = [lack for device in pinned_to if (lack := _least(problem, device, deadline_s)) is not None]
    return min(lacks, key=lambda lack: lack.need - lack.cap, default=None)


def _least(problem: Problem, device: int, deadline_s: float, *, enough: bool = True) -> Lack | None:
    """How much ``device`` has to have for a split to fit; None where no memory of it alone is enough."""
    found = _held(without_caps(problem, [device]), device, deadline_s)
    if found is None:
        return None
    low = problem.caps[device]
    while found[1] - low > NEAR_BYTES and clock_s() < deadline_s:
        middle = (low + found[1]) // 2
        caps = (*problem.caps[:device], middle, *problem.caps[device + 1 :])
        smaller = _held(dataclasses.replace(problem, caps=caps), device, deadline_s)
        if smaller is None:
            low = middle
        else:
            found = smaller
    return Lack(problem.devices[device], *found, problem.caps[device], enough)


def _held(problem: Problem, device: int, deadline_s: float) -> tuple[int, int] | None:
    """The blocks that ``device`` has in a split that fits, and the bytes that they take; None where none was found."""
    for attempt in attempts_at(timeless(problem)):
        split = None
        with contextlib.suppress(ShardwrightError):
            split = partition(attempt, time_limit_s=max(0.0, min(MOST_S, deadline_s - clock_s())))
        closed = 0
        for position, (at, members) in enumerate(split.stages if split else ()):
            if at == device:
                stage = closed, closed | members, device, len(split.stages) - 1 - position if split else 0
                return members, attempt.memory_bytes(*stage, recomputed=attempt.recomputes(*stage))
            closed |= members
    return None


def proven_not_to_fit(problem: Problem, deadline_s: float) -> bool:
    """Whether the search went through, and found no split."""
    with contextlib.suppress(ShardwrightError):
        return all(
            partition(attempt, time_limit_s=max(0.0, min(MOST_S, deadline_s - clock_s()))) is None
            for attempt in attempts_at(timeless(problem))
        )
    return False
