"""Inside a worker: the steps that a device was sent, held there, made ready and measured together."""

from __future__ import annotations

import dataclasses
import gc
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from shardwright.profiler.measure import Goal, Pass, is_out_of_memory, measure
from shardwright.profiler.measuring.pace import pace_of
from shardwright.profiler.measuring.selection import Item, Loan
from shardwright.profiler.measuring.stand_ins import filled
from shardwright.profiler.measuring.stopwatch import CudaStopwatch, HostStopwatch, Stopwatch
from shardwright.profiler.measuring.subject import Subject
from shardwright.profiler.recording.structure import nbytes
from shardwright.profiler.recording.unitgraph import Call
from shardwright.profiler.workers.worker import report, resident

__all__ = ["How", "borrowing", "hold", "measure_held", "passes_held"]


class How(NamedTuple):
    """What is measured."""

    train: bool
    optimizer: str
    parted: bool = False
    """Whether backwards are timed in two parts, too."""


def borrowing(call: Call) -> Call:
    """The call as it is sent where the module is that of a step which is sent before."""
    return dataclasses.replace(call, function=lent)


def lent(*_args: Any, **_kwargs: Any) -> Any:
    """Stands, in a call that is sent, for the module of another step."""
    raise AssertionError("the module is put in its place where the call is held")


class _Held(NamedTuple):
    key: str
    call: Call
    how: How
    loan: Loan | None

    def subject(self, microbatches: int) -> Subject:
        """The step made ready; the update is timed with the whole batch, and where the module is its own."""
        return Subject(
            filled(self.call),
            resident["device"],
            train=self.how.train,
            optimizer=self.how.optimizer if microbatches == 1 and self.loan is None else None,
            accumulate=microbatches > 1,
            parted=self.how.parted,
        )


def hold(name: str, calls: dict[int, Call], keys: dict[Item, str], how: How, loan: Loan | None, first: bool) -> None:
    """Take in the calls of one step, which share the module; ``first`` lets go of what was held before.

    Args:
        loan: whose module that is, if not the step's own; it is held already.
    """
    if first:
        resident["held"] = {}
        _let_go()
    held: dict[Item, _Held] = resident["held"]
    if loan is not None:
        module = next(other.call.function for item, other in held.items() if item.step == loan.step)
        calls = {count: dataclasses.replace(call, function=module) for count, call in calls.items()}
    for count, call in calls.items():
        held[Item(count, name)] = _Held(keys[Item(count, name)], call, how, loan)


def passes_held(on_refused: Callable[[Item, Exception], None]) -> list[Pass[Item]]:
    """What was taken in, made ready: a pass for each number of micro-batches, the whole batch first.

    ``on_refused`` is told what there is no memory for.
    """
    made = []
    held: dict[Item, _Held] = resident["held"]
    for count in sorted({item.microbatches for item in held}):
        subjects: dict[Item, Subject] = {}
        for item, step in list(held.items()):
            if item.microbatches != count or item not in held:
                continue
            try:
                subjects[item] = step.subject(count)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                on_refused(item, error)
        subjects = {item: subject for item, subject in subjects.items() if item in held}
        alike: dict[str, list[Item]] = {}
        for item in subjects:
            alike.setdefault(held[item].key, []).append(item)
        named = {item: like[0] for like in alike.values() for item in like}
        weights = {item: calls for like in alike.values() for item, calls in _calls_of_each(like).items()}
        repeated = count > 1 and not any(subject.train for subject in subjects.values())
        made.append(Pass(subjects, alike=named, weights=weights, repeated=repeated))
    return made


def _calls_of_each(alike: Sequence[Item]) -> dict[Item, float]:
    """For how many calls of a module each of equal steps stands: all of them alike, where none calls one again.

    The first of a module's calls finds its weights cold, and in the backward it is there that the gradients of all
    arrive; the gradient of the last one, which goes back first, is added to no other.
    """
    held: dict[Item, _Held] = resident["held"]
    again = [item for item in alike if held[item].loan is not None]
    weights = {item: 1 / (len(alike) - len(again)) for item in alike if item not in again}
    if again:
        loan = held[again[0]].loan
        assert loan is not None
        *between, last = again
        weights |= {item: (loan.calls - 2) / len(between) for item in between}
        weights[last] = 1 if between else loan.calls - 1
    return weights


def measure_held(goal: Goal, elsewhere_bytes: int, folder: str, devices: int) -> tuple[list[float], dict[Item, str]]:
    """Measure what was taken in, the whole batch first.

    Args:
        elsewhere_bytes: what a pass over the model touches beside what is held here.
        folder: where each of the ``devices`` leaves a mark when it is done; until then this one goes on computing.

    Returns:
        The seconds of each round, and what there was no memory for, with the reason.
    """
    device: torch.device = resident["device"]
    stopwatch = HostStopwatch() if device.type == "cpu" else CudaStopwatch(device)
    refused: dict[Item, str] = {}

    def refuse(item: Item, error: Exception) -> None:
        key = resident["held"][item].key
        alike = [other for other, step in resident["held"].items() if step.key == key]
        refused[alike[0]] = " ".join(str(error).split())[:200] or type(error).__name__  # it borrows from none
        for other in alike:
            del resident["held"][other]
        _let_go()

    passes = passes_held(refuse)
    totals = measure(
        passes,
        stopwatch,
        goal,
        on_settled=lambda item, series: report((item, series)),
        on_refused=refuse,
        on_round=lambda _: report(None),
        before=_Eviction(elsewhere_bytes) if device.type == "cpu" else lambda _: None,
        pace=pace_of(device),
    )
    (Path(folder) / str(os.getpid())).touch()
    _keep_busy(passes, stopwatch, lambda: len(os.listdir(folder)) >= devices)
    return totals, refused


def _keep_busy(passes: Sequence[Pass[Item]], stopwatch: Stopwatch, all_done: Callable[[], bool]) -> None:
    """Go on computing as long as another device is measuring: cores share the memory's bandwidth."""
    while any(steps.subjects for steps in passes) and not all_done():
        for steps in passes:
            steps.run(stopwatch, broken_off=all_done)


def _let_go() -> None:
    """Give the device's memory back."""
    gc.collect()
    if resident["device"].type == "cuda":
        torch.cuda.empty_cache()


class _Eviction:
    """Walks through memory, so that weights are as cold as after a pass over a whole model that is not all here.

    Once for the forwards and once for the backwards: a step touches no other's weights, or finds them warm in the
    model, too.
    """

    LEAST_WEIGHT_BYTES = 1 << 18
    """Smaller weights are fetched in no time."""
    MOST_BYTES = 1 << 26

    def __init__(self, elsewhere_bytes: int) -> None:
        size = min(elsewhere_bytes, 2 * _last_cache_bytes(), self.MOST_BYTES)
        self.memory = torch.zeros(max(0, size), dtype=torch.uint8)

    def __call__(self, subjects: Iterable[Subject]) -> None:
        weights = max((sum(map(nbytes, subject.parameters)) for subject in subjects), default=0)
        if len(self.memory) and weights >= self.LEAST_WEIGHT_BYTES:
            self.memory.add_(1)


def _last_cache_bytes() -> int:
    """Size of the largest cache of the first core; 32 MiB where the system does not say."""
    sizes = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text(encoding="utf-8").strip()
        if text.endswith("K") and text[:-1].isdigit():
            sizes.append(int(text[:-1]) << 10)
    return max(sizes, default=1 << 25)
