"""What ranks tell each other over their store: that they live, that they have come so far, and why one could not.

The store outlives a rank's broken connections, and can be asked while nothing arrives over them. Every rank counts the
calls that all make together, and a failure is of one call: a later one, after the script has caught it, begins anew.
The first word of a call is that of all ranks.

A thread of each rank counts up a number in the store, over a connection of its own, and keeps the word of others, which
the store may not outlive. Such a number says that a process is there, no more: a rank is called gone only where its
number stands still *and* a message broke off, or the others wait for it to come.
"""

from __future__ import annotations

import contextlib
import threading
import time
import weakref
from collections.abc import Iterable, Sequence
from typing import Any

from shardwright.errors import ShardwrightError

__all__ = ["Board"]

LOOK_S = 0.05
"""So often a rank that waits for the others looks."""
BEAT_S = 0.5
"""So often each says that it lives."""
TOLD_S = 3.0
"""After a broken connection, time for the word why."""
GONE_S = 4.0
"""After a broken connection, a rank that has not said for so long that it lives is gone."""
KEPT_CALLS = 64
"""What ranks do is forgotten after so many calls, by when each has come to it."""
ABSENT_S = 15.0
"""One that is waited for is gone after so long: it may be in the midst of something that stops its threads."""


class Board:
    """The store of ``size`` ranks, seen by one of them.

    Args:
        store: a ``torch.distributed.Store`` of all.
        names: of the ranks, for errors.
    """

    def __init__(self, store: Any, rank: int, size: int, names: Sequence[str] = ()) -> None:
        self._store, self.rank, self.size = store, rank, size
        self._names = names or [f"rank {each}" for each in range(size)]
        # Each rank counts its pipelines on this store; they are made together.
        self.name = f"shardwright/{store.add(f'shardwright/made by {rank}', 1)}"
        self._call = self._meeting = 0
        self._seen: dict[int, tuple[int, float]] = {}
        self._pulse = _Pulse(self._lives(rank), self._failed)
        # At the latest when Python ends: a thread must not come out of the store when there is none any more.
        self.close = weakref.finalize(self, self._pulse.stop)
        if size > 1:
            self._pulse.start(store)

    def begin(self) -> None:
        """Begin the next call that all ranks make."""
        self._call += 1
        self._pulse.listen(self._failed)

    def same(self, what: str) -> str:
        """What the first rank to come here said it does in this call, which is ``what`` if it is this one.

        One question to the store, and no waiting for the others.
        """
        if self.size == 1:
            return what
        first = self._store.compare_set(self._doing(self._call), "", what).decode()
        if not self.rank and self._call > KEPT_CALLS:
            with contextlib.suppress(RuntimeError):  # not every store of a script's can forget
                self._store.delete_key(self._doing(self._call - KEPT_CALLS))
        return str(first)

    def fail(self, text: str) -> str:
        """Tell the others that this call failed here, and stay until those who wait have seen it.

        Returns:
            The first word of any rank about this call, which is the one that all are to say.
        """
        with contextlib.suppress(Exception):  # the store's host may be gone, which takes nothing from the error
            text = self._store.compare_set(self._failed, "", text).decode()
            if self.size > 1:
                time.sleep(2 * BEAT_S)  # a process that ended now would take its store along
        return text

    def failure(self) -> str:
        """What another rank has said of this call, or says soon; empty without a word."""
        end = time.monotonic() + TOLD_S
        while not (text := self._heard()) and time.monotonic() < end:
            time.sleep(LOOK_S)
        return text

    def gone(self) -> list[str]:
        """The names of the ranks that show no more life; takes :data:`GONE_S` seconds if they all do.

        The store's own host, that of rank 0, is gone if the store is.
        """
        others = {rank for rank in range(self.size) if rank != self.rank}
        end = time.monotonic() + GONE_S + 2 * BEAT_S
        try:
            while time.monotonic() < end:
                if len(self._still(others, GONE_S)) == len(others):
                    break
                time.sleep(BEAT_S)
            return [self._names[rank] for rank in sorted(self._still(others, GONE_S))]
        except Exception:
            return [self._names[0]] if self.rank else []

    def assemble(self, limit_s: float) -> None:
        """Wait until every rank has come to this point of this call.

        Raises:
            ShardwrightError: another has failed before it, has ended, or has not come within ``limit_s`` seconds.
        """
        self._meeting += 1
        keys = [f"{self.name}/meeting {self._meeting}/{rank}" for rank in range(self.size)]
        self._store.set(keys[self.rank], "here")
        start = time.monotonic()
        while not self._store.check(keys):
            if text := self._heard():
                raise ShardwrightError(text)
            absent = {rank for rank, key in enumerate(keys) if not self._store.check([key])}
            if dead := [self._names[rank] for rank in sorted(self._still(absent, ABSENT_S))]:
                raise ShardwrightError(
                    self.fail(f"{_listed(dead)} left before all had met: it has ended, or is frozen")
                )
            if time.monotonic() - start > limit_s:
                who = _listed([self._names[rank] for rank in sorted(absent)])
                late = f"{who} of the pipeline did not come within {limit_s:.0f} s; is its process still there, and "
                raise ShardwrightError(self.fail(f"{late}does it make the same pipeline?"))
            time.sleep(LOOK_S)

    @property
    def _failed(self) -> str:
        return f"{self.name}/call {self._call}/failed"

    def _doing(self, call: int) -> str:
        return f"{self.name}/call {call}/does"

    def _lives(self, rank: int) -> str:
        return f"{self.name}/lives/{rank}"

    def _heard(self) -> str:
        """What is said of this call."""
        with contextlib.suppress(Exception):
            if self._store.check([self._failed]):
                return str(self._store.get(self._failed).decode())
        return self._pulse.word

    def _still(self, ranks: Iterable[int], seconds: float) -> set[int]:
        """Those of ``ranks`` that have begun to live and whose number has not changed for so long, as seen here."""
        now, found = time.monotonic(), set()
        for rank in ranks:
            number = self._store.add(self._lives(rank), 0)
            before, since = self._seen.get(rank, (None, now))
            if number != before:
                self._seen[rank] = number, now
            elif number and now - since > seconds:
                found.add(rank)
        return found


class _Pulse:
    """The thread that says that a rank lives and hears what is said of its call; it keeps nobody's board alive."""

    def __init__(self, lives: str, failed: str) -> None:
        self._lives, self._failed = lives, failed
        self.word = ""
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self, store: Any) -> None:
        """Begin, over a connection of its own."""
        store.add(self._lives, 1)
        self._thread = threading.Thread(target=self._run, args=(store.clone(),), daemon=True)
        self._thread.start()

    def listen(self, failed: str) -> None:
        """Hear from now on what is said under the key ``failed``."""
        self._failed, self.word = failed, ""

    def stop(self) -> None:
        """End; what was heard stays."""
        self._stopped.set()
        if self._thread is not None:
            self._thread.join(2 * BEAT_S)

    def _run(self, store: Any) -> None:
        with contextlib.suppress(Exception):  # the store is gone
            while not self._stopped.wait(BEAT_S):
                store.add(self._lives, 1)
                failed = self._failed
                if store.check([failed]):
                    word = store.get(failed).decode()
                    if failed == self._failed:
                        self.word = word


def _listed(names: Sequence[str]) -> str:
    return " and ".join(names)
