"""The campaign: which measurements a profile needs, which are known already, and the workers that make the others.

Work with one signature is measured once on each device model (see :mod:`shardwright.profiler.measuring.signature`), and
every finished measurement goes to the cache at once: a profile that is broken off goes on where it was. What does not
fit on a device together is measured in groups, and what does not fit alone is a result.
"""

from __future__ import annotations

import dataclasses
import hashlib
import statistics
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from shardwright.profiler.cache import Cache
from shardwright.profiler.capture import Progress
from shardwright.profiler.measure import Goal, prepare
from shardwright.profiler.measuring.held import How, Item, Loan, hold, measure_held
from shardwright.profiler.measuring.signature import device_key, step_key
from shardwright.profiler.measuring.stand_ins import sendable
from shardwright.profiler.measuring.timed import timed_steps
from shardwright.profiler.measuring.timing import Series, at_pace, summarise
from shardwright.profiler.profile import Clocked, Device, Misfit, Variation
from shardwright.profiler.recording.structure import nbytes, tensors_in
from shardwright.profiler.recording.unitgraph import Call, Step, UnitGraph
from shardwright.profiler.workers.pool import Pool

__all__ = [
    "START_LIMIT_S",
    "Few",
    "Findings",
    "Workers",
    "investigate",
    "keys_of",
    "loans",
    "work_bytes",
]


START_LIMIT_S = 30.0
"""A worker that starts or takes something in may stand still for so long: no module imported, no byte taken in."""
ROUND_LIMIT_S = 600.0
"""A round may take so long before a worker counts as hung."""
MOST_ALIKE = 3
"""Of equal steps so many are measured: what comes after its like finds its code warm and its weights cold."""
MOST_ALIKE_LARGE = 2
"""Of those that take :data:`LARGE_BYTES` or more each, whose code hardly counts, so many."""
LARGE_BYTES = 1 << 23
MOST_ALIKE_BYTES = 1 << 22
"""More of them are measured as long as they take no more than this together: small steps are mostly their code."""
GROUP_SHARE = 0.5
"""Of a device's memory: what is measured together may take so much."""
STATE_COPIES = 3
"""Gradient and two of the optimizer's, beside a parameter: what a group has to have room for in training."""


class Workers:
    """The devices' worker processes, started when they are first needed; a context manager."""

    def __init__(self, devices: Sequence[Device], tell: Progress) -> None:
        self.devices = devices
        self.tell = tell
        self._pool: Pool | None = None

    @property
    def pool(self) -> Pool:
        """The workers, each ready to measure."""
        if self._pool is None:
            self.tell("start workers", 0, 1)
            self._pool = Pool(self.devices)
            calls = {d.name: (prepare, (d.name, max(1, len(d.cores)))) for d in self.devices}
            self._pool.call(calls, limit_s=START_LIMIT_S, loading=True)
            self.tell("start workers", 1, 1)
        return self._pool

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.close()


@dataclass
class Findings:
    """What is known of every step on every device that was measured."""

    timings: dict[tuple[str, int, str], Clocked] = field(default_factory=dict)
    """By device, number of micro-batches and step."""
    misfits: list[Misfit] = field(default_factory=list)
    variations: list[Variation] = field(default_factory=list)
    paces: dict[str, float] = field(default_factory=dict)
    """By device, the pace at which the times are told."""

    def level(self) -> None:
        """Tell all times of a device at one pace: those of the cache may have been taken at another."""
        taken: dict[str, list[float]] = {}
        for (device, _, _), timing in self.timings.items():
            if timing.pace_s is not None:
                taken.setdefault(device, []).append(timing.pace_s)
        self.paces = {device: statistics.median(each) for device, each in taken.items()}
        for place, timing in self.timings.items():
            if timing.pace_s is not None:
                self.timings[place] = at_pace(timing, self.paces[place[0]])


@dataclass(frozen=True)
class _Job:
    """A step to be measured on a device, at the numbers of micro-batches for which it is not known.

    What it lacks in values is made where it is measured (see :mod:`shardwright.profiler.measuring.stand_ins`).
    """

    step: str
    calls: dict[int, Call]
    keys: dict[Item, str]
    nbytes: int
    loan: Loan | None

    @property
    def own_bytes(self) -> int:
        """Less what is lent."""
        return self.nbytes - (self.loan.nbytes if self.loan is not None else 0)

    def only(self, items: Iterable[Item]) -> _Job:
        """A part of the job."""
        calls = {item.microbatches: self.calls[item.microbatches] for item in items}
        return dataclasses.replace(self, calls=calls, keys={item: self.keys[item] for item in items})


def investigate(
    workers: Workers,
    devices: Sequence[Device],
    captures: Mapping[int, UnitGraph],
    inputs: Mapping[int, Sequence[Tensor]],
    *,
    train: bool,
    optimizer: str,
    parted: bool = False,
    goal: Goal,
    cache: Cache,
    tell: Progress,
) -> Findings:
    """Find the times of all steps of ``captures`` on ``devices``: from the cache, else by measuring.

    All devices measure at once, as they will compute at once when the model is split, and each goes on computing until
    all are done, since CPU workers share the memory's bandwidth.

    Args:
        inputs: by number of micro-batches, what the model is called with.
        parted: whether backwards are timed in two parts, too.
    """
    items = {
        Item(count, step.name): step
        for count, capture in captures.items()
        for step in timed_steps(capture, train=train, accumulate=count > 1)
    }
    steps = keys_of(items, train=train, optimizer=optimizer, parted=parted)
    beside = sum(device.kind == "cpu" for device in devices) - 1
    keys = {(d.name, item): f"{key} {device_key(d, beside)}" for d in devices for item, key in steps.items()}
    whole = _Whole(keys, _bytes_of_all([step for item, step in items.items() if item.microbatches == 1], train=train))
    missing = {key for key in keys.values() if cache.get(key, Clocked) is None}
    tell("known", len(set(keys.values()) - missing), len(set(keys.values())))
    found = Findings()
    lent = loans(items, steps, train=train)
    jobs = {device.name: _jobs(device, items, keys, lent, missing, inputs, train=train) for device in devices}
    how = How(train, optimizer, parted)
    _run(workers, devices, jobs, found, whole, how, goal=goal, cache=cache, tell=tell)
    refused = {keys[m.device, Item(m.microbatches, m.node)]: m for m in found.misfits}
    found.misfits.clear()
    measured_on: dict[str, str] = {}
    for (name, item), key in keys.items():
        timing = cache.get(key, Clocked)
        if timing is not None:
            taken = {} if measured_on.setdefault(key, name) == name else {"source": "scaled"}  # from its twin
            found.timings[name, item.microbatches, item.step] = timing.model_copy(update=taken)
        else:
            reason = refused[key].reason
            found.misfits.append(Misfit(node=item.step, device=name, microbatches=item.microbatches, reason=reason))
    for device in devices:
        variation = cache.get(whole.key(device.name), Variation)
        if variation is not None:
            found.variations.append(variation.model_copy(update={"device": device.name}))
    found.level()
    return found


def keys_of(items: Mapping[Item, Step], *, train: bool, optimizer: str, parted: bool = False) -> dict[Item, str]:
    """By item, what its time is known by on a device model. The update is timed once, with the whole batch.

    Where one module is called again and again, all but the first call find its weights warm, and its gradients are
    added to those before once for all of them.
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
    works = {item: (item.microbatches, module, keys[item]) for item, module in _modules_called(items).items()}
    calls = Counter(works.values())
    again = {item: calls[work] for item, work in works.items() if calls[work] > 1}
    return {item: f"{key} of {again[item]} calls" if item in again else key for item, key in keys.items()}


def loans(items: Mapping[Item, Step], keys: Mapping[Item, str], *, train: bool) -> dict[str, Loan]:
    """By step that calls the module of one before it, for equal work at every number of micro-batches."""
    counts = sorted({item.microbatches for item in items})
    callers: dict[tuple[int | str | None, ...], list[str]] = {}
    for item, module in _modules_called(items).items():
        if item.microbatches == counts[0]:
            work = (module, *(keys.get(Item(count, item.step)) for count in counts))
            callers.setdefault(work, []).append(item.step)
    found = {}
    for first, *later in callers.values():
        call = items[Item(counts[0], first)].call
        size = _weight_bytes(_parameters(call), train=train) if call is not None else 0
        found.update(dict.fromkeys(later, Loan(first, 1 + len(later), size)))
    return found


def _modules_called(items: Mapping[Item, Step]) -> dict[Item, int]:
    """The identity of the module that an item calls, if that has parameters."""
    return {item: id(step.call.function) for item, step in items.items() if step.call and _parameters(step.call)}


@dataclass(frozen=True)
class _Whole:
    """All that is to be known of the model."""

    keys: Mapping[tuple[str, Item], str]
    nbytes: int
    """What a pass over the whole model touches."""

    def key(self, device: str) -> str:
        """Under which key the device's unsteadiness is kept."""
        keys = sorted({key for (name, _), key in self.keys.items() if name == device})
        return f"variation {hashlib.sha256(' '.join(keys).encode()).hexdigest()}"


class Few:
    """Which of equal steps are measured."""

    def __init__(self) -> None:
        self.numbers = Counter[str]()

    def admits(self, key: str, nbytes: int) -> bool:
        """Whether one more step of ``key``, which takes so many bytes, is."""
        self.numbers[key] += 1
        most = MOST_ALIKE_LARGE if nbytes >= LARGE_BYTES else max(MOST_ALIKE, MOST_ALIKE_BYTES // max(1, nbytes))
        return self.numbers[key] <= most


def _jobs(
    device: Device,
    items: Mapping[Item, Step],
    keys: Mapping[tuple[str, Item], str],
    lent: Mapping[str, Loan],
    missing: set[str],
    inputs: Mapping[int, Sequence[Tensor]],
    *,
    train: bool,
) -> list[_Job]:
    """What has to be measured on ``device``, in the order of the forward; of equal work, the first few.

    It is no longer ``missing`` then, for a device of the same model would measure it again.
    """
    found: dict[str, dict[int, Call]] = {}
    few = Few()
    for item, step in items.items():
        key = keys[device.name, item]
        lent_bytes = lent[item.step].nbytes if item.step in lent else 0
        if key in missing and few.admits(key, work_bytes(step, train=train) - lent_bytes):
            assert step.call is not None  # as all items have
            found.setdefault(item.step, {})[item.microbatches] = sendable(step.call, inputs[item.microbatches])
    missing.difference_update(few.numbers)
    return [
        _Job(
            name,
            calls,
            {Item(count, name): keys[device.name, Item(count, name)] for count in calls},
            max(work_bytes(items[Item(count, name)], train=train) for count in calls)
            + sum(_input_bytes(call) for call in calls.values()),
            lent.get(name),
        )
        for name, calls in found.items()
    ]


def work_bytes(step: Step, *, train: bool) -> int:
    """About what a step takes while it runs."""
    assert step.call is not None
    return _weight_bytes(_parameters(step.call), train=train) + _data_bytes(step)


def _bytes_of_all(steps: Iterable[Step], *, train: bool) -> int:
    """About what a pass over ``steps`` touches; a parameter counts once."""
    steps = list(steps)
    parameters = {id(each): each for step in steps if step.call for each in _parameters(step.call)}
    return _weight_bytes(parameters.values(), train=train) + sum(map(_data_bytes, steps))


def _parameters(call: Call) -> list[nn.Parameter]:
    return list(call.function.parameters()) if isinstance(call.function, nn.Module) else []


def _weight_bytes(parameters: Iterable[nn.Parameter], *, train: bool) -> int:
    return sum(map(nbytes, parameters)) * (1 + STATE_COPIES * train)


def _data_bytes(step: Step) -> int:
    assert step.call is not None
    return 2 * _input_bytes(step.call) + step.output_bytes + step.saved_bytes


def _input_bytes(call: Call) -> int:
    return sum(nbytes(tensor) for _, tensor in tensors_in((call.args, call.kwargs)))


def _groups(jobs: Sequence[_Job], limit_bytes: int) -> list[list[_Job]]:
    """The jobs in groups that fit on the device together; one that is too large is a group of its own."""
    groups: list[list[_Job]] = []
    filled = 0
    for job in jobs:
        if not groups or filled + job.nbytes > limit_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(job)
        filled += job.nbytes
    return groups


def _run(
    workers: Workers,
    devices: Sequence[Device],
    jobs: Mapping[str, list[_Job]],
    found: Findings,
    whole: _Whole,
    how: How,
    *,
    goal: Goal,
    cache: Cache,
    tell: Progress,
) -> None:
    """Measure ``jobs``, group by group, and keep what comes out."""
    groups = {d.name: _groups(jobs[d.name], int(d.memory_bytes * GROUP_SHARE)) for d in devices}
    longest: dict[str, list[float]] = {}
    while any(groups.values()):
        now = {name: waiting.pop(0) for name, waiting in groups.items() if waiting}
        left = max(1 + len(waiting) for waiting in groups.values())
        part = Goal(goal.precision, goal.negligible, goal.repeats, goal.budget_s / left)
        _send(workers, now, how, tell=tell)
        answers = _measure(workers, now, whole, part, cache, tell)
        for name, (totals, refused) in answers.items():
            if sum(totals) > sum(longest.get(name, ())):
                longest[name] = totals
            group = now[name]
            for job in group:
                reasons = {item: refused[item] for item in job.keys if item in refused}
                if reasons and len(group) > 1:
                    groups[name].append([job.only(reasons)])
                else:
                    found.misfits += [
                        Misfit(node=item.step, device=name, microbatches=item.microbatches, reason=reason)
                        for item, reason in reasons.items()
                    ]
    for name, totals in longest.items():
        middle = statistics.median(totals)
        if middle > 0:
            cache.put(whole.key(name), Variation(device=name, relative=tuple(t / middle for t in totals)))


def _send(workers: Workers, groups: Mapping[str, list[_Job]], how: How, *, tell: Progress) -> None:
    """Hand every job of the groups to its device."""
    pool = workers.pool
    count = max(map(len, groups.values()))
    for done in range(count):
        tell("send units", done, count)
        calls: dict[str, Any] = {
            name: (hold, (group[done].step, group[done].calls, group[done].keys, how, group[done].loan, done == 0))
            for name, group in groups.items()
            if done < len(group)
        }
        pool.call(calls, limit_s=START_LIMIT_S, loading=True)
    tell("send units", count, count)


def _measure(
    workers: Workers,
    groups: Mapping[str, list[_Job]],
    whole: _Whole,
    goal: Goal,
    cache: Cache,
    tell: Progress,
) -> dict[str, tuple[list[float], dict[Item, str]]]:
    """Have every device measure its group; what is settled is kept at once."""
    keys = {(name, item): key for name, group in groups.items() for job in group for item, key in job.keys.items()}
    settled = 0

    def on_progress(device: str, message: tuple[Item, Series] | None) -> None:
        nonlocal settled
        if message is not None:
            item, series = message
            cache.put(keys[device, item], summarise(series))
            settled += 1
            tell("measure", settled, len(keys))

    tell("measure", 0, len(keys))
    with tempfile.TemporaryDirectory() as folder:
        calls: dict[str, Any] = {
            name: (
                measure_held,
                (goal, whole.nbytes - sum(job.own_bytes for job in group), folder, len(groups)),
            )
            for name, group in groups.items()
        }
        answers = workers.pool.call(calls, limit_s=ROUND_LIMIT_S, on_progress=on_progress)
    tell("measure", len(keys), len(keys))
    return answers
