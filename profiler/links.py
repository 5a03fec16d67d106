"""Links: latency and bandwidth of every ordered pair of devices, fitted to timed messages.

Two CPU workers talk as the pipeline engine lets them: through gloo on the loopback interface. A pair with a GPU in it
is timed as a copy within one process.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Sequence
from datetime import timedelta
from functools import partial
from itertools import permutations
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from shardwright.profiler.measure import cuda_timer
from shardwright.profiler.pool import Pool
from shardwright.profiler.profile import Device, Link
from shardwright.profiler.worker import resident

__all__ = ["SIZES", "disk_rate", "fetch_rates", "fit", "measure_links"]

SIZES = (1 << 12, 1 << 16, 1 << 18, 1 << 20, 1 << 22)
"""Bytes of the messages: from a token's activations to a batch of feature maps."""
REPEATS = 12
LIMIT_S = 60.0


def fit(sizes: Sequence[int], seconds: Sequence[float]) -> tuple[float, float]:
    """Latency in s and bandwidth in bytes/s of the line through the timed messages.

    Least squares of the relative errors, so that small messages count as much as large ones; a latency below zero
    or a bandwidth without limit, which noise can give, is set to the nearest possible value.
    """
    x, y = np.asarray(sizes, float), np.asarray(seconds, float)
    design = np.stack([np.ones_like(x), x], axis=1) / y[:, None]
    latency, per_byte = np.linalg.lstsq(design, np.ones_like(y), rcond=None)[0]
    if per_byte <= 0:
        per_byte = float((y / x).min())
        latency = float((y - x * per_byte).mean())
    elif latency < 0:
        latency, per_byte = 0.0, float(np.sum(x / y) / np.sum((x / y) ** 2))  # the same fit through the origin
    return float(latency), float(1.0 / per_byte)


def measure_links(pool: Pool, devices: Sequence[Device]) -> tuple[Link, ...]:
    """Time messages between every ordered pair of the pool's devices."""
    timed: dict[tuple[str, str], list[float]] = {}
    workers = [device.name for device in devices if device.kind == "cpu"]
    if len(workers) > 1:
        with tempfile.TemporaryDirectory() as folder:
            store = str(Path(folder) / "store")
            pool.call({name: (join, (i, len(workers), store)) for i, name in enumerate(workers)}, limit_s=LIMIT_S)
            for a, b in permutations(range(len(workers)), 2):
                answers = pool.call({workers[a]: (lead, (b,)), workers[b]: (follow, (a,))}, limit_s=LIMIT_S)
                timed[workers[a], workers[b]] = answers[workers[a]]
            pool.call(dict.fromkeys(workers, (leave, ())), limit_s=LIMIT_S)
    for source, target in permutations(devices, 2):
        if "cuda" in (source.kind, target.kind):
            runner = source if source.kind == "cuda" else target
            names = [d.name if d.kind == "cuda" else "cpu" for d in (source, target)]
            timed[source.name, target.name] = pool.call({runner.name: (copy_within, tuple(names))}, limit_s=LIMIT_S)[
                runner.name
            ]
    links = []
    for (a_name, b_name), seconds in timed.items():
        latency, bandwidth = fit(SIZES, seconds)
        links.append(Link(source=a_name, target=b_name, latency_s=latency, bandwidth_bytes_per_s=bandwidth))
    return tuple(links)


def fetch_rates(pool: Pool, devices: Sequence[Device]) -> dict[str, float]:
    """Bytes a second from the host's memory onto each GPU."""
    calls = {d.name: (copy_within, ("cpu", d.name)) for d in devices if d.kind == "cuda"}
    timed = pool.call(calls, limit_s=LIMIT_S) if calls else {}
    return {name: fit(SIZES, seconds)[1] for name, seconds in timed.items()}


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


def lead(peer: int) -> list[float]:
    """Send each size to ``peer`` and back; half the round trip's median seconds."""
    return [_ping_pong(size, peer, first=True) for size in SIZES]


def follow(peer: int) -> None:
    """Answer :func:`lead`."""
    for size in SIZES:
        _ping_pong(size, peer, first=False)


def _ping_pong(size: int, peer: int, *, first: bool) -> float:
    buffer = torch.zeros(size, dtype=torch.uint8)
    seconds = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        for turn in (first, not first):
            operation = dist.P2POp(dist.isend if turn else dist.irecv, buffer, peer)
            for work in dist.batch_isend_irecv([operation]):
                work.wait()
        seconds.append((time.perf_counter() - start) / 2)
    return float(np.median(seconds[2:]))


def copy_within(source: str, target: str) -> list[float]:
    """Copy each size from ``source`` to ``target`` in this process; median seconds."""
    timer = cuda_timer(torch.device(source if source.startswith("cuda") else target))
    medians = []
    for size in SIZES:
        buffer = torch.zeros(size, dtype=torch.uint8, device=source)
        seconds = [timer(partial(buffer.to, target))[1] for _ in range(REPEATS)]
        medians.append(float(np.median(seconds[2:])))
    return medians
