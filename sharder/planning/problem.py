r"""The planning problem, free of torch and of names: integers, bit masks and seconds.

Given blocks v (nodes that must stay together) with predecessors, devices d, and tensors t made by one block and read
by others; choose an order of devices and a chain of predecessor-closed sets {} = I0 < I1 < ... < IS = all, so that
stage s = Is \ Is-1 runs on the s-th device, has a unit and fits the memory, and the largest load is least:

    load(s) = M * (compute(s) + transfer in + transfer out) + update(s)        seconds of one step of M micro-batches
    memory(s) = static(s) + in_flight(s) * (saved(s) + received(s)) + largest output(s)

Transfers are relayed, as the pipeline engine does it: a tensor still needed later crosses every cut between its
producer and its last reader, forward as an activation and backward as a gradient, and costs both ends of the link.
"""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import networkx as nx

from shardwright.errors import ShardwrightError
from shardwright.profiler.profile import NodeKind

__all__ = ["Block", "Crossing", "Problem", "Schedule", "bits", "in_flight", "parse_bytes", "problem_from_graph"]

Schedule = Literal["1f1b", "gpipe"]

_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
_UNITS |= {"k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40, "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}


def parse_bytes(text: str | int) -> int:
    """``"10GiB"``, ``"500 MB"`` or a plain number of bytes as an integer.

    Raises:
        ShardwrightError: the text is not a positive size.
    """
    compact = str(text).lower().replace(" ", "")
    digits = compact.rstrip("abcdefghijklmnopqrstuvwxyz")
    try:
        number = int(digits) if digits.isdecimal() else float(digits)
        size = int(number * _UNITS[compact[len(digits) :]])
    except (KeyError, ValueError, OverflowError):
        size = 0
    if size <= 0:
        raise ShardwrightError(f"{text!r} is not a size in bytes; write for example 10GiB, 800MiB or 2000000")
    return size


def in_flight(schedule: Schedule, microbatches: int, stages_after: int) -> int:
    """Micro-batches whose saved tensors a stage holds at once (Narayanan et al., SC 2021, section 2.2)."""
    return microbatches if schedule == "gpipe" else min(microbatches, stages_after + 1)


def bits(mask: int) -> Iterator[int]:
    """The positions of the ones in ``mask``."""
    while mask:
        lowest = mask & -mask
        yield lowest.bit_length() - 1
        mask ^= lowest


@dataclass(frozen=True)
class Block:
    """Nodes of the cost graph that share a stage; times are of one micro-batch on each device."""

    nodes: tuple[str, ...]
    forward_s: tuple[float, ...]
    backward_s: tuple[float, ...]
    update_s: tuple[float, ...]
    static_bytes: int
    saved_bytes: int
    output_bytes: int
    """The largest output of one of its nodes: room that a step needs beside what it keeps."""
    units: tuple[str, ...]
    """Module paths of the units among the nodes; a stage has at least one."""
    allowed: tuple[bool, ...]
    """By device: False where a pin forbids it."""


@dataclass(frozen=True)
class Crossing:
    """A tensor between blocks: it crosses each cut that has its producer before and one of its readers after."""

    name: str
    producer: int
    readers: int
    """Bit mask of blocks."""
    forward_bytes: int
    backward_bytes: int


@dataclass(frozen=True)
class Problem:
    """Blocks in a topological order, tensors between them, devices and links."""

    blocks: tuple[Block, ...]
    predecessors: tuple[int, ...]
    """By block: bit mask of the blocks that come before it."""
    crossings: tuple[Crossing, ...]
    devices: tuple[str, ...]
    caps: tuple[int, ...]
    links: tuple[tuple[tuple[float, float], ...], ...]
    """``links[a][b]`` = (latency in s, bandwidth in bytes/s)."""
    microbatches: int
    schedule: Schedule = "1f1b"

    @property
    def most_stages(self) -> int:
        """Stages that the devices allow, and the schedule: 1F1B needs a micro-batch for every stage."""
        return min(len(self.devices), self.microbatches) if self.schedule == "1f1b" else len(self.devices)

    def work_s(self, block: int, device: int) -> float:
        """Seconds of compute that ``block`` costs ``device`` in one step."""
        b = self.blocks[block]
        return self.microbatches * (b.forward_s[device] + b.backward_s[device]) + b.update_s[device]

    def crossing(self, closed: int) -> list[Crossing]:
        """The tensors that cross the cut after the predecessor-closed set ``closed``."""
        return [c for c in self.crossings if closed >> c.producer & 1 and c.readers & ~closed]

    def transfer_s(self, tensors: Iterable[Crossing], source: int, target: int) -> tuple[float, float]:
        """Seconds that one micro-batch's ``tensors`` take from ``source`` to ``target``, and their gradients back."""
        there, back = self.links[source][target], self.links[target][source]
        forward = backward = 0.0
        for tensor in tensors:
            forward += there[0] + tensor.forward_bytes / there[1]
            if tensor.backward_bytes:
                backward += back[0] + tensor.backward_bytes / back[1]
        return forward, backward

    def alone(self, device: int) -> Problem:
        """The same work on one device and no other, pins lifted."""
        blocks = (
            dataclasses.replace(
                b,
                forward_s=(b.forward_s[device],),
                backward_s=(b.backward_s[device],),
                update_s=(b.update_s[device],),
                allowed=(True,),
            )
            for b in self.blocks
        )
        return dataclasses.replace(
            self,
            blocks=tuple(blocks),
            devices=(self.devices[device],),
            caps=(self.caps[device],),
            links=((self.links[device][device],),),
        )

    def memory_bytes(self, members: int, received: Iterable[Crossing], stages_after: int) -> int:
        """Peak bytes of a stage of the blocks in ``members`` with ``stages_after`` stages behind it."""
        blocks = [self.blocks[v] for v in bits(members)]
        kept = sum(b.saved_bytes for b in blocks) + sum(c.forward_bytes for c in received)
        held = in_flight(self.schedule, self.microbatches, stages_after)
        return sum(b.static_bytes for b in blocks) + held * kept + max((b.output_bytes for b in blocks), default=0)


def _of_kind(graph: nx.DiGraph[str], kind: NodeKind) -> list[str]:
    return [name for name, data in graph.nodes(data=True) if data["kind"] == kind]


def _groups(graph: nx.DiGraph[str]) -> list[set[str]]:
    """Sets of nodes that must share a stage: inputs together, parameters with their readers, and ``colocate``."""
    groups: list[set[str]] = [set(_of_kind(graph, "input"))]
    groups += [{n, *graph.successors(n)} for n in _of_kind(graph, "parameter")]
    groups += [set(group) for group in graph.graph.get("colocate", ())]
    merged: nx.Graph[str] = nx.Graph()
    merged.add_nodes_from(graph)
    for group in groups:
        nx.add_path(merged, sorted(group))
    return [set(component) for component in nx.connected_components(merged)]


def _blocks(graph: nx.DiGraph[str]) -> tuple[list[tuple[str, ...]], list[set[int]]]:
    """Convex groups of nodes in a topological order, and for each the indices of those before it.

    A group that must stay together takes with it every node on a path between its members: the strongly connected
    components of the quotient graph are exactly those convex hulls.
    """
    position = {name: i for i, name in enumerate(graph)}
    groups = _groups(graph)
    group_of = {name: i for i, group in enumerate(groups) for name in group}
    quotient: nx.DiGraph[int] = nx.DiGraph()
    quotient.add_nodes_from(range(len(groups)))
    quotient.add_edges_from((group_of[a], group_of[b]) for a, b in graph.edges if group_of[a] != group_of[b])
    # Inputs enter at the first stage and the outputs leave at the last one.
    for name in _of_kind(graph, "input")[:1]:
        quotient.add_edges_from((group_of[name], g) for g in range(len(groups)) if g != group_of[name])
    for name in _of_kind(graph, "output"):
        quotient.add_edges_from((g, group_of[name]) for g in range(len(groups)) if g != group_of[name])
    hulls: nx.DiGraph[int] = nx.condensation(quotient)
    members = {
        hull: tuple(sorted((n for g in data["members"] for n in groups[g]), key=position.__getitem__))
        for hull, data in hulls.nodes(data=True)
    }
    order = list(nx.lexicographical_topological_sort(hulls, key=lambda hull: position[members[hull][0]]))
    index = {hull: i for i, hull in enumerate(order)}
    return [members[h] for h in order], [{index[p] for p in hulls.predecessors(h)} for h in order]


def _allowed(
    graph: nx.DiGraph[str], nodes: tuple[str, ...], devices: tuple[str, ...], pins: Mapping[str, str]
) -> tuple[bool, ...]:
    """Which devices the pins leave for a block of ``nodes``."""
    wanted = {
        device: name
        for pattern, device in pins.items()
        for name in (graph.nodes[node].get("unit") or node for node in nodes)
        if fnmatch.fnmatchcase(name, pattern)
    }
    if len(wanted) > 1:
        (one, a), (other, b) = list(wanted.items())[:2]
        if a == b:
            raise ShardwrightError(f"pins put {a} on both {one} and {other}; keep one of them")
        raise ShardwrightError(
            f"pins put {a} on {one} and {b} on {other}, but the two must share a device; pin them alike"
        )
    return tuple(not wanted or device in wanted for device in devices)


def _check_pins(graph: nx.DiGraph[str], devices: tuple[str, ...], pins: Mapping[str, str]) -> None:
    """Refuse a pin that names nothing."""
    names = [data.get("unit") or name for name, data in graph.nodes(data=True)]
    for pattern, device in pins.items():
        if device not in devices:
            raise ShardwrightError(
                f"pin {pattern}={device}: unknown device {device}; the profile has {', '.join(devices)}"
            )
        if not any(fnmatch.fnmatchcase(name, pattern) for name in names):
            raise ShardwrightError(f"pin {pattern}={device}: no unit matches {pattern!r}; `profile` lists the units")


def problem_from_graph(
    graph: nx.DiGraph[str],
    *,
    devices: Iterable[str] | None = None,
    memory: Mapping[str, str | int] | None = None,
    pins: Mapping[str, str] | None = None,
    schedule: Schedule = "1f1b",
) -> Problem:
    """Make the planning problem of a cost graph (attributes: :mod:`shardwright.profiler.graph`).

    Args:
        graph: node, edge and graph attributes as documented there.
        devices: which of the graph's devices to use; all by default.
        memory: caps in bytes, or text such as ``"10GiB"``, that replace the devices' own.
        pins: unit name or pattern -> device.
        schedule: ``"1f1b"`` or ``"gpipe"``; it decides how many micro-batches a stage holds at once.

    Raises:
        ShardwrightError: a device, a link, or a unit named in ``memory`` or ``pins`` is not in the graph.
    """
    known: dict[str, Any] = graph.graph["devices"]
    names = tuple(devices) if devices is not None else tuple(known)
    memory, pins = memory or {}, pins or {}
    for name in [*names, *memory]:
        if name not in known:
            raise ShardwrightError(f"unknown device {name}; the profile has {', '.join(known)}")
    if not names or len(set(names)) < len(names):
        raise ShardwrightError(f"devices must be named once each, and at least one; got {', '.join(names) or 'none'}")
    if not _of_kind(graph, "unit"):
        raise ShardwrightError("the cost graph has no unit to place")
    for node in (n for group in graph.graph.get("colocate", ()) for n in group):
        if node not in graph:
            raise ShardwrightError(f"colocate names {node}, which is not in the cost graph")
    if not nx.is_directed_acyclic_graph(graph):
        raise ShardwrightError("the cost graph has a cycle; a forward has none")
    _check_pins(graph, names, pins)

    links = graph.graph["links"]
    for a in names:
        for b in names:
            if a != b and (a, b) not in links:
                raise ShardwrightError(f"the profile has no link from {a} to {b}; profile with both devices")

    members, before = _blocks(graph)
    data = graph.nodes
    for node in graph:
        times = data[node]["forward_s"]
        missing = [device for device in names if times and device not in times]
        if missing:
            raise ShardwrightError(f"the profile has no time of {node} on {missing[0]}; profile again with that device")
    blocks = tuple(
        Block(
            nodes=nodes,
            forward_s=tuple(sum(data[n]["forward_s"].get(d, 0.0) for n in nodes) for d in names),
            backward_s=tuple(sum(data[n]["backward_s"].get(d, 0.0) for n in nodes) for d in names),
            update_s=tuple(sum(data[n]["update_s"].get(d, 0.0) for n in nodes) for d in names),
            static_bytes=sum(data[n]["static_bytes"] for n in nodes),
            saved_bytes=sum(data[n]["saved_bytes"] for n in nodes),
            output_bytes=max(data[n]["output_bytes"] for n in nodes),
            units=tuple(data[n].get("unit") or n for n in nodes if data[n]["kind"] == "unit"),
            allowed=_allowed(graph, nodes, names, pins),
        )
        for nodes in members
    )
    block_of = {name: i for i, nodes in enumerate(members) for name in nodes}
    return Problem(
        blocks=blocks,
        predecessors=tuple(sum(1 << p for p in set_) for set_ in before),
        crossings=_crossings(graph, block_of),
        devices=names,
        caps=tuple(parse_bytes(memory.get(d, known[d]["memory_bytes"])) for d in names),
        links=tuple(tuple(links[a, b] if a != b else (0.0, float("inf")) for b in names) for a in names),
        microbatches=graph.graph["microbatches"],
        schedule=schedule,
    )


def _crossings(graph: nx.DiGraph[str], block_of: Mapping[str, int]) -> tuple[Crossing, ...]:
    """The tensors that leave their block, each once with all its readers."""
    found: dict[str, Crossing] = {}
    for source, target, data in graph.edges(data=True):
        producer, reader = block_of[source], block_of[target]
        if producer == reader:
            continue
        for name, (forward, backward) in data["tensors"].items():
            readers = (found[name].readers if name in found else 0) | 1 << reader
            found[name] = Crossing(name, producer, readers, forward, backward)
    return tuple(found.values())
