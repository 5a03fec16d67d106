"""Models without values: their forward runs on fake tensors, which have shapes, strides and dtypes."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from shardwright.profiler.recording.structure import map_tensors

__all__ = ["fake_like", "has_values", "shapes_only", "unlogged"]


def has_values(model: nn.Module) -> bool:
    """Whether every parameter and buffer of ``model`` has values: none is on ``meta``, and none is fake."""
    return not any(t.is_meta or isinstance(t, FakeTensor) for t in (*model.parameters(), *model.buffers()))


def fake_like(tensor: Tensor) -> Tensor:
    """A tensor of the same form on the CPU, to be made under the ``FakeTensorMode`` that it belongs to."""
    if tensor.layout is not torch.strided:
        return tensor.detach().clone()
    made = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(made, tensor.requires_grad)
    return made.requires_grad_(tensor.requires_grad)


@contextmanager
def unlogged() -> Iterator[None]:
    """Without torch's own report of what fake tensors cannot do: it is done on real ones then, or told as an error."""
    log = logging.getLogger("torch._subclasses.fake_tensor")
    before, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = before


@contextmanager
def shapes_only(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Iterator[tuple[tuple[Any, ...], dict[str, Any]]]:
    """Give a model without values fake ones for the block, and its inputs too; other models are left as they are.

    Yields:
        The inputs that the model is to be called with.
    """
    if has_values(model):
        yield args, dict(kwargs)
        return
    own: list[tuple[dict[str, Any], dict[str, Any]]] = [
        (holder, dict(holder)) for module in model.modules() for holder in (module._parameters, module._buffers)
    ]
    fakes: dict[int, Tensor] = {}
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            for holder, tensors in own:
                for name, tensor in tensors.items():
                    if tensor is not None:
                        holder[name] = fakes.setdefault(id(tensor), fake_like(tensor))
            yield map_tensors(fake_like, (args, dict(kwargs)))
    finally:
        for holder, tensors in own:
            holder.clear()
            holder.update(tensors)
