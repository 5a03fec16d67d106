"""The search for the schedule with the smallest finishing time; the statement is in latency.py.

Lists and local moves give a schedule, branch and bound proves the best of a few blocks, and CP-SAT those of more.
Branch and bound appends one block after another, each to some device as early as that can run it, in the order of their
starts: every schedule in which nothing could start earlier is made once. CP-SAT has an interval for every block and
device, present if the block is there, no two of a device at once; times are rounded down, so that its bound holds.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from shardwright.errors import ShardwrightError
from shardwright.sharder.planning.clock import Budget, pass_second
from shardwright.sharder.planning.exact.search import ROUNDING
from shardwright.sharder.planning.free.assign import DEEP, NOTHING_FOUND, QUICK_S
from shardwright.sharder.planning.free.assignment import NOWHERE, classes_of, fits, masks_of
from shardwright.sharder.planning.free.cpsat import RESOLUTION, Shares
from shardwright.sharder.planning.free.latency import Arc, Pass, Race, Schedule, listed, sequenced
from shardwright.sharder.planning.problem import Problem, bits
from shardwright.sharder.planning.solver import EXACT, has_ortools, run_solver

__all__ = ["Fastest", "Lead", "branch_and_bound", "fastest", "improve_by_cpsat"]

SMALL = 7
"""So many blocks at most, branch and bound comes before CP-SAT."""


@dataclass(frozen=True)
class Fastest:
    """A schedule, and the finishing time that none is below."""

    schedule: Schedule
    bound_s: float
    exact: bool


class Lead:
    """The best schedule so far, and the proven bound."""

    def __init__(self, race: Race) -> None:
        self.race = race
        self.bound_s = race.bound_s()
        self.schedule: Schedule | None = None
        self.closed = False

    @property
    def value_s(self) -> float:
        """Of the best so far; infinite where there is none."""
        return self.schedule.value_s if self.schedule else math.inf

    @property
    def proven(self) -> bool:
        """Whether nothing better exists."""
        return self.closed or (self.schedule is not None and self.bound_s >= self.value_s * (1 - ROUNDING))

    def offer(self, of: Sequence[int], ahead: Sequence[int], back: Sequence[int]) -> bool:
        """Take a schedule if it is feasible and better; whether it was."""
        made = self.race.schedule(of, ahead, back)
        if made.value_s < self.value_s and self.race.may(of):
            self.schedule = made
            return True
        return False

    def offer_assignment(self, of: Sequence[int]) -> bool:
        """Take the best list schedule of an assignment likewise."""
        better = False
        for by_start in (True, False):
            orders = [
                sequenced(one, of, rank, by_start=by_start)
                for one, rank in zip((self.race.forward, self.race.backward), self.race.ranks, strict=True)
            ]
            better |= self.offer(of, *orders)
        return better

    def result(self) -> Fastest | None:
        """The best; None when nothing was found."""
        if self.schedule is None:
            return None
        bound_s = self.value_s if self.proven else min(self.bound_s, self.value_s)
        return Fastest(self.schedule, bound_s, bound_s >= self.value_s * (1 - EXACT))


def fastest(problem: Problem, budget: Budget, seeds: Iterable[Sequence[int]] = ()) -> Fastest | None:
    """The schedule with the smallest finishing time; None when no assignment fits the memory and the pins.

    Args:
        problem: one micro-batch counts, whatever its number.
        budget: the time; after it, or Ctrl-C, the best so far is returned with an honest bound.
        seeds: assignments to begin with.

    Raises:
        ShardwrightError: none that fits was found in the time.
    """
    lead = Lead(Race(problem))
    if math.isinf(lead.bound_s):
        return None
    try:
        alone = ([d] * len(problem.blocks) for d in lead.race.devices)
        for of in itertools.chain(seeds, alone, listed(lead.race)):
            lead.offer_assignment(of)
            if budget.spent() and lead.schedule is not None:
                break
        improved(lead, budget)
        if len(problem.blocks) <= SMALL or not has_ortools():
            branch_and_bound(lead, Budget(min(budget.left_s, QUICK_S)) if has_ortools() else budget)
        if has_ortools():
            improve_by_cpsat(lead, budget)
    except KeyboardInterrupt:
        pass_second()
        budget.stop()
    if lead.schedule is None and not lead.closed:
        raise ShardwrightError(NOTHING_FOUND)
    return lead.result()


def improved(lead: Lead, budget: Budget) -> None:
    """Move single blocks to other devices while that helps."""
    helped = lead.schedule is not None
    while helped and not lead.proven:
        helped = False
        assert lead.schedule is not None
        for v in range(len(lead.schedule.of)):
            for device in lead.race.devices:
                of = list(lead.schedule.of)
                if of[v] != device and lead.race.problem.blocks[v].allowed[device]:
                    of[v] = device
                    helped |= lead.offer_assignment(of)
                if budget.spent():
                    return


class _Branches:
    """One search over all schedules, the forward first, then for each of them the backward."""

    def __init__(self, lead: Lead, budget: Budget) -> None:
        self.lead, self.race, self.budget = lead, lead.race, budget
        self.of = [NOWHERE] * len(lead.race.problem.blocks)
        self.class_of = classes_of(lead.race.problem)
        forward, backward, ends = lead.race.least
        self.tails = lead.race.forward.tails(forward), lead.race.backward.tails(backward)
        self.rest_s = max([*self.tails[1], *ends])
        self.ahead: list[int] = []

    def forward(self, end: list[float], free: list[float], last: float) -> bool:
        """Append every block that is ready to every device; False when the time is up."""
        if len(self.ahead) == len(self.of):
            if not self.race.may(self.of):
                return True
            turn = max(end, default=0.0)
            return self._backward([], [0.0] * len(end), [turn] * len(free), turn)
        if self.budget.spent():
            return False
        for start, v, device in self._choices(end, free, last):
            if max(start + self.tails[0][v], *end) + self.rest_s >= self.lead.value_s * (1 - ROUNDING):
                continue
            self.of[v] = device
            self.ahead.append(v)
            then, busy = end.copy(), free.copy()
            then[v] = busy[device] = start + self.race.forward.seconds[v][device]
            done = self.forward(then, busy, start)
            self.ahead.pop()
            self.of[v] = NOWHERE
            if not done:
                return False
        return True

    def _choices(self, end: list[float], free: list[float], last: float) -> list[tuple[float, int, int]]:
        """Starts, blocks and devices; of empty devices that are alike only the first."""
        found = []
        used = {device for device in self.of if device != NOWHERE}
        for v, place in enumerate(self.of):
            arcs = self.race.forward.into[v]
            if place != NOWHERE or any(self.of[arc.source] == NOWHERE for arc in arcs):
                continue
            empty = set()
            for device in self.race.devices:
                if device not in used:
                    if self.class_of[device] in empty:
                        continue
                    empty.add(self.class_of[device])
                start = max([free[device], *self._arrivals(arcs, end, device)])
                if self.race.problem.blocks[v].allowed[device] and start >= last and math.isfinite(start):
                    found.append((start, v, device))
        return sorted(found)

    def _arrivals(self, arcs: Iterable[Arc], end: list[float], device: int) -> Iterable[float]:
        return (end[arc.source] + arc.delay_s[self.of[arc.source]][device] for arc in arcs)

    def _backward(self, back: list[int], end: list[float], free: list[float], last: float) -> bool:
        """Likewise, with the devices given."""
        one: Pass = self.race.backward
        if len(back) == len(self.of):
            self.lead.offer(self.of, self.ahead, back)
            return True
        if self.budget.spent():
            return False
        through = set(back)
        for v, device in enumerate(self.of):
            if v in through or any(arc.source not in through for arc in one.into[v]):
                continue
            start = max([free[device], *self._arrivals(one.into[v], end, device)])
            late = start + self.tails[1][v] >= self.lead.value_s * (1 - ROUNDING)
            if start < last or late:
                continue
            then, busy = end.copy(), free.copy()
            then[v] = busy[device] = start + one.seconds[v][device]
            if not self._backward([*back, v], then, busy, start):
                return False
        return True


def branch_and_bound(lead: Lead, budget: Budget) -> None:
    """Search every schedule that may be better than ``lead``, which is changed, within the time."""
    count = len(lead.race.problem.blocks)
    if lead.proven or count > DEEP:
        return
    if _Branches(lead, budget).forward([0.0] * count, [0.0] * len(lead.race.devices), 0.0):
        lead.closed = True


class _Clocked(Shares):
    """The model whose objective is the finishing time."""

    def __init__(self, lead: Lead) -> None:
        schedule, race = lead.schedule, lead.race
        super().__init__(race.problem, schedule.of if schedule else ())
        self.race = race
        value_s = lead.value_s if schedule else self._horizon_s()
        self.scale = RESOLUTION / (value_s or 1.0)
        self.most = math.ceil(value_s * self.scale) + 1
        self.finish = self.model.new_int_var(0, self.most, "")
        self.turn = self.model.new_int_var(0, self.most, "")
        self.intervals: list[list[Any]] = [[] for _ in self.devices]
        self.starts = [self._pass(race.forward, 0), self._pass(race.backward, self.turn)]
        for v, start in enumerate(self.starts[0]):
            self.model.add(self.turn >= start + self._length(race.forward, v))
        for intervals in self.intervals:
            self.model.add_no_overlap(intervals)
        self._updates()
        self.model.minimize(self.finish)
        for starts, ran in zip(self.starts, (schedule.forward, schedule.backward) if schedule else (), strict=False):
            for one in ran:
                self.model.add_hint(starts[one.block], math.floor(one.start_s * self.scale))

    def ordered(self, one: Pass, starts: list[Any], of: Sequence[int], value: Callable[[Any], int]) -> list[int]:
        """The blocks of a solution as they start; of equal starts those that take no time, then as the graph has them.

        A block of no time that starts with a long one would come after it otherwise, and wait for its end.
        """
        return sorted(one.order, key=lambda v: (value(starts[v]), self._units(one.seconds[v][of[v]]) > 0))

    def _horizon_s(self) -> float:
        """More than any schedule needs that leaves no device idle for nothing."""
        work = sum(max(row) for row in self.problem.seconds)
        delays = (s for one in (self.race.forward, self.race.backward) for a in one.arcs for r in a.delay_s for s in r)
        ties = sum(self.problem.sum_s(tie, d) for tie in self.problem.ties for d in self.devices)
        ties += sum(sum(tie.update_s) for tie in self.problem.ties)
        return work + sum(filter(math.isfinite, delays)) + (ties if math.isfinite(ties) else 0.0)

    def _units(self, seconds: float) -> int:
        """Rounded down; more than the horizon is as good as never."""
        return math.floor(min(seconds * self.scale, self.most + 1))

    def _length(self, one: Pass, v: int) -> Any:
        return sum(self._units(one.seconds[v][d]) * x for d, x in enumerate(self.on[v]))

    def _pass(self, one: Pass, begin: Any) -> list[Any]:
        starts = [self.model.new_int_var(0, self.most, "") for _ in one.seconds]
        for v, start in enumerate(starts):
            self.model.add(start >= begin)
            for d, x in enumerate(self.on[v]):
                if self.problem.blocks[v].allowed[d]:
                    size = self._units(one.seconds[v][d])
                    self.intervals[d].append(self.model.new_optional_fixed_size_interval_var(start, size, x, ""))
        for arc in one.arcs:
            self.model.add(starts[arc.target] >= starts[arc.source] + self._length(one, arc.source))
            self._wait(one, arc, starts)
        return starts

    def _wait(self, one: Pass, arc: Arc, starts: list[Any]) -> None:
        """The transfer of an arc: one condition where all links are alike, else one for each pair of devices."""
        u, v = self.on[arc.source], self.on[arc.target]
        end = starts[arc.source] + self._length(one, arc.source)
        apart = {self._units(s) for a, row in enumerate(arc.delay_s) for b, s in enumerate(row) if a != b}
        if len(apart) == 1 and max(apart) <= self.most:
            if delay := max(apart):
                differs = self._at_least_difference((u[d], v[d]) for d in self.devices)
                self.model.add(starts[arc.target] >= end + delay * differs)
            return
        for a in self.devices:
            for b in self.devices:
                delay = self._units(arc.delay_s[a][b])
                if not delay or isinstance(u[a], int) or isinstance(v[b], int):
                    continue
                if delay > self.most:
                    self.model.add(u[a] + v[b] <= 1)
                else:
                    self.model.add(starts[arc.target] >= end + delay).only_enforce_if(u[a], v[b])

    def _updates(self) -> None:
        ends = [start + self._length(self.race.backward, v) for v, start in enumerate(self.starts[1])]
        self.model.add(self.finish >= self.turn)
        for d in self.devices:
            after: Any = sum(
                self._units(b.update_s[d]) * row[d] for b, row in zip(self.problem.blocks, self.on, strict=True)
            )
            for tie, held in zip(self.problem.ties, self.held, strict=True):
                cost = self._units(self.problem.sum_s(tie, d))
                if cost > self.most:
                    self.model.add(held[d] == 0)
                else:
                    after += cost * held[d]
            for tie, copied in zip(self.problem.ties, self.copied, strict=True):
                if tie.update_s:
                    after += self._units(tie.update_s[d]) * copied[d]
            for v, row in enumerate(self.on):
                if not isinstance(row[d], int):
                    self.model.add(self.finish >= ends[v] + after).only_enforce_if(row[d])
            for tie, held in zip(self.problem.ties, self.held, strict=True):
                for v in bits(tie.users) if tie.gradient_bytes else ():
                    self.model.add(self.finish >= ends[v] + after).only_enforce_if(held[d])


def improve_by_cpsat(lead: Lead, budget: Budget) -> None:
    """Improve ``lead``, which is changed, and its bound, within the time."""
    if lead.proven or budget.spent():
        return
    problem, clocked = lead.race.problem, _Clocked(lead)
    while not budget.spent():
        broken: set[tuple[int, int]] = set()

        def found(value: Callable[[Any], int], broken: set[tuple[int, int]] = broken) -> None:
            of = clocked.where(value)
            ahead, back = (
                clocked.ordered(one, starts, of, value)
                for one, starts in zip((lead.race.forward, lead.race.backward), clocked.starts, strict=True)
            )
            if not lead.offer(of, ahead, back):
                masks = masks_of(of, len(problem.devices))
                broken.update((mask, d) for d, mask in enumerate(masks) if not fits(problem, mask, d))
            else:
                lead.offer_assignment(of)

        answer = run_solver(clocked.model, budget, found)
        if answer is None:
            lead.closed = True
            return
        optimal, bound = answer
        lead.bound_s = max(lead.bound_s, min(lead.value_s, bound / clocked.scale * (1 - 1e-12)))
        if optimal and not broken:
            return
        for mask, device in broken:
            clocked.forbid(mask, device)
