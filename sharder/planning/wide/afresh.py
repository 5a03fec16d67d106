r"""Graphs with too many closed sets on devices that differ: moves begun again, from other orders of the devices.

Moves of blocks (shifting.py) leave the devices where they are, and neighbours that are split anew (recut.py) leave most
of them. So where devices differ the order of the best split is a chance find, and its neighbourhood is soon looked
through. Moves begin anew from

    a topological order that is partly drawn, cut at its best over all orders of the devices         now and then
    one of the best splits so far, with two of its devices swapped, and its order cut anew for that   else

with one run of moves each, and neighbours split anew. What is good is remembered, so that swaps follow each other (an
iterated local search: Lourenço, Martin and Stützle, "Iterated local search", Handbook of Metaheuristics 2003). This
proves nothing.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence

from shardwright.sharder.planning.exact.line import split_in_order, split_line
from shardwright.sharder.planning.exact.search import Stages
from shardwright.sharder.planning.problem import Problem
from shardwright.sharder.planning.wide.orders import keys_of, topological
from shardwright.sharder.planning.wide.recut import Neighbours
from shardwright.sharder.planning.wide.shifting import Annealing, Shifts, can_shift

__all__ = ["begun_afresh"]

PATIENCE = 24
"""Starts in succession without an improvement, after which there are no more."""
FIRST_STARTS = 4
"""So many are from drawn orders at first, and later so large a share of them."""
DRAWN = 0.3
REMEMBERED = 3
"""So many splits are swapped in."""


def begun_afresh(
    problem: Problem,
    classes: Sequence[Sequence[int]],
    device_orders: Sequence[Sequence[int]],
    best: Callable[[], tuple[Stages, float]],
    bound_s: float,
    out_of_time: Callable[[], bool],
    neighbours: Neighbours,
) -> Iterator[Stages]:
    """Splits to be looked at: most are no better than the ``best``, and ties and memory are left out as in shifting.py.

    There are none where devices are alike, nor where blocks are not moved.

    Args:
        problem: blocks, devices and links.
        classes: devices that cannot be told apart.
        device_orders: tried where the classes are too many for every order of theirs.
        best: the stages of the best split that was taken, and its largest load.
        bound_s: a largest load that no split is below.
        out_of_time: asked now and then.
        neighbours: what moves lead to is split anew by them.
    """
    if not can_shift(problem) or len(classes) < 2 or len(best()[0]) < 2:
        return
    random_ = random.Random(0)
    annealing = Annealing(random_)
    known = [(best()[1], best()[0])]
    starts = failures = 0
    while failures < PATIENCE and best()[1] > bound_s and not out_of_time():
        value_s = best()[1]
        starts += 1
        failures += 1
        if starts <= FIRST_STARTS or random_.random() < DRAWN:
            order = topological(problem, _drawn_keys(len(problem.blocks), random_))
            split = split_line(problem, order, classes, device_orders, bound_s=bound_s, out_of_time=out_of_time)
        else:
            stages = random_.choice(known)[1]
            order = topological(problem, keys_of(problem, stages, random_))
            split = split_in_order(problem, order, _swapped([d for d, _ in stages], random_), out_of_time)
        if split is None or len(split.stages) < 2:
            continue
        stages, least_s = split.stages, split.value_s
        yield stages  # which may fit where what moves make of it does not
        for stages in annealing.run(Shifts(problem, split.stages), split.value_s, out_of_time):
            yield stages
        moved = stages
        if neighbours.loads_of(moved) is not None:
            for stages in neighbours.split_anew(moved):
                yield stages
        if stages is not split.stages:
            least_s = max(Shifts(problem, stages).loads)
        known = sorted({*known, (least_s, stages)})[:REMEMBERED]
        if best()[1] < value_s * (1 - 1e-5):
            failures = 0


def _drawn_keys(blocks: int, random_: random.Random) -> list[float]:
    """By block: anything, or its place with some of that."""
    if random_.random() < 0.5:
        return [random_.random() for _ in range(blocks)]
    return [v / blocks + 0.3 * random_.random() for v in range(blocks)]


def _swapped(devices: list[int], random_: random.Random) -> list[int]:
    """Two of them in each other's place."""
    a, b = random_.sample(range(len(devices)), 2)
    devices[a], devices[b] = devices[b], devices[a]
    return devices
