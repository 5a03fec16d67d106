"""Free assignment as a constraint programme, for OR-tools' CP-SAT; the statement is in assignment.py.

    x[v, d]           block v is on device d; exactly one d for each v
    out[t, d] >= x[p, d] - x[r, d]           t, made by p, leaves d, for each reader r
    into[t, d] >= x[r, d] - x[p, d]          it comes to d
    pair[t, a, b] >= x[p, a] + into[t, b] - 1       from a to b, where that has a price of its own (direct)
    held[q, d] >= x[u, d] - x[w, d]          d has a copy of the tied parameter q, for users u and w
    copied[q, d] >= x[u, d] - x[first, d]    whose bytes no block there counts
    minimise the largest of linear loads; linear lower bounds of the memory hold

CP-SAT counts in whole numbers: every time and byte is rounded down and caps are rounded up, so that what it proves is
below the truth for every assignment. Its solutions are priced and weighed exactly by the formulas; one that does not
fit after all, since a peak is no sum, is forbidden device by device (a no-good cut), and it is asked again.
One thread and a fixed seed, so that the same problem has the same answer where the time allows it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from shardwright.sharder.planning.clock import Budget
from shardwright.sharder.planning.exact.transfers import seconds_of
from shardwright.sharder.planning.free.assignment import Best, classes_of, fits, held_at_once, masks_of
from shardwright.sharder.planning.problem import Problem, bits
from shardwright.sharder.planning.solver import run_solver

__all__ = ["Shares", "improve_by_cpsat"]

RESOLUTION = 1e8
"""The best value known is so many units of time or memory."""


class Shares:
    """Variables of who is where and what crosses, and the memory constraints, in a CP-SAT model."""

    def __init__(self, problem: Problem, hint: Sequence[int] = (), *, within_caps: bool = True) -> None:
        from ortools.sat.python import cp_model

        self.problem, self.model = problem, cp_model.CpModel()
        self._pairs: dict[tuple[int, int, int], Any] = {}
        self.devices = range(len(problem.devices))
        new = self.model.new_bool_var
        self.on: list[list[Any]] = [
            [new("") if allowed else 0 for allowed in block.allowed] for block in problem.blocks
        ]
        for row in self.on:
            self.model.add_exactly_one([x for x in row if not _never(x)] or [self.model.new_constant(0)])
        self.out = [[self._differs(t.producer, [*bits(t.readers)], d) for d in self.devices] for t in problem.crossings]
        self.into = [[self._comes(t.producer, [*bits(t.readers)], d) for d in self.devices] for t in problem.crossings]
        self._ties()
        self._fold()
        if within_caps:
            for device in self.devices:
                for terms in self.memory(device):
                    if sum(c for c, _ in terms) > problem.caps[device]:
                        self.model.add(sum(c * x for c, x in terms) <= problem.caps[device])
        for v, device in enumerate(hint):
            for d in self.devices:
                if problem.blocks[v].allowed[d]:
                    self.model.add_hint(self.on[v][d], int(d == device))

    def where(self, value: Callable[[Any], int]) -> list[int]:
        """The assignment of a solution."""
        return [next(d for d in self.devices if not _never(row[d]) and value(row[d])) for row in self.on]

    def forbid(self, members: int, device: int) -> None:
        """No more the blocks in ``members``, and no others, on ``device``."""
        self.model.add(self._deviation(members, device) >= 1)

    def _deviation(self, members: int, device: int) -> Any:
        """How many blocks are on ``device`` against ``members``, and the other way round."""
        return sum(1 - row[device] if members >> v & 1 else row[device] for v, row in enumerate(self.on))

    def at_least(self, variable: Any, amount: int, members: int, device: int) -> None:
        """``variable`` is ``amount`` or more where ``device`` has exactly the blocks in ``members``."""
        self.model.add(variable >= amount - amount * self._deviation(members, device))

    def whole_apart(self) -> None:
        """No device has all blocks: those assignments have a memory of their own."""
        for device in self.devices:
            self.model.add(sum(row[device] for row in self.on) <= len(self.on) - 1)

    def _at_least_difference(self, pairs: Iterable[tuple[Any, Any]]) -> Any:
        variable = self.model.new_bool_var("")
        for a, b in pairs:
            self.model.add(variable >= a - b)
        return variable

    def _differs(self, producer: int, readers: Sequence[int], device: int) -> Any:
        return self._at_least_difference((self.on[producer][device], self.on[r][device]) for r in readers)

    def _comes(self, producer: int, readers: Sequence[int], device: int) -> Any:
        return self._at_least_difference((self.on[r][device], self.on[producer][device]) for r in readers)

    def _ties(self) -> None:
        self.held, self.copied = [], []
        for tie in self.problem.ties:
            users = [*bits(tie.users)]
            ring = [
                *zip(users, [*users[1:], users[0]], strict=True)
            ]  # around it, some user is here and the next is not
            self.held.append(
                [self._at_least_difference((self.on[u][d], self.on[w][d]) for u, w in ring) for d in self.devices]
            )
            self.copied.append(
                [self._at_least_difference((self.on[u][d], self.on[tie.first][d]) for u in users) for d in self.devices]
            )

    def _fold(self) -> None:
        """Devices that cannot be told apart get their first blocks in order: no later one has a block before all
        earlier.

        used[v, d] says whether a block up to v is on d; a block is on the next device of a class only after.
        """
        first = classes_of(self.problem)
        for device in self.devices:
            before = [d for d in self.devices if d < device and first[d] == first[device]]
            if not before:
                continue
            earlier = self.on[0][before[-1]]
            self.model.add(self.on[0][device] == 0) if self.problem.blocks[0].allowed[device] else None
            for v in range(1, len(self.on)):
                if self.problem.blocks[v].allowed[device]:
                    self.model.add(self.on[v][device] <= earlier)
                used = self.model.new_bool_var("")
                self.model.add(used <= earlier + self.on[v][before[-1]])
                earlier = used

    def memory(self, device: int) -> list[list[tuple[int, Any]]]:
        """Sums of terms that the peak of ``device`` is never below, for assignments with no device that has all
        blocks."""
        problem, count = self.problem, held_at_once(self.problem)
        least = [problem.ledger.least(v) for v in range(len(self.on))]
        stays = [(block.static_bytes, row[device]) for block, row in zip(problem.blocks, self.on, strict=True)]
        for tie, copied in zip(problem.ties, self.copied, strict=True):
            stays.append((tie.copy_bytes, copied[device]))
        sent = []
        for tensor, out, into in zip(problem.crossings, self.out, self.into, strict=True):
            stays += [(count * tensor.forward_bytes, into[device]), (count * tensor.backward_bytes, out[device])]
            sent.append((count * tensor.backward_bytes, into[device]))
        kept = [((count - 1) * one.kept, row[device]) for one, row in zip(least, self.on, strict=True)]
        together = device < len(problem.updates_together) and problem.updates_together[device]
        sums = []
        for one, row in zip(least, self.on, strict=True):
            if one.forward or one.backward:
                sums.append([*stays, *kept, (max(one.forward, one.backward), row[device])])
            if one.update and not together:
                sums.append([*stays, *sent, (one.update, row[device])])
        if together:
            sums.append(
                [*stays, *sent, *((one.update_together, r[device]) for one, r in zip(least, self.on, strict=True))]
            )
        return [_with_terms(terms) for terms in [[*stays, *kept], [*stays, *sent], *sums]]

    def seconds(self, device: int) -> tuple[list[tuple[float, Any]], list[tuple[float, Any]], list[tuple[float, Any]]]:
        """Terms of what ``device`` computes, sends and receives in a step, in seconds."""
        problem, count = self.problem, self.problem.microbatches
        compute = [
            (problem.work_s(v, device), row[device])
            for v, row in enumerate(self.on)
            if problem.blocks[v].allowed[device]
        ]
        compute += [(problem.sum_s(tie, device), h[device]) for tie, h in zip(problem.ties, self.held, strict=True)]
        copies = [(tie, copied) for tie, copied in zip(problem.ties, self.copied, strict=True) if tie.update_s]
        compute += [(tie.update_s[device], copied[device]) for tie, copied in copies]
        sends: list[tuple[float, Any]] = []
        receives: list[tuple[float, Any]] = []
        for number, tensor in enumerate(problem.crossings):
            if problem.transfers == "staged":
                to_host, from_host = problem.ways[device]
                out, into = self.out[number][device], self.into[number][device]
                sends.append((count * seconds_of(tensor.forward_bytes, to_host), out))
                receives.append((count * seconds_of(tensor.forward_bytes, from_host), into))
                if tensor.backward_bytes:
                    sends.append((count * seconds_of(tensor.backward_bytes, to_host), into))
                    receives.append((count * seconds_of(tensor.backward_bytes, from_host), out))
                continue
            for other in self.devices:
                if other != device:
                    there_s, back_s = problem.transfer_s([tensor], device, other)
                    sends.append((count * there_s, self._pair(number, device, other)))
                    receives.append((count * back_s, self._pair(number, device, other)))
                    there_s, back_s = problem.transfer_s([tensor], other, device)
                    receives.append((count * there_s, self._pair(number, other, device)))
                    sends.append((count * back_s, self._pair(number, other, device)))
        return compute, sends, receives

    def _pair(self, number: int, source: int, target: int) -> Any:
        """Whether a tensor goes from ``source`` to ``target``."""
        key = number, source, target
        if key not in self._pairs:
            producer = self.problem.crossings[number].producer
            variable = self._pairs[key] = self.model.new_bool_var("")
            self.model.add(variable >= self.on[producer][source] + self.into[number][target] - 1)
        return self._pairs[key]


def _never(variable: Any) -> bool:
    """Whether it is no variable but 0: the block may not be there."""
    return isinstance(variable, int)


def _with_terms(terms: Iterable[tuple[int, Any]]) -> list[tuple[int, Any]]:
    return [(c, x) for c, x in terms if c and not _never(x)]


class _Loads(Shares):
    """The model whose objective is the largest load."""

    def __init__(self, best: Best) -> None:
        super().__init__(best.problem, best.of)
        self.scale = RESOLUTION / (best.value if best.of and best.value > 0 else self._some_value())
        self.most = self.model.new_int_var(0, 2**60, "")
        ceiling = math.ceil(best.value * self.scale) if best.of else None
        for device in self.devices:
            compute, sends, receives = self.seconds(device)
            for terms in [compute, sends, receives] if self.problem.overlap else [[*compute, *sends, *receives]]:
                self.model.add(self.most >= sum(self._scaled(terms, ceiling)))
        if ceiling is not None:
            self.model.add(self.most <= ceiling)
        self.model.minimize(self.most)

    def _some_value(self) -> float:
        """A load of the right size, where no assignment is known."""
        return max((min(row) for row in self.problem.seconds), default=0.0) or 1.0

    def _scaled(self, terms: Iterable[tuple[float, Any]], ceiling: int | None) -> Iterable[Any]:
        for seconds, variable in terms:
            if _never(variable):
                continue
            units = seconds * self.scale
            if math.isinf(units) or (ceiling is not None and math.floor(units) > ceiling):
                self.model.add(variable == 0)
            elif math.floor(units):
                yield math.floor(units) * variable


def improve_by_cpsat(best: Best, budget: Budget) -> None:
    """Improve ``best``, which is changed, and its bound, within the time."""
    problem = best.problem
    if best.proven or budget.spent():
        return
    apart = problem.schedule == "1f1b" and held_at_once(problem) > 1
    if apart:
        for device in range(len(problem.devices)):
            best.offer([device] * len(problem.blocks))
    shares = _Loads(best)
    if apart:
        shares.whole_apart()
    while not budget.spent():
        broken: set[tuple[int, int]] = set()

        def found(value: Callable[[Any], int], broken: set[tuple[int, int]] = broken) -> None:
            of = shares.where(value)
            if not best.offer(of):
                masks = masks_of(of, len(problem.devices))
                broken.update((mask, d) for d, mask in enumerate(masks) if not fits(problem, mask, d))

        answer = run_solver(shares.model, budget, found)
        if answer is None:
            # Nothing is left below the ceiling, which is the best value itself.
            best.closed = True
            return
        optimal, bound = answer
        best.bound = max(best.bound, min(best.value, bound / shares.scale * (1 - 1e-12)))
        if optimal and not broken:
            return
        for mask, device in broken:
            shares.forbid(mask, device)
