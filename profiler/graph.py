"""The cost graph: costs at one number of micro-batches, as a ``networkx.DiGraph``.

``Profile.graph`` makes one with all of these attributes. A graph from elsewhere can be planned too (see
:mod:`shardwright.profiler.formats.from_graph`): it needs the times of its units, and takes the defaults, in brackets,
for the rest. Quantities are of one micro-batch, seconds and bytes.

Graph attributes
    name              what the costs are of ["costs"]
    microbatches      int [one for each device]
    train             bool [True]
    devices           {name: {"kind": "cpu", "cuda" or "other", "memory_bytes": int [2**60],
                      "fetch_bytes_per_s": how fast weights come from the host's memory [None],
                      "host_latency_s", "host_bandwidth_bytes_per_s": of a staged transfer to or from the host's memory
                      [those of its slowest link], "in_host_memory": whether that is its own memory, so that staged
                      transfers take it no time [False],
                      "engine_s": of the pipeline engine, for each forward and each backward of a micro-batch [0],
                      "variation": the device's speed over time, as in a profile [()]}},
                      or a sequence of names [the devices in the nodes' times]
    links             {(source, target): (latency in s, bandwidth in bytes/s)} for every ordered pair, or one (latency,
                      bandwidth) for all; a corrupt link has infinite latency [transfers take no time]
    colocate          groups of node names that must share a device [none]
    ties              (parameter, names of its users, bytes of a copy, bytes of gradient summed once a step) [none]
    obstacles         why the forward cannot be piped, as texts [none]
    tensors           {name: {"maker": node, "storage": an earlier tensor whose storage it has, or "", "held_bytes": of
                      its storage, "saver": the node whose saved bytes have it in, or "", "gradient_bytes": int}}
                      [each has its own storage]
    waiting           (nodes, bytes, bytes of the sum): gradients of weights that several nodes use wait from the
                      backward of the last of these nodes until that of the first; each of the others adds to them
                      [those of the ties]
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
    backward_input_s, backward_weight_s
                      likewise, its two parts: up to the gradients of the inputs, and those of the weights, which
                      zero-bubble schedules need [not known]
    update_s          likewise, seconds of one optimizer step; what several nodes share (ties, calls of one unit) counts
                      once on each device [0]
    recompute_s       likewise, in training, a forward that keeps nothing for backward [forward_s]
    median_error      how sure these are: half of their 95% interval, as a part of them; in no graph of a profile,
                      where each device has its own [not known]
    unfit             names of the devices that it does not fit on, even alone, and has no times for [none]
    static_bytes      parameters, buffers, gradients and optimizer state; of an input the whole batch [param_bytes]
    param_bytes       the parameters among them [0]
    grad_bytes        the gradients among them [in training param_bytes, as far as static_bytes has room]
    saved_bytes       kept for backward [0]
    output_bytes      made by the node [the bytes of the tensors on its edges]
    deferred_bytes    held from the first of these parts to the second, beside saved_bytes [0]
    forward_peak_bytes, backward_peak_bytes, input_gradient_bytes, update_peak_bytes, update_left_bytes
                      as in a profile's nodes, not taken from a graph from elsewhere
Edge attributes
    tensors           {tensor name: (bytes forward, bytes of gradient that flow back)}; the second is 0 or the first
or, for one tensor named as the node that makes it,
    bytes             bytes forward [the node's output_bytes, or 0]
    gradient_bytes    bytes of gradient that flow back [bytes in training, from a unit or glue; else 0]
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from shardwright.errors import ShardwrightError
from shardwright.profiler.costgraph import CostGraph
from shardwright.profiler.profile import Measurement, Profile, Tensor

if TYPE_CHECKING:
    import networkx as nx

__all__ = ["OF_HOST", "OPTIONAL", "Times", "cost_graph", "costs_at"]

OF_HOST = ("host_latency_s", "host_bandwidth_bytes_per_s", "in_host_memory")
"""What a device may say of its way to the host's memory."""
OPTIONAL = (*OF_HOST, "engine_s")
"""What the graph of a profile says of a device only where the device does."""


Times = Mapping[str, Mapping[str, float]]
"""``forward_s``, ``backward_s``, ``backward_input_s``, ``backward_weight_s``, ``update_s`` and ``recompute_s`` of a
node, each seconds by device."""


def cost_graph(profile: Profile, microbatches: int) -> nx.DiGraph[str]:
    """The cost graph of ``profile`` at ``microbatches`` micro-batches a batch; errors are those of :func:`costs_at`."""
    return costs_at(profile, microbatches).networkx()


def costs_at(profile: Profile, microbatches: int, times: Mapping[str, Times] | None = None) -> CostGraph:
    """Turn ``profile`` into the cost graph at ``microbatches`` micro-batches a batch, without networkx.

    Args:
        profile: nodes, tensors, devices and links.
        microbatches: one of the profiled numbers.
        times: by node; those that were measured by default.

    Raises:
        ShardwrightError: that number of micro-batches was not profiled.
    """
    if microbatches not in profile.microbatches:
        if not profile.of_model:
            raise ShardwrightError(
                f"the costs of {profile.model} are of {profile.microbatches[0]} micro-batches, not of {microbatches}: "
                f"give the costs of one micro-batch of {microbatches}"
            )
        equal = microbatches > 0 and profile.batch % microbatches == 0
        remedy = (
            f"profile again with --microbatches {microbatches}"
            if equal
            else f"take one of these, as a batch of {profile.batch} does not divide into {microbatches} equal parts"
        )
        raise ShardwrightError(
            f"the profile has no times at {microbatches} micro-batches; it has "
            f"{', '.join(map(str, profile.microbatches))}: {remedy}"
        )
    attributes = {
        "name": profile.model,
        "microbatches": microbatches,
        "train": profile.train,
        "devices": _devices(profile),
        "links": _links(profile),
        "colocate": profile.colocate,
        "ties": tuple((tie.name, tie.nodes, tie.copy_bytes, tie.gradient_bytes) for tie in profile.ties),
        "obstacles": profile.obstacles,
        "host_bytes": profile.host_bytes,
        "disk_bytes_per_s": profile.disk_bytes_per_s,
        "tensors": {tensor.name: _held(tensor, microbatches, train=profile.train) for tensor in profile.tensors},
        "waiting": _waiting(profile),
    }
    inputs = {tensor.producer: 0 for tensor in profile.tensors}
    for tensor in profile.tensors:
        inputs[tensor.producer] += tensor.bytes.get(1, 0)
    unfit: dict[str, tuple[str, ...]] = {}
    for misfit in profile.misfits:
        if misfit.microbatches == microbatches:
            unfit[misfit.node] = (*unfit.get(misfit.node, ()), misfit.device)
    nodes = {
        node.name: {
            "kind": node.kind,
            "type": node.type,
            "unit": node.unit,
            "site": node.site,
            "copied": node.kind == "parameter" and node.type in ("constant", "buffer"),
            **(_measured(profile, node.name, microbatches) if times is None else times[node.name]),
            "unfit": unfit.get(node.name, ()),
            "static_bytes": node.static_bytes + (inputs.get(node.name, 0) if node.kind == "input" else 0),
            "param_bytes": node.param_bytes,
            "grad_bytes": node.grad_bytes,
            "saved_bytes": node.saved_bytes.get(microbatches, 0),
            "output_bytes": node.output_bytes.get(microbatches, 0),
            "forward_peak_bytes": node.forward_peak_bytes.get(microbatches, 0),
            "backward_peak_bytes": node.backward_peak_bytes.get(microbatches, 0),
            "input_gradient_bytes": node.input_gradient_bytes.get(microbatches),
            "deferred_bytes": node.deferred_bytes.get(microbatches),
            "update_peak_bytes": dict(node.update_peak_bytes),
            "update_left_bytes": node.update_left_bytes,
        }
        for node in profile.nodes
    }
    return CostGraph(attributes, nodes, _edges(profile, microbatches))


def _edges(profile: Profile, microbatches: int) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Each pair of nodes of which one reads tensors of the other, with those tensors."""
    tensors = {tensor.name: tensor for tensor in profile.tensors}
    for node in profile.nodes:
        read: dict[str, dict[str, tuple[int, int]]] = {}
        for name in node.inputs:
            tensor = tensors[name]
            size = tensor.bytes.get(microbatches, 0)
            gradient = size if profile.train and tensor.requires_grad else 0
            read.setdefault(tensor.producer, {})[name] = (size, gradient)
        yield from ((producer, node.name, {"tensors": found}) for producer, found in read.items())


def _measured(profile: Profile, node: str, microbatches: int) -> Times:
    rows = [m for device in profile.devices if (m := profile.measurement(node, device.name, microbatches)) is not None]
    return {
        "forward_s": {m.device: m.forward_s for m in rows},
        "backward_s": {m.device: m.backward_s for m in rows},
        "backward_input_s": {m.device: m.backward_input_s for m in rows if m.backward_input_s is not None},
        "backward_weight_s": {m.device: m.backward_weight_s for m in rows if m.backward_weight_s is not None},
        "update_s": {m.device: m.update_s for m in rows},
        "recompute_s": _again_s(rows),
    }


def _again_s(rows: Sequence[Measurement]) -> dict[str, float]:
    """By device: a forward that keeps nothing; where it was not timed the forward, and nothing if it was nowhere."""
    if all(row.recompute_s is None for row in rows):
        return {}
    return {row.device: row.forward_s if row.recompute_s is None else row.recompute_s for row in rows}


def _devices(profile: Profile) -> dict[str, dict[str, Any]]:
    varied = {variation.device: variation.relative for variation in profile.variations}
    return {
        device.name: {
            "kind": device.kind,
            "memory_bytes": device.memory_bytes,
            "fetch_bytes_per_s": device.fetch_bytes_per_s,
            "variation": varied.get(device.name, ()),
            **{key: value for key in OPTIONAL if (value := getattr(device, key)) not in (None, False)},
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
