"""Calls of a placed model's modules: what hooks begin before a call they end after it, whatever ends the call.

PyTorch calls a module's hooks after an ``Exception`` too, if they ask for it, but not after a ``KeyboardInterrupt`` or
another exception of its kind. So what is begun notes the frame in which the module is called. Once that frame no longer
runs, the call is over, and the next hook that finds it so ends it.
"""

from __future__ import annotations

import sys
import threading
from types import FrameType

from torch import nn

__all__ = ["Begun", "begin", "end", "has_begun", "open_calls", "settle"]

_CALL = nn.Module._call_impl.__code__


def _module_call() -> FrameType | None:
    """The frame of the innermost call of a module in this thread; None if PyTorch's own code does not call it."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code is not _CALL:
        frame = frame.f_back
    return frame


class Begun:
    """What ``hook`` began in the call of a module that runs now in this thread."""

    def __init__(self, hook: object) -> None:
        self.hook = hook
        self.frame = _module_call()
        self.thread = threading.get_ident()

    def undo(self) -> None:
        """Make it as if it had not begun; more than once does no harm."""
        raise NotImplementedError

    def is_over(self) -> bool:
        """Whether the call no longer runs; of a call that PyTorch's own code does not make this is never known."""
        if self.frame is None:
            return False
        running = sys._current_frames().get(self.thread)
        while running is not None and running is not self.frame:
            running = running.f_back
        return running is None


class _Open(threading.local):
    """What has begun and not ended in this thread, innermost last."""

    def __init__(self) -> None:
        self.stack: list[Begun] = []


_open = _Open()


def open_calls() -> list[Begun]:
    """What has begun and not ended in this thread, innermost last."""
    return _open.stack


def begin(begun: Begun) -> None:
    """Note it before it changes anything, so that it is ended also if it fails half-way."""
    _open.stack.append(begun)


def has_begun(hook: object) -> bool:
    """Whether something that ``hook`` began in this thread has not ended."""
    for begun in _open.stack:  # noqa: SIM110  # a generator costs as much as all the rest
        if begun.hook is hook:
            return True
    return False


def end(hook: object) -> Begun | None:
    """Take what ``hook`` began in the call of a module that runs now; None if the call failed before that.

    What was begun later, and not ended, is undone.
    """
    stack = _open.stack
    frame = _module_call()
    if stack and stack[-1].hook is hook and stack[-1].frame is frame:  # nearly always
        return stack.pop()
    if not any(begun.hook is hook and begun.frame is frame for begun in stack):
        return None
    while stack[-1].hook is not hook or stack[-1].frame is not frame:
        stack.pop().undo()
    return stack.pop()


def settle() -> None:
    """Undo what calls have left that were broken off in this thread."""
    stack = _open.stack
    while stack and stack[-1].is_over():
        stack.pop().undo()
