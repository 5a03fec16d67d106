"""Dropout that rests and products in full precision, so that two processes can be compared."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from shardwright.profiler.measuring.gpu_kernels import without_dropout
from shardwright.profiler.recording.staying import StayingMode

__all__ = ["dropout_resting", "full_precision"]


class _NoDropout(StayingMode):
    """Dropout that the forward calls as a function, outside modules, passes its input through."""

    FUNCTIONS = frozenset(
        getattr(nn.functional, f"{kind}dropout{rank}")
        for kind, rank in (("", ""), ("", "1d"), ("", "2d"), ("", "3d"), ("alpha_", ""), ("feature_alpha_", ""))
    )

    def call(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if func in self.FUNCTIONS:
            return args[0] if args else kwargs["input"]
        args, kwargs = without_dropout(func, args, kwargs)
        return func(*args, **kwargs)


@contextmanager
def dropout_resting(units: Sequence[nn.Module]) -> Iterator[None]:
    """Dropout of ``units`` draws other numbers in every process, so for a comparison it rests.

    Modules compute as in evaluation, which also stills the dropout inside attention and recurrent layers; batch
    normalisation goes on with the statistics of its micro-batch. So does the forward between units, whose mode is part
    of the captured graph.
    """
    modules = dict.fromkeys(inner for unit in units for inner in unit.modules())
    resting = [m for m in modules if m.training and not isinstance(m, nn.modules.batchnorm._NormBase)]
    for inner in resting:
        inner.training = False
    try:
        with _NoDropout():
            yield
    finally:
        for inner in resting:
            inner.training = True


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Have a GPU compute float32 as such, and not as TF32, which another kind of device does not know."""
    if device.type != "cuda":
        yield
        return
    convolutions, products = torch.backends.cudnn, torch.backends.cuda.matmul
    before = convolutions.allow_tf32, products.allow_tf32
    convolutions.allow_tf32 = products.allow_tf32 = False
    try:
        yield
    finally:
        convolutions.allow_tf32, products.allow_tf32 = before
