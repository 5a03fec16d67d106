"""Inside a worker: the steps that a device was sent, held there, made ready and measured together."""

from __future__ import annotations

import gc
import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from shardwright.profiler.measure import Goal, Pass, is_out_of_memory, measure
from shardwright.profiler.measuring.pace import pace_of
from shardwright.profiler.measuring.stand_ins import filled
from shardwright.profiler.measuring.stopwatch import CudaStopwatch, HostStopwatch, Stopwatch
from shardwright.profiler.measuring.subject import Subject
from shardwright.profiler.recording.structure import nbytes
from shardwright.profiler.recording.unitgraph import Call
from shardwright.profiler.workers.worker import report, resident

__all__ = ["How", "Item", "Loan", "hold", "measure_held", "passes_held"]


class Item(NamedTuple):
    """A step, with the batch divided into so many micro-batches."""

    microbatches: int
    step: str

    def __str__(self) -> str:
        return self.step if self.microbatches == 1 else f"{self.step} at {self.microbatches} micro-batches"


class Loan(NamedTuple):
    """Whose module a step calls again."""

    step: str
    """The first of those that do the same work with it; it is updated there."""
    calls: int
    """How many these are in the model, with the first."""
    nbytes: int
    """What the module's parameters take, with what training keeps of each."""


class How(NamedTuple):
    """What is measured."""

    train: bool
    optimizer: str
    parted: bool = False
    """Whether backwards are timed in two parts, too."""


class _Held(NamedTuple):
    key: str
    make: Callable[[], Subject]
    stands_for: int
    """So many calls of the module are known by it, and by others that borrow it."""


def hold(name: str, calls: dict[int, Call], keys: dict[Item, str], how: How, loan: Loan | None, first: bool) -> None:
    """Take in the calls of one step, which share the module; ``first`` lets go of what was held before.

    ``loan`` counts if that step is held, too.
    """
    if first:
        resident["held"], resident["modules"] = {}, {}
        _let_go()
    lent = None if loan is None else resident["modules"].get(loan.step)
    for count, call in calls.items():
        item = Item(count, name)
        make = partial(
            _subject,
            call if lent is None else Call(lent, call.args, call.kwargs, call.context),
            how,
            optimizer=how.optimizer if count == 1 and lent is None else None,
            accumulate=count > 1,
        )
        resident["held"][item] = _Held(keys[item], make, 1 if loan is None or lent is None else loan.calls - 1)
        resident["modules"].setdefault(name, call.function)


def _subject(call: Call, how: How, *, optimizer: str | None, accumulate: bool) -> Subject:
    device = resident["device"]
    return Subject(filled(call), device, train=how.train, optimizer=optimizer, accumulate=accumulate, parted=how.parted)


def passes_held(on_refused: Callable[[Item, Exception], None]) -> list[Pass[Item]]:
    """What was taken in, made ready: a pass for each number of micro-batches, the whole batch first.

    ``on_refused`` is told what there is no memory for.
    """
    made = []
    held: dict[Item, _Held] = resident["held"]
    for count in sorted({item.microbatches for item in held}):
        subjects: dict[Item, Subject] = {}
        first: dict[str, Item] = {}
        for item, step in list(held.items()):
            if item.microbatches != count or item not in held:
                continue
            try:
                subjects[item] = step.make()
                first.setdefault(step.key, item)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                on_refused(item, error)
        subjects = {item: subject for item, subject in subjects.items() if item in held}
        alike = {item: first[held[item].key] for item in subjects}
        numbers = Counter((held[item].key, held[item].stands_for) for item in subjects)
        weights = {item: held[item].stands_for / numbers[held[item].key, held[item].stands_for] for item in subjects}
        made.append(Pass(subjects, alike=alike, weights=weights))
    return made


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
        refused[item] = " ".join(str(error).split())[:200] or type(error).__name__
        key = resident["held"][item].key
        for other in [other for other, step in resident["held"].items() if step.key == key]:
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

    Once for the forwards and once for the backwards: a step touches no other's weights.
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
