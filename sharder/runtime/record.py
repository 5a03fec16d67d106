"""What a run measured, beside what its plan predicted. Frozen records; no torch here, so that reports can read them."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import NonNegativeFloat, NonNegativeInt, PositiveInt

from shardwright.files import Document, Record

__all__ = ["Equality", "Run", "Timed", "Weighed"]


class Equality(Record):
    """The largest differences from the unsharded model, relative to the largest value of each tensor."""

    outputs: NonNegativeFloat
    gradients: NonNegativeFloat
    """0 when nothing is trained."""
    tolerance: NonNegativeFloat
    tensors: NonNegativeInt
    """How many outputs and gradients were compared."""


class Timed(Record):
    """Seconds of a step: predicted, and the median and spread (interquartile range) of the measured steps."""

    predicted_s: NonNegativeFloat | None
    measured_s: NonNegativeFloat
    spread_s: NonNegativeFloat

    @property
    def error_percent(self) -> float | None:
        """How far the prediction was from the measurement; positive when it promised too long a step."""
        if self.predicted_s is None:
            return None
        return 100.0 * (self.predicted_s / self.measured_s - 1.0)


class Weighed(Record):
    """Peak bytes of a device in a step: stated by the plan, and found in one step that was not timed."""

    device: str
    predicted_bytes: NonNegativeInt
    measured_bytes: NonNegativeInt

    @property
    def error_percent(self) -> float:
        """How far the prediction was from the measurement; positive when it stated too much."""
        return 100.0 * (self.predicted_bytes / self.measured_bytes - 1.0) if self.measured_bytes else 0.0


class Run(Document):
    """One plan, run and timed against one device in the same session."""

    kind: ClassVar[str] = "shardwright.run"
    current_version: ClassVar[int] = 1

    format: Literal["shardwright.run"] = "shardwright.run"
    version: Literal[1] = 1
    model: str
    batch: PositiveInt
    train: bool
    devices: tuple[str, ...]
    schedule: str
    microbatches: PositiveInt
    steps: PositiveInt
    """How many steps of each were timed, in turn."""
    equality: Equality
    sharded: Timed
    baseline_device: str | None
    baseline: Timed | None
    """One device alone; None when the model fits on none."""
    memory: tuple[Weighed, ...] = ()
    """Of each stage's device."""

    @property
    def speedup(self) -> float | None:
        """Measured."""
        return self.baseline.measured_s / self.sharded.measured_s if self.baseline else None

    @property
    def predicted_speedup(self) -> float | None:
        """Predicted by the plan."""
        if self.baseline is None or self.baseline.predicted_s is None or self.sharded.predicted_s is None:
            return None
        return self.baseline.predicted_s / self.sharded.predicted_s
