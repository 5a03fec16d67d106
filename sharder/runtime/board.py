"""What ranks tell each other over their store: that they have come so far, and why one could not.

The store outlives a rank's broken connections, and can be asked while nothing arrives over them. Every rank counts the
calls that all make together, and a failure is of one call: a later one, after the script has caught it, begins anew.
"""

from __future__ import annotations

import contextlib
import time
from typing import Any

from shardwright.errors import ShardwrightError

__all__ = ["Board"]

LOOK_S = 0.05
"""So often a rank that waits for the others looks."""
TOLD_S = 3.0
"""After a broken connection, time for the word why."""


class Board:
    """The store of ``size`` ranks, seen by one of them.

    Args:
        store: a ``torch.distributed.Store`` of all.
    """

    def __init__(self, store: Any, rank: int, size: int) -> None:
        self._store, self.rank, self.size = store, rank, size
        # Each rank counts its pipelines on this store; they are made together.
        self.name = f"shardwright/{store.add(f'shardwright/made by {rank}', 1)}"
        self._call = self._meeting = 0

    def begin(self) -> None:
        """Begin the next call that all ranks make."""
        self._call += 1

    def fail(self, text: str) -> None:
        """Tell the others that this call failed here, and stay until those who wait have seen it."""
        with contextlib.suppress(Exception):  # the store's host may be gone, which takes nothing from the error
            self._store.set(self._failed, text)
            time.sleep(3 * LOOK_S)  # a process that ended now would take its store along

    def failure(self) -> str:
        """What another rank has said of this call, or says soon; empty without a word."""
        end = time.monotonic() + TOLD_S
        with contextlib.suppress(Exception):
            while time.monotonic() < end:
                if text := self._said():
                    return text
                time.sleep(LOOK_S)
        return ""

    def assemble(self, limit_s: float) -> None:
        """Wait until every rank has come to this point of this call.

        Raises:
            ShardwrightError: another has failed before it, or has not come within ``limit_s`` seconds.
        """
        self._meeting += 1
        keys = [f"{self.name}/meeting {self._meeting}/{rank}" for rank in range(self.size)]
        self._store.set(keys[self.rank], "here")
        end = time.monotonic() + limit_s
        while not self._store.check(keys):
            if text := self._said():
                raise ShardwrightError(text)
            if time.monotonic() > end:
                absent = [str(rank) for rank, key in enumerate(keys) if not self._store.check([key])]
                raise ShardwrightError(
                    f"rank {' and '.join(absent)} of the pipeline did not come within {limit_s:.0f} s; is its process "
                    "still there, and does it make the same pipeline?"
                )
            time.sleep(LOOK_S)

    @property
    def _failed(self) -> str:
        return f"{self.name}/call {self._call}/failed"

    def _said(self) -> str:
        return str(self._store.get(self._failed).decode()) if self._store.check([self._failed]) else ""
