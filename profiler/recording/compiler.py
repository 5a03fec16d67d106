"""PyTorch's compiler: kept from what hooks and modes are to see, and not imported where nothing is compiled.

It takes seconds to import, and most models need none of it.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, ParamSpec, TypeVar

import torch
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["compiler_spared", "eager", "uncompiled"]

Given = ParamSpec("Given")
Result = TypeVar("Result")
Mode = TypeVar("Mode", bound=type[TorchDispatchMode])


def _is_loaded() -> bool:
    """Whether the compiler is there: until it is imported, nothing is compiled."""
    return "torch._dynamo" in sys.modules


def eager() -> Any:
    """Have compiled modules run as Python, where hooks and modes see what they do; see :func:`uncompiled`."""
    return torch.compiler.set_stance("force_eager") if _is_loaded() else nullcontext()


def uncompiled(function: Callable[Given, Result]) -> Callable[Given, Result]:
    """Have ``function``, which runs models :func:`eager`, run once more where a forward has brought in the compiler.

    What was compiled then was not seen, as the compiler was not there to be told.
    """

    @functools.wraps(function)
    def run(*args: Given.args, **kwargs: Given.kwargs) -> Result:
        if _is_loaded():
            return function(*args, **kwargs)
        try:
            result = function(*args, **kwargs)
        except Exception:
            if not _is_loaded():
                raise
        else:
            if not _is_loaded():
                return result
        return function(*args, **kwargs)

    return run


def compiler_spared(mode: Mode) -> Mode:
    """A mode that keeps the compiler from looking into it, as PyTorch has it, but imports none in order to do so."""
    guarded: Any = mode.__torch_dispatch__
    unguarded: Any = getattr(guarded, "__wrapped__", guarded)  # a PyTorch that does not guard it has nothing to spare

    def dispatch(self: Any, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return (guarded if _is_loaded() else unguarded)(self, func, types, args, kwargs)

    mode.__torch_dispatch__ = dispatch  # type: ignore[method-assign]
    return mode
