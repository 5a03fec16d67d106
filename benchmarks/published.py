"""Published instances with known optima: what the planner finds and proves of them.

    python benchmarks/published.py --devices 3,5,7 KILBRID.IN2 TONGE70.IN2
    python benchmarks/published.py bert24_inference.json

The files are others' and are not here. Two forms are read:

- ``.IN2``: assembly lines, as in the collection of Scholl ("Data of assembly line balancing problems", TU Darmstadt,
  1993): the number of tasks, their times, pairs of tasks of which the first comes before the second, and -1,-1. With a
  given number of stations the least cycle time (SALBP-2) is the least largest load of as many devices that are alike,
  with transfers that take no time.
- ``.json``: graphs for inference, or training, on accelerators and CPU cores by Tarnawski et al. ("Efficient algorithms
  for device placement of DNN graph operators", NeurIPS 2020; github.com/msr-fiddle/dnn-partitioning,
  throughput-inputs): each device has one contiguous part, and a tensor that leaves an accelerator or comes to one goes
  through the host's memory.

Printed is the largest load for one micro-batch, in the file's unit of time, and the proven bound.
"""

import argparse
import json
import platform
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import networkx as nx

import shardwright as sw
from shardwright.errors import ShardwrightError

BYTES_PER_TIME = 1e8
"""Whole bytes stand for times of transfers."""
BYTES_PER_BYTE = 2**14
"""So much more are the instances' own bytes: they have no memory of activations, which ours then hardly add to."""
MICROBATCHES = 64
"""So many that filling the pipeline does not speak for fewer stages."""
ROOM = 2**60


def assembly_line(text: str, devices: int) -> nx.DiGraph:
    """The cost graph of an ``.IN2`` file."""
    words = text.split()
    count = int(words[0])
    graph: nx.DiGraph = nx.DiGraph()
    for number, seconds in enumerate(words[1 : count + 1], start=1):
        graph.add_node(str(number), forward_s=float(seconds))
    for pair in words[count + 1 :]:
        first, second = pair.split(",")
        if first == "-1":
            break
        graph.add_edge(first, second)
    stations = {f"station:{d}": {"kind": "other", "memory_bytes": ROOM} for d in range(devices)}
    return described(graph, stations, "relayed")  # the quickest search, where transfers take no time


def accelerators(found: dict[str, Any]) -> nx.DiGraph:
    """The cost graph of a ``.json`` file.

    Raises:
        ShardwrightError: it is for training, and its backward is not that of its forward.
    """
    kinds = {f"acc:{d}": "fpgaLatency" for d in range(found["maxFPGAs"])}
    kinds |= {f"cpu:{d}": "cpuLatency" for d in range(found["maxCPUs"])}
    outputs = {edge["sourceId"]: edge["cost"] for edge in found["edges"]}
    forward = {node["id"]: node for node in found["nodes"] if not node["isBackwardNode"]}
    backward = [node for node in found["nodes"] if node["isBackwardNode"]]
    colours: dict[object, list[str]] = {}
    graph: nx.DiGraph = nx.DiGraph()
    for number, node in forward.items():
        may_be = [d for d in kinds if node["supportedOnFpga"] or d.startswith("cpu")]
        graph.add_node(
            str(number),
            forward_s={device: node[kinds[device]] for device in may_be},
            unfit=[device for device in kinds if device not in may_be],
            static_bytes=BYTES_PER_BYTE * int(node["size"]),
            output_bytes=round(outputs.get(number, 0.0) * BYTES_PER_TIME),
        )
        if backward:
            graph.nodes[str(number)]["backward_s"] = dict.fromkeys(may_be, 0.0)
        colours.setdefault(node.get("colorClass", str(number)), []).append(str(number))
    for node in backward:
        if (home := colours.get(node.get("colorClass"))) is None:
            raise ShardwrightError(f"node {node['id']} is of the backward, and of no forward node's colour class")
        own = graph.nodes[home[0]]
        own["static_bytes"] += BYTES_PER_BYTE * int(node["size"])
        for device in own["backward_s"]:
            own["backward_s"][device] += node[kinds[device]]
    edges = {(edge["sourceId"], edge["destId"]) for edge in found["edges"]}
    graph.add_edges_from((str(a), str(b)) for a, b in edges if a in forward and b in forward)
    if backward:
        _hold_backward_edges(found["edges"], found["nodes"], forward)
    way = {"host_latency_s": 0.0, "host_bandwidth_bytes_per_s": BYTES_PER_TIME}
    devices: dict[str, dict[str, Any]] = {
        name: {"kind": "other", "memory_bytes": BYTES_PER_BYTE * int(found["maxSizePerFPGA"]), **way}
        if name.startswith("acc")
        else {"kind": "cpu", "memory_bytes": ROOM, "in_host_memory": True}
        for name in kinds
    }
    graph = described(graph, devices, "staged", train=bool(backward))
    graph.graph["colocate"] = [names for names in colours.values() if len(names) > 1]
    return graph


def _hold_backward_edges(edges: list[dict[str, Any]], nodes: list[dict[str, Any]], forward: dict[int, Any]) -> None:
    """See that a gradient goes wherever a tensor does, and takes as long.

    Raises:
        ShardwrightError: another one does.
    """
    colour = {node["id"]: node.get("colorClass", str(node["id"])) for node in nodes}
    costs: dict[bool, dict[frozenset[object], float]] = {True: {}, False: {}}
    for edge in edges:
        ends = edge["sourceId"], edge["destId"]
        between = frozenset(colour[end] for end in ends)
        if len(between) > 1:
            costs[all(end in forward for end in ends)][between] = edge["cost"]
    if costs[True] != costs[False]:
        raise ShardwrightError("instances for training are read where gradients go and take as long as the tensors")


def described(
    graph: nx.DiGraph, devices: dict[str, dict[str, Any]], transfers: str, *, train: bool = False
) -> nx.DiGraph:
    """``graph`` with what it says of itself, and links that take no time; and how it is to be planned."""
    graph.graph.update(train=train, microbatches=MICROBATCHES, devices=devices, transfers=transfers)
    return graph


def instances(paths: list[Path], devices: list[int]) -> Iterator[tuple[str, nx.DiGraph]]:
    """A name and the graph of each."""
    for path in paths:
        if path.suffix == ".json":
            yield path.stem, accelerators(json.loads(path.read_text()))
        else:
            for count in devices:
                yield path.stem, assembly_line(path.read_text(encoding="latin-1"), count)


def main() -> None:
    """Print a row for each instance."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--devices", default="3,5,7,9,11", help="stations of assembly lines")
    parser.add_argument("--time-limit", type=float, default=30.0)
    options = parser.parse_args()
    print("| instance | units | devices | largest load | bound | gap | seconds |\n|---|---|---|---|---|---|---|")
    for name, graph in instances(options.files, [int(count) for count in options.devices.split(",")]):
        start_s = time.process_time()
        transfers: Any = graph.graph["transfers"]
        plan = sw.plan(graph, schedule="gpipe", transfers=transfers, time_limit_s=options.time_limit)
        took_s = time.process_time() - start_s
        certificate = plan.certificate
        value, bound = (s / MICROBATCHES for s in (certificate.value_s, certificate.bound_s))
        gap = "exact" if certificate.exact else f"{certificate.gap_percent:.2f}%"
        print(
            f"| {name} | {len(graph)} | {len(graph.graph['devices'])} | {value:.6g} | {bound:.6g} | {gap} "
            f"| {took_s:.1f} |",
            flush=True,
        )
    print(f"Python {platform.python_version()}, {datetime.now(UTC):%Y-%m-%d}")


if __name__ == "__main__":
    main()
