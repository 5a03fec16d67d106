"""The gate before the timing: a pipeline has to give the outputs and every gradient of the unsharded model."""

from __future__ import annotations

from functools import cached_property

from shardwright.errors import ShardwrightError
from shardwright.sharder.planning.plan import Plan
from shardwright.sharder.runtime.gates.comparing import DifferenceError, compare
from shardwright.sharder.runtime.gates.unitwise import UnitByUnit
from shardwright.sharder.runtime.pipeline import Comparison
from shardwright.sharder.runtime.record import Equality
from shardwright.sharder.runtime.session import Session, Split

__all__ = ["DifferenceError", "Gate", "compare"]


class Gate:
    """Compares pipelines with the whole model, which is run once for each number of micro-batches.

    Args:
        device: that holds it; None: the host's memory does, where its processors compute; or a unit at a time, where it
            does not.
        stays: whether the model will be timed beside others that are let in by the room that is left.
    """

    def __init__(self, session: Session, plan: Plan, device: str | None, *, stays: bool) -> None:
        self.session, self.plan, self.device, self._stays = session, plan, device, stays
        self.references: dict[int, Comparison] = {}

    @property
    def stays(self) -> bool:
        """Whether a device holds the model from now on: one that has no room for it is taken from here."""
        return self._stays and self.device is not None

    def compared(self, split: Split, found: list[Comparison]) -> Equality:
        """Hold what the stages of ``split`` ``found`` against the sum over the same micro-batches.

        Raises:
            DifferenceError: something differs.
            ShardwrightError: nothing has room to compare.
        """
        if self.device is None and not self._fits_on_host:
            return self._unit_by_unit(split, found, observing=False)
        self.prepare(split)
        equality = compare(
            self.references[split.plan.microbatches], found, other_kernels=self._has_other_kernels(split)
        )
        return equality if self.device else equality.model_copy(update={"how": "on the host"})

    def first_difference(self, split: Split, found: list[Comparison]) -> str:
        """Say which unit of ``split``, which was not let through, is the first to differ from the unsharded model.

        Its stages are held anew, as they were before any update, and each of their steps is observed.
        """
        try:
            self.session.release(split)
            self.session.hold(split)
            self._unit_by_unit(split, found, observing=True)
        except DifferenceError as error:
            return str(error)
        except ShardwrightError as error:
            return f"which unit is the first to differ could not be found: {error}"
        return (
            "in further steps, unit by unit, nothing differs: either it does at times only, or the forward was not "
            "captured as it is"
        )

    def prepare(self, split: Split) -> None:
        """Have the model held and run as ``split`` is divided, unless it was."""
        count = split.plan.microbatches
        if count in self.references:
            return
        if self.device is None:
            self.references[count] = self.session.check_on_host(count, split.output_places, self.plan)
            return
        self.session.hold_whole(self.device, count, split.output_places, self.plan)
        self.references[count] = self.session.check_whole(self.device)
        if self._stays:
            self.session.step_whole(self.device)  # the optimizer's state takes its room before others are let in

    @cached_property
    def _fits_on_host(self) -> bool:
        """Whether the whole model can be held by the host once more, asked before anything else is let in there."""
        needed, free = self.session.host_bytes(self.plan)
        return needed <= free

    def _has_other_kernels(self, split: Split) -> bool:
        """Whether stages compute on another kind of device than the model, or on GPUs of another model.

        Libraries have kernels for each model of GPU; CPU workers share the host's processors.
        """
        models = {device.name: device.description for device in self.session.pool.devices if device.kind == "cuda"}
        return any(models.get(device) != models.get(self.device or "") for device in split.plan.devices)

    def _unit_by_unit(self, split: Split, found: list[Comparison], *, observing: bool) -> Equality:
        units = UnitByUnit(self.session, split, found, other_kernels=self._has_other_kernels(split))
        if self.device is None:
            _, free = self.session.host_bytes(self.plan)
            units.check_room(free)
        with self.session.reference(self.device) as call:
            return units.compared(call, observing=observing)
