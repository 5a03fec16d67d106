"""From a plain ``networkx.DiGraph`` with costs from anywhere to a profile that can be planned, checked on the way.

The attributes and their defaults are those of :mod:`shardwright.profiler.graph`, flat keys included.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, get_args

from shardwright.errors import ShardwrightError, kind_of
from shardwright.profiler.costgraph import CostGraph
from shardwright.profiler.formats.given import rate, refuse_misspelt, seconds, share, texts, whole
from shardwright.profiler.formats.given_devices import devices_of, links_of, variations_of
from shardwright.profiler.graph import Times, costs_at
from shardwright.profiler.ordering import topological_order
from shardwright.profiler.profile import Measurement, Misfit, Node, NodeKind, Profile, Tensor, Tie

if TYPE_CHECKING:
    import networkx as nx

__all__ = ["costs_from_graph", "profile_from_graph"]

_TIMES = ("forward_s", "backward_s", "backward_input_s", "backward_weight_s", "update_s", "recompute_s")
_BYTES = ("static_bytes", "param_bytes", "grad_bytes", "saved_bytes", "output_bytes")
_PEAKS = ("forward_peak_bytes", "backward_peak_bytes", "input_gradient_bytes", "deferred_bytes")
_OF_NODES = (
    *("kind", "type", "unit", "site", "copied", "unfit", *_TIMES, *_BYTES, *_PEAKS),
    *("update_peak_bytes", "update_left_bytes", "median_error"),
)
_OF_EDGES = ("tensors", "bytes", "gradient_bytes")
_OF_GRAPHS = (
    *("name", "microbatches", "train", "devices", "links", "colocate", "ties", "obstacles", "host_bytes"),
    *("disk_bytes_per_s", "tensors", "waiting", "node_default", "edge_default"),
)


def profile_from_graph(graph: nx.DiGraph[Any] | CostGraph) -> Profile:
    """A profile of the costs in ``graph``, which no model stands behind.

    The graph is not changed. Nodes are taken in a topological order that is as near to theirs as can be.

    Raises:
        ShardwrightError: a time is missing, or an attribute is not what it is documented to be; both are named.
    """
    return _reading(graph).profile()


def costs_from_graph(graph: nx.DiGraph[Any] | CostGraph) -> tuple[Profile, CostGraph]:
    """The profile of the costs in ``graph``, and their cost graph.

    For planning: records of the times of ten thousand units on 64 devices take longer to make than a plan, so that the
    profile is without them, unless the graph says how sure they are. Order and errors are those of
    :func:`profile_from_graph`.
    """
    reading = _reading(graph)
    profile = reading.profile(timed=any("median_error" in data for data in reading.graph.nodes.values()))
    return profile, costs_at(profile, reading.microbatches, reading.times)


def _reading(graph: nx.DiGraph[Any] | CostGraph) -> _Reading:
    if isinstance(graph, CostGraph):
        return _Reading(graph)
    import networkx as nx

    from shardwright.profiler.formats.graphml import nested_graph

    if not isinstance(graph, nx.DiGraph) or graph.is_multigraph():
        raise ShardwrightError(f"costs are a Profile or a networkx.DiGraph, not {kind_of(graph)}; make it a DiGraph")
    names = {node: str(node) for node in graph}
    if len(set(names.values())) < len(names):
        raise ShardwrightError("two nodes of the graph have the same name as text; give each a name of its own")
    return _Reading(CostGraph.of(nested_graph(nx.relabel_nodes(graph, names))))


class _Reading:
    """A nested graph, and what all its parts have to agree with."""

    def __init__(self, graph: CostGraph) -> None:
        self.graph = graph
        refuse_misspelt("the graph", graph.graph, _OF_GRAPHS)
        self.train = graph.graph.get("train", True)
        if not isinstance(self.train, bool):
            raise ShardwrightError(f"graph attribute train is {self.train!r}; give True or False")
        self.devices = devices_of(graph)
        self.names = [device.name for device in self.devices]
        self.microbatches = whole("graph attribute microbatches", graph.graph.get("microbatches", len(self.devices)))
        if not self.microbatches:
            raise ShardwrightError("graph attribute microbatches is 0; give the number that the costs are of")
        self.order = _in_order(graph)
        self.kinds = {name: self._kind(name) for name in graph}
        self.tensors = self._tensors()
        self.made_bytes: dict[str, int] = {}
        for tensor in self.tensors.values():
            size = tensor.bytes[self.microbatches]
            self.made_bytes[tensor.producer] = self.made_bytes.get(tensor.producer, 0) + size

    @cached_property
    def times(self) -> dict[str, Times]:
        """By node; of a device with a forward the others are there too."""
        return {name: self._of_node(name) for name in self.order}

    def profile(self, *, timed: bool = True) -> Profile:
        """The records, without the times if not ``timed``."""
        attributes = self.graph.graph
        disk = attributes.get("disk_bytes_per_s")
        return Profile(
            model=str(attributes.get("name") or "costs"),
            structure="",
            inputs=(),
            batch=self.microbatches,
            train=self.train,
            optimizer="none",
            torch_version="",
            microbatches=(self.microbatches,),
            devices=self.devices,
            links=links_of(attributes.get("links"), self.names),
            nodes=tuple(self._node(name) for name in self.order),
            tensors=tuple(self.tensors.values()),
            colocate=self._colocate(attributes.get("colocate", ())),
            ties=self._ties(attributes.get("ties", ())),
            obstacles=tuple(texts("obstacles", attributes.get("obstacles", ()))),
            host_bytes=whole("graph attribute host_bytes", attributes.get("host_bytes", 0)),
            disk_bytes_per_s=None if disk is None else rate("graph attribute disk_bytes_per_s", disk),
            measurements=self._measurements() if timed else (),
            misfits=tuple(misfit for name in self.order for misfit in self._misfits(name)),
            variations=variations_of(attributes.get("devices", {})),
        )

    def _kind(self, name: str) -> NodeKind:
        data = self.graph.nodes[name]
        refuse_misspelt(f"node {name}", data, _OF_NODES)
        kind: NodeKind = data.get("kind", "unit")
        if kind not in get_args(NodeKind):
            raise ShardwrightError(f"node {name}: kind is {kind!r}; the kinds are {', '.join(get_args(NodeKind))}")
        return kind

    def _node(self, name: str) -> Node:
        data, kind = self.graph.nodes[name], self.kinds[name]
        sizes = {key: whole(f"node {name}: {key}", data[key]) for key in _BYTES if key in data}
        params = sizes.get("param_bytes", 0)
        if kind == "input":
            sizes["static_bytes"] = params  # the whole batch, which its tensor has
        rest = sizes.get("static_bytes", params) - params
        if rest < 0:
            raise ShardwrightError(
                f"node {name}: param_bytes is {params}, more than static_bytes, {params + rest}, which has them in it"
            )
        gradients = sizes.get("grad_bytes", min(params, rest) if self.train else 0)
        if gradients > (rest if self.train else 0):
            room = f"static_bytes leaves {rest} beside param_bytes" if self.train else "train is False"
            raise ShardwrightError(f"node {name}: grad_bytes is {gradients}, and {room}; correct one of them")
        return Node(
            name=name,
            kind=kind,
            type=self._type(name),
            unit=str(data.get("unit") or (name if kind == "unit" else "")),
            site=str(data.get("site", "")),
            inputs=tuple(tensor for source in self.graph.predecessors(name) for tensor in self._on_edge(source, name)),
            param_bytes=params,
            grad_bytes=gradients,
            # The rest is in one field: a graph does not tell buffers and optimizer state apart.
            optimizer_bytes=rest - gradients if self.train else 0,
            buffer_bytes=0 if self.train else rest,
            output_bytes={self.microbatches: sizes.get("output_bytes", self.made_bytes.get(name, 0))},
            saved_bytes={self.microbatches: sizes.get("saved_bytes", 0)},
            forward_peak_bytes=self._peak(name, "forward_peak_bytes"),
            backward_peak_bytes=self._peak(name, "backward_peak_bytes"),
            input_gradient_bytes=self._peak(name, "input_gradient_bytes"),
            deferred_bytes=self._peak(name, "deferred_bytes"),
            update_peak_bytes=self._update_peaks(name),
            update_left_bytes=whole(f"node {name}: update_left_bytes", data.get("update_left_bytes", 0)),
        )

    def _peak(self, name: str, key: str) -> dict[int, int]:
        given = self.graph.nodes[name].get(key)
        return {} if given is None else {self.microbatches: whole(f"node {name}: {key}", given)}

    def _update_peaks(self, name: str) -> dict[Literal["cpu", "cuda"], int]:
        given = self.graph.nodes[name].get("update_peak_bytes", {})
        if not isinstance(given, Mapping) or not set(given) <= {"cpu", "cuda"}:
            raise ShardwrightError(f"node {name}: update_peak_bytes is {given!r}; give bytes for cpu and cuda")
        return {kind: whole(f"node {name}: update_peak_bytes", size) for kind, size in given.items()}

    def _type(self, name: str) -> str:
        """A type that says whether a node is copied, as a profile's does."""
        data, kind = self.graph.nodes[name], self.kinds[name]
        given = str(data.get("type") or ("Unit" if kind == "unit" else kind))
        if kind != "parameter":
            return given
        if data.get("copied", given in ("buffer", "constant")):
            return given if given in ("buffer", "constant") else "buffer"
        return "parameter" if given in ("buffer", "constant") else given

    def _of_node(self, name: str) -> Times:
        forward, backward, *parts, update, again = (self._times(name, key) for key in _TIMES)
        if not forward and any(seconds for times in (backward, *parts, update, again) for seconds in times.values()):
            raise ShardwrightError(f"node {name}: forward_s is missing, and other times are there; give seconds, or 0")
        if bool(parts[0]) != bool(parts[1]):
            there, missing = ("input", "weight") if parts[0] else ("weight", "input")
            raise ShardwrightError(
                f"node {name}: backward_{there}_s is there and backward_{missing}_s is not; give both, or neither"
            )
        return {
            "forward_s": forward,
            "backward_s": {device: backward.get(device, 0.0) for device in forward},
            "backward_input_s": parts[0],
            "backward_weight_s": parts[1],
            "update_s": {device: update.get(device, 0.0) for device in forward},
            "recompute_s": again if forward else {},
        }

    def _measurements(self) -> tuple[Measurement, ...]:
        return tuple(
            Measurement(
                node=name,
                device=device,
                microbatches=self.microbatches,
                repeats=1,
                forward_s=forward_s,
                forward_spread_s=0.0,
                backward_s=times["backward_s"][device],
                backward_spread_s=0.0,
                backward_input_s=times["backward_input_s"].get(device),
                backward_weight_s=times["backward_weight_s"].get(device),
                update_s=times["update_s"][device],
                recompute_s=times["recompute_s"].get(device),
                median_error=self._error(name),
            )
            for name, times in self.times.items()
            for device, forward_s in times["forward_s"].items()
        )

    def _error(self, name: str) -> float | None:
        """How sure a node's times are, where that is given."""
        given = self.graph.nodes[name].get("median_error")
        return None if given is None else share(f"node {name}: median_error", given)

    def _unfit(self, name: str) -> list[str]:
        """The devices that a node does not fit on."""
        unfit = texts(f"node {name}: unfit", self.graph.nodes[name].get("unfit", ()))
        for device in unfit:
            if all(device != known.name for known in self.devices):
                known = ", ".join(device.name for device in self.devices)
                raise ShardwrightError(f"node {name}: unfit names {device}; the devices are {known}")
        return list(unfit)

    def _misfits(self, name: str) -> list[Misfit]:
        return [
            Misfit(node=name, device=device, microbatches=self.microbatches, reason="it is said not to fit")
            for device in self._unfit(name)
        ]

    def _times(self, name: str, key: str) -> dict[str, float]:
        """Seconds by device; nothing where none are given and none are needed."""
        where, given = f"node {name}: {key}", self.graph.nodes[name].get(key)
        unfit = self._unfit(name)
        names = [device for device in self.names if device not in unfit] if unfit else self.names
        if given is None or not names:
            if names and self.kinds[name] == "unit" and (key == "forward_s" or (key == "backward_s" and self.train)):
                hint = ", or make train False" if key == "backward_s" else ""
                raise ShardwrightError(f"{where} is missing; give seconds, by device or one number for all{hint}")
            return {}
        checked: dict[str, float] = {}
        if not isinstance(given, Mapping):
            checked = dict.fromkeys(names, seconds(f"{where} on {names[0]}", given))
        elif given:
            self._refuse_other_devices(where, given, names)
            checked = {device: seconds(f"{where} on {device}", given[device]) for device in names}
        if key != "forward_s" and not self.train and any(checked.values()):
            raise ShardwrightError(f"{where} is {max(checked.values()):g}, but train is False: leave it out")
        return checked

    def _refuse_other_devices(self, where: str, given: Mapping[str, Any], names: list[str]) -> None:
        """Refuse times on a device that is not among ``names``, and none on one of them."""
        for device in given:
            if device not in names:
                raise ShardwrightError(f"{where} names {device}; the devices are {', '.join(names)}")
        if len(given) < len(names):
            missing = next(device for device in names if device not in given)
            raise ShardwrightError(f"{where} has no time on {missing}; give one for each device, or one number for all")

    def _on_edge(self, source: str, target: str) -> dict[str, tuple[Any, Any]]:
        """The tensors that ``target`` reads from ``source`` with their bytes, forward and back; None = by default.

        An edge that says it has none stands for the order alone, which a profile knows by its tensors.
        """
        data = self.graph.edge(source, target)
        if "tensors" not in data:
            made = self.graph.nodes[source].get("output_bytes", 0)
            return {source: (data.get("bytes", made), data.get("gradient_bytes"))}
        where = f"edge {source} -> {target}: tensors"
        if "bytes" in data or "gradient_bytes" in data:
            raise ShardwrightError(f"{where} and bytes are both given; give one of them")
        tensors = data["tensors"]
        pairs = tensors.values() if isinstance(tensors, Mapping) else [()]
        if not all(isinstance(pair, Sequence) and len(pair) == 2 for pair in pairs):
            raise ShardwrightError(f"{where} is {tensors!r}; give {{name: (bytes, bytes of gradient)}}")
        if not tensors:
            return {f"{source} before {target}": (0, 0)}
        return {str(name): (pair[0], pair[1]) for name, pair in tensors.items()}

    def _tensors(self) -> dict[str, Tensor]:
        """Every tensor on an edge, by name; each has one producer and one size."""
        found: dict[str, Tensor] = {}
        for source, target, data in self.graph.edges():
            where = f"edge {source} -> {target}"
            refuse_misspelt(where, data, _OF_EDGES)
            for name, sizes in self._on_edge(source, target).items():
                tensor = self._tensor(where, name, source, sizes)
                known = found.setdefault(name, tensor)
                if known.producer != source:
                    raise ShardwrightError(
                        f"{where}: tensor {name} is also made by {known.producer}; rename one of them"
                    )
                if known != tensor:
                    raise ShardwrightError(
                        f"{where}: tensor {name} has {self._sizes(tensor)} here and {self._sizes(known)} on another "
                        "edge; give a tensor one size, or name two tensors with tensors={name: (bytes, gradient)}"
                    )
        return found

    def _tensor(self, where: str, name: str, source: str, sizes: tuple[Any, Any]) -> Tensor:
        size = whole(f"{where}: bytes of {name}", sizes[0])
        by_default = size if self.train and self.kinds[source] in ("unit", "glue") else 0
        gradient = by_default if sizes[1] is None else whole(f"{where}: gradient_bytes of {name}", sizes[1])
        if gradient not in (0, size) or (gradient and not self.train):
            expected = f"0 or {size}, the tensor's own" if self.train else "0, since train is False"
            raise ShardwrightError(f"{where}: gradient_bytes of {name} is {gradient}; give {expected}")
        held = self.graph.graph.get("tensors", {}).get(name, {})
        sizes_at = {self.microbatches: size}
        if self.kinds[source] == "input":
            batch = whole(f"node {source}: static_bytes", self.graph.nodes[source].get("static_bytes", 0))
            sizes_at.setdefault(1, batch)
        held_bytes = whole(f"held_bytes of {name}", held.get("held_bytes", size))
        return Tensor(
            name=name,
            producer=source,
            requires_grad=gradient > 0,
            bytes=sizes_at,
            storage=held.get("storage", ""),
            held_bytes={} if held_bytes == size else {self.microbatches: held_bytes},
            saved_by=held.get("saver", ""),
        )

    def _sizes(self, tensor: Tensor) -> str:
        return f"{tensor.bytes[self.microbatches]} bytes and {'a' if tensor.requires_grad else 'no'} gradient"

    def _colocate(self, groups: Any) -> tuple[tuple[str, ...], ...]:
        if not isinstance(groups, Iterable) or any(isinstance(g, str) or not isinstance(g, Iterable) for g in groups):
            raise ShardwrightError(f"graph attribute colocate is {groups!r}; give groups of node names")
        named = tuple(tuple(map(str, group)) for group in groups)
        self._refuse_strangers("colocate", itertools.chain(*named))
        return named

    def _ties(self, ties: Any) -> tuple[Tie, ...]:
        made = []
        for tie in ties if isinstance(ties, Iterable) else [None]:
            if not isinstance(tie, Sequence) or len(tie) != 4 or isinstance(tie[1], str) or len(tie[1]) < 2:
                form = "(parameter, two names of its users or more, bytes of a copy, bytes of gradient)"
                raise ShardwrightError(f"graph attribute ties has {tie!r}; give {form}")
            name, users, *sizes = tie
            self._refuse_strangers("ties", map(str, users))
            copy_bytes, gradient_bytes = (whole(f"graph attribute ties: bytes of {name}", size) for size in sizes)
            nodes = tuple(map(str, users))
            made.append(Tie(name=str(name), nodes=nodes, copy_bytes=copy_bytes, gradient_bytes=gradient_bytes))
        return tuple(made)

    def _refuse_strangers(self, noun: str, names: Iterable[str]) -> None:
        for name in names:
            if name not in self.graph:
                raise ShardwrightError(f"graph attribute {noun} names {name}, which is not a node of the graph")


def _in_order(graph: CostGraph) -> list[str]:
    """The nodes in a topological order, as near to their own as can be."""
    position = {name: i for i, name in enumerate(graph)}
    order = topological_order({name: graph.successors(name) for name in graph}, position.__getitem__)
    if len(order) == len(position):
        return order
    import networkx as nx

    cycle = [source for source, _ in nx.find_cycle(graph.networkx())]
    raise ShardwrightError(
        f"the graph has a cycle, {' -> '.join([*cycle, cycle[0]])}; a forward has none: remove one of the edges"
    )
