r"""The exact search over chains of predecessor-closed sets.

Let R(I, d, e, U, k, c) say whether the blocks outside the closed set I can be split into k + 1 stages, each with a
load below c, when the stage before ran on d, the next one runs on e, and the devices U are free for the k after it:

    R(I, d, e, U, k, c) = some closed I' > I and f in U have load(I' \ I on e, in from d, out to f) < c,
                          memory(I' \ I) within the cap of e, and R(I', e, f, U - f, k - 1, c)

where a stage that fits only if it is computed anew has that in its load. The optimum is the largest c for which no
device e and no k give R({}, none, e, all - e, k, c). This is the programme of Tarnawski et al., "Efficient algorithms
for device placement of DNN graph operators", NeurIPS 2020, section 4.1, with the neighbour's link in the state, because
links differ, and with stages counted from the end, because the memory of a stage depends on the stages behind it. As a
question with a ceiling it needs to remember only what failed, and each c that fails is a proven bound, even when the
time runs out afterwards.

Ties stay exact without more state: what a stage pays for them, in time and in memory, follows from its own blocks and
its device (problem.py). They only add to a load, so bounds from work alone hold. But a stage that grows by the last
user of a parameter pays less: nothing is ruled out because a smaller stage was too dear with its ties.
"""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

from shardwright.sharder.planning.problem import Crossing, Problem, bits, in_flight

__all__ = [
    "ROUNDING",
    "Done",
    "Lattice",
    "OutOfTimeError",
    "Search",
    "Stages",
    "closed_sets",
    "fluid_s",
    "most_held",
    "simple_bound_s",
    "sums_of",
    "tied_of",
]

Stages = tuple[tuple[int, int], ...]
"""In order: a device index and a bit mask of blocks each."""

Lattice = dict[int, list[tuple[int, int]]]
"""Closed sets as bit masks, smallest first; for each the blocks that may come next, with the closed set they make."""

ROUNDING = 1e-12
"""Sums of the same times in another order differ by less than this share."""


@lru_cache(maxsize=2)  # the same graph is split at several numbers of micro-batches, within two limits
def closed_sets(predecessors: tuple[int, ...], limit: int) -> Lattice | None:
    """All predecessor-closed sets of a DAG; None when there are more than ``limit``."""
    successors: list[list[int]] = [[] for _ in predecessors]
    for v, before in enumerate(predecessors):
        for u in bits(before):
            successors[u].append(v)
    ready = {0: [v for v, before in enumerate(predecessors) if not before]}
    lattice: Lattice = {}
    layer = [0]
    while layer:
        grown: list[int] = []
        for closed in layer:
            if 1 << len(ready[closed]) > limit:  # any of those that are ready may come next, together
                return None
            lattice[closed] = [(v, closed | 1 << v) for v in ready[closed]]
            for v, larger in lattice[closed]:
                if larger in ready:
                    continue
                if len(ready) >= limit:
                    return None
                opened = [w for w in successors[v] if not predecessors[w] & ~larger]
                ready[larger] = [w for w in ready[closed] if w != v] + opened
                grown.append(larger)
        layer = grown
    return lattice


def fluid_s(problem: Problem, devices: Sequence[int]) -> list[float]:
    """By block: what it adds to a bound on the largest load over ``devices``, whatever the split.

    For any weights of the devices with sum 1 the largest load is at least the weighted mean of the loads, so at least
    the sum over the blocks of the smallest weighted time. Weights in proportion to speed make that sharp.
    """
    speed = {d: 1 / problem.total_s[d] for d in devices if problem.total_s[d]}
    if len(speed) < len(devices):
        return [0.0 if any(block.allowed[d] for d in devices) else math.inf for block in problem.blocks]
    whole = sum(speed.values())
    weights = [speed.get(d, 0.0) / whole for d in range(len(problem.devices))]
    every = len(devices) == len(weights)
    return [
        min(map(operator.mul, problem.seconds[v], weights))
        if every and all(block.allowed)
        else min((problem.seconds[v][d] * weights[d] for d in devices if block.allowed[d]), default=math.inf)
        for v, block in enumerate(problem.blocks)
    ]


def _least_s(problem: Problem) -> list[float]:
    """By block: its time on the fastest device that may have it."""
    return [
        min(itertools.compress(seconds, block.allowed), default=math.inf)
        for seconds, block in zip(problem.seconds, problem.blocks, strict=True)
    ]


def simple_bound_s(problem: Problem) -> float:
    """A bound without search: the work shared out evenly, and the largest block, each where it is fastest."""
    least = _least_s(problem)
    return max(sum(fluid_s(problem, range(len(problem.devices)))), sum(least) / problem.most_stages, *least)


def most_held(problem: Problem, after: int) -> int:
    """What a stage holds with ``after`` stages behind it, at most, in micro-batches of all that comes with one."""
    # Beside those in flight there is what was sent of one more. Computed anew, what was sent is there twice.
    if problem.schedule == "zero-bubble":
        return problem.microbatches + 1  # what was sent stays to the end of the step
    return in_flight(problem.schedule, problem.microbatches, after) + (2 if problem.recompute == "always" else 1)


class OutOfTimeError(Exception):
    """The time limit has passed."""


class Tied(NamedTuple):
    """The ties with the same users, of which the same block counts the copy: one for the search."""

    users: int
    first: int
    """As a bit mask."""
    copy_bytes: int
    sum_s: tuple[float, ...]
    """By device, of each copy beside others."""
    update_s: tuple[float, ...]
    """By device, of a copy that the block does not count."""


class Done(NamedTuple):
    """What the blocks of a closed set add up to, and what crosses the cut behind them."""

    work_s: tuple[float, ...]
    """By device."""
    least_s: float
    static_bytes: int
    coming_bytes: int
    """Of one micro-batch: all that is saved, made and waits as a gradient, as if nothing ever went."""
    tensors: int = 0
    gradients: int = 0
    forward_bytes: int = 0
    backward_bytes: int = 0


def tied_of(problem: Problem) -> list[Tied]:
    """The ties of ``problem`` that cost something, those with the same users as one."""
    devices, none = range(len(problem.devices)), (0.0,) * len(problem.devices)
    found: dict[tuple[int, int], Tied] = {}
    for tie in problem.ties:
        key = tie.users, 1 << tie.first
        known = found.get(key, Tied(*key, 0, none, none))
        sum_s = tuple(known.sum_s[d] + problem.sum_s(tie, d) for d in devices)
        update_s = tuple(map(operator.add, known.update_s, tie.update_s or none))
        found[key] = Tied(*key, known.copy_bytes + tie.copy_bytes, sum_s, update_s)
    return [tied for tied in found.values() if tied.copy_bytes or any(tied.sum_s) or any(tied.update_s)]


def sums_of(problem: Problem, lattice: Lattice) -> dict[int, Done]:
    """The sums for each closed set of ``lattice``, from those of a smaller one."""
    work, least = problem.seconds, _least_s(problem)
    touching: list[list[Crossing]] = [[] for _ in problem.blocks]
    for tensor in problem.crossings:
        for v in {tensor.producer, *bits(tensor.readers)}:
            touching[v].append(tensor)
    coming = problem.ledger.coming()
    sums = {0: Done((0.0,) * len(problem.devices), 0.0, 0, 0)}
    for closed, steps in lattice.items():
        done = sums[closed]
        for v, larger in steps:
            if larger in sums:
                continue
            cut = list(done[4:])
            for tensor in touching[v]:
                change = 1 if tensor.producer == v else 0 if tensor.readers & ~larger else -1
                cut[0] += change
                cut[1] += change if tensor.backward_bytes else 0
                cut[2] += change * tensor.forward_bytes
                cut[3] += change * tensor.backward_bytes
            block = problem.blocks[v]
            sums[larger] = Done(
                tuple(map(operator.add, done.work_s, work[v])),
                done.least_s + least[v],
                done.static_bytes + block.static_bytes,
                done.coming_bytes + coming.get(v, 0),
                *cut,
            )
    return sums


class Search:
    """The question R over one lattice of closed sets and one choice of device orders.

    Args:
        problem: blocks, devices and links.
        lattice: the closed sets at which a stage may end.
        sums: theirs.
        classes: devices in classes; within a class they are used in the order given.
        out_of_time: asked in every state.
    """

    def __init__(
        self,
        problem: Problem,
        lattice: Lattice,
        sums: Mapping[int, Done],
        classes: Sequence[Sequence[int]],
        out_of_time: Callable[[], bool],
    ) -> None:
        self.problem = problem
        self.lattice = lattice
        self.classes = classes
        self.out_of_time = out_of_time
        self.ceiling_s = 0.0
        self.sums = sums
        self.everything = (1 << len(problem.blocks)) - 1
        self.units = sum(1 << v for v, block in enumerate(problem.blocks) if block.units)
        self.forbidden = [
            0 if all(allowed) else sum(1 << v for v, allows in enumerate(allowed) if not allows)
            for allowed in zip(*(block.allowed for block in problem.blocks), strict=True)
        ]
        # No stage takes more at once beside what comes with the micro-batches.
        self.most_at_once = problem.ledger.most_at_once()
        self.ties = tied_of(problem)
        self.failed: dict[tuple[int, int, int, int], float] = {}
        self.ends: dict[tuple[int, int], list[int]] = {}
        self.rests: dict[int, dict[int, float]] = {}

    def below(self, ceiling_s: float) -> Stages | None:
        """A split with every load below ``ceiling_s``, or None when this search has none."""
        if ceiling_s > self.ceiling_s:
            self.failed.clear()
            self.ends.clear()
        self.ceiling_s = ceiling_s
        every = (1 << len(self.problem.devices)) - 1
        for after in reversed(range(self.problem.most_stages)):
            if self.sums[self.everything].least_s * (1 - ROUNDING) >= ceiling_s * (after + 1):
                break
            for device in self.candidates(every):
                found = self.extend(0, -1, device, every & ~(1 << device), after)
                if found is not None:
                    return found
        return None

    def extend(self, start: int, before: int, device: int, free: int, after: int) -> Stages | None:
        """Stages from ``start`` on, the first on ``device`` and ``after`` more behind it, or None."""
        # Of the stage before only what it sends matters here: a split that fails fails with more to receive as well.
        key = (start, device, free, after)
        received = self.transfer_s(start, before, device) if before >= 0 else 0.0
        if received >= self.failed.get(key, math.inf):
            return None
        if self.out_of_time():
            raise OutOfTimeError
        done_s = self.sums[start].work_s[device]
        for end in self.reach(start, device) if after else [self.everything]:
            members = end & ~start
            load = received + self.sums[end].work_s[device] - done_s
            if load >= self.ceiling_s or not members & self.units:
                continue
            if self.ties:
                load += self.ties_s(members, device)
                if load >= self.ceiling_s:
                    continue
            if self.hopeless(end, free, after) if after else members & self.forbidden[device]:
                continue
            load += self.more_s(start, end, device, after)
            if load >= self.ceiling_s:
                continue
            if after == 0:
                return ((device, members),)
            for following in self.candidates(free):
                if load + self.transfer_s(end, device, following) < self.ceiling_s:
                    rest = self.extend(end, device, following, free & ~(1 << following), after - 1)
                    if rest is not None:
                        return ((device, members), *rest)
        self.failed[key] = received
        return None

    def ties_s(self, members: int, device: int) -> float:
        """Seconds of a step that ties cost a stage of the blocks in ``members`` on ``device``."""
        here = [tied for tied in self.ties if members & tied.users]
        sums_s = sum(tied.sum_s[device] for tied in here if tied.users & ~members)
        return sums_s + sum(tied.update_s[device] for tied in here if not members & tied.first)

    def copies(self, members: int) -> int:
        """Bytes of the copies that a stage of the blocks in ``members`` has beside its blocks' own."""
        return sum(tied.copy_bytes for tied in self.ties if members & tied.users and not members & tied.first)

    def candidates(self, free: int) -> list[int]:
        """The first free device of each class."""
        firsts = (next((d for d in class_ if free >> d & 1), None) for class_ in self.classes)
        return [d for d in firsts if d is not None]

    def reach(self, start: int, device: int) -> list[int]:
        """Closed sets that a stage from ``start`` on ``device`` may end with, by work and pins alone; largest first."""
        key = (start, device)
        if key not in self.ends:
            limit_s = self.sums[start].work_s[device] + self.ceiling_s
            seen = {start}
            found = [start]
            for closed in found:  # grows while it is read
                for v, larger in self.lattice[closed]:
                    if larger in seen or self.forbidden[device] >> v & 1 or self.sums[larger].work_s[device] >= limit_s:
                        continue
                    seen.add(larger)
                    found.append(larger)
            self.ends[key] = found[:0:-1]
        return self.ends[key]

    def hopeless(self, end: int, free: int, stages: int) -> bool:
        """Whether what is left behind ``end`` is nothing, or too much for ``stages`` of the ``free`` devices."""
        if end == self.everything:
            return True
        if free not in self.rests:
            self.rests[free] = self.rest_s(free)
        whole, done = self.sums[self.everything], self.sums[end]
        least_s = max(self.rests[free][end], (whole.least_s - done.least_s) / stages)
        if least_s * (1 - 1e-9) >= self.ceiling_s:
            return True
        return whole.static_bytes - done.static_bytes > sum(self.problem.caps[d] for d in bits(free))

    def rest_s(self, free: int) -> dict[int, float]:
        """By closed set: a bound on the largest load of what is left behind it, over the ``free`` devices."""
        share = fluid_s(self.problem, list(bits(free)))
        rest = {self.everything: 0.0}
        for closed, steps in reversed(self.lattice.items()):
            for v, larger in steps:
                rest[closed] = rest[larger] + share[v]
                break
        return rest

    def transfer_s(self, cut: int, source: int, target: int) -> float:
        """Seconds a step spends moving everything that crosses the cut behind ``cut``, both ways."""
        done = self.sums[cut]
        (there_s, there), (back_s, back) = self.problem.links[source][target], self.problem.links[target][source]
        # Where nothing is sent nothing is paid, on a link of infinite latency too.
        forward_s = done.tensors * there_s + done.forward_bytes / there if done.tensors else 0.0
        backward_s = done.gradients * back_s + done.backward_bytes / back if done.gradients else 0.0
        return self.problem.microbatches * (forward_s + backward_s)

    def more_s(self, start: int, end: int, device: int, after: int) -> float:
        """As :meth:`Problem.more_s`, of the stage of the blocks in ``end`` and not in ``start``."""
        first, last, cap = self.sums[start], self.sums[end], self.problem.caps[device]
        microbatches = self.problem.microbatches
        size = last.static_bytes - first.static_bytes + microbatches * (first.forward_bytes + last.backward_bytes)
        if self.ties:
            size += self.copies(end & ~start)
        if size > cap:
            return math.inf
        # A bound by sums settles most stages; a maximum over steps is no sum, so the others are walked through.
        coming = most_held(self.problem, after) * (last.coming_bytes - first.coming_bytes)
        fits = size + coming + microbatches * first.backward_bytes + self.most_at_once <= cap
        if fits and self.problem.fetching is None:
            return 0.0
        return self.problem.more_s(start, end, device, after)
