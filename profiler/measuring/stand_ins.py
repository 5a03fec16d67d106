"""Stand-ins: values made on the spot for a step of a model without values, so that it can be timed on a real device.

What a step takes depends on shapes and hardly on numbers; those that are made keep clear of what is slow or fails:
denormals, infinities, indices out of range. A model that fits neither a device nor the host is so measured a step at a
time, each made where it is timed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from shardwright.profiler.recording.structure import map_tensors, tensors_in
from shardwright.profiler.recording.unitgraph import Call

__all__ = ["filled", "lacks_values", "sendable"]

SPREAD = 0.02
"""Of made weights of two and more dimensions; those of one, such as scales and variances, are 1."""


def lacks_values(tensor: Tensor) -> bool:
    """Whether there is a shape only."""
    return isinstance(tensor, FakeTensor) or tensor.is_meta


def sendable(call: Call, inputs: Sequence[Tensor] = ()) -> Call:
    """``call`` with tensors that another process can take in: without values on ``meta``, and real ``inputs``.

    Args:
        inputs: what the model is called with: whole numbers in the form of one of these become it, so that indices are
            as spread as the user's.
    """
    known = {(t.dtype, tuple(t.shape)): t for t in inputs if not t.is_floating_point() and not lacks_values(t)}

    def sent(tensor: Tensor) -> Tensor:
        if not lacks_values(tensor):
            return tensor
        real = known.get((tensor.dtype, tuple(tensor.shape)))
        if real is not None:
            return real
        made = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
        return made.requires_grad_(tensor.requires_grad)

    args, kwargs = map_tensors(sent, (call.args, call.kwargs))
    return Call(call.function, args, kwargs, call.context)


def filled(call: Call) -> Call:
    """``call`` with values for all that has none; its module gets them in place, once."""
    function = call.function
    if isinstance(function, nn.Module):
        made: dict[int, Tensor] = {}
        for module in function.modules():
            holders: list[dict[str, Any]] = [module._parameters, module._buffers]
            for holder in holders:
                for name, tensor in holder.items():
                    if tensor is not None and lacks_values(tensor):
                        if id(tensor) not in made:
                            made[id(tensor)] = _weights(tensor)
                        holder[name] = made[id(tensor)]
    if not any(lacks_values(tensor) for _, tensor in tensors_in((call.args, call.kwargs))):
        return call
    args, kwargs = map_tensors(lambda t: _activations(t) if lacks_values(t) else t, (call.args, call.kwargs))
    return Call(function, args, kwargs, call.context)


def _weights(tensor: Tensor) -> Tensor:
    """A parameter or buffer of this form."""
    made = _made(tensor, spread=SPREAD if tensor.dim() > 1 else 0.0, middle=1.0 if tensor.dim() < 2 else 0.0)
    return nn.Parameter(made, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else made


def _activations(tensor: Tensor) -> Tensor:
    """An input of this form."""
    return _made(tensor, spread=1.0, middle=0.0).requires_grad_(tensor.requires_grad)


def _made(tensor: Tensor, *, spread: float, middle: float) -> Tensor:
    """Numbers in this form; of whole numbers zeros, which are in every range, of a mask all that may be looked at."""
    shape = [1 if not stride else size for size, stride in zip(tensor.shape, tensor.stride(), strict=True)]
    base = torch.empty_strided(shape, tensor.stride(), dtype=tensor.dtype, device="cpu")
    if tensor.dtype == torch.bool:
        base.fill_(True)
    elif tensor.is_floating_point() or tensor.is_complex():
        exact = torch.complex64 if tensor.is_complex() else torch.float32  # small types cannot draw
        base.copy_(torch.randn(shape, dtype=exact) * spread + middle)
    else:
        base.zero_()
    return base.expand(tensor.shape)  # what was expanded has one number for many places
