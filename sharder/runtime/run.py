"""Running a plan: a worker a device, a gate that compares with the unsharded model, then both timed in turn."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from shardwright.errors import ShardwrightError
from shardwright.profiler.campaign import START_LIMIT_S
from shardwright.profiler.capture import Progress, silent
from shardwright.profiler.devices import find_devices
from shardwright.profiler.equality import relative_difference, tolerance
from shardwright.profiler.inputs import microbatch, outputs_of
from shardwright.profiler.links import join
from shardwright.profiler.measure import prepare
from shardwright.profiler.pool import Pool
from shardwright.profiler.profile import Device
from shardwright.profiler.target import load_target
from shardwright.profiler.trace import trace
from shardwright.sharder.planning.plan import Plan
from shardwright.sharder.runtime.accounts import Noted, accounts_of
from shardwright.sharder.runtime.check import check_can_be_piped, check_inputs, check_model, units_of
from shardwright.sharder.runtime.cut import cut
from shardwright.sharder.runtime.engine import sendable, shared_parameters
from shardwright.sharder.runtime.pipeline import (
    Comparison,
    Job,
    check_stage,
    check_whole,
    hold_stages,
    hold_whole,
    note_stage,
    step_stage,
    step_whole,
    weigh_stage,
)
from shardwright.sharder.runtime.record import Equality, Run, Timed, Weighed

__all__ = ["compare", "run"]

STEP_LIMIT_S = 15.0
"""A step that takes so much longer than five times its prediction counts as hung."""
WARMUP_STEPS = 2
NOTED_STEPS = 5
"""At most; they come between those that are timed, which meet no wrapper."""


def run(
    target: str | nn.Module,
    plan: Plan,
    args: tuple[Any, ...] | None = None,
    kwargs: Mapping[str, Any] | None = None,
    *,
    steps: int = 11,
    progress: Progress | None = None,
) -> Run:
    """Run ``plan`` as a pipeline, one worker process a device, and time it against one device.

    First one step of both is compared: outputs and every gradient. Then steps of both are timed in turn, the whole
    step each: forward, backward and update. Between those that are timed a few more steps are noted slot by slot, for
    the accounts. The caller's model is not changed.

    Args:
        target: ``"file.py:Name"``, or the model itself.
        args: the batch; the target's own sample inputs by default.
        kwargs: likewise.
        steps: how many steps of each are timed.

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
    baseline = plan.predicted.baseline_device
    needed = {*plan.devices, *([baseline] if baseline else [])}
    # The cores are shared out as they were for the profile, or its times would not hold.
    others = [name for name in plan.profiled_devices if name in needed or name.startswith("cpu")]
    devices = [device for device in _found(plan, others or list(plan.devices)) if device.name in needed]
    capture = trace(model, *microbatch(args, kwargs, plan.microbatches), train=plan.train, units=units_of(plan, model))
    programs = sendable(cut(capture, plan), train=plan.train)

    job = partial(_job, plan, model, capture.output_places)
    flat = tuple(outputs_of((args, kwargs)))
    expected = max(plan.predicted.step_s, plan.predicted.baseline_s or 0.0)
    limit_s = STEP_LIMIT_S + 5 * expected

    with tempfile.TemporaryDirectory() as folder, Pool(devices) as pool:
        tell("start workers", 0, 1)
        pool.call({d.name: (prepare, (d.name, max(1, len(d.cores)))) for d in devices}, limit_s=START_LIMIT_S)
        ranks = {device: rank for rank, device in enumerate(plan.devices)}
        pool.call({d: (join, (i, len(ranks), str(Path(folder) / "store"))) for d, i in ranks.items()}, limit_s=limit_s)
        mine = {d: programs[i :: len(ranks)] for d, i in ranks.items()}
        pool.call(
            {
                d: (hold_stages, (job(plan.schedule, plan.microbatches), mine[d], flat if i == 0 else ()))
                for d, i in ranks.items()
            },
            limit_s=START_LIMIT_S,
        )
        alone = baseline or plan.devices[0]
        # The gate sums over the same micro-batches; the baseline is then timed as the plan priced it.
        pool.call({alone: (hold_whole, (job("", plan.microbatches), model, args, kwargs))}, limit_s=START_LIMIT_S)
        tell("compare", 0, 1)
        reference: Comparison = pool.call({alone: (check_whole, ())}, limit_s=limit_s)[alone]
        sharded = pool.call(dict.fromkeys(ranks, (check_stage, ())), limit_s=limit_s)
        equality = compare(reference, list(sharded.values()))
        tell("compare", 1, 1)

        if baseline:
            whole = job("", plan.predicted.baseline_microbatches)
            pool.call({baseline: (hold_whole, (whole, model, args, kwargs))}, limit_s=START_LIMIT_S)
        step_s, whole_s, noted = _timed_in_turn(pool, plan.devices, baseline, steps, limit_s, tell)
        peaks = pool.call(dict.fromkeys(ranks, (weigh_stage, ())), limit_s=limit_s)
        tell("time", WARMUP_STEPS + steps, WARMUP_STEPS + steps)

    return Run(
        model=plan.model,
        batch=plan.batch,
        train=plan.train,
        devices=plan.devices,
        schedule=plan.schedule,
        microbatches=plan.microbatches,
        steps=steps,
        equality=equality,
        sharded=_timed(step_s, plan.predicted.step_s),
        baseline_device=baseline,
        baseline=_timed(whole_s, plan.predicted.baseline_s) if baseline else None,
        memory=tuple(
            Weighed(device=device, predicted_bytes=predicted, measured_bytes=peaks[device])
            for device, predicted in plan.memory().items()
        ),
        accounts=accounts_of(plan, noted),
    )


def _timed_in_turn(
    pool: Pool, devices: Sequence[str], baseline: str | None, steps: int, limit_s: float, tell: Progress
) -> tuple[list[float], list[float], list[list[Noted]]]:
    """Seconds of ``steps`` steps on ``devices``, of as many on ``baseline`` alone, and what was noted between."""
    step_s: list[float] = []
    whole_s: list[float] = []
    noted: list[list[Noted]] = []
    for step in range(WARMUP_STEPS + steps):
        tell("time", step, WARMUP_STEPS + steps)
        if baseline:
            whole_s.append(pool.call({baseline: (step_whole, ())}, limit_s=limit_s)[baseline])
        step_s.append(max(pool.call(dict.fromkeys(devices, (step_stage, ())), limit_s=limit_s).values()))
        if step in _noted_after(steps):
            found = pool.call(dict.fromkeys(devices, (note_stage, ())), limit_s=limit_s)
            noted.append([found[device] for device in devices])
    return step_s[WARMUP_STEPS:], whole_s[WARMUP_STEPS:], noted


def _noted_after(steps: int) -> range:
    """After which of ``steps`` timed steps one is noted: spread over them, so that both see the same machine."""
    count = min(NOTED_STEPS, steps)
    return range(WARMUP_STEPS, WARMUP_STEPS + steps, steps // count)[:count]


def _job(plan: Plan, model: nn.Module, output_places: tuple[int, ...], schedule: str, microbatches: int) -> Job:
    """The job of the stages, or with no schedule that of the whole model."""
    ties = shared_parameters(plan, model) if schedule else ()
    units = () if schedule else tuple(units_of(plan, model))
    return Job(
        schedule, microbatches, len(plan.stages), plan.batch, plan.train, plan.optimizer, output_places, ties, units
    )


def _found(plan: Plan, names: Sequence[str]) -> tuple[Device, ...]:
    """The devices to run on; a plan for a cluster is run where the cluster is."""
    try:
        return find_devices(names)
    except ShardwrightError as error:
        if not plan.declared_devices:
            raise
        raise ShardwrightError(
            f"the plan is for {', '.join(plan.declared_devices)} of a cluster file, which are not here: {error}; run "
            "it where they are, or check it here with `verify`"
        ) from error


def _timed(seconds: list[float], predicted_s: float | None) -> Timed:
    low, median, high = np.percentile(seconds, [25, 50, 75])
    return Timed(predicted_s=predicted_s, measured_s=float(median), spread_s=float(high - low))


def compare(reference: Comparison, stages: list[Comparison]) -> Equality:
    """Hold the stages' outputs and gradients against the whole model's.

    Raises:
        ShardwrightError: one differs by more than its dtype explains, or is missing; the worst is named.
    """
    outputs = [t for stage in stages for t in stage.outputs]
    gradients = {name: t for stage in stages for name, t in stage.gradients.items()}
    if len(outputs) != len(reference.outputs):
        raise ShardwrightError(
            f"the pipeline gave {len(outputs)} outputs, the model {len(reference.outputs)}; nothing was timed"
        )
    # A parameter that the loss does not reach has no gradient, or zeros, depending on who asks.
    absent = [n for n, t in reference.gradients.items() if n not in gradients and bool(t.count_nonzero())]
    if absent:
        raise ShardwrightError(f"the pipeline gave no gradient for {absent[0]}, the model did; nothing was timed")
    pairs = [(f"output {i}", a, b) for i, (a, b) in enumerate(zip(reference.outputs, outputs, strict=True))]
    count = len(pairs)
    pairs += [(f"the gradient of {n}", t, gradients[n]) for n, t in reference.gradients.items() if n in gradients]
    errors, largest = [], 0.0
    for name, expected, found in pairs:
        error = relative_difference(expected, found)
        allowed = tolerance(expected.dtype)
        if not error <= allowed:
            raise ShardwrightError(
                f"{name} differs from the unsharded model's by {error:.2g} of its largest value; "
                f"{allowed:.2g} is allowed for {expected.dtype}; nothing was timed"
            )
        errors.append(error)
        largest = max(largest, allowed)
    return Equality(
        outputs=max(errors[:count], default=0.0),
        gradients=max(errors[count:], default=0.0),
        tolerance=largest,
        tensors=len(pairs),
    )
