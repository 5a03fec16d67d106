"""One device's stages of a model in the script's own process: captured, cut, and left alone with their own weights.

The forward is captured twice, in training and in evaluation, for the path and the dropout between units are part of a
capture. For batches that divide otherwise it is captured again, on the shapes alone, since by then the other stages'
weights are gone.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from shardwright.errors import ShardwrightError
from shardwright.profiler.recording.inputs import is_batched
from shardwright.profiler.recording.shapes import has_values, shapes_only
from shardwright.profiler.recording.structure import map_tensors
from shardwright.profiler.trace import trace
from shardwright.sharder.planning.plan import Plan
from shardwright.sharder.runtime.check import units_of
from shardwright.sharder.runtime.piping.batches import OutputForm
from shardwright.sharder.runtime.piping.cut import Share, StageProgram, TensorShape, check_all_called, cut, fitted
from shardwright.sharder.runtime.piping.engine import names_by_tensor, sendable

__all__ = ["Recipe", "StageForm", "held_tensors", "release_others"]


@dataclass(frozen=True)
class StageForm:
    """A device's stages for micro-batches of one size, in one mode."""

    programs: tuple[StageProgram, ...]
    """What crosses their borders, no more."""
    modules: tuple[nn.Module, ...]
    """By stage."""
    module: nn.Module
    """All that they call, by its names in the model."""
    output: OutputForm
    results: tuple[TensorShape, ...]
    """What the last stage gives for a micro-batch."""


@dataclass(frozen=True)
class _Cut:
    """The forward of one mode and size, in stages."""

    programs: list[StageProgram]
    output: OutputForm


class Recipe:
    """How to make this rank's stages, for any size of micro-batch.

    Args:
        model: whole, and with its values.
        position: of this rank's device in its pipeline.
        args: a sample batch.

    Raises:
        ShardwrightError: the forward cannot be captured, or the plan does not fit it.
    """

    def __init__(
        self,
        model: nn.Module,
        plan: Plan,
        position: int,
        device: torch.device,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> None:
        self.model, self.plan, self.device = model, plan, device
        self.stages = range(position, len(plan.stages), plan.depth)
        self.sample = args, kwargs
        self.size = plan.batch // plan.microbatches
        self.forms: dict[tuple[int, bool], StageForm] = {}
        self.why_not = ""
        self.changes: tuple[str, ...] = ()
        """Parameters and buffers that the forward writes in training."""
        cuts = {plan.train: self._cut(self.size, train=plan.train)}
        if plan.train:
            try:
                cuts[False] = self._cut(self.size, train=False)
            except ShardwrightError as error:  # a forward that does other things there is no reason not to train
                self.why_not = f"this model can be trained in a pipeline, but not evaluated: {error}"
        self.programs = cuts[plan.train].programs
        for train, its in cuts.items():
            self.forms[self.size, train] = self._form(its, train=train)

    def form(self, size: int, *, train: bool) -> StageForm:
        """The rank's stages for micro-batches of ``size`` samples.

        Raises:
            ShardwrightError: the forward cannot be captured for them.
        """
        if (self.size, train) not in self.forms:
            raise ShardwrightError(self.why_not)
        if (size, train) not in self.forms:
            try:
                self.forms[size, train] = self._form(self._cut(size, train=train), train=train)
            except ShardwrightError as error:
                raise ShardwrightError(
                    f"the pipeline was made for micro-batches of {self.size} and cannot be made for {size}, which "
                    f"this batch needs: {error}; leave out the last batch (drop_last=True), or give one "
                    f"that {self.size} divides"
                ) from error
        return self.forms[size, train]

    def settle(self) -> None:
        """Forget the other stages."""
        self.programs = [self.programs[stage] for stage in self.stages]

    def _cut(self, size: int, *, train: bool) -> _Cut:
        args, kwargs = map_tensors(lambda t: _resized(t, self.plan.batch, size), self.sample)
        if self.forms and has_values(self.model):  # one stage, which is on its device by now
            args, kwargs = map_tensors(lambda t: t.to(self.device), (args, kwargs))
        returned: list[Any] = []
        hook = self.model.register_forward_hook(lambda _module, _args, output: returned.append(output))
        units = units_of(self.plan, self.model)
        try:
            with shapes_only(self.model, args, kwargs) as inputs:
                capture = trace(self.model, *inputs, train=train, units=units)
        finally:
            hook.remove()
        plan = self.plan
        if (size, train) == (self.size, plan.train):
            check_all_called(capture, plan)
            self.changes = capture.changes
        else:  # modes around glue may be others
            plan = fitted(plan, capture)
        programs = sendable(cut(capture, plan), train=train)
        return _Cut(programs, OutputForm(returned[-1], capture.output_places, size))

    def _form(self, its: _Cut, *, train: bool) -> StageForm:
        """The stages' modules, of the tensors that they have already as far as they have some."""
        programs = [its.programs[stage] for stage in self.stages]
        first = self.forms.get((self.size, self.plan.train))
        same = self.forms.get((self.size, train))
        named = {name for names in names_by_tensor(self.model).values() for name in names}
        known = {name: t for name, t in _tensors_of(first).items() if name in named} | _tensors_of(same)
        filled = [p.calling({name: known.get(name, value) for name, value in p.attributes.items()}) for p in programs]
        lacking = next((name for name, t in _attributes_of(filled) if t.is_meta or isinstance(t, FakeTensor)), None)
        if lacking is not None:
            raise ShardwrightError(f"{lacking} follows from the number of samples, and its values are not known")
        share = Share(filled, self.device)
        return StageForm(
            programs=tuple(replace(p, instructions=(), attributes={}) for p in programs),
            modules=tuple(share.modules),
            module=share.whole,
            output=its.output,
            results=its.programs[-1].outputs,
        )


def held_tensors(program: StageProgram) -> set[int]:
    """``id`` of each parameter, buffer and constant that a stage holds."""
    found: set[int] = set()
    for value in program.attributes.values():
        if isinstance(value, Tensor):
            found.add(id(value))
        elif isinstance(value, nn.Module):
            found |= {id(t) for _, t in _every(value)}
    return found


def release_others(model: nn.Module, modules: Iterable[nn.Module], kept: Iterable[Any]) -> None:
    """Leave ``model`` the tensors of ``modules``, its parts, and those ``kept``; of the others only the shapes."""
    own = {name: t for module in modules for name, t in _every(module)}
    keep = {id(t) for t in (*own.values(), *kept)}
    for path, module in model.named_modules():
        for holder in (module._parameters, module._buffers):
            for name, tensor in holder.items():
                if tensor is None or id(tensor) in keep:
                    continue
                moved = own.get(f"{path}.{name}" if path else name)
                holder[name] = moved if moved is not None else _without_values(tensor)


def _without_values(tensor: Tensor) -> Tensor:
    empty = torch.empty_like(tensor, device="meta")
    return nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty


def _resized(tensor: Tensor, batch: int, size: int) -> Tensor:
    """A tensor of ``batch`` samples with the first ``size`` of them, and again from the beginning if that is more."""
    if not is_batched(tensor, batch):
        return tensor
    rows = torch.arange(size, device=tensor.device) % batch
    return tensor.detach()[rows].requires_grad_(tensor.requires_grad)


def _every(module: nn.Module) -> list[tuple[str, Tensor]]:
    return [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]


def _attributes_of(programs: Iterable[StageProgram]) -> list[tuple[str, Tensor]]:
    """Every tensor that the stages hold, with a name that it has in the model."""
    found: list[tuple[str, Tensor]] = []
    for program in programs:
        for name, value in program.attributes.items():
            if isinstance(value, Tensor):
                found.append((name, value))
            elif isinstance(value, nn.Module):
                found += [(f"{name}.{inner}", t) for inner, t in _every(value)]
    return found


def _tensors_of(form: StageForm | None) -> dict[str, Tensor]:
    return dict(_every(form.module)) if form is not None else {}
