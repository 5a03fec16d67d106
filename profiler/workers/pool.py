"""The parent's side: one worker process a device, always reaped, and a clear error when one dies or hangs."""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from multiprocessing.connection import Connection, wait
from types import TracebackType
from typing import IO, Any, Self

from shardwright.errors import ShardwrightError
from shardwright.profiler.profile import Device
from shardwright.profiler.workers.sending import dumps
from shardwright.profiler.workers.worker import BEAT_S, Mark, Message

__all__ = ["Pool", "Worker", "WorkerError", "loopback_interface"]

SILENCE_S = 15 * BEAT_S
"""A worker that has not sent a heartbeat for so long is frozen."""
KEEP_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 40), "MALLOC_TOP_PAD_": str(1 << 26)}
"""The C library keeps what is freed instead of returning it to the system, as GPU allocators do (glibc, mallopt(3)).

Otherwise a step that allocates activations anew every time spends up to a tenth of itself on page faults, a unit that
is timed alone does not, and their sum falls short of the step.
"""
IN_WORKER = "SHARDWRIGHT_WORKER"
"""Set in the environment of workers, which start none of their own."""
SETTLE_S = 2.0
"""After a first error, time for the others' errors: a worker that died explains its neighbours' broken connections."""


class WorkerError(ShardwrightError):
    """A worker raised, died or hung; ``device`` says which, ``detail`` holds its traceback."""

    def __init__(self, device: str, text: str, *, detail: str = "", died: bool = False) -> None:
        super().__init__(f"worker {device} {text}")
        self.device = device
        self.detail = detail
        self.died = died


def loopback_interface() -> str:
    """Name of the loopback network interface (``lo``, or ``lo0`` on macOS and BSD)."""
    return next((name for _, name in socket.if_nameindex() if name.startswith("lo")), "lo")


def launch(program: str, descriptor: int, log: IO[bytes], environment: dict[str, str]) -> subprocess.Popen[bytes]:
    """Start Python on ``program``, with the socket ``descriptor``; what it prints goes to ``log``."""
    return subprocess.Popen(
        [sys.executable, "-P", "-c", program],
        pass_fds=[descriptor],
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log,
        env=environment,
        start_new_session=True,  # Ctrl-C is the parent's to handle
    )


class Worker:
    """A process pinned to a device, which runs the functions that it is sent, one after another."""

    def __init__(self, device: Device) -> None:
        self.device = device
        ours, theirs = socket.socketpair()
        threads = str(max(1, len(device.cores)))
        self.log = tempfile.TemporaryFile()  # noqa: SIM115  closed with the worker
        # The user's folders come last in the worker: a profile.py there must not stand before the standard library's.
        program = (
            f"import sys; sys.path.extend(p for p in {sys.path!r} if p not in sys.path); "
            f"from shardwright.profiler.workers.worker import serve; serve({theirs.fileno()}, {device.cores!r})"
        )
        environment = os.environ | {"GLOO_SOCKET_IFNAME": loopback_interface(), "PYTHONUNBUFFERED": "1", IN_WORKER: "1"}
        if device.kind == "cpu":
            environment |= {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "CUDA_VISIBLE_DEVICES": ""}
            environment |= KEEP_MEMORY
        with theirs:
            self.process = launch(program, theirs.fileno(), self.log, environment)
        # A frozen worker does not empty its socket; without a limit a large message would block us with it.
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", int(SILENCE_S), 0))
        self.connection = Connection(ours.detach())
        self.last_beat = time.monotonic()
        self.calls = 0
        """Submitted so far."""
        self.mark: Mark | None = None
        """How far it has come, as of its last heartbeat."""

    def submit(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        """Start ``function(*args, **kwargs)`` in the worker."""
        try:
            data = dumps((function, args, kwargs))
        except Exception as error:
            why = " ".join(str(error).split())
            raise ShardwrightError(
                f"a unit or input cannot be sent to its worker: {type(error).__name__}: {why}; "
                "remove hooks or attributes that hold locks, files or generators"
            ) from error
        try:
            self.connection.send_bytes(data)
        except OSError:
            raise self.post_mortem() from None
        self.calls += 1

    def receive(self) -> Message:
        """The next message, "late" where it is of a call before the last; the connection must be readable."""
        try:
            message = Message(*pickle.loads(self.connection.recv_bytes()))
        except (EOFError, OSError):
            raise self.post_mortem() from None
        self.last_beat = time.monotonic()
        if message.kind != "beat" and message.call != self.calls:
            return Message("late")
        if message.kind == "error":
            raise WorkerError(self.device.name, f"failed: {message.content}", detail=message.detail)
        return message

    def check_alive(self) -> None:
        """Raise when no heartbeat has come for too long."""
        silent = time.monotonic() - self.last_beat
        if silent > SILENCE_S:
            raise WorkerError(
                self.device.name, f"is frozen: no sign of life for {silent:.0f} s; it was ended", died=True
            )

    def post_mortem(self) -> WorkerError:
        """Why the process is gone."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout=5)
        code = self.process.returncode
        self.log.seek(0)
        tail = self.log.read().decode(errors="replace").strip()
        last = tail.splitlines()[-1] if tail else ""
        if code is None:
            text = "is frozen: it took nothing from its parent; it was ended"
        elif code < 0:
            name = signal.Signals(-code).name
            memory = "; the system may have run out of memory" if name == "SIGKILL" else ""
            text = f"was killed by {name}{memory}"
        else:
            text = f"ended with exit code {code}"
        return WorkerError(self.device.name, f"{text}{': ' + last if last else ''}", detail=tail, died=True)

    def close(self) -> None:
        """End the process and wait for it; safe to call twice."""
        self.connection.close()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.log.close()


class Pool:
    """The workers of several devices; a context manager that leaves no process behind."""

    def __init__(self, devices: Iterable[Device]) -> None:
        self.workers: dict[str, Worker] = {}
        self.devices = tuple(devices)
        if IN_WORKER in os.environ:
            raise ShardwrightError(
                "a worker imported a file that profiles or runs a model at its top level; put that code under "
                'if __name__ == "__main__":'
            )
        try:
            for device in self.devices:
                self.workers[device.name] = Worker(device)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End all workers."""
        for worker in self.workers.values():
            worker.close()

    def call(
        self,
        calls: Mapping[str, tuple[Callable[..., Any], tuple[Any, ...]]],
        *,
        limit_s: float,
        on_progress: Callable[[str, Any], None] | None = None,
        loading: bool = False,
    ) -> dict[str, Any]:
        """Run one function in each named worker at once and wait for all results.

        Args:
            calls: device -> (function, args).
            limit_s: seconds without an answer or progress from any worker after which those awaited count as hung.
            on_progress: called with the device and what the worker reported.
            loading: whether it is progress too that a worker imports modules or takes in bytes.

        Raises:
            WorkerError: a worker raised, died or hung; a death is named before the errors that follow from it.
        """
        for device, (function, args) in calls.items():
            self.workers[device].submit(function, *args)
        return self.results(calls, limit_s=limit_s, on_progress=on_progress, loading=loading)

    def results(
        self,
        devices: Iterable[str],
        *,
        limit_s: float,
        on_progress: Callable[[str, Any], None] | None = None,
        loading: bool = False,
    ) -> dict[str, Any]:
        """Wait for the results of what was submitted to each of ``devices``; see :meth:`call`."""
        devices = list(devices)
        pending = set(devices)
        results: dict[str, Any] = {}
        errors: list[WorkerError] = []
        deadline = time.monotonic() + limit_s
        while pending:
            by_connection = {self.workers[device].connection: device for device in pending}
            for connection in wait(list(by_connection), timeout=BEAT_S):
                device = by_connection[connection]  # type: ignore[index]  # only connections were passed
                try:
                    message = self.workers[device].receive()
                except WorkerError as error:
                    errors.append(error)
                    pending.discard(device)
                    deadline = min(deadline, time.monotonic() + SETTLE_S)
                    continue
                if message.kind == "result":
                    results[device] = message.content
                    pending.discard(device)
                elif message.kind == "progress":
                    if not errors:
                        deadline = time.monotonic() + limit_s
                    if on_progress is not None:
                        on_progress(device, message.content)
                elif message.kind == "beat":
                    if loading and not errors and message.content != self.workers[device].mark:
                        deadline = time.monotonic() + limit_s
                    self.workers[device].mark = message.content
            if errors and time.monotonic() > deadline:
                break
            if not errors:
                self._check(pending, deadline, limit_s)
        if errors:
            raise next((error for error in errors if error.died), errors[0])
        return {device: results[device] for device in devices}

    def _check(self, pending: set[str], deadline: float, limit_s: float) -> None:
        for device in sorted(pending):
            self.workers[device].check_alive()
        if pending and time.monotonic() > deadline:
            first, *others = sorted(pending)
            nor = f", nor did {' and '.join(others)}, which may have waited for it or it for them" if others else ""
            raise WorkerError(
                first,
                f"did not answer within {limit_s:.0f} s and was ended{nor}; is a device busy, or the model stuck?",
            )
