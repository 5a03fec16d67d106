"""From a cost graph to the ledger of its memory: what each node takes, and the storages between nodes.

A tensor that is a view of an earlier one holds nothing itself, but its readers keep the earlier one's storage. Inputs
and weights are held for the whole step and are counted apart.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from shardwright.profiler.costgraph import CostGraph
from shardwright.sharder.planning.formulation.memory import Gradient, Ledger, Step, Storage

__all__ = ["ledger_of"]


def ledger_of(graph: CostGraph, block_of: Mapping[str, int]) -> Ledger:
    """The ledger of ``graph``, whose nodes are in the order of the forward."""
    place = {name: position for position, name in enumerate(graph)}
    tensors = {n: t for n, t in graph.graph["tensors"].items() if _is_made(graph, t["maker"])}
    readers: dict[str, list[int]] = {name: [] for name in tensors}
    for _, target, data in graph.edges():
        for name in readers.keys() & data["tensors"].keys():
            readers[name].append(place[target])
    readers = {name: sorted(positions) for name, positions in readers.items()}
    storages = _storages(graph, tensors, readers, place)
    waiting = _waiting(graph, tensors, readers)
    gradients = [
        Gradient(waiting[name], tuple(readers[name]), place[tensor["maker"]], waiting[name])
        for name, tensor in tensors.items()
        if waiting[name] and readers[name]
    ]
    for nodes, size, added in graph.graph["waiting"]:
        gradients.append(Gradient(size, tuple(sorted(place[node] for node in nodes)), None, added))
    return Ledger(_steps(graph, block_of, storages, gradients), storages, tuple(gradients))


def _is_made(graph: CostGraph, node: str) -> bool:
    """Whether what comes from ``node`` is made in the forward; inputs and weights are there from before."""
    return node in graph and graph.nodes[node]["kind"] in ("unit", "glue")


def _steps(
    graph: CostGraph,
    block_of: Mapping[str, int],
    storages: tuple[Storage, ...],
    gradients: list[Gradient],
) -> tuple[Step, ...]:
    """What each node takes: counted, and never less than what it leaves."""
    left = [graph.nodes[name]["saved_bytes"] for name in graph]
    for storage in storages:
        if storage.saver != storage.maker:
            left[storage.maker] += storage.size
            if storage.saver is not None:
                left[storage.saver] -= storage.size
    handed = [0] * len(left)
    for gradient in gradients:
        if gradient.maker is not None:
            handed[gradient.readers[-1]] += gradient.size
    return tuple(
        Step(
            block=block_of[name],
            saved=graph.nodes[name]["saved_bytes"],
            forward=max(0, left[position]) + graph.nodes[name]["forward_peak_bytes"],
            backward=max(handed[position], graph.nodes[name]["backward_peak_bytes"]),
            update=graph.nodes[name]["update_peak_bytes"].get("cpu", 0),
            update_left=graph.nodes[name]["update_left_bytes"],
            update_together=graph.nodes[name]["update_peak_bytes"].get("cuda", 0),
            deferred=graph.nodes[name].get("deferred_bytes") or 0,
            gradient=graph.nodes[name]["grad_bytes"],
        )
        for position, name in enumerate(graph)
    )


def _storages(
    graph: CostGraph, tensors: Mapping[str, Any], readers: Mapping[str, list[int]], place: Mapping[str, int]
) -> tuple[Storage, ...]:
    """Each storage once, with the readers of all tensors that have it."""
    every = {name: set(readers[name]) for name, tensor in tensors.items() if not tensor["storage"]}
    for name, tensor in tensors.items():
        if tensor["storage"] in every:
            every[tensor["storage"]] |= set(readers[name])
    outputs = {position for name, position in place.items() if graph.nodes[name]["kind"] == "output"}
    return tuple(
        Storage(
            size=tensors[name]["held_bytes"],
            maker=place[tensors[name]["maker"]],
            readers=tuple(sorted(found)),
            saver=place.get(tensors[name]["saver"]),
            returned=bool(found & outputs),
        )
        for name, found in every.items()
        if tensors[name]["held_bytes"]
    )


def _waiting(graph: CostGraph, tensors: Mapping[str, Any], readers: Mapping[str, list[int]]) -> dict[str, int]:
    """By tensor: bytes of its gradient. Where one node hands several of its inputs the same storage, as an addition
    does, the one that was made first holds it: its maker is the last to run backward.
    """
    held = {name: tensor["gradient_bytes"] for name, tensor in tensors.items()}
    read: dict[int, list[str]] = {}
    for name in tensors:  # in the order in which they are made
        for position in readers[name]:
            read.setdefault(position, []).append(name)
    for position, node in enumerate(graph):
        made = graph.nodes[node]["input_gradient_bytes"]
        names = read.get(position, [])
        surplus = 0 if made is None else sum(held[name] for name in names) - made
        for name in reversed(names[1:]):
            if surplus > 0 and len(readers[name]) == 1:
                shared = min(surplus, held[name])
                held[name] -= shared
                surplus -= shared
    return held
