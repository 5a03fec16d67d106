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
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from shardwright.profiler.cache import Cache
from shardwright.profiler.capture import Progress
from shardwright.profiler.measure import Goal, prepare
from shardwright.profiler.measuring.held import How, borrowing, hold, measure_held
from shardwright.profiler.measuring.selection import Item, Loan, bytes_of_all, chosen, input_bytes, known_by, own_bytes
from shardwright.profiler.measuring.signature import device_key
from shardwright.profiler.measuring.stand_ins import sendable
from shardwright.profiler.measuring.timed import timed_steps
from shardwright.profiler.measuring.timing import Series, at_pace, summarise
from shardwright.profiler.profile import Clocked, Device, Misfit, Variation
from shardwright.profiler.recording.unitgraph import Call, Step, UnitGraph
from shardwright.profiler.workers.pool import Pool

__all__ = [
    "START_LIMIT_S",
    "Findings",
    "Workers",
    "investigate",
]


START_LIMIT_S = 30.0
"""A worker that starts or takes something in may stand still for so long: no module imported, no byte taken in."""
ROUND_LIMIT_S = 600.0
"""A round may take so long before a worker counts as hung."""
GROUP_SHARE = 0.5
"""Of a device's memory: what is measured together may take so much."""


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
    """Less what is lent."""
    loan: Loan | None

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
    steps, loans = known_by(items, train=train, optimizer=optimizer, parted=parted)
    beside = sum(device.kind == "cpu" for device in devices) - 1
    keys = {(d.name, item): f"{key} {device_key(d, beside)}" for d in devices for item, key in steps.items()}
    whole = _Whole(keys, bytes_of_all([step for item, step in items.items() if item.microbatches == 1], train=train))
    missing = {key for key in keys.values() if cache.get(key, Clocked) is None}
    tell("known", len(set(keys.values()) - missing), len(set(keys.values())))
    found = Findings()
    jobs = {device.name: _jobs(device, items, keys, loans, missing, inputs, train=train) for device in devices}
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


def _jobs(
    device: Device,
    items: Mapping[Item, Step],
    keys: Mapping[tuple[str, Item], str],
    loans: Mapping[str, Loan],
    missing: set[str],
    inputs: Mapping[int, Sequence[Tensor]],
    *,
    train: bool,
) -> list[_Job]:
    """What has to be measured on ``device``, in the order of the forward; of equal work, the first few.

    It is no longer ``missing`` then, for a device of the same model would measure it again.
    """
    here = {item: keys[device.name, item] for item in items}
    wanted = {item: step for item, step in items.items() if here[item] in missing}
    missing.difference_update(here.values())
    found: dict[str, dict[int, Call]] = {}
    for item in chosen(wanted, here, loans, train=train):
        call = items[item].call
        assert call is not None  # as all items have
        if item.step in loans:
            call = borrowing(call)
        found.setdefault(item.step, {})[item.microbatches] = sendable(call, inputs[item.microbatches])
    return [
        _Job(
            name,
            calls,
            {Item(count, name): here[Item(count, name)] for count in calls},
            max(own_bytes(items[Item(count, name)], loans.get(name), train=train) for count in calls)
            + sum(map(input_bytes, calls.values())),
            loans.get(name),
        )
        for name, calls in found.items()
    ]


def _groups(jobs: Sequence[_Job], limit_bytes: int) -> list[list[_Job]]:
    """The jobs in groups that fit on the device together; one that is too large is a group of its own.

    What would borrow a module of another group is left out: its time is known by the key that its lender has, too.
    """
    groups: list[list[_Job]] = []
    filled = 0
    for job in jobs:
        fits = bool(groups) and filled + job.nbytes <= limit_bytes
        if job.loan is not None and not (fits and any(other.step == job.loan.step for other in groups[-1])):
            continue
        if not fits:
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
                (goal, whole.nbytes - sum(job.nbytes for job in group), folder, len(groups)),
            )
            for name, group in groups.items()
        }
        answers = workers.pool.call(calls, limit_s=ROUND_LIMIT_S, on_progress=on_progress)
    tell("measure", len(keys), len(keys))
    return answers
