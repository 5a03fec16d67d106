"""The splits that one would make without a planner, as plans that a run measures beside its own."""

from __future__ import annotations

from shardwright.sharder.planning.exact.even import NAIVE
from shardwright.sharder.planning.plan import Alternative, Plan, Stage
from shardwright.sharder.runtime.record import Naive

__all__ = ["NAIVE_LIMIT_S", "as_plan", "naive_plans", "not_measured"]

NAIVE_LIMIT_S = 60.0
"""For the steps of all of them. Where it does not do for as many as of the plan, fewer are taken, spread over the
run."""
LEAST_STEPS = 4
"""So many have to fit, those of the warm-up among them."""


def naive_plans(plan: Plan) -> tuple[dict[str, Plan], tuple[Naive, ...]]:
    """The equal splits that ``plan`` lists, as plans by name; and those that are not to be run, with the reason."""
    found: dict[str, Plan] = {}
    refused: list[Naive] = []
    for alternative in plan.alternatives:
        if alternative.name not in NAIVE:  # no split, or the planner's own
            continue
        why = _why_not(plan, alternative, found)
        if why:
            refused.append(not_measured(alternative, why))
        else:
            found[alternative.name] = as_plan(plan, alternative)
    allowed_s = NAIVE_LIMIT_S / LEAST_STEPS
    for alternative in plan.alternatives:
        step_s = alternative.step_s or 0.0
        if alternative.name in found and step_s > allowed_s:
            del found[alternative.name]
            why = f"a step is predicted to take {step_s:.0f} s, and measuring it may take {NAIVE_LIMIT_S:.0f} s"
            refused.append(not_measured(alternative, why))
        allowed_s -= step_s if alternative.name in found else 0.0
    return found, tuple(refused)


def not_measured(alternative: Alternative, why: str) -> Naive:
    """The record of a split that was not run."""
    assert alternative.name in ("equal count", "by parameters"), "the others are not naive"  # as in NAIVE
    devices = tuple(stage.device for stage in alternative.stages)
    return Naive(
        name=alternative.name, devices=devices, microbatches=alternative.microbatches, steps=0, timed=None, why=why
    )


def _why_not(plan: Plan, alternative: Alternative, others: dict[str, Plan]) -> str:
    """Why a split is not to be run; empty if it is."""
    if alternative.step_s is None:
        return alternative.why
    if not alternative.stages:
        return "the plan does not say which units are where in it; plan again"
    own = _placed(as_plan(plan, alternative))
    if own == _placed(plan):
        return "it is the plan's own split"
    same = next((name for name, other in others.items() if _placed(other) == own), None)
    return f"it is the split of {same}" if same else ""


def _placed(plan: Plan) -> tuple[object, ...]:
    """What makes two plans run the same."""
    stages = [(stage.device, stage.replica_devices, stage.recompute) for stage in plan.stages]
    return plan.microbatches, plan.schedule, stages, [node.stage for node in plan.nodes]


def as_plan(plan: Plan, alternative: Alternative) -> Plan:
    """``plan`` with the stages of an equal split in place of its own; what its own were chosen by is left out."""
    stage_of = {node: stage.index for stage in alternative.stages for node in stage.nodes}
    stages = tuple(Stage(**{name: getattr(stage, name) for name in Stage.model_fields}) for stage in alternative.stages)
    nodes = tuple(
        node.model_copy(update={"stage": stage_of[node.node], "device": stages[stage_of[node.node]].device})
        for node in plan.nodes
    )
    predicted = plan.predicted.model_copy(update={"step_s": alternative.step_s, "step_spread_s": 0.0})
    return plan.model_copy(
        update={
            "stages": stages,
            "nodes": nodes,
            "ties": alternative.ties,
            "microbatches": alternative.microbatches,
            "schedule": alternative.schedule,
            "stages_per_device": 1,
            "replicas": 1,
            "predicted": predicted,
            "alternatives": (),
            "candidates": (),
        }
    )
