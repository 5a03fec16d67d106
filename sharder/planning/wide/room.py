r"""Graphs with too many closed sets and little memory: a split that fits, or that there is none.

Whatever else a stage takes, it has all that stays of its blocks, and the engine's buffers at both of its cuts. With w
the bytes that stay of a set, and x those that all micro-batches have of each tensor across the cut behind it, in the
forward or the backward, whichever is less,

    bytes of a stage  >=  w(Is) - w(Is-1) + x(Is-1) + x(Is)

which is a load, were bytes seconds: what makes the largest load small (shifting.py, windows.py) makes the fullest
device less full, and a bound on all largest loads that is above every cap proves that nothing fits. Bytes are to be
evened out without regard to times first: at a split that is far from fitting times say nothing.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial

from shardwright.sharder.planning.exact.search import Stages
from shardwright.sharder.planning.formulation.memory import EMPTY
from shardwright.sharder.planning.problem import Problem
from shardwright.sharder.planning.wide.ceilings import Narrowed, within
from shardwright.sharder.planning.wide.orders import best_of_orders
from shardwright.sharder.planning.wide.shifting import Shifts, shifted

__all__ = ["in_bytes", "making_room"]

ASKED_UNTIL, ORDERS_UNTIL, MOVES_UNTIL, LISTS_UNTIL = 0.05, 0.1, 0.3, 0.4
"""Shares of the time until which it is asked whether anything fits, orders are tried, blocks are moved, and it is asked
again: something is left for a split that is quick too."""


def in_bytes(problem: Problem) -> Problem:
    """The problem whose loads are no more than the bytes that stages of ``problem`` take, of the largest cap.

    Where caps differ a load is what would be so much of that cap, but for the buffers. Transfers are relayed.
    """
    largest = max(problem.caps)
    none = (0.0,) * len(problem.devices)
    blocks = (
        dataclasses.replace(
            block,
            forward_s=none,
            backward_s=none,
            update_s=tuple(block.static_bytes * (largest / max(cap, 1)) for cap in problem.caps),
            recompute_s=(),
            static_bytes=0,
        )
        for block in problem.blocks
    )
    crossings = []
    for tensor in problem.crossings:
        size = min(tensor.forward_bytes, tensor.backward_bytes)
        crossings.append(dataclasses.replace(tensor, forward_bytes=size, backward_bytes=size))
    # A transfer is priced by the sum of both directions.
    links = tuple(tuple((s if math.isinf(s) else 0.0, 2.0) for s, _ in row) for row in problem.links)
    return dataclasses.replace(
        problem,
        blocks=tuple(blocks),
        crossings=tuple(crossings),
        links=links,
        ties=(),
        ledger=EMPTY,
        caps=(2**62,) * len(problem.devices),
        overlap=False,
    )


def making_room(
    problem: Problem,
    starts: Sequence[Stages],
    classes: Sequence[Sequence[int]],
    device_orders: Sequence[Sequence[int]],
    spent: Callable[[float], bool],
) -> Iterator[Narrowed]:
    """Splits whose fullest device is ever less full, as far as is known here, and bounds on its bytes.

    A bound above the largest cap says that no split fits. There are none where transfers are not relayed.

    Args:
        problem: blocks, devices and links.
        starts: some splits, which need not fit; the last are looked at first, and one at least.
        classes: devices that hold the same.
        device_orders: those that are worth trying.
        spent: whether a share of the time has passed.
    """
    if problem.transfers != "relayed":
        return
    crowded, room = in_bytes(problem), float(max(problem.caps))
    asked = within(crowded, room, partial(spent, ASKED_UNTIL))
    if asked is not None:
        yield asked
        starts = [*starts, asked.stages]

    def most_bytes(stages: Stages) -> float:
        return max(Shifts(crowded, stages).loads)

    known: tuple[Stages, float] = (), math.inf
    for start in reversed(starts):
        if start and (most := most_bytes(start)) <= known[1]:
            known = start, most
        if known[0] and spent(ORDERS_UNTIL):
            break

    def best() -> tuple[Stages, float]:
        return known

    for ways in (
        best_of_orders(crowded, classes, device_orders, best, 0.0, partial(spent, ORDERS_UNTIL)),
        shifted(crowded, best, 0.0, partial(spent, MOVES_UNTIL)),
    ):
        for stages in ways:
            known = min(known, (stages, most_bytes(stages)), key=lambda pair: pair[1])
            yield Narrowed(stages, 0.0)
    asked = within(crowded, room, partial(spent, LISTS_UNTIL))
    if asked is not None:
        yield asked
