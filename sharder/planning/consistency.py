"""Whether a plan holds together: a file that was changed by hand may name devices and stages that do not fit."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from shardwright.sharder.planning.plan import Plan

__all__ = ["fault_of"]


def fault_of(plan: Plan) -> str | None:
    """What in ``plan`` contradicts itself, with both sides and what to do; None where nothing does."""
    return _of_replicas(plan) or _of_stages(plan) or _of_parts(plan) or _of_nodes(plan)


def _of_replicas(plan: Plan) -> str | None:
    for stage in plan.stages:
        others = len(stage.replica_devices)
        if others != plan.replicas - 1:
            return (
                f"stage {stage.index} has {others} replica_devices, and a plan with replicas {plan.replicas} needs "
                f"{plan.replicas - 1}: one for each replica but the first"
            )
    if plan.microbatches % plan.replicas:
        return (
            f"{plan.microbatches} microbatches cannot be divided among {plan.replicas} replicas: "
            "give a multiple of the replicas"
        )
    owner: dict[str, int] = {}
    for replica, devices in enumerate(plan.pipelines):
        twice = next((device for device in devices if owner.setdefault(device, replica) != replica), None)
        if twice is not None:
            return (
                f"{twice} is in replica {owner[twice]} and in replica {replica}: each replica has devices of its own, "
                "so give one of them another"
            )
    return None


def _of_stages(plan: Plan) -> str | None:
    indices = [stage.index for stage in plan.stages]
    if not indices or indices != [*range(len(indices))]:
        return f"its stages have the indices {indices}: number one or more from 0, in order"
    pieces, count = plan.stages_per_device, len(plan.stages)
    if count % pieces:
        return f"{count} stages are not {pieces} on each device (stages_per_device): give a divisor of the stages"
    depth = count // pieces
    for replica in range(plan.replicas):
        row = [(stage.device, *stage.replica_devices)[replica] for stage in plan.stages]
        moved = next((index for index in range(depth, count) if row[index] != row[index - depth]), None)
        if moved is not None:
            return (
                f"stage {moved} is on {row[moved]}, and with {depth} devices it is on that of stage {moved - depth}, "
                f"{row[moved - depth]}: give both the same device"
            )
        device, times = Counter(row).most_common(1)[0]
        if times > pieces:
            return (
                f"{device} has {times} stages, and a device has {pieces} (stages_per_device): give each stage a device "
                "of its own, or make the plan again with fewer stages"
            )
    return None


def _of_parts(plan: Plan) -> str | None:
    """Zero-bubble knows one pipeline of stages that keep what they save, and the parts of each backward."""
    if plan.schedule != "zero-bubble":
        return None
    anew = next((stage.index for stage in plan.recomputed), None)
    for what, wrong in (
        (f"{plan.stages_per_device} stages_per_device", plan.stages_per_device > 1),
        (f"{plan.replicas} replicas", plan.replicas > 1),
        (f"stage {anew} computed anew", anew is not None),
    ):
        if wrong:
            return f"its schedule is zero-bubble with {what}, which that does not know: give it another schedule"
    lacking = (s.index for s in plan.stages if s.backward_input_s is None or s.backward_weight_s is None)
    index = next(lacking, None)
    if index is not None:
        return f"its schedule is zero-bubble and stage {index} lacks backward_input_s or backward_weight_s: give both"
    return None


def _of_nodes(plan: Plan) -> str | None:
    lost = next((node for node in plan.nodes if node.stage >= len(plan.stages)), None)
    if lost is not None:
        return (
            f"node {lost.node} is in stage {lost.stage}, and the last stage is {len(plan.stages) - 1}: give one there"
        )
    moved = next((node for node in plan.nodes if node.device != plan.stages[node.stage].device), None)
    if moved is not None:
        there = plan.stages[moved.stage].device
        return (
            f"node {moved.node} is on {moved.device}, and its stage {moved.stage} on {there}: give both the same device"
        )
    known = {node.node for node in plan.nodes}
    for node in plan.nodes:
        absent = next((name for name in node.inputs if name not in known), None)
        if absent is not None:
            return f"node {node.node} reads of {absent}, which is not among its nodes: put it back, or plan anew"
    placed = {node.unit for node in plan.nodes if node.kind == "unit"}
    for stage in plan.stages:
        absent = next((unit for unit in stage.units if plan.of_model and unit not in placed), None)
        if absent is not None:
            return f"stage {stage.index} has unit {absent}, which is not among its nodes: put it back, or plan anew"
    return None
