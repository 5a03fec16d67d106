"""What a run measured, beside what its plan predicted. Frozen records; no torch here, so that reports can read them."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal

from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from shardwright.errors import ShardwrightError
from shardwright.files import Document, Record
from shardwright.sharder.planning.schedules.slots import Slot, What

__all__ = [
    "Account",
    "Accounts",
    "Equality",
    "Naive",
    "Off",
    "Paced",
    "Run",
    "Slot",
    "StageAccounts",
    "Timed",
    "Weighed",
    "What",
]


class Equality(Record):
    """The largest differences from the unsharded model, relative to the largest value of each tensor."""

    outputs: NonNegativeFloat
    gradients: NonNegativeFloat
    """0 when nothing is trained."""
    tolerance: NonNegativeFloat
    tensors: NonNegativeInt
    """How many outputs and gradients were compared."""
    how: Literal["whole", "on the host", "unit by unit"] = "whole"
    """Whether the unsharded model was held by one device, or by the host's memory, or computed a unit at a time since
    there was no room for it in either."""


class Timed(Record):
    """Seconds of a step: predicted, and the median and spread (interquartile range) of the measured steps."""

    predicted_s: NonNegativeFloat | None
    measured_s: NonNegativeFloat
    spread_s: NonNegativeFloat
    at_pace_s: NonNegativeFloat | None = None
    """Predicted for devices as fast as they were in these steps, where that was measured."""

    @property
    def error_percent(self) -> float | None:
        """How far the prediction was from the measurement; positive when it promised too long a step."""
        return self._error_percent(self.predicted_s)

    @property
    def error_at_pace_percent(self) -> float | None:
        """How far it was when the devices are taken to be as fast as they were in these steps."""
        return self._error_percent(self.at_pace_s)

    def _error_percent(self, predicted_s: float | None) -> float | None:
        return None if predicted_s is None else 100.0 * (predicted_s / self.measured_s - 1.0)


class Paced(Record):
    """The pace of a device: what a fixed piece of work takes there."""

    device: str
    profiled_s: PositiveFloat
    """When the predictions were made for it."""
    measured_s: PositiveFloat
    """Beside the plan's steps: the median."""

    @property
    def slower(self) -> float:
        """How many times as long as then the same work took; below 1 if it was faster."""
        return self.measured_s / self.profiled_s


class Weighed(Record):
    """Peak bytes of a device in a step: stated by the plan, and found in one step that was not timed."""

    device: str
    predicted_bytes: NonNegativeInt
    measured_bytes: NonNegativeInt

    @property
    def error_percent(self) -> float:
        """How far the prediction was from the measurement; positive when it stated too much."""
        return 100.0 * (self.predicted_bytes / self.measured_bytes - 1.0) if self.measured_bytes else 0.0


class Account(Record):
    """How a device spends a step, in seconds. Together they are the step."""

    forward_s: NonNegativeFloat
    """The loss with it."""
    backward_s: NonNegativeFloat
    update_s: NonNegativeFloat
    """Gradients cleared, scaled and applied."""
    transfer_s: NonNegativeFloat
    """Sending, receiving, and summing gradients of ties and replicas, all ends being at it."""
    bubble_s: NonNegativeFloat
    """Waiting for another stage, and for the step's end."""
    other_s: NonNegativeFloat
    """What the engine does between."""

    @property
    def compute_s(self) -> float:
        """Forward, backward and update."""
        return self.forward_s + self.backward_s + self.update_s

    @property
    def step_s(self) -> float:
        """The sum."""
        return self.compute_s + self.transfer_s + self.bubble_s + self.other_s


class StageAccounts(Record):
    """One device: the account that the plan foresaw, and the one that was measured."""

    device: str
    predicted: Account
    measured: Account


class Off(Record):
    """A cost that was predicted wrongly, and what that does to the step."""

    what: Literal["forward", "backward", "update", "ties", "sums", "transfers", "engine", "variation", "rest"]
    """``"variation"``: the plan's step is longer than that of its median times, since devices' speeds vary; the
    measured costs have that in them. ``"rest"``: what no cost explains, as micro-batches that took unequal times."""
    devices: tuple[str, ...]
    """Whose cost it is, that of all its stages; of transfers, those of both ends. With replicas, those of the first."""
    predicted_s: NonNegativeFloat | None
    """Of a micro-batch, the engine's there and back; update, ties and sums of a step; transfers of a micro-batch there
    and back, at both ends."""
    measured_s: NonNegativeFloat | None
    """Likewise; with replicas the mean over them."""
    step_s: float
    """So much longer is the measured step for it; negative when it is shorter."""


class Accounts(Record):
    """One step of which everything was noted, beside the one that the plan foresees."""

    noted_s: tuple[NonNegativeFloat, ...]
    """All steps that were noted, between those that were timed; the one of median length is shown."""
    measured_s: NonNegativeFloat
    """That step, from the first stage's start to the last one's end."""
    predicted_s: NonNegativeFloat
    """The step of the plan's median times."""
    stages: tuple[StageAccounts, ...]
    """By device, in the order of ``Run.devices``; stage s of a replica is on its device s modulo their number."""
    off: tuple[Off, ...]
    """The largest first. Their ``step_s`` add up to ``measured_s`` less the plan's predicted step."""
    predicted: tuple[Slot, ...]
    measured: tuple[Slot, ...]


class Naive(Record):
    """A split that one would make without a planner, measured in the same run."""

    name: Literal["equal count", "by parameters"]
    devices: tuple[str, ...]
    """In the order of its stages."""
    microbatches: PositiveInt
    """The number at which it was predicted to be fastest."""
    steps: NonNegativeInt
    """How many were timed, in turn with the plan's."""
    timed: Timed | None
    """None where it was not run."""
    why: str = ""
    """Why not."""


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
    """One replica after another."""
    replicas: PositiveInt = 1
    schedule: str
    microbatches: PositiveInt
    """Of all replicas."""
    steps: PositiveInt
    """How many steps of each were timed, in turn."""
    equality: Equality
    sharded: Timed
    baseline_device: str | None
    baseline: Timed | None
    """One device alone; None when the model fits on none, or not beside the plan."""
    baseline_why: str = ""
    """Why it was not timed, where it would fit alone."""
    paces: tuple[Paced, ...] = ()
    """Of the devices whose times go by it: CPU workers, and GPUs whose host sets the times."""
    memory: tuple[Weighed, ...] = ()
    """Of each device."""
    accounts: Accounts | None = None
    """None in files of before they were kept."""
    naive: tuple[Naive, ...] = ()
    """What the plan would be without a planner; empty where that was not asked for."""
    batch_norm: str = ""
    """What is done for each micro-batch here, and once for the batch in the unsharded model, as batch normalisation and
    changes of buffers are: the two were compared micro-batch by micro-batch; empty where nothing is."""

    def gain_over(self, naive: Naive) -> float | None:
        """How many times as fast as that split the plan is, measured; None where it was not run."""
        return naive.timed.measured_s / self.sharded.measured_s if naive.timed else None

    def predicted_gain_over(self, naive: Naive) -> float | None:
        """How many times as fast the plan was predicted to be."""
        if naive.timed is None or naive.timed.predicted_s is None or not self.sharded.predicted_s:
            return None
        return naive.timed.predicted_s / self.sharded.predicted_s

    @property
    def throughput(self) -> float:
        """Measured samples a second."""
        return self.batch / self.sharded.measured_s

    @property
    def predicted_throughput(self) -> float | None:
        """Samples a second as predicted by the plan."""
        return self.batch / self.sharded.predicted_s if self.sharded.predicted_s else None

    @property
    def disturbance_percent(self) -> float | None:
        """By how much the steps that were noted took longer than those that were timed, in percent, by the medians."""
        if self.accounts is None:
            return None
        return 100.0 * (self.accounts.measured_s / self.sharded.measured_s - 1.0)

    def save_trace(self, path: str | Path) -> None:
        """Write the measured timeline and the predicted one as a Chrome trace, which ui.perfetto.dev opens.

        Raises:
            ShardwrightError: the run has no accounts, or ``path`` cannot be written.
        """
        from shardwright.sharder.runtime.chrome import write_trace

        if self.accounts is None:
            raise ShardwrightError("this run kept no timeline: run the plan again, with `shard --run --trace FILE`")
        write_trace(self, self.accounts, path)

    @property
    def speedup_at_pace(self) -> float | None:
        """Predicted for devices as fast as they were in the steps of both."""
        if self.baseline is None or self.baseline.at_pace_s is None or not self.sharded.at_pace_s:
            return None
        return self.baseline.at_pace_s / self.sharded.at_pace_s

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
