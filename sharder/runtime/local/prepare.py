"""Preparing a pipeline in this process: the stages for inputs of one shape, and how the model's result is made.

A pipeline computes the whole batch's result only if every output is divided as the inputs are, and if dividing changes
nothing. Both are looked at once, on the caller's own inputs: the model runs the whole batch, and each micro-batch.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from shardwright.errors import ShardwrightError
from shardwright.profiler.recording.equality import relative_difference, same_values
from shardwright.profiler.recording.inputs import (
    all_microbatches,
    batch_size,
    copied_inputs,
    is_batched,
    microbatch,
    outputs_of,
)
from shardwright.profiler.recording.recorder import Recorder
from shardwright.profiler.recording.state import Snapshot
from shardwright.profiler.recording.structure import Hole, copied, map_tensors
from shardwright.profiler.recording.unitgraph import UnitGraph
from shardwright.profiler.trace import evaluating
from shardwright.sharder.planning.plan import Plan
from shardwright.sharder.runtime.check import cannot_be_piped, units_of
from shardwright.sharder.runtime.local.pieces import Stage
from shardwright.sharder.runtime.piping.cut import cut, fitted

__all__ = ["Program", "prepared"]

TOLERANCE = 1e-3
"""Rounding of any dtype stays below it, mixing samples up does not."""
INSTEAD = "or place the model without microbatches"


class Program(NamedTuple):
    """A pipeline for inputs of one shape."""

    stages: list[Stage]
    template: Any
    """The model's result, with holes for its tensors."""
    changes: tuple[str, ...]
    """Parameters and buffers that the forward writes."""


def prepared(
    model: nn.Module,
    plan: Plan,
    homes: Mapping[str, torch.device],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    count: int,
) -> Program:
    """Capture ``model``, which is not placed at the moment, in the caller's modes, at micro-batch size.

    The model's state and the random state are put back; so is what hangs on its modules.

    Raises:
        ShardwrightError: the forward fails, cannot be piped, is for another plan, or its result cannot be put together.
    """
    found = Snapshot(model)
    capture, result = _captured(model, plan, microbatch(args, kwargs, count), found)
    if capture.obstacles and len(plan.stages) > 1:
        raise cannot_be_piped(capture.obstacles)
    tensors = outputs_of(result)
    absent = sorted({*range(len(tensors))} - {*capture.output_places})
    if absent:
        raise ShardwrightError(
            f"output {absent[0]} of {type(model).__name__} is made inside of a unit that does not return it, as the "
            f"entries of a cache are, so a pipeline does not have it: call the model so that it leaves it out "
            f"(use_cache=False, with Transformers), {INSTEAD}"
        )
    _check_division(model, args, kwargs, count, found, result)
    programs = cut(capture, fitted(plan, capture))
    checkpoints = any(step.checkpointed for step in capture.steps)
    stages = [
        Stage(
            program,
            model,
            homes[stage.device],
            in_turn=checkpoints or bool(plan.recomputed),
            back_in_turn=checkpoints,
        )
        for program, stage in zip(programs, plan.stages, strict=True)
    ]
    places = itertools.count()
    return Program(stages, copied(result, lambda _: Hole(next(places))), capture.changes)


def _captured(
    model: nn.Module,
    plan: Plan,
    inputs: tuple[tuple[Any, ...], dict[str, Any]],
    found: Snapshot,
    plain: frozenset[str] = frozenset(),
) -> tuple[UnitGraph, Any]:
    grad = torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
    eager: Any = torch.compiler.set_stance("force_eager")  # where hooks and modes see what compiled modules do
    with (
        torch.inference_mode(False),
        torch.set_grad_enabled(grad),
        torch.random.fork_rng(devices=[]),
        eager,
        found.attributes_kept(),
        found.state_kept(),
    ):
        recorder = Recorder(model, units_of(plan, model), train=grad, counts_saved=False, plain=plain)
        # No leaves, which could not be changed in place where the caller's tensors can.
        copies = map_tensors(lambda t: t.clone() if t.requires_grad else t, copied_inputs(*inputs))
        captured = recorder.record(*copies)
    if recorder.overwritten <= plain:
        return captured
    return _captured(model, plan, inputs, found, plain | recorder.overwritten)


def _check_division(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], count: int, found: Snapshot, result: Any
) -> None:
    """Hold the micro-batches' outputs against the whole batch's, both in evaluation mode."""
    if count == 1:
        return

    def whole() -> Any:
        given, named = copied_inputs(args, kwargs)
        return model(*given, **named)

    def pieces() -> list[list[Tensor]]:
        return [outputs_of(model(*a, **k)) for a, k in all_microbatches(*copied_inputs(args, kwargs), count)]

    batch = batch_size(args, kwargs)
    with torch.inference_mode(False), torch.no_grad(), evaluating(model, found):
        expected = whole()
        tensors, divided = outputs_of(expected), pieces()
        _check_result(model, expected, result, batch, count)
        if any(len(piece) != len(tensors) for piece in divided):
            raise ShardwrightError(f"{type(model).__name__} returns other tensors for micro-batches; {INSTEAD[3:]}")
        for place, tensor in enumerate(tensors):
            difference = relative_difference(tensor, torch.cat([piece[place] for piece in divided]))
            if difference > TOLERANCE and same_values(tensor, outputs_of(whole())[place]):
                raise ShardwrightError(
                    f"the result depends on how the batch is divided: output {place} of {count} micro-batches differs "
                    f"from the whole batch's by {difference:.2g} of its largest value; is dimension 0 of the inputs "
                    f"the batch? If not, {INSTEAD[3:]}"
                )


def _check_result(model: nn.Module, whole: Any, piece: Any, batch: int, count: int) -> None:
    """Refuse results that cannot be put together from those of micro-batches."""
    for place, tensor in enumerate(outputs_of(whole)):
        if not is_batched(tensor, batch):
            raise ShardwrightError(
                f"output {place} of {type(model).__name__} has the shape {tuple(tensor.shape)}, not the {batch} "
                "samples of the batch in its first dimension, so it cannot be put together from micro-batches: "
                f"return what it is made of and compute it outside of the model, {INSTEAD}"
            )
    for one, other in zip(pytree.tree_leaves(whole), pytree.tree_leaves(piece), strict=False):
        if isinstance(one, (bool, int, float, str)) and one != other:
            raise ShardwrightError(
                f"{type(model).__name__} returns {one!r} for the batch and {other!r} for a micro-batch of {count}, "
                f"which a pipeline cannot tell from one another; return tensors only, {INSTEAD}"
            )
