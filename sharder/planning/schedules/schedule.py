"""Schedules: which device computes what, in which order. How long it takes is in simulate.py.

Stage p of a pipeline over D devices is on device p % D: with one stage a device, device and stage are the same, and
with several (interleaved) device d has the stages d, D + d, 2D + d and so on. A device works through a fixed list of
operations: the forward F of a micro-batch on one of its stages, its backward B, and under zero-bubble, where B stops at
the gradients of the stage's inputs, the gradients of its weights W. On the last of 3 devices, 4 micro-batches:

    gpipe        F0 F1 F2 F3 B0 B1 B2 B3               all forwards first (Huang et al., NeurIPS 2019)
    1f1b         F0 B0 F1 B1 F2 B2 F3 B3               D - 1 - d forwards, then one F, one B
                                                       (Narayanan et al., SOSP 2019 and SC 2021, section 2.2)
    zero-bubble  F0 B0 F1 B1 F2 B2 W0 F3 B3 W1 W2 W3   as 1f1b, and each W comes d backwards late
                                                       (ZB-H1: Qi et al., "Zero Bubble Pipeline Parallelism", ICLR 2024)

Interleaved 1F1B (SC 2021, section 2.2) lets rounds of D micro-batches pass through the device's stages, one stage after
the other, before the next round follows; zero-bubble does the same when a device has several stages. Their orders are
those of torch.distributed.pipelining (ScheduleInterleaved1F1B, ScheduleInterleavedZeroBubble), whose rounds may be
longer than D when D does not divide the number of micro-batches.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from shardwright.errors import ShardwrightError

__all__ = ["BACKWARD", "FORWARD", "KINDS", "WEIGHTS", "Operation", "Order", "PipelineSchedule", "operations", "order"]

PipelineSchedule = Literal["gpipe", "1f1b", "interleaved", "zero-bubble"]
"""What can be simulated; the planner chooses among those of problem.Schedule."""
Kind = Literal["F", "B", "W"]
KINDS: tuple[Kind, ...] = ("F", "B", "W")
FORWARD, BACKWARD, WEIGHTS = range(3)
"""Positions in KINDS."""

_POSITIONS = bytes.maketrans(b"FBW", bytes(range(3)))


class Operation(NamedTuple):
    """Forward, backward, or gradients of the weights (F, B, W), of one micro-batch on one stage."""

    kind: Kind
    stage: int
    microbatch: int


@dataclass(frozen=True, eq=False)
class Order:
    """What each device computes, in its order: arrays of shape (devices, operations of one device)."""

    kinds: npt.NDArray[np.uint8]
    """Positions in KINDS."""
    stages: npt.NDArray[np.int32]
    microbatches: npt.NDArray[np.int32]
    stage_count: int

    @property
    def devices(self) -> int:
        """Number of devices; stage p is on device p % devices."""
        return len(self.kinds)

    @cached_property
    def sources(self) -> npt.NDArray[np.int32]:
        """For each operation the one whose result it needs from another stage, or -1.

        As a position in the flattened arrays: of the same micro-batch's forward one stage before, or backward one stage
        behind. All else that an operation needs comes earlier on its own device.
        """
        position = np.empty((len(KINDS), self.stage_count, int(self.microbatches.max()) + 1), np.int32)
        every = np.arange(self.kinds.size, dtype=np.int32).reshape(self.kinds.shape)
        position[self.kinds, self.stages, self.microbatches] = every
        sources = np.full(self.kinds.shape, -1, np.int32)
        for kind, step in ((FORWARD, -1), (BACKWARD, 1)):
            source = self.stages + step
            needs = (self.kinds == kind) & (source >= 0) & (source < self.stage_count)
            sources[needs] = position[kind, source[needs], self.microbatches[needs]]
        return sources

    def operation(self, device: int, position: int) -> Operation:
        """The operation that ``device`` does after ``position`` others."""
        at = device, position
        return Operation(KINDS[self.kinds[at]], int(self.stages[at]), int(self.microbatches[at]))


def operations(
    schedule: PipelineSchedule,
    device: int,
    devices: int,
    microbatches: int,
    *,
    train: bool = True,
    stages_per_device: int = 1,
) -> list[Operation]:
    """The operations of one device, in order; arguments and errors as for :func:`order`."""
    whole = order(schedule, devices, microbatches, train=train, stages_per_device=stages_per_device)
    return [whole.operation(device, position) for position in range(whole.kinds.shape[1])]


def order(
    schedule: PipelineSchedule, devices: int, microbatches: int, *, train: bool = True, stages_per_device: int = 1
) -> Order:
    """The operations of every device, in order.

    Args:
        schedule: see the head of this module.
        devices: in the order in which the stages go around them.
        microbatches: of one step.
        train: without it there are forwards only.
        stages_per_device: more than one under ``"interleaved"`` and ``"zero-bubble"``.

    Raises:
        ShardwrightError: the schedule does not know such a number of stages a device or of micro-batches.
    """
    per_round = _per_round(schedule, devices, microbatches, stages_per_device)
    texts = [_kinds(schedule, d, devices, microbatches, stages_per_device, per_round, train) for d in range(devices)]
    kinds = np.array([np.frombuffer(text.encode().translate(_POSITIONS), np.uint8) for text in texts])
    # The n-th forward, backward or W of every device is of the same micro-batch, and of the stage of the same round of
    # stages: forwards climb the device's stages, backwards descend.
    passage, within = np.divmod(np.arange(microbatches * stages_per_device, dtype=np.int32), per_round)
    microbatch = passage // stages_per_device * per_round + within
    climbing = passage % stages_per_device
    stages, numbers = np.empty(kinds.shape, np.int32), np.empty(kinds.shape, np.int32)
    for kind in range(int(kinds.max()) + 1):
        here = kinds == kind
        own = climbing if kind == FORWARD else stages_per_device - 1 - climbing
        stages[here] = np.add.outer(np.arange(devices, dtype=np.int32), own * devices).ravel()
        numbers[here] = np.tile(microbatch, devices)
    return Order(kinds, stages, numbers, devices * stages_per_device)


def _kinds(
    schedule: PipelineSchedule,
    device: int,
    devices: int,
    microbatches: int,
    stages_per_device: int,
    per_round: int,
    train: bool,
) -> str:
    """The kinds of one device's operations, in order."""
    count = microbatches * stages_per_device
    if not train:
        return "F" * count
    if schedule == "gpipe":
        return "F" * count + "B" * count
    # The first micro-batch goes through all stages before the last round of stages begins; each device further from the
    # end waits for one more operation of 1F1B there and one back, which interleaved fills with two forwards.
    hops = (devices - 1 - device) * (2 if schedule == "interleaved" else 1)
    warmup = min(count, (stages_per_device - 1) * per_round + hops)
    steady = count - warmup
    if schedule != "zero-bubble":
        return "F" * warmup + "FB" * steady + "B" * warmup
    plain = min(device, steady)
    late = min(device, count)
    return (
        ("F" * warmup + "FB" * plain + "FBW" * (steady - plain))
        + ("B" * (late - plain) + "BW" * (warmup - (late - plain)))
        + "W" * late
    )


def _per_round(schedule: PipelineSchedule, devices: int, microbatches: int, stages_per_device: int) -> int:
    """Micro-batches that pass through one stage of a device before its next stage has its turn."""
    if min(devices, microbatches, stages_per_device) < 1:
        raise ShardwrightError(
            f"a pipeline needs a device, a micro-batch and a stage a device: there are {devices} devices, "
            f"{microbatches} micro-batches and {stages_per_device} stages a device"
        )
    if schedule in ("gpipe", "1f1b"):
        if stages_per_device > 1:
            raise ShardwrightError(f"{schedule} has one stage a device, not {stages_per_device}: ask for interleaved")
        return microbatches
    if schedule == "zero-bubble" and stages_per_device == 1:
        return microbatches  # whose order knows no rounds; PyTorch's engine asks for equal ones all the same
    rounds = max(1, microbatches // devices)
    if microbatches % rounds:
        low = microbatches - microbatches % devices
        raise ShardwrightError(
            f"{schedule} on {devices} devices cannot take {microbatches} micro-batches in {rounds} equal rounds; "
            f"{low} or {low + devices} would do"
        )
    return microbatches // rounds
