"""The worker's side: a process that is one device. It answers calls until its parent is gone.

Nothing heavy is imported before the heartbeat runs, so that the parent can tell a slow start from a frozen process.
"""

from __future__ import annotations

import os
import pickle
import sys
import threading
import time
import traceback
from multiprocessing.connection import Connection
from typing import Any, Literal, NamedTuple

__all__ = ["BEAT_S", "Message", "report", "resident", "root_of", "serve"]

BEAT_S = 1.0

resident: dict[str, Any] = {}
"""What calls leave in the worker for the calls that follow."""

_connection: Connection | None = None
_lock = threading.Lock()


class Message(NamedTuple):
    """What a worker sends: a heartbeat, progress of a call, its result, or its error (text and traceback)."""

    kind: Literal["beat", "progress", "result", "error"]
    content: Any = None
    detail: str = ""


def _send(message: Message) -> None:
    assert _connection is not None  # set before anything is sent
    data = pickle.dumps(message)
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


def _beat() -> None:
    """Say every second that the process lives; leave with the parent, whatever the main thread is doing."""
    while True:
        try:
            _send(Message("beat"))
        except OSError:
            os._exit(1)
        time.sleep(BEAT_S)


def serve(descriptor: int, cores: tuple[int, ...]) -> None:
    """Pin this process to ``cores`` and answer the calls that come over the socket ``descriptor``.

    A call is a cloudpickled (function, args, kwargs); the answer is a :class:`Message`.
    """
    global _connection  # noqa: PLW0603  one worker, one parent
    _connection = Connection(descriptor)
    if cores and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, cores)
    threading.Thread(target=_beat, daemon=True).start()
    while True:
        try:
            data = _connection.recv_bytes()
        except (EOFError, OSError):
            sys.exit(0)
        try:
            function, args, kwargs = pickle.loads(data)
            _send(Message("result", function(*args, **kwargs)))
        except Exception as error:
            _send(Message("error", root_of(error), traceback.format_exc()))
