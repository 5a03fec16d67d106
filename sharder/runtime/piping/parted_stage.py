"""Stages whose backwards are in two parts, for zero-bubble schedules.

The engine asks a stage for the gradients of its inputs, which it sends, and later for those of its weights. On the
first stage, whose inputs have none, the second is the whole backward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from shardwright.profiler.measuring.parted import edges_of, inputs_first
from shardwright.sharder.runtime.piping.prompt_stage import PromptStage

__all__ = ["PartedStage"]


class PartedStage(PromptStage):
    """A stage that divides a backward as :mod:`shardwright.profiler.measuring.parted` does, which any stage of ours
    bears."""

    def forward_one_chunk(self, fwd_chunk_id: int, *args: Any, **kwargs: Any) -> Any:
        """One forward. Of a last stage the engine detaches the outputs after the first part of the backward, in place,
        though the second may need them: it gets others, for it does not use them, but the loss."""
        made = super().forward_one_chunk(fwd_chunk_id, *args, **kwargs)
        if self.is_last and self.has_backward:
            outputs, inputs = self.fwd_cache[fwd_chunk_id]
            self.fwd_cache[fwd_chunk_id] = tuple(t.detach() for t in outputs), inputs
        return made

    def backward_maybe_with_nosync(
        self, backward_type: str, bwd_kwargs: dict[str, Any], last_backward: bool = False
    ) -> tuple[tuple[Tensor | None, ...], list[Any] | None]:
        """The whole backward, or the part of it that the engine asks for; what is left goes through its hands."""
        if backward_type == "input":
            return self._inputs_first(bwd_kwargs)
        if backward_type == "weight":
            (left,) = bwd_kwargs["param_groups"]
            left.finish()
            return (), None
        found: tuple[tuple[Tensor | None, ...], list[Any] | None] = super().backward_maybe_with_nosync(
            backward_type, bwd_kwargs, last_backward=last_backward
        )
        return found

    def _inputs_first(self, given: dict[str, Any]) -> tuple[tuple[Tensor | None, ...], list[Any]]:
        outputs, gradients = given["stage_output"], given["output_grads"]
        ends = [number for number, output in enumerate(outputs) if output.requires_grad]
        inputs = given["input_values"]
        found, left = inputs_first(
            [outputs[number] for number in ends],
            None if gradients is None else [gradients[number] for number in ends],
            edges_of(inputs),
            self.submod.parameters(),
        )
        if gradients is None:
            # The engine holds a loss until the step ends: it must not hold the graph. Ours are quotients, no views.
            outputs[0].detach_()
        of_inputs = iter(found)
        with_gradients = [
            _laid_out_as(t, next(of_inputs)) if isinstance(t, Tensor) and t.requires_grad else None for t in inputs
        ]
        return tuple(with_gradients), [left]


def _laid_out_as(tensor: Tensor, gradient: Tensor | None) -> Tensor | None:
    """``gradient`` as it would be accumulated in ``tensor``: what is sent has to be in one piece."""
    if gradient is None or gradient.stride() == tensor.stride():
        return gradient
    return torch.empty_like(tensor).copy_(gradient)
