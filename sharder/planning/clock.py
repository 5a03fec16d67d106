"""The time that planning has, which Ctrl-C ends: whatever looks at the clock from then on has none left."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType

__all__ = ["clock_s", "ended_by_interrupt"]

LATER_S = 1e9
"""What the clock is put on by: farther than any deadline."""


class _Clock:
    ended = False
    """Whether the user wants what there is."""


_clock = _Clock()


def clock_s() -> float:
    """Seconds, as ``time.monotonic()`` has them; after Ctrl-C every deadline that was set before it has passed."""
    return time.monotonic() + (LATER_S if _clock.ended else 0.0)


def _end(_: int, frame: FrameType | None) -> None:
    if _clock.ended:  # the second time: the user does not want that either
        signal.default_int_handler(signal.SIGINT, frame)
    _clock.ended = True


@contextlib.contextmanager
def ended_by_interrupt() -> Iterator[None]:
    """Have the first Ctrl-C end the time that is left, and only the next one raise ``KeyboardInterrupt``.

    In threads, and where a program has a handler of its own, Ctrl-C does what it did.
    """
    ours = threading.current_thread() is threading.main_thread()
    if not ours or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    signal.signal(signal.SIGINT, _end)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        _clock.ended = False
