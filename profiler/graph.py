"""The cost graph: a profile at one number of micro-batches, as a ``networkx.DiGraph``.

Graph attributes
    microbatches   int
    train          bool
    devices        {name: {"kind": str, "memory_bytes": int}}
    links          {(source, target): (latency in s, bandwidth in bytes/s)}; a corrupt link has infinite latency
    colocate       tuple of groups of node names
    ties           tuple of (parameter, names of its users, bytes of a copy, bytes of gradient summed once a step)
Node attributes
    kind           "input", "parameter", "unit", "glue" or "output"
    unit           module path of a unit, or the path of a parameter
    copied         whether each stage that reads it has a copy of its own (buffers and constants)
    forward_s      {device: seconds for one micro-batch}; empty when the node takes no time
    backward_s     likewise
    update_s       {device: seconds of one optimizer step}
    static_bytes   parameters, buffers, gradients and optimizer state
    param_bytes    the parameters among them
    saved_bytes    kept for backward by one micro-batch
    output_bytes   made by one micro-batch
Edge attributes
    tensors        {tensor name: (bytes forward, bytes of gradient that flow back)}
"""

from __future__ import annotations

import math

import networkx as nx

from shardwright.errors import ShardwrightError
from shardwright.profiler.profile import Profile

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
        links={
            (li.source, li.target): (math.inf if li.corrupt else li.latency_s, li.bandwidth_bytes_per_s)
            for li in profile.links
        },
        colocate=profile.colocate,
        ties=tuple((tie.name, tie.nodes, tie.copy_bytes, tie.gradient_bytes) for tie in profile.ties),
    )
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
            static_bytes=node.static_bytes,
            param_bytes=node.param_bytes,
            saved_bytes=node.saved_bytes.get(microbatches, 0),
            output_bytes=node.output_bytes.get(microbatches, 0),
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
