"""Attention as GPUs do it, while memory is counted on the CPU.

With dropout, PyTorch's attention on a CPU computes step by step, and keeps the probabilities and what was dropped of
them for the backward. GPUs have kernels that keep neither, with dropout or without, as the CPU's kernel does without.
So for a model that is to run on GPUs alone, attention is counted without its dropout.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch.nn import functional as F  # noqa: N812
from torch.overrides import TorchFunctionMode

from shardwright.profiler.profile import Device

__all__ = ["attention_as_on", "without_dropout"]

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
def attention_as_on(devices: Iterable[Device]) -> Iterator[None]:
    """Inside, attention keeps for the backward what it keeps on ``devices``: nothing changes if one is no GPU."""
    kinds = {device.kind for device in devices}
    if kinds != {"cuda"}:
        yield
        return
    with _WithoutDropout():
        yield


class _WithoutDropout(TorchFunctionMode):
    """Calls attention with no dropout."""

    def __torch_function__(
        self, func: Callable[..., Any], _types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        args, kwargs = without_dropout(func, args, kwargs or {})
        return func(*args, **kwargs)
