"""The last resort for weights that fit nowhere: units whose weights stay in the host's memory, or on its disk.

They are brought to their device for each call and dropped after it. So such a unit takes room on its device only while
it runs, and each call takes its bytes over the rate at which weights come: a problem of the same kind as before, with
other blocks. For inference only: in training autograd would keep what was brought until the backward.

Which weights are best brought follows, stage by stage, from what the stage is: the fewest bytes with which it fits
(formulation/brought.py). So a split with stages priced like that is searched as any other is, over all splits and all
choices at once. What that leaves out is that the host's memory ends, and that the disk is slower: its bound holds for
every choice, and it is met where the host's memory holds all that is brought. Where it does not, or where no search
comes to an end, choices are tried: the fewest of the largest blocks, then fewer of them, then smaller ones in their
place.
"""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from shardwright.errors import ShardwrightError
from shardwright.sharder.planning.clock import clock_s
from shardwright.sharder.planning.exact.search import ROUNDING, simple_bound_s
from shardwright.sharder.planning.formulation.brought import Fetching
from shardwright.sharder.planning.partition import Partition, partition
from shardwright.sharder.planning.problem import Block, Problem
from shardwright.sharder.planning.split_loads import stage_loads
from shardwright.sharder.planning.wide.ceilings import NEAR

__all__ = ["Offload", "Rates", "offload", "offload_least", "with_offloaded"]

Tier = Literal["cpu", "disk"]
SPARED = 8
"""So many of the offloaded blocks are tried on their device again, the smallest first."""
SWAPPED = 24
"""So many smaller blocks are tried in the place of an offloaded one."""


class Rates(NamedTuple):
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
    """Its bound is one on every split with any choice of weights that stay elsewhere."""
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


def _may_come(block: Block, rates: Rates) -> bool:
    """Whether the weights of ``block``, were they the only ones, could be brought to some device where it may be."""
    tier: Tier = "cpu" if block.static_bytes <= rates.host_bytes and any(rates.fetch) else "disk"
    seconds = (_fetch_s(block.static_bytes, fetch, tier, rates.disk) for fetch in rates.fetch)
    return any(ok and s is not None for ok, s in zip(block.allowed, seconds, strict=True))


def _fetch_s(size: int, fetch: float | None, tier: Tier, disk: float | None) -> float | None:
    """Seconds that ``size`` bytes take to a device; None when they cannot come."""
    if tier == "disk":
        return None if disk is None else size / min(disk, fetch or disk)
    return None if fetch is None else size / fetch


def offload(problem: Problem, rates: Rates, *, time_limit_s: float) -> Offload | None:
    """The split of ``problem``, with some weights elsewhere, with the smallest largest load that was found, and a bound
    on those of all choices of such weights; None when nothing fits even so.

    Args:
        problem: of inference; a block that shares a parameter with another is never offloaded.
        rates: how fast weights come.
        time_limit_s: seconds for all that is tried.
    """
    deadline_s = clock_s() + time_limit_s
    relaxed = _relaxed(problem, rates)
    bound_s, found = _least_bound_s(relaxed), None
    try:
        split = partition(relaxed, time_limit_s=time_limit_s / 2)
    except ShardwrightError:
        pass  # too many splits to go through: choices are tried instead
    else:
        if split is None:
            return None
        bound_s = max(bound_s, split.bound_s)
        found = _of_split(problem, relaxed, split, rates)
    if found is None or found.split.value_s > bound_s * (1 + NEAR):
        tried = _tried(problem, rates, deadline_s, lambda one: one.split.value_s)
        found = min((one for one in (found, tried) if one is not None), key=lambda one: one.split.value_s, default=None)
    if found is None:
        return None
    return _with_bound(found, bound_s)


def offload_least(problem: Problem, rates: Rates, known: Offload, *, time_limit_s: float) -> Offload | None:
    """A split with few bytes elsewhere, as few as were found: with few micro-batches a step is that much shorter.

    Args:
        problem: as for :func:`offload`.
        rates: how fast weights come.
        known: what that found, of which this has the bound.
        time_limit_s: seconds for all that is tried.
    """

    def brought(one: Offload) -> int:
        return sum(problem.blocks[v].static_bytes for v in one.tiers)

    found = _tried(problem, rates, clock_s() + time_limit_s, brought)
    return None if found is None else _with_bound(found, known.split.bound_s)


def _with_bound(found: Offload, bound_s: float) -> Offload:
    """The same, with what is proven of every choice."""
    value_s = found.split.value_s
    proven = Partition(found.split.stages, value_s, min(bound_s, value_s), exact=value_s <= bound_s * (1 + ROUNDING))
    return dataclasses.replace(found, split=proven)


def _movable(problem: Problem) -> list[int]:
    """The blocks that may be offloaded, the largest first."""
    tied = 0
    for tie in problem.ties:
        tied |= tie.users
    movable = [v for v, block in enumerate(problem.blocks) if block.static_bytes and not tied >> v & 1]
    return sorted(movable, key=lambda v: -problem.blocks[v].static_bytes)


def _relaxed(problem: Problem, rates: Rates) -> Problem:
    """``problem`` where each stage brings what it has to, from a host's memory that does not end."""
    sizes = [0] * len(problem.blocks)
    for v in _movable(problem):
        sizes[v] = problem.blocks[v].static_bytes
    least = min(filter(None, sizes), default=0)
    tiers: tuple[Tier, ...] = ("cpu", "disk") if rates.host_bytes >= least else ("disk",)

    def rate(fetch: float | None) -> float | None:
        seconds = [_fetch_s(1, fetch, tier, rates.disk) for tier in tiers]
        return max((1 / s for s in seconds if s), default=None)

    return dataclasses.replace(
        problem,
        blocks=tuple(
            dataclasses.replace(block, static_bytes=0) if size else block
            for block, size in zip(problem.blocks, sizes, strict=True)
        ),
        fetching=Fetching(tuple(sizes), tuple(map(rate, rates.fetch))),
    )


def _least_bound_s(relaxed: Problem) -> float:
    """A bound without search: the work, and what is more than all devices hold is brought by some of them."""
    fetching = relaxed.fetching
    bound_s = simple_bound_s(relaxed)
    fastest = max((rate for rate in fetching.rates if rate), default=0.0) if fetching else 0.0
    if fetching is None or not fastest:
        return bound_s
    more = max(0, sum(fetching.sizes) + sum(b.static_bytes for b in relaxed.blocks) - sum(relaxed.caps))
    least_s = [min(seconds) for seconds in relaxed.seconds]
    return max(bound_s, (sum(least_s) + relaxed.microbatches * more / fastest) / relaxed.most_stages)


def _of_split(problem: Problem, relaxed: Problem, split: Partition, rates: Rates) -> Offload | None:
    """The split with what its stages bring; None where neither the host's memory nor the disk has room for that."""
    chosen: list[int] = []
    closed = 0
    for position, (device, members) in enumerate(split.stages):
        brought = relaxed.brought(closed, closed | members, device, len(split.stages) - 1 - position)
        assert brought is not None, "a split that was found is feasible"
        chosen += brought.blocks
        closed |= members
    changed = with_offloaded(problem, sorted(chosen, key=lambda v: -problem.blocks[v].static_bytes), rates)
    loads = stage_loads(changed[0], split.stages) if changed else None
    if changed is None or loads is None:
        return None
    return Offload(changed[0], dataclasses.replace(split, value_s=max(loads)), changed[1])


def _tried(problem: Problem, rates: Rates, deadline_s: float, value: Callable[[Offload], float]) -> Offload | None:
    """Of some choices of blocks, few of the largest, fewer, smaller ones, the one with the least ``value``."""
    movable = [v for v in _movable(problem) if _may_come(problem.blocks[v], rates)]
    tries = len(movable).bit_length() + SPARED + SWAPPED

    def attempt(chosen: Sequence[int]) -> Offload | None:
        changed = None if clock_s() >= deadline_s else with_offloaded(problem, chosen, rates)
        if changed is None:
            return None
        try:
            split = partition(changed[0], time_limit_s=max(0.0, deadline_s - clock_s()) / tries)
        except ShardwrightError:
            return None
        return None if split is None else Offload(changed[0], split, changed[1])

    # The more blocks, the less room there is for all of them on the host.
    most = bisect.bisect(
        range(1, len(movable) + 1), False, key=lambda n: not with_offloaded(problem, movable[:n], rates)
    )
    fewest = 1
    best = attempt(movable[:most])
    if best is None:
        return None
    while fewest < most:
        middle = (fewest + most) // 2
        found = attempt(movable[:middle])
        if found is None:
            fewest = middle + 1
        else:
            most, best = middle, found
    for v in movable[most - 1 :: -1][:SPARED]:
        found = attempt([u for u in best.tiers if u != v])
        if found is not None and value(found) <= value(best):
            best = found
    return _with_smaller(problem, best, movable, attempt, value)


def _with_smaller(
    problem: Problem,
    best: Offload,
    movable: Sequence[int],
    attempt: Callable[[Sequence[int]], Offload | None],
    value: Callable[[Offload], float],
) -> Offload:
    """``best``, or better: with smaller blocks in the place of offloaded ones."""
    tries, sizes = SWAPPED, [block.static_bytes for block in problem.blocks]
    for v in list(best.tiers):
        for u in reversed(movable[movable.index(v) + 1 :]):
            if sizes[u] == sizes[v] or u in best.tiers or not tries:
                continue
            tries -= 1
            found = attempt([u if each == v else each for each in best.tiers])
            if found is not None and value(found) < value(best):
                best = found
                break
    return best
