"""The time that planning has, which Ctrl-C ends: whatever looks at the clock from then on has none left."""

from __future__ import annotations

import contextlib
import math
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType

__all__ = ["MOST_S", "Budget", "clock_s", "ended_by_interrupt", "pass_second"]

MOST_S = 1e8
"""No deadline is farther: three years."""
LATER_S = 1e9
"""What Ctrl-C puts the clock on by, for good: put back, it would leave deadlines that were set meanwhile far ahead."""


class _Clock:
    ended = False
    """Whether the user wants what there is of the plan that is looked for."""
    later_s = 0.0
    """What the clock was put on by so far."""


_clock = _Clock()


def clock_s() -> float:
    """Seconds, as ``time.monotonic()`` has them; after Ctrl-C every deadline that was set before it has passed."""
    return time.monotonic() + _clock.later_s


def _end(_: int, frame: FrameType | None) -> None:
    if _clock.ended:  # the second time: the user does not want that either
        signal.default_int_handler(signal.SIGINT, frame)
    _clock.ended = True
    _clock.later_s += LATER_S


def pass_second() -> None:
    """Where a ``KeyboardInterrupt`` is taken for the end of the time: raise it, if it is not the first."""
    if _clock.ended:
        raise  # noqa: PLE0704  called where one is handled


@contextlib.contextmanager
def ended_by_interrupt() -> Iterator[None]:
    """Have the first Ctrl-C end the time that is left, and only the next one raise ``KeyboardInterrupt``.

    In threads, and where a program has a handler of its own, Ctrl-C does what it did. It ends the time of plans that
    other threads look for meanwhile, too.
    """
    ours = threading.current_thread() is threading.main_thread()
    if not ours or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    _clock.ended = False
    signal.signal(signal.SIGINT, _end)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        _clock.ended = False


class Budget:
    """The time that is left; once the user interrupts, none."""

    def __init__(self, seconds: float) -> None:
        self._deadline_s = clock_s() + seconds
        self.stopped = False
        """Whether the user interrupted."""

    @property
    def left_s(self) -> float:
        """Seconds."""
        return max(0.0, self._deadline_s - clock_s())

    def spent(self) -> bool:
        """Whether to stop."""
        return self.left_s <= 0

    def stop(self) -> None:
        """Leave no time, since the user wants what there is."""
        self._deadline_s, self.stopped = -math.inf, True

    @contextlib.contextmanager
    def part(self, parts: float) -> Iterator[Budget]:
        """A budget of one of so many parts of what is left; an interrupt of it is one of this as well."""
        part = Budget(self.left_s / parts)
        try:
            yield part
        except KeyboardInterrupt:
            pass_second()
            self.stop()
        if part.stopped:
            self.stop()
