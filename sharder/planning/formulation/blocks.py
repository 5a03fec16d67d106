"""From a cost graph to the planning problem: groups become convex blocks, edges become tensors that cross, and
parameters with several users become ties.

A node that only holds a tied parameter, a buffer or a constant stays with its first reader. The other readers have a
copy in their own stage, so that its edges to them neither order the stages nor move anything.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from shardwright.errors import ShardwrightError
from shardwright.profiler.costgraph import CostGraph
from shardwright.profiler.ordering import connected_groups, strong_components, topological_order
from shardwright.profiler.profile import NodeKind
from shardwright.profiler.shared_updates import Updates, once_each, shared_of
from shardwright.profiler.sizes import parse_bytes
from shardwright.sharder.planning.formulation.ledger import ledger_of
from shardwright.sharder.planning.formulation.patterns import Pinned, matching
from shardwright.sharder.planning.formulation.together import groups_together
from shardwright.sharder.planning.problem import Block, Crossing, Link, Problem, Recompute, Schedule, Tie, Transfers

if TYPE_CHECKING:
    import networkx as nx

__all__ = ["parse_bytes", "problem_from_graph"]


def _of_kind(graph: CostGraph, kind: NodeKind) -> list[str]:
    return [name for name, data in graph.nodes.items() if data["kind"] == kind]


def _own_copies(graph: CostGraph) -> dict[str, list[str]]:
    """Parameter nodes of which each stage that reads them has a copy -> their readers, in the order of the forward.

    These are buffers and constants, and parameters whose readers are all users of one tie by the parameter's name.
    """
    position = {name: i for i, name in enumerate(graph)}
    users = {name: set(nodes) for name, nodes, *_ in graph.graph.get("ties", ())}
    return {
        node: readers
        for node in _of_kind(graph, "parameter")
        if (readers := sorted(graph.successors(node), key=position.__getitem__))
        and (graph.nodes[node]["copied"] or users.get(graph.nodes[node].get("unit") or node, set()).issuperset(readers))
    }


def _updates(graph: CostGraph) -> Updates:
    """Of nodes, and of the copies of what several use, in the order of the graph's ties.

    What no unit holds was timed with the node of the parameter, which is where its first reader is.
    """
    data = graph.nodes
    holders = {data[n].get("unit") or n: n for n in _of_kind(graph, "parameter") if any(data[n]["update_s"].values())}
    ties = [(name, users, gradient_bytes) for name, users, _, gradient_bytes in graph.graph.get("ties", ())]
    shared = shared_of(ties, graph, holders)
    return once_each(
        {n: data[n]["update_s"] for n in graph},
        {n: data[n]["grad_bytes"] for n in graph},
        shared,
        {n: data[n].get("unit") or n for n in _of_kind(graph, "unit")},
    )


def _ties(
    graph: CostGraph,
    own: Mapping[str, list[str]],
    block_of: Mapping[str, int],
    copies: Sequence[Mapping[str, float]],
    devices: Sequence[str],
) -> tuple[Tie, ...]:
    """The ties with users in several blocks; buffers and constants are ties whose copies have nothing to sum."""
    position = {name: i for i, name in enumerate(graph)}
    ties = []
    for (name, nodes, copy_bytes, gradient), copy in zip(graph.graph.get("ties", ()), copies, strict=True):
        users = [block_of[user] for user in sorted(nodes, key=position.__getitem__)]
        update_s = tuple(copy.get(device, 0.0) for device in devices) if copy else ()
        ties.append(Tie(name, sum(1 << v for v in {*users}), users[0], copy_bytes, gradient, update_s))
    for node, readers in own.items():
        if graph.nodes[node]["copied"]:
            users = [block_of[reader] for reader in readers]
            ties.append(Tie(node, sum(1 << v for v in {*users}), users[0], graph.nodes[node]["static_bytes"], 0))
    return tuple(tie for tie in ties if tie.users.bit_count() > 1)


def _groups(graph: CostGraph) -> list[set[str]]:
    """Sets of nodes that must share a stage: inputs together, parameters with their readers, and ``colocate``."""
    groups: list[set[str]] = [set(_of_kind(graph, "input"))]
    groups += [{n, *graph.successors(n)} for n in _of_kind(graph, "parameter")]
    groups += [set(group) for group in graph.graph.get("colocate", ())]
    return connected_groups(graph, map(list, groups))


def _blocks(graph: CostGraph, *, chain: bool) -> tuple[list[tuple[str, ...]], list[set[int]]]:
    """Convex groups of nodes in a topological order, and for each the indices of those before it.

    In a chain of stages a group that must stay together takes with it every node on a path between its members: the
    strongly connected components of the quotient graph are exactly those convex hulls. Where no ``chain`` is wanted it
    does not: groups are in the order of their first nodes, and what one reads of a later one orders nothing.
    """
    position = {name: i for i, name in enumerate(graph)}
    groups = _groups(graph)
    if not chain:
        return _loose_blocks(graph, groups, position)
    group_of = {name: i for i, group in enumerate(groups) for name in group}
    after: list[set[int]] = [set() for _ in groups]
    for maker, reader, _ in graph.edges():
        after[group_of[maker]].add(group_of[reader])
    # Inputs enter at the first stage and the outputs leave at the last one.
    for name in _of_kind(graph, "input")[:1]:
        after[group_of[name]].update(range(len(groups)))
    for name in _of_kind(graph, "output"):
        for targets in after:
            targets.add(group_of[name])
    hulls = strong_components(after)
    members = [tuple(sorted((n for g in hull for n in groups[g]), key=position.__getitem__)) for hull in hulls]
    hull_of = {g: i for i, hull in enumerate(hulls) for g in hull}
    behind = {i: {hull_of[target] for g in hull for target in after[g]} - {i} for i, hull in enumerate(hulls)}
    order = topological_order(behind, lambda hull: position[members[hull][0]])
    index = {hull: i for i, hull in enumerate(order)}
    before: list[set[int]] = [set() for _ in hulls]
    for hull, targets in behind.items():
        for target in targets:
            before[index[target]].add(index[hull])
    return [members[hull] for hull in order], before


def _loose_blocks(
    graph: CostGraph, groups: Iterable[Iterable[str]], position: Mapping[str, int]
) -> tuple[list[tuple[str, ...]], list[set[int]]]:
    members = sorted((tuple(sorted(group, key=position.__getitem__)) for group in groups), key=lambda g: position[g[0]])
    block_of = {name: i for i, nodes in enumerate(members) for name in nodes}
    before: list[set[int]] = [set() for _ in members]
    for maker, reader, _ in graph.edges():
        if block_of[maker] < block_of[reader]:
            before[block_of[reader]].add(block_of[maker])
    return members, before


def _seconds(times: list[Mapping[str, float]], devices: tuple[str, ...]) -> tuple[float, ...]:
    """By device: the sum of ``times``, each of one node by device; nodes that take no time have none."""
    rows = [tuple(map(row.get, devices, itertools.repeat(0.0))) for row in times if row]
    if len(rows) == 1:
        return rows[0]
    return tuple(map(sum, zip(*rows, strict=True))) if rows else (0.0,) * len(devices)


def _again_s(nodes: list[dict[str, Any]], devices: tuple[str, ...]) -> tuple[float, ...]:
    """By device: a forward of ``nodes`` that keeps nothing; a node of which none is known takes its forward."""
    known = [node.get("recompute_s") for node in nodes]
    if not any(known):
        return ()
    return _seconds([again or node["forward_s"] for again, node in zip(known, nodes, strict=True)], devices)


def _parts_s(nodes: list[dict[str, Any]], devices: tuple[str, ...]) -> tuple[tuple[float, float], ...]:
    """By device: the two parts of the backward of ``nodes``; nothing where those of one with a backward lack."""
    parts = [(node.get("backward_input_s") or {}, node.get("backward_weight_s") or {}) for node in nodes]
    for node, (inputs, weights) in zip(nodes, parts, strict=True):
        timed = [device for device in devices if node["backward_s"].get(device)]
        if not (inputs.keys() >= set(timed) and weights.keys() >= set(timed)):
            return ()
    return tuple(zip(*(_seconds([each[part] for each in parts], devices) for part in (0, 1)), strict=True))


def _wanted(graph: CostGraph, nodes: tuple[str, ...], pinned: Pinned, cut: CostGraph) -> str | None:
    """The device that the pins put a block of ``nodes`` on, as the groups of ``cut`` made it; None where they say
    nothing of it."""
    if not pinned:
        return None
    wanted = {
        device: name
        for device, units in pinned
        for name in (graph.nodes[node].get("unit") or node for node in nodes)
        if name in units
    }
    if len(wanted) > 1:
        (one, a), (other, b) = list(wanted.items())[:2]
        if a == b:
            raise ShardwrightError(f"pins put {a} on both {one} and {other}; keep one of them")
        alike = {name: number for number, group in enumerate(_groups(cut)) for name in group}
        share = len({alike[node] for node in nodes if (graph.nodes[node].get("unit") or node) in (a, b)}) == 1
        between = "" if share else ", as what lies between units that share one does in a chain of stages"
        raise ShardwrightError(
            f"pins put {a} on {one} and {b} on {other}, but the two must share a device{between}; pin them alike"
        )
    return next(iter(wanted), None)


def _allowed(devices: tuple[str, ...], wanted: str | None, unfit: tuple[bool, ...]) -> tuple[bool, ...]:
    """Which devices the pin of a block leaves, and it fits on."""
    if wanted is None:
        return tuple(map(operator.not_, unfit))
    return tuple(device == wanted and not lacks for device, lacks in zip(devices, unfit, strict=True))


def _unfit(graph: CostGraph, nodes: tuple[str, ...], devices: tuple[str, ...]) -> tuple[bool, ...]:
    """Which devices one of ``nodes`` did not fit on, even alone."""
    found = {device for node in nodes for device in graph.nodes[node].get("unfit", ())}
    return tuple(device in found for device in devices) if found else (False,) * len(devices)


def _pinned(graph: CostGraph, devices: tuple[str, ...], pins: Mapping[str, str]) -> Pinned:
    """What each pin names; one that names nothing is refused."""
    found = []
    for pattern, device in pins.items():
        if device not in devices:
            raise ShardwrightError(
                f"pin {pattern}={device}: unknown device {device}; the profile has {', '.join(devices)}"
            )
        if not (units := matching(graph, pattern)):
            raise ShardwrightError(f"pin {pattern}={device}: no unit matches {pattern!r}; `profile` lists the units")
        found.append((device, units))
    return found


def _check(graph: CostGraph, devices: tuple[str, ...]) -> None:
    """Refuse a graph with a part missing."""
    if not _of_kind(graph, "unit"):
        raise ShardwrightError("the cost graph has no unit to place")
    groups = [("colocate", group) for group in graph.graph.get("colocate", ())]
    groups += [("ties", users) for _, users, *_ in graph.graph.get("ties", ())]
    for noun, node in ((noun, node) for noun, group in groups for node in group):
        if node not in graph:
            raise ShardwrightError(f"{noun} names {node}, which is not in the cost graph")
    if len(topological_order({name: graph.successors(name) for name in graph}, str)) < len(graph.nodes):
        raise ShardwrightError("the cost graph has a cycle; a forward has none")
    for a, b in itertools.permutations(devices, 2):
        if (a, b) not in graph.graph["links"]:
            raise ShardwrightError(f"the profile has no link from {a} to {b}; profile with both devices")
    needed = set(devices)
    for node, data in graph.nodes.items():
        times, unfit = data["forward_s"], data.get("unfit", ())
        if unfit and all(device in unfit for device in devices):
            name = data.get("unit") or node
            raise ShardwrightError(
                f"{name} fits on none of {', '.join(devices)}, not even alone, at {graph.graph['microbatches']} "
                "micro-batches: divide the batch further, or use a device with more memory"
            )
        missing = [device for device in needed - times.keys() if device not in unfit] if times else []
        if missing:
            first = min(missing, key=devices.index)
            raise ShardwrightError(f"the profile has no time of {node} on {first}; profile again with that device")


def problem_from_graph(
    graph: CostGraph | nx.DiGraph[str],
    *,
    devices: Iterable[str] | None = None,
    memory: Mapping[str, str | int] | None = None,
    pins: Mapping[str, str] | None = None,
    schedule: Schedule = "1f1b",
    transfers: Transfers = "relayed",
    overlap: bool = False,
    together: Iterable[str | Iterable[str]] = (),
    recompute: Recompute = "never",
    chain: bool = True,
) -> Problem:
    """Make the planning problem of a cost graph (attributes: :mod:`shardwright.profiler.graph`).

    Args:
        graph: node, edge and graph attributes as documented there.
        devices: which of the graph's devices to use; all by default.
        memory: caps in bytes, or text such as ``"10GiB"``, that replace the devices' own.
        pins: unit, module or pattern -> device.
        schedule: ``"1f1b"`` or ``"gpipe"``; it decides how many micro-batches a stage holds at once.
        transfers: ``"relayed"``, ``"staged"`` or ``"direct"``; see :mod:`shardwright.sharder.planning.problem`.
        overlap: whether transfers go on beside compute.
        together: units, modules or patterns, or groups of them, whose units must share a device.
        recompute: whether stages are computed anew in the backward, in training.
        chain: whether what lies between units that must share a device has to be there too, as in a chain of stages, or
            for a block to run without a pause. Else blocks may read of later ones.

    Raises:
        ShardwrightError: a device, a link, or a unit named in ``memory``, ``pins`` or ``together`` is not in the graph,
            or units that must share a device are pinned to several.
    """
    if not isinstance(graph, CostGraph):
        graph = CostGraph.of(graph)
    known: dict[str, Any] = graph.graph["devices"]
    names = tuple(devices) if devices is not None else tuple(known)
    memory, pins = memory or {}, pins or {}
    for name in [*names, *memory]:
        if name not in known:
            raise ShardwrightError(f"unknown device {name}; the profile has {', '.join(known)}")
    if not names or len(set(names)) < len(names):
        raise ShardwrightError(f"devices must be named once each, and at least one; got {', '.join(names) or 'none'}")
    _check(graph, names)
    pinned = _pinned(graph, names, pins)

    own = _own_copies(graph)
    groups = groups_together(graph, together, pinned)
    cut = graph
    if own or groups:
        copied = ((node, reader) for node, readers in own.items() for reader in readers[1:])
        cut = graph.changed({"colocate": (*graph.graph.get("colocate", ()), *groups)}, without=copied)
    members, before = _blocks(cut, chain=chain)
    data, updates = graph.nodes, _updates(graph)
    unfit = [_unfit(graph, nodes, names) for nodes in members]
    wanted = [_wanted(graph, nodes, pinned, cut) for nodes in members]
    blocks = tuple(
        Block(
            nodes=nodes,
            forward_s=_seconds([data[n]["forward_s"] for n in nodes], names),
            backward_s=_seconds([data[n]["backward_s"] for n in nodes], names),
            update_s=_seconds([updates.own[n] for n in nodes], names),
            static_bytes=sum(data[n]["static_bytes"] for n in nodes),
            units=tuple(data[n].get("unit") or n for n in nodes if data[n]["kind"] == "unit"),
            allowed=_allowed(names, device, lacking),
            unfit=lacking,
            pinned=device is not None,
            recompute_s=_again_s([data[n] for n in nodes], names),
            parts_s=_parts_s([data[n] for n in nodes], names),
        )
        for nodes, lacking, device in zip(members, unfit, wanted, strict=True)
    )
    block_of = {name: i for i, nodes in enumerate(members) for name in nodes}
    problem = Problem(
        blocks=blocks,
        predecessors=tuple(sum(1 << p for p in set_) for set_ in before),
        crossings=_crossings(cut, block_of),
        ties=_ties(graph, own, block_of, updates.copies, names),
        devices=names,
        caps=tuple(parse_bytes(memory.get(d, known[d]["memory_bytes"])) for d in names),
        links=tuple(tuple(graph.graph["links"][a, b] if a != b else (0.0, float("inf")) for b in names) for a in names),
        microbatches=graph.graph["microbatches"],
        schedule=schedule,
        ledger=ledger_of(cut, block_of),
        updates_together=tuple(known[d]["kind"] == "cuda" for d in names),
        transfers=transfers,
        overlap=overlap,
        recompute=recompute if graph.graph["train"] else "never",
        engine_s=tuple(known[d].get("engine_s", 0.0) for d in names),
    )
    ways = [_to_host(known[d]) for d in names]
    if not any(ways):
        return problem
    hosts = tuple((way, way) if way else by_links for way, by_links in zip(ways, problem.ways, strict=True))
    return dataclasses.replace(problem, hosts=hosts)


def _to_host(device: Mapping[str, Any]) -> Link | None:
    """The way between a device and the host's memory, where the device says what it is."""
    if device.get("in_host_memory"):
        return 0.0, math.inf
    latency_s, rate = device.get("host_latency_s"), device.get("host_bandwidth_bytes_per_s")
    return None if latency_s is None and rate is None else (latency_s or 0.0, rate or math.inf)


def _crossings(graph: CostGraph, block_of: Mapping[str, int]) -> tuple[Crossing, ...]:
    """The tensors that leave their block, each once with all its readers; none for what has no bytes, as the order
    alone has."""
    found: dict[str, Crossing] = {}
    for source, target, data in graph.edges():
        producer, reader = block_of[source], block_of[target]
        if producer == reader:
            continue
        for name, (forward, backward) in data["tensors"].items():
            if not forward and not backward:
                continue
            readers = (found[name].readers if name in found else 0) | 1 << reader
            found[name] = Crossing(name, producer, readers, forward, backward)
    return tuple(found.values())
