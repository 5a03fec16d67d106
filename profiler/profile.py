"""The profile: what was measured, as frozen records and versioned JSON. Plain numbers: seconds and bytes."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, ClassVar, Literal, Self

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from shardwright.errors import ShardwrightError
from shardwright.files import Document, Record
from shardwright.profiler.shared_updates import once_each, shared_of

if TYPE_CHECKING:
    import networkx
    import pandas

__all__ = [
    "Clocked",
    "Device",
    "Estimate",
    "Link",
    "Measurement",
    "Misfit",
    "Node",
    "Origin",
    "Profile",
    "Tensor",
    "TensorSpec",
    "Tie",
    "Timing",
    "Variation",
]

NodeKind = Literal["input", "parameter", "unit", "glue", "output"]
Origin = Literal["measured", "scaled", "estimated"]
"""Timed there; measured on another device of the same model; or computed from what the device can do at most."""


class Device(Record):
    """A place where units run: ``cuda:0``, or ``cpu:0`` = a worker process pinned to its own cores."""

    name: str
    kind: Literal["cpu", "cuda", "other"]
    """``"other"``: of costs given for a device that shardwright does not run on."""
    description: str
    memory_bytes: PositiveInt
    """What a plan may use there by default."""
    cores: tuple[int, ...] = ()
    """CPU workers only: the cores that the worker is pinned to."""
    fetch_bytes_per_s: PositiveFloat | None = None
    """CUDA only: how fast weights come from the host's memory."""
    host_latency_s: NonNegativeFloat | None = None
    """Of a transfer to or from the host's memory; where neither this nor the bandwidth is given, staged transfers are
    taken to be as slow as the device's slowest link."""
    host_bandwidth_bytes_per_s: PositiveFloat | None = None
    in_host_memory: bool = False
    """Whether the device's memory is the host's, so that staged transfers take it no time."""
    engine_s: NonNegativeFloat = 0.0
    """What the pipeline engine takes there for each forward and each backward of a micro-batch, beside the stage's own
    work; measured between CPU workers."""
    pace_s: PositiveFloat | None = None
    """What a fixed piece of work took when times were as they are told: on a CPU worker, or, for a GPU, on the host
    that enqueues (:mod:`shardwright.profiler.measuring.pace`)."""
    node: str = ""
    """The host, where a cluster was declared that has several."""
    model: str = ""
    """The catalogue's name of it, where it has one."""
    declared: bool = False
    """It is known from a cluster file only: nothing was measured on it."""


class Link(Record):
    """An ordered pair of devices: a message of b bytes takes ``latency_s + b / bandwidth_bytes_per_s``."""

    source: str
    target: str
    latency_s: NonNegativeFloat
    bandwidth_bytes_per_s: PositiveFloat
    busy_latency_s: NonNegativeFloat | None = None
    """While every device sends to one and receives from another; None where only one at a time was timed."""
    busy_bandwidth_bytes_per_s: PositiveFloat | None = None
    peer: bool | None = None
    """Between GPUs: whether one reaches the other's memory; otherwise copies are staged through the host's."""
    probed_bytes: NonNegativeInt = 0
    """How many bytes were sent to be compared; 0 for a profile made before links were."""
    wrong_bytes: NonNegativeInt = 0
    """How many of them arrived changed, or not at all."""

    origin: Origin = "measured"

    @property
    def corrupt(self) -> bool:
        """Whether it changes what it carries, so that nothing may be sent over it."""
        return self.wrong_bytes > 0


class TensorSpec(Record):
    """Shape and dtype of one tensor among the model's inputs."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.dtype} {'x'.join(map(str, self.shape)) or 'scalar'}"


class Node(Record):
    """One step of the captured forward: a unit call, a glue operation, a model input, a parameter, or the outputs.

    Bytes that change with the micro-batch are given for each number of micro-batches that was profiled.
    """

    name: str
    kind: NodeKind
    type: str
    """Class of the unit, or name of the glue function."""
    unit: str = ""
    """Units and parameters: the path in ``named_modules()`` or ``named_parameters()``."""
    site: str = ""
    """Glue: file and position of the call in the user's forward."""
    inputs: tuple[str, ...] = ()
    """Names of the tensors that it reads."""
    checkpointed: bool = False
    """Whether its backward computes it anew, all or in part, as the model asks (``torch.utils.checkpoint``)."""
    param_bytes: NonNegativeInt = 0
    buffer_bytes: NonNegativeInt = 0
    grad_bytes: NonNegativeInt = 0
    optimizer_bytes: NonNegativeInt = 0
    output_bytes: dict[PositiveInt, NonNegativeInt] = Field(default_factory=dict)
    saved_bytes: dict[PositiveInt, NonNegativeInt] = Field(default_factory=dict)
    """Kept for backward, each storage counted once in the whole model, parameters excluded."""
    forward_peak_bytes: dict[PositiveInt, NonNegativeInt] = Field(default_factory=dict)
    """Workspace: the most that the forward takes at once beyond its inputs and what it leaves, outputs and saved."""
    backward_peak_bytes: dict[PositiveInt, NonNegativeInt] = Field(default_factory=dict)
    """The most that the backward takes at once beyond saved tensors, the gradients of its outputs and those of its
    parameters, which are there from before; the gradients that it makes for its inputs are in it."""
    input_gradient_bytes: dict[PositiveInt, NonNegativeInt] = Field(default_factory=dict)
    """Storages of the gradients that its backward hands on: those of an addition are one."""
    deferred_bytes: dict[PositiveInt, NonNegativeInt] = Field(default_factory=dict)
    """Where the backward was timed in two parts: what is held between them beside the saved tensors, the gradients that
    came in where those of the weights begin."""
    update_peak_bytes: dict[Literal["cpu", "cuda"], NonNegativeInt] = Field(default_factory=dict)
    """Workspace of the optimizer by kind of device: on a CPU it takes one parameter after another, on a GPU all of the
    device at once (``foreach``)."""
    update_left_bytes: NonNegativeInt = 0
    """On a CPU: of that workspace, what is still held when the next node's turn begins."""

    @property
    def static_bytes(self) -> int:
        """Bytes that stay for the whole training: parameters, buffers, gradients, optimizer state."""
        return self.param_bytes + self.buffer_bytes + self.grad_bytes + self.optimizer_bytes


class Tensor(Record):
    """One tensor that some node makes and others read."""

    name: str
    producer: str
    requires_grad: bool
    """A gradient of the same size flows back to the producer."""
    bytes: dict[PositiveInt, NonNegativeInt]
    storage: str = ""
    """An earlier tensor of which this is a view, so that it holds no memory of its own."""
    held_bytes: dict[PositiveInt, NonNegativeInt] = Field(default_factory=dict)
    """Of its storage, where that is not ``bytes``: more if others share it, 0 if it is the model's own or earlier."""
    saved_by: str = ""
    """The node whose ``saved_bytes`` count it; "" where autograd does not keep it."""


class Tie(Record):
    """One parameter with several users: each stage that has some of them but not all holds a copy of its own.

    Where glue uses the parameter, a node of kind ``parameter`` is there too, and the glue reads it. The static bytes
    are counted only at the first node, in the order of the forward, that holds the parameter.
    """

    name: str
    """The parameter: its path in ``named_parameters()``, and the ``unit`` of its node if it has one."""
    nodes: tuple[str, ...] = Field(min_length=2)
    """The units and the glue that use it, in the order of the forward."""
    copy_bytes: NonNegativeInt
    """Parameter, gradient and optimizer state of one copy."""
    gradient_bytes: NonNegativeInt
    """Summed over the copies once a step; 0 without training, or for a parameter that is not trained."""


class Timing(Record):
    """Times of one piece of work on one device: medians and their spread, the interquartile range of the repeats."""

    repeats: NonNegativeInt
    """0 where nothing was timed."""
    forward_s: NonNegativeFloat
    forward_spread_s: NonNegativeFloat
    backward_s: NonNegativeFloat
    backward_spread_s: NonNegativeFloat
    backward_input_s: NonNegativeFloat | None = None
    """The backward up to the gradients of the inputs, where it was timed in two parts (``split_backward``)."""
    backward_weight_s: NonNegativeFloat | None = None
    """Its rest: the gradients of the weights."""
    recompute_s: NonNegativeFloat | None = None
    """Training only: the forward without keeping anything for backward, which activation checkpointing adds."""
    update_s: NonNegativeFloat
    """One optimizer step over the node's parameters (once a batch, whatever the number of micro-batches)."""
    first_call_s: NonNegativeFloat = 0.0
    """The first forward and backward, with what is made and tuned once; not part of the medians."""
    median_error: NonNegativeFloat | None = None
    """Half the width of the 95% confidence interval of the median of forward and backward, as a part of it."""
    outliers: NonNegativeInt = 0
    """Repeats more than three interquartile ranges outside the quartiles; they are part of all figures."""
    peak_bytes: NonNegativeInt | None = None
    """CUDA only: the allocator's peak during forward, backward and update, beyond what was held before."""
    source: Origin = "measured"
    """Where the times come from; see :data:`Origin`."""


class Clocked(Timing):
    """A timing as it was measured: where the host enqueues work, on the device's clock and on the host's."""

    host: Timing | None = None
    """What the host takes to enqueue it."""
    pace_s: PositiveFloat | None = None
    """The pace at which the times are told, those of the host where it enqueues
    (:mod:`shardwright.profiler.measuring.pace`)."""


class Estimate(Record):
    """How the times of a declared device were estimated: the share of its peak rates that was counted on."""

    device: str
    compute_efficiency: PositiveFloat
    memory_efficiency: PositiveFloat
    operation_s: NonNegativeFloat
    """What each operator takes beside its arithmetic and its bytes."""
    fitted_to: str = ""
    """The device whose measurements gave ``operation_s``; without one all figures are assumed."""
    efficiencies_fitted: bool = False
    """Whether they gave the efficiencies too, as they do where that device's peak rates are known."""
    median_error: NonNegativeFloat | None = None
    """Of the fit on that device's own times, relative."""


class Case(Record):
    """A node on a device, at the batch divided into ``microbatches``."""

    node: str
    device: str
    microbatches: PositiveInt


class Measurement(Timing, Case):
    """The times of a node on a device."""

    host_bound: bool = False
    """CUDA only: a whole step takes the host longer to enqueue than the device to do; times are the host's then."""


class Misfit(Case):
    """A node that does not fit on a device, even alone."""

    reason: str


class Variation(Record):
    """How a device's speed varied while it was measured: the time of each round over all steps, median = 1."""

    device: str
    relative: tuple[PositiveFloat, ...]


class Profile(Document):
    """Time and memory of every node of a model on every device, and the links between the devices."""

    kind: ClassVar[str] = "shardwright.profile"
    current_version: ClassVar[int] = 1

    format: Literal["shardwright.profile"] = "shardwright.profile"
    version: Literal[1] = 1
    model: str
    """The target that was profiled, or the class of the model."""
    structure: str
    """Digest of the units' names, classes, parameter shapes and dtypes: a plan is for models that share it; empty for
    costs from elsewhere, with no model behind them."""
    inputs: tuple[TensorSpec, ...]
    batch: PositiveInt
    train: bool
    optimizer: str
    master_weights: bool = False
    """Whether the optimizer works on fp32 copies of parameters of lower precision."""
    torch_version: str
    microbatches: tuple[PositiveInt, ...] = Field(min_length=1)
    devices: tuple[Device, ...] = Field(min_length=1)
    links: tuple[Link, ...]
    nodes: tuple[Node, ...]
    """In the order of the forward."""
    tensors: tuple[Tensor, ...]
    colocate: tuple[tuple[str, ...], ...] = ()
    """Groups of nodes that must share a device (shared units, in-place changes)."""
    ties: tuple[Tie, ...] = ()
    """Parameters with several users, which need not share a device."""
    obstacles: tuple[str, ...] = ()
    """Why the forward cannot be piped, with file and line; it can be placed all the same."""
    guards: tuple[str, ...] = ()
    """Numbers that the forward reads back from masks and indices: a pipeline is for inputs that give the same."""
    undivided: str = ""
    """Why the batch was not divided into micro-batches, where that was left to the profiler."""
    host_bytes: NonNegativeInt = 0
    """Free memory of the host, where weights can stay that fit on no device."""
    disk_bytes_per_s: PositiveFloat | None = None
    """How fast weights come from the host's disk."""
    measurements: tuple[Measurement, ...]
    estimates: tuple[Estimate, ...] = ()
    """One for each device whose times are estimated."""
    misfits: tuple[Misfit, ...] = ()
    """What was tried on a device and did not fit: no measurement there, and no plan puts it there."""
    variations: tuple[Variation, ...] = ()
    """Devices without one are taken as steady."""

    @property
    def hosts(self) -> dict[str, str]:
        """Device -> the node that it is on, where a cluster file names several; else empty."""
        found = {device.name: device.node for device in self.devices}
        return found if len(set(found.values())) > 1 else {}

    @model_validator(mode="after")
    def _refers_to_itself(self) -> Self:
        """Refuse a name that is used and not defined."""
        nodes = {node.name for node in self.nodes}
        tensors = {tensor.name for tensor in self.tensors}
        devices = {device.name for device in self.devices}
        for noun, used, defined in (
            ("node", {tensor.producer for tensor in self.tensors}, nodes),
            ("node", {name for group in self.colocate for name in group}, nodes),
            ("node", {name for tie in self.ties for name in tie.nodes}, nodes),
            ("node", {m.node for m in (*self.measurements, *self.misfits)}, nodes),
            ("node", {tensor.saved_by for tensor in self.tensors} - {""}, nodes),
            ("tensor", {tensor.storage for tensor in self.tensors} - {""}, tensors),
            ("tensor", {name for node in self.nodes for name in node.inputs}, tensors),
            ("device", {m.device for m in (*self.measurements, *self.misfits)}, devices),
            ("device", {estimate.device for estimate in self.estimates}, devices),
            ("device", {end for link in self.links for end in (link.source, link.target)}, devices),
        ):
            if used - defined:
                raise ValueError(f"{noun} {min(used - defined)!r} is used but not listed")
        return self

    @property
    def of_model(self) -> bool:
        """Whether it was measured on a model; else its costs are from elsewhere, and a plan of them places nothing."""
        return bool(self.structure)

    @cached_property
    def _measured(self) -> dict[tuple[str, str, int], Measurement]:
        return {(m.node, m.device, m.microbatches): m for m in self.measurements}

    def measurement(self, node: str, device: str, microbatches: int) -> Measurement | None:
        """The times of ``node`` on ``device``, or None for a node that takes none.

        Inputs take none, and parameters that are not trained or that a unit holds.
        """
        return self._measured.get((node, device, microbatches))

    def step_s(self, device: str, microbatches: int = 1) -> float:
        """Sum over all nodes of one step on ``device``: forward and backward of each micro-batch, one update.

        A parameter that several nodes use is updated once.
        """
        rows = [m for m in self.measurements if m.device == device and m.microbatches == microbatches]
        if not rows:
            known = ", ".join(d.name for d in self.devices)
            raise ShardwrightError(
                f"the profile has no times for {device} at {microbatches} micro-batches; it has devices {known} "
                f"and micro-batches {', '.join(map(str, self.microbatches))}"
            )
        update_s = {m.node: m.update_s for m in rows}
        holders = {n.unit or n.name: n.name for n in self.nodes if n.kind == "parameter" and update_s.get(n.name)}
        ties = [(tie.name, tie.nodes, tie.gradient_bytes) for tie in self.ties]
        updates = once_each(
            {node.name: {device: update_s[node.name]} for node in self.nodes if node.name in update_s},
            {node.name: node.grad_bytes for node in self.nodes},
            shared_of(ties, (node.name for node in self.nodes), holders),
            {node.name: node.unit for node in self.nodes if node.kind == "unit" and node.unit},
        )
        updates_s = sum(seconds for own in updates.own.values() for seconds in own.values())
        return updates_s + sum(microbatches * (m.forward_s + m.backward_s) for m in rows)

    def frame(self) -> pandas.DataFrame:
        """One row for each measurement, with the node's kind, type and bytes beside its times."""
        import pandas

        nodes = {node.name: node for node in self.nodes}
        rows = []
        for m in self.measurements:
            node = nodes[m.node]
            rows.append(
                {
                    **m.model_dump(),
                    "kind": node.kind,
                    "type": node.type,
                    "param_bytes": node.param_bytes,
                    "buffer_bytes": node.buffer_bytes,
                    "grad_bytes": node.grad_bytes,
                    "optimizer_bytes": node.optimizer_bytes,
                    "output_bytes": node.output_bytes.get(m.microbatches, 0),
                    "saved_bytes": node.saved_bytes.get(m.microbatches, 0),
                }
            )
        frame = pandas.DataFrame(rows)
        # Whole numbers, also where some are missing; and numbers, also where all are.
        if rows:
            frame["peak_bytes"] = frame["peak_bytes"].astype("Int64")
            optional = ["backward_input_s", "backward_weight_s", "recompute_s", "median_error"]
            frame[optional] = frame[optional].astype(float)
        return frame

    def graph(self, microbatches: int = 1, *, flat: bool = False) -> networkx.DiGraph[str]:
        """The cost graph at ``microbatches``; see :mod:`shardwright.profiler.graph` for its attributes.

        With ``flat``, every attribute is a number or a text, as GraphML needs: ``forward_s:cuda:0``; see
        :mod:`shardwright.profiler.formats.graphml`. ``sw.plan`` takes both.
        """
        from shardwright.profiler.formats.graphml import flat_graph
        from shardwright.profiler.graph import cost_graph

        graph = cost_graph(self, microbatches)
        return flat_graph(graph) if flat else graph
