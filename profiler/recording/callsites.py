"""Where in a model's code something is called, and calls that PyTorch's function modes do not see."""

from __future__ import annotations

import itertools
import sysconfig
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import torch

__all__ = ["applied_name", "call_site", "error_site", "functions_applied"]


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


def error_site(error: BaseException) -> str:
    """``file.py:line`` of the innermost code on the way of an error that is neither PyTorch's nor ours, nor of the
    standard library if there is other; or nothing."""
    found = [
        (Path(frame.f_code.co_filename), line)
        for frame, line in reversed([*traceback.walk_tb(error.__traceback__)])
        if frame.f_globals.get("__name__", "").partition(".")[0] not in ("torch", "shardwright")
        and not frame.f_code.co_filename.startswith("<")
    ]
    standard = Path(sysconfig.get_path("stdlib"))
    own = [each for each in found if standard not in each[0].parents or "site-packages" in each[0].parts]
    return next((f"{path.name}:{line}" for path, line in own or found), "")


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
    with _patching:
        if not _patched:
            _patched.append(torch.autograd.Function.__dict__["apply"])
            torch.autograd.Function.apply = classmethod(_apply)  # type: ignore[assignment,method-assign]
        else:
            _patched.append(_patched[0])
    _handlers.stack.append(handle)
    try:
        yield
    finally:
        _handlers.stack.remove(handle)
        with _patching:
            original = _patched.pop()
            if not _patched:
                torch.autograd.Function.apply = original  # type: ignore[method-assign]


class _Handlers(threading.local):
    """What is called in this thread, innermost last."""

    def __init__(self) -> None:
        self.stack: list[Callable[..., Any]] = []


_handlers = _Handlers()
_patching = threading.Lock()
_patched: list[Any] = []
"""PyTorch's own ``apply``, once for each block of any thread that is open."""


def _apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
    call = _patched[0].__get__(None, cls) if _patched else super(torch.autograd.Function, cls).apply
    return _handlers.stack[-1](cls, call, args, kwargs) if _handlers.stack else call(*args, **kwargs)


def applied_name(function: type[torch.autograd.Function]) -> str:
    """What a step that applies ``function`` is called."""
    return f"{function.__name__}.apply"
