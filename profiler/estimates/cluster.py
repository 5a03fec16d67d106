"""Clusters that are declared instead of found: ``cluster.toml`` and the catalogue of common devices and links.

A cluster has devices with their memory and peak rates, and links between them. A device is given by its model, which
the catalogue knows, by figures of its own, or by both, where its own go before::

    [[devices]]
    names = ["cuda:0", "cuda:1"]
    model = "H100 SXM"
    node = "a"                         # the host's name; without one, all are in the same

    [links]
    within = "NVLink 4"                # a kind of the catalogue, for two devices of one node
    between = "400 Gb InfiniBand"      # likewise, for two nodes

    [[links.pairs]]
    devices = ["cuda:0", "cuda:1"]     # these two have figures of their own, in both directions
    latency_s = 10e-6
    bandwidth_bytes_per_s = 200e9
"""

from __future__ import annotations

from itertools import permutations
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, NonNegativeFloat, PositiveFloat, model_validator

from shardwright.errors import ShardwrightError
from shardwright.files import Record
from shardwright.profiler.devices import CUDA_RESERVE, parse_devices
from shardwright.profiler.estimates.catalogue import DeviceModel, Dtype, LinkKind, Rates, catalogue, read_toml
from shardwright.profiler.profile import Device, Link
from shardwright.profiler.sizes import parse_bytes

__all__ = ["Cluster", "load_cluster"]


NO_LIMIT = 2**62
"""Memory of a device whose own is to be found out."""


class _DeclaredDevices(Record):
    """One entry of ``devices``: one device, or several alike."""

    name: str = ""
    names: tuple[str, ...] = ()
    model: str = ""
    node: str = ""
    memory: str | int | None = None
    memory_bytes_per_s: PositiveFloat | None = None
    peak_flops: dict[Dtype, PositiveFloat] = Field(default_factory=dict)
    host_latency_s: NonNegativeFloat | None = None
    host_bandwidth_bytes_per_s: PositiveFloat | None = None
    in_host_memory: bool = False

    @model_validator(mode="after")
    def _is_named_once(self) -> Self:
        if bool(self.name) == bool(self.names):
            raise ValueError('write either name = "cuda:0" or names = ["cuda:0", "cuda:1"]')
        return self

    @property
    def all_names(self) -> tuple[str, ...]:
        return self.names or (self.name,)

    @property
    def has_figures(self) -> bool:
        return bool(self.model or self.memory_bytes_per_s or self.peak_flops)


class _DeclaredPair(Record):
    """The link of two devices, by a kind or by figures, in both directions."""

    devices: tuple[str, str]
    kind: str = ""
    latency_s: NonNegativeFloat | None = None
    bandwidth_bytes_per_s: PositiveFloat | None = None

    @model_validator(mode="after")
    def _is_complete(self) -> Self:
        figures = self.latency_s is not None and self.bandwidth_bytes_per_s is not None
        if not self.kind and not figures:
            raise ValueError("give a kind, or latency_s and bandwidth_bytes_per_s")
        return self


class _DeclaredLinks(Record):
    within: str = ""
    between: str = ""
    pairs: tuple[_DeclaredPair, ...] = ()


class _Declared(Record):
    """A cluster file as it is written."""

    devices: tuple[_DeclaredDevices, ...] = Field(min_length=1)
    links: _DeclaredLinks = _DeclaredLinks()


class Cluster(Record):
    """A cluster, read and completed from the catalogue."""

    path: str
    devices: tuple[Device, ...]
    """In the order of the file. Those that are to be measured, for the file gives no figures, are not ``declared``."""
    rates: dict[str, Rates]
    """Of each declared device."""
    links: tuple[Link, ...]
    """Of every ordered pair that the file gives a link for."""

    def is_as_catalogued(self, device: Device) -> bool:
        """Whether a device is of a model of the catalogue, with no rates of its own in its place."""
        model = catalogue().device(device.model) if device.model else None
        own = self.rates.get(device.name)
        return model is not None and own == Rates(
            peak_flops=model.peak_flops, memory_bytes_per_s=model.memory_bytes_per_s
        )

    @property
    def here(self) -> tuple[str, ...]:
        """The names of the devices that are to be found on this machine."""
        return tuple(device.name for device in self.devices if not device.declared)


def load_cluster(path: str | Path) -> Cluster:
    """Read a cluster file.

    Raises:
        ShardwrightError: the file is missing or no TOML, has a key that is unknown or wrong, names a device twice, a
            model or a link that the catalogue does not have, or leaves out a figure.
    """
    path = Path(path)
    declared = read_toml(path, _Declared)
    names = [name for entry in declared.devices for name in entry.all_names]
    try:
        parse_devices(names)
    except ShardwrightError as error:
        raise ShardwrightError(f"{path}: devices: {error}") from error
    devices: list[Device] = []
    rates: dict[str, Rates] = {}
    for entry in declared.devices:
        figures = _rates(path, entry) if entry.has_figures else None
        for name in entry.all_names:
            devices.append(_device(path, entry, name))
            if figures is not None:
                rates[name] = figures
    return Cluster(path=str(path), devices=tuple(devices), rates=rates, links=_links(path, declared.links, devices))


def _device(path: Path, entry: _DeclaredDevices, name: str) -> Device:
    """The record of one device; memory, unless given, is the model's without what the driver keeps."""
    model = _model(path, entry)
    kind: Literal["cpu", "cuda"] = "cuda" if name.startswith("cuda") else "cpu"
    if entry.memory is not None:
        try:
            memory = parse_bytes(entry.memory)
        except ShardwrightError as error:
            raise ShardwrightError(f"{path}: memory of {name}: {error}") from error
    elif model is not None:
        memory = int(parse_bytes(model.memory) * (1 - CUDA_RESERVE))
    elif entry.has_figures:
        raise ShardwrightError(f'{path}: {name} has no memory; write for example memory = "24GiB"')
    else:
        memory = NO_LIMIT  # it is measured here, where its memory is found out
    host = catalogue().link(model.host_link) if model is not None else None
    return Device(
        name=name,
        kind=kind,
        description=model.model if model is not None else "declared",
        memory_bytes=memory,
        node=entry.node,
        model=model.model if model is not None else "",
        declared=entry.has_figures,
        fetch_bytes_per_s=host.bandwidth_bytes_per_s if host is not None else None,
        host_latency_s=entry.host_latency_s,
        host_bandwidth_bytes_per_s=entry.host_bandwidth_bytes_per_s,
        in_host_memory=entry.in_host_memory,
    )


def _model(path: Path, entry: _DeclaredDevices) -> DeviceModel | None:
    """The catalogue's entry of the named model, if one is named."""
    model = catalogue().device(entry.model) if entry.model else None
    if entry.model and model is None:
        known = ", ".join(device.model for device in catalogue().devices)
        raise ShardwrightError(
            f"{path}: {entry.all_names[0]} has model {entry.model!r}, which the catalogue does not have; it has "
            f"{known}: use one of them, or leave out the model and give memory, memory_bytes_per_s and peak_flops"
        )
    return model


def _rates(path: Path, entry: _DeclaredDevices) -> Rates:
    """The model's rates, with the entry's own in their place."""
    model = _model(path, entry)
    peak_flops = (model.peak_flops if model is not None else {}) | entry.peak_flops
    bandwidth = entry.memory_bytes_per_s or (model.memory_bytes_per_s if model is not None else None)
    name = entry.all_names[0]
    if bandwidth is None:
        raise ShardwrightError(
            f"{path}: {name} has no memory_bytes_per_s; give its memory's bandwidth, such as 936e9, or a model"
        )
    if not peak_flops:
        raise ShardwrightError(
            f"{path}: {name} has no peak_flops; give its rates by dtype, such as peak_flops = {{ float32 = 35.6e12 }}, "
            "or a model"
        )
    return Rates(peak_flops=peak_flops, memory_bytes_per_s=bandwidth)


def _links(path: Path, links: _DeclaredLinks, devices: list[Device]) -> tuple[Link, ...]:
    """The links between all ordered pairs: a pair's own, else by whether both are in one node."""
    own = {}
    for pair in links.pairs:
        unknown = [name for name in pair.devices if name not in {device.name for device in devices}]
        if unknown or pair.devices[0] == pair.devices[1]:
            raise ShardwrightError(
                f"{path}: links.pairs has {' and '.join(pair.devices)}; name two devices of the file: "
                f"{', '.join(device.name for device in devices)}"
            )
        latency, bandwidth = pair.latency_s, pair.bandwidth_bytes_per_s
        if pair.kind:
            kind = _kind(path, "links.pairs", pair.kind)
            latency = kind.latency_s if latency is None else latency
            bandwidth = kind.bandwidth_bytes_per_s if bandwidth is None else bandwidth
        own[frozenset(pair.devices)] = latency, bandwidth
    made = []
    for source, target in permutations(devices, 2):
        figures = own.get(frozenset((source.name, target.name)))
        if figures is None:
            key = "within" if source.node == target.node else "between"
            named = getattr(links, key)
            if not named:
                if source.declared or target.declared:
                    where = f"node {source.node!r}" if key == "within" else f"nodes {source.node!r} and {target.node!r}"
                    raise ShardwrightError(
                        f"{path}: no link between {source.name} and {target.name} ({where}); write under [links] "
                        f"{key} = one of {', '.join(repr(link.kind) for link in catalogue().links)}"
                    )
                continue  # both are here, where their link is measured
            kind = _kind(path, f"links.{key}", named)
            figures = kind.latency_s, kind.bandwidth_bytes_per_s
        made.append(
            Link(
                source=source.name,
                target=target.name,
                latency_s=figures[0] or 0.0,
                bandwidth_bytes_per_s=figures[1] or 0.0,
                origin="estimated",
            )
        )
    return tuple(made)


def _kind(path: Path, key: str, name: str) -> LinkKind:
    kind = catalogue().link(name)
    if kind is None:
        known = ", ".join(repr(link.kind) for link in catalogue().links)
        raise ShardwrightError(
            f"{path}: {key}: the catalogue has no link {name!r}; use one of {known}, or give the pair latency_s and "
            "bandwidth_bytes_per_s"
        )
    return kind
