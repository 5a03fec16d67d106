"""The cost graph: costs at one number of micro-batches, as a ``networkx.DiGraph``.

``Profile.graph`` makes one with all of these attributes. A graph from elsewhere can be planned too (see
:mod:`shardwright.profiler.from_graph`): it needs the times of its units, and takes the defaults, in brackets, for the
rest. Quantities are of one micro-batch, seconds and bytes.

Graph attributes
    name              what the costs are of ["costs"]
    microbatches      int [one for each device]
    train             bool [True]
    devices           {name: {"kind": "cpu", "cuda" or "other", "memory_bytes": int [2**60],
                      "fetch_bytes_per_s": how fast weights come from the host's memory [None],
                      "variation": the device's speed over time, as in a profile [()]}},
                      or a sequence of names [the devices in the nodes' times]
    links             {(source, target): (latency in s, bandwidth in bytes/s)} for every ordered pair, or one (latency,
                      bandwidth) for all; a corrupt link has infinite latency [transfers take no time]
    colocate          groups of node names that must share a device [none]
    ties              (parameter, names of its users, bytes of a copy, bytes of gradient summed once a step) [none]
    obstacles         why the forward cannot be piped, as texts [none]
    host_bytes        free memory of the host, for weights that fit on no device [0]
    disk_bytes_per_s  how fast weights come from the host's disk, or None [None]
Node attributes
    kind              "input", "parameter", "unit", "glue" or "output" ["unit"]
    type              class of the unit, name of the glue function ["Unit", or the kind]
    unit              module path of a unit, or the path of a parameter [a unit's own name]
    site              file and position of glue [""]
    copied            whether each stage that reads it has a copy of its own (buffers and constants) [False]
    forward_s         {device: seconds}, or a number for all devices; empty when the node takes no time [a unit has it]
    backward_s        likewise [in training a unit has it]
    update_s          likewise, seconds of one optimizer step [0]
    unfit             names of the devices that it does not fit on, even alone, and has no times for [none]
    static_bytes      parameters, buffers, gradients and optimizer state [param_bytes]
    param_bytes       the parameters among them [0]
    saved_bytes       kept for backward [0]
    output_bytes      made by the node [the bytes of the tensors on its edges]
Edge attributes
    tensors           {tensor name: (bytes forward, bytes of gradient that flow back)}; the second is 0 or the first
or, for one tensor named as the node that makes it,
    bytes             bytes forward [the node's output_bytes, or 0]
    gradient_bytes    bytes of gradient that flow back [bytes in training, from a unit or glue; else 0]
"""

from __future__ import annotations

import itertools
import math
from typing import Any

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
        if not profile.of_model:
            raise ShardwrightError(
                f"the costs of {profile.model} are of {profile.microbatches[0]} micro-batches, not of {microbatches}: "
                f"give the costs of one micro-batch of {microbatches}"
            )
        raise ShardwrightError(
            f"the profile has no times at {microbatches} micro-batches; it has "
            f"{', '.join(map(str, profile.microbatches))}: profile again with --microbatches {microbatches}"
        )
    graph: nx.DiGraph[str] = nx.DiGraph(
        name=profile.model,
        microbatches=microbatches,
        train=profile.train,
        devices=_devices(profile),
        links=_links(profile),
        colocate=profile.colocate,
        ties=tuple((tie.name, tie.nodes, tie.copy_bytes, tie.gradient_bytes) for tie in profile.ties),
        obstacles=profile.obstacles,
        host_bytes=profile.host_bytes,
        disk_bytes_per_s=profile.disk_bytes_per_s,
    )
    unfit: dict[str, tuple[str, ...]] = {}
    for misfit in profile.misfits:
        if misfit.microbatches == microbatches:
            unfit[misfit.node] = (*unfit.get(misfit.node, ()), misfit.device)
    for node in profile.nodes:
        rows = [
            m
            for device in profile.devices
            if (m := profile.measurement(node.name, device.name, microbatches)) is not None
        ]
        graph.add_node(
            node.name,
            kind=node.kind,
            type=node.type,
            unit=node.unit,
            site=node.site,
            copied=node.kind == "parameter" and node.type in ("constant", "buffer"),
            forward_s={m.device: m.forward_s for m in rows},
            backward_s={m.device: m.backward_s for m in rows},
            update_s={m.device: m.update_s for m in rows},
            unfit=unfit.get(node.name, ()),
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


def _devices(profile: Profile) -> dict[str, dict[str, Any]]:
    varied = {variation.device: variation.relative for variation in profile.variations}
    return {
        device.name: {
            "kind": device.kind,
            "memory_bytes": device.memory_bytes,
            "fetch_bytes_per_s": device.fetch_bytes_per_s,
            "variation": varied.get(device.name, ()),
        }
        for device in profile.devices
    }


def _links(profile: Profile) -> dict[tuple[str, str], tuple[float, float]]:
    """The profile's links; costs without a link are costs of free transfers, which no measured profile has."""
    if profile.links or profile.of_model:
        return {
            (li.source, li.target): (math.inf if li.corrupt else li.latency_s, li.bandwidth_bytes_per_s)
            for li in profile.links
        }
    names = [device.name for device in profile.devices]
    return dict.fromkeys(itertools.permutations(names, 2), (0.0, math.inf))
