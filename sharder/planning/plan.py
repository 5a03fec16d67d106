"""The plan: which node runs where, what that is predicted to cost, and the proof. Frozen records, versioned JSON."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt

from shardwright.files import Document, Record
from shardwright.profiler.profile import NodeKind, TensorSpec

__all__ = ["Alternative", "Candidate", "Certificate", "Placement", "Plan", "Prediction", "SplitTie", "Stage"]


class Placement(Record):
    """Where one node of the captured forward runs."""

    node: str
    kind: NodeKind
    type: str
    unit: str
    site: str
    device: str
    stage: NonNegativeInt
    inputs: tuple[str, ...]
    """The nodes that it reads from."""
    weights: Literal["device", "cpu", "disk"] = "device"
    """Where its weights are between calls."""


class Stage(Record):
    """One device's share. Times are of one micro-batch; ``update_s``, ``tie_s`` and ``load_s`` are of one step."""

    index: NonNegativeInt
    device: str
    units: tuple[str, ...]
    forward_s: NonNegativeFloat
    backward_s: NonNegativeFloat
    update_s: NonNegativeFloat
    tie_s: NonNegativeFloat = 0.0
    """Summing the gradients of tied parameters with the other copies."""
    send_forward_s: NonNegativeFloat
    """Activations to the next stage; 0 for the last."""
    receive_backward_s: NonNegativeFloat
    """Gradients from the next stage; 0 for the last."""
    load_s: NonNegativeFloat
    """Seconds of a step in which the device computes or transfers."""
    param_bytes: NonNegativeInt
    """A tied parameter is counted in the stage of its first user only."""
    memory_bytes: NonNegativeInt
    memory_cap_bytes: PositiveInt
    in_flight: PositiveInt
    """Micro-batches whose saved tensors are held at once."""


class SplitTie(Record):
    """A parameter that several stages use: each holds a copy, and their gradients are summed once a step."""

    name: str
    """As in the profile's ties."""
    stages: tuple[NonNegativeInt, ...] = Field(min_length=2)
    """Indices of the stages that hold a copy, in order."""


class Certificate(Record):
    """How good the plan is, and how that is known. ``value_s`` is the largest load of a stage in one step."""

    value_s: NonNegativeFloat
    bound_s: NonNegativeFloat
    """No plan for this profile at this number of micro-batches has a smaller largest load."""
    gap_percent: NonNegativeFloat
    exact: bool
    binds: str
    """What stands in the way of a smaller value."""


class Prediction(Record):
    """What a step is expected to take, sharded and on one device."""

    step_s: NonNegativeFloat
    step_spread_s: NonNegativeFloat = 0.0
    """Interquartile range of the step, from how the devices' speeds varied while they were measured."""
    bubble: float
    """Share of all devices' time in which they wait."""
    baseline_device: str | None
    """The one device that is fastest alone; None when the model fits on none."""
    baseline_microbatches: PositiveInt
    baseline_s: NonNegativeFloat | None
    speedup: NonNegativeFloat | None


class Candidate(Record):
    """A number of micro-batches that was considered."""

    microbatches: PositiveInt
    stages: PositiveInt
    bottleneck_s: NonNegativeFloat
    gap_percent: NonNegativeFloat
    step_s: NonNegativeFloat
    speedup: NonNegativeFloat | None
    chosen: bool


class Alternative(Record):
    """What one would do without a planner, at its best number of micro-batches, priced from the same costs."""

    name: Literal["equal count", "by parameters", "data parallel"]
    microbatches: PositiveInt
    devices: PositiveInt
    step_s: NonNegativeFloat | None
    """None where it is not possible."""
    speedup: NonNegativeFloat | None = None
    why: str = ""
    """Why it is not possible."""


class Plan(Document):
    """Who goes where, and why."""

    kind: ClassVar[str] = "shardwright.plan"
    current_version: ClassVar[int] = 1

    format: Literal["shardwright.plan"] = "shardwright.plan"
    version: Literal[1] = 1
    model: str
    structure: str
    inputs: tuple[TensorSpec, ...]
    batch: PositiveInt
    train: bool
    optimizer: str
    profiled_devices: tuple[str, ...] = ()
    """All devices of the profile: CPU workers share the cores among as many in a run."""
    declared_devices: tuple[str, ...] = ()
    """Those of them that nothing was measured on: the predictions rest on estimates there."""
    objective: Literal["throughput"]
    transfers: Literal["relayed"]
    """Tensors pass from neighbour to neighbour, as the pipeline engine sends them."""
    schedule: Literal["1f1b", "gpipe"]
    microbatches: PositiveInt
    stages: tuple[Stage, ...]
    nodes: tuple[Placement, ...]
    """In the order of the forward. A tied parameter, a buffer or a constant is placed with its first reader; other
    stages that read it, earlier ones among them, have copies."""
    ties: tuple[SplitTie, ...] = ()
    """The tied parameters with users in several stages."""
    obstacles: tuple[str, ...] = ()
    """Why the model can be placed by this plan but not piped."""
    guards: tuple[str, ...] = ()
    """Numbers that the forward reads back: a pipeline is for inputs that give the same."""
    certificate: Certificate
    predicted: Prediction
    candidates: tuple[Candidate, ...]
    alternatives: tuple[Alternative, ...] = ()

    @property
    def of_model(self) -> bool:
        """Whether it is the plan of a model, which can be placed, and not of costs from elsewhere."""
        return bool(self.structure)

    @property
    def devices(self) -> tuple[str, ...]:
        """The devices used, in the order of the stages."""
        return tuple(stage.device for stage in self.stages)

    @property
    def offloaded(self) -> dict[str, str]:
        """Units whose weights are not on their device between calls -> ``"cpu"`` or ``"disk"``."""
        return {n.unit: n.weights for n in self.nodes if n.kind == "unit" and n.weights != "device"}

    def placement(self) -> dict[str, str]:
        """Unit path -> device."""
        return {node.unit: node.device for node in self.nodes if node.kind == "unit"}
