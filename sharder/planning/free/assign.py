"""Free assignments by hand: lists, local moves and swaps, and branch and bound; the statement is in assignment.py.

Branch and bound places one block after another, those with the most work first. What is placed costs at least what the
tally says; what is not placed adds at least its least work to the sum of the loads, whose mean no largest load is
below. Of devices that cannot be told apart only the first empty one is tried.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence

from shardwright.errors import ShardwrightError
from shardwright.sharder.planning.clock import Budget, pass_second
from shardwright.sharder.planning.exact.search import ROUNDING
from shardwright.sharder.planning.free.assignment import NOWHERE, Assignment, Best, Holdings, classes_of, fits, masks_of
from shardwright.sharder.planning.free.bounds import bound_s, grain_bound_s
from shardwright.sharder.planning.free.cpsat import improve_by_cpsat
from shardwright.sharder.planning.free.tally import Tally
from shardwright.sharder.planning.problem import Problem
from shardwright.sharder.planning.solver import has_ortools

__all__ = ["assign", "branch_and_bound", "improved", "listed"]

SMALL = 14
"""So many blocks at most, branch and bound comes before CP-SAT."""
DEEP = 200
"""So many at most, it is tried at all: it calls itself for each block, of which Python allows a thousand or so."""
QUICK_S = 3.0
"""For branch and bound, where CP-SAT comes after."""
NOTHING_FOUND = "no assignment that fits was found in the time allowed; allow more with --time-limit"


def listed(problem: Problem) -> Iterable[list[int]]:
    """Assignments block by block to where the largest load grows least: in the order of the forward, and largest
    first."""
    blocks = range(len(problem.blocks))
    for order in (list(blocks), sorted(blocks, key=lambda v: -min(problem.seconds[v]))):
        tally = Tally(problem)
        held = Holdings(problem)
        for v in order:
            choices = []
            for device, allowed in enumerate(problem.blocks[v].allowed):
                if allowed and held.with_block(v, device) <= problem.caps[device]:
                    tally.move(v, device)
                    loads = tally.loads_s()
                    choices.append((tally.barred, max(loads), sum(loads), device))
                    tally.move(v, NOWHERE)
            if not choices:
                break
            device = min(choices)[-1]
            tally.move(v, device)
            held.add(v, device)
        else:
            yield list(tally.of)


def improved(best: Best, budget: Budget) -> None:
    """Move blocks off the device with the largest load, and swap them with others, while that helps."""
    if not best.of:
        return
    tally = Tally(best.problem)
    for v, device in enumerate(best.of):
        tally.move(v, device)
    while not budget.spent() and not best.proven:
        if not _one_step(tally, best, budget):
            return


def _rank(tally: Tally) -> tuple[float, ...]:
    """What a step has to make smaller: the largest load, then the others in turn, but for the rounding of sums."""
    return tally.barred, *(float(f"{load_s:.9g}") for load_s in sorted(tally.loads_s(), reverse=True))


def _one_step(tally: Tally, best: Best, budget: Budget) -> bool:
    """The first move or swap that helps and fits; whether there was one."""
    problem, now = best.problem, _rank(tally)
    loads = tally.loads_s()
    heavy = max(range(len(loads)), key=loads.__getitem__)
    mine = [v for v, device in enumerate(tally.of) if device == heavy]
    others = [v for v, device in enumerate(tally.of) if device != heavy]
    for v in mine:
        targets = [(d, None) for d in range(len(loads)) if d != heavy]
        for target, partner in [*targets, *((tally.of[u], u) for u in others)]:
            if not problem.blocks[v].allowed[target] or (
                partner is not None and not problem.blocks[partner].allowed[heavy]
            ):
                continue
            tally.move(v, target)
            if partner is not None:
                tally.move(partner, heavy)
            if _rank(tally) < now:
                masks = masks_of(tally.of, len(loads))
                if all(fits(problem, masks[d], d) for d in (heavy, target)):
                    best.offer(tally.of)
                    return True
            tally.move(v, heavy)
            if partner is not None:
                tally.move(partner, target)
        if budget.spent():
            return False
    return False


class _Branches:
    """One search by branch and bound."""

    def __init__(self, best: Best, budget: Budget) -> None:
        self.problem, self.best, self.budget = best.problem, best, budget
        self.tally, self.held = Tally(self.problem), [0] * len(self.problem.devices)
        self.order = sorted(range(len(self.problem.blocks)), key=lambda v: -min(self.problem.seconds[v]))
        self.class_of = classes_of(self.problem)
        least = [self._least_s(v) for v in self.order]
        self.rest_s = [sum(least[position:]) for position in range(len(least) + 1)]

    def _least_s(self, block: int) -> float:
        allowed = self.problem.blocks[block].allowed
        return min((self.problem.work_s(block, d) for d, ok in enumerate(allowed) if ok), default=math.inf)

    def descend(self, position: int) -> bool:
        """Every assignment of the blocks from ``position`` on; False when the time is up."""
        if position == len(self.order):
            self.best.offer(self.tally.of)
            return True
        if self.budget.spent():
            return False
        block = self.order[position]
        for _, device in sorted(self._choices(block, position)):
            # The value may have fallen since the choices were made.
            self.tally.move(block, device)
            go_on = self._at_least_s(position + 1) >= self.best.value * (1 - ROUNDING)
            self.held[device] |= 1 << block
            done = go_on or self.descend(position + 1)
            self.held[device] ^= 1 << block
            self.tally.move(block, NOWHERE)
            if not done:
                return False
        return True

    def _choices(self, block: int, position: int) -> Iterable[tuple[float, int]]:
        """The devices that ``block`` may be on, with what the largest load is at least then."""
        empty = set()
        for device, allowed in enumerate(self.problem.blocks[block].allowed):
            if not self.held[device]:
                if self.class_of[device] in empty:
                    continue
                empty.add(self.class_of[device])
            if not allowed:
                continue
            self.tally.move(block, device)
            least, barred = self._at_least_s(position + 1), self.tally.barred
            self.tally.move(block, NOWHERE)
            if not barred and least < self.best.value * (1 - ROUNDING) and self._may_fit(block, device):
                yield least, device

    def _may_fit(self, block: int, device: int) -> bool:
        """Parameters alone: copies go when the block that counts them comes."""
        held = self.held[device] | 1 << block
        static = sum(b.static_bytes for v, b in enumerate(self.problem.blocks) if held >> v & 1)
        return static <= self.problem.caps[device]

    def _at_least_s(self, position: int) -> float:
        loads = self.tally.loads_s()
        whole = sum(self.tally.compute_s if self.problem.overlap else loads)
        return max(*loads, (whole + self.rest_s[position]) / len(loads))


def branch_and_bound(best: Best, budget: Budget) -> None:
    """Search every assignment that may be better than ``best``, which is changed, within the time."""
    if best.proven or len(best.problem.blocks) > DEEP:
        return
    if _Branches(best, budget).descend(0):
        best.closed = True


def assign(problem: Problem, budget: Budget, seeds: Iterable[Sequence[int]] = ()) -> Assignment | None:
    """The free assignment with the smallest largest load; None when none fits the memory and the pins.

    Args:
        problem: with staged or direct transfers.
        budget: the time; after it, or Ctrl-C, the best so far is returned with an honest bound.
        seeds: assignments to begin with.

    Raises:
        ShardwrightError: none that fits was found in the time.
    """
    best = Best(problem, bound_s(problem))
    if math.isinf(best.bound):
        return None
    try:
        alone = ([d] * len(problem.blocks) for d in range(len(problem.devices)))
        for of in itertools.chain(seeds, alone, listed(problem)):
            best.offer(of)
            if budget.spent() and best.of:
                break
        improved(best, budget)
        best.bound = max(best.bound, min(best.value, grain_bound_s(problem, best.value)))
        if len(problem.blocks) <= SMALL or not has_ortools():
            branch_and_bound(best, Budget(min(budget.left_s, QUICK_S)) if has_ortools() else budget)
        if has_ortools():
            improve_by_cpsat(best, budget)
    except KeyboardInterrupt:
        pass_second()
        budget.stop()
    if not best.of and not best.closed:
        raise ShardwrightError(NOTHING_FOUND)
    return best.result()
