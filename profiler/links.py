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
from shardwright.profiler.engine_cost import engine_s_of, engine_steps
from shardwright.profiler.messages import (
    SIZES,
    Turns,
    check_copies,
    check_received,
    copies_at_once,
    copy_within,
    exchange,
    has_peer_access,
    ping_pong,
    probed_bytes,
    send_patterns,
)
from shardwright.profiler.pool import Pool, WorkerError
from shardwright.profiler.profile import Device, Link
from shardwright.profiler.worker import resident

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
    workers = [device.name for device in devices if device.kind == "cpu"]
    if len(workers) > 1:
        with _group(pool, workers):
            _messages(pool, workers, found)
    _copies(pool, devices, found)
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


def measure_engine(pool: Pool, devices: Sequence[Device]) -> dict[str, float]:
    """Seconds of the pipeline engine for each operation, by CPU worker; nothing where there are not two of them.

    Raises:
        ShardwrightError: a worker fails or does not answer.
    """
    workers = [device.name for device in devices if device.kind == "cpu"]
    if len(workers) < 2:
        return {}
    with _group(pool, workers):
        calls = {name: (engine_steps, (rank, len(workers))) for rank, name in enumerate(workers)}
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


def _messages(pool: Pool, workers: Sequence[str], found: Mapping[Pair, _Found]) -> None:
    """Messages between CPU workers: in turn, checked, and all at once."""
    rank = {name: i for i, name in enumerate(workers)}
    for (a, b), pair in found.items():
        if a not in rank or b not in rank:
            continue
        if rank[a] < rank[b]:
            turns = _call(pool, (a, b), {a: (ping_pong, (rank[b], True)), b: (ping_pong, (rank[a], False))})
            pair.idle = one_way(turns[a], turns[b])
            found[b, a].idle = one_way(turns[b], turns[a])
        seed = _seed((a, b))
        pair.wrong_bytes = _call(
            pool, (a, b), {a: (send_patterns, (rank[b], seed)), b: (check_received, (rank[a], seed))}
        )[b]
    for pairs in rounds_of(workers):
        to = dict(pairs)
        source = {b: a for a, b in pairs}
        calls = {name: (exchange, (rank[to[name]], rank[source[name]])) for name in workers}
        seconds = _call(pool, None, calls)
        for a, b in pairs:
            found[a, b].busy = seconds[b]


def _copies(pool: Pool, devices: Sequence[Device], found: Mapping[Pair, _Found]) -> None:
    """Copies of the pairs with a GPU in them, in that GPU's process: one at a time, checked, and all at once."""
    kind = {device.name: device.kind for device in devices}

    def ends(pair: Pair) -> Pair:
        """The names by which PyTorch in the GPU's process knows the two."""
        a, b = (name if kind[name] == "cuda" else "cpu" for name in pair)
        return a, b

    for pair, its in found.items():
        runner = _runner(pair, kind)
        if runner is not None:
            its.peer = _call(pool, pair, {runner: (has_peer_access, ends(pair))})[runner]
            its.idle = _call(pool, pair, {runner: (copy_within, ends(pair))})[runner]
            its.wrong_bytes = _call(pool, pair, {runner: (check_copies, (*ends(pair), _seed(pair)))})[runner]
    for pairs in rounds_of(list(kind)):
        of_runner: dict[str, list[Pair]] = {}
        for pair in pairs:
            runner = _runner(pair, kind)
            if runner is not None:
                of_runner.setdefault(runner, []).append(pair)
        for size in SIZES if of_runner else ():
            calls = {runner: (copies_at_once, ([ends(p) for p in its], size)) for runner, its in of_runner.items()}
            answers = _call(pool, None, calls)
            for runner, its_pairs in of_runner.items():
                for pair, seconds in zip(its_pairs, answers[runner], strict=True):
                    found[pair].busy[size] = seconds


def _runner(pair: Pair, kind: Mapping[str, str]) -> str | None:
    """The device whose process copies over ``pair``: the first GPU of the two."""
    return next((name for name in pair if kind[name] == "cuda"), None)


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


def join(rank: int, size: int, store: str) -> None:
    """Enter a group that meets over a file and talks over loopback: gloo for CPU tensors, NCCL for GPUs'."""
    backend = "cpu:gloo,cuda:nccl" if resident["device"].type == "cuda" else "gloo"
    dist.init_process_group(
        backend, init_method=f"file://{store}", rank=rank, world_size=size, timeout=timedelta(seconds=30)
    )


def leave() -> None:
    """Leave the group."""
    dist.destroy_process_group()
