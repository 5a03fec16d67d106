"""Arithmetic: how many multiplications and additions an operator does, both counted.

The formulas are those of ``torch.utils.flop_counter``, and our own for what its registry lacks or counts wrongly.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

__all__ = ["Formula", "formula_of"]

Formula = Callable[..., int]
"""Called with the operator's result and its arguments."""


def formula_of(func: Any) -> Formula | None:
    """The arithmetic of the operator ``func``, or None for one that only moves bytes."""
    if isinstance(func, OpOverload) and func.namespace == "aten":
        own = _FORMULAS.get(func._overloadpacket.__name__)
        if own is not None:
            return lambda _, *args, **kwargs: own(*args, **kwargs)
    torchs = flop_registry.get(func._overloadpacket if isinstance(func, OpOverload) else func)
    return None if torchs is None else lambda result, *args, **kwargs: int(torchs(*args, **kwargs, out_val=result))


def _attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(query.shape, _shared(key, query), _shared(value, query)))


def _attention_backward(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    return int(sdpa_backward_flop_count(grad.shape, query.shape, _shared(key, query), _shared(value, query)))


def _shared(of: Tensor, query: Tensor) -> tuple[int, ...]:
    """The shape of keys or values for each head of the queries; torch 2.11's formula refuses fewer heads."""
    return (*of.shape[:-3], query.shape[-3], *of.shape[-2:])


def _multi_head(query: Tensor, key: Tensor, value: Tensor, width: int, heads: int, *_: Any, **__: Any) -> int:
    """The fused attention of :class:`torch.nn.MultiheadAttention`: four projections around the attention."""
    batch, targets, sources = query.shape[0], query.shape[1], key.shape[1]
    projections = 4 * batch * width * width * (targets + sources)
    head = width // heads
    shapes = [(batch, heads, length, head) for length in (targets, sources, value.shape[1])]
    return projections + int(sdpa_flop_count(*shapes))


def _encoder_layer(source: Tensor, width: int, heads: int, *weights: Any, **_: Any) -> int:
    """The fused :class:`torch.nn.TransformerEncoderLayer`: attention and two linear layers."""
    ffn = sum(weight.numel() for weight in weights if isinstance(weight, Tensor) and weight.dim() == 2) - 4 * width**2
    return _multi_head(source, source, source, width, heads) + 2 * (source.numel() // width) * ffn


def _grouped_product(a: Tensor, b: Tensor, *_: Any, **__: Any) -> int:
    """Products by group: with three dimensions each, group by group; else the groups share one dimension."""
    groups = a.shape[0] if a.dim() == b.dim() == 3 else 1
    return 2 * groups * a.shape[-2] * a.shape[-1] * b.shape[-1]


def _convolution_backward(
    grad: Tensor, x: Tensor, weight: Tensor, _bias: Any, _stride: Any, _padding: Any, _dilation: Any, *rest: Any
) -> int:
    """Each gradient takes as much as the forward (torch's own formula forgets the groups)."""
    transposed, mask = rest[0], rest[3]
    places = x if transposed else grad
    forward = 2 * places.numel() // places.shape[1] * weight.numel()
    return forward * (bool(mask[0]) + bool(mask[1]))


def _recurrent(x: Tensor, *weights: Any, **_: Any) -> int:
    """Every step of every sequence meets each matrix among the weights once."""
    return _recurrent_stack(x, weights[:4])


def _recurrent_stack(x: Tensor, weights: Sequence[Tensor], *_: Any, **__: Any) -> int:
    """Likewise, for all layers at once."""
    return 2 * prod(x.shape[:-1]) * sum(prod(w.shape) for w in weights if w.dim() == 2)


def _trilinear(a: Tensor, b: Tensor, c: Tensor, *expansions: Any, **_: Any) -> int:
    """Two products and a sum for each element of the common shape."""
    shapes = []
    for tensor, expansion in zip((a, b, c), expansions[:3], strict=True):
        shape = list(tensor.shape)
        for dimension in sorted(expansion):
            shape.insert(dimension, 1)
        shapes.append(shape)
    return 3 * int(prod(torch.broadcast_shapes(*shapes)))


_FORMULAS: dict[str, Callable[..., int]] = {
    "_scaled_dot_product_flash_attention_for_cpu": _attention,
    "_scaled_dot_product_flash_attention_for_cpu_backward": _attention_backward,
    "_scaled_dot_product_fused_attention_overrideable": _attention,
    "_scaled_dot_product_fused_attention_overrideable_backward": _attention_backward,
    "_native_multi_head_attention": _multi_head,
    "_transformer_encoder_layer_fwd": _encoder_layer,
    "_grouped_mm": _grouped_product,
    "_scaled_grouped_mm": _grouped_product,
    "_int_mm": lambda a, b, **_: 2 * a.numel() * b.shape[1],
    "_addmm_activation": lambda _, a, b, **__: 2 * a.numel() * b.shape[1],
    "convolution_backward": _convolution_backward,
    "mkldnn_rnn_layer": _recurrent,
    "mkldnn_rnn_layer_backward": lambda *args, **_: 2 * _recurrent(*args),
    "_cudnn_rnn": _recurrent_stack,
    "_cudnn_rnn_backward": lambda x, weights, *_, **__: 2 * _recurrent_stack(x, weights),
    "miopen_rnn": _recurrent_stack,
    "miopen_rnn_backward": lambda x, weights, *_, **__: 2 * _recurrent_stack(x, weights),
    "_trilinear": _trilinear,
    "mv": lambda matrix, *_, **__: 2 * matrix.numel(),
    "addmv": lambda _, matrix, *__, **___: 2 * matrix.numel(),
    "dot": lambda a, *_, **__: 2 * a.numel(),
    "addbmm": lambda _, a, b, **__: 2 * a.numel() * b.shape[2],
}
"""What torch's registry lacks, or counts wrongly; the arguments are the operator's."""
