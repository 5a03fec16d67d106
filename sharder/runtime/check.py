"""Whether a plan is for this model and these inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from shardwright.errors import ShardwrightError, kind_of
from shardwright.profiler.profile import TensorSpec
from shardwright.profiler.recording.inputs import check_args, input_specs
from shardwright.profiler.recording.placed import refuse_placed
from shardwright.profiler.recording.shapes import has_values
from shardwright.profiler.units import structure_digest
from shardwright.sharder.planning.plan import Plan

__all__ = [
    "apart",
    "cannot_be_piped",
    "changed_apart",
    "check_can_be_piped",
    "check_inputs",
    "check_model",
    "check_plan_can_be_piped",
    "check_values",
    "units_of",
    "written_in_words",
]


def check_model(plan: Plan, model: nn.Module) -> None:
    """Refuse a model that ``plan`` was not made for.

    Raises:
        ShardwrightError: units, their classes, or parameter shapes differ, the plan is of costs and no model, or one of
            the two is something else.
    """
    if not isinstance(model, nn.Module):
        raise ShardwrightError(f"the model is {kind_of(model)}; give the nn.Module that was profiled")
    if not isinstance(plan, Plan):
        raise ShardwrightError(f"the plan is {kind_of(plan)}; give a Plan, such as shardwright.Plan.load(file) reads")
    if not plan.of_model:
        raise ShardwrightError(
            f"the plan was made from costs ({plan.model}), not from a model's profile, so it cannot be placed or run: "
            f"profile this {type(model).__name__} and plan that profile"
        )
    units_of(plan, model)
    if structure_digest(model) != plan.structure:
        raise ShardwrightError(
            f"the plan is for another {plan.model}: classes of units or shapes of parameters differ from this "
            f"{type(model).__name__}'s; profile and plan this model"
        )


def check_values(model: nn.Module) -> None:
    """Refuse a model that was built without its weights where it has to compute.

    Raises:
        ShardwrightError: a parameter or buffer has no values.
    """
    if not has_values(model):
        raise ShardwrightError(
            f"{type(model).__name__} has parameters without values, so it cannot be run; build it with its weights, or "
            "have place(model, plan, checkpoint=folder) read them"
        )


def check_can_be_piped(plan: Plan, model: nn.Module) -> None:
    """Refuse what can be placed and not piped.

    Raises:
        ShardwrightError: the model is placed, has no values or follows values of its inputs, or the plan is no chain of
            stages or leaves weights off their device.
    """
    refuse_placed(model, "pipeline")
    check_values(model)
    check_plan_can_be_piped(plan)


def check_plan_can_be_piped(plan: Plan) -> None:
    """Refuse a plan whose forward is not what was captured for every input, or that is no chain of stages.

    Raises:
        ShardwrightError: weights come and go, devices take turns, or there is an obstacle; the first is named.
    """
    if plan.offloaded:
        raise ShardwrightError(
            f"by the plan the weights of {next(iter(plan.offloaded))} are brought in for each call, which the pipeline "
            "cannot do; place(model, plan) can"
        )
    if not plan.contiguous and len(plan.stages) > 1:
        raise ShardwrightError(
            "this plan is no chain of stages, which the pipeline needs: place(model, plan) takes it, or plan anew with "
            "stages (objective throughput, without --free)"
        )
    if plan.obstacles and len(plan.devices) > 1:
        raise cannot_be_piped(plan.obstacles)


def cannot_be_piped(obstacles: Sequence[str]) -> ShardwrightError:
    """The error that names the first of ``obstacles``."""
    more = f" (and {len(obstacles) - 1} more)" if len(obstacles) > 1 else ""
    return ShardwrightError(
        f"this model cannot be piped: {obstacles[0]}{more}; the captured path would be wrong for other "
        "inputs. place(model, plan) works: it leaves the forward as it is"
    )


def units_of(plan: Plan, model: nn.Module) -> dict[str, nn.Module]:
    """The modules of ``model`` that ``plan`` places whole, by path.

    Raises:
        ShardwrightError: one is not there.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    missing = [unit for unit in plan.placement() if unit not in modules]
    if missing:
        raise ShardwrightError(
            f"the plan is for another model ({plan.model}): {type(model).__name__} has no unit {missing[0]}; "
            "profile and plan this model"
        )
    return {unit: modules[unit] for unit in plan.placement()}


def check_inputs(plan: Plan, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Refuse inputs of other shapes or dtypes than ``plan`` was made for.

    Raises:
        ShardwrightError: they differ; both are named.
    """
    check_args(args)
    specs = input_specs(args, kwargs)
    if specs != plan.inputs:
        named = [spec.name for spec in specs] != [spec.name for spec in plan.inputs]
        alike = [(s.dtype, s.shape) for s in specs] == [(s.dtype, s.shape) for s in plan.inputs]
        remedy = "give inputs of the planned shapes, or profile and plan with these"
        if alike:  # [0] and ['ids'] are arguments by position and by keyword
            remedy = "give the same tensors as in the profile, by position (args) or keyword (kwargs), here and later"
        raise ShardwrightError(
            f"the plan is for inputs {_listed(plan.inputs, named=named)}; these are {_listed(specs, named=named)}: "
            f"{remedy}"
        )


def _listed(specs: tuple[TensorSpec, ...], *, named: bool) -> str:
    """Shapes and dtypes, with where each is among the arguments if that is what differs."""
    return ", ".join(f"{spec.name} {spec}".strip() if named else str(spec) for spec in specs) or "(none)"


def apart(model: nn.Module, plan: Plan, changes: Sequence[str], *, every: bool = False) -> str:
    """What the pipeline does for each micro-batch that the unsharded model does once for the batch, in training, so
    that the two learn apart; empty if there is nothing.

    Args:
        changes: what the forward writes of parameters and buffers.
        every: whether all of the model is put into training, also what is in evaluation while the model is not.
    """
    return "; ".join(filter(None, (_normalised_apart(model, plan, every=every), changed_apart(plan, changes))))


def changed_apart(plan: Plan, changes: Sequence[str]) -> str:
    """Of :func:`apart`, what of the model's state the forward writes."""
    return written_in_words(changes, plan.microbatches) if plan.train and plan.microbatches > 1 else ""


def written_in_words(changes: Sequence[str], count: int) -> str:
    """That the forward writes ``changes``, with ``count`` micro-batches; nothing if it writes none."""
    if not changes:
        return ""
    more = f" (and {len(changes) - 1} more)" if len(changes) > 1 else ""
    return (
        f"{changes[0]}{more} is written by the forward, once for each of {count} micro-batches and not once for the "
        "batch, so that it holds something else than in the unsharded model"
    )


def _normalised_apart(model: nn.Module, plan: Plan, *, every: bool) -> str:
    norms = [
        name
        for name, m in model.named_modules()
        if isinstance(m, nn.modules.batchnorm._BatchNorm)
        # A model in evaluation is put into training whole; without running statistics those of the batch serve in both.
        and (every or m.training or not model.training or m.running_mean is None)
    ]
    if not norms or not plan.train or plan.microbatches == 1:
        return ""
    more = f" (and {len(norms) - 1} more)" if len(norms) > 1 else ""
    own = ", with running statistics for each replica, of which the first's are saved" * (plan.replicas > 1)
    return (
        f"{norms[0]}{more} normalises over a micro-batch of {plan.batch // plan.microbatches} samples in the pipeline, "
        f"not over the batch of {plan.batch}{own}: training differs from the unsharded model's; GroupNorm or "
        "LayerNorm do not depend on the batch"
    )
