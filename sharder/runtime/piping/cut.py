"""Cutting: a captured forward and a plan become one module a stage, each of which reads only what its neighbour sends.

A tensor that a later stage needs is relayed through the stages between, because the engine lets only neighbours talk.
A stage travels to its worker as a list of instructions and the modules they call, since fx graphs do not pickle.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from shardwright.errors import ShardwrightError
from shardwright.profiler.recording.replayed import Replayed
from shardwright.profiler.recording.unitgraph import Step, UnitGraph, Value, graph_root
from shardwright.sharder.planning.plan import Placement, Plan

__all__ = [
    "Share",
    "StageProgram",
    "TensorShape",
    "check_all_called",
    "cut",
    "fitted",
    "mapped_arguments",
    "on_device",
    "whole_program",
]


class TensorShape(NamedTuple):
    """A tensor that crosses into or out of a stage, at micro-batch size."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    requires_grad: bool

    def example(self) -> Tensor:
        """A tensor without data that has this shape and dtype."""
        return torch.empty(self.shape, dtype=self.dtype, device="meta", requires_grad=self.requires_grad)


class Reference(NamedTuple):
    """Stands for an earlier instruction's result among an instruction's arguments."""

    name: str


class Instruction(NamedTuple):
    """One node of a stage's graph."""

    op: str
    name: str
    target: str | Callable[..., Any]
    args: Any
    kwargs: Any


@dataclass(frozen=True)
class StageProgram:
    """One stage, ready to be sent: what it computes, what it calls, and what crosses its borders."""

    index: int
    instructions: tuple[Instruction, ...]
    attributes: dict[str, Any]
    """Units, parameters and constants by their name in the model."""
    inputs: tuple[TensorShape, ...]
    outputs: tuple[TensorShape, ...]
    recompute: bool = False
    """Whether it is computed anew in the backward."""

    def calling(self, attributes: dict[str, Any]) -> StageProgram:
        """The same with other ``attributes``."""
        return replace(self, attributes=attributes)

    def module(self, device: torch.device | None = None) -> Replayed:
        """The stage as a module: takes its inputs in order, returns the tuple of its outputs.

        Args:
            device: where it makes the tensors that it makes itself; by default where the capture did.
        """
        graph = fx.Graph()
        nodes: dict[str, fx.Node] = {}

        def resolve(leaf: Any) -> Any:
            return nodes[leaf.name] if isinstance(leaf, Reference) else on_device(leaf, device)

        for op, name, target, args, kwargs in self.instructions:
            nodes[name] = graph.create_node(
                op, target, mapped_arguments(args, resolve), mapped_arguments(kwargs, resolve), name
            )
        graph.lint()
        return Replayed(self.attributes, graph)


class Share:
    """The stages of one device as modules, and all that they call in one module, by its names in the model.

    What several of the stages use is the same tensor in each, on any device.

    Args:
        programs: in the order of the forward.
    """

    def __init__(self, programs: Sequence[StageProgram], device: torch.device) -> None:
        if len(programs) == 1:
            self.modules = [programs[0].module(device).to(device)]
            self.whole: nn.Module = self.modules[0]
            return
        called = {name: value for program in programs for name, value in program.attributes.items()}
        graph = fx.Graph()
        for name in called:
            graph.get_attr(name)
        graph.output(None)
        self.whole = Replayed(called, graph).to(device)
        moved = {name: attrgetter(name)(self.whole) for name in called}
        self.modules = [p.calling({name: moved[name] for name in p.attributes}).module(device) for p in programs]


def on_device(leaf: Any, device: torch.device | None) -> Any:
    """An argument of a captured call as it is on ``device``: of a device that the capture named, that one."""
    return device if device is not None and isinstance(leaf, torch.device) and leaf.type != "meta" else leaf


def mapped_arguments(value: Any, function: Callable[[Any], Any]) -> Any:
    """``value`` with ``function`` applied to its leaves; a :class:`Reference` is a leaf although it is a tuple."""
    if isinstance(value, Reference):
        return function(value)
    if isinstance(value, (tuple, list)):
        made = [mapped_arguments(item, function) for item in value]
        return type(value)(*made) if hasattr(value, "_fields") else type(value)(made)
    if isinstance(value, dict):
        return {key: mapped_arguments(item, function) for key, item in value.items()}
    if isinstance(value, slice):
        return slice(*(mapped_arguments(part, function) for part in (value.start, value.stop, value.step)))
    return function(value)


def check_all_called(capture: UnitGraph, plan: Plan) -> None:
    """Refuse a forward, in the plan's own mode, that leaves out a call which was planned.

    So does one whose loop over a module has fewer turns: all that the plan says of its times would be off.

    Raises:
        ShardwrightError: it does.
    """
    taken = {step.name for step in capture.steps}
    called = [node.node for node in plan.nodes if node.kind == "unit"]
    gone = [node for node in called if node not in taken]
    if gone:
        raise ShardwrightError(
            f"the plan has {gone[0]}, which the model's forward no longer calls ({len(gone)} such of "
            f"{len(called)} calls): it has changed since; profile and plan again"
        )


def cut(capture: UnitGraph, plan: Plan) -> list[StageProgram]:
    """Divide ``capture`` (taken at micro-batch size) into the stages of ``plan``; see :func:`fitted` for other modes.

    Raises:
        ShardwrightError: the capture has other steps than the plan, or in another order, or a sparse tensor would have
            to be sent.
    """
    stage_of = {node.node: node.stage for node in plan.nodes}
    for step in capture.steps:
        if step.name not in stage_of:
            under = step.call.context.autocast if step.call is not None and step.call.context is not None else None
            how = f" under autocast ({under}), as here" if under is not None else ""
            raise ShardwrightError(
                f"the model's forward has a step {step.name} that the plan does not know; profile and plan again{how}"
            )
    _check_order(capture, stage_of)
    count = len(plan.stages)
    last_read = _last_reads(capture, stage_of, count)
    made_in = {value.name: stage_of[value.producer] for value in capture.values.values()}
    live = [
        tuple(
            value
            for value in capture.values.values()
            if made_in[value.name] <= stage < last_read.get(value.name, -1) and not _is_attribute(value)
        )
        for stage in range(count - 1)
    ]
    inputs = tuple(capture.values[name] for name in capture.input_names)
    outputs = tuple(capture.values[name] for name in capture.outputs)
    sparse = next((value for border in (inputs, *live, outputs) for value in border if value.stride is None), None)
    if sparse is not None:
        raise ShardwrightError(
            f"{sparse.name} is a sparse tensor, which the pipeline cannot send; place(model, plan) can, "
            "or make it a buffer of the model, which each stage has"
        )
    borders = [inputs, *live, outputs]
    owner = capture.step_of()
    programs = [
        _stage(capture, index, borders[index], borders[index + 1], owner, stage_of, last=index == count - 1)
        for index in range(count)
    ]
    return [replace(p, recompute=stage.recompute) for p, stage in zip(programs, plan.stages, strict=True)]


def fitted(plan: Plan, capture: UnitGraph) -> Plan:
    """``plan`` for the steps of ``capture``, which may be of another mode than the one that was profiled.

    A step of glue that the plan does not know comes to the latest stage that makes what it reads.
    """
    planned = {(node.kind, node.node, node.type): node for node in plan.nodes}
    stage_of: dict[str, int] = {}
    makers = {value.name: value.producer for value in capture.values.values()}
    nodes = []
    for step in capture.steps:
        known = planned.get((step.kind, step.name, step.type))
        if step.kind == "unit" and known is None:
            raise ShardwrightError(
                f"the model's forward calls {step.name}, which the plan does not know; profile and plan again"
            )
        reads = tuple(dict.fromkeys(makers[name] for name in step.reads))
        earliest = max((stage_of[name] for name in reads), default=0)
        stage = max(known.stage, earliest) if known is not None and step.kind != "input" else earliest
        if step.kind == "output":
            stage = len(plan.stages) - 1
        if step.kind == "unit" and known is not None and stage != known.stage:
            raise ShardwrightError(
                f"in this mode the forward brings to {step.name}, on {known.device}, what a later stage makes; plan "
                "with a profile of this mode (train=False for inference)"
            )
        stage_of[step.name] = 0 if step.kind == "parameter" else stage
        nodes.append(
            Placement(
                node=step.name,
                kind=step.kind,
                type=step.type,
                unit=step.unit,
                site=step.site,
                device=plan.stages[stage].device,
                stage=stage,
                inputs=reads,
            )
        )
    return plan.model_copy(update={"nodes": tuple(nodes)})


def whole_program(capture: UnitGraph) -> StageProgram:
    """All of ``capture`` as one stage, which follows no plan."""
    inputs = tuple(capture.values[name] for name in capture.input_names)
    outputs = tuple(capture.values[name] for name in capture.outputs)
    stage_of = {step.name: 0 for step in capture.steps}
    return _stage(capture, 0, inputs, outputs, capture.step_of(), stage_of, last=True)


def _check_order(capture: UnitGraph, stage_of: dict[str, int]) -> None:
    """Refuse a capture that the plan's stages cannot run one after another, as that of another mode may be."""
    for step in capture.steps:
        for read in step.reads:
            producer = capture.values[read].producer
            if not _is_attribute(capture.values[read]) and stage_of[producer] > stage_of[step.name]:
                raise ShardwrightError(
                    f"{step.name} in stage {stage_of[step.name]} reads what {producer} makes in stage "
                    f"{stage_of[producer]}: the model's forward is not the one that was planned; profile and plan again"
                )


def _is_attribute(value: Value) -> bool:
    return value.node.op == "get_attr"


def _last_reads(capture: UnitGraph, stage_of: dict[str, int], count: int) -> dict[str, int]:
    """The last stage that needs each value; outputs of the model are needed at the end."""
    last = dict.fromkeys(capture.outputs, count - 1)
    for step in capture.steps:
        for name in step.reads:
            last[name] = max(last.get(name, -1), stage_of[step.name])
    return last


def _stage(
    capture: UnitGraph,
    index: int,
    received: Sequence[Value],
    sent: Sequence[Value],
    owner: dict[fx.Node, Step],
    stage_of: dict[str, int],
    *,
    last: bool,
) -> StageProgram:
    instructions = [Instruction("placeholder", value.node.name, value.node.name, (), {}) for value in received]
    present = {value.node.name for value in received}
    attributes: dict[str, Any] = {}
    root = graph_root(capture.model, capture.constants)

    def refer(leaf: Any) -> Any:
        return Reference(leaf.name) if isinstance(leaf, fx.Node) else leaf

    for node in capture.graph.nodes:
        if node.op in ("placeholder", "output") or node.name in present:
            continue
        if node.op == "get_attr":
            mine = any(stage_of[owner[user].name] == index for user in node.users if user in owner)
        else:
            mine = stage_of[owner[node].name] == index
        if mine:
            if isinstance(node.target, str):
                attributes[node.target] = root[node.target]
            instructions.append(
                Instruction(
                    node.op,
                    node.name,
                    node.target,
                    mapped_arguments(node.args, refer),
                    mapped_arguments(node.kwargs, refer),
                )
            )
    results = []
    for value in sent:
        name = value.node.name
        if not last:
            # The engine sends dense rows only, and another device's kernels may lay out what here is dense; it takes
            # nothing of what is.
            instructions.append(Instruction("call_method", f"{name}_dense", "contiguous", (Reference(name),), {}))
            name = f"{name}_dense"
        results.append(Reference(name))
    instructions.append(Instruction("output", "output", "output", (tuple(results),), {}))
    return StageProgram(index, tuple(instructions), attributes, tuple(map(_shape, received)), tuple(map(_shape, sent)))


def _shape(value: Value) -> TensorShape:
    return TensorShape(value.node.name, value.shape, value.dtype, value.requires_grad)


def trainable(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that get a gradient, by every name that they have in the model."""
    return {name: p for name, p in module.named_parameters(remove_duplicate=False) if p.requires_grad}
