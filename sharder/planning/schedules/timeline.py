"""What a simulated step was like: when each device computed what, and what crossed the links meanwhile."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from shardwright.sharder.planning.schedules.schedule import Operation, Order

__all__ = ["Slot", "Timeline", "Transfer"]


class Slot(NamedTuple):
    """When a device ran an operation, in seconds from the start of the step; transfers excluded."""

    device: int
    operation: Operation
    start_s: float
    end_s: float


class Transfer(NamedTuple):
    """When the result of an operation crossed from its device to the next reader's, in seconds from the step's start.

    The sender is at it from ``start_s``, the receiver until ``received_s``, each for as long as the transfer takes it;
    serial with compute, it does nothing else meanwhile.
    """

    operation: Operation
    sender: int
    receiver: int
    start_s: float
    end_s: float
    received_s: float


@dataclass(frozen=True, eq=False)
class Timeline:
    """A simulated step. Arrays have the shape (devices, operations of one device), in the order of ``order``."""

    order: Order
    step_s: float
    busy_s: tuple[float, ...]
    """By device: compute, ties and update, and the transfers that are serial with compute."""
    start_s: npt.NDArray[np.float64]
    end_s: npt.NDArray[np.float64]
    arrived_s: npt.NDArray[np.float64]
    """When the operation's result is at the device that needs it next."""
    crossing_s: npt.NDArray[np.float64]
    """How long that takes, by kind and stage: shape (len(KINDS), stages)."""
    received_s: npt.NDArray[np.float64]
    """When the operation's own input has been received from another device."""

    @property
    def bubble(self) -> float:
        """Share of all the devices' time in which they wait."""
        whole = self.step_s * len(self.busy_s)
        return 1.0 - sum(self.busy_s) / whole if whole else 0.0

    @cached_property
    def slots(self) -> tuple[Slot, ...]:
        """All operations by their start, then by device; made when they are asked for, since there may be millions."""
        devices, positions = np.indices(self.start_s.shape).reshape(2, -1)
        sequence = np.lexsort((devices, self.start_s.ravel()))
        return tuple(self._slot(int(devices[i]), int(positions[i])) for i in sequence)

    @cached_property
    def transfers(self) -> tuple[Transfer, ...]:
        """What took time to cross from device to device, by its start."""
        receivers, positions = np.nonzero(self.order.sources >= 0)
        crossed = (self._transfer(int(d), int(k)) for d, k in zip(receivers, positions, strict=True))
        return tuple(sorted((t for t in crossed if t.end_s > t.start_s), key=lambda t: (t.start_s, t.sender)))

    def _slot(self, device: int, position: int) -> Slot:
        at = device, position
        return Slot(device, self.order.operation(*at), float(self.start_s[at]), float(self.end_s[at]))

    def _transfer(self, receiver: int, position: int) -> Transfer:
        """The crossing of what the receiver's operation waits for."""
        sent = divmod(int(self.order.sources[receiver, position]), self.order.kinds.shape[1])
        end_s = float(self.arrived_s[sent])
        start_s = end_s - float(self.crossing_s[self.order.kinds[sent], self.order.stages[sent]])
        received_s = float(self.received_s[receiver, position])
        return Transfer(self.order.operation(*sent), sent[0], receiver, start_s, end_s, received_s)
