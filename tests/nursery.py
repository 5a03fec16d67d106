"""Workers by fork: a process that has imported PyTorch and the engine, and copies itself for each worker of a test.

A worker of its own spends six seconds of a processor on imports, and hundreds are started. A copy is a process as well,
with a group, an environment, files and cores of its own, which is started, killed and waited for in the same ways.
Linux only, for a copy is made the child of the tests' process, which reaps it (prctl(2), PR_SET_CHILD_SUBREAPER).
"""

from __future__ import annotations

import ctypes
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from typing import IO, Any

from shardwright.profiler.workers.pool import KEEP_MEMORY

PR_SET_CHILD_SUBREAPER = 36
LONGEST = 1 << 17
"""Bytes of a request."""
PRELOADED = (
    "cloudpickle",
    "hypothesis",
    "pytest",
    "torch",
    "shardwright.profiler.links",
    "shardwright.profiler.measure",
    "shardwright.profiler.measuring.messages",
    "shardwright.sharder.runtime.pipeline",
    "torch.distributed.checkpoint.state_dict",
    "torch.distributed.pipelining",
)
"""Modules of workers, and of the tests whose functions they are sent."""


class Nursery:
    """Starts workers as ``pool.launch`` does, by fork; those of GPUs by ``otherwise``."""

    def __init__(self, otherwise: Callable[..., subprocess.Popen[bytes]]) -> None:
        self.otherwise = otherwise
        self._ours: socket.socket | None = None
        self._process: subprocess.Popen[bytes] | None = None

    def __call__(
        self, program: str, descriptor: int, log: IO[bytes], environment: dict[str, str]
    ) -> Forked | subprocess.Popen[bytes]:
        """A process that runs ``program``, in a session of its own and with ``environment``."""
        if environment.get("CUDA_VISIBLE_DEVICES") != "":
            return self.otherwise(program, descriptor, log, environment)
        if self._ours is None:
            self._ours = self._begin()
        request = {
            "program": program,
            "descriptor": descriptor,
            "environment": environment,
            "folder": os.getcwd(),
            "cores": sorted(os.sched_getaffinity(0)),
        }
        adopt = ctypes.CDLL(None).prctl
        adopt(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        try:
            socket.send_fds(self._ours, [json.dumps(request).encode()], [descriptor, log.fileno()])
            said = [self._ours.recv(64) for _ in range(2)]  # by the copy, and when it is our child
        finally:
            adopt(PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)
        if not all(said):
            raise RuntimeError("the process that workers are copied from has ended; its last words are above")
        return Forked(max(map(int, said)), program)

    def _begin(self) -> socket.socket:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        environment = os.environ | KEEP_MEMORY | {"PYTHONUNBUFFERED": "1", "CUDA_VISIBLE_DEVICES": ""}
        environment |= dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
        program = (
            f"import sys; sys.path.extend(p for p in {sys.path!r} if p not in sys.path); "
            f"import nursery; exec(nursery.next_program({theirs.fileno()}))"
        )
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-c", program],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                env=environment,
            )
        ours.settimeout(120)
        return ours

    def close(self) -> None:
        """End the process that copies itself."""
        if self._ours is not None:
            self._ours.close()
        if self._process is not None:
            self._process.wait()


class Forked:
    """What a pool does with a process that it has started, as ``subprocess.Popen`` does it."""

    def __init__(self, pid: int, program: str) -> None:
        self.pid, self.program = pid, program
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """The exit code, or minus the signal; None while it runs."""
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """The same once it has ended."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while self.poll() is None:
            if deadline is not None and time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(self.program, timeout or 0.0)
            time.sleep(0.002)
        assert self.returncode is not None
        return self.returncode


def next_program(descriptor: int) -> str:
    """Import much, then copy this process for each request; returns in the copies only, with what each is to run."""
    import gc
    from importlib import import_module

    for name in PRELOADED:
        import_module(name)
    assert len(os.listdir("/proc/self/task")) == 1, "a process of several threads cannot be copied"
    gc.freeze()  # a collection in a copy would write to all pages, and so copy them
    with socket.socket(fileno=descriptor) as requests:
        while True:
            data, descriptors, _, _ = socket.recv_fds(requests, LONGEST, 2)
            if not data:
                os._exit(0)
            between = os.fork()
            if not between:
                if os.fork():
                    os._exit(0)
                break
            os.waitpid(between, 0)  # from now on the copy is the tests' child
            for each in descriptors:
                os.close(each)
            requests.send(b"0")
        os.setsid()
        requests.send(str(os.getpid()).encode())
    return _take_place(json.loads(data), *descriptors)


def _take_place(request: dict[str, Any], connection: int, log: int) -> str:
    """Make this copy what a new process would be; returns its program."""
    for each, place in ((log, 1), (log, 2), (connection, request["descriptor"])):
        if each != place:
            os.dup2(each, place)
    for each in {connection, log} - {request["descriptor"]}:
        os.close(each)
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    os.sched_setaffinity(0, request["cores"])
    sys.modules.pop("nursery")
    program: str = request["program"]
    return program
