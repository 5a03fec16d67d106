"""Stages of a pipeline over devices of several kinds: what they exchange goes through the host's memory.

NCCL connects GPUs only, and gloo sends from the host's memory. Where a plan mixes kinds, the engine therefore runs in
that memory with gloo, for all stages, and each stage brings in what it receives and returns there what it sends; the
backward of these copies does the same with the gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

from shardwright.sharder.planning.plan import Plan

__all__ = ["GPUS_BACKEND", "HOST", "HostedStage", "is_hosted"]

HOST = torch.device("cpu")
GPUS_BACKEND = "cpu:gloo,cuda:nccl"
"""Of a process group of GPUs: NCCL, beside which the host's tensors go over gloo."""


def is_hosted(plan: Plan) -> bool:
    """Whether the stages of ``plan`` are on devices of several kinds."""
    return len({device.partition(":")[0] for device in plan.devices}) > 1


class HostedStage(nn.Module):
    """``module`` on ``device``, as the engine sees a stage in the host's memory.

    Args:
        last: whether its outputs stay where they are, for the loss.
    """

    def __init__(self, module: nn.Module, device: torch.device, *, last: bool) -> None:
        super().__init__()
        self.module, self.device, self.last = module, device, last

    def forward(self, *received: Tensor) -> tuple[Tensor, ...]:
        """What the module makes of tensors from anywhere, in the host's memory unless it is the last."""
        made: tuple[Tensor, ...] = self.module(*(tensor.to(self.device) for tensor in received))
        return made if self.last else tuple(tensor.to(HOST) for tensor in made)

    def _apply(self, fn: Callable[[Any], Any], recurse: bool = True) -> Self:
        """Stay: the engine moves a stage to its own device."""
        del fn, recurse
        return self
