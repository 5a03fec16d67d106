r"""Blocks that may as well share a stage become one, before closed sets are counted: the optimum stays.

Two kinds, with U the largest load of a split that is known:

- Dear tensors. If t crosses a cut, the stage of its maker, and that of each reader elsewhere, has a load of that
  block's work and the transfer of t at least. Where that is more than U they share a stage in every split that is
  better, and so does all that lies between them.
- Idle blocks, which take no time, where memory is enough for any stage, links are the same between any two devices if
  they relay, and no stage must have a unit of an idle block. With u in an earlier stage than the idle v, or w in a
  later one, v may be moved to

      u, if v reads nothing else, and what v makes is no more than the tensors of u that v alone reads
      u, if all readers of u are such idle blocks, and all that they make is no more than the tensors that they all read
      w, if w alone reads what v makes, and what v reads is no more than that
      w, if v reads nothing, its tensors are relayed or cost nothing, and w comes before all other readers

  and no load grows: no more crosses any cut in between, no stage sends more, and none receives more.

What is left is split, and stages of blocks are stages of the blocks in them.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from shardwright.profiler.ordering import connected_groups, strong_components, topological_order
from shardwright.sharder.planning.exact.search import Stages
from shardwright.sharder.planning.exact.transfers import seconds_of
from shardwright.sharder.planning.problem import Block, Crossing, Problem, bits

__all__ = ["Coarse", "coarsened"]

ABOVE = 1 + 1e-9
"""Loads are summed up in several orders."""


class Coarse(NamedTuple):
    """A problem with fewer blocks."""

    problem: Problem
    members: tuple[int, ...]
    """By block: those of the original in it, as a bit mask."""

    def unfolded(self, stages: Stages) -> Stages:
        """Stages of the original's blocks."""
        return tuple((device, sum(self.members[v] for v in bits(blocks))) for device, blocks in stages)


def coarsened(problem: Problem, value_s: float) -> Coarse | None:
    """Fewer blocks, with all the splits that are better than ``value_s`` and fit, or as good ones; None = no fewer.

    Args:
        problem: blocks in a topological order.
        value_s: the largest load of a split that is known, in seconds of a step; infinite where there is none.
    """
    coarse = Coarse(problem, tuple(1 << v for v in range(len(problem.blocks))))
    while True:
        pairs = [*_dear(coarse.problem, value_s)] or _apart(coarse.problem, [*_idle(coarse.problem)])
        if not pairs:
            break
        coarse = _together(coarse, pairs)
    return coarse if len(coarse.members) < len(problem.blocks) else None


def _together(coarse: Coarse, groups: Sequence[Sequence[int]]) -> Coarse:
    """With the blocks of each group in one, and all that lies between them."""
    problem = coarse.problem
    count = len(problem.blocks)
    after: list[set[int]] = [set() for _ in range(count)]
    for v, before in enumerate(problem.predecessors):
        for u in bits(before):
            after[u].add(v)
    home = {v: min(group) for group in connected_groups(range(count), groups) for v in group}
    merged: list[set[int]] = [set() for _ in range(count)]
    for u in range(count):
        merged[home[u]] |= {home[v] for v in after[u]} - {home[u]}
    for component in strong_components(merged):
        home |= {v: min(component) for v in home if home[v] in component} if len(component) > 1 else {}
    targets: dict[int, set[int]] = {h: set() for h in home.values()}
    for u in range(count):
        targets[home[u]] |= {home[v] for v in after[u]} - {home[u]}
    order = topological_order(targets, lambda h: h)
    number = {h: i for i, h in enumerate(order)}
    new = [number[home[v]] for v in range(count)]
    parts: list[list[int]] = [[] for _ in order]
    for v in range(count):
        parts[new[v]].append(v)

    def mapped(mask: int) -> int:
        return sum({1 << new[v] for v in bits(mask)})

    crossings = (
        dataclasses.replace(c, producer=new[c.producer], readers=mapped(c.readers) & ~(1 << new[c.producer]))
        for c in problem.crossings
    )
    ledger = problem.ledger
    coarser = dataclasses.replace(
        problem,
        blocks=tuple(_one([problem.blocks[v] for v in part]) for part in parts),
        predecessors=tuple(
            sum({1 << new[u] for v in part for u in bits(problem.predecessors[v])} - {1 << i})
            for i, part in enumerate(parts)
        ),
        crossings=tuple(c for c in crossings if c.readers),
        ties=tuple(dataclasses.replace(t, users=mapped(t.users), first=new[t.first]) for t in problem.ties),
        ledger=dataclasses.replace(ledger, steps=tuple(s._replace(block=new[s.block]) for s in ledger.steps)),
        replicas=tuple(
            dataclasses.replace(r, seconds=tuple(_sums([r.seconds[v] for v in part]) for part in parts))
            for r in problem.replicas
        ),
    )
    members = tuple(sum(coarse.members[v] for v in part) for part in parts)
    return Coarse(coarser, members)


def _sums(rows: Sequence[Sequence[float]]) -> tuple[float, ...]:
    return tuple(map(sum, zip(*rows, strict=True)))


def _one(blocks: Sequence[Block]) -> Block:
    """Some blocks as one."""
    if len(blocks) == 1:
        return blocks[0]
    again = any(b.recompute_s for b in blocks)
    return Block(
        nodes=tuple(node for b in blocks for node in b.nodes),
        forward_s=_sums([b.forward_s for b in blocks]),
        backward_s=_sums([b.backward_s for b in blocks]),
        update_s=_sums([b.update_s for b in blocks]),
        static_bytes=sum(b.static_bytes for b in blocks),
        units=tuple(unit for b in blocks for unit in b.units),
        allowed=tuple(map(all, zip(*(b.allowed for b in blocks), strict=True))),
        unfit=tuple(map(any, zip(*(b.unfit for b in blocks if b.unfit), strict=True))),
        recompute_s=_sums([b.recompute_s or b.forward_s for b in blocks]) if again else (),
        parts_s=_parts(blocks),
        sum_s=_sums([b.sum_s or (0.0,) * len(b.forward_s) for b in blocks]) if any(b.sum_s for b in blocks) else (),
    )


def _parts(blocks: Sequence[Block]) -> tuple[tuple[float, float], ...]:
    """The parts of all backwards, where those of each are known."""
    if not all(b.parts_s for b in blocks):
        return ()
    return tuple(
        (sum(inputs for inputs, _ in parts), sum(weights for _, weights in parts))
        for parts in zip(*(b.parts_s for b in blocks), strict=True)
    )


def _dear(problem: Problem, value_s: float) -> Iterator[tuple[int, int]]:
    """Makers and readers that no better split parts."""
    if not math.isfinite(value_s):
        return
    least = [min(seconds) for seconds in problem.seconds]
    for tensor in problem.crossings:
        making_s, reading_s = _ends_s(problem, tensor)
        maker = tensor.producer
        for reader in bits(tensor.readers):
            if max(_load_s(problem, least[maker], making_s), _load_s(problem, least[reader], reading_s)) > (
                value_s * ABOVE
            ):
                yield maker, reader


def _load_s(problem: Problem, work_s: float, transfers_s: tuple[float, float]) -> float:
    """A load with so much work and transfers there and back, at least."""
    return max(work_s, *transfers_s) if problem.overlap else work_s + sum(transfers_s)


def _ends_s(problem: Problem, tensor: Crossing) -> tuple[tuple[float, float], tuple[float, float]]:
    """Seconds of a step that ``tensor`` and its gradient take its maker's stage, and a reader's, at least each."""
    backward = tensor.backward_bytes
    if problem.transfers == "staged":
        there = min(seconds_of(tensor.forward_bytes, out) for out, _ in problem.ways)
        here = min(seconds_of(tensor.forward_bytes, in_) for _, in_ in problem.ways)
        back = min(seconds_of(backward, in_) for _, in_ in problem.ways) if backward else 0.0
        sent = min(seconds_of(backward, out) for out, _ in problem.ways) if backward else 0.0
        return (problem.microbatches * there, problem.microbatches * back), (
            problem.microbatches * here,
            problem.microbatches * sent,
        )
    pairs = [problem.transfer_s([tensor], a, b) for a, b in problem.unlike_pairs]
    both = tuple(problem.microbatches * min((pair[i] for pair in pairs), default=math.inf) for i in range(2))
    return (both[0], both[1]), (both[0], both[1])


class _Amount(NamedTuple):
    """What some tensors and their gradients cost, over any link no more than others that have no number more."""

    tensors: int
    gradients: int
    forward_bytes: int
    backward_bytes: int

    @classmethod
    def of(cls, tensors: Sequence[Crossing]) -> _Amount:
        return cls(
            len(tensors),
            sum(bool(t.backward_bytes) for t in tensors),
            sum(t.forward_bytes for t in tensors),
            sum(t.backward_bytes for t in tensors),
        )

    def within(self, other: _Amount) -> bool:
        """Whether none is more than the other's."""
        return all(a <= b for a, b in zip(self, other, strict=True))


def _idle(problem: Problem) -> Iterator[tuple[int, ...]]:
    """Idle blocks with those that they may be moved to."""
    idle = [v for v, seconds in enumerate(problem.seconds) if not any(seconds)]
    if not idle or problem.transfers == "direct" or not _roomy(problem):
        return
    if problem.transfers == "relayed" and not _uniform(problem):
        return
    moves = _Moves(problem, idle)
    for v in moves.idle:
        group = moves.with_what_it_reads(v) or moves.with_what_reads_it(v)
        if group:
            yield group


class _Moves:
    """Where ``idle`` blocks may be moved."""

    def __init__(self, problem: Problem, idle: Sequence[int]) -> None:
        self.problem = problem
        tied, all_units = 0, all(b.units for b in problem.blocks)
        for tie in problem.ties:
            tied |= tie.users
        self.idle = {v for v in idle if not tied >> v & 1 and (all_units or not problem.blocks[v].units)}
        self.made: list[list[Crossing]] = [[] for _ in problem.blocks]
        self.read: list[list[Crossing]] = [[] for _ in problem.blocks]
        for tensor in problem.crossings:
            self.made[tensor.producer].append(tensor)
            for v in bits(tensor.readers):
                self.read[v].append(tensor)
        self.after = [0] * len(problem.blocks)
        for v, before in enumerate(problem.predecessors):
            for u in bits(before):
                self.after[u] |= 1 << v

    def _may_join(self, v: int, other: int) -> bool:
        """Whether pins let ``v`` be wherever ``other`` may be."""
        own, others = (self.problem.blocks[w].allowed for w in (v, other))
        return all(may_be or not there for may_be, there in zip(own, others, strict=True))

    def with_what_it_reads(self, v: int) -> tuple[int, ...]:
        """The only block before ``v`` with it, or with all its readers; nothing where they may not be together."""
        before = self.problem.predecessors[v]
        if before.bit_count() != 1:
            return ()
        u = before.bit_length() - 1
        if any(t.producer != u for t in self.read[v]):
            return ()
        alone = [t for t in self.read[v] if t.readers == 1 << v]
        if self._may_join(v, u) and _Amount.of(self.made[v]).within(_Amount.of(alone)):
            return u, v
        readers = [*bits(self.after[u])]
        if all(w in self.idle and self.problem.predecessors[w] == before and self._may_join(w, u) for w in readers):
            together = _Amount.of([t for w in readers for t in self.made[w]])
            shared = [t for t in self.made[u] if t.readers == self.after[u]]
            if together.within(_Amount.of(shared)):
                return u, *readers
        return ()

    def with_what_reads_it(self, v: int) -> tuple[int, ...]:
        """The first block behind ``v`` with it; nothing where they may not be together."""
        if not self.after[v]:
            return ()
        w = min(bits(self.after[v]))
        if not self._may_join(v, w):
            return ()
        if self.after[v] == 1 << w:
            return (v, w) if _Amount.of(self.read[v]).within(_Amount.of(self.made[v])) else ()
        if self.problem.predecessors[v] or self.after[v] & ~(_behind(self.after, w) | 1 << w):
            return ()
        return (v, w) if self.problem.transfers == "relayed" or self._costs_nothing(v) else ()

    def _costs_nothing(self, v: int) -> bool:
        """Whether staging what a block makes takes no time."""
        ways = (latency_s for both in self.problem.ways for latency_s, _ in both)
        return not any(ways) and not any(t.forward_bytes or t.backward_bytes for t in self.made[v])


def _behind(after: Sequence[int], block: int) -> int:
    """All blocks that come behind one."""
    behind = after[block]
    for v in range(block + 1, len(after)):  # which is a topological order
        if behind >> v & 1:
            behind |= after[v]
    return behind


def _apart(problem: Problem, groups: Sequence[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """Some groups, none of which has to do with another's blocks: each move is proven for itself.

    No cycle comes of them, as no way through the blocks is new: what an idle block is behind, its new place is too.
    """
    near = list(problem.predecessors)
    for v, before in enumerate(problem.predecessors):
        for u in bits(before):
            near[u] |= 1 << v
    for tensor in problem.crossings:
        near[tensor.producer] |= tensor.readers
        for v in bits(tensor.readers):
            near[v] |= tensor.readers | 1 << tensor.producer
    touched, chosen = 0, []
    for group in groups:
        around = 0
        for v in group:
            around |= near[v] | 1 << v
        if not around & touched:
            touched |= around
            chosen.append(group)
    return chosen


def _uniform(problem: Problem) -> bool:
    """Whether all links are the same."""
    return len({problem.links[a][b] for a, b in problem.unlike_pairs}) <= 1


def _roomy(problem: Problem) -> bool:
    """Whether any stage fits on any device, by far: by sums of all that there is, for each micro-batch."""
    steps, tensors = problem.ledger.steps, problem.crossings
    moving = sum(t.forward_bytes + t.backward_bytes for t in tensors)
    moving += sum(s.saved + s.forward + s.backward + s.deferred + s.gradient for s in steps)
    moving += sum(s.size for s in problem.ledger.storages)
    moving += sum(g.size + g.added for g in problem.ledger.gradients)
    static = sum(b.static_bytes for b in problem.blocks) + sum(t.copy_bytes for t in problem.ties)
    update = sum(s.update + s.update_left + s.update_together for s in steps)
    return static + update + 4 * (problem.microbatches + 1) * moving <= min(problem.caps)
