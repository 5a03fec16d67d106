"""A process's stages with their schedule: the engine driven for batches that are divided in one way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from shardwright.sharder.planning.plan import Plan
from shardwright.sharder.runtime.piping.batches import Division
from shardwright.sharder.runtime.piping.engine import make_schedule, make_stage
from shardwright.sharder.runtime.piping.ranks import Ranks
from shardwright.sharder.runtime.piping.stages import StageForm

__all__ = ["StageEngine"]


class StageEngine:
    """The stages of a process, which take steps together with the others'.

    Args:
        form: for micro-batches of the division's size.
        division: of what this replica has of the batch.
        batched: of each input of the model, whether it is divided.
    """

    def __init__(
        self,
        form: StageForm,
        division: Division,
        plan: Plan,
        batched: tuple[bool, ...],
        ranks: Ranks,
        train: bool,
    ) -> None:
        self.form, self.division, self.ranks = form, division, ranks
        self._loss: Callable[[Any, int], Tensor] | None = None
        self._outputs: list[Any] = []
        count, parted = len(plan.stages), plan.schedule == "zero-bubble"
        self.stages = [
            make_stage(program, module, count, ranks.device, ranks.pipe, hosted=ranks.hosted, parted=parted)
            for program, module in zip(form.programs, form.modules, strict=True)
        ]
        # With fewer micro-batches than stages 1F1B has nothing to alternate with, and the engine refuses it.
        few = plan.schedule in ("1f1b", "zero-bubble") and (not train or division.pieces < count)
        kind = "gpipe" if few else plan.schedule
        self.schedule = make_schedule(self.stages, kind, division.pieces, self._of_chunk if train else None, batched)
        self._numbers = torch.arange(division.pieces)

    def train(self, tensors: list[Tensor], targets: list[Any], loss: Callable[[Any, Any, int], Tensor]) -> list[Tensor]:
        """One step; the last stage's parts of the loss, which is called with the number of all micro-batches, too."""
        count = self.division.pieces * self.ranks.replicas

        def of_chunk(output: Any, number: int) -> Tensor:
            return loss(self.form.output.filled(output), targets[number], count)

        self._loss = of_chunk
        losses: list[Tensor] = []
        # The engine divides tensors only; what it divides here are the numbers of the micro-batches.
        numbers = self._numbers if self.ranks.is_last else None
        try:
            with self.ranks.messages():
                self.schedule.step(*self._inputs(tensors), target=numbers, losses=losses, return_outputs=False)
        finally:
            self._loss = None
        return [part.detach() for part in losses]

    def infer(self, tensors: list[Tensor]) -> list[Any]:
        """One forward in evaluation; the last stage's results of each micro-batch, as :attr:`form` fills them."""
        self._outputs = []
        keep = self.form.modules[-1].register_forward_hook(self._keep if self.ranks.is_last else lambda *_: None)
        modes = [(module, module.training) for module in self.form.module.modules()]
        self.form.module.eval()
        try:
            with self.ranks.messages():
                self.schedule.step(*self._inputs(tensors), return_outputs=False)
        finally:
            keep.remove()
            for module, training in modes:
                module.training = training
            for stage in self.stages:
                stage.clear_runtime_states()
        found, self._outputs = self._outputs, []
        return found if self.ranks.is_last else []

    def _keep(self, _module: Any, _args: Any, output: Any) -> None:
        self._outputs.append(output)

    def room(self) -> list[Tensor]:
        """Tensors like the last stage's, to receive them in."""
        made = []
        for shape, divided in zip(self.form.results, self.form.output.batched, strict=True):
            rows = (self.division.pieces * shape.shape[0], *shape.shape[1:]) if divided else shape.shape
            made.append(torch.empty(rows, dtype=shape.dtype, device=self.ranks.device))
        return made

    def _inputs(self, tensors: list[Tensor]) -> tuple[Tensor, ...]:
        return tuple(t.to(self.ranks.device) for t in tensors) if self.ranks.position == 0 else ()

    def _of_chunk(self, output: Any, number: Tensor) -> Tensor:
        assert self._loss is not None  # set for the time of a step
        return self._loss(output, int(number))
