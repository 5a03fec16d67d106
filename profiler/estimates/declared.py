"""Devices that are declared: which of a cluster's devices are here, and the times of those that are not.

A declared device takes the times of a measured one of the same model as they are, and of a measured one whose peaks are
known by the ratio of what the roofline gives for both: such times are *scaled*. Else the roofline gives them, and they
are *estimated*: with the efficiencies that are assumed, and with a time an operator that is fitted to any device that
was measured, for it is the host that launches operators.
"""

from __future__ import annotations

import itertools
import socket
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from shardwright.errors import ShardwrightError
from shardwright.profiler.capture import Progress
from shardwright.profiler.devices import find_devices
from shardwright.profiler.estimates.catalogue import Rates, catalogue, model_of
from shardwright.profiler.estimates.cluster import Cluster, load_cluster
from shardwright.profiler.estimates.estimate import (
    ASSUMED,
    NOMINAL,
    Demand,
    Efficiency,
    Fit,
    demand_of,
    fit,
    roofline_s,
)
from shardwright.profiler.estimates.on_gpu import as_on_gpu
from shardwright.profiler.estimates.workload import Mode, Workloads
from shardwright.profiler.graph import OF_HOST
from shardwright.profiler.measuring.timed import timed_steps
from shardwright.profiler.profile import Device, Estimate, Link, Measurement, Origin
from shardwright.profiler.recording.operations import Operation
from shardwright.profiler.recording.unitgraph import UnitGraph

__all__ = ["DeclaredTimes", "Site", "find_site"]


@dataclass(frozen=True)
class DeclaredTimes:
    """What stands for measurements."""

    measurements: tuple[Measurement, ...] = ()
    estimates: tuple[Estimate, ...] = ()


@dataclass(frozen=True)
class _StepDemand:
    forward: Demand
    backward: Demand
    update: Demand

    @property
    def phases(self) -> dict[str, Demand]:
        """By the name of a phase's time in a measurement."""
        return {"forward_s": self.forward, "backward_s": self.backward, "update_s": self.update}


_Demands = Mapping[tuple[str, int], _StepDemand]
"""By step and number of micro-batches, in the order of the profile's measurements."""


@dataclass(frozen=True)
class _Reference:
    """A device that was measured, and what its times say."""

    device: Device
    times: Mapping[tuple[str, int], Measurement]
    rates: Rates | None
    """Its peaks, if the catalogue has them."""
    fit: Fit


@dataclass(frozen=True)
class Site:
    """Where a model is profiled: devices that were found on this machine, and devices that a cluster file declares."""

    devices: tuple[Device, ...]
    cluster: Cluster | None = None

    @property
    def found(self) -> tuple[Device, ...]:
        """The devices that are here, to be measured."""
        return tuple(device for device in self.devices if not device.declared)

    def links(self, measured: Sequence[Link]) -> tuple[Link, ...]:
        """The measured links, and the declared ones of the other pairs."""
        pairs = {(link.source, link.target) for link in measured}
        declared = self.cluster.links if self.cluster is not None else ()
        return (*measured, *(link for link in declared if (link.source, link.target) not in pairs))

    def declared_times(
        self,
        captures: Mapping[int, UnitGraph],
        measurements: Sequence[Measurement],
        *,
        train: bool,
        optimizer: str,
        tell: Progress,
    ) -> DeclaredTimes:
        """Times of every step on every device that is not here.

        Args:
            captures: by number of micro-batches.
            measurements: of the devices that were found.

        Raises:
            ShardwrightError: a step cannot be seen without its values, or computes in a dtype that a device has no rate
                for.
        """
        declared = [device for device in self.devices if device.declared]
        if self.cluster is None or not declared:
            return DeclaredTimes()
        kinds = {device.kind for device in self.devices}
        demands = _demands(captures, kinds, train=train, optimizer=optimizer, tell=tell)
        references = [_reference(device, measurements, demands[device.kind]) for device in self.found]
        rows: list[Measurement] = []
        estimates = []
        for device in declared:
            reference = _best_reference(device, references)
            as_catalogued = self.cluster.is_as_catalogued(device)
            if reference is not None and as_catalogued and reference.device.model == device.model:
                taken = {"device": device.name, "source": "scaled"}
                rows += [measurement.model_copy(update=taken) for measurement in reference.times.values()]
                continue
            try:
                rows += _computed(device, self.cluster.rates[device.name], demands, reference)
            except ShardwrightError as error:
                raise ShardwrightError(f"{self.cluster.path}: {device.name}: {error}") from error
            estimates.append(_estimate(device.name, reference))
        return DeclaredTimes(tuple(rows), tuple(estimates))


def find_site(cluster: str | Path | None, devices: Sequence[str] | None) -> Site:
    """The devices of a cluster file, those that are here found out, or without one the named devices of this machine.

    A device without figures has to be here. One of a model is here if its node is this host, or none is given, and
    the GPU of that name is of that model. Rates of a device's own always stand for a device elsewhere.

    Raises:
        ShardwrightError: both are given, or a device that the file gives no figures for is not here.
    """
    if cluster is None:
        return Site(find_devices(devices))
    if devices is not None:
        raise ShardwrightError("a cluster file names the devices; give it without --devices")
    read = load_cluster(cluster)
    names = [device.name for device in read.devices if not device.declared or _is_here(device, read)]
    try:
        found = {device.name: device for device in find_devices(names)} if names else {}
    except ShardwrightError as error:
        raise ShardwrightError(
            f"{cluster}: {error}; or give the devices that are not here a model, or figures of their own"
        ) from error
    return Site(tuple(_merged(device, found.get(device.name)) for device in read.devices), read)


def _merged(declared: Device, found: Device | None) -> Device:
    """A device of the cluster; one that was found with its node, model and way to the host, and no more memory."""
    if found is None:
        return declared
    memory = min(found.memory_bytes, declared.memory_bytes)
    given = {key: getattr(declared, key) for key in ("node", "model", *OF_HOST)}
    return found.model_copy(update=given | {"memory_bytes": memory})


def _is_here(device: Device, cluster: Cluster) -> bool:
    if not cluster.is_as_catalogued(device):
        return False
    if device.kind != "cuda" or device.node not in ("", socket.gethostname()) or not torch.cuda.is_available():
        return False
    index = int(device.name.partition(":")[2])
    if index >= torch.cuda.device_count():
        return False
    model = model_of(torch.cuda.get_device_name(index))
    return model is not None and model.model == device.model


def _demands(
    captures: Mapping[int, UnitGraph], kinds: Iterable[str], *, train: bool, optimizer: str, tell: Progress
) -> dict[str, _Demands]:
    """By kind of device, what every step that is timed asks for.

    The update, one a batch, is the same at each number of micro-batches.
    """
    steps = {
        count: {step.name: step for step in timed_steps(capture, train=train, accumulate=count > 1)}
        for count, capture in captures.items()
    }
    workloads = Workloads()
    demands: dict[str, dict[tuple[str, int], _StepDemand]] = {kind: {} for kind in kinds}
    for done, name in enumerate(steps[1]):
        tell("estimate", done, len(steps[1]))
        updates: dict[str, tuple[Operation, ...]] = {}
        for kind, count in itertools.product(demands, sorted(captures)):
            call = steps[count][name].call
            assert call is not None  # as all that are timed have
            updated = optimizer if train and kind not in updates else ""
            mode = Mode(train, updated, accumulate=count > 1, foreach=True, kind=kind)
            try:
                workload = workloads.of(call, mode)
            except ShardwrightError as error:
                raise ShardwrightError(f"{name}: {error}") from error
            phases = (workload.forward, workload.backward, updates.setdefault(kind, workload.update))
            run = (as_on_gpu(phase) if kind == "cuda" else phase for phase in phases)
            demands[kind][name, count] = _StepDemand(*map(demand_of, run))
    tell("estimate", len(steps[1]), len(steps[1]))
    return dict(demands)


def _reference(device: Device, measurements: Sequence[Measurement], demands: _Demands) -> _Reference:
    """Fit a measured device; its forwards and backwards, for updates depend on how its optimizer goes about them."""
    times = {(m.node, m.microbatches): m for m in measurements if m.device == device.name}
    model = catalogue().device(device.model) if device.model else model_of(device.description)
    timed = [key for key in demands if key in times]
    made = fit(
        [demand for key in timed for demand in (demands[key].forward, demands[key].backward)],
        [seconds for key in timed for seconds in (times[key].forward_s, times[key].backward_s)],
        model or NOMINAL,
    )
    known = device.model_copy(update={"model": model.model}) if model is not None else device
    return _Reference(known, times, model, made)


def _best_reference(device: Device, references: Sequence[_Reference]) -> _Reference | None:
    """The measured device that says most: one of the same model, else one whose peaks are known, else the first."""
    same = [r for r in references if device.model and r.device.model == device.model]
    known = [r for r in references if r.rates is not None]
    return next(iter([*same, *known, *references]), None)


def _efficiency(reference: _Reference | None) -> Efficiency:
    """What is counted on: all that was fitted where the peaks are known, else the time an operator only."""
    if reference is None:
        return ASSUMED
    if reference.rates is None:
        return replace(ASSUMED, operation_s=reference.fit.efficiency.operation_s)
    return reference.fit.efficiency


def _estimate(device: str, reference: _Reference | None) -> Estimate:
    efficiency = _efficiency(reference)
    return Estimate(
        device=device,
        compute_efficiency=efficiency.compute,
        memory_efficiency=efficiency.memory,
        operation_s=efficiency.operation_s,
        fitted_to=reference.device.name if reference is not None else "",
        efficiencies_fitted=reference is not None and reference.rates is not None,
        median_error=reference.fit.median_error if reference is not None else None,
    )


def _computed(
    device: Device, rates: Rates, demands: Mapping[str, _Demands], reference: _Reference | None
) -> list[Measurement]:
    """Times on the roofline, corrected by how far the reference device is from its own."""
    efficiency = _efficiency(reference)
    corrects = reference is not None and reference.rates is not None
    source: Origin = "scaled" if corrects else "estimated"
    rows = []
    for key, demand in demands[device.kind].items():
        times = {name: roofline_s(phase, rates, efficiency) for name, phase in demand.phases.items()}
        if reference is not None and reference.rates is not None and key in reference.times:
            for name, phase in demands[reference.device.kind][key].phases.items():
                own = roofline_s(phase, reference.rates, efficiency)
                times[name] *= getattr(reference.times[key], name) / own if own else 1.0
        rows.append(
            Measurement(
                node=key[0],
                device=device.name,
                microbatches=key[1],
                repeats=0,
                forward_spread_s=0.0,
                backward_spread_s=0.0,
                source=source,
                forward_s=times["forward_s"],
                backward_s=times["backward_s"],
                update_s=times["update_s"],
            )
        )
    return rows
