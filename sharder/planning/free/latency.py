r"""Latency: the shortest time in which one input comes through, when branches run on different devices at once.

Given the blocks, tensors and devices of problem.py with M = 1, choose a device for every block and an order on each
device:

    start(v) >= end(u)                                 u before v on the same device; a device runs one block at a time
    start(v) >= end(u) + x(t, d(u), d(v))              v reads t, which u makes; x = 0 on one device, else
                x = latency + bytes / bandwidth of the link (direct), or of both ways through the host (staged)

Transfers go on beside compute and beside each other; a tensor goes once to each device that reads it. In training the
backward runs the graph the other way, each block on its device, each gradient from reader to maker; it starts when the
forward has ended everywhere, since the loss needs every output. Then every device sums the gradients of the tied
parameters that it holds, when all of their users are through, and runs its updates. Least is

    the largest end of a forward, of a backward, and of a device's updates

Memory is as in assignment.py: it does not depend on the order. A list schedule takes the blocks one after another
(Graham, "Bounds for certain multiprocessing anomalies", 1966). Lists here: the longest way to the end first, each
block to where it ends first (HEFT: Topcuoglu et al., IEEE TPDS 13(3), 2002), and of all ready blocks and devices the
pair that starts first (ETF: Hwang et al., SIAM J. Comput. 18(2), 1989; under caps: Jeon et al., "Baechi", SoCC 2020).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from shardwright.sharder.planning.exact.transfers import seconds_of
from shardwright.sharder.planning.free.assignment import Holdings, masks_of, obeys
from shardwright.sharder.planning.free.bounds import fluid_bound_s
from shardwright.sharder.planning.problem import Problem, bits

__all__ = ["Arc", "Pass", "Race", "Ran", "Schedule", "listed", "sequenced"]


_Key = Callable[[int, float, float], tuple[float, float]]
"""Of a block, its start and its end on some device: the smallest goes first."""


class Arc(NamedTuple):
    """What ``target`` waits for from ``source``, by the devices of the two."""

    source: int
    target: int
    delay_s: tuple[tuple[float, ...], ...]


class Ran(NamedTuple):
    """When a block ran, in seconds from the start."""

    block: int
    start_s: float
    end_s: float


@dataclass(frozen=True)
class Pass:
    """The forward or the backward: seconds by block and device, arcs, and the blocks in an order that obeys these."""

    seconds: tuple[tuple[float, ...], ...]
    arcs: tuple[Arc, ...]
    order: tuple[int, ...]

    @cached_property
    def into(self) -> list[list[Arc]]:
        """By block: the arcs that end there."""
        found: list[list[Arc]] = [[] for _ in self.seconds]
        for arc in self.arcs:
            found[arc.target].append(arc)
        return found

    @cached_property
    def out(self) -> list[list[Arc]]:
        """By block: the arcs that begin there."""
        found: list[list[Arc]] = [[] for _ in self.seconds]
        for arc in self.arcs:
            found[arc.source].append(arc)
        return found

    def tails(self, seconds: Sequence[float], delays: bool = False) -> list[float]:
        """By block: the longest way from its start to the end, with mean delays between devices, or without any."""
        tail = [0.0] * len(seconds)
        for v in reversed(self.order):
            after = (tail[arc.target] + (_mean(arc) if delays else 0.0) for arc in self.out[v])
            tail[v] = seconds[v] + max(after, default=0.0)
        return tail

    def run(self, of: Sequence[int], sequence: Sequence[int], begin_s: float) -> tuple[Ran, ...]:
        """Each block as early as it can behind those before it in ``sequence``, which obeys the arcs."""
        free: dict[int, float] = {}
        end = [0.0] * len(self.seconds)
        ran = []
        for v in sequence:
            device = of[v]
            start = free.get(device, begin_s)
            for arc in self.into[v]:
                start = max(start, end[arc.source] + arc.delay_s[of[arc.source]][device])
            free[device] = end[v] = start + self.seconds[v][device]
            ran.append(Ran(v, start, end[v]))
        return tuple(ran)


def _mean(arc: Arc) -> float:
    finite = [s for row in arc.delay_s for s in row if math.isfinite(s)]
    return sum(finite) / len(finite)


@dataclass(frozen=True)
class Schedule:
    """Devices by block, when each ran forward and backward, and when each device has done its updates."""

    of: tuple[int, ...]
    forward: tuple[Ran, ...]
    backward: tuple[Ran, ...]
    done_s: tuple[float, ...]
    """By device; 0 where it has nothing to do."""

    @property
    def value_s(self) -> float:
        """When all is done."""
        return max(self.done_s)


class Race:
    """One input against the clock: the problem as passes over the graph."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem = dataclasses.replace(problem, microbatches=1)
        self.devices = range(len(problem.devices))
        blocks = problem.blocks
        ahead: dict[tuple[int, int], list[list[float]]] = {}
        back: dict[tuple[int, int], list[list[float]]] = {}
        for target, before in enumerate(problem.predecessors):
            for source in bits(before):
                ahead[source, target] = [[0.0] * len(self.devices) for _ in self.devices]
        for tensor in problem.crossings:
            for reader in bits(tensor.readers):
                self._lengthen(ahead, (tensor.producer, reader), tensor.forward_bytes)
                if tensor.backward_bytes:
                    self._lengthen(back, (reader, tensor.producer), tensor.backward_bytes)
        order = range(len(blocks))
        self.forward = _pass([b.forward_s for b in blocks], ahead, order)
        self.backward = _pass([b.backward_s for b in blocks], back, order[::-1])

    def _lengthen(self, arcs: dict[tuple[int, int], list[list[float]]], key: tuple[int, int], size: int) -> None:
        rows = arcs.setdefault(key, [[0.0] * len(self.devices) for _ in self.devices])
        for a in self.devices:
            for b in self.devices:
                if a != b:
                    rows[a][b] = max(rows[a][b], self._crossing_s(size, a, b))

    def _crossing_s(self, size: int, source: int, target: int) -> float:
        if self.problem.transfers == "staged":
            return seconds_of(size, self.problem.ways[source][0]) + seconds_of(size, self.problem.ways[target][1])
        return seconds_of(size, self.problem.links[source][target])

    def schedule(self, of: Sequence[int], ahead: Sequence[int], back: Sequence[int]) -> Schedule:
        """The schedule of an assignment and of orders of the forward and the backward."""
        forward = self.forward.run(of, ahead, 0.0)
        turn_s = max((ran.end_s for ran in forward), default=0.0)
        backward = self.backward.run(of, back, turn_s)
        end = {ran.block: ran.end_s for ran in backward}
        done = []
        for device, members in enumerate(masks_of(of, len(self.devices))):
            users = members
            for tie in self.problem.ties:
                if tie.gradient_bytes and tie.held(members):
                    users |= tie.users
            updates_s = sum(self.problem.blocks[v].update_s[device] for v in bits(members))
            last = max((end[v] for v in bits(users)), default=0.0)
            done.append(last + self.problem.ties_s(members, device) + updates_s if members else 0.0)
        return Schedule(tuple(of), forward, backward, tuple(done))

    def may(self, of: Sequence[int]) -> bool:
        """Whether the assignment obeys pins and caps."""
        return obeys(self.problem, of)

    @cached_property
    def least(self) -> tuple[list[float], list[float], list[float]]:
        """By block: the least seconds forward, backward, and of both with the update."""
        rows = [[d for d in self.devices if block.allowed[d]] for block in self.problem.blocks]
        updates = [block.update_s for block in self.problem.blocks]
        forward, backward = self.forward.seconds, self.backward.seconds
        return (
            [min((forward[v][d] for d in row), default=math.inf) for v, row in enumerate(rows)],
            [min((backward[v][d] for d in row), default=math.inf) for v, row in enumerate(rows)],
            [min((backward[v][d] + updates[v][d] for d in row), default=math.inf) for v, row in enumerate(rows)],
        )

    def bound_s(self) -> float:
        """What no schedule is below: the longest way with every block where it is fastest, and the work shared out
        evenly."""
        blocks = self.problem.blocks
        if not blocks:
            return 0.0
        forward, backward, ends = self.least

        def even(rows: Sequence[Sequence[float]]) -> float:
            return fluid_bound_s(
                [
                    [s if ok else math.inf for s, ok in zip(r, b.allowed, strict=True)]
                    for r, b in zip(rows, blocks, strict=True)
                ]
            )

        ahead = max(*self.forward.tails(forward), even(self.forward.seconds))
        back = max(*self.backward.tails(backward), even(self.backward.seconds), *ends)
        return max(ahead + back, even(self.problem.seconds)) * (1 - 1e-12)

    @cached_property
    def ranks(self) -> tuple[list[float], list[float]]:
        """By block: the longest way to the end of the forward and of the backward, in means over the devices."""
        return tuple(  # type: ignore[return-value]
            one.tails([sum(row) / len(row) for row in one.seconds], delays=True)
            for one in (self.forward, self.backward)
        )


def _pass(
    seconds: Sequence[tuple[float, ...]], arcs: dict[tuple[int, int], list[list[float]]], order: Sequence[int]
) -> Pass:
    made = (Arc(u, v, tuple(map(tuple, rows))) for (u, v), rows in arcs.items())
    return Pass(tuple(seconds), tuple(made), tuple(order))


def sequenced(one: Pass, of: Sequence[int], rank: Sequence[float], *, by_start: bool) -> list[int]:
    """An order for an assignment: of the blocks that are ready the one that can start first, or ranks highest, next."""
    waiting = [len(arcs) for arcs in one.into]
    ready = [v for v, count in enumerate(waiting) if not count]
    arrived = [0.0] * len(waiting)
    free: dict[int, float] = {}
    order = []
    while ready:

        def key(v: int) -> tuple[float, float, int]:
            return max(arrived[v], free.get(of[v], 0.0)) if by_start else 0.0, -rank[v], v

        v = min(ready, key=key)
        ready.remove(v)
        end = max(arrived[v], free.get(of[v], 0.0)) + one.seconds[v][of[v]]
        free[of[v]] = end
        order.append(v)
        for arc in one.out[v]:
            arrived[arc.target] = max(arrived[arc.target], end + arc.delay_s[of[v]][of[arc.target]])
            waiting[arc.target] -= 1
            if not waiting[arc.target]:
                ready.append(arc.target)
    return order


def listed(race: Race) -> Iterator[list[int]]:
    """Assignments of the lists HEFT and ETF, with parameters within the caps."""
    rank = race.ranks[0]
    keys: tuple[_Key, ...] = (
        lambda v, _, end: (-rank[v], end),
        lambda v, start, _: (start, -rank[v]),
        lambda v, _, end: (end, -rank[v]),
    )
    for key in keys:
        yield from _lists(race, key)


def _lists(race: Race, key: _Key) -> Iterator[list[int]]:
    """One assignment: of all ready blocks and devices always the pair with the smallest key."""
    one, problem = race.forward, race.problem
    waiting = [len(arcs) for arcs in one.into]
    of, end = [-1] * len(waiting), [0.0] * len(waiting)
    free, held = [0.0] * len(race.devices), Holdings(problem)
    here = [0.0] * len(race.devices)
    # By ready block: when all that it reads is on each device, which does not change any more.
    ready = {v: here for v, count in enumerate(waiting) if not count}
    while ready:
        pairs = []
        for v, arrived in ready.items():
            for d in race.devices:
                if not problem.blocks[v].allowed[d] or held.with_block(v, d) > problem.caps[d]:
                    continue
                start = max(free[d], arrived[d])
                pairs.append((key(v, start, start + one.seconds[v][d]), v, d, start))
        if not pairs:
            return
        _, v, d, start = min(pairs)
        if math.isinf(start):
            return
        del ready[v]
        of[v] = d
        free[d] = end[v] = start + one.seconds[v][d]
        held.add(v, d)
        for arc in one.out[v]:
            waiting[arc.target] -= 1
            if not waiting[arc.target]:
                into = one.into[arc.target]
                ready[arc.target] = [
                    max(end[a.source] + a.delay_s[of[a.source]][x] for a in into) for x in race.devices
                ]
    yield of
