"""The profiler: capture at each micro-batch size, measure every step on every device, weigh, time the links."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from torch import nn

from shardwright.errors import ShardwrightError, kind_of
from shardwright.files import Record
from shardwright.profiler.cache import Cache, default_folder
from shardwright.profiler.campaign import Workers, investigate
from shardwright.profiler.capture import Progress, captures_of, silent
from shardwright.profiler.devices import spare_host_bytes
from shardwright.profiler.estimates.declared import find_site
from shardwright.profiler.links import disk_rate, fetch_rates, measure_engine, measure_links, warn_of_corrupt
from shardwright.profiler.measure import Goal
from shardwright.profiler.measuring.gpu_kernels import kernels_as_on
from shardwright.profiler.measuring.optimizers import OptimizerLike, OptimizerMemory, optimizer_name
from shardwright.profiler.measuring.signature import board_key
from shardwright.profiler.profile import Device, Link, Measurement, Profile
from shardwright.profiler.recall import Request, keep, recall
from shardwright.profiler.recording.inputs import batch_size, check_args, default_counts, input_specs, microbatch
from shardwright.profiler.recording.shapes import shapes_only
from shardwright.profiler.recording.state import Snapshot
from shardwright.profiler.recording.structure import tensors_in
from shardwright.profiler.recording.unitgraph import UnitGraph
from shardwright.profiler.records import count_steps, measurements_of, nodes_of, tensors_of, ties_of
from shardwright.profiler.trace import refuse_lazy
from shardwright.profiler.units import structure_digest

__all__ = ["profile"]


def profile(
    model: nn.Module,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    devices: Sequence[str] | None = None,
    cluster: str | Path | None = None,
    train: bool = True,
    optimizer: OptimizerLike = "adam",
    master_weights: bool = False,
    microbatches: Sequence[int] | None = None,
    depth: int | None = None,
    units: Sequence[str] = (),
    split_backward: bool = False,
    precision: float = 0.02,
    rounds: int = 31,
    budget_s: float = 45.0,
    refresh: bool = False,
    name: str | None = None,
    progress: Progress | None = None,
) -> Profile:
    """Time and weigh every unit of ``model`` on every device, each in a worker process of its own.

    The model is not changed, and needs no values (``sw.empty_weights()``): then each unit gets weights where and while
    it is timed, so that a model larger than this machine can be profiled. All devices measure at once, as they will
    compute at once when the model is split. Work that is equal is measured once, here and in later profiles; a profile
    that was broken off goes on where it was.

    Args:
        args: a batch, as the model is called.
        kwargs: likewise.
        devices: ``["cuda:0", "cpu:0"]``; all CUDA devices by default, or two CPU workers where there is none.
        cluster: a file that declares devices and links instead (see :mod:`shardwright.profiler.estimates.cluster`).
            What is not on this machine is estimated.
        train: measure backward and update too.
        optimizer: one of ``torch.optim`` by its class's name (``"adamw"``, ``"sgd(momentum=0.9)"``), a class of
            optimizers, or a ``functools.partial`` of one.
        master_weights: parameters of lower precision have a copy in fp32 that the optimizer works on; its bytes are
            counted, the copying is not timed.
        microbatches: into how many micro-batches the batch is to be divided; 1, 2, 4 and 8 by default.
        depth: units are the modules so deep in the model, 1 = its own children; by default the children of containers,
            opened where one does too much of the work.
        units: paths of modules, such as ``"decoder.layers.*"``, that are units, whatever they hold.
        split_backward: time each backward in two parts too, up to the gradients of the inputs and those of the weights,
            for zero-bubble schedules; a round takes about a backward longer.
        precision: steps are timed until the 95% confidence interval of each median has this relative half width; those
            that hardly count need not.
        rounds: how often each step is timed, at most.
        budget_s: seconds of measuring after which no further round begins, once there are six.
        refresh: measure also what the cache of earlier measurements knows (:mod:`shardwright.profiler.cache`).
        name: what the profile calls the model; its class by default.
        progress: told what is being done.

    Raises:
        ShardwrightError: the forward fails, a device does not exist, or a worker fails.
    """
    check_args(args)
    kwargs = dict(kwargs or {})
    units = (units,) if isinstance(units, str) else units
    tell = progress or silent
    _check_options(model, train=train, microbatches=microbatches, depth=depth, rounds=rounds, split=split_backward)
    weighed = OptimizerMemory(optimizer_name(optimizer), master_weights=master_weights) if train else None
    batch = batch_size(args, kwargs)
    counts = tuple(sorted({1, *(microbatches if microbatches is not None else default_counts(batch))}))
    site = find_site(cluster, devices)
    found = site.found
    cache = Cache(default_folder(), refresh=refresh)
    optimizer_given = (weighed.name, master_weights) if weighed else ()
    grain = (microbatches is not None, depth, tuple(units))
    disk = "" if train else tempfile.gettempdir()
    how = repr((optimizer_given, grain, precision, rounds, budget_s, _keys(found), disk, *["parted"] * split_backward))

    with shapes_only(model, args, kwargs) as inputs, kernels_as_on(site.devices):
        as_found = Snapshot(model)
        is_plain = site.cluster is None and (weighed is None or "." not in weighed.name.partition("(")[0])
        request = Request(model, *inputs, counts, train, how, is_plain)
        known = recall(request, cache, as_found)
        if known.profile is not None:
            tell("known", len(known.profile.measurements), len(known.profile.measurements))
            return _as_of_now(known.profile, found).model_copy(update={"model": name or type(model).__name__})
        captures, undivided = captures_of(
            model,
            *inputs,
            counts,
            devices=len(site.devices),
            depth=depth,
            units=units,
            train=train,
            strict=microbatches is not None,
            tell=tell,
            found=as_found,
        )
        tell("memory", 0, 1)
        counted = {
            count: count_steps(capture, train=train, parted=split_backward, cache=cache, found=as_found)
            for count, capture in captures.items()
        }
        tell("memory", 1, 1)
    name_of_optimizer = weighed.name if weighed else ""
    goal = Goal(precision=precision, repeats=rounds, budget_s=budget_s)
    pieces = {count: [t for _, t in tensors_in(microbatch(args, kwargs, count))] for count in captures}
    with Workers(found, tell) as workers:
        findings = investigate(
            workers,
            found,
            captures,
            pieces,
            train=train,
            optimizer=name_of_optimizer,
            parted=split_backward,
            goal=goal,
            cache=cache,
            tell=tell,
        )
        around = _surroundings(workers, found, cache, train=train, tell=tell)
    whole = captures[1]
    measured = measurements_of([step.name for step in whole.steps], findings.timings)
    declared = site.declared_times(captures, measured, train=train, optimizer=name_of_optimizer, tell=tell)
    made = Profile(
        model=name or type(model).__name__,
        structure=structure_digest(model),
        inputs=input_specs(args, kwargs),
        batch=batch,
        train=train,
        optimizer=weighed.name if weighed else "none",
        master_weights=master_weights and train,
        torch_version=torch.__version__,
        microbatches=tuple(captures),
        devices=tuple(
            d if d.declared else d.model_copy(update=around.of_device(d.name) | {"pace_s": findings.paces.get(d.name)})
            for d in site.devices
        ),
        links=site.links(around.links),
        nodes=nodes_of(captures, weighed, counted),
        tensors=tensors_of(captures),
        colocate=tuple(whole.colocate),
        ties=ties_of(whole, weighed),
        obstacles=tuple(whole.obstacles),
        guards=tuple(whole.guards),
        undivided=undivided,
        host_bytes=0 if train or declared.measurements else spare_host_bytes(found),
        disk_bytes_per_s=None if declared.measurements else around.disk_bytes_per_s,
        measurements=_in_order(whole, (*measured, *declared.measurements)),
        estimates=declared.estimates,
        misfits=tuple(findings.misfits),
        variations=tuple(findings.variations),
    )
    keep(request, known, captures, made, cache)
    return made


def _as_of_now(profile: Profile, devices: Sequence[Device]) -> Profile:
    """``profile`` with what is free on the devices and on the host today."""
    warn_of_corrupt(profile.links)
    measured = [device.model_dump(include={"fetch_bytes_per_s", "engine_s", "pace_s"}) for device in profile.devices]
    now = [device.model_copy(update=known) for device, known in zip(devices, measured, strict=True)]
    host_bytes = 0 if profile.train else spare_host_bytes(devices)
    return profile.model_copy(update={"devices": tuple(now), "host_bytes": host_bytes})


def _keys(devices: Sequence[Device]) -> list[str]:
    """What times on ``devices`` and their links hold for, when all measure at once."""
    return [f"{device.name} {board_key(device, len(devices))}" for device in devices]


def _check_options(
    model: nn.Module, *, train: bool, microbatches: Sequence[int] | None, depth: int | None, rounds: int, split: bool
) -> None:
    if not isinstance(model, nn.Module):
        raise ShardwrightError(f"the model is {kind_of(model)}; give an nn.Module")
    refuse_lazy(model)
    if train and not any(p.requires_grad for p in model.parameters()):
        raise ShardwrightError("no parameter requires a gradient: there is nothing to train; profile with --inference")
    if split and not train:
        raise ShardwrightError("inference has no backward to be timed in two parts: leave out split_backward, or train")
    if microbatches is not None and not microbatches:
        raise ShardwrightError("no number of micro-batches is named; leave it out for 1, 2, 4 and 8")
    if depth is not None and depth < 1:
        raise ShardwrightError(f"a depth of {depth} holds no unit; 1 = the model's own children")
    if rounds < 1:
        raise ShardwrightError(f"{rounds} rounds measure nothing; use 6 or more")


def _in_order(capture: UnitGraph, measurements: Iterable[Measurement]) -> tuple[Measurement, ...]:
    """In the order of the forward, then of the micro-batches."""
    order = {step.name: position for position, step in enumerate(capture.steps)}
    return tuple(sorted(measurements, key=lambda m: (order[m.node], m.microbatches)))


class _Surroundings(Record):
    """What connects the devices to each other and to the host."""

    links: tuple[Link, ...]
    engine_s: dict[str, float] = Field(default_factory=dict)
    fetch_bytes_per_s: dict[str, float] = Field(default_factory=dict)
    disk_bytes_per_s: float | None = None

    def of_device(self, name: str) -> dict[str, float | None]:
        """What is known of a device beside its links."""
        return {"fetch_bytes_per_s": self.fetch_bytes_per_s.get(name), "engine_s": self.engine_s.get(name, 0.0)}


def _surroundings(
    workers: Workers, devices: Sequence[Device], cache: Cache, *, train: bool, tell: Progress
) -> _Surroundings:
    """Time the links, and in inference how fast weights can be brought in, unless that is known."""
    mode = "training" if train else f"inference {tempfile.gettempdir()}"
    key = f"links and engine {' | '.join(_keys(devices))} {torch.__version__} {mode}"
    known = cache.get(key, _Surroundings)
    if known is not None:
        warn_of_corrupt(known.links)
        return known
    tell("links", 0, 1)
    made = _Surroundings(
        links=measure_links(workers.pool, devices),
        engine_s=measure_engine(workers.pool, devices, train=train),
        fetch_bytes_per_s={} if train else fetch_rates(workers.pool, devices),
        disk_bytes_per_s=None if train else disk_rate(Path(tempfile.gettempdir())),
    )
    warn_of_corrupt(made.links)
    cache.put(key, made)
    tell("links", 1, 1)
    return made
