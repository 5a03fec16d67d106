"""Which steps are measured: equal work a few times only, and calls of one module with weights that they share.

What is equal is told by a step's signature (:mod:`shardwright.profiler.measuring.signature`). A module that is called
again and again finds its weights warm, as such of many modules do not, is updated once, and adds the gradients of its
calls up before they arrive at its parameters: on CPUs, where all steps go back at once, that is measured as it is.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from torch import nn

from shardwright.profiler.measuring.signature import step_key
from shardwright.profiler.recording.structure import nbytes, tensors_in
from shardwright.profiler.recording.unitgraph import Call, Step

__all__ = ["Item", "Loan", "bytes_of_all", "chosen", "input_bytes", "known_by", "own_bytes"]

MOST_ALIKE = 3
"""Of equal steps so many are measured: what comes after its like finds its code warm and its weights cold."""
MOST_ALIKE_LARGE = 2
"""Of those that take :data:`LARGE_BYTES` or more each, whose code hardly counts, so many."""
LARGE_BYTES = 1 << 23
MOST_ALIKE_BYTES = 1 << 22
"""More of them are measured as long as they take no more than this together: small steps are mostly their code."""
MOST_AGAIN = 15
"""Of calls of a module after its first, whose weights do not count there, so many and no more."""
STATE_COPIES = 3
"""Gradient and two of the optimizer's, beside a parameter: what a step has to have room for in training."""


class Item(NamedTuple):
    """A step, with the batch divided into so many micro-batches."""

    microbatches: int
    step: str

    def __str__(self) -> str:
        return self.step if self.microbatches == 1 else f"{self.step} at {self.microbatches} micro-batches"


class Loan(NamedTuple):
    """Whose module a step calls again."""

    step: str
    """The first of those that do the same work with it, with which it is updated."""
    calls: int
    """How many these are in the model, with the first."""


def known_by(
    items: Mapping[Item, Step], *, train: bool, optimizer: str, parted: bool = False
) -> tuple[dict[Item, str], dict[str, Loan]]:
    """By item what its time is known by on a device model, and by step the loan of what calls a module again.

    That is for equal work at every number of micro-batches: a first call whose input needs no gradient is another's.
    The update is timed once, with the whole batch.
    """
    keys = {
        item: step_key(
            step,
            train=train,
            optimizer=optimizer if item.microbatches == 1 else None,
            accumulate=item.microbatches > 1,
            parted=parted,
        )
        for item, step in items.items()
    }
    counts = sorted({item.microbatches for item in items})
    callers: dict[tuple[int | str | None, ...], list[str]] = {}
    for item, step in items.items():
        if item.microbatches == counts[0] and step.call is not None and _called(step):
            work = (id(step.call.function), *(keys.get(Item(count, item.step)) for count in counts))
            callers.setdefault(work, []).append(item.step)
    loans: dict[str, Loan] = {}
    calls: dict[str, int] = {}
    for first, *later in callers.values():
        if later:
            calls.update(dict.fromkeys((first, *later), 1 + len(later)))
            loans.update(dict.fromkeys(later, Loan(first, 1 + len(later))))
    again = {item: f"{key} of {calls[item.step]} calls" for item, key in keys.items() if item.step in calls}
    return keys | again, loans


def chosen(
    items: Mapping[Item, Step], keys: Mapping[Item, str], loans: Mapping[str, Loan], *, train: bool
) -> list[Item]:
    """Of equal work the first few, in the order of ``items``; of modules called again one lends its weights.

    What is the same work at several numbers of micro-batches, as it is where inputs have no samples, is measured at the
    first of them.
    """
    alone, again = _Few(), _Few(MOST_AGAIN)
    lenders: dict[str, str] = {}
    at: dict[str, int] = {}
    found = []
    for item, step in items.items():
        key, loan = keys[item], loans.get(item.step)
        if at.setdefault(key, item.microbatches) != item.microbatches:
            continue
        size = own_bytes(step, loan, train=train)
        if loan is None:
            if alone.admits(key, size):
                lenders.setdefault(key, item.step)
                found.append(item)
        elif lenders.get(key) == loan.step and again.admits(key, size):
            found.append(item)
    return found


class _Few:
    """Which of equal steps are measured, ``limit`` at the most."""

    def __init__(self, limit: int | None = None) -> None:
        self.numbers = Counter[str]()
        self.limit = limit

    def admits(self, key: str, nbytes: int) -> bool:
        """Whether one more step of ``key``, which takes so many bytes, is."""
        self.numbers[key] += 1
        most = MOST_ALIKE_LARGE if nbytes >= LARGE_BYTES else max(MOST_ALIKE, MOST_ALIKE_BYTES // max(1, nbytes))
        return self.numbers[key] <= (most if self.limit is None else min(most, self.limit))


def own_bytes(step: Step, loan: Loan | None = None, *, train: bool) -> int:
    """About what a step takes while it runs, less what is lent to it."""
    weights = _weight_bytes(_called(step), train=train) if loan is None else 0
    return weights + _data_bytes(step)


def bytes_of_all(steps: Iterable[Step], *, train: bool) -> int:
    """About what a pass over ``steps`` touches; a parameter counts once."""
    steps = list(steps)
    parameters = {id(each): each for step in steps for each in _called(step)}
    return _weight_bytes(parameters.values(), train=train) + sum(map(_data_bytes, steps))


def input_bytes(call: Call) -> int:
    """What a call is given."""
    return sum(nbytes(tensor) for _, tensor in tensors_in((call.args, call.kwargs)))


def _called(step: Step) -> list[nn.Parameter]:
    assert step.call is not None
    return list(step.call.function.parameters()) if isinstance(step.call.function, nn.Module) else []


def _weight_bytes(parameters: Iterable[nn.Parameter], *, train: bool) -> int:
    return sum(map(nbytes, parameters)) * (1 + STATE_COPIES * train)


def _data_bytes(step: Step) -> int:
    assert step.call is not None
    return 2 * input_bytes(step.call) + step.output_bytes + step.saved_bytes
