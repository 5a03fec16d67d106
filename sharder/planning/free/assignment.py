r"""Free assignment: each block on any device, with no chain of stages; what that costs and takes.

Given the blocks, tensors, ties and devices of problem.py, choose a device d(v) for every block v. With S(d) the blocks
on d, M micro-batches, and the transfers out and in that problem.py defines for `staged` and `direct`, where a device
that has blocks stands for a stage:

    load(d)   = M * (compute(d) + out(d) + in(d)) + update(d) + ties(d)                 seconds of M micro-batches
    load(d)   = max of  M * compute(d) + update(d) + ties(d),  M * out(d),  M * in(d)   where transfers overlap
    memory(d) = static(d) + copies(d) + held * (tensors received + gradients received) + the largest of
                (held - 1) * kept(d) + peak(d),  (held - 1) * gradients sent + backward peak(d)
                held * gradients sent + update(d)

This is the steady state of a pipeline whose devices work on different micro-batches at once. Transfers that pass from
neighbour to neighbour (`relayed`) need an order of the devices; here they count as direct.

Under GPipe a device holds all M micro-batches at once. Under 1F1B as many micro-batches are taken to be on their way as
there are devices, held = min(M, devices), as the first of as many stages holds; a device of all blocks holds one. So
the memory of a device depends on its own blocks alone. A chain of stages may need less than this says, since later
stages hold fewer, or more, for its engine holds on to what it sends (problem.py); no engine runs a free assignment.
Where a micro-batch comes back to the same devices often, so few of them may leave devices waiting: the largest load is
what the devices are busy for, and no schedule is simulated. The walk through a set of blocks goes in the order of the
forward (memory.py); what a device receives is held from its arrival on, gradients of one tensor from several readers
are summed as they come.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from shardwright.sharder.planning.exact.search import ROUNDING
from shardwright.sharder.planning.exact.transfers import Traffic, load_s, seconds_of
from shardwright.sharder.planning.problem import Crossing, Problem, Tie, bits, in_flight
from shardwright.sharder.planning.solver import EXACT

__all__ = [
    "NOWHERE",
    "Assignment",
    "Best",
    "Holdings",
    "as_free",
    "classes_of",
    "costs_of",
    "fits",
    "held_at_once",
    "largest_load_s",
    "loads_of",
    "masks_of",
    "obeys",
    "peak_bytes",
    "static_bytes",
    "traffic_by_device",
]

NOWHERE = -1


@dataclass(frozen=True)
class Assignment:
    """A device for every block. ``value`` is the objective's, ``bound`` what no assignment is below."""

    of: tuple[int, ...]
    value: float
    bound: float
    exact: bool


def as_free(problem: Problem) -> Problem:
    """The problem with transfers that a free assignment has: direct in place of relayed."""
    return dataclasses.replace(problem, transfers="direct") if problem.transfers == "relayed" else problem


def masks_of(of: Sequence[int], devices: int) -> list[int]:
    """By device: bit mask of its blocks."""
    masks = [0] * devices
    for v, device in enumerate(of):
        masks[device] |= 1 << v
    return masks


class Cost(NamedTuple):
    """Seconds that one tensor costs one device, by kind as in :class:`Traffic`."""

    device: int
    forward_out_s: float = 0.0
    forward_in_s: float = 0.0
    backward_out_s: float = 0.0
    backward_in_s: float = 0.0


def costs_of(problem: Problem, tensor: Crossing, of: Sequence[int]) -> Iterator[Cost]:
    """What ``tensor`` costs each device; blocks that are nowhere yet count for nothing."""
    source = of[tensor.producer]
    targets = {of[reader] for reader in bits(tensor.readers)} - {source, NOWHERE}
    if source == NOWHERE or not targets:
        return
    back = tensor.backward_bytes
    if problem.transfers == "staged":
        out, into = problem.ways[source]
        yield Cost(source, seconds_of(tensor.forward_bytes, out), 0.0, 0.0, seconds_of(back, into) if back else 0.0)
        for target in targets:
            out, into = problem.ways[target]
            yield Cost(target, 0.0, seconds_of(tensor.forward_bytes, into), seconds_of(back, out) if back else 0.0)
        return
    for target in targets:
        there_s, back_s = problem.transfer_s([tensor], source, target)
        yield Cost(source, there_s, 0.0, 0.0, back_s)
        yield Cost(target, 0.0, there_s, back_s, 0.0)


def traffic_by_device(problem: Problem, of: Sequence[int]) -> list[Traffic]:
    """The traffic of each device for one micro-batch."""
    rows = [[0.0] * 4 for _ in problem.devices]
    for tensor in problem.crossings:
        for device, *seconds in costs_of(problem, tensor, of):
            rows[device] = [a + b for a, b in zip(rows[device], seconds, strict=True)]
    return [Traffic(*row) for row in rows]


def loads_of(problem: Problem, of: Sequence[int]) -> list[float]:
    """By device: seconds of a step in which it computes or transfers; infinite over a link that is not to be used."""
    found = []
    traffic = traffic_by_device(problem, of)
    for device, members in enumerate(masks_of(of, len(problem.devices))):
        compute_s = sum(problem.work_s(v, device) for v in bits(members)) + problem.ties_s(members, device)
        found.append(load_s(problem, compute_s, traffic[device]))
    return found


def largest_load_s(problem: Problem, of: Sequence[int]) -> float:
    """The largest load of an assignment."""
    return max(loads_of(problem, of))


def received_by(problem: Problem, members: int) -> list[Crossing]:
    """The tensors that a device of the blocks in ``members`` reads and does not make."""
    return [c for c in problem.crossings if c.readers & members and not members >> c.producer & 1]


def sent_by(problem: Problem, members: int) -> list[Crossing]:
    """The tensors that it makes and others read."""
    return [c for c in problem.crossings if members >> c.producer & 1 and c.readers & ~members]


def static_bytes(problem: Problem, members: int) -> int:
    """Parameters and what else stays, with the copies of ties."""
    static = sum(problem.blocks[v].static_bytes for v in bits(members))
    return static + sum(tie.copy_bytes for tie in problem.ties if not tie.counted(members))


class Holdings:
    """By device what :func:`static_bytes` says, of an assignment that grows block by block."""

    def __init__(self, problem: Problem) -> None:
        self.bytes = [0] * len(problem.devices)
        self._problem = problem
        self._members = [0] * len(problem.devices)
        self._ties: list[list[Tie]] = [[] for _ in problem.blocks]
        for tie in problem.ties:
            for v in bits(tie.users):
                self._ties[v].append(tie)

    def with_block(self, block: int, device: int) -> int:
        """The bytes of ``device`` with ``block``, which is nowhere yet, in it too."""
        before = self._members[device]
        after, size = before | 1 << block, self.bytes[device] + self._problem.blocks[block].static_bytes
        for tie in self._ties[block]:
            size += tie.copy_bytes * (tie.counted(before) - tie.counted(after))
        return size

    def add(self, block: int, device: int) -> None:
        """Put ``block`` on ``device``."""
        self.bytes[device] = self.with_block(block, device)
        self._members[device] |= 1 << block


def held_at_once(problem: Problem) -> int:
    """Micro-batches whose saved tensors a device holds that has a part of the blocks."""
    return in_flight(problem.schedule, problem.microbatches, len(problem.devices) - 1)


def peak_bytes(problem: Problem, members: int, device: int) -> int:
    """Peak bytes of ``device`` with the blocks in ``members``; the formula stands at the head of this module."""
    if not members:
        return 0
    whole = members == (1 << len(problem.blocks)) - 1
    held = 1 if whole and problem.schedule == "1f1b" else held_at_once(problem)
    received, sent = received_by(problem, members), sent_by(problem, members)
    buffers = sum(c.forward_bytes for c in received) + sum(c.backward_bytes for c in sent)
    gradients = sum(c.backward_bytes for c in received)
    one = problem.walk(members)
    together = device < len(problem.updates_together) and problem.updates_together[device]
    return (
        static_bytes(problem, members)
        + held * buffers
        + max(
            (held - 1) * one.kept + max(one.forward, one.backward),
            (held - 1) * gradients + one.backward,
            held * gradients + (one.update_together if together else one.update),
        )
    )


def fits(problem: Problem, members: int, device: int) -> bool:
    """Whether the blocks in ``members`` fit ``device``."""
    return peak_bytes(problem, members, device) <= problem.caps[device]


def obeys(problem: Problem, of: Sequence[int]) -> bool:
    """Whether every block is where it may be, and every device holds what it has."""
    allowed = all(problem.blocks[v].allowed[device] for v, device in enumerate(of))
    return allowed and all(fits(problem, mask, d) for d, mask in enumerate(masks_of(of, len(problem.devices))))


def classes_of(problem: Problem) -> list[int]:
    """By device: the first device that it cannot be told apart from by times, cap, pins, links or the way to the
    host."""
    count = len(problem.devices)
    together = problem.updates_together or (False,) * count

    def own(d: int) -> tuple[object, ...]:
        rows = ((b.forward_s[d], b.backward_s[d], b.update_s[d], b.allowed[d]) for b in problem.blocks)
        return problem.caps[d], together[d], problem.ways[d], *rows

    facts = [own(d) for d in range(count)]

    def alike(a: int, b: int) -> bool:
        links = problem.links
        others = [o for o in range(count) if o not in (a, b)]
        return (
            facts[a] == facts[b]
            and links[a][b] == links[b][a]
            and all(links[a][o] == links[b][o] and links[o][a] == links[o][b] for o in others)
        )

    first: list[int] = []
    for device in range(count):
        first.append(next((f for f in dict.fromkeys(first) if alike(f, device)), device))
    return first


@dataclass
class Best:
    """The best assignment so far, and the proven bound."""

    problem: Problem
    bound: float = 0.0
    of: tuple[int, ...] = ()
    value: float = math.inf
    closed: bool = False
    """Whether everything was searched, or shown not to fit."""
    price: Callable[[Problem, Sequence[int]], float] = largest_load_s
    """What is to be least; infinite where an assignment is not to be taken."""

    @property
    def proven(self) -> bool:
        """Whether nothing better exists."""
        return self.closed or (bool(self.of) and self.bound >= self.value * (1 - ROUNDING))

    def offer(self, of: Sequence[int]) -> bool:
        """Take ``of`` if it is feasible and better; whether it was."""
        value = self.price(self.problem, of)
        if value < self.value and obeys(self.problem, of):
            self.of, self.value = tuple(of), value
            return True
        return False

    def result(self) -> Assignment | None:
        """The best; None when nothing was found."""
        if not self.of:
            return None
        bound = self.value if self.proven else min(self.bound, self.value)
        return Assignment(self.of, self.value, bound, bound >= self.value * (1 - EXACT))
