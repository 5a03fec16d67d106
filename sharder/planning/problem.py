r"""The planning problem, free of torch and of names: integers, bit masks and seconds.

Given blocks v (nodes that must stay together) with predecessors, devices d, tensors t made by one block and read by
others, and ties p (parameters that several blocks use); choose an order of devices and a chain of predecessor-closed
sets {} = I0 < I1 < ... < IS = all, so that stage s = Is \ Is-1 runs on the s-th device, has a unit and fits the memory,
and the largest load is least:

    load(s) = M * (compute(s) + out(s) + in(s)) + update(s) + ties(s)                   seconds of M micro-batches
    memory(s) = static(s) + copies(s) + buffers(s) + max(engine(s), update(s))      while micro-batches come and go, and
                                                                                    in the optimizer's step

or, where transfers overlap with compute, as copy engines allow, one for sends and one for receives,

    load(s) = max of  M * compute(s) + update(s) + ties(s),  M * out(s),  M * in(s)

What goes out and in follows from the transfers. Let f(t) be the tensor t itself and b(t) its gradient, if it has one;
x(a -> b) = latency + bytes / bandwidth of the way from device a to b; p the stage that makes t, R its other readers'
stages, and d(s) the device of s:

    relayed   t crosses every cut between p and the last of R, as the pipeline engine sends it, from neighbour to
              neighbour: for each of those cuts, between s and s + 1, f(t) is out of s and in for s + 1, and b(t) is
              out of s + 1 and in for s; both over the link of d(s) and d(s + 1)
    direct    for each r of R, f(t) is out of p and in for r, and b(t) is out of r and in for p, over the link of
              d(p) and d(r)
    staged    through the host's memory: f(t) is out of p once if there is any r, and in for each r; b(t) is out of
              each r, is summed up in the host's memory, and in for p once; each over the way of that device to or from
              the host

So what a stage costs follows under staged transfers from its own blocks and device alone, under relayed ones from its
neighbours' devices too, and under direct ones from all that is behind it. Staged transfers over ways as good as the
best link of each device cost no more than direct ones: a bound on them. Where every tensor goes to the next block of a
chain, relayed and direct are the same.

kept, forward, backward and first of one micro-batch come from a walk through the stage's nodes (memory.py), out is what
of kept it sends or returns. Received are tensors, what is relayed by every stage that it passes, and in training the
gradients of those sent; the engine (that of torch 2.11 and 2.13 alike, torch.distributed.pipelining) has a buffer for
each of them and each of the M micro-batches, for the whole of the training. Gradients of the parameters (G) count as
static, but a step's first backward makes them. A gradient for a tensor that a stage only relays is copied. With W =
in_flight(s), and g the gradients that a stage sends for one micro-batch, engine(s) is the largest of

    (W - 1) * kept + max(forward, relayed + first) - G          until the first backward is done
    (M - 1 - b) * kept + b * (out + g) + relayed + backward     GPipe, backward b = 1 ... M - 1: whatever was sent waits
                                                                for the end of the step (a last stage sends no out)
    (W - 1) * kept + g + stays + max(forward, relayed + backward)       1F1B, M > W: one micro-batch's g waits
    (W - 2) * kept + g + relayed + backward                             1F1B, M = W: the second backward

Under 1F1B a last stage (W = 1) holds the output before while it makes the next, and a stage before it (W > 1) the
output that it sent last but one before its first backward, for as long as it takes micro-batches: stays = out for the
former's forward, for the latter if M >= 2 W - 1 (before, that micro-batch is not through), else 0. With gloo, what is
sent is held until nothing refers to the operation; NCCL lets tensors go when it was waited for, so that a GPU holds
less by up to the terms with out. In inference nothing is let go before the next step, as under GPipe. A stage that is
the whole model has no engine: kept * (W - 1) + max(forward, backward), the parameters' gradients there from before.
What a stage holds under zero-bubble is in zero_bubble.py; its load is the same, with the whole backward.

In training a stage may be computed anew: it keeps of a micro-batch in flight only what it receives, in the engine's
buffers, and what it has sent, and makes the rest again just before that micro-batch's backward. Its forward comes once
more, and memory(s) is as above with the walk of memory.py for such a stage in place of kept, forward, backward, first:

    load(s) = M * (compute(s) + again(s)) + ...         again = its forward, as measured where nothing is kept

Where each stage may be either (recompute = auto), the least largest load has a stage computed anew only if it would not
fit otherwise, as that makes no load smaller: each stage's price is

    load(s) as it is if memory(s) fits,  M * again(s) more if only its memory computed anew fits,  else infinite

and it depends on what it depended on before: blocks, device, and how many stages are behind. So the searches that are
exact for stages of one kind are exact over all sets of stages computed anew, and bounds from work alone still hold.

A stage that has some users of a tied parameter, but not all, holds a copy of it:

    ties(s) = sum over the p that it holds of 2 * (latency + gradient bytes / bandwidth), if there is a gradient
              + sum over the p that it holds, without the block whose update has p in it, of the update of a copy
    copies(s) = sum over the p that it holds, without the block whose static bytes count p, of the bytes of a copy

A step ends with one sum of the gradients over the copies. A ring sends and receives less than twice the gradient for
each of them, however many they are (Patarasuk and Yuan, "Bandwidth optimal all-reduce algorithms for clusters of
workstations", JPDC 2009). Which links the ring takes is known only with the whole split, so each holder pays for the
slowest link, either way, between its device and any other of the problem: a stage's price depends on that stage alone.
If one of those links is not to be used, the price is infinite, since the ring might take it.
The latencies of further rounds, which a ring of more than two copies has, are left out.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from shardwright.sharder.planning.formulation.brought import Brought, Fetching, least_brought
from shardwright.sharder.planning.formulation.memory import EMPTY, Ledger, Walk, bits, engine_bytes
from shardwright.sharder.planning.schedules import zero_bubble

__all__ = [
    "Block",
    "Crossing",
    "Link",
    "Problem",
    "Recompute",
    "Replica",
    "Schedule",
    "Tie",
    "Transfers",
    "Wanted",
    "bits",
    "in_flight",
    "slowest",
]

Recompute = Literal["auto", "never", "always"]
Schedule = Literal["1f1b", "gpipe", "interleaved", "zero-bubble"]
Wanted = Literal["1f1b", "gpipe", "interleaved", "zero-bubble", "auto"]
"""``"auto"``: 1F1B, interleaved, or zero-bubble where the profile has the parts of backwards, whichever has the shorter
step."""
Transfers = Literal["relayed", "staged", "direct"]
Link = tuple[float, float]
"""Latency in s, bandwidth in bytes/s."""


def slowest(links: Iterable[Link]) -> Link:
    """The largest latency and the smallest bandwidth of ``links`` that may be used; unusable where none may."""
    usable = [link for link in links if math.isfinite(link[0])]
    return (max(s for s, _ in usable), min(rate for _, rate in usable)) if usable else (math.inf, math.inf)


def in_flight(schedule: Schedule, microbatches: int, stages_after: int) -> int:
    """Micro-batches whose saved tensors a stage holds at once (Narayanan et al., SC 2021, section 2.2)."""
    return microbatches if schedule == "gpipe" else min(microbatches, stages_after + 1)


@dataclass(frozen=True)
class Block:
    """Nodes of the cost graph that share a stage; times are of one micro-batch on each device."""

    nodes: tuple[str, ...]
    forward_s: tuple[float, ...]
    backward_s: tuple[float, ...]
    update_s: tuple[float, ...]
    static_bytes: int
    units: tuple[str, ...]
    """Module paths of the units among the nodes; a stage has at least one."""
    allowed: tuple[bool, ...]
    """By device: whether pins leave it, and the block fits on it."""
    unfit: tuple[bool, ...] = ()
    """By device: whether the block was tried there and did not fit, even alone; nothing = nowhere."""
    recompute_s: tuple[float, ...] = ()
    """A forward that keeps nothing for backward, which computing anew adds; nothing = as ``forward_s``."""
    parts_s: tuple[tuple[float, float], ...] = ()
    """By device: the two parts of the backward, as zero-bubble divides it; nothing = not known. No load has them."""
    sum_s: tuple[float, ...] = ()
    """Of ``update_s``, what summing its gradients over replicas takes; nothing = there are none. See replicas.py."""

    pinned: bool = False
    """Whether a pin says where it has to be."""

    def again_s(self, device: int) -> float:
        """Seconds of one more forward on ``device``."""
        return (self.recompute_s or self.forward_s)[device]

    def fits_on(self, device: int) -> bool:
        """Whether the block may be there by its size."""
        return not self.unfit or not self.unfit[device]


@dataclass(frozen=True)
class Crossing:
    """A tensor between blocks: it crosses each cut that has its producer before and one of its readers after."""

    name: str
    producer: int
    readers: int
    """Bit mask of blocks."""
    forward_bytes: int
    backward_bytes: int


@dataclass(frozen=True)
class Tie:
    """A parameter that several blocks use."""

    name: str
    users: int
    """Bit mask of blocks."""
    first: int
    """The user whose ``static_bytes`` count the parameter."""
    copy_bytes: int
    """Of one more copy: parameter, gradient and optimizer state."""
    gradient_bytes: int
    """Summed over the copies once a step."""
    update_s: tuple[float, ...] = ()
    """By device, of one more copy; nothing where it is empty."""

    def held(self, members: int) -> bool:
        """Whether a stage of the blocks in ``members`` has a copy beside other stages' copies."""
        return bool(members & self.users and self.users & ~members)

    def counted(self, members: int) -> bool:
        """Whether the static bytes of the blocks in ``members`` have all that they hold of the parameter."""
        return bool(members >> self.first & 1 or not members & self.users)


@dataclass(frozen=True)
class Replica:
    """One of the equal pipelines for which a problem takes its devices together; see replicas.py."""

    devices: tuple[str, ...]
    """By device of the problem, the one that this pipeline has there."""
    seconds: tuple[tuple[float, ...], ...]
    """By block and device: compute of a step, as this pipeline's own device takes it."""


@dataclass(frozen=True)
class Problem:
    """Blocks in a topological order, tensors and ties between them, devices and links."""

    blocks: tuple[Block, ...]
    predecessors: tuple[int, ...]
    """By block: bit mask of the blocks that come before it."""
    crossings: tuple[Crossing, ...]
    devices: tuple[str, ...]
    caps: tuple[int, ...]
    links: tuple[tuple[tuple[float, float], ...], ...]
    """``links[a][b]`` = (latency in s, bandwidth in bytes/s).

    The latency is infinite where nothing may be sent, because the link changes what it carries: no split with a finite
    load uses it.
    """
    microbatches: int
    schedule: Schedule = "1f1b"
    ties: tuple[Tie, ...] = ()
    ledger: Ledger = EMPTY
    """What the nodes of the blocks take in memory for one micro-batch."""
    updates_together: tuple[bool, ...] = ()
    """By device: whether the optimizer works on all parameters at once; by default it takes one after another."""
    transfers: Transfers = "relayed"
    overlap: bool = False
    """Whether transfers go on beside compute."""
    hosts: tuple[tuple[Link, Link], ...] = ()
    """By device: the way to the host's memory and the way from it; by default those of its slowest usable links."""
    recompute: Recompute = "never"
    """Whether stages are computed anew in the backward; ``"auto"``: those that would not fit otherwise."""
    stages_per_device: int = 1
    """More than one if interleaved: see interleave.py."""
    engine_s: tuple[float, ...] = ()
    """By device: what the pipeline engine takes for each operation of a stage. It is in the simulated step, and in no
    load, since it is the same however the blocks are split; by default nothing."""
    forward_only: bool = False
    """Whether nothing is trained; an interleaved pipeline needs to know."""
    replicas: tuple[Replica, ...] = ()
    """Equal pipelines, of which each has ``microbatches`` of the batch's; ``devices`` are the first one's. Nothing =
    there is one."""
    fetching: Fetching | None = None
    """Of inference: weights that may be brought for each call, as few of a stage as it fits with. They are in no
    ``static_bytes``. See brought.py."""
    sums: tuple[Link, ...] = ()
    """By device: what a sum of gradients over the replicas takes at once, and bytes/s of it. See replicas.py."""

    @property
    def times_differ(self) -> bool:
        """Whether some block takes longer on one device than on another."""
        return any(len(set(seconds)) > 1 for seconds in self.seconds)

    @property
    def most_stages(self) -> int:
        """Stages that the devices allow, if interleaved rounds of them; 1F1B needs a micro-batch for every stage."""
        one_each = self.schedule in ("1f1b", "zero-bubble")
        return min(len(self.devices), self.microbatches) if one_each else len(self.devices)

    @property
    def batch_microbatches(self) -> int:
        """Micro-batches of the whole batch, in all replicas."""
        return self.microbatches * max(1, len(self.replicas))

    def work_s(self, block: int, device: int) -> float:
        """Seconds of compute that ``block`` costs ``device`` in one step."""
        return self.seconds[block][device]

    @cached_property
    def seconds(self) -> list[tuple[float, ...]]:
        """By block and device: seconds of compute in one step, without what only some stages compute anew."""
        none = (0.0,) * len(self.devices)
        return [
            tuple(
                self.microbatches * (forward + again + backward) + update
                for forward, again, backward, update in zip(
                    b.forward_s,
                    (b.recompute_s or b.forward_s) if self.recompute == "always" else none,
                    b.backward_s,
                    b.update_s,
                    strict=True,
                )
            )
            for b in self.blocks
        ]

    @cached_property
    def total_s(self) -> tuple[float, ...]:
        """By device: seconds of compute of all blocks."""
        return tuple(map(sum, zip(*self.seconds, strict=True)))

    @cached_property
    def unlike_pairs(self) -> list[tuple[int, int]]:
        """Pairs of devices, of those with the same links there and back one."""
        devices, links = range(len(self.devices)), self.links
        return [*{(links[a][b], links[b][a]): (a, b) for a in devices for b in devices if a != b}.values()]

    def crossing(self, closed: int) -> list[Crossing]:
        """The tensors that cross the cut after the predecessor-closed set ``closed``."""
        if closed not in self._crossing:
            inside = (~closed & closed + 1).bit_length() - 1  # all blocks before this one are
            self._crossing[closed] = [
                c
                for c, last in self._last_readers
                if last >= inside and closed >> c.producer & 1 and c.readers & ~closed
            ]
        return self._crossing[closed]

    @cached_property
    def _crossing(self) -> dict[int, list[Crossing]]:
        return {}

    @cached_property
    def _last_readers(self) -> list[tuple[Crossing, int]]:
        """The tensors, each with the last block that reads it: most do not cross by that alone."""
        return [(c, c.readers.bit_length() - 1) for c in self.crossings]

    def received(self, start: int, members: int) -> list[Crossing]:
        """The tensors that a stage of the blocks in ``members`` gets, behind the predecessor-closed set ``start``."""
        crossing = self.crossing(start)
        return crossing if self.transfers == "relayed" else [c for c in crossing if c.readers & members]

    def sent(self, end: int, members: int) -> list[Crossing]:
        """The tensors that it sends, ``end`` being ``start`` with it."""
        crossing = self.crossing(end)
        return crossing if self.transfers == "relayed" else [c for c in crossing if members >> c.producer & 1]

    @cached_property
    def ways(self) -> tuple[tuple[Link, Link], ...]:
        """By device: the way to the host's memory and the way from it."""
        if self.hosts:
            return self.hosts
        devices = range(len(self.devices))
        if len(devices) == 1:
            return (((0.0, math.inf),) * 2,)
        return tuple(
            (
                slowest(self.links[d][other] for other in devices if other != d),
                slowest(self.links[other][d] for other in devices if other != d),
            )
            for d in devices
        )

    def transfer_s(self, tensors: Iterable[Crossing], source: int, target: int) -> tuple[float, float]:
        """Seconds that one micro-batch's ``tensors`` take from ``source`` to ``target``, and their gradients back."""
        there, back = self.links[source][target], self.links[target][source]
        forward = backward = 0.0
        for tensor in tensors:
            forward += there[0] + tensor.forward_bytes / there[1]
            if tensor.backward_bytes:
                backward += back[0] + tensor.backward_bytes / back[1]
        return forward, backward

    def sum_s(self, tie: Tie, device: int) -> float:
        """Seconds in which a copy of ``tie`` on ``device`` gets the sum of the gradients, once a step."""
        if not tie.gradient_bytes:
            return 0.0
        others = [other for other in range(len(self.devices)) if other != device]
        links = [link for other in others for link in (self.links[device][other], self.links[other][device])]
        return 2 * max((latency + tie.gradient_bytes / bandwidth for latency, bandwidth in links), default=0.0)

    def tie_sums_s(self, members: int, device: int) -> float:
        """Seconds of a step in which a stage of the blocks in ``members`` on ``device`` gets the sums of gradients."""
        return sum(self.sum_s(tie, device) for tie in self.ties if tie.held(members))

    def copies_s(self, members: int, device: int) -> float:
        """Seconds of a step in which it updates the copies that it has beside its blocks' own parameters."""
        return sum(tie.update_s[device] for tie in self.ties if tie.update_s and not tie.counted(members))

    def ties_s(self, members: int, device: int) -> float:
        """Seconds of a step that ties cost a stage of the blocks in ``members`` on ``device``."""
        return self.tie_sums_s(members, device) + self.copies_s(members, device)

    @property
    def unusable(self) -> tuple[tuple[str, str], ...]:
        """Source and target of each link that nothing may be sent over."""
        return tuple(
            (self.devices[a], self.devices[b])
            for a, row in enumerate(self.links)
            for b, (latency, _) in enumerate(row)
            if math.isinf(latency)
        )

    def alone(self, device: int) -> Problem:
        """The same work on one device and no other, pins lifted and nothing computed anew."""
        blocks = (
            dataclasses.replace(
                b,
                forward_s=(b.forward_s[device],),
                backward_s=(b.backward_s[device],),
                update_s=(b.update_s[device],),
                allowed=(b.fits_on(device),),
                unfit=(),
                recompute_s=(),
                parts_s=(),
            )
            for b in self.blocks
        )
        return dataclasses.replace(
            self,
            recompute="never",
            blocks=tuple(blocks),
            devices=(self.devices[device],),
            caps=(self.caps[device],),
            links=((self.links[device][device],),),
            ties=(),
            schedule="1f1b" if self.schedule in ("interleaved", "zero-bubble") else self.schedule,
            stages_per_device=1,
            updates_together=self.updates_together[device : device + 1],
            engine_s=(),
            hosts=self.hosts[device : device + 1],
        )

    def memory_bytes(
        self,
        start: int,
        end: int,
        device: int,
        stages_after: int,
        *,
        recomputed: bool | None = None,
        before: int | None = None,
        forward: int = 0,
    ) -> int:
        """Peak bytes of a stage on ``device`` with ``stages_after`` stages behind it.

        Its blocks are those in ``end`` and not in ``start``, both predecessor-closed. By default it is computed anew
        where every stage is. Under zero-bubble it matters how many stages are ``before`` it, too: by default it is the
        most for any number of them. The peak of a forward is taken to be ``forward`` at least.
        """
        members = end & ~start
        static = sum(self.blocks[v].static_bytes for v in bits(members))
        copies = sum(tie.copy_bytes for tie in self.ties if not tie.counted(members))
        received, sent = self.received(start, members), self.sent(end, members)
        buffers = sum(c.forward_bytes for c in received) + sum(c.backward_bytes for c in sent)
        one = self.walk(members, recomputed=self.recompute == "always" if recomputed is None else recomputed)
        one = one._replace(forward=max(one.forward, forward)) if forward else one
        held = in_flight(self.schedule, self.microbatches, stages_after)
        if start or sent:
            gradients = sum(c.backward_bytes for c in received)
            relayed = sum(c.backward_bytes for c in received if c.readers & ~end and not c.readers & members)
            last = stages_after == 0
            if self.schedule == "zero-bubble":
                peak = self._parted_bytes(one, gradients, relayed, stages_after, before if start else 0)
            else:
                at_once = self.all_first
                peak = engine_bytes(one, self.microbatches, held, gradients, relayed, all_first=at_once, last=last)
        else:
            peak = (held - 1) * one.kept + max(one.forward, one.backward)
        update = one.update_together if self._updates_together(device) else one.update
        return static + copies + self.microbatches * buffers + max(peak, update)

    def _parted_bytes(self, one: Walk, gradients: int, relayed: int, after: int, before: int | None) -> int:
        """What comes and goes under zero-bubble, with so many stages behind; by default before is any number."""
        positions = range(1, max(self.most_stages - after, 2)) if before is None else [before]
        return max(
            zero_bubble.peak_bytes(
                one,
                stages=position + 1 + after,
                position=position,
                microbatches=self.microbatches,
                gradients=gradients,
                relayed=relayed,
            )
            for position in positions
        )

    @property
    def all_first(self) -> bool:
        """Whether all forwards come before the first backward."""
        return self.schedule == "gpipe"

    def more_s(self, start: int, end: int, device: int, stages_after: int) -> float:
        """Seconds of a step beyond those of its blocks with which a stage fits ``device``: none, its forward again, or
        those in which weights are brought.

        Infinite where it does not fit at all. The arguments are those of :meth:`memory_bytes`.
        """
        if self.fetching is not None:
            return self._fetch_s(start, end, device, stages_after)
        cap = self.caps[device]
        if self.memory_bytes(start, end, device, stages_after) <= cap:
            return 0.0
        if self.recompute != "auto" or self.memory_bytes(start, end, device, stages_after, recomputed=True) > cap:
            return math.inf
        return self.microbatches * sum(self.blocks[v].again_s(device) for v in bits(end & ~start))

    def _fetch_s(self, start: int, end: int, device: int, stages_after: int) -> float:
        """Seconds of a step in which a stage brings weights, at least."""
        brought = self.brought(start, end, device, stages_after)
        if brought is None or self.fetching is None:
            return math.inf
        rate = self.fetching.rates[device]
        return self.microbatches * brought.bound / (rate or 1.0)

    def brought(self, start: int, end: int, device: int, stages_after: int) -> Brought | None:
        """The fewest weights that a stage has to bring to fit ``device``; None where it does not fit."""
        if self.fetching is None:
            return Brought((), 0, 0)
        can = self.fetching.rates[device] is not None
        key = start, end, self.caps[device], stages_after, can
        if key not in self._brought:
            sizes = self.fetching.sizes
            members = [v for v in bits(end & ~start) if sizes[v]]
            peaks = self.ledger.peaks(end & ~start)

            def stays(forward: int) -> int:
                return self.memory_bytes(start, end, device, stages_after, forward=forward)

            blocks = [(v, sizes[v], peaks.get(v, 0)) for v in members] if can else []
            self._brought[key] = least_brought(blocks, stays, self.caps[device], sum(sizes[v] for v in members))
        return self._brought[key]

    @cached_property
    def _brought(self) -> dict[tuple[int, int, int, int, bool], Brought | None]:
        return {}

    def recomputes(self, start: int, end: int, device: int, stages_after: int) -> bool:
        """Whether a stage, which fits, is computed anew."""
        if self.recompute != "auto":
            return self.recompute == "always"
        return self.memory_bytes(start, end, device, stages_after) > self.caps[device]

    def _updates_together(self, device: int) -> bool:
        return device < len(self.updates_together) and self.updates_together[device]

    def walk(self, members: int, *, recomputed: bool = False) -> Walk:
        """What a step takes on its way through the blocks in ``members``, computed anew or not."""
        key = members, recomputed
        if key not in self._walks:
            self._walks[key] = self.ledger.walk_anew(members) if recomputed else self.ledger.walk(members)
        return self._walks[key]

    @cached_property
    def _walks(self) -> dict[tuple[int, bool], Walk]:
        return {}

    def least_bytes(self, block: int, device: int) -> int:
        """Bytes that ``block`` takes on ``device`` at least: as the last stage, with all that it shares elsewhere."""
        b, alone = self.blocks[block], self.ledger.least(block)
        others = in_flight(self.schedule, self.microbatches, 0) - 1 if self.recompute == "never" else 0
        update = alone.update_together if self._updates_together(device) else alone.update
        first = others * alone.kept + max(alone.forward, alone.backward) - alone.gradients
        later = max(0, others - 1) * alone.kept + alone.backward if self.microbatches > 1 else 0
        return b.static_bytes + max(first, later, update)
