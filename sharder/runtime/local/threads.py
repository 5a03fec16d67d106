"""Threads: one for each stage of a pipeline in this process, pinned to its device, idle between calls.

Micro-batches go from thread to thread by queues. Whatever ends a pass, an error in one stage or Ctrl-C in the caller,
ends it in all stages before the caller goes on, so that no thread works for a pass that is over.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from queue import SimpleQueue
from typing import Any, NamedTuple

import torch

from shardwright.errors import ShardwrightError

__all__ = ["Seat", "StageThreads"]

Step = Callable[[int, int, Any], Any]
"""Called with the stage, the micro-batch and what the stage before has sent; returns what the next one gets."""
LOOK_AGAIN_S = 0.1
"""How long the caller waits before it looks whether it was interrupted."""
_STOP = object()


class Seat(NamedTuple):
    """Where a stage's thread works."""

    name: str
    """The plan's device."""
    device: torch.device
    cores: tuple[int, ...] = ()
    """Of a CPU worker; as many threads compute within an operator."""


class StageThreads:
    """A thread a stage. They end with :meth:`end`, or when nobody refers to this object any more."""

    def __init__(self, seats: Sequence[Seat]) -> None:
        self.process = os.getpid()
        self._ended = False
        self._all_at_once = threading.Lock()
        self._threads = [
            ThreadPoolExecutor(1, f"shardwright {seat.name}", initializer=_take, initargs=(seat,)) for seat in seats
        ]
        before = torch.get_num_threads()
        wait([thread.submit(int) for thread in self._threads])
        # PyTorch gives threads that begin later the number that was set last, by whichever thread.
        torch.set_num_threads(before)

    def run(self, step: Step, microbatches: Iterable[int], *, backward: bool = False) -> None:
        """Pass the micro-batches, in this order, through all stages, from the first to the last or ``backward``.

        Raises:
            BaseException: what ``step`` has raised, with its own traceback; all threads are idle then.
        """
        order = [*range(len(self._threads))]
        if backward:
            order.reverse()
        numbers = [*microbatches]
        queues: list[SimpleQueue[Any] | None] = [None, *(SimpleQueue[Any]() for _ in order[1:]), None]
        stop = threading.Event()

        def work(stage: int, source: SimpleQueue[Any] | None, sink: SimpleQueue[Any] | None) -> None:
            try:
                for number in numbers:
                    received = None if source is None else source.get()
                    if stop.is_set():
                        return
                    sent = step(stage, number, received)
                    if sink is not None:
                        sink.put(sent)
            except BaseException:
                stop.set()
                raise

        futures: list[Future[None]] = []
        try:
            with self._all_at_once:  # passes of several callers come in one order to all threads, or they could block
                for position, stage in enumerate(order):
                    futures.append(self._submit(stage, work, queues[position], queues[position + 1]))
            # Again and again, for a signal that comes just before a thread begins to wait does not wake it.
            while wait(futures, LOOK_AGAIN_S, FIRST_EXCEPTION).not_done and not stop.is_set():
                pass
        finally:
            stop.set()
            for queue in queues:
                if queue is not None:
                    queue.put(_STOP)
            wait(futures)
        error = next((error for future in futures if (error := future.exception()) is not None), None)
        if error is not None:
            try:
                raise error
            finally:  # its traceback holds this frame, which must not hold it
                futures.clear()
                del error

    def _submit(self, stage: int, work: Callable[..., None], *queues: Any) -> Future[None]:
        try:
            return self._threads[stage].submit(work, stage, *queues)
        except RuntimeError:
            raise ShardwrightError(
                "the model was unplaced after its forward, so the pipeline that would run its backward is gone: call "
                "backward() first, or the forward again"
            ) from None

    def are_here(self) -> bool:
        """Whether they have not ended; a forked process has no threads but its own."""
        return not self._ended and self.process == os.getpid()

    def end(self) -> None:
        """End the threads, and wait until they have ended."""
        self._ended = True
        for thread in self._threads:
            thread.shutdown(wait=os.getpid() == self.process)


def _take(seat: Seat) -> None:
    """Bring the thread that runs this to its device."""
    if seat.device.type == "cuda":
        torch.cuda.set_device(seat.device)
        return
    if seat.cores:
        torch.get_num_threads()  # has PyTorch begin in this thread, which would undo what is set before
        torch.set_num_threads(len(seat.cores))
    if seat.cores and hasattr(os, "sched_setaffinity"):
        with suppress(OSError):  # cores taken from the process since: the thread works wherever it may
            os.sched_setaffinity(0, seat.cores)  # 0 is this thread
