"""Splits that are near to a split: with blocks on the other side of a cut, other devices, a stage fewer or more."""

from __future__ import annotations

import functools
import itertools
import math
import operator
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property

from shardwright.sharder.planning.exact.search import Stages
from shardwright.sharder.planning.formulation.device_classes import alike_devices, orders_to_try
from shardwright.sharder.planning.problem import Problem, bits

__all__ = ["NearSplits"]

MOST_PERMUTED, ORDERS = 720, 64
"""So many orders of devices are looked through at most, and so many that can be told apart are cut evenly."""
HOPS = (1, 2, 4, 8)
"""So many neighbouring blocks are moved over a cut together."""
MOST_MOVED = 16
"""Of a block and those with it."""


class NearSplits:
    """Of a problem."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem

    def of(self, stages: Stages) -> Iterator[Stages]:
        """Splits that are near to ``stages``: blocks over a cut, stages on other devices, one stage fewer or more."""
        for position, ((device, members), (after, behind)) in enumerate(itertools.pairwise(stages)):
            rest = stages[:position], stages[position + 2 :]
            for moved in self._last(members):
                yield (*rest[0], (device, members & ~moved), (after, behind | moved), *rest[1])
            for moved in self._first(behind):
                yield (*rest[0], (device, members | moved), (after, behind & ~moved), *rest[1])
            for one in (device, after):
                yield (*rest[0], (one, members | behind), *rest[1])
        if len(stages) < self.problem.most_stages:
            yield from self._with_one_more(stages)
        for changed in self._other_devices([device for device, _ in stages], self.unused(stages)):
            yield tuple((device, members) for device, (_, members) in zip(changed, stages, strict=True))

    def _with_one_more(self, stages: Stages) -> Iterator[Stages]:
        """``stages`` with the first or last blocks of one of them on a device that has none."""
        for position, (device, members) in enumerate(stages):
            for other in self.unused(stages):
                for moved in self._last(members):
                    yield (*stages[:position], (device, members & ~moved), (other, moved), *stages[position + 1 :])
                for moved in self._first(members):
                    yield (*stages[:position], (other, moved), (device, members & ~moved), *stages[position + 1 :])

    def _last(self, members: int) -> Iterator[int]:
        """Of a stage: the last few blocks, and each block with those that need it."""
        blocks = [*bits(members)]
        yield from (sum(1 << v for v in blocks[-hop:]) for hop in HOPS if hop < len(blocks))
        yield from self._few(members, (self._behind[v] & members for v in blocks))

    def _first(self, members: int) -> Iterator[int]:
        """Of a stage: the first few blocks, and each block with those that it needs."""
        blocks = [*bits(members)]
        yield from (sum(1 << v for v in blocks[:hop]) for hop in HOPS if hop < len(blocks))
        yield from self._few(members, (self._before[v] & members for v in blocks))

    @staticmethod
    def _few(members: int, moves: Iterable[int]) -> Iterator[int]:
        """Of ``moves`` those of few blocks, that leave some."""
        return (moved for moved in moves if moved != members and moved.bit_count() <= MOST_MOVED)

    @cached_property
    def _behind(self) -> list[int]:
        """By block, the mask of all that need it, itself among them."""
        behind = [1 << v for v in range(len(self.problem.blocks))]
        for v in reversed(range(len(behind))):
            for u in bits(self.problem.predecessors[v]):
                behind[u] |= behind[v]
        return behind

    @cached_property
    def _before(self) -> list[int]:
        """By block, the mask of all that it needs, itself among them."""
        before: list[int] = []
        for v, own in enumerate(self.problem.predecessors):
            before.append(functools.reduce(operator.or_, (before[u] for u in bits(own)), 1 << v))
        return before

    @cached_property
    def class_of(self) -> dict[int, int]:
        """By device: which others it cannot be told from."""
        return {device: number for number, alike in enumerate(alike_devices(self.problem)) for device in alike}

    def in_order(self, stages: Stages) -> Stages:
        """The same split, with the first devices of those that are alike, in their order."""
        first = {kind: iter(each) for kind, each in enumerate(alike_devices(self.problem))}
        return tuple((next(first[self.class_of[device]]), members) for device, members in stages)

    def unused(self, stages: Stages) -> list[int]:
        """Devices without a stage, of those that are alike one."""
        used = {device for device, _ in stages}
        return [*{self.class_of[d]: d for d in range(len(self.problem.devices)) if d not in used}.values()]

    def _other_devices(self, devices: Sequence[int], unused: Sequence[int]) -> Iterator[list[int]]:
        """``devices`` with two exchanged, or one of ``unused`` in the place of one."""
        kind = self.class_of
        for a, b in itertools.combinations(range(len(devices)), 2):
            if kind[devices[a]] != kind[devices[b]]:
                changed = [*devices]
                changed[a], changed[b] = devices[b], devices[a]
                yield changed
        for a, device in enumerate(devices):
            for other in unused:
                if kind[other] != kind[device]:
                    yield [*devices[:a], other, *devices[a + 1 :]]

    def device_orders(self) -> list[Sequence[int]]:
        """Orders of devices, as far as they can be told apart: all if they are few."""
        count = len(self.problem.devices)
        if math.factorial(count) > MOST_PERMUTED:
            return [*orders_to_try(self.problem)]
        found: dict[tuple[int, ...], Sequence[int]] = {}
        for order in itertools.permutations(range(count)):
            found.setdefault(tuple(self.class_of[d] for d in order), order)
        return [*itertools.islice(found.values(), ORDERS)]
