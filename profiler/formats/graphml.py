"""The cost graph in numbers and texts alone, which is all that GraphML holds: dicts become keys.

Graph keys
    name, microbatches, train, host_bytes, disk_bytes_per_s       as in :mod:`shardwright.profiler.graph`
    kind:DEVICE, memory_bytes:DEVICE, fetch_bytes_per_s:DEVICE    of each device, such as ``memory_bytes:cuda:0``
    host_latency_s:DEVICE, host_bandwidth_bytes_per_s:DEVICE, in_host_memory:DEVICE
    engine_s:DEVICE
    variation:DEVICE                                              a JSON list of numbers
    latency_s:SOURCE->TARGET, bandwidth_bytes_per_s:SOURCE->TARGET
    colocate, ties, obstacles                                     JSON lists
    tensors                                                       JSON: storages that tensors share
Node keys
    kind, type, unit, site, copied, static_bytes, param_bytes, saved_bytes, output_bytes
    forward_s:DEVICE, backward_s:DEVICE, backward_input_s:DEVICE, backward_weight_s:DEVICE, update_s:DEVICE,
    recompute_s:DEVICE
    unfit                                    a JSON list
    forward_peak_bytes, backward_peak_bytes, input_gradient_bytes, deferred_bytes, update_left_bytes,
    update_peak_bytes:KIND
Edge keys
    bytes, gradient_bytes                    one tensor, which is named as the node that makes it
    bytes:TENSOR, gradient_bytes:TENSOR      each tensor, where there are several or with another name

What is empty or not known is left out. The order of the nodes is that of the forward.
"""

from __future__ import annotations

import io
import json
import math
import re
from collections.abc import Mapping
from typing import Any

import networkx as nx

from shardwright.errors import ShardwrightError
from shardwright.profiler.graph import OPTIONAL

__all__ = ["flat_graph", "graphml", "nested_graph"]

_ARROW = "->"
_TIMES = ("forward_s", "backward_s", "backward_input_s", "backward_weight_s", "update_s", "recompute_s")
_OF_DEVICE = ("kind", "memory_bytes", "fetch_bytes_per_s", "variation", *OPTIONAL)
_OF_LINK = ("latency_s", "bandwidth_bytes_per_s")
_OF_NODE = (
    *("kind", "type", "unit", "site", "copied", "static_bytes", "param_bytes", "grad_bytes"),
    *(
        "saved_bytes",
        "output_bytes",
        "forward_peak_bytes",
        "backward_peak_bytes",
        "input_gradient_bytes",
        "deferred_bytes",
        "update_left_bytes",
    ),
)
_LISTS = ("colocate", "ties", "obstacles")


def graphml(graph: nx.DiGraph[str]) -> str:
    """The cost graph as the text of a GraphML file; ``networkx.read_graphml`` of it can be planned.

    Raises:
        ShardwrightError: a name has a control character.
    """
    buffer = io.BytesIO()
    nx.write_graphml_xml(flat_graph(graph), buffer)
    text = buffer.getvalue().decode() + "\n"
    if found := re.search(r"[\x00-\x08\x0b\x0c\x0e-\x1f]", text):
        raise ShardwrightError(f"a name has the control character {found[0]!r}, which GraphML cannot hold: rename it")
    return text


def flat_graph(graph: nx.DiGraph[str]) -> nx.DiGraph[str]:
    """A copy of a complete cost graph whose attributes are numbers and texts."""
    flat: nx.DiGraph[str] = nx.DiGraph(**_flat_attributes(graph))
    for name, data in graph.nodes(data=True):
        times = {f"{key}:{device}": s for key in _TIMES for device, s in data[key].items()}
        unfit = json.dumps(data["unfit"]) if data["unfit"] else ""
        times |= {f"update_peak_bytes:{kind}": size for kind, size in data["update_peak_bytes"].items()}
        flat.add_node(name, **_without_empty({key: data[key] for key in _OF_NODE} | {"unfit": unfit}), **times)
    for source, target, data in graph.edges(data=True):
        tensors: dict[str, tuple[int, int]] = data["tensors"]
        if list(tensors) == [source]:
            size, gradient = tensors[source]
            flat.add_edge(source, target, bytes=size, gradient_bytes=gradient)
            continue
        sizes: dict[str, int] = {}
        for name, (size, gradient) in tensors.items():
            sizes |= {f"bytes:{name}": size, f"gradient_bytes:{name}": gradient}
        flat.add_edge(source, target, **sizes)
    return flat


def _shared(graph: nx.DiGraph[str]) -> dict[str, dict[str, Any]]:
    """What the graph says of tensors that have no storage of their own, or are saved by their maker."""
    sizes = {name: size for *_, data in graph.edges(data=True) for name, (size, _) in data["tensors"].items()}
    return {
        name: {key: held[key] for key in ("storage", "held_bytes", "saver")}
        for name, held in graph.graph["tensors"].items()
        if held["storage"] or held["saver"] or held["held_bytes"] != sizes.get(name, held["held_bytes"])
    }


def _flat_attributes(graph: nx.DiGraph[str]) -> dict[str, Any]:
    attributes = graph.graph
    flat = {key: attributes[key] for key in ("name", "microbatches", "train", "host_bytes", "disk_bytes_per_s")}
    for name, device in attributes["devices"].items():
        values = device | {"variation": json.dumps(device["variation"]) if device["variation"] else ""}
        flat |= {f"{key}:{name}": values.get(key) for key in _OF_DEVICE}
    for (source, target), (latency_s, bandwidth) in attributes["links"].items():
        if math.isfinite(bandwidth):  # a free transfer is a link that is left out
            flat[f"latency_s:{source}{_ARROW}{target}"] = latency_s
            flat[f"bandwidth_bytes_per_s:{source}{_ARROW}{target}"] = bandwidth
    flat |= {key: json.dumps(attributes[key]) if attributes[key] else "" for key in _LISTS}
    flat["tensors"] = json.dumps(shared) if (shared := _shared(graph)) else ""
    return _without_empty(flat)


def _without_empty(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value is not None and value != ""}


def nested_graph(graph: nx.DiGraph[str]) -> nx.DiGraph[str]:
    """A copy of ``graph`` with the dicts and tuples that its flat keys stand for; other attributes stay as they are.

    Raises:
        ShardwrightError: a key or a list is not written as documented.
    """
    nested: nx.DiGraph[str] = nx.DiGraph(**_nested_attributes(graph.graph))
    for name, data in graph.nodes(data=True):
        nested.add_node(name)
        nested.nodes[name].update(_gathered(data, (*_TIMES, "update_peak_bytes")))
        if isinstance(data.get("unfit"), str):
            nested.nodes[name]["unfit"] = _from_json(data["unfit"], f"node {name}: unfit")
    for source, target, data in graph.edges(data=True):
        found = _gathered(data, ("bytes", "gradient_bytes"))
        nested.add_edge(source, target)
        sizes, gradients = found.get("bytes"), found.get("gradient_bytes")
        if isinstance(sizes, dict):
            gradients = gradients if isinstance(gradients, dict) else {}
            found["tensors"] = {tensor: (size, gradients.get(tensor)) for tensor, size in sizes.items()}
            found = {key: value for key, value in found.items() if key not in ("bytes", "gradient_bytes")}
        nested.edges[source, target].update(found)
    return nested


def _nested_attributes(attributes: Mapping[str, Any]) -> dict[str, Any]:
    found = _gathered(attributes, (*_OF_DEVICE, *_OF_LINK))
    devices: dict[str, dict[str, Any]] = {}
    links: dict[tuple[str, str], dict[str, float]] = {}
    for key in _OF_DEVICE:
        for device, value in _popped_dict(found, key).items():
            text = isinstance(value, str) and key == "variation"
            devices.setdefault(device, {})[key] = _from_json(value, f"variation:{device}") if text else value
    for key in _OF_LINK:
        for pair, value in _popped_dict(found, key).items():
            source, arrow, target = pair.partition(_ARROW)
            if not arrow:
                raise ShardwrightError(f"graph attribute {key}:{pair} names no link; write {key}:cuda:0{_ARROW}cuda:1")
            links.setdefault((source, target), {})[key] = value
    if devices:
        found.setdefault("devices", devices)
    if links:
        found.setdefault("links", {pair: tuple(link.get(key, 0.0) for key in _OF_LINK) for pair, link in links.items()})
    found |= {key: _from_json(found[key], key) for key in _LISTS if isinstance(found.get(key), str)}
    if isinstance(found.get("tensors"), str):
        found["tensors"] = _from_json(found["tensors"], "tensors", dict)
    return found


def _gathered(data: Mapping[str, Any], keys: tuple[str, ...]) -> dict[str, Any]:
    """``data`` with ``{"forward_s:cuda:0": s}`` as ``{"forward_s": {"cuda:0": s}}`` for each of ``keys``."""
    found: dict[str, Any] = {}
    for name, value in data.items():
        key, colon, rest = str(name).partition(":")
        if colon and key in keys and not isinstance(data.get(key), dict):
            found[key] = {**(found[key] if isinstance(found.get(key), dict) else {}), rest: value}
        elif not isinstance(found.get(name), dict):
            found[name] = value
    return found


def _popped_dict(found: dict[str, Any], key: str) -> dict[str, Any]:
    return found.pop(key) if isinstance(found.get(key), dict) else {}


def _from_json(text: str, key: str, kind: type = list) -> Any:
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, kind):
        noun = "list" if kind is list else "object"
        raise ShardwrightError(f"graph attribute {key} is not a JSON {noun}: {text!r}")
    return value
