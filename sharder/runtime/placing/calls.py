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

__all__ = ["OPEN", "Begun", "begin", "end", "finish", "has_begun", "open_calls", "settle"]

_CALL = nn.Module._call_impl.__code__


def _module_call() -> FrameType | None:
    """The frame of the innermost call of a module in this thread; None if PyTorch's own code does not call it."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code is not _CALL:
        frame = frame.f_back
    return frame


class Begun:
    """What ``hook`` began in the call of a module that runs now in this thread.

    Args:
        frame: that of the call, where it is known.
    """

    def __init__(self, hook: object, frame: FrameType | None = None) -> None:
        self.hook = hook
        self.frame = frame or _module_call()
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


OPEN: dict[int, list[Begun]] = {}
"""By thread: what has begun and not ended there, innermost last; no thread where that is nothing.

Hooks that nearly always find nothing begun look whether there is anything in it, which costs less than to ask for the
thread's own. What a thread leaves that has ended, the next of that number settles.
"""


def open_calls() -> list[Begun]:
    """What has begun and not ended in this thread, innermost last."""
    return OPEN.get(threading.get_ident(), [])


def begin(begun: Begun) -> None:
    """Note it before it changes anything, so that it is ended also if it fails half-way."""
    OPEN.setdefault(begun.thread, []).append(begun)


def _innermost() -> Begun:
    """Take what began last in this thread."""
    thread = threading.get_ident()
    begun = OPEN[thread].pop()
    if not OPEN[thread]:
        del OPEN[thread]
    return begun


def has_begun(hook: object) -> bool:
    """Whether something that ``hook`` began in this thread has not ended."""
    for begun in open_calls():  # noqa: SIM110  # a generator costs as much as all the rest
        if begun.hook is hook:
            return True
    return False


def end(hook: object) -> Begun | None:
    """Take what ``hook`` began in the call of a module that runs now; None if the call failed before that.

    What was begun later, and not ended, is undone.
    """
    stack = open_calls()
    frame = _module_call()
    if stack and stack[-1].hook is hook and stack[-1].frame is frame:  # nearly always
        return _innermost()
    if not any(begun.hook is hook and begun.frame is frame for begun in stack):
        return None
    while stack[-1].hook is not hook or stack[-1].frame is not frame:
        _innermost().undo()
    return _innermost()


def finish(begun: Begun) -> None:
    """Undo ``begun``, and what was begun after it and has not ended; for a call that itself sees to its end."""
    stack = open_calls()
    while begun in stack:
        _innermost().undo()
    begun.frame = None  # which refers to it


def settle() -> None:
    """Undo what calls have left that were broken off in this thread."""
    while (stack := open_calls()) and stack[-1].is_over():
        _innermost().undo()
