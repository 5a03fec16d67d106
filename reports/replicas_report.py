"""Several equal pipelines, for a person: which devices each has, and what they were weighed against."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import RenderableType

from shardwright.reports.layout import listing, section
from shardwright.reports.quantities import count, ratio, seconds
from shardwright.sharder.planning.plan import Alternative, Candidate, Plan

__all__ = ["in_replicas", "pipelines_of", "rival_in_words"]


def in_replicas(plan: Plan) -> str:
    """``in 2 replicas of 2 stages``, ``in 4 replicas of the whole model``."""
    return f"in {_replicas(plan.replicas, len(plan.stages))}"


def _replicas(replicas: int, stages: int) -> str:
    return f"{replicas} replicas of {count(stages, 'stage') if stages > 1 else 'the whole model'}"


def rival_in_words(plan: Plan) -> str:
    """What a plan with replicas was chosen against, and what a plan with none lets go; nothing if there is nothing."""
    if plan.replicas == 1:
        better = next((one for one in plan.alternatives if one.name == "replicas" and one.step_s), None)
        return "" if better is None else _better(plan, better)
    others = [c for c in plan.candidates if c.replicas != plan.replicas and c.stages > 1]
    best = min(others, key=lambda candidate: candidate.step_s, default=None)
    if best is None:
        return ""
    return f" A step takes {seconds(best.step_s)} in {_candidate(best)}."


def _candidate(candidate: Candidate) -> str:
    """A candidate in words."""
    what = (
        f"one pipeline over {candidate.stages // candidate.stages_per_device} devices"
        if candidate.replicas == 1
        else _replicas(candidate.replicas, candidate.stages)
    )
    return f"{what} with {count(candidate.microbatches, 'micro-batch')}"


def _better(plan: Plan, other: Alternative) -> str:
    assert other.step_s  # asked before
    stages = other.devices // other.replicas
    return (
        f" {_replicas(other.replicas, stages).capitalize()} with {count(other.microbatches, 'micro-batch')} would take "
        f"{seconds(other.step_s)}: faster by {ratio(plan.predicted.step_s / other.step_s)} (--replicas "
        f"{other.replicas})."
    )


def pipelines_of(plan: Plan) -> Iterator[RenderableType]:
    """The devices of each replica, in the order of the stages."""
    if plan.replicas == 1:
        return
    note = "equal pipelines; times are, unit by unit, those of the slowest device of a stage"
    if plan.train:
        note += "; gradients are summed once a step"
    yield section("Replicas", note)
    rows = [(str(number), ", ".join(devices)) for number, devices in enumerate(plan.pipelines)]
    yield listing(("replica", "devices, in the order of the stages"), rows)
