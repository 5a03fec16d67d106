"""Devices and links that somebody gave, as attributes of a graph."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from shardwright.errors import ShardwrightError
from shardwright.profiler.costgraph import CostGraph
from shardwright.profiler.formats.given import rate, refuse_misspelt, seconds, whole
from shardwright.profiler.graph import OPTIONAL
from shardwright.profiler.profile import Device, Link, Variation

__all__ = ["AMPLE_BYTES", "devices_of", "links_of", "variations_of"]

AMPLE_BYTES = 2**60
"""The memory of a device of which nothing is said: more than any has."""

_TIMES = ("forward_s", "backward_s", "update_s")
_OF_DEVICES = ("kind", "memory_bytes", "fetch_bytes_per_s", "variation", *OPTIONAL)


def devices_of(graph: CostGraph) -> tuple[Device, ...]:
    """The devices that a nested cost graph lists, or else those that its times name."""
    given = graph.graph.get("devices")
    if given is None:
        times = [data[key] for data in graph.nodes.values() for key in _TIMES if key in data]
        given = list(dict.fromkeys(device for time in times if isinstance(time, Mapping) for device in time))
    if isinstance(given, str) or not isinstance(given, Iterable):
        raise ShardwrightError(f"graph attribute devices is {given!r}; give their names, or a dict by name")
    known: Mapping[str, Any] = given if isinstance(given, Mapping) else {name: {} for name in given}
    if not known:
        raise ShardwrightError("no device is named; give the graph attribute devices, such as ['cuda:0', 'cuda:1']")
    return tuple(_device(str(name), facts) for name, facts in known.items())


def _device(name: str, facts: Any) -> Device:
    where = f"device {name}"
    if not isinstance(facts, Mapping):
        raise ShardwrightError(f"{where} has {facts!r}; give a dict, such as {{'memory_bytes': 80e9}}")
    refuse_misspelt(where, facts, _OF_DEVICES, strict=True)
    prefix = name.partition(":")[0]
    kind = facts.get("kind", prefix if prefix in ("cpu", "cuda") else "other")
    if kind not in ("cpu", "cuda", "other"):
        raise ShardwrightError(f"{where}: kind is {kind!r}; the kinds are cpu, cuda, other")
    memory_bytes = whole(f"{where}: memory_bytes", facts.get("memory_bytes", AMPLE_BYTES))
    if not memory_bytes:
        raise ShardwrightError(f"{where}: memory_bytes is 0; give what a plan may use there, or leave the device out")
    fetch, latency_s = facts.get("fetch_bytes_per_s"), facts.get("host_latency_s")
    bandwidth = facts.get("host_bandwidth_bytes_per_s")
    return Device(
        name=name,
        kind=kind,
        description="",
        memory_bytes=memory_bytes,
        fetch_bytes_per_s=None if fetch is None else rate(f"{where}: fetch_bytes_per_s", fetch),
        host_latency_s=None if latency_s is None else seconds(f"{where}: host_latency_s", latency_s),
        host_bandwidth_bytes_per_s=None
        if bandwidth is None
        else rate(f"{where}: host_bandwidth_bytes_per_s", bandwidth),
        in_host_memory=bool(facts.get("in_host_memory", False)),
        engine_s=seconds(f"{where}: engine_s", facts.get("engine_s", 0.0)),
    )


def variations_of(devices: Any) -> tuple[Variation, ...]:
    """How the devices' speeds vary, where the graph attribute ``devices`` says so."""
    facts = devices.items() if isinstance(devices, Mapping) else ()
    varied = {str(name): of_device.get("variation") for name, of_device in facts}
    for name, relative in varied.items():
        if relative is not None and (isinstance(relative, str) or not isinstance(relative, Iterable)):
            raise ShardwrightError(
                f"device {name}: variation is {relative!r}; give times relative to the median, as [0.98, 1.0, 1.05]"
            )
    return tuple(
        Variation(device=name, relative=tuple(rate(f"device {name}: variation", r) for r in relative))
        for name, relative in varied.items()
        if relative
    )


def links_of(given: Any, names: Sequence[str]) -> tuple[Link, ...]:
    """The links of every ordered pair; none where transfers take no time."""
    if not given:
        return ()
    pairs = list(itertools.permutations(names, 2))
    by_pair = given if isinstance(given, Mapping) else dict.fromkeys(pairs, given)
    known = set(pairs)
    for pair in by_pair:
        if pair not in known:
            raise ShardwrightError(f"graph attribute links has {pair!r}, not a pair of the devices {', '.join(names)}")
    if all(by_pair.get(pair) == (0.0, math.inf) for pair in pairs):
        return ()
    links = []
    for source, target in pairs:
        where = f"link {source} -> {target}"
        if (source, target) not in by_pair:
            raise ShardwrightError(f"{where} is missing; give every ordered pair, or no link for free transfers")
        link = by_pair[source, target]
        if not isinstance(link, Sequence) or len(link) != 2:
            raise ShardwrightError(f"{where} is {link!r}; give (latency in s, bandwidth in bytes/s)")
        latency_s, bandwidth = seconds(f"{where}: latency", link[0]), rate(f"{where}: bandwidth", link[1])
        links.append(Link(source=source, target=target, latency_s=latency_s, bandwidth_bytes_per_s=bandwidth))
    return tuple(links)
