"""Dropout and attention as GPUs do them, while memory is counted on the CPU.

With dropout, PyTorch's attention on a CPU computes step by step, and keeps the probabilities and what was dropped of
them for the backward. GPUs have kernels that keep neither, with dropout or without, as the CPU's kernel does without.
So for a model that is to run on GPUs alone, attention is counted without its dropout. Of dropout itself a CPU keeps a
factor for each element, in the tensor's dtype, and a GPU whether the element stays, in a byte: there is an operator
that does the same on a CPU, which takes its place.

Not everything has such a kernel on a GPU: in single precision, where keys and values have fewer heads than queries
(``enable_gqa``), none takes it, and PyTorch computes step by step there. That is what eight layers of a Llama in
float32 took beyond their prediction on an H100: 1.1 GiB, as large as their probabilities and gathered keys and values.
In double precision none takes any attention.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch.nn import functional as F  # noqa: N812
from torch.nn.attention import SDPBackend, sdpa_kernel

from shardwright.profiler.profile import Device
from shardwright.profiler.recording.staying import StayingMode

__all__ = ["kernels_as_on", "kernels_of", "without_dropout"]

_DROPOUT_AT = {
    F.scaled_dot_product_attention: 4,
    F.multi_head_attention_forward: [*inspect.signature(F.multi_head_attention_forward).parameters].index("dropout_p"),
}
"""Where among the arguments the share that is dropped is."""


def without_dropout(
    func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of ``func`` with no dropout in them, if it is attention."""
    place = _DROPOUT_AT.get(func)
    if place is None:
        return args, kwargs
    if len(args) > place:
        return (*args[:place], 0.0, *args[place + 1 :]), kwargs
    return args, kwargs | {"dropout_p": 0.0}


@contextmanager
def kernels_as_on(devices: Iterable[Device]) -> Iterator[None]:
    """Inside, attention and dropout keep for the backward what they keep on ``devices``: no change if one is no GPU."""
    kinds = {device.kind for device in devices}
    with kernels_of("cuda" if kinds == {"cuda"} else "cpu"):
        yield


def kernels_of(kind: str) -> AbstractContextManager[Any]:
    """A block in which attention and dropout go as on devices of ``kind``, though the tensors are on a CPU."""
    return _AsOnGPUs() if kind == "cuda" else nullcontext()


class _AsOnGPUs(StayingMode):
    """Calls attention with no dropout, and dropout by the operator that GPUs have for it."""

    def call(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if func in (F.dropout, torch.dropout):
            return _dropped(func, args, kwargs)
        if func is F.scaled_dot_product_attention and _is_step_by_step(args, kwargs):
            with sdpa_kernel(SDPBackend.MATH):
                return func(*args, **kwargs)
        args, kwargs = without_dropout(func, args, kwargs)
        return func(*args, **kwargs)


def _is_step_by_step(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether attention of these arguments has no kernel on GPUs.

    Of torch 2.11's and 2.13's kernels flash attention and cuDNN's take unequal heads, in half precision alone, and the
    memory-efficient one takes single precision too; double precision is left to single steps
    (``sdp_utils.cpp``, ``check_tensor_dtype``).
    """
    given = dict(zip(("query", "key"), args, strict=False)) | kwargs
    query, key = given["query"], given["key"]
    if query.dtype == torch.float64:
        return True
    gathers = bool(args[7] if len(args) > 7 else kwargs.get("enable_gqa", False))
    is_half = query.dtype in (torch.float16, torch.bfloat16)
    return gathers and not is_half and query.dim() == 4 and query.shape[1] != key.shape[1]


def _dropped(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The result of a dropout function."""
    given = dict(zip(("input", "p", "training", "inplace"), args, strict=False)) | kwargs
    share = given.get("p", 0.5)
    trains = given.get("training", given.get("train", True))
    if not trains or given.get("inplace") or not 0.0 < share < 1.0:
        return func(*args, **kwargs)  # nothing is kept then, or what is changed in place has to be
    return torch.native_dropout(given["input"], share, train=True)[0]
