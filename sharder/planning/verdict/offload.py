"""The last resort for weights that fit nowhere: units whose weights stay in the host's memory, or on its disk.

They are brought to their device for each call and dropped after it. So such a unit takes room on its device only while
it runs, and each call takes its bytes over the rate at which weights come: a problem of the same kind as before, with
other blocks. What has to be offloaded is found by trying: first the fewest of the largest blocks, then each of them is
spared if it can be. For inference only: in training autograd would keep what was brought until the backward.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from shardwright.errors import ShardwrightError
from shardwright.sharder.planning.partition import Partition, partition
from shardwright.sharder.planning.problem import Problem

__all__ = ["Offload", "Rates", "offload", "with_offloaded"]

Tier = Literal["cpu", "disk"]
SPARED = 8
"""So many of the offloaded blocks are tried on their device again, the smallest first."""


@dataclass(frozen=True)
class Rates:
    """How fast weights come, in bytes a second; None = not known, so that nothing can come that way."""

    fetch: tuple[float | None, ...]
    """By device: from the host's memory; None for a CPU worker, whose memory is the host's."""
    disk: float | None
    host_bytes: int
    """Of the host's memory that weights may take."""


@dataclass(frozen=True)
class Offload:
    """A split that fits because the weights of some blocks stay elsewhere."""

    problem: Problem
    split: Partition
    tiers: Mapping[int, Tier]
    """Block -> where its weights stay."""


def with_offloaded(problem: Problem, chosen: Sequence[int], rates: Rates) -> tuple[Problem, dict[int, Tier]] | None:
    """``problem`` with the weights of the ``chosen`` blocks elsewhere: in the host's memory as far as it goes, else on
    disk. None when they cannot come from there.
    """
    blocks = list(problem.blocks)
    tiers: dict[int, Tier] = {}
    left = rates.host_bytes if any(rates.fetch) else 0
    for v in chosen:
        block = blocks[v]
        tier: Tier = "cpu" if block.static_bytes <= left else "disk"
        if tier == "cpu":
            left -= block.static_bytes
        elif rates.disk is None:
            return None
        seconds = [_fetch_s(block.static_bytes, fetch, tier, rates.disk) for fetch in rates.fetch]
        allowed = tuple(a and s is not None for a, s in zip(block.allowed, seconds, strict=True))
        if not any(allowed):
            return None
        tiers[v] = tier
        blocks[v] = dataclasses.replace(
            block,
            forward_s=tuple(f + (s or 0.0) for f, s in zip(block.forward_s, seconds, strict=True)),
            static_bytes=0,
            allowed=allowed,
        )
    brought = problem.ledger.with_more({v: problem.blocks[v].static_bytes for v in tiers})
    return dataclasses.replace(problem, blocks=tuple(blocks), ledger=brought), tiers


def _fetch_s(size: int, fetch: float | None, tier: Tier, disk: float | None) -> float | None:
    """Seconds that ``size`` bytes take to a device; None when they cannot come."""
    if tier == "disk":
        return None if disk is None else size / min(disk, fetch or disk)
    return None if fetch is None else size / fetch


def offload(problem: Problem, rates: Rates, *, time_limit_s: float) -> Offload | None:
    """The split of ``problem`` with as little offloaded as was found; None when nothing fits even so.

    Args:
        problem: of inference; a block that shares a parameter with another is never offloaded.
        rates: how fast weights come.
        time_limit_s: seconds for each split that is tried.
    """
    tied = 0
    for tie in problem.ties:
        tied |= tie.users
    movable = [v for v, block in enumerate(problem.blocks) if block.static_bytes and not tied >> v & 1]
    movable.sort(key=lambda v: -problem.blocks[v].static_bytes)

    def attempt(chosen: Sequence[int]) -> Offload | None:
        changed = with_offloaded(problem, chosen, rates)
        if changed is None:
            return None
        try:
            split = partition(changed[0], time_limit_s=time_limit_s)
        except ShardwrightError:
            return None
        return None if split is None else Offload(changed[0], split, changed[1])

    best = attempt(movable)
    if best is None:
        return None
    fewest, most = 1, len(movable)
    while fewest < most:
        middle = (fewest + most) // 2
        found = attempt(movable[:middle])
        if found is None:
            fewest = middle + 1
        else:
            most, best = middle, found
    for v in movable[most - 1 :: -1][:SPARED]:
        found = attempt([u for u in best.tiers if u != v])
        if found is not None:
            best = found
    return best
