"""What each stage of a split sends and receives, under each kind of transfers, and its load; see problem.py."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from shardwright.sharder.planning.problem import Crossing, Link, Problem, bits

__all__ = ["Traffic", "as_staged", "by_block", "is_next_only", "load_s", "seconds_of", "traffic_of"]

Stages = Sequence[tuple[int, int]]
"""In order: a device index and a bit mask of blocks each."""


class Traffic(NamedTuple):
    """Seconds of one micro-batch that a stage sends and receives."""

    forward_out_s: float = 0.0
    forward_in_s: float = 0.0
    backward_out_s: float = 0.0
    """Gradients of what the stage received."""
    backward_in_s: float = 0.0
    """Gradients of what the stage sent."""

    @property
    def out_s(self) -> float:
        """All that is sent."""
        return self.forward_out_s + self.backward_out_s

    @property
    def in_s(self) -> float:
        """All that is received."""
        return self.forward_in_s + self.backward_in_s


def load_s(problem: Problem, compute_s: float, traffic: Traffic) -> float:
    """The load of a stage in a step, from its compute in a step and its traffic of one micro-batch."""
    count = problem.microbatches
    if problem.overlap:
        return max(compute_s, count * traffic.out_s, count * traffic.in_s)
    before_s = count * (traffic.forward_in_s + traffic.backward_out_s)
    behind_s = count * (traffic.forward_out_s + traffic.backward_in_s)
    return before_s + compute_s + behind_s


def seconds_of(size: int, link: Link) -> float:
    """Seconds of a tensor of ``size`` bytes over ``link``."""
    return link[0] + size / link[1]


class ByBlock(NamedTuple):
    """The crossing tensors of a problem by number, and by the blocks that make and read them."""

    maker: list[int]
    """By tensor: a block."""
    readers: list[list[int]]
    """By tensor: blocks, in their order."""
    made: list[list[int]]
    """By block: tensors."""
    read: list[list[int]]
    """By block: tensors."""


def by_block(problem: Problem) -> ByBlock:
    """Who makes and reads each tensor, and what each block makes and reads."""
    maker = [tensor.producer for tensor in problem.crossings]
    readers = [list(bits(tensor.readers)) for tensor in problem.crossings]
    made: list[list[int]] = [[] for _ in problem.blocks]
    read: list[list[int]] = [[] for _ in problem.blocks]
    for t, block in enumerate(maker):
        made[block].append(t)
        for v in readers[t]:
            read[v].append(t)
    return ByBlock(maker, readers, made, read)


def traffic_of(problem: Problem, stages: Stages) -> list[Traffic]:
    """The traffic of each stage."""
    rules = {"relayed": _relayed, "staged": _staged, "direct": _direct}
    return [Traffic(*seconds) for seconds in rules[problem.transfers](problem, stages)]


def _relayed(problem: Problem, stages: Stages) -> list[list[float]]:
    """What crosses each cut, from one neighbour to the other."""
    traffic = [[0.0] * 4 for _ in stages]
    closed = 0
    for position, ((device, members), (following, _)) in enumerate(itertools.pairwise(stages)):
        closed |= members
        forward_s, backward_s = problem.transfer_s(problem.crossing(closed), device, following)
        traffic[position][0] = traffic[position + 1][1] = forward_s
        traffic[position][3] = traffic[position + 1][2] = backward_s
    return traffic


def _staged(problem: Problem, stages: Stages) -> list[list[float]]:
    """Each tensor that a stage reads or makes and others have to do with, once."""
    traffic = []
    start = 0
    for device, members in stages:
        there, back = problem.ways[device]
        sent, received = problem.sent(start | members, members), problem.received(start, members)
        traffic.append(
            [
                sum(seconds_of(t.forward_bytes, there) for t in sent),
                sum(seconds_of(t.forward_bytes, back) for t in received),
                sum(seconds_of(t.backward_bytes, there) for t in received if t.backward_bytes),
                sum(seconds_of(t.backward_bytes, back) for t in sent if t.backward_bytes),
            ]
        )
        start |= members
    return traffic


def _direct(problem: Problem, stages: Stages) -> list[list[float]]:
    """Each tensor for each stage that reads it, over the link of its two devices."""
    traffic = [[0.0] * 4 for _ in stages]
    stage_of: dict[int, int] = {}
    start = 0
    for position, (device, members) in enumerate(stages):
        for tensor in problem.received(start, members):
            sender = stage_of[tensor.producer]
            forward_s, backward_s = problem.transfer_s([tensor], stages[sender][0], device)
            traffic[sender][0] += forward_s
            traffic[position][1] += forward_s
            traffic[position][2] += backward_s
            traffic[sender][3] += backward_s
        start |= members
        stage_of |= dict.fromkeys(bits(members), position)
    return traffic


def as_staged(problem: Problem) -> Problem:
    """Direct transfers relaxed to staged ones, over ways as good as the best of each device's links.

    No stage of a split costs less directly than in this problem: a tensor is sent to one reader at least, over a
    link of its sender.
    """
    devices = range(len(problem.devices))
    if len(devices) == 1:
        return dataclasses.replace(problem, transfers="staged")
    ways = tuple(
        (
            _best(problem.links[d][other] for other in devices if other != d),
            _best(problem.links[other][d] for other in devices if other != d),
        )
        for d in devices
    )
    return dataclasses.replace(problem, transfers="staged", hosts=ways)


def _best(links: Iterable[Link]) -> Link:
    """The smallest latency and the largest bandwidth of ``links`` that may be used; unusable where none may."""
    usable = [link for link in links if math.isfinite(link[0])]
    return (min(s for s, _ in usable), max(rate for _, rate in usable)) if usable else (math.inf, math.inf)


def is_next_only(order: Sequence[int], crossings: Sequence[Crossing]) -> bool:
    """Whether every tensor is read by the block right behind its producer in ``order``, and by no other."""
    following = dict(itertools.pairwise(order))
    return all(c.producer in following and c.readers == 1 << following[c.producer] for c in crossings)
