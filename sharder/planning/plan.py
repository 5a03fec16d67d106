"""The plan: which node runs where, what that is predicted to cost, and the proof. Frozen records, versioned JSON."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    model_validator,
)

from shardwright.files import Document, Record
from shardwright.profiler.profile import NodeKind, TensorSpec
from shardwright.sharder.planning.consistency import fault_of
from shardwright.sharder.planning.stage_memory import StageMemory

__all__ = [
    "WORTHWHILE",
    "Alternative",
    "Candidate",
    "Certificate",
    "Change",
    "Changeable",
    "Gain",
    "GroupPrice",
    "Objective",
    "OtherSchedule",
    "PeakShare",
    "PinPrice",
    "Placement",
    "Plan",
    "Prediction",
    "Price",
    "Replans",
    "Sensitivity",
    "SplitStage",
    "SplitTie",
    "Stage",
    "Timed",
]

Objective = Literal["throughput", "latency", "memory"]
Changeable = Literal["batch", "links", "pins", "groups", "pins and groups"]
WORTHWHILE = 1.03
"""A predicted speedup below this is within the noise of the measurements, and not worth a pipeline."""


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
    numbers: bool = True
    """Whether it may make a tensor without dimensions, of one sample if not of more; on the CPU such a tensor meets
    those of any device."""
    weights: Literal["device", "cpu", "disk"] = "device"
    """Where its weights are between calls."""


class Stage(Record):
    """One device's share, or one of several if interleaved.

    Times are of one micro-batch; ``update_s``, ``tie_s`` and ``load_s`` are of one step.
    """

    index: NonNegativeInt
    device: str
    units: tuple[str, ...]
    forward_s: NonNegativeFloat
    backward_s: NonNegativeFloat
    """The whole of it, as the load has it."""
    backward_input_s: NonNegativeFloat | None = None
    """Under zero-bubble, its part up to the gradients of the inputs, none on the first stage; as the step has it."""
    backward_weight_s: NonNegativeFloat | None = None
    """Under zero-bubble, its other part, the gradients of the weights; of the first stage the whole backward."""
    update_s: NonNegativeFloat
    tie_s: NonNegativeFloat = 0.0
    """Summing the gradients of tied parameters with the other copies."""
    engine_s: NonNegativeFloat = 0.0
    """What the pipeline engine takes for each forward and each backward, beside them; in no load."""
    sum_s: NonNegativeFloat = 0.0
    """Summing its gradients over the replicas."""
    send_forward_s: NonNegativeFloat
    """Activations to later stages; 0 for the last."""
    receive_backward_s: NonNegativeFloat
    """Gradients from later stages; 0 for the last."""
    receive_forward_s: NonNegativeFloat | None = None
    """Activations from earlier stages; None: relayed, as much as the stage before sends."""
    send_backward_s: NonNegativeFloat | None = None
    """Gradients to earlier stages; None: relayed, as much as the stage before receives."""
    load_s: NonNegativeFloat
    """Seconds of a step in which the device computes or transfers; where these overlap, the longest of compute, sends
    and receives. Of ``sum_s`` it has what the stage's own parameters take, without latencies."""
    param_bytes: NonNegativeInt
    """A tied parameter is counted in the stage of its first user only."""
    memory_bytes: NonNegativeInt
    """Its part of the device's peak."""
    memory_cap_bytes: PositiveInt
    """Of the device."""
    memory: StageMemory | None = None
    """What ``memory_bytes`` is the peak of; None of a free assignment, and in plans of before it was kept."""
    in_flight: PositiveInt
    """Micro-batches whose saved tensors are held at once."""
    finish_s: NonNegativeFloat | None = None
    """Objective latency: when the device has done everything, its updates as well."""
    recompute: bool = False
    """Whether it keeps only what it receives and computes the rest anew in the backward: ``backward_s`` has that
    forward in it, and ``forward_s`` is of one that keeps nothing."""
    replica_devices: tuple[str, ...] = ()
    """Where it is in the other replicas, in their order. Times are then, unit by unit, of the slowest of all these
    devices, the cap is the smallest, and each holds as much."""


class Timed(Record):
    """When nodes that stay together ran in one pass of one input, in seconds from its start."""

    device: str
    nodes: tuple[str, ...]
    units: tuple[str, ...]
    phase: Literal["forward", "backward"]
    start_s: NonNegativeFloat
    end_s: NonNegativeFloat


class LargerBatch(Record):
    """The most samples that any split was found to hold, in micro-batches of the same size."""

    batch: PositiveInt | None
    """None where any number would fit."""
    devices: tuple[str, ...]
    """Of its stages, in order."""
    proven: bool
    """Whether no split holds more."""


class PeakShare(Record):
    """How full the fullest device is: its predicted peak over its cap."""

    value: NonNegativeFloat
    bound: NonNegativeFloat
    """No plan for this profile at this number of micro-batches has a smaller one."""
    gap_percent: NonNegativeFloat
    exact: bool
    binds: str
    """The device that is fullest."""
    largest_batch: PositiveInt | None
    """Samples that would fit by the same plan in micro-batches of the same size; None where any number would."""
    larger: LargerBatch | None = None
    """Another split that was found to hold more samples."""


class SplitTie(Record):
    """A parameter that several stages use: each holds a copy, and their gradients are summed once a step."""

    name: str
    """As in the profile's ties."""
    stages: tuple[NonNegativeInt, ...] = Field(min_length=2)
    """Indices of the stages that hold a copy, in order."""


class Certificate(Record):
    """How good the plan is, and how that is known.

    ``value_s`` is the largest load of a stage in one step, under the objective latency the finishing time of one input.
    """

    value_s: NonNegativeFloat
    bound_s: NonNegativeFloat
    """No plan for this profile, with so many micro-batches and stages a device, and with replicas on the same mesh of
    devices, has a smaller largest load."""
    gap_percent: NonNegativeFloat
    exact: bool
    binds: str
    """What stands in the way of a smaller value."""
    least_s: NonNegativeFloat | None = None
    """Where the plan has a shorter step than the split with the least largest load: that load."""
    least_step_s: NonNegativeFloat | None = None
    """And the step of that split."""
    step_gap_percent: NonNegativeFloat | None = None
    """How far the step can be above the shortest of all splits into several stages, one a device, with so many
    micro-batches and replicas and under this schedule, at the median times; 0: no split has a shorter one, but for a
    millionth. None where nothing is proven of that."""


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
    stages_per_device: PositiveInt = 1
    zero_bubble: bool = False
    replicas: PositiveInt = 1
    """Each of ``stages`` stages."""
    bottleneck_s: NonNegativeFloat
    gap_percent: NonNegativeFloat
    step_s: NonNegativeFloat
    speedup: NonNegativeFloat | None
    chosen: bool


class SplitStage(Stage):
    """A stage of a split that is not the plan's, with the nodes that it would have, glue among them."""

    nodes: tuple[str, ...]


class OtherSchedule(Record):
    """What the plan's schedule was weighed against: the best split with another schedule."""

    schedule: Literal["1f1b", "gpipe", "interleaved", "zero-bubble"]
    stages_per_device: PositiveInt
    devices: PositiveInt
    microbatches: PositiveInt
    step_s: NonNegativeFloat
    bubble: NonNegativeFloat
    """Share of all its devices' time in which they wait."""
    transfer_s: NonNegativeFloat
    """Seconds of a step that its device which is longest at it sends and receives."""
    own_transfer_s: NonNegativeFloat
    """The same of the plan."""


class Alternative(Record):
    """What one would do without a planner, at its best number of micro-batches, priced from the same costs."""

    name: Literal[
        "equal count", "by parameters", "data parallel", "nothing anew", "replicas", "interleaved", "zero-bubble"
    ]
    microbatches: PositiveInt
    devices: PositiveInt
    """Of all replicas."""
    replicas: PositiveInt = 1
    """Of ``"replicas"``: so many pipelines of ``devices / replicas`` devices."""
    step_s: NonNegativeFloat | None
    """None where it is not possible."""
    speedup: NonNegativeFloat | None = None
    why: str = ""
    """Why it is not possible."""
    schedule: Literal["1f1b", "gpipe"] | None = None
    """Of a split that is possible; None for data parallel, and in plans of before it was kept."""
    stages: tuple[SplitStage, ...] = ()
    """Likewise: with these a run measures it beside the plan."""
    ties: tuple[SplitTie, ...] = ()
    """The tied parameters with users in several of its stages."""


class Price(Record):
    """What the largest load, or under latency the finishing time, or of memory the peak share, would be without a wish.

    The plan's own, or less; None where no plan without the wish was found.
    """

    without_s: NonNegativeFloat | None = None
    without_share: NonNegativeFloat | None = None
    """Under the objective memory."""
    exact: bool
    """Whether it is proven, or only the best that was found."""
    why: str = ""
    """Why there is no price."""


class PinPrice(Price):
    """Of a pin."""

    unit: str
    """Name or pattern."""
    device: str


class GroupPrice(Price):
    """Of a group that is to share a device."""

    units: tuple[str, ...]
    """Names or patterns."""


class Gain(Record):
    """The smallest factor with which a split would be worth it."""

    factor: PositiveInt
    """So many times as large, or as fast; 1 without pins or groups."""
    microbatches: PositiveInt
    step_s: NonNegativeFloat
    speedup: NonNegativeFloat
    """Over the one device, with the same batch."""


class Change(Record):
    """A change of the task that was weighed, since a split is not worth it as it is."""

    what: Changeable
    """``"batch"``: a larger one, in more micro-batches of the same size; ``"links"``: faster ones; ``"pins"`` and
    ``"groups"``: planning without the pins, and without the groups that are to share a device."""
    tried: tuple[PositiveInt, ...] = Field(min_length=1)
    """The factors with which the best that fits was found and priced, in rising order, up to the first that pays; of
    pins and groups 1."""
    pays: Gain | None
    """None where none of them does."""


class Replans(Record):
    """What planning with drawn costs found."""

    planned: NonNegativeInt
    """How often."""
    others: NonNegativeInt
    """How often another split had a largest load that was smaller by more than half a percent."""
    most_lost_percent: NonNegativeFloat
    """By how much at most, in percent of the plan's own with the same costs."""


class Sensitivity(Record):
    """How the prediction moves when costs are drawn within the uncertainty of what was measured."""

    draws: PositiveInt
    step_low_s: NonNegativeFloat
    """The plan's step is below this in 5% of the draws."""
    step_high_s: NonNegativeFloat
    """It is above this in 5% of them."""
    rival: str
    """Of what else was weighed, that which the plan beats least surely; "" where there was nothing else."""
    rival_step_s: NonNegativeFloat
    faster_share: float = Field(ge=0, le=1)
    """The share of the draws in which the plan's step is not longer than the rival's."""
    replans: Replans | None = None


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
    paces: dict[str, PositiveFloat] = Field(default_factory=dict)
    """Device -> the pace at which the predictions hold, as the profile has it; of a GPU where its host, which enqueues
    the work, is what sets the times."""
    hosts: dict[str, str] = Field(default_factory=dict)
    """The node of each of them, where a cluster file names several; empty for the devices of one machine."""
    objective: Objective
    contiguous: bool = True
    """Whether the stages are a chain that a pipeline can run; if not, they are the shares of the devices, in no
    order."""
    transfers: Literal["relayed", "staged", "direct"]
    """How tensors were taken to pass: from neighbour to neighbour, as the pipeline engine sends them; through the
    host's memory; or straight to each stage that reads them."""
    overlap: bool = False
    """Whether transfers were taken to go on beside compute."""
    schedule: Literal["1f1b", "gpipe", "interleaved", "zero-bubble"]
    stages_per_device: PositiveInt = 1
    """More than one if interleaved: stage s is then on the device of stage s modulo the number of devices."""
    replicas: PositiveInt = 1
    """So many equal pipelines, each over its own devices; the gradients of a stage are summed over them once a step."""
    microbatches: PositiveInt
    """Of the whole batch; each replica takes an equal part of them."""
    stages: tuple[Stage, ...]
    """Of one replica."""
    nodes: tuple[Placement, ...]
    """In the order of the forward, where they are in the first replica. A tied parameter, a buffer or a constant is
    placed with its first reader; other stages that read it, earlier ones among them, have copies."""
    ties: tuple[SplitTie, ...] = ()
    """The tied parameters with users in several stages."""
    obstacles: tuple[str, ...] = ()
    """Why the model can be placed by this plan but not piped."""
    guards: tuple[str, ...] = ()
    """Numbers that the forward reads back: a pipeline is for inputs that give the same."""
    certificate: Certificate
    peak: PeakShare | None = None
    """Objective memory: what was made least. The certificate is then of the largest load with no larger peak share."""
    timeline: tuple[Timed, ...] = ()
    """Objective latency: the schedule that the certificate is of."""
    advice: str = ""
    """What would give a better proof."""
    predicted: Prediction
    candidates: tuple[Candidate, ...]
    other_schedule: OtherSchedule | None = None
    """None where only one schedule was weighed, or one device is better."""
    alternatives: tuple[Alternative, ...] = ()
    pins: tuple[PinPrice, ...] = ()
    groups: tuple[GroupPrice, ...] = ()
    """What the planner was told, and what that costs."""
    changes: tuple[Change, ...] | None = None
    """Where sharding is not worth it: what was tried that might change that; None where it is, or no single device
    holds the model."""
    sensitivity: Sensitivity | None = None
    """None where the profile does not say how sure its times are."""

    @model_validator(mode="after")
    def _holds_together(self) -> Self:
        fault = fault_of(self)
        if fault is not None:
            raise ValueError(fault)
        return self

    @classmethod
    def fault(cls, error: ValidationError, content: Any) -> str:
        """The first thing that is wrong with a file: a damaged field, or what :func:`fault_of` finds."""
        first = error.errors()[0]
        if first["type"] == "value_error" and not first["loc"]:
            return f"contradicts itself: {first['ctx']['error']}, or make the plan again"
        return super().fault(error, content)

    @property
    def of_model(self) -> bool:
        """Whether it is the plan of a model, which can be placed, and not of costs from elsewhere."""
        return bool(self.structure)

    @property
    def pipelines(self) -> tuple[tuple[str, ...], ...]:
        """By replica: its devices, each once, in the order of the stages."""
        rows = ((stage.device, *stage.replica_devices) for stage in self.stages)
        return tuple(tuple(dict.fromkeys(devices)) for devices in zip(*rows, strict=True))

    @property
    def devices(self) -> tuple[str, ...]:
        """The devices used, each once, one replica after another, in the order of the stages."""
        return tuple(device for pipeline in self.pipelines for device in pipeline)

    @property
    def depth(self) -> int:
        """The devices of one replica."""
        return len(self.devices) // self.replicas

    @property
    def pipeline_microbatches(self) -> int:
        """The micro-batches of one replica."""
        return self.microbatches // self.replicas

    @property
    def recomputed(self) -> tuple[Stage, ...]:
        """The stages that are computed anew in the backward."""
        return tuple(stage for stage in self.stages if stage.recompute)

    @property
    def offloaded(self) -> dict[str, str]:
        """Units whose weights are not on their device between calls -> ``"cpu"`` or ``"disk"``."""
        return {n.unit: n.weights for n in self.nodes if n.kind == "unit" and n.weights != "device"}

    @property
    def first_replica(self) -> Plan:
        """The pipeline of the first replica with its micro-batches: the others differ from it in their devices only.

        Its batch is that replica's part. Predictions stay those of the whole.
        """
        part = self.batch // self.replicas
        stages = tuple(stage.model_copy(update={"replica_devices": ()}) for stage in self.stages)
        inputs = tuple(
            spec.model_copy(update={"shape": (part, *spec.shape[1:])}) if spec.shape[:1] == (self.batch,) else spec
            for spec in self.inputs
        )
        return self.model_copy(
            update={
                "stages": stages,
                "replicas": 1,
                "microbatches": self.pipeline_microbatches,
                "batch": part,
                "inputs": inputs,
            }
        )

    def memory(self) -> dict[str, int]:
        """Device -> bytes of its predicted peak: the sum of what its stages hold then."""
        found = dict.fromkeys(self.devices, 0)
        for stage in self.stages:
            for device in (stage.device, *stage.replica_devices):
                found[device] += stage.memory_bytes
        return found

    def save_trace(self, path: str | Path) -> None:
        """Write the step that the plan foresees as a Chrome trace, which ui.perfetto.dev opens, with the memory of each
        device; of a latency plan the pass of one input.

        Raises:
            ShardwrightError: there is no timeline, as of a single device or a free assignment, or ``path`` cannot be
                written.
        """
        from shardwright.sharder.planning.chrome import write_plan_trace

        write_plan_trace(self, path)

    def placement(self) -> dict[str, str]:
        """Unit path -> device, of the first replica."""
        return {node.unit: node.device for node in self.nodes if node.kind == "unit"}
