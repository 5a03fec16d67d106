"""Costs that a person writes, as JSON: enough to plan with, without a model (docs/costs.md).

They become a cost graph, whose attributes have the same names, and so a profile.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    model_validator,
)

from shardwright.errors import ShardwrightError
from shardwright.files import Document, Record, said_of
from shardwright.profiler.costgraph import CostGraph
from shardwright.profiler.profile import Profile

if TYPE_CHECKING:
    import networkx as nx

__all__ = ["Costs", "CostsOfDevice", "CostsOfLink", "CostsOfUnit"]

Seconds = NonNegativeFloat | dict[str, NonNegativeFloat]
"""One number for all devices, or a number by device."""


class CostsOfDevice(Record):
    """What a device can hold."""

    memory_bytes: PositiveInt = 2**60
    """What a plan may use there; more than any device has by default."""
    fetch_bytes_per_s: PositiveFloat | None = None
    """How fast weights come from the host's memory, for weights that fit on no device (inference)."""
    host_latency_s: NonNegativeFloat | None = None
    """Of a staged transfer to or from the host's memory; without it and the bandwidth, those of the slowest link."""
    host_bandwidth_bytes_per_s: PositiveFloat | None = None
    in_host_memory: bool = False
    """Whether the device's memory is the host's, so that staged transfers take it no time."""
    engine_s: NonNegativeFloat = 0.0
    """What the pipeline engine takes for each forward and each backward of a micro-batch, beside the units' times."""


class CostsOfLink(Record):
    """What a transfer takes: ``latency_s + bytes / bandwidth_bytes_per_s``.

    Between two devices both ways, from ``source`` to ``target`` one way, or, with neither, for all pairs that no other
    link is for.
    """

    between: tuple[str, str] | None = None
    source: str | None = None
    target: str | None = None
    latency_s: NonNegativeFloat = 0.0
    bandwidth_bytes_per_s: PositiveFloat

    @model_validator(mode="after")
    def _has_its_ends(self) -> Self:
        if (self.source is None) != (self.target is None) or (self.between and self.source is not None):
            raise ValueError("a link has source and target, or between, or neither for all other pairs")
        return self

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """The ordered pairs that it names."""
        if self.between:
            return [self.between, (self.between[1], self.between[0])]
        return [] if self.source is None or self.target is None else [(self.source, self.target)]


class CostsOfUnit(Record):
    """One unit: times of one micro-batch on a device, and bytes."""

    name: str = Field(min_length=1)
    forward_s: Seconds
    backward_s: Seconds | None = None
    """Needed in training."""
    backward_input_s: Seconds | None = None
    """Its part up to the gradients of the inputs; with the other part, for zero-bubble schedules."""
    backward_weight_s: Seconds | None = None
    """Its other part, the gradients of the weights."""
    update_s: Seconds = 0.0
    """One optimizer step, once a batch."""
    recompute_s: Seconds | None = None
    """A forward that keeps nothing for backward, which a stage that is computed anew adds; ``forward_s`` by default."""
    static_bytes: NonNegativeInt | None = None
    """Parameters, gradients and optimizer state; ``param_bytes`` by default."""
    param_bytes: NonNegativeInt = 0
    """The parameters among them."""
    grad_bytes: NonNegativeInt | None = None
    """The gradients among them, which data parallel sums; by default ``param_bytes``, as far as there is room."""
    saved_bytes: NonNegativeInt = 0
    """Kept for backward by one micro-batch."""
    deferred_bytes: NonNegativeInt = 0
    """Held from the first part of the backward to the second, beside those: gradients that came in."""
    output_bytes: NonNegativeInt = 0
    """The tensor that it makes of one micro-batch, and hands to each unit that reads it."""
    median_error: NonNegativeFloat | None = None
    """How sure its times are: half of their 95% interval as a part of them, 0.05 for 5%."""
    inputs: tuple[str, ...] | None = None
    """The units that it reads; by default the one before it. What the model itself is given is not listed."""
    after: tuple[str, ...] = ()
    """Units that have to run before it though it reads nothing of theirs."""


class Costs(Document):
    """Times, bytes and links from anywhere, at one number of micro-batches."""

    kind: ClassVar[str] = "shardwright.costs"
    current_version: ClassVar[int] = 1
    remedy: ClassVar[str] = "correct it; docs/costs.md lists the fields"

    format: Literal["shardwright.costs"] = "shardwright.costs"
    version: Literal[1] = 1
    model: str = "costs"
    """What the costs are of, for reports."""
    train: bool = True
    microbatches: PositiveInt | None = None
    """How many micro-batches make a step; the times and bytes are those of one. One for each device by default."""
    devices: Annotated[dict[str, CostsOfDevice], Field(min_length=1)]
    links: tuple[CostsOfLink, ...] = ()
    """Without any, transfers take no time."""
    units: Annotated[tuple[CostsOfUnit, ...], Field(min_length=1)]
    """In the order of the forward."""
    colocate: tuple[tuple[str, ...], ...] = ()
    """Groups of units that must share a device."""
    host_bytes: NonNegativeInt = 0
    """Free memory of the host, for weights that fit on no device (inference)."""
    disk_bytes_per_s: PositiveFloat | None = None
    """How fast weights come from the host's disk (inference)."""

    @classmethod
    def parse(cls, text: str, *, source: str) -> Self:
        """Make costs from JSON ``text``; ``source`` names it in errors."""
        from shardwright.profiler.formats.from_graph import costs_from_graph

        costs = super().parse(text, source=source)
        try:
            costs_from_graph(costs.cost_graph())
        except ShardwrightError as error:
            raise ShardwrightError(f"{source}: {error}") from error
        return costs

    @classmethod
    def fault(cls, error: ValidationError, content: Any) -> str:
        """The first thing that is wrong: a field that is not there is named, and a unit by its name."""
        first = error.errors()[0]
        where = _place(first["loc"], content)
        if first["type"] == "extra_forbidden":
            return f"has {where}, a field that costs do not have; {cls.remedy}"
        return f"is not right: {where}: {said_of(first)}; {cls.remedy}"

    @property
    def of_model(self) -> bool:
        """As of profiles: whether a model stands behind them, which none does."""
        return False

    def profile(self) -> Profile:
        """The costs as a profile, which no model stands behind."""
        from shardwright.profiler.formats.from_graph import profile_from_graph

        return profile_from_graph(self.cost_graph())

    def graph(self) -> nx.DiGraph[str]:
        """The costs as a cost graph; see :mod:`shardwright.profiler.graph`.

        Raises:
            ShardwrightError: a link or a unit names something that is not there, or a name stands twice.
        """
        return self.cost_graph().networkx()

    def cost_graph(self) -> CostGraph:
        """The same as the planner takes it, without networkx."""
        attributes = {
            "name": self.model,
            "train": self.train,
            "devices": {name: device.model_dump() for name, device in self.devices.items()},
            "links": self._links(),
            "colocate": self.colocate,
            "host_bytes": self.host_bytes,
            "disk_bytes_per_s": self.disk_bytes_per_s,
        }
        if self.microbatches is not None:
            attributes["microbatches"] = self.microbatches
        nodes: dict[str, dict[str, Any]] = {}
        edges: dict[tuple[str, str], dict[str, Any]] = {}
        before: str | None = None
        for unit in self.units:
            if unit.name in nodes:
                raise ShardwrightError(f"unit {unit.name} is there twice; give each unit a name of its own")
            inputs = unit.inputs if unit.inputs is not None else (before,) if before else ()
            for source in (*inputs, *unit.after):
                if source not in nodes:
                    what, field = ("reads", "inputs") if source in inputs else ("comes after", "after")
                    raise ShardwrightError(
                        f"unit {unit.name} {what} {source}, which is no unit before it; correct {field}"
                    )
                edges[source, unit.name] = {} if source in inputs else {"tensors": {}}
            nodes[unit.name] = _attributes(unit)
            before = unit.name
        return CostGraph(attributes, nodes, ((*edge, data) for edge, data in edges.items()))

    def _links(self) -> dict[tuple[str, str], tuple[float, float]]:
        """Every ordered pair's latency and bandwidth; empty without links."""
        others = [link for link in self.links if not link.pairs]
        if len(others) > 1:
            raise ShardwrightError("two links name no devices; one at most is for all other pairs")
        links: dict[tuple[str, str], tuple[float, float]] = {}
        for link in self.links:
            for pair in link.pairs:
                if pair in links:
                    raise ShardwrightError(f"link {pair[0]} -> {pair[1]} is there twice; keep one of them")
                links[pair] = (link.latency_s, link.bandwidth_bytes_per_s)
        for link in others:
            pairs = [(a, b) for a in self.devices for b in self.devices if a != b]
            links = dict.fromkeys(pairs, (link.latency_s, link.bandwidth_bytes_per_s)) | links
        return links


def _place(parts: Sequence[int | str], content: Any) -> str:
    """Where in ``content``: ``unit head: forward_s``; without the names that pydantic gives to alternatives."""
    words: list[str] = []
    for position, part in enumerate(parts):
        last = position == len(parts) - 1
        if isinstance(content, Mapping):
            if part not in content and not last:
                break
            content = content.get(part)
        elif isinstance(content, list) and isinstance(part, int):
            content = content[part]
        else:
            break
        words.append(str(part))
        if words[:-1] == ["units"] and isinstance(content, Mapping) and content.get("name"):
            words = [f"unit {content['name']}:"]
    return ".".join(words).replace(":.", ": ") or "(top level)"


def _attributes(unit: CostsOfUnit) -> dict[str, Any]:
    """The node's attributes: what was given."""
    return unit.model_dump(exclude={"name", "inputs", "after"}, exclude_none=True)
