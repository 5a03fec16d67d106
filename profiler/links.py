"""Links: latency and bandwidth of every ordered pair of devices, and whether bytes arrive as they were sent.

Each pair is timed by itself, and again while every device sends to one and receives from another, as the stages of a
running pipeline do. What the workers do is in messages.py.
"""

from __future__ import annotations

import os
import tempfile
import time
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist

from shardwright.errors import ShardwrightError
from shardwright.profiler.measuring.engine_cost import engine_s_of, engine_steps
from shardwright.profiler.measuring.messages import (
    SIZES,
    Turns,
    check_copies,
    check_received,
    copies_for,
    copy_within,
    exchange,
    has_peer_access,
    ping_pong,
    probed_bytes,
    send_patterns,
)
from shardwright.profiler.profile import Device, Link
from shardwright.profiler.workers.pool import Pool, WorkerError

__all__ = [
    "disk_rate",
    "fetch_rates",
    "fit",
    "join",
    "leave",
    "measure_engine",
    "measure_links",
    "one_way",
    "rounds_of",
    "warn_of_corrupt",
]

LIMIT_S = 60.0

Pair = tuple[str, str]
"""Names of the source and the target."""
Samples = Mapping[int, Sequence[float]]
"""Seconds of every message, by its size in bytes."""


def fit(samples: Samples) -> tuple[float, float]:
    """Latency in s and bandwidth in bytes/s of the line through the medians of the timed messages.

    Least squares of the relative errors, so that small messages count as much as large ones; a latency below zero
    or a bandwidth without limit, which noise can give, is set to the nearest possible value.
    """
    x = np.asarray(list(samples), float)
    y = np.asarray([np.median(seconds) for seconds in samples.values()])
    design = np.stack([np.ones_like(x), x], axis=1) / y[:, None]
    latency, per_byte = np.linalg.lstsq(design, np.ones_like(y), rcond=None)[0]
    if per_byte <= 0:
        per_byte = float((y / x).min())
        latency = float((y - x * per_byte).mean())
    elif latency < 0:
        latency, per_byte = 0.0, float(np.sum(x / y) / np.sum((x / y) ** 2))  # the same fit through the origin
    return float(latency), float(1.0 / per_byte)


@dataclass
class _Found:
    """What was measured of one pair."""

    idle: dict[int, list[float]] = field(default_factory=dict)
    busy: dict[int, list[float]] = field(default_factory=dict)
    peer: bool | None = None
    wrong_bytes: int = 0


def measure_links(pool: Pool, devices: Sequence[Device]) -> tuple[Link, ...]:
    """Time messages between every ordered pair of the pool's devices, one at a time and all at once, and check them.

    Raises:
        ShardwrightError: a worker fails or does not answer; the pair is named.
    """
    found = {pair: _Found() for pair in permutations([device.name for device in devices], 2)}
    kind = {device.name: device.kind for device in devices}
    if "cpu" in kind.values() and len(kind) > 1:
        with _group(pool, list(kind)):
            _messages(pool, kind, found)
    _copies(pool, kind, found)
    links = []
    for (source, target), pair in found.items():
        latency, bandwidth = fit(pair.idle)
        busy_latency, busy_bandwidth = fit(pair.busy)
        links.append(
            Link(
                source=source,
                target=target,
                latency_s=latency,
                bandwidth_bytes_per_s=bandwidth,
                busy_latency_s=busy_latency,
                busy_bandwidth_bytes_per_s=busy_bandwidth,
                peer=pair.peer,
                probed_bytes=probed_bytes(),
                wrong_bytes=pair.wrong_bytes,
            )
        )
    return tuple(links)


def measure_engine(pool: Pool, devices: Sequence[Device], *, train: bool) -> dict[str, float]:
    """Seconds of the pipeline engine for each operation, by CPU worker; nothing where there are not two of them.

    Args:
        train: whether these are forwards and backwards, or forwards alone.

    Raises:
        ShardwrightError: a worker fails or does not answer.
    """
    workers = [device.name for device in devices if device.kind == "cpu"]
    if len(workers) < 2:
        return {}
    with _group(pool, workers):
        calls = {name: (engine_steps, (rank, len(workers), train)) for rank, name in enumerate(workers)}
        try:
            steps = pool.call(calls, limit_s=LIMIT_S)
        except WorkerError as error:
            raise ShardwrightError(
                f"the pipeline engine's own time could not be measured: {error}; try again, or leave {error.device} "
                "out with --devices"
            ) from error
        return dict.fromkeys(workers, engine_s_of(steps))


def warn_of_corrupt(links: Sequence[Link]) -> None:
    """One line about each link that changes what it carries."""
    for link in links:
        if link.corrupt:
            warnings.warn(
                f"the link {link.source} -> {link.target} changed {link.wrong_bytes} of {link.probed_bytes} bytes that "
                "were sent to test it: no plan will use it; the profile's report says what can be done",
                stacklevel=3,
            )


def rounds_of(names: Sequence[str]) -> Iterator[list[Pair]]:
    """Rounds in which each device sends to one and receives from one; together they hold every ordered pair once."""
    for shift in range(1, len(names)):
        yield [(name, names[(position + shift) % len(names)]) for position, name in enumerate(names)]


def one_way(sender: Mapping[int, Turns], receiver: Mapping[int, Turns]) -> dict[int, list[float]]:
    """Seconds from the begin of each message at its sender to its arrival at its receiver, by size."""
    return {
        size: [arrived - sent for sent, arrived in zip(sender[size].sent, receiver[size].arrived, strict=True)]
        for size in sender
    }


def _seed(pair: Pair) -> int:
    return zlib.crc32(" ".join(pair).encode())


def _messages(pool: Pool, kind: Mapping[str, str], found: Mapping[Pair, _Found]) -> None:
    """Messages of the pairs with a CPU worker in them: in turn, checked, and all at once.

    Args:
        kind: of each device.
    """
    rank = {name: i for i, name in enumerate(kind)}
    place = {name: name if its == "cuda" else "cpu" for name, its in kind.items()}  # as PyTorch there knows it
    for (a, b), pair in found.items():
        if _by_copies((a, b), kind):
            continue
        if rank[a] < rank[b]:
            calls = {a: (ping_pong, (rank[b], True, place[a])), b: (ping_pong, (rank[a], False, place[b]))}
            turns = _call(pool, (a, b), calls)
            pair.idle = one_way(turns[a], turns[b])
            found[b, a].idle = one_way(turns[b], turns[a])
        seed = _seed((a, b))
        pair.wrong_bytes = _call(
            pool,
            (a, b),
            {a: (send_patterns, (rank[b], seed, place[a])), b: (check_received, (rank[a], seed, place[b]))},
        )[b]
    for pairs in rounds_of(list(kind)):
        to = dict(pairs)
        source = {b: a for a, b in pairs}
        both = {name: (exchange, (rank[to[name]], rank[source[name]], place[name])) for name in kind}
        seconds = _call(pool, None, both)
        for pair_of_round in pairs:
            found[pair_of_round].busy = seconds[pair_of_round[1]]


def _copies(pool: Pool, kind: Mapping[str, str], found: Mapping[Pair, _Found]) -> None:
    """Copies of the pairs of GPUs, in the process of each pair's first: one at a time, checked, and all at once."""
    for pair, its in found.items():
        if _by_copies(pair, kind):
            first = pair[0]
            its.peer = _call(pool, pair, {first: (has_peer_access, pair)})[first]
            its.idle = _call(pool, pair, {first: (copy_within, pair)})[first]
            its.wrong_bytes = _call(pool, pair, {first: (check_copies, (*pair, _seed(pair)))})[first]
    for pairs in rounds_of([name for name, its in kind.items() if its == "cuda"]):
        for size in SIZES:
            answers = _call(pool, None, {pair[0]: (copies_for, (*pair, size)) for pair in pairs})
            for pair in pairs:
                found[pair].busy[size] = answers[pair[0]]


def _by_copies(pair: Pair, kind: Mapping[str, str]) -> bool:
    """Whether the two are GPUs, whose messages are copies from one to the other."""
    return all(kind[name] == "cuda" for name in pair)


def _call(pool: Pool, pair: Pair | None, calls: Mapping[str, tuple[Callable[..., Any], tuple[Any, ...]]]) -> Any:
    """The workers' answers, an error with the name of the link that it happened on."""
    try:
        return pool.call(calls, limit_s=LIMIT_S)
    except WorkerError as error:
        what = f"the link {pair[0]} -> {pair[1]}" if pair else f"the links of {error.device}, all links at once"
        raise ShardwrightError(
            f"{what} could not be measured: {error}; try again, or leave {error.device} out with --devices"
        ) from error


@contextmanager
def _group(pool: Pool, workers: Sequence[str]) -> Iterator[None]:
    """A group in which the workers talk to each other, left at the end unless something failed."""
    with tempfile.TemporaryDirectory() as folder:
        store = str(Path(folder) / "store")
        _call(pool, None, {name: (join, (i, len(workers), store)) for i, name in enumerate(workers)})
        yield
        _call(pool, None, dict.fromkeys(workers, (leave, ())))


def fetch_rates(pool: Pool, devices: Sequence[Device]) -> dict[str, float]:
    """Bytes a second from the host's memory onto each GPU."""
    calls = {d.name: (copy_within, ("cpu", d.name)) for d in devices if d.kind == "cuda"}
    timed = pool.call(calls, limit_s=LIMIT_S) if calls else {}
    return {name: fit(samples)[1] for name, samples in timed.items()}


def disk_rate(folder: Path) -> float | None:
    """Bytes a second that a file in ``folder`` is read with, when it is not in memory; None where that is not told."""
    if not hasattr(os, "posix_fadvise"):
        return None
    size = SIZES[-1]
    with tempfile.NamedTemporaryFile(dir=folder) as file:
        file.write(os.urandom(size))
        file.flush()
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, size, os.POSIX_FADV_DONTNEED)
        start = time.perf_counter()
        read = len(Path(file.name).read_bytes())
        return read / (time.perf_counter() - start)


# What runs inside the workers.


def join(rank: int, size: int, store: str, backend: str = "gloo", limit_s: float = 30.0) -> None:
    """Enter a group that meets over a file and talks over loopback; a message is waited for so long."""
    limit = timedelta(seconds=limit_s)
    dist.init_process_group(backend, init_method=f"file://{store}", rank=rank, world_size=size, timeout=limit)


def leave() -> None:
    """Leave the group."""
    dist.destroy_process_group()
