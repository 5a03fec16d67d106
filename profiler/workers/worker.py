"""The worker's side: a process that is one device. It answers calls until its parent is gone.

Nothing heavy is imported before the heartbeat runs, so that the parent can tell a slow start from a frozen process.
That the heart beats does not say that anything is done: so each beat says how far the process has come, in modules that
it has imported and bytes that it has taken in, none of which grow in one that hangs or turns in a loop.
"""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import sys
import threading
import time
import traceback
from multiprocessing.connection import Connection
from typing import Any, Literal, NamedTuple

__all__ = ["BEAT_S", "Mark", "Message", "advance", "report", "resident", "root_of", "serve"]

BEAT_S = 1.0

resident: dict[str, Any] = {}
"""What calls leave in the worker for the calls that follow."""

_connection: Connection | None = None
_lock = threading.Lock()
_taken_bytes = 0
_calls = 0


class Mark(NamedTuple):
    """How far a worker has come with what it was last told."""

    modules: int
    """Imported."""
    taken_bytes: int
    """Of calls and their tensors, as they are unpacked and brought to the device."""
    read_bytes: int
    """From storage, pages of files that are mapped among them; 0 where the system does not say (it is Linux that
    does)."""


def advance(count: int) -> None:
    """Note that ``count`` bytes more are where they belong; the parent hears of it with the next heartbeat."""
    global _taken_bytes  # noqa: PLW0603  one worker, one count
    _taken_bytes += count


class _Taken(io.BytesIO):
    """A call as it is unpacked, counted."""

    def read(self, size: int | None = -1, /) -> bytes:
        data = super().read(size)
        advance(len(data))
        return data

    def readinto(self, buffer: Any, /) -> int:
        count = super().readinto(buffer)
        advance(count)
        return count

    def readline(self, size: int | None = -1, /) -> bytes:
        data = super().readline(size)
        advance(len(data))
        return data


class Message(NamedTuple):
    """What a worker sends: a heartbeat with its :class:`Mark`, progress of a call, its result, or its error (text and
    traceback); what comes after the next call was sent is late."""

    kind: Literal["beat", "progress", "result", "error", "late"]
    content: Any = None
    detail: str = ""
    call: int = 0
    """How many calls had been taken when it was sent: what a caller gave up waiting for is told by it."""


def _send(message: Message) -> None:
    assert _connection is not None  # set before anything is sent
    data = pickle.dumps(message._replace(call=_calls))
    with _lock:
        _connection.send_bytes(data)


def report(progress: Any) -> None:
    """Send progress of the running call to the parent. Outside a worker it does nothing."""
    if _connection is not None:
        _send(Message("progress", progress))


def root_of(error: BaseException) -> str:
    """The error that others were raised from, on one line: the engine wraps what a stage raises."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = " ".join(str(error).split()) or "no message"
    return text if type(error).__name__ == "ShardwrightError" else f"{type(error).__name__}: {text}"


def _mark() -> Mark:
    read_bytes = 0
    with contextlib.suppress(OSError, StopIteration, ValueError), open("/proc/self/io", encoding="ascii") as lines:
        read_bytes = int(next(line for line in lines if line.startswith("read_bytes:")).partition(":")[2])
    return Mark(len(sys.modules), _taken_bytes, read_bytes)


def _beat() -> None:
    """Say every second that the process lives; leave with the parent, whatever the main thread is doing."""
    while True:
        try:
            _send(Message("beat", _mark()))
        except OSError:
            os._exit(1)
        time.sleep(BEAT_S)


def serve(descriptor: int, cores: tuple[int, ...]) -> None:
    """Pin this process to ``cores`` and answer the calls that come over the socket ``descriptor``.

    A call is a cloudpickled (function, args, kwargs); the answer is a :class:`Message`.
    """
    global _connection, _calls  # noqa: PLW0603  one worker, one parent
    _connection = Connection(descriptor)
    if cores and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, cores)
    threading.Thread(target=_beat, daemon=True).start()
    while True:
        try:
            data = _connection.recv_bytes()
        except (EOFError, OSError):
            sys.exit(0)
        _calls += 1
        try:
            function, args, kwargs = pickle.load(_Taken(data))
            _send(Message("result", function(*args, **kwargs)))
        except Exception as error:
            _send(Message("error", root_of(error), traceback.format_exc()))
