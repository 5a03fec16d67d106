"""Devices: what is here, what the user asked for, and which cores a CPU worker gets."""

from __future__ import annotations

import contextlib
import os
import platform
import re
from collections.abc import Sequence
from pathlib import Path

from shardwright.errors import ShardwrightError
from shardwright.profiler.profile import Device

__all__ = [
    "available_cores",
    "find_devices",
    "free_host_bytes",
    "parse_devices",
    "share_cores",
    "spare_host_bytes",
    "visible_gpus",
]

CUDA_CONTEXT_BYTES = 512 * 2**20
"""What the context of one more process takes of a GPU, kernels loaded; free memory is read where one is already."""
CUDA_RESERVE = 0.03
"""Share of the rest left to the allocator's rounding (512 B a block, 2 MiB a segment) and to libraries' workspaces."""
CPU_SHARE = 0.9
"""Share of the host's memory that the CPU workers divide among themselves."""


def find_devices(names: Sequence[str] | str | None = None, *, beside: Sequence[str] = ()) -> tuple[Device, ...]:
    """Describe the named devices; by default all CUDA devices, or two CPU workers where there is none.

    Args:
        beside: devices with which they share the cores, as they did when they were profiled; by default each other.

    Raises:
        ShardwrightError: a device does not exist, or there are fewer cores than CPU workers.
    """
    import torch

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    cores = available_cores()
    if names is None:
        names = [f"cuda:{i}" for i in range(gpus)] or [f"cpu:{i}" for i in range(min(2, len(cores)))]
    if isinstance(names, str):
        names = names.split(",")
    kinds = parse_devices(names)
    sharing = [*beside, *(name for name in names if name not in beside)]
    workers = [name for name in sharing if name.startswith("cpu")]
    if len(workers) > len(cores):
        raise ShardwrightError(
            f"{len(workers)} CPU workers need a core each; this process may use {len(cores)}: name fewer devices"
        )
    shares = share_cores(sharing, cores)
    devices = []
    for name, kind in zip(names, kinds, strict=True):
        if kind == "cuda":
            index = int(name.partition(":")[2])
            if index >= gpus:
                here = f"this {'process sees' if (seen := visible_gpus()) else 'machine has'} {gpus} CUDA devices{seen}"
                raise ShardwrightError(f"there is no {name}: {here}; without --devices what there is is used")
            free, _ = torch.cuda.mem_get_info(index)
            description = torch.cuda.get_device_name(index)
            memory = max(1, int((free - CUDA_CONTEXT_BYTES) * (1 - CUDA_RESERVE)))
            devices.append(Device(name=name, kind="cuda", description=description, memory_bytes=memory))
        else:
            mine = shares[name]
            devices.append(
                Device(
                    name=name,
                    kind="cpu",
                    description=f"{_cpu_name()}, {len(mine)} core{'s' * (len(mine) != 1)}",
                    memory_bytes=int(CPU_SHARE * _host_memory_bytes()) // len(workers),
                    cores=mine,
                )
            )
    return tuple(devices)


def share_cores(names: Sequence[str], cores: Sequence[int]) -> dict[str, tuple[int, ...]]:
    """Equal shares of the cores, by CPU worker; where there are fewer cores than workers, some have one in common.

    A core is left to each GPU as long as there is one for each worker: its host thread enqueues all the time, and a
    worker whose threads are more than its cores waits for the scheduler at the end of every operation. On a machine of
    8 cores a worker of 8 threads beside a GPU took over 100 times as long for a product of matrices.
    """
    workers = [name for name in names if name.startswith("cpu")]
    left = min(len(names) - len(workers), max(0, len(cores) - len(workers)))
    own = cores[left:]
    share = max(1, len(own) // max(1, len(workers)))
    return {
        name: tuple(sorted({own[(position * share + i) % len(own)] for i in range(share)}))
        for position, name in enumerate(workers)
    }


def parse_devices(names: Sequence[str]) -> list[str]:
    """The kind of each device name, ``"cpu"`` or ``"cuda"``.

    Raises:
        ShardwrightError: a name is not ``cpu:N`` or ``cuda:N``, or stands twice.
    """
    if not names:
        raise ShardwrightError("no device is named; leave out --devices for the default")
    kinds = []
    for position, name in enumerate(names):
        match = re.fullmatch(r"(cpu|cuda):\d+", name)
        if match is None:
            raise ShardwrightError(f"{name!r} is not a device: write cuda:0,cuda:1 or cpu:0,cpu:1 (CPU workers)")
        if name in names[:position]:
            raise ShardwrightError(f"{name} is named twice; each device once")
        kinds.append(match[1])
    return kinds


def visible_gpus() -> str:
    """`` (CUDA_VISIBLE_DEVICES=1)`` where the environment hides some of the machine's GPUs, which are counted anew."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    return "" if chosen is None else f" (CUDA_VISIBLE_DEVICES={chosen})"


def available_cores() -> list[int]:
    """The cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def spare_host_bytes(devices: Sequence[Device]) -> int:
    """Memory of the host that is no device's, where weights can stay: all of it but a share, unless workers have it."""
    taken = any(device.kind == "cpu" for device in devices)
    return 0 if taken else int(CPU_SHARE * _host_memory_bytes())


def free_host_bytes() -> int:
    """Memory of the host that programs can still have, or the control group's where that is less."""
    free = _host_memory_bytes()
    with contextlib.suppress(OSError, StopIteration, ValueError, IndexError):
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        free = min(free, 1024 * int(next(line for line in lines if line.startswith("MemAvailable:")).split()[1]))
    with contextlib.suppress(OSError, StopIteration, ValueError, IndexError):
        group = Path("/sys/fs/cgroup")
        stat = (group / "memory.stat").read_text(encoding="utf-8").splitlines()
        cached = int(next(line for line in stat if line.startswith("inactive_file ")).split()[1])
        used = int((group / "memory.current").read_text(encoding="utf-8")) - cached  # what files keep can be had
        free = min(free, max(0, _host_memory_bytes() - used))
    return free


def _host_memory_bytes() -> int:
    """Physical memory, or the control group's limit where that is lower."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text(encoding="utf-8").strip()
    except OSError:
        return memory
    return min(memory, int(limit)) if limit.isdigit() else memory
