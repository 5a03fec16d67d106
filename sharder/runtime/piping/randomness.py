"""Random numbers: the state of the generators that a device's stages draw from, and the numbers of each rank apart.

A script seeds all its ranks alike, so that they have the same weights and batches. Stages that drew from its generators
would have the same dropout as those of other ranks, each replica for its own samples; and as stages draw unequally
often, the ranks' next batches would differ.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["OwnNumbers", "RandomState"]


class RandomState(NamedTuple):
    """Of the generators that a stage draws from."""

    device: torch.device
    cpu: Tensor
    gpu: Tensor | None

    @classmethod
    def of(cls, device: torch.device) -> RandomState:
        """The state now."""
        return cls(device, torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None)

    @classmethod
    def seeded(cls, device: torch.device, seed: int) -> RandomState:
        """That which ``torch.manual_seed`` makes."""
        cpu = torch.Generator().manual_seed(seed).get_state()
        on_gpu = device.type == "cuda"
        return cls(device, cpu, torch.Generator(device).manual_seed(seed).get_state() if on_gpu else None)

    def is_current(self) -> bool:
        """Whether nothing was drawn since."""
        now = RandomState.of(self.device)
        pairs = ((self.cpu, now.cpu), (self.gpu, now.gpu))
        return all(one is None or other is None or torch.equal(one, other) for one, other in pairs)

    def restore(self) -> None:
        """Draw from here on again."""
        torch.set_rng_state(self.cpu)
        if self.gpu is not None:
            torch.cuda.set_rng_state(self.gpu, self.device)


class OwnNumbers:
    """Random numbers of one rank, from the script's seed and the rank's number: they can be had again.

    Args:
        device: whose generator is meant, beside the CPU's.
    """

    def __init__(self, device: torch.device, rank: int) -> None:
        self.device = device
        self._state = RandomState.seeded(device, (torch.initial_seed() + 1 + rank) % 2**63)

    @contextmanager
    def drawn(self) -> Iterator[None]:
        """Draw them in this block, going on from the last one; after it the script's come as if there had been none."""
        before = RandomState.of(self.device)
        self._state.restore()
        try:
            yield
        finally:
            self._state = RandomState.of(self.device)
            before.restore()
