"""Alternatives: what one would do without a planner, priced from the same costs, so that a plan can be held to them.

    equal count        each device as many units as the others, in the order of the forward
    by parameters   each device as many bytes of weights, gradients and optimizer state
    data parallel      each device the whole model and an equal part of the batch; gradients are summed once a step
    nothing anew       beside a plan with stages that are computed anew: the best split without

Data parallel on D devices takes, with G bytes of gradient, latency l and bandwidth b of the slowest link,

    max over devices of (forward + backward of 1/D of the batch + update)  +  2 (D - 1) (l + G / (D b))

1/D of the batch being one micro-batch where so many were profiled, else ceil(M / D) of a batch's M, one after another,
and the second term a ring that scatters and gathers (Patarasuk and Yuan, JPDC 2009). Libraries that overlap it with
the backward take less.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Literal

import numpy as np

from shardwright.profiler.profile import Profile
from shardwright.sharder.planning.exact.even import NAIVE, naive_split
from shardwright.sharder.planning.formulation.relaxed import unpinned
from shardwright.sharder.planning.partition import Partition
from shardwright.sharder.planning.plan import Alternative, SplitStage
from shardwright.sharder.planning.pricing import Option, price
from shardwright.sharder.planning.problem import Problem
from shardwright.sharder.planning.recorded import split_ties, stage_of_nodes, stages_of
from shardwright.sharder.planning.schedules.draws import drawn
from shardwright.sharder.planning.split_loads import stage_loads

__all__ = [
    "alternatives_of",
    "data_parallel",
    "data_parallel_s",
    "kept_whole",
    "priced_in_parallel",
    "share_of",
    "with_speedups",
]


def alternatives_of(
    problems: Sequence[Problem], every: Sequence[Problem], profile: Profile, baseline_s: float | None
) -> tuple[Alternative, ...]:
    """The alternatives to a split of ``problems``, pins aside; none where there is one device.

    Args:
        problems: at the numbers of micro-batches that a split may have.
        every: at all profiled numbers, of which data parallel takes that of the devices, or a larger one.
        baseline_s: the step of one device.
    """
    if len(problems[0].devices) < 2:
        return ()
    naive = [_naive(name, problems, profile) for name in NAIVE]
    return with_speedups([*naive, data_parallel(every, profile)], baseline_s)


def with_speedups(alternatives: Iterable[Alternative], baseline_s: float | None) -> tuple[Alternative, ...]:
    """With how much each is faster than one device, which takes ``baseline_s`` seconds."""
    return tuple(
        one.model_copy(update={"speedup": baseline_s / one.step_s}) if baseline_s and one.step_s else one
        for one in alternatives
    )


def kept_whole(chosen: Option, options: Iterable[Option], baseline_s: float | None) -> tuple[Alternative, ...]:
    """The best split that keeps all activations, where the chosen one computes some anew by choice."""
    if chosen.problem.recompute != "auto" or not any(chosen.anew):
        return ()
    replicas = chosen.problem.replicas
    plain = [
        option
        for option in options
        if option.problem.stages_per_device == 1  # others: Plan.other_schedule
        and option.problem.schedule != "zero-bubble"
        and len(option.problem.replicas) == len(replicas)
    ]
    others = [kept for option in plain if (kept := option.kept if any(option.anew) else option) is not None]
    best = min(others, key=lambda option: option.step_s, default=None)
    return (
        Alternative(
            name="nothing anew",
            microbatches=(best or chosen).problem.batch_microbatches,
            devices=len((best or chosen).split.stages) * max(1, len(replicas)),
            replicas=max(1, len(replicas)),
            step_s=best.step_s if best else None,
            speedup=baseline_s / best.step_s if best and best.step_s and baseline_s else None,
            why="" if best else chosen.why_none_kept,
        ),
    )


def priced_in_parallel(alternatives: Iterable[Alternative], every: Iterable[Problem]) -> tuple[Problem, float] | None:
    """The one of ``every`` problem that data parallel was priced at, and its step; None where it is not possible."""
    for one in alternatives:
        if one.name == "data parallel" and one.step_s is not None:
            return next(problem for problem in every if problem.microbatches == one.microbatches), one.step_s
    return None


def _naive(name: Literal["equal count", "by parameters"], problems: Sequence[Problem], profile: Profile) -> Alternative:
    """The naive split of that ``name``, at its best number of micro-batches."""
    priced = []
    for problem in map(unpinned, problems):
        stages = naive_split(problem, NAIVE[name])
        loads = stage_loads(problem, stages) if stages else None
        if loads is not None:
            priced.append(price(problem, Partition(stages, max(loads), max(loads), exact=False), profile))
    best = min(priced, key=lambda option: (option.step_s, option.problem.microbatches), default=None)
    if best is None or math.isinf(best.step_s):
        last, why = problems[-1], "a link is not to be used" if priced else "none fits that gives each device a unit"
        devices = min(len(last.devices), len(last.blocks))
        return Alternative(name=name, microbatches=last.microbatches, devices=devices, step_s=None, why=why)
    return Alternative(
        name=name,
        microbatches=best.problem.microbatches,
        devices=len(best.split.stages),
        step_s=best.step_s,
        schedule="gpipe" if best.problem.schedule == "gpipe" else "1f1b",
        stages=_with_nodes(profile, best),
        ties=split_ties(profile, best),
    )


def _with_nodes(profile: Profile, option: Option) -> tuple[SplitStage, ...]:
    """The stages of ``option``, each with its nodes in the order of the forward."""
    stage_of = stage_of_nodes(option)
    nodes: list[list[str]] = [[] for _ in option.split.stages]
    for node in profile.nodes:
        nodes[stage_of[node.name]].append(node.name)
    return tuple(
        SplitStage(**dict(stage), nodes=tuple(own))
        for stage, own in zip(stages_of(profile, option), nodes, strict=True)
    )


def data_parallel(problems: Sequence[Problem], profile: Profile) -> Alternative:
    """The whole model on every device, if it fits, each with its share of the micro-batches: one where that number was
    profiled and fits, else of the size with which the step is shortest.
    """
    devices = len(problems[0].devices)
    shared = [p for p in problems if p.microbatches >= devices]
    fitting = [problem for problem in shared if _fits_everywhere(problem, train=profile.train)]
    fitting = [p for p in fitting if p.microbatches == devices] or fitting
    gradient_bytes = sum(node.grad_bytes for node in profile.nodes) if profile.train else 0
    varied = {variation.device: variation.relative for variation in profile.variations}
    relative = [varied.get(name, ()) for name in problems[0].devices]
    priced = [(data_parallel_s(problem, gradient_bytes, relative), problem.microbatches) for problem in fitting]
    step_s, count = min(priced, default=(math.inf, devices))
    if not math.isinf(step_s):
        return Alternative(name="data parallel", microbatches=count, devices=devices, step_s=step_s)
    why = "a link is not to be used" if priced else "the whole does not fit on each device"
    why = why if shared else f"no profile of 1/{devices} of the batch, or of less"
    return Alternative(name="data parallel", microbatches=devices, devices=devices, step_s=None, why=why)


def share_of(problem: Problem) -> int:
    """Micro-batches of the device that has most of them in data parallel."""
    return -(-problem.microbatches // len(problem.devices))


def _fits_everywhere(problem: Problem, *, train: bool) -> bool:
    """Whether each device holds the whole model with its share; in training with one micro-batch after another."""
    taken: dict[tuple[bool, ...], int] = {}
    schedule = "1f1b" if train else problem.schedule
    for device, cap in enumerate(problem.caps):
        if not all(block.fits_on(device) for block in problem.blocks):
            return False
        kind = problem.updates_together[device : device + 1]
        if kind not in taken:
            alone = dataclasses.replace(problem.alone(device), microbatches=share_of(problem), schedule=schedule)
            taken[kind] = alone.memory_bytes(0, (1 << len(alone.blocks)) - 1, 0, 0)
        if taken[kind] > cap:
            return False
    return True


def data_parallel_s(problem: Problem, gradient_bytes: int, variations: Sequence[Sequence[float]]) -> float:
    """Median seconds of a data-parallel step, in which a device takes its share of the micro-batches of ``problem``.

    Args:
        variations: by device, relative times to draw from, as for
            :func:`~shardwright.sharder.planning.schedules.simulate.expected_step_s`: all wait for the slowest.
    """
    devices = range(len(problem.devices))
    count = share_of(problem)
    work_s = [sum(count * (b.forward_s[d] + b.backward_s[d]) + b.update_s[d] for b in problem.blocks) for d in devices]
    slowest = (np.array(work_s) * drawn(variations)).max(axis=1)
    return float(np.median(slowest)) + _sum_s(problem, gradient_bytes)


def _sum_s(problem: Problem, gradient_bytes: int) -> float:
    """Seconds in which a ring sums the gradients of all devices."""
    count = len(problem.devices)
    if not gradient_bytes or count < 2:
        return 0.0
    links = [problem.links[a][b] for a in range(count) for b in range(count) if a != b]
    return 2 * (count - 1) * max(latency + gradient_bytes / (count * bandwidth) for latency, bandwidth in links)
