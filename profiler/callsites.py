"""Where in a model's code something is called, and calls that PyTorch's function modes do not see."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import torch

__all__ = ["applied_name", "call_site", "functions_applied"]


def call_site(frame: FrameType | None) -> str:
    """``file.py:line:column`` of the innermost call in a model's code; columns from Python 3.11 on."""
    while frame is not None:
        name = frame.f_globals.get("__name__", "")
        # The forwards of torch's own modules are code like the user's; what calls modules is not.
        own = name.startswith("torch.nn.modules.") and name != "torch.nn.modules.module"
        if own or not (name == "torch" or name.startswith(("torch.", "shardwright."))):
            return _position(frame.f_code, frame.f_lasti, frame.f_lineno)
        frame = frame.f_back
    return ""


@lru_cache(maxsize=4096)  # glue that is aligned asks in every call
def _position(code: CodeType, instruction: int, line: int) -> str:
    positions = next(itertools.islice(code.co_positions(), instruction // 2, None))
    return f"{Path(code.co_filename).name}:{line}:{(positions[2] or 0) + 1}"


@contextmanager
def functions_applied(
    handle: Callable[[type[torch.autograd.Function], Callable[..., Any], Any, dict[str, Any]], Any],
) -> Iterator[None]:
    """Have ``handle(function, apply, args, kwargs)`` called where a custom autograd function is applied.

    PyTorch's function modes do not see these calls.
    """
    original = torch.autograd.Function.__dict__["apply"]

    def apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
        return handle(cls, original.__get__(None, cls), args, kwargs)

    torch.autograd.Function.apply = classmethod(apply)  # type: ignore[assignment,method-assign]
    try:
        yield
    finally:
        torch.autograd.Function.apply = original  # type: ignore[method-assign]


def applied_name(function: type[torch.autograd.Function]) -> str:
    """What a step that applies ``function`` is called."""
    return f"{function.__name__}.apply"
