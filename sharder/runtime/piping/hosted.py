"""Stages of a pipeline over devices of several kinds: what they exchange goes through the host's memory.

NCCL connects GPUs only, and gloo sends from the host's memory. Where a plan mixes kinds, or PyTorch was built without
NCCL, the engine therefore runs in that memory with gloo, for all stages, and each stage brings in what it receives and
returns there what it sends; the backward of these copies does the same with the gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor, nn

from shardwright.sharder.planning.plan import Plan

__all__ = ["GPUS_BACKEND", "HOST", "HostedStage", "backend_of", "has_several_kinds", "is_hosted"]

HOST = torch.device("cpu")
GPUS_BACKEND = "cpu:gloo,cuda:nccl"
"""Of a process group of GPUs: NCCL, beside which the host's tensors go over gloo."""


def has_several_kinds(devices: Iterable[str]) -> bool:
    """Whether some are GPUs and others are not."""
    return len({device.partition(":")[0] for device in devices}) > 1


def backend_of(devices: Iterable[str]) -> str:
    """What connects the processes of ``devices``."""
    on_gpus = all(device.startswith("cuda") for device in devices)
    return GPUS_BACKEND if on_gpus and dist.is_nccl_available() else "gloo"


def is_hosted(plan: Plan) -> bool:
    """Whether what the stages of ``plan`` exchange goes through the host's memory though a stage is elsewhere."""
    on_a_gpu = any(device.startswith("cuda") for device in plan.devices)
    return on_a_gpu and backend_of(plan.devices) == "gloo"


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
