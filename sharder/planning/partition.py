r"""The exact split: a search over chains of predecessor-closed sets.

Let R(I, d, e, U, k, c) say whether the blocks outside the closed set I can be split into k + 1 stages, each with a
load below c, when the stage before ran on d, the next one runs on e, and the devices U are free for the k after it:

    R(I, d, e, U, k, c) = some closed I' > I and f in U have load(I' \ I on e, in from d, out to f) < c,
                          memory(I' \ I) within the cap of e, and R(I', e, f, U - f, k - 1, c)

The optimum is the largest c for which no device e and no k give R({}, none, e, all - e, k, c). This is the programme of
Tarnawski et al., "Efficient algorithms for device placement of DNN graph operators", NeurIPS 2020, section 4.1, with
the neighbour's link in the state, because links differ, and with stages counted from the end, because the memory of a
stage depends on the stages behind it. As a question with a ceiling it needs to remember only what failed, and each c
that fails is a proven bound, even when the time runs out afterwards. Ceilings therefore rise from a simple bound, and
once a split is found they fall with its value until nothing is below.

Graphs with more closed sets than ``limit`` are split along one topological order, with the gap to the simple bound said
openly.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import NamedTuple

from shardwright.errors import ShardwrightError
from shardwright.sharder.planning.problem import Crossing, Problem, bits, in_flight

__all__ = ["Partition", "closed_sets", "partition", "simple_bound_s", "stage_loads"]

Stages = tuple[tuple[int, int], ...]
"""In order: a device index and a bit mask of blocks each."""

Lattice = dict[int, list[tuple[int, int]]]
"""Closed sets as bit masks, smallest first; for each the blocks that may come next, with the closed set they make."""

ROUNDING = 1e-12
"""Sums of the same times in another order differ by less than this share."""


@dataclass(frozen=True)
class Partition:
    """Stages in order, as device index and bit mask of blocks. ``value_s`` is the largest load of a step."""

    stages: Stages
    value_s: float
    bound_s: float
    """No split of this problem has a smaller largest load."""
    exact: bool


@lru_cache(maxsize=1)  # the same graph is split at several numbers of micro-batches
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


def _fluid_s(problem: Problem, devices: Sequence[int]) -> list[float]:
    """By block: what it adds to a bound on the largest load over ``devices``, whatever the split.

    For any weights of the devices with sum 1 the largest load is at least the weighted mean of the loads, so at least
    the sum over the blocks of the smallest weighted time. Weights in proportion to speed make that sharp.
    """
    speed = {d: 1 / total for d in devices if (total := sum(problem.work_s(v, d) for v in range(len(problem.blocks))))}
    if len(speed) < len(devices):
        return [0.0 if any(block.allowed[d] for d in devices) else math.inf for block in problem.blocks]
    whole = sum(speed.values())
    return [
        min((problem.work_s(v, d) * speed[d] / whole for d in devices if block.allowed[d]), default=math.inf)
        for v, block in enumerate(problem.blocks)
    ]


def _least_s(problem: Problem) -> list[float]:
    """By block: its time on the fastest device that may have it."""
    return [
        min((problem.work_s(v, d) for d in range(len(problem.devices)) if block.allowed[d]), default=math.inf)
        for v, block in enumerate(problem.blocks)
    ]


def simple_bound_s(problem: Problem) -> float:
    """A bound without search: the work shared out evenly, and the largest block, each where it is fastest."""
    least = _least_s(problem)
    return max(sum(_fluid_s(problem, range(len(problem.devices)))), sum(least) / problem.most_stages, *least)


class _OutOfTimeError(Exception):
    """The time limit has passed."""


class _Done(NamedTuple):
    """What the blocks of a closed set add up to, and what crosses the cut behind them."""

    work_s: tuple[float, ...]
    """By device."""
    least_s: float
    static_bytes: int
    saved_bytes: int
    tensors: int = 0
    gradients: int = 0
    forward_bytes: int = 0
    backward_bytes: int = 0


def _sums(problem: Problem, lattice: Lattice) -> dict[int, _Done]:
    """The sums for each closed set of ``lattice``, from those of a smaller one."""
    devices = range(len(problem.devices))
    work = [[problem.work_s(v, d) for d in devices] for v in range(len(problem.blocks))]
    least = _least_s(problem)
    touching: list[list[Crossing]] = [[] for _ in problem.blocks]
    for tensor in problem.crossings:
        for v in {tensor.producer, *bits(tensor.readers)}:
            touching[v].append(tensor)
    sums = {0: _Done((0.0,) * len(devices), 0.0, 0, 0)}
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
            sums[larger] = _Done(
                tuple(a + b for a, b in zip(done.work_s, work[v], strict=True)),
                done.least_s + least[v],
                done.static_bytes + block.static_bytes,
                done.saved_bytes + block.saved_bytes,
                *cut,
            )
    return sums


class _Search:
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
        sums: Mapping[int, _Done],
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
            sum(1 << v for v, block in enumerate(problem.blocks) if not block.allowed[d])
            for d in range(len(problem.devices))
        ]
        self.largest_output = max(block.output_bytes for block in problem.blocks)
        self.failed: set[tuple[int, int, int, int, int]] = set()
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
        key = (start, before, device, free, after)
        if key in self.failed:
            return None
        if self.out_of_time():
            raise _OutOfTimeError
        received = self.transfer_s(start, before, device) if before >= 0 else 0.0
        done_s = self.sums[start].work_s[device]
        for end in self.reach(start, device) if after else [self.everything]:
            load = received + self.sums[end].work_s[device] - done_s
            if load >= self.ceiling_s or not (end & ~start) & self.units:
                continue
            if after == 0:
                if not (end & ~start) & self.forbidden[device] and self.fits(start, end, device, after):
                    return ((device, end & ~start),)
                continue
            if self.hopeless(end, free, after) or not self.fits(start, end, device, after):
                continue
            for following in self.candidates(free):
                if load + self.transfer_s(end, device, following) < self.ceiling_s:
                    rest = self.extend(end, device, following, free & ~(1 << following), after - 1)
                    if rest is not None:
                        return ((device, end & ~start), *rest)
        self.failed.add(key)
        return None

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
        share = _fluid_s(self.problem, list(bits(free)))
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
        forward_s = done.tensors * there_s + done.forward_bytes / there
        return self.problem.microbatches * (forward_s + done.gradients * back_s + done.backward_bytes / back)

    def fits(self, start: int, end: int, device: int, after: int) -> bool:
        """Whether the stage of the blocks in ``end`` and not in ``start`` fits ``device``."""
        first, last, cap = self.sums[start], self.sums[end], self.problem.caps[device]
        held = in_flight(self.problem.schedule, self.problem.microbatches, after)
        kept = last.saved_bytes - first.saved_bytes + first.forward_bytes
        size = last.static_bytes - first.static_bytes + held * kept
        if size > cap or size + self.largest_output <= cap:
            return size <= cap
        return size + max(self.problem.blocks[v].output_bytes for v in bits(end & ~start)) <= cap


def _rooms(problem: Problem) -> list[list[int]]:
    """Devices in classes that hold the same: same cap and pins."""
    classes: dict[tuple[object, ...], list[int]] = {}
    for device, cap in enumerate(problem.caps):
        classes.setdefault((cap, *(block.allowed[device] for block in problem.blocks)), []).append(device)
    return list(classes.values())


def _classes(problem: Problem) -> list[list[int]]:
    """Devices in classes that cannot be told apart: same times, cap, pins and links."""

    def alike(a: int, b: int) -> bool:
        others = [o for o in range(len(problem.devices)) if o not in (a, b)]
        return (
            problem.caps[a] == problem.caps[b]
            and problem.links[a][b] == problem.links[b][a]
            and all(
                problem.links[a][o] == problem.links[b][o] and problem.links[o][a] == problem.links[o][b]
                for o in others
            )
            and all(
                block.forward_s[a] == block.forward_s[b]
                and block.backward_s[a] == block.backward_s[b]
                and block.update_s[a] == block.update_s[b]
                and block.allowed[a] == block.allowed[b]
                for block in problem.blocks
            )
        )

    classes: list[list[int]] = []
    for device in range(len(problem.devices)):
        for class_ in classes:
            if alike(class_[0], device):
                class_.append(device)
                break
        else:
            classes.append([device])
    return classes


def _orders(problem: Problem) -> list[list[int]]:
    """Orders of the devices worth trying by themselves: as given, fastest first, roomiest first."""
    devices = range(len(problem.devices))
    total_s = [sum(problem.work_s(v, d) for v in range(len(problem.blocks))) for d in devices]
    orders = [
        list(devices),
        sorted(devices, key=total_s.__getitem__),
        sorted(devices, key=problem.caps.__getitem__, reverse=True),
    ]
    return [order for i, order in enumerate(orders) if order not in orders[:i]]


def _even_splits(problem: Problem) -> Iterator[Stages]:
    """Cuts of the topological order into shares in proportion to the speed of the devices: first incumbents."""
    blocks = range(len(problem.blocks))
    for order in _orders(problem):
        for count in range(1, problem.most_stages + 1):
            total_s = [sum(problem.work_s(v, d) for v in blocks) for d in order[:count]]
            speed = [1 / max(total, 1e-30) for total in total_s]
            members, stage, filled = [0] * count, 0, 0.0
            for v in blocks:
                # A block belongs to the stage that its middle falls into; a stage is full at its share of the work.
                share = problem.work_s(v, order[stage]) / (total_s[stage] or 1.0)
                while stage < count - 1 and filled + share / 2 > speed[stage] / sum(speed):
                    filled -= speed[stage] / sum(speed)
                    stage += 1
                    share = problem.work_s(v, order[stage]) / (total_s[stage] or 1.0)
                members[stage] |= 1 << v
                filled += share
            yield tuple(zip(order, members, strict=False))


def stage_loads(problem: Problem, stages: Sequence[tuple[int, int]]) -> list[float] | None:
    """The load of each stage in seconds of a step, or None when a stage has no unit, breaks a pin or does not fit."""
    loads = []
    closed = 0
    received_s = 0.0
    for position, (device, members) in enumerate(stages):
        after = len(stages) - 1 - position
        blocks = [problem.blocks[v] for v in bits(members)]
        if not any(block.units for block in blocks) or not all(block.allowed[device] for block in blocks):
            return None
        if problem.memory_bytes(members, problem.crossing(closed), after) > problem.caps[device]:
            return None
        closed |= members
        sent_s = 0.0
        if after:
            transfer = problem.transfer_s(problem.crossing(closed), device, stages[position + 1][0])
            sent_s = problem.microbatches * sum(transfer)
        loads.append(received_s + sum(problem.work_s(v, device) for v in bits(members)) + sent_s)
        received_s = sent_s
    return loads


def _cannot_fit(problem: Problem) -> bool:
    """Whether memory rules out every split, seen without search: a block, or the sum of all that stays."""
    alone = [problem.memory_bytes(1 << v, (), 0) for v in range(len(problem.blocks))]
    room = [
        max((cap for cap, allowed in zip(problem.caps, block.allowed, strict=True) if allowed), default=-1)
        for block in problem.blocks
    ]
    static = sum(block.static_bytes for block in problem.blocks)
    return static > sum(problem.caps) or any(need > most for need, most in zip(alone, room, strict=True))


class _Best:
    """The best split so far, and the proven bound."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.stages: Stages = ()
        self.value_s = math.inf
        self.bound_s = simple_bound_s(problem)

    @property
    def proven(self) -> bool:
        """Whether nothing better exists."""
        return bool(self.stages) and self.bound_s >= self.value_s * (1 - ROUNDING)

    def offer(self, stages: Stages) -> None:
        """Take ``stages`` if they are feasible and better."""
        loads = stage_loads(self.problem, stages)
        if loads is not None and max(loads) < self.value_s:
            self.value_s, self.stages = max(loads), stages

    def improve(self, search: _Search, *, proves: bool) -> None:
        """Take the best split of ``search``; one that ``proves`` knows every split, so its failures raise the bound."""
        low, slack = self.bound_s, 0.01
        while low < (target := self.value_s * (1 - ROUNDING)):
            ceiling = min(target, low * (1 + slack)) if low > 0 else target
            found = search.below(ceiling)
            if found is not None:
                self.offer(found)
                continue
            low, slack = ceiling, 4 * slack
            if proves:
                self.bound_s = low


def partition(
    problem: Problem,
    *,
    limit: int = 50_000,
    time_limit_s: float = 30.0,
    clock: Callable[[], float] = time.monotonic,
) -> Partition | None:
    """Split ``problem`` so that the largest load of a stage is least; None when no split fits the memory and the pins.

    Args:
        problem: blocks in a topological order.
        limit: how many closed sets may be searched exactly.
        time_limit_s: after this the best split so far is returned with an honest bound.
        clock: seconds; a test passes its own.

    Raises:
        ShardwrightError: no split that fits was found, but the search was cut short by the time or by ``limit``.
    """
    start_s = clock()
    if _cannot_fit(problem):
        return None
    best = _Best(problem)
    for stages in _even_splits(problem):
        best.offer(stages)
    try:
        complete = _search_all(problem, best, limit, lambda share: clock() >= start_s + share * time_limit_s)
    except _OutOfTimeError:
        if not best.stages:
            raise ShardwrightError(
                "no split that fits was found in the time allowed; allow more with --time-limit"
            ) from None
    else:
        if not best.stages and complete:
            return None
        if not best.stages:
            raise ShardwrightError(
                f"no split that fits was found along one order of the {len(problem.blocks)} blocks, and there are too "
                "many other orders to search: give the devices more memory with --memory, or add a device"
            )
    return Partition(best.stages, best.value_s, best.value_s if best.proven else best.bound_s, best.proven)


def _search_all(problem: Problem, best: _Best, limit: int, spent: Callable[[float], bool]) -> bool:
    """Improve ``best`` along one order of the blocks, then over every closed set; whether those were not too many.

    Args:
        problem: blocks in a topological order.
        best: what was found so far; it is changed.
        limit: how many closed sets may be searched.
        spent: whether a share of the time has passed.
    """
    prefixes: Lattice = {(1 << v) - 1: [(v, (2 << v) - 1)] for v in range(len(problem.blocks))}
    prefixes[(1 << len(problem.blocks)) - 1] = []

    def some_split(family: Lattice, sums: Mapping[int, _Done]) -> None:
        if not best.stages:
            found = _Search(problem, family, sums, _rooms(problem), partial(spent, 1.0)).below(math.inf)
            if found is not None:
                best.offer(found)

    if best.proven:
        return True
    if spent(1.0):
        raise _OutOfTimeError
    family, sums = prefixes, _sums(problem, prefixes)
    some_split(family, sums)
    # One order of the devices at a time is quick, and leaves something good should all orders take too long.
    orders = _orders(problem) if best.stages else []
    for number, order in enumerate(orders, start=1):
        share = number / len(orders) / 2
        with contextlib.suppress(_OutOfTimeError):
            best.improve(_Search(problem, family, sums, [order], partial(spent, share)), proves=False)
    if spent(1.0):
        raise _OutOfTimeError
    lattice = closed_sets(problem.predecessors, limit)
    if lattice is not None and len(lattice) > len(prefixes):
        family, sums = lattice, _sums(problem, lattice)
        some_split(family, sums)
    if best.stages:
        last = _Search(problem, family, sums, _classes(problem), partial(spent, 1.0))
        best.improve(last, proves=lattice is not None)
    return lattice is not None
