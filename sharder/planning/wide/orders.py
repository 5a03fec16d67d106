"""Graphs with too many closed sets: many topological orders, each cut at its best.

Each order of the blocks is a line, which chain.py cuts in milliseconds. An order that keeps the stages of the best
split one after another, with the blocks within each drawn anew, can be cut as before and in other ways besides: the
best never gets worse, and each cut looks at all borders at once. In some orders a few blocks are moved to a
neighbouring stage, so that blocks on both sides of a border change places.

This proves nothing: the optimum may be along an order that is never drawn. The bound is another's.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence

from shardwright.profiler.ordering import topological_order
from shardwright.sharder.planning.exact.line import split_line
from shardwright.sharder.planning.exact.search import Stages
from shardwright.sharder.planning.problem import Problem, bits

__all__ = ["best_of_orders", "keys_of", "topological"]

PATIENCE = 200
"""Orders in a row without an improvement, after which no more are tried."""


def topological(problem: Problem, keys: Sequence[float]) -> list[int]:
    """The blocks in a topological order, of those that are ready always one with the smallest key."""
    after: dict[int, list[int]] = {v: [] for v in range(len(problem.blocks))}
    for v, before in enumerate(problem.predecessors):
        for u in bits(before):
            after[u].append(v)
    return topological_order(after, lambda v: (keys[v], v))


def best_of_orders(
    problem: Problem,
    classes: Sequence[Sequence[int]],
    device_orders: Sequence[Sequence[int]],
    best: Callable[[], tuple[Stages, float]],
    bound_s: float,
    out_of_time: Callable[[], bool],
) -> Iterator[Stages]:
    """Splits, each with a smaller largest load than the ``best`` so far, were there no memory and no ties.

    Args:
        best: the stages of the best split that was taken, and its largest load.
    """
    random_ = random.Random(0)
    failures = 0
    while failures < PATIENCE and best()[1] > bound_s and not out_of_time():
        stages, value_s = best()
        order = topological(problem, keys_of(problem, stages, random_))
        split = split_line(
            problem, order, classes, device_orders, bound_s=bound_s, below_s=value_s, out_of_time=out_of_time
        )
        failures += 1
        if split is not None:
            yield split.stages
            if best()[1] < value_s * (1 - 1e-5):
                failures = 0


def keys_of(problem: Problem, stages: Stages, random_: random.Random) -> list[float]:
    """By block: its stage, and a place within it that is partly drawn; a few blocks are moved across the borders."""
    drawn = random_.choice((0.2, 1.0))
    keys = [0.0] * len(problem.blocks)
    for s, (_, members) in enumerate(stages):
        inside = list(bits(members))
        for i, v in enumerate(inside):
            keys[v] = s + 0.999 * ((1 - drawn) * i / len(inside) + drawn * random_.random())
    for _ in range(random_.choice((0, 0, 2, 8))):
        keys[random_.randrange(len(keys))] += random_.choice((-1.0, 1.0))
    return keys
