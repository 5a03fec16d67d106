"""The cost graph: a profile at one number of micro-batches, as a ``networkx.DiGraph``.

Graph attributes
    microbatches   int
    train          bool
    devices        {name: {"kind": str, "memory_bytes": int}}
    links          {(source, target): (latency in s, bandwidth in bytes/s)}
    colocate       tuple of groups of node names
    ties           tuple of (parameter, names of its users, bytes of a copy, bytes of gradient summed once a step)
    tensors        {name: {"maker": node, "storage": an earlier tensor whose storage it has, or "", "held_bytes": of its
                   storage, "saver": the node whose saved bytes have it in, or "", "gradient_bytes": int}}
    waiting        tuple of (nodes, bytes, bytes of the sum): gradients of weights that several nodes use wait from the
                   backward of the last of these nodes until that of the first; each of the others adds to them
Node attributes
    kind           "input", "parameter", "unit", "glue" or "output"
    unit           module path of a unit, or the path of a parameter
    copied         whether each stage that reads it has a copy of its own (buffers and constants)
    forward_s      {device: seconds for one micro-batch}; empty when the node takes no time
    backward_s     likewise
    update_s       {device: seconds of one optimizer step}
    static_bytes   parameters, buffers, gradients and optimizer state; of an input the whole batch
    param_bytes    the parameters among them
    saved_bytes    kept for backward by one micro-batch
    output_bytes   made by one micro-batch
    forward_peak_bytes, backward_peak_bytes, input_gradient_bytes
                   as in the profile's nodes; the last is None where it was not counted
    update_peak_bytes, update_left_bytes
                   likewise
Edge attributes
    tensors        {tensor name: (bytes forward, bytes of gradient that flow back)}
"""

from __future__ import annotations

from typing import Any

import networkx as nx

from shardwright.errors import ShardwrightError
from shardwright.profiler.profile import Profile, Tensor

__all__ = ["cost_graph"]


def cost_graph(profile: Profile, microbatches: int) -> nx.DiGraph[str]:
    """Turn ``profile`` into the cost graph at ``microbatches`` micro-batches a batch.

    Raises:
        ShardwrightError: that number of micro-batches was not profiled.
    """
    if microbatches not in profile.microbatches:
        raise ShardwrightError(
            f"the profile has no times at {microbatches} micro-batches; it has "
            f"{', '.join(map(str, profile.microbatches))}: profile again with --microbatches {microbatches}"
        )
    graph: nx.DiGraph[str] = nx.DiGraph(
        microbatches=microbatches,
        train=profile.train,
        devices={d.name: {"kind": d.kind, "memory_bytes": d.memory_bytes} for d in profile.devices},
        links={(li.source, li.target): (li.latency_s, li.bandwidth_bytes_per_s) for li in profile.links},
        colocate=profile.colocate,
        ties=tuple((tie.name, tie.nodes, tie.copy_bytes, tie.gradient_bytes) for tie in profile.ties),
        tensors={tensor.name: _held(tensor, microbatches, train=profile.train) for tensor in profile.tensors},
    )
    graph.graph["waiting"] = _waiting(profile)
    inputs = {tensor.producer: 0 for tensor in profile.tensors}
    for tensor in profile.tensors:
        inputs[tensor.producer] += tensor.bytes.get(1, 0)
    for node in profile.nodes:
        rows = [
            m
            for device in profile.devices
            if (m := profile.measurement(node.name, device.name, microbatches)) is not None
        ]
        graph.add_node(
            node.name,
            kind=node.kind,
            unit=node.unit,
            copied=node.kind == "parameter" and node.type in ("constant", "buffer"),
            forward_s={m.device: m.forward_s for m in rows},
            backward_s={m.device: m.backward_s for m in rows},
            update_s={m.device: m.update_s for m in rows},
            static_bytes=node.static_bytes + (inputs.get(node.name, 0) if node.kind == "input" else 0),
            param_bytes=node.param_bytes,
            saved_bytes=node.saved_bytes.get(microbatches, 0),
            output_bytes=node.output_bytes.get(microbatches, 0),
            forward_peak_bytes=node.forward_peak_bytes.get(microbatches, 0),
            backward_peak_bytes=node.backward_peak_bytes.get(microbatches, 0),
            input_gradient_bytes=node.input_gradient_bytes.get(microbatches),
            update_peak_bytes=dict(node.update_peak_bytes),
            update_left_bytes=node.update_left_bytes,
        )
    tensors = {tensor.name: tensor for tensor in profile.tensors}
    for node in profile.nodes:
        for name in node.inputs:
            tensor = tensors[name]
            size = tensor.bytes.get(microbatches, 0)
            if not graph.has_edge(tensor.producer, node.name):
                graph.add_edge(tensor.producer, node.name, tensors={})
            graph.edges[tensor.producer, node.name]["tensors"][name] = (
                size,
                size if profile.train and tensor.requires_grad else 0,
            )
    return graph


def _held(tensor: Tensor, microbatches: int, *, train: bool) -> dict[str, Any]:
    """The memory of a tensor, as an attribute of the graph."""
    size = tensor.bytes.get(microbatches, 0)
    return {
        "maker": tensor.producer,
        "storage": tensor.storage,
        "held_bytes": tensor.held_bytes.get(microbatches, size),
        "saver": tensor.saved_by,
        "gradient_bytes": size if train and tensor.requires_grad else 0,
    }


def _waiting(profile: Profile) -> tuple[tuple[tuple[str, ...], int, int], ...]:
    """The nodes that share weights, and the bytes of their gradients: of a tie, or of a unit that is called again.

    The sums of the latter are part of its own peak.
    """
    calls: dict[str, list[str]] = {}
    for node in profile.nodes:
        if node.kind == "unit":
            calls.setdefault(node.unit, []).append(node.name)
    gradients = {node.name: node.grad_bytes for node in profile.nodes}
    again = [(tuple(nodes), gradients[nodes[0]], 0) for nodes in calls.values() if len(nodes) > 1]
    ties = [(tie.nodes, tie.gradient_bytes, tie.gradient_bytes) for tie in profile.ties]
    return tuple(entry for entry in (*again, *ties) if entry[1])
