"""The step that a plan foresees, simulated again from the plan's own numbers: no profile is needed."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from shardwright.sharder.planning.plan import Plan
from shardwright.sharder.planning.schedules.footprint import MemoryCurve, memory_curve
from shardwright.sharder.planning.schedules.simulate import StageCost, simulate
from shardwright.sharder.planning.schedules.timeline import Timeline

__all__ = ["at_pace", "costs_of", "memory_of", "once_s_of", "timeline_of"]


def costs_of(plan: Plan) -> tuple[StageCost, ...]:
    """What each stage of ``plan`` is predicted to cost."""
    return tuple(
        StageCost(
            forward_s=stage.forward_s,
            backward_s=stage.backward_s,
            backward_input_s=stage.backward_input_s,
            backward_weight_s=stage.backward_weight_s,
            update_s=stage.update_s,
            send_forward_s=stage.send_forward_s,
            receive_backward_s=stage.receive_backward_s,
            tie_s=stage.tie_s,
            engine_s=stage.engine_s,
            receive_forward_s=stage.receive_forward_s,
            send_backward_s=stage.send_backward_s,
            sum_s=stage.sum_s,
        )
        for stage in plan.stages
    )


def timeline_of(plan: Plan, costs: Sequence[StageCost] | None = None) -> Timeline:
    """A step of ``plan`` at the median times, or at other ``costs`` of its stages.

    It is shorter than ``plan.predicted.step_s`` where the devices' speeds varied while they were measured, and longer
    where those of a stage in several replicas are unlike: its costs are the slowest one's.
    """
    return simulate(
        costs or costs_of(plan),
        plan.pipeline_microbatches,
        schedule=plan.schedule,
        train=plan.train,
        stages_per_device=plan.stages_per_device,
        transfers="overlapped" if plan.overlap else "serial",
        staged=plan.transfers == "staged",
    )


def once_s_of(plan: Plan, device: int) -> float:
    """Seconds in which a device of a replica, by its position, sums gradients and updates, after its operations."""
    return sum(stage.tie_s + stage.sum_s + stage.update_s for stage in plan.stages[device :: plan.depth])


def memory_of(plan: Plan, timeline: Timeline) -> tuple[MemoryCurve, ...] | None:
    """What each device of a replica holds over a step; the most is what ``plan.memory()`` states.

    None where the plan does not say what its stages hold: a free assignment, and a file of before that was kept.
    """
    stages = [stage.memory for stage in plan.stages if stage.memory is not None]
    if not plan.contiguous or len(stages) < len(plan.stages):
        return None
    return tuple(memory_curve(timeline, stages, d, once_s_of(plan, d)) for d in range(plan.depth))


def at_pace(plan: Plan, slower: Mapping[str, float]) -> float:
    """Seconds of the step that is predicted for devices that compute so many times as slowly as they were profiled.

    Transfers are taken to be as fast as they were. What the step is longer than that of its median times, since the
    devices' speeds vary, stays the same part of it.

    Args:
        slower: device -> 1.2 for one that takes 1.2 times as long; those that are not named are as they were.
    """
    costs = costs_of(plan)
    scaled = [
        _slowed(cost, max(slower.get(device, 1.0) for device in (stage.device, *stage.replica_devices)))
        for cost, stage in zip(costs, plan.stages, strict=True)
    ]
    at_median_s = timeline_of(plan, costs).step_s
    return plan.predicted.step_s * timeline_of(plan, scaled).step_s / at_median_s if at_median_s else 0.0


def _slowed(cost: StageCost, factor: float) -> StageCost:
    parts_s = cost.backward_input_s, cost.backward_weight_s
    inputs_s, weights_s = (None if s is None else factor * s for s in parts_s)
    return dataclasses.replace(
        cost,
        forward_s=factor * cost.forward_s,
        backward_s=factor * cost.backward_s,
        backward_input_s=inputs_s,
        backward_weight_s=weights_s,
        update_s=factor * cost.update_s,
        engine_s=factor * cost.engine_s,
    )
