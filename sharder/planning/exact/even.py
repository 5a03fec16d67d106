"""Even cuts of the topological order: in proportion to the speed of the devices, and the naive ones.

The first are the first incumbents.

The compute of their stages is quickly summed up, and bounds their largest load from below: mostly that is enough to see
that a split is not the best of them. Memory and transfers take a hundred times as long to look at.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Literal, NamedTuple

from shardwright.sharder.planning.exact.search import Stages
from shardwright.sharder.planning.problem import Block, Problem
from shardwright.sharder.planning.split_loads import stage_loads

__all__ = ["NAIVE", "EvenSplit", "best_even_split", "cut_evenly", "even_splits", "naive_split"]

NAIVE: dict[Literal["equal count", "by parameters"], Callable[[Block], float]] = {
    "equal count": lambda block: len(block.units),
    "by parameters": lambda block: block.static_bytes,
}
"""What the naive splits share out evenly."""
UNTIL = 0.25
"""The share of the time until which they are looked at, once one fits."""


class EvenSplit(NamedTuple):
    """A split, and the largest compute of its stages in seconds of a step: its largest load is no smaller."""

    compute_s: float
    stages: Stages


def even_splits(problem: Problem, device_orders: Sequence[Sequence[int]]) -> list[EvenSplit]:
    """A split for each of ``device_orders`` and each number of stages."""
    return [
        _even_split(problem, order[:count]) for order in device_orders for count in range(1, problem.most_stages + 1)
    ]


def _even_split(problem: Problem, devices: Sequence[int]) -> EvenSplit:
    """The split over ``devices`` whose shares are in proportion to their speed."""
    total_s = [problem.total_s[d] for d in devices]
    speed = [1 / max(total, 1e-30) for total in total_s]
    whole = sum(speed)
    # A block belongs to the stage that its middle falls into; a stage is full at its share of the work.
    ends: list[int] = []
    filled, device, total, full = 0.0, devices[0], total_s[0] or 1.0, speed[0] / whole
    for v, seconds in enumerate(problem.seconds):
        share = seconds[device] / total
        while len(ends) < len(devices) - 1 and filled + share / 2 > full:
            filled -= full
            ends.append(v)
            device, total, full = devices[len(ends)], total_s[len(ends)] or 1.0, speed[len(ends)] / whole
            share = seconds[device] / total
        filled += share
    ends += [len(problem.blocks)] * (len(devices) - len(ends))
    pieces = [*zip(devices, [0, *ends], ends, strict=False)]
    compute_s = max(sum(map(itemgetter(device), problem.seconds[start:end])) for device, start, end in pieces)
    return EvenSplit(compute_s, tuple((device, (1 << end) - (1 << start)) for device, start, end in pieces))


def best_even_split(
    splits: Sequence[EvenSplit],
    loads_of: Callable[[Stages], Sequence[float] | None],
    below_s: float,
    spent: Callable[[float], bool],
) -> tuple[Stages, float] | None:
    """The first of those with the smallest largest load, and that load in s; None where none is below ``below_s``.

    Args:
        splits: what there is to choose from.
        loads_of: the load of each stage, or None where a stage does not fit.
        below_s: seconds of a step.
        spent: whether a share of the time has passed. One split is looked at in any case.
    """
    best = below_s, -1
    for compute_s, number in sorted((split.compute_s, number) for number, split in enumerate(splits)):
        if compute_s > best[0]:
            break
        loads = loads_of(splits[number].stages)
        if loads:
            best = min(best, (max(loads), number))
        if spent(UNTIL if best[1] >= 0 else 1.0):
            break
    value_s, number = best
    return (splits[number].stages, value_s) if number >= 0 else None


def cut_evenly(weights: Sequence[float], parts: int) -> list[int]:
    """Where each part ends for equal shares of ``weights``, as nearly as whole items allow; every part gets one."""
    ends: list[int] = []
    total, running, position = sum(weights), 0.0, 0
    for part in range(1, parts):
        target = total * part / parts
        last = len(weights) - (parts - part)  # the others need one each
        first = ends[-1] + 1 if ends else 1
        while position < last and (position < first or running + weights[position] / 2 < target):
            running += weights[position]
            position += 1
        ends.append(position)
    return [*ends, len(weights)]


def naive_split(problem: Problem, weight: Callable[[Block], float]) -> Stages:
    """Equal shares of ``weight`` over the devices as given, over most of them that is possible; nothing if there are
    not two."""
    weights = [weight(block) for block in problem.blocks]
    for parts in range(min(problem.most_stages, len(weights)), 1, -1):
        ends = cut_evenly(weights, parts)
        members = [(1 << end) - (1 << start) for start, end in zip([0, *ends], ends, strict=False)]
        stages = tuple(enumerate(members))
        if stage_loads(problem, stages) is not None:
            return stages
    return ()
