"""Which steps of a capture take time: those that call something, and parameters that a forward uses outside of units.

Glue computes with such a parameter, but its gradient arrives at the parameter, and the optimizer updates it there.
Where all experts are one parameter of three dimensions, that is most of the update.
"""

from __future__ import annotations

import dataclasses

from torch import Tensor, nn

from shardwright.profiler.recording.unitgraph import Call, Step, UnitGraph

__all__ = ["Lent", "timed_steps"]


class Lent(nn.Module):
    """A parameter as a step: nothing forward, its gradient arriving in the backward, its update.

    Args:
        parameter: of the model.
        accumulate: whether the gradient is added to one that is there; otherwise it is taken as it comes, in no time.
    """

    def __init__(self, parameter: nn.Parameter, *, accumulate: bool) -> None:
        super().__init__()
        self.parameter, self.accumulate = parameter, accumulate

    def forward(self) -> Tensor | None:
        """The parameter itself, if something arrives at it."""
        return self.parameter if self.accumulate else None


def timed_steps(capture: UnitGraph, *, train: bool, accumulate: bool) -> list[Step]:
    """The steps that take time, in order, each with what it calls.

    A parameter that a unit holds too, if that is called, is updated there.

    Args:
        accumulate: whether gradients are added to those of micro-batches before.
    """
    called = {step.unit for step in capture.steps if step.kind == "unit"}
    held = {id(parameter) for unit in called for parameter in capture.units[unit].parameters()}
    found = []
    for step in capture.steps:
        if step.call is not None:
            if train or step.kind != "output":
                found.append(step)
        elif train and step.kind == "parameter" and step.unit:
            holder, _, name = step.unit.rpartition(".")
            tensor = getattr(capture.model.get_submodule(holder), name)
            if isinstance(tensor, nn.Parameter) and tensor.requires_grad and id(tensor) not in held:
                call = Call(Lent(tensor, accumulate=accumulate), (), {})
                found.append(dataclasses.replace(step, call=call))
    return found
