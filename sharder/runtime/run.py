"""Running a plan: a worker a device, a gate that compares with the unsharded model, then all timed in turn.

Beside the plan and one device alone are the splits that one would make without a planner. One that cannot be run is
left out, with the reason. A worker that dies in one ends the run, and so may one that leaves too little room for the
others' activations: then ``naive=False``.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from shardwright.errors import ShardwrightError
from shardwright.profiler.capture import Progress, silent
from shardwright.profiler.devices import find_devices
from shardwright.profiler.profile import Device
from shardwright.profiler.recording.inputs import microbatch
from shardwright.profiler.recording.unitgraph import UnitGraph
from shardwright.profiler.target import load_target
from shardwright.profiler.trace import trace
from shardwright.profiler.workers.pool import Pool, WorkerError
from shardwright.sharder.planning.plan import Plan
from shardwright.sharder.planning.schedules.foreseen import at_pace
from shardwright.sharder.runtime.accounts import Noted, accounts_of
from shardwright.sharder.runtime.check import apart, check_can_be_piped, check_inputs, check_model, units_of
from shardwright.sharder.runtime.gates.gate import DifferenceError, Gate
from shardwright.sharder.runtime.naive import NAIVE_LIMIT_S, naive_plans, not_measured
from shardwright.sharder.runtime.piping.cut import check_all_called, cut
from shardwright.sharder.runtime.piping.engine import sendable
from shardwright.sharder.runtime.record import Equality, Naive, Paced, Run, Timed, Weighed
from shardwright.sharder.runtime.session import Session, Split, steps_in_row
from shardwright.sharder.runtime.turns import WARMUP_STEPS, Pacing, in_turn, spread_over

__all__ = ["run"]

STEP_LIMIT_S = 15.0
"""A step that takes so much longer than five times its prediction counts as hung."""
NOTED_STEPS = 5
"""At most; they come between those that are timed, which meet no wrapper."""
PLAN, ALONE = "plan", "one device alone"


class _SplitFailedError(ShardwrightError):
    """A naive split raised in a worker; the plan can be run without it."""

    def __init__(self, name: str, why: str) -> None:
        super().__init__(why)
        self.name = name


@dataclass
class _Kept:
    """What stays known where workers are started anew, since a naive split has failed in them."""

    equality: Equality | None = None
    peaks: list[int] = field(default_factory=list)
    admitted: set[str] = field(default_factory=set)
    """Naive splits that were compared, and may be timed."""
    refused: dict[str, str] = field(default_factory=dict)
    """Those that may not -> why."""
    alone_why: str = ""
    """Why one device alone is not timed beside the plan."""


@dataclass(frozen=True)
class _Measured:
    """What the workers of a run found."""

    equality: Equality
    peaks: list[int]
    seconds: dict[str, list[float]]
    noted: list[list[Noted]]
    slower: dict[str, dict[str, float]]
    """Contender -> by device, how many times as long the same work took beside its steps as in the profile."""


def run(
    target: str | nn.Module,
    plan: Plan,
    args: tuple[Any, ...] | None = None,
    kwargs: Mapping[str, Any] | None = None,
    *,
    steps: int = 11,
    naive: bool = True,
    progress: Progress | None = None,
) -> Run:
    """Run ``plan`` as a pipeline, one worker process a device, and time it against one device and against equal splits.

    First one step of each is compared: outputs and every gradient. Then steps of all are timed in turn, the whole step
    each: forward, backward and update. Between those that are timed a few more steps of the plan are noted slot by
    slot, for the accounts. The caller's model is not changed.

    Args:
        target: ``"file.py:Name"``, or the model itself.
        args: the batch; the target's own sample inputs by default.
        kwargs: likewise.
        steps: how many steps of each are timed.
        naive: whether the splits by count and by parameters that the plan lists are measured too, which takes a minute
            at most; one that is not possible, or is the plan's own, is left out.
        progress: is told what is being done, and how much of it.

    Raises:
        ShardwrightError: the plan is for another model or other inputs, a worker fails, or the results differ.
    """
    if isinstance(target, str):
        model, sample = load_target(target)
        if args is None and kwargs is None:
            args, kwargs = sample
    else:
        model = target
    args, kwargs = args or (), dict(kwargs or {})
    if steps < 1:
        raise ShardwrightError(f"{steps} steps measure nothing; use 5 or more")
    tell = progress or silent
    check_model(plan, model)
    check_inputs(plan, args, kwargs)
    check_can_be_piped(plan, model)
    captures = _Captures(model, args, kwargs)
    own = captures.split(PLAN, plan)
    others, refused = naive_plans(plan) if naive else ({}, ())
    rivals: dict[str, Split] = {}
    why: dict[str, str] = {each.name: each.why for each in refused}
    for name, rival in others.items():
        try:
            check_can_be_piped(rival, model)
            _found(rival, rival.devices)
            rivals[name] = captures.split(name, rival)
        except ShardwrightError as error:
            why[name] = str(error)
    kept = _Kept()
    while True:
        try:
            measured = _measured(model, args, kwargs, own, list(rivals.values()), steps, tell, kept)
            break
        except _SplitFailedError as error:
            del rivals[error.name]
            why[error.name] = str(error)
    run = _record(plan, measured, {name: split.plan for name, split in rivals.items()}, why | kept.refused, steps)
    assert own.capture is not None  # of it the programs were cut
    differs = apart(model, plan, own.capture.changes, every=True)  # as the workers put it
    return run.model_copy(update={"baseline_why": kept.alone_why, "batch_norm": differs})


class _Captures:
    """A model's forward, captured once for each number of micro-batches."""

    def __init__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.model, self.args, self.kwargs = model, args, kwargs
        self.found: dict[int, UnitGraph] = {}

    def split(self, name: str, plan: Plan) -> Split:
        """``plan``, cut.

        Raises:
            ShardwrightError: the forward is not the one that was planned.
        """
        count = plan.microbatches
        if count not in self.found:
            inputs = microbatch(self.args, self.kwargs, count)
            self.found[count] = trace(self.model, *inputs, train=plan.train, units=units_of(plan, self.model))
        capture = self.found[count]
        check_all_called(capture, plan)
        return Split(name, plan, sendable(cut(capture, plan), train=plan.train), capture.output_places, capture)


def _measured(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    own: Split,
    rivals: list[Split],
    steps: int,
    tell: Progress,
    kept: _Kept,
) -> _Measured:
    """Compare and time ``own`` beside its ``rivals`` and one device, in workers that are ended afterwards.

    What is ``kept`` is not found out again, and what is found out is put there.
    """
    plan, splits = own.plan, [own, *rivals]
    baseline = plan.predicted.baseline_device
    expected = max(plan.predicted.baseline_s or 0.0, *(split.plan.predicted.step_s for split in splits))
    devices = _devices_of(plan, {device for split in splits for device in split.plan.devices})
    with tempfile.TemporaryDirectory() as folder, Pool(devices) as pool:
        tell("start workers", 0, 1)
        session = Session(pool, model, args, kwargs, splits, STEP_LIMIT_S + 5 * expected)
        session.begin(devices, str(Path(folder) / "store"))
        gate = Gate(session, plan, baseline, stays=bool(rivals))
        tell("compare", 0, len(splits))
        equality = _pass(session, gate, own, kept)
        baseline = gate.device
        for number, rival in enumerate(rivals, 1):
            tell("compare", number, len(splits))
            if rival.name not in kept.refused:
                with _named(rival):
                    _admit(session, gate, rival, kept)
        tell("compare", len(splits), len(splits))
        pacing = Pacing(partial(session.paces, plan.paces))
        contenders: dict[str, Callable[[], float]] = {PLAN: partial(session.step, own)}
        if baseline:
            count = plan.predicted.baseline_microbatches
            session.hold_whole(baseline, count, own.output_places, plan)
            contenders[ALONE] = partial(session.step_whole, baseline, plan.predicted.baseline_s)
        ready = [rival for rival in rivals if rival.name not in kept.refused]
        contenders |= {rival.name: _stepping(session, rival) for rival in ready}
        contenders = {name: pacing.beside(name, step) for name, step in contenders.items()}
        noted: list[list[Noted]] = []
        after = spread_over(steps, NOTED_STEPS)

        def between(number: int) -> None:
            tell("time", number + 1, WARMUP_STEPS + steps)
            if number in after:
                noted.append(session.note(own))

        tell("time", 0, WARMUP_STEPS + steps)
        bounded = {rival.name: steps_in_row(rival.plan.predicted.step_s) for rival in ready}
        seconds = in_turn(contenders, steps, bounded=bounded, limit_s=NAIVE_LIMIT_S, between=between)
    slower = {name: {d: s / plan.paces[d] for d, s in pacing.of(name).items()} for name in contenders}
    return _Measured(equality, kept.peaks, seconds, noted, slower)


def _pass(session: Session, gate: Gate, own: Split, kept: _Kept) -> Equality:
    """Have the plan held, compared and weighed; with its optimizer's state, and the whole model's if that stays.

    Raises:
        ShardwrightError: it gives other results than the model.
    """
    session.hold(own)
    found = session.check(own) if kept.equality is None else None
    session.step(own)  # the optimizer's state comes with it
    kept.peaks = kept.peaks or session.weigh(own)  # before anything else is held
    if gate.device is not None and (why := _no_room_alone(own.plan, gate.device, session.room())):
        kept.alone_why, gate.device = why, None
    if found is not None:
        try:
            kept.equality = gate.compared(own, found)
        except DifferenceError as error:
            raise ShardwrightError(f"{error}; {gate.first_difference(own, found)}; nothing was timed") from error
    elif gate.stays:
        gate.prepare(own)
    assert kept.equality is not None
    return kept.equality


def _admit(session: Session, gate: Gate, rival: Split, kept: _Kept) -> None:
    """Have ``rival`` held, and compared unless it was; or let go of it, with the reason why it is not to be timed."""
    known = rival.name in kept.admitted
    if not known and (why := _lacks_room(rival, session.room())):
        kept.refused[rival.name] = why
        return
    session.hold(rival)
    found = None if known else session.check(rival)
    session.step(rival)  # likewise
    try:
        if found is not None:
            gate.compared(rival, found)
        kept.admitted.add(rival.name)
    except WorkerError:
        raise
    except ShardwrightError as error:  # it differs, or there is no room left to compare it
        kept.refused[rival.name] = str(error)
        session.release(rival)


def _no_room_alone(plan: Plan, device: str, free: Mapping[str, int]) -> str:
    """Why the whole model cannot be held on ``device`` beside what is there, by what the stages take together."""
    needed = sum(plan.memory().values()) // plan.replicas
    if needed <= free[device]:
        return ""
    there = free[device]
    return f"the whole model needs some {needed:,} bytes on {device} beside the plan's stage, and {there:,} are free"


def _lacks_room(rival: Split, free: Mapping[str, int]) -> str:
    """Why ``rival`` cannot be held beside what is there; CPU workers share their host's memory."""
    needed = rival.plan.memory()
    on_cpu = sum(size for device, size in needed.items() if device.startswith("cpu"))
    for device, size in needed.items():
        wanted = on_cpu if device.startswith("cpu") else size
        if wanted > free[device]:
            return f"it needs {wanted:,} bytes on {device} beside the plan and the model, and {free[device]:,} are free"
    return ""


@contextmanager
def _named(rival: Split) -> Iterator[None]:
    """What fails in this block is of ``rival``: an error that is raised leaves it out, a worker's death ends all."""
    try:
        yield
    except WorkerError as error:
        if error.detail and not error.died:
            raise _SplitFailedError(rival.name, str(error)) from error
        error.args = (f"{error} (in a step of the split {rival.name}, which --no-naive leaves out)",)
        raise


def _stepping(session: Session, rival: Split) -> Callable[[], float]:
    def step() -> float:
        with _named(rival):
            return session.step(rival)

    return step


def _devices_of(plan: Plan, needed: set[str]) -> list[Device]:
    """The devices of a run, that of the baseline with them."""
    if plan.predicted.baseline_device:
        needed = needed | {plan.predicted.baseline_device}
    named = [name for name in plan.profiled_devices if name in needed] or list(plan.devices)
    # The cores are shared out as they were for the profile, or its times would not hold.
    return list(_found(plan, named, beside=plan.profiled_devices))


def _record(plan: Plan, measured: _Measured, rivals: Mapping[str, Plan], why: Mapping[str, str], steps: int) -> Run:
    """What was measured, beside what was predicted."""
    seconds = measured.seconds
    baseline = plan.predicted.baseline_device if ALONE in seconds else None
    naive = []
    for alternative in plan.alternatives:
        if alternative.name in why:
            naive.append(not_measured(alternative, why[alternative.name]))
        elif alternative.name in rivals:
            own, rival = seconds[alternative.name], rivals[alternative.name]
            timed = _timed_as(own, rival, measured.slower[alternative.name])
            naive.append(
                Naive(
                    name=alternative.name,  # type: ignore[arg-type]  # data parallel is no rival
                    devices=rival.devices,
                    microbatches=rival.microbatches,
                    steps=len(own),
                    timed=timed,
                )
            )
    return Run(
        model=plan.model,
        batch=plan.batch,
        train=plan.train,
        devices=plan.devices,
        replicas=plan.replicas,
        schedule=plan.schedule,
        microbatches=plan.microbatches,
        steps=steps,
        equality=measured.equality,
        sharded=_timed_as(seconds[PLAN], plan, measured.slower[PLAN]),
        baseline_device=baseline,
        baseline=_timed_alone(plan, measured) if baseline else None,
        paces=tuple(
            Paced(device=device, profiled_s=plan.paces[device], measured_s=plan.paces[device] * slower)
            for device, slower in measured.slower[PLAN].items()
            if device in plan.devices
        ),
        memory=tuple(
            Weighed(device=device, predicted_bytes=predicted, measured_bytes=peak)
            for (device, predicted), peak in zip(plan.memory().items(), measured.peaks, strict=True)
        ),
        accounts=accounts_of(plan, measured.noted),
        naive=tuple(naive),
    )


def _timed_as(seconds: list[float], plan: Plan, slower: Mapping[str, float]) -> Timed:
    """The steps of ``plan``, whose devices computed so many times as slowly as in the profile."""
    foreseen_s = at_pace(plan, slower) if slower.keys() & set(plan.devices) else None
    return _timed(seconds, plan.predicted.step_s, foreseen_s)


def _timed_alone(plan: Plan, measured: _Measured) -> Timed:
    """Those of the baseline, on one device."""
    predicted_s, slower = plan.predicted.baseline_s, measured.slower[ALONE]
    factor = slower.get(plan.predicted.baseline_device or "")
    foreseen_s = factor * predicted_s if factor is not None and predicted_s is not None else None
    return _timed(measured.seconds[ALONE], predicted_s, foreseen_s)


def _found(plan: Plan, names: Sequence[str], *, beside: Sequence[str] = ()) -> tuple[Device, ...]:
    """The devices to run on; a plan for a cluster is run where the cluster is."""
    try:
        return find_devices(names, beside=beside)
    except ShardwrightError as error:
        if not plan.declared_devices:
            raise
        raise ShardwrightError(
            f"the plan is for {', '.join(plan.declared_devices)} of a cluster file, which are not here: {error}; run "
            "it where they are, or check it here with `verify`"
        ) from error


def _timed(seconds: list[float], predicted_s: float | None, at_pace_s: float | None) -> Timed:
    low, median, high = np.percentile(seconds, [25, 50, 75])
    return Timed(predicted_s=predicted_s, measured_s=float(median), spread_s=float(high - low), at_pace_s=at_pace_s)
