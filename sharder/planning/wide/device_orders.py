r"""Orders of the devices, where each block has its own times on each: an integer programme for each order.

Let an order be known but for some groups of devices that stand together, G(1) ... G(k); y[v, c] say whether block v is
before cut c, which is behind G(c); s(v, d) be the seconds of v on d, and x(t, c) those that t takes over cut c, there
and back, at least.

    y[v, c] <= y[v, c + 1]        y[v, c] <= y[u, c]   for u before v        y[v, 0] = 0        y[v, k] = 1
    z[t, c] >= y[p, c] - y[r, c]                         t, made by p, crosses cut c: for each reader r
    G(c) = {d}:   T >= sum of s(v, d) (y[v, c] - y[v, c - 1])  +  sum of x(t, c - 1) z[t, c - 1] + x(t, c) z[t, c]
    otherwise:    T >= sum of s(v, d) w[v, d] + a[d] + b[d]   for each d of G(c)
                  the sum of w[v, d] over d is y[v, c] - y[v, c - 1], that of a[d] is of x(t, c - 1) z[t, c - 1] or
                  more, that of b[d] of x(t, c) z[t, c]

The devices of a group share its blocks in no order, and what crosses its ends is some of theirs. Without whole numbers
the least T is a bound on all orders with these groups: those with the least bound are gone on with first, one group in
two halves in every way (Land and Doig, "An automatic method of solving discrete programming problems", Econometrica
1960). Where times are in proportion to the devices' speeds nothing is ruled out so, since every order can have the same
shares of each block; where they are not, most orders are, and CP-SAT goes through the others.

All counts are whole numbers, weights rounded down. The bound of a linear programme is taken from its dual values, not
from its objective, so that it holds whatever the solver's tolerance (Neumaier and Shcherbina, "Safe bounds in linear
and mixed-integer linear programming", Mathematical Programming 99, 2004). Transfers are those of relayed ones that are
summed up with compute; others are left out, and so is all of memory that is no sum of blocks: that makes no bound
larger, and each split is looked at as a whole. A split over fewer devices has the others behind it, with nothing to do.
"""

from __future__ import annotations

import collections
import heapq
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from shardwright.sharder.planning.clock import Budget
from shardwright.sharder.planning.exact.search import Stages
from shardwright.sharder.planning.formulation.device_classes import alike_devices
from shardwright.sharder.planning.problem import Problem, bits
from shardwright.sharder.planning.solver import EXACT, has_ortools, run_solver
from shardwright.sharder.planning.wide.ceilings import Narrowed

__all__ = ["device_by_device", "possible"]

MOST_SIZE, MOST_ORDERS = 2_000, 1_000
"""Blocks times devices, and orders of these that can be told apart: for more the programmes take too long."""
RESOLUTION = 10**9
"""The largest load of the best split is so many units."""
PARTS = 5
"""Less the number of the try: CP-SAT has one of so many parts of what time is left for an order."""
PAGE = 1 << 10
"""Bytes that are one in a programme."""

ZERO, ONE = -1, -2
"""In place of a column: what is known."""


def possible(problem: Problem) -> bool:
    """Whether orders are gone through: there is work, every device may have some, they are few enough, and OR-tools."""
    devices = len(problem.devices)
    orders = math.factorial(devices) // math.prod(math.factorial(len(class_)) for class_ in alike_devices(problem))
    small = len(problem.blocks) * devices <= MOST_SIZE and orders <= MOST_ORDERS
    return small and problem.most_stages == devices and any(map(any, problem.seconds)) and has_ortools()


def device_by_device(
    problem: Problem, best: Callable[[], tuple[Stages, float]], time_limit_s: float
) -> Iterator[Narrowed]:
    """Better splits, and bounds on all of them, until they meet or the time has passed.

    Splits may be too large for the memory of their devices.

    Args:
        problem: of devices that are :func:`possible`.
        best: the stages of the best split that was taken, and its largest load.
        time_limit_s: seconds.
    """
    budget = Budget(time_limit_s)
    search = _Orders(problem, best, budget)
    yield from search.gone_through(search.completed([device for device, _ in best()[0]]))
    while not budget.spent():
        groups = search.next()
        if groups is None:
            break
        if len(groups) == len(problem.devices):
            yield from search.gone_through(groups)
        else:
            search.go_on(groups)
        yield Narrowed((), search.bound_s)
    yield Narrowed((), search.bound_s)


Groups = tuple[tuple[int, ...], ...]
"""Devices, each group in ascending order."""


class _Orders:
    """Orders of groups of devices, by what no split over one of their orders is below."""

    def __init__(self, problem: Problem, best: Callable[[], tuple[Stages, float]], budget: Budget) -> None:
        self.problem, self.best, self.budget = problem, best, budget
        self.classes = alike_devices(problem)
        self._waiting: list[tuple[float, Groups]] = [(0.0, (tuple(range(len(problem.devices))),))]
        self._done: dict[Groups, float] = {}
        """Whole orders that CP-SAT has gone through, with what it has proven."""
        self._tries: collections.Counter[Groups] = collections.Counter()

    @property
    def bound_s(self) -> float:
        """No split has a smaller largest load; that of the best where none is left to look for."""
        value_s = self.best()[1]
        least_s = min([value_s, *self._done.values(), *(bound_s for bound_s, _ in self._waiting[:1])])
        return value_s if least_s >= value_s * (1 - EXACT) else least_s

    def next(self) -> Groups | None:
        """Those with the least bound; None if all that is left has no smaller load than the best split."""
        if not self._waiting or self._waiting[0][0] >= self.best()[1] * (1 - EXACT):
            self._waiting.clear()
            return None
        return self._waiting[0][1]

    def completed(self, row: Sequence[int]) -> Groups:
        """``row`` with the devices that have nothing to do behind it; those that cannot be told apart in ascending
        order, as :meth:`go_on` has them."""
        left = {device: class_ for class_ in map(list, self.classes) for device in class_}
        more = [device for device in range(len(self.problem.devices)) if device not in row]
        return tuple((left[device].pop(0),) for device in (*row, *more))

    def go_on(self, groups: Groups) -> None:
        """Replace ``groups``, the first of those that wait, by all with the largest of them in halves; not if the time
        passes meanwhile."""
        before_s, _ = self._waiting[0]
        position = max(range(len(groups)), key=lambda number: len(groups[number]))
        made = []
        for half in self._halves(groups[position]):
            if self.budget.spent():
                return
            rest = tuple(device for device in groups[position] if device not in half)
            finer = (*groups[:position], half, rest, *groups[position + 1 :])
            made.append((max(before_s, _Programme(self.problem, finer, self.best()[1]).least_s()), finer))
        heapq.heappop(self._waiting)
        for one in made:
            heapq.heappush(self._waiting, one)

    def _halves(self, group: Sequence[int]) -> Iterator[tuple[int, ...]]:
        """Every half of a group that can be told apart: of those that cannot be, the first so many."""
        kinds = [[device for device in class_ if device in group] for class_ in self.classes]
        for counts in itertools.product(*(range(len(kind) + 1) for kind in kinds)):
            if sum(counts) == len(group) // 2:
                yield tuple(sorted(d for kind, count in zip(kinds, counts, strict=True) for d in kind[:count]))

    def gone_through(self, order: Groups) -> Iterator[Narrowed]:
        """The best split over a whole ``order`` that CP-SAT finds; where time was short, it waits once more."""
        bound_s = heapq.heappop(self._waiting)[0] if self._waiting[0][1] == order else 0.0
        if order in self._done:
            return
        programme = _Programme(self.problem, order, self.best()[1])
        splits: list[Stages] = []
        self._tries[order] += 1
        model = programme.model()
        finished, proven = False, 0.0
        with self.budget.part(max(1, PARTS - self._tries[order])) as part:
            answer = run_solver(model, part, lambda value: splits.append(programme.stages(value)), linear=True)
            finished, proven = answer or (True, math.inf)
        for stages in splits[-1:]:
            yield Narrowed(stages, 0.0)
        bound_s = max(bound_s, min(proven / programme.scale, programme.lowest_s))
        if finished:
            self._done[order] = bound_s
        else:
            heapq.heappush(self._waiting, (bound_s, order))


class _Programme:
    """What the head of this module says of an order of groups.

    Args:
        problem: blocks, devices and links.
        groups: of all devices.
        ceiling_s: only splits with a smaller largest load matter.
    """

    def __init__(self, problem: Problem, groups: Groups, ceiling_s: float) -> None:
        self.problem, self.groups, self.ceiling_s = problem, groups, ceiling_s
        self.scale = RESOLUTION / ceiling_s
        self.columns = 1
        """The first of them is T; all others are 0 or 1, or between."""
        self.rows: list[tuple[list[tuple[int, int]], int, bool]] = []
        """Factors and columns, what their sum is at most, and whether it is also no less."""
        self.before = [[ZERO, *self._new(len(groups) - 1), ONE] for _ in problem.blocks]
        """By block and cut: y."""
        self._loads: dict[int, list[tuple[int, int]]] = {device: [] for group in groups for device in group}
        self._ordered()
        for number, group in enumerate(groups):
            self._worked(self._parts(number, group))
        self._sent()
        for terms in self._loads.values():
            self._most([*terms, (-1, 0)], 0)

    def _new(self, count: int) -> range:
        self.columns += count
        return range(self.columns - count, self.columns)

    def _most(self, terms: Iterable[tuple[int, int]], most: int, *, equal: bool = False) -> None:
        """The sum of ``terms`` is ``most`` at most."""
        known = [*terms]
        most -= sum(factor for factor, column in known if column == ONE)
        unknown = [(factor, column) for factor, column in known if column >= 0 and factor]
        if unknown or most < 0:
            self.rows.append((unknown, most, equal))

    def _units(self, seconds: float) -> int:
        """Whole units; more than the ceiling where it takes longer than that."""
        return int(min(seconds * self.scale, RESOLUTION + 1))

    def _ordered(self) -> None:
        """Cuts are one behind the other, and blocks before theirs."""
        for v, cuts in enumerate(self.before):
            for cut, behind in itertools.pairwise(cuts[1:-1]):
                self._most([(1, cut), (-1, behind)], 0)
            for u in bits(self.problem.predecessors[v]):
                for cut, other in zip(cuts[1:-1], self.before[u][1:-1], strict=True):
                    self._most([(1, cut), (-1, other)], 0)

    def _parts(self, number: int, group: Sequence[int]) -> dict[int, list[list[tuple[int, int]]]]:
        """By device of a group and block: terms whose sum says whether it is there."""
        here = [[(1, cuts[number + 1]), (-1, cuts[number])] for cuts in self.before]
        if len(group) == 1:
            return {group[0]: here}
        parts = {device: [[(1, column)] for column in self._new(len(here))] for device in group}
        for v, terms in enumerate(here):
            self._most([*terms, *((-1, parts[device][v][0][1]) for device in group)], 0, equal=True)
        return parts

    def _worked(self, parts: dict[int, list[list[tuple[int, int]]]]) -> None:
        """What each device computes and holds; where a block may not be, or takes too long, it is not."""
        total = sum(block.static_bytes for block in self.problem.blocks)
        for device, terms_of in parts.items():
            held = []
            for v, (block, terms) in enumerate(zip(self.problem.blocks, terms_of, strict=True)):
                units = self._units(self.problem.seconds[v][device]) if block.allowed[device] else RESOLUTION + 1
                if units > RESOLUTION:
                    self._most(terms, 0)
                    continue
                self._loads[device] += [(sign * units, column) for sign, column in terms]
                held += [(sign * (block.static_bytes // PAGE), column) for sign, column in terms]
            if total > self.problem.caps[device]:
                self._most(held, -(-self.problem.caps[device] // PAGE))

    def _sent(self) -> None:
        """What crosses each cut, for some device on either side, over the best link there may be."""
        if self.problem.transfers != "relayed" or self.problem.overlap:
            return
        for cut, sides in enumerate(itertools.pairwise(self.groups), start=1):
            sent = []
            for tensor in self.problem.crossings:
                seconds = min(sum(self.problem.transfer_s([tensor], *pair)) for pair in itertools.product(*sides))
                units = self._units(self.problem.microbatches * seconds)
                if not units:
                    continue
                (crosses,) = self._new(1)
                sent.append((units, crosses))
                for reader in bits(tensor.readers):
                    made, read = self.before[tensor.producer][cut], self.before[reader][cut]
                    self._most([(1, made), (-1, read), (-1, crosses)], 0)
            for group in sides:
                if len(group) == 1:
                    self._loads[group[0]] += sent
                    continue
                paid = [(RESOLUTION, column) for column in self._new(len(group))]
                self._most([*sent, *((-factor, column) for factor, column in paid)], 0)
                for device, own in zip(group, paid, strict=True):
                    self._loads[device].append(own)

    def least_s(self) -> float:
        """What no split over one of the orders is below, if it is below the ceiling; 0 where that is not known."""
        from ortools.linear_solver import pywraplp

        solver = pywraplp.Solver.CreateSolver("GLOP")
        columns = [solver.NumVar(0.0, solver.infinity() if not number else 1.0, "") for number in range(self.columns)]
        # In parts of the ceiling, and no factor above 1.
        sizes = [float(RESOLUTION), *[1.0] * (self.columns - 1)]
        where, factors, most = [], [], []
        rows = []
        for number, (terms, limit, equal) in enumerate(self.rows):
            own = [factor * sizes[column] for factor, column in terms]
            unit = 1 / max(map(abs, own), default=1.0)
            row = solver.Constraint(limit * unit if equal else -solver.infinity(), limit * unit)
            for (_, column), factor in zip(terms, own, strict=True):
                row.SetCoefficient(columns[column], factor * unit)
                where.append((number, column))
                factors.append(factor * unit)
            most.append(limit * unit)
            rows.append(row)
        solver.Minimize(columns[0])
        if solver.Solve() != pywraplp.Solver.OPTIMAL:
            return 0.0
        duals = np.array([row.dual_value() for row in rows])
        duals = np.where([equal for *_, equal in self.rows], duals, np.minimum(duals, 0.0))
        row_of, column_of = np.array(where).T
        reduced = -np.bincount(column_of, duals[row_of] * np.array(factors), self.columns)
        reduced[0] += 1.0
        return self.ceiling_s * float(duals @ np.array(most) + np.minimum(reduced, 0.0).sum()) * (1 - 1e-12)

    def model(self) -> Any:
        """The same for whole numbers, for CP-SAT: splits whose loads are below the ceiling by more than rounding."""
        from ortools.sat.python import cp_model

        model = cp_model.CpModel()
        self._variables = [model.new_int_var(0, RESOLUTION - self._rounded, "")]
        self._variables += [model.new_bool_var("") for _ in range(self.columns - 1)]
        for terms, most, equal in self.rows:
            factors = [factor for factor, _ in terms]
            total = cp_model.LinearExpr.weighted_sum([self._variables[column] for _, column in terms], factors)
            model.add(total == most if equal else total <= most)
        model.minimize(self._variables[0])
        return model

    @property
    def lowest_s(self) -> float:
        """Loads that :meth:`model` leaves out, as they are not smaller than the ceiling, are not below."""
        return self.ceiling_s * (1 - self._rounded / RESOLUTION)

    @property
    def _rounded(self) -> int:
        """Units that rounding takes from a load at most."""
        return len(self.problem.blocks) + 2 * len(self.problem.crossings)

    def stages(self, value: Callable[[Any], int]) -> Stages:
        """The split of a solution of :meth:`model`."""
        stages, before = [], 0
        for number, (device,) in enumerate(self.groups, start=1):
            until = 0
            for v, cuts in enumerate(self.before):
                until |= (cuts[number] == ONE or value(self._variables[cuts[number]])) << v
            if until != before:
                stages.append((device, until & ~before))
            before = until
        return tuple(stages)
