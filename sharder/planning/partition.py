"""The driver of the exact split: first incumbents, one order of the devices at a time, then every split.

Ceilings rise from a simple bound, and once a split is found they fall with its value until nothing is below.
Graphs with more closed sets than ``limit`` are split along one topological order, with the gap said openly.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

from shardwright.errors import ShardwrightError
from shardwright.sharder.planning.afresh import begun_afresh
from shardwright.sharder.planning.ceilings import NEAR, Narrowed, narrowed
from shardwright.sharder.planning.coarse import Coarse, coarsened
from shardwright.sharder.planning.direct import Direct
from shardwright.sharder.planning.even import best_even_split, even_splits
from shardwright.sharder.planning.interleave import device_loads, interleaved, piece_loads
from shardwright.sharder.planning.line import is_chain, split_line
from shardwright.sharder.planning.lists import Lists
from shardwright.sharder.planning.mincut import transfer_bound_s
from shardwright.sharder.planning.orders import best_of_orders
from shardwright.sharder.planning.problem import Problem, bits
from shardwright.sharder.planning.recut import WIDEST, WIDEST_ALIKE, Neighbours
from shardwright.sharder.planning.room import making_room
from shardwright.sharder.planning.search import (
    ROUNDING,
    Done,
    Lattice,
    OutOfTimeError,
    Search,
    Stages,
    closed_sets,
    simple_bound_s,
    sums_of,
)
from shardwright.sharder.planning.shifting import shifted
from shardwright.sharder.planning.stagewise import Stagewise
from shardwright.sharder.planning.transfers import as_staged, load_s, traffic_of

__all__ = ["Partition", "largest_load_s", "partition", "stage_loads"]

LONG_SUMS = 1e-9
"""Differences of sums over ten thousand blocks differ from the sums of a few of them by less than this share."""

UNTIL = 0.7, 0.95, 0.95, 0.95
UNTIL_LISTED = 0.05, 0.2, 0.4, 0.95
UNTIL_SETS = 0.1, 0.2, 0.4, 0.95
UNTIL_FITTED = 0.45, 0.6, 0.75, 0.95
"""Shares of the time until which, in a graph with too many closed sets, orders, moves of blocks, neighbours split anew
and lists of cuts are tried: where there are no lists, where there are, where these are over sets of devices, and where
a split that fits was to be found first."""
MOST_RECUT = 1_000
"""Of more blocks neighbours alone have too many sets, and orders and moves have the time."""
QUICK = 0.1
"""Lists are tried for a moment before moves, until this share of the time at most: they may be short."""
MORE_LISTS = 0.2
"""Lists without an answer in so much of the time have no more of it, and moves have the rest. Where the transfers that
are summed up with compute are not in what is listed each answer counts anew, else one is enough."""


@dataclass(frozen=True)
class Partition:
    """Stages in order, as device index and bit mask of blocks. ``value_s`` is the largest load of a device."""

    stages: Stages
    value_s: float
    bound_s: float
    """No split of this problem has a smaller largest load."""
    exact: bool


def _rooms(problem: Problem) -> list[list[int]]:
    """Devices in classes that hold the same: same cap, optimizer and pins; where some ways are unusable, alike."""
    if problem.unusable or any(math.isinf(latency_s) for ways in problem.ways for latency_s, _ in ways):
        return _classes(problem)
    classes: dict[tuple[object, ...], list[int]] = {}
    for device, cap in enumerate(problem.caps):
        same = cap, problem.updates_together[device : device + 1], *(b.allowed[device] for b in problem.blocks)
        classes.setdefault(same, []).append(device)
    return list(classes.values())


def _classes(problem: Problem) -> list[list[int]]:
    """Devices in classes that cannot be told apart: same times, cap, optimizer, pins and links.

    Of devices with the same links to all others the slowest is the same too, so ties cost them the same.
    """

    times = (b.forward_s + b.backward_s + b.update_s + (b.recompute_s or b.forward_s) for b in problem.blocks)
    own = [*zip(*times, strict=True)]
    count = len(problem.devices)
    pins = [*zip(*(block.allowed for block in problem.blocks), strict=True)]

    def alike(a: int, b: int) -> bool:
        return (
            problem.caps[a] == problem.caps[b]
            and problem.updates_together[a : a + 1] == problem.updates_together[b : b + 1]
            and problem.links[a][b] == problem.links[b][a]
            and all(
                problem.links[a][o] == problem.links[b][o] and problem.links[o][a] == problem.links[o][b]
                for o in range(count)
                if o not in (a, b)
            )
            and pins[a] == pins[b]
            and (problem.transfers != "staged" or problem.ways[a] == problem.ways[b])
            and all(own[a + i * count] == own[b + i * count] for i in range(4))
        )

    classes: list[list[int]] = []
    for device in range(count):
        class_ = next((class_ for class_ in classes if alike(class_[0], device)), None)
        if class_ is None:
            classes.append([device])
        else:
            class_.append(device)
    return classes


def _orders(problem: Problem) -> list[list[int]]:
    """Orders of the devices worth trying by themselves: as given, fastest first, roomiest first."""
    devices = range(len(problem.devices))
    orders = [
        list(devices),
        sorted(devices, key=problem.total_s.__getitem__),
        sorted(devices, key=problem.caps.__getitem__, reverse=True),
    ]
    return [order for i, order in enumerate(orders) if order not in orders[:i]]


def stage_loads(problem: Problem, stages: Sequence[tuple[int, int]]) -> list[float] | None:
    """The load of each stage in seconds of a step, or None when a stage has no unit, breaks a pin or does not fit."""
    if problem.stages_per_device > 1:
        return piece_loads(problem, tuple(stages))
    work_s = []
    closed = 0
    for position, (device, members) in enumerate(stages):
        after = len(stages) - 1 - position
        blocks = [problem.blocks[v] for v in bits(members)]
        if not any(block.units for block in blocks) or not all(block.allowed[device] for block in blocks):
            return None
        more_s = problem.more_s(closed, closed | members, device, after)
        if math.isinf(more_s):
            return None
        closed |= members
        work_s.append(sum(problem.work_s(v, device) for v in bits(members)) + problem.ties_s(members, device) + more_s)
    return [load_s(problem, *parts) for parts in zip(work_s, traffic_of(problem, stages), strict=True)]


def largest_load_s(problem: Problem, stages: Sequence[tuple[int, int]]) -> float | None:
    """The largest load of a device, or None where a stage has no unit, breaks a pin or does not fit."""
    loads = stage_loads(problem, stages)
    if loads is not None and problem.stages_per_device > 1:
        loads = device_loads(problem, tuple(stages))
    return None if loads is None else max(loads)


def _cannot_fit(problem: Problem) -> bool:
    """Whether memory rules out every split, seen without search: a block, or the sum of all that stays."""
    static = sum(block.static_bytes for block in problem.blocks)
    return static > sum(problem.caps) or not all(
        any(block.allowed[d] and problem.least_bytes(v, d) <= cap for d, cap in enumerate(problem.caps))
        for v, block in enumerate(problem.blocks)
    )


def _passed(spent: Callable[[float], bool]) -> float:
    """The share of the time that has passed, to a hundredth."""
    return next((percent / 100 for percent in range(1, 101) if not spent(percent / 100)), 1.0)


AnySearch = Search | Stagewise | Direct


def search_over(
    problem: Problem,
    lattice: Lattice,
    sums: Mapping[int, Done],
    classes: Sequence[Sequence[int]],
    out_of_time: Callable[[], bool],
) -> AnySearch:
    """The exact search that knows the transfers of ``problem``."""
    if problem.transfers == "direct":
        return Direct(problem, lattice, sums, classes, out_of_time)
    kind = Stagewise if problem.transfers == "staged" or problem.overlap else Search
    return kind(problem, lattice, sums, classes, out_of_time)


class _Best:
    """The best split so far, and the proven bound."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.stages: Stages = ()
        self.value_s = math.inf
        self.bound_s = simple_bound_s(problem)
        self.none_fits = False
        """Whether that is proven."""

    @cached_property
    def lists(self) -> Lists:
        """Of the sets that cuts may be."""
        return Lists(self.problem)

    @property
    def proven(self) -> bool:
        """Whether nothing better exists."""
        return bool(self.stages) and self.bound_s >= self.value_s * (1 - ROUNDING)

    @property
    def near(self) -> bool:
        """Whether no more than ``NEAR`` can be gained, for which nothing is moved: measurements do not know it."""
        return self.value_s - self.bound_s <= NEAR * self.value_s < math.inf

    def offer(self, stages: Stages) -> None:
        """Take ``stages`` if they are feasible and better."""
        loads = stage_loads(self.problem, stages)
        if loads and max(loads) < self.value_s:
            self._take(stages, max(loads))

    def _take(self, stages: Stages, value_s: float) -> None:
        self.value_s, self.stages = value_s, stages
        self.bound_s = min(self.bound_s, value_s)  # which rounding may have put above it

    def take_even_splits(self, spent: Callable[[float], bool]) -> None:
        """Take the first of the best even splits if it is better; one is looked at whatever time has passed.

        Args:
            spent: whether a share of the time has passed.
        """
        splits = even_splits(self.problem, _orders(self.problem))
        found = best_even_split(splits, partial(stage_loads, self.problem), self.value_s, spent)
        if found is not None:
            self._take(*found)

    def relax(self, relaxed: Partition) -> None:
        """Take the bound of a relaxed problem, and its stages if they are good."""
        self.bound_s = max(self.bound_s, relaxed.bound_s)
        self.offer(relaxed.stages)

    def take_line(self, out_of_time: Callable[[], bool]) -> None:
        """Take the best split of a chain if it fits; without memory and ties it is a bound on all of them."""
        problem, blocks = self.problem, range(len(self.problem.blocks))
        split = split_line(
            problem, blocks, _classes(problem), _orders(problem), bound_s=self.bound_s, out_of_time=out_of_time
        )
        if split is None:
            return
        self.offer(split.stages)
        same = abs(self.value_s - split.value_s) <= LONG_SUMS * split.value_s
        # The same loads, summed up in another order.
        self.bound_s = self.value_s if same and split.bound_s == split.value_s else max(self.bound_s, split.bound_s)

    def try_orders(self, spent: Callable[[float], bool]) -> None:
        """Take the best of many orders of the blocks, and of moves from stage to stage, if it fits, and the bound that
        its value allows.

        Args:
            spent: whether a share of the time has passed.
        """
        problem = self.problem
        classes, device_orders, listable = _classes(problem), _orders(problem), self.lists.possible
        shares = UNTIL
        if self.lists.with_transfers and len(problem.blocks) <= MOST_RECUT:
            shares = UNTIL_SETS if problem.times_differ else UNTIL_LISTED
        start = self.stages
        if not start:
            start, shares = self._make_room(spent), UNTIL_FITTED
        if self.none_fits or not start:
            return
        orders_over, moves_over, anew_over, lists_over = (partial(spent, share) for share in shares)

        def best() -> tuple[Stages, float]:
            return self.stages, self.value_s

        if self.stages:
            for stages in best_of_orders(problem, classes, device_orders, best, self.bound_s, orders_over):
                self.offer(stages)
            for found in narrowed(self.lists, best, self.bound_s, partial(spent, QUICK), quick=True):
                self._narrow(found)
        if not self.near:
            self._take_moves(start, device_orders, moves_over, anew_over if listable else lists_over)
        telling = self.lists.with_transfers or problem.overlap  # what binds is in what is listed, or may well be
        without_answer = shares[2] if telling else _passed(spent)

        def lists_idle() -> bool:
            return lists_over() or spent(without_answer + MORE_LISTS)

        for found in narrowed(self.lists, best, self.bound_s, lists_idle):
            without_answer = 1.0 if telling else _passed(spent)
            self._narrow(found)
        if self.near:
            return
        if listable and self.stages:
            for stages in shifted(problem, best, self.bound_s, lists_over):
                self.offer(stages)
        if not spent(1.0):
            moved_s = transfer_bound_s(problem, self.value_s, partial(spent, 1.0))
            self.bound_s = max(self.bound_s, min(self.value_s, moved_s))

    def _take_moves(
        self,
        start: Stages,
        device_orders: list[list[int]],
        moves_over: Callable[[], bool],
        anew_over: Callable[[], bool],
    ) -> None:
        """Take what moves from stage to stage lead to, from ``start`` and begun afresh, and neighbours split anew."""
        problem = self.problem

        def best() -> tuple[Stages, float]:
            return self.stages, self.value_s

        for stages in shifted(problem, best, self.bound_s, moves_over, start):
            self.offer(stages)
        neighbours = Neighbours(self.lists, partial(stage_loads, problem), anew_over)
        widest = WIDEST if problem.times_differ else WIDEST_ALIKE
        if not self.near:
            for stages in neighbours.split_anew(self.stages, widest):
                self.offer(stages)
        begun = begun_afresh(problem, _classes(problem), device_orders, best, self.bound_s, anew_over, neighbours)
        for stages in begun:
            self.offer(stages)

    def _narrow(self, found: Narrowed) -> None:
        """Take the split of an answer, or its bound."""
        self.offer(found.stages)
        self.bound_s = max(self.bound_s, min(self.value_s, found.bound))

    def _make_room(self, spent: Callable[[float], bool]) -> Stages:
        """Take the first split that fits, or see that none does; a split that is near to it, if there is one."""
        stages, problem = self.stages, self.problem
        starts = [split.stages for split in even_splits(problem, _orders(problem))]
        for found in making_room(problem, starts, _rooms(problem), _orders(problem), spent):
            self.none_fits = found.bound > max(problem.caps)
            self.offer(found.stages)
            if self.none_fits or self.stages:
                break
            stages = found.stages or stages
        return self.stages or stages

    def on_coarse(self, coarse: Coarse, limit: int, deadline_s: float, clock: Callable[[], float]) -> Partition | None:
        """The better of this and the best split of a problem with fewer blocks.

        Raises:
            ShardwrightError: as :func:`partition`.
        """
        try:
            found = partition(coarse.problem, limit=limit, time_limit_s=deadline_s - clock(), clock=clock)
        except ShardwrightError:
            if not self.stages:
                raise
        else:
            if found is None and not self.stages:
                return None
            if found is None:  # what it leaves out is no better
                self.bound_s = self.value_s
            else:
                self.offer(coarse.unfolded(found.stages))
                same = found.exact and self.value_s <= found.value_s * (1 + LONG_SUMS)
                self.bound_s = self.value_s if same else max(self.bound_s, min(self.value_s, found.bound_s))
        return self.result

    @property
    def result(self) -> Partition:
        """What was found."""
        return Partition(self.stages, self.value_s, self.value_s if self.proven else self.bound_s, self.proven)

    def improve(self, search: AnySearch, *, proves: bool) -> None:
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
    if problem.stages_per_device > 1:
        found = interleaved(problem, _classes(problem), _orders(problem), lambda: clock() >= start_s + time_limit_s)
        return None if found is None else Partition(*found)

    def spent(share: float) -> bool:
        return clock() >= start_s + share * time_limit_s

    best = _Best(problem)
    if is_chain(problem):
        best.take_line(partial(spent, 1.0))
    if not best.proven:
        best.take_even_splits(spent)
    coarse = None if best.proven or is_chain(problem) else coarsened(problem, best.value_s)
    if coarse is not None:
        return best.on_coarse(coarse, limit, start_s + time_limit_s, clock)
    if problem.transfers == "direct" and not best.proven:
        with contextlib.suppress(ShardwrightError):  # the relaxed search was cut short, and knows nothing
            relaxed = partition(as_staged(problem), limit=limit, time_limit_s=time_limit_s / 3, clock=clock)
            if relaxed is None:
                return None
            best.relax(relaxed)
    try:
        complete = _search_all(problem, best, limit, spent)
    except OutOfTimeError:
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
    return best.result


def _search_all(problem: Problem, best: _Best, limit: int, spent: Callable[[float], bool]) -> bool:
    """Improve ``best`` along one order of the blocks, then over every closed set; whether no split was left out.

    Args:
        problem: blocks in a topological order.
        best: what was found so far; it is changed.
        limit: how many closed sets may be searched.
        spent: whether a share of the time has passed.
    """

    def some_split(family: Lattice, sums: Mapping[int, Done]) -> None:
        if not best.stages:
            found = search_over(problem, family, sums, _rooms(problem), partial(spent, 1.0)).below(math.inf)
            if found is not None:
                best.offer(found)

    if best.proven:
        return True
    if spent(1.0):
        raise OutOfTimeError
    prefixes: Lattice = {(1 << v) - 1: [(v, (2 << v) - 1)] for v in range(len(problem.blocks))}
    prefixes[(1 << len(problem.blocks)) - 1] = []
    family, sums = prefixes, sums_of(problem, prefixes)
    some_split(family, sums)
    # One order of the devices at a time is quick, and leaves something good should all orders take too long.
    orders = _orders(problem) if best.stages else []
    for number, order in enumerate(orders, start=1):
        share = number / len(orders) / 2
        with contextlib.suppress(OutOfTimeError):
            best.improve(search_over(problem, family, sums, [order], partial(spent, share)), proves=False)
    if spent(1.0):
        raise OutOfTimeError
    lattice = closed_sets(problem.predecessors, limit)
    if lattice is None:
        best.try_orders(spent)
    if lattice is not None and len(lattice) > len(prefixes):
        family, sums = lattice, sums_of(problem, lattice)
        some_split(family, sums)
    if best.stages:
        last = search_over(problem, family, sums, _classes(problem), partial(spent, 1.0))
        best.improve(last, proves=lattice is not None)
    return lattice is not None or best.none_fits
