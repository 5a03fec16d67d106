"""Messages between workers and copies within one: what is timed, and what is checked byte by byte, on every link.

All of it runs inside the workers. CPU workers talk through gloo, as the pipeline engine lets them, and so do a CPU
worker and a GPU, which copies what it sends to the host's memory and what it receives from there. A pair of GPUs is a
copy within one's process: straight from GPU to GPU where they have peer access, and staged in the host's memory where
they have not.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from shardwright.profiler.measuring.stopwatch import Timer, cuda_timer, host_timer

__all__ = [
    "CASES",
    "REPEATS",
    "SIZES",
    "Turns",
    "check_copies",
    "check_received",
    "copies_for",
    "copy_within",
    "exchange",
    "has_peer_access",
    "pattern",
    "ping_pong",
    "probed_bytes",
    "send_patterns",
]

SIZES = (1 << 12, 1 << 16, 1 << 18, 1 << 20, 1 << 22, 1 << 24)
"""Bytes of the messages: from a token's activations to a batch of feature maps."""
REPEATS = 10
WARMUP = 2
WINDOW_S = 0.05
"""Copies of several processes go on for so long at each size, or their first and last would run undisturbed."""
MEMORY_BYTES = 1 << 26
"""What the messages of an exchange take up at each end, about: more than the caches hold."""
CASES = ((1, 0), (13, 3), (4095, 1), (65_537, 5), (1 << 20, 0), ((1 << 20) + 1, 7), (1 << 22, 4096))
"""Size and offset in bytes of the messages that are checked: aligned and odd, smaller and larger than a page."""

Clock = Callable[[], float]


@dataclass
class Turns:
    """One end of a ping-pong: when each message was begun here, and when each had arrived here, on the host's clock."""

    sent: list[float] = field(default_factory=list)
    arrived: list[float] = field(default_factory=list)


def _wait(operations: Sequence[dist.P2POp]) -> None:
    for work in dist.batch_isend_irecv(list(operations)):
        work.wait()


class _Room:
    """Memory of ``device`` for one message, and that of the host which it is sent from and received in."""

    def __init__(self, size: int, device: str) -> None:
        self.own = torch.zeros(size, dtype=torch.uint8, device=device)
        self.host = self.own if device == "cpu" else torch.zeros(size, dtype=torch.uint8)

    def leaving(self) -> Tensor:
        """The message in the host's memory, to be sent."""
        return self.own.to("cpu")

    def take(self) -> None:
        """Bring in what was received."""
        if self.own is not self.host:
            self.own.copy_(self.host)
            torch.cuda.synchronize(self.own.device)


def ping_pong(peer: int, first: bool, device: str = "cpu", clock: Clock = time.perf_counter) -> dict[int, Turns]:
    """Send messages of each size on ``device`` to ``peer`` and receive its own in turn; by size, without the warm-up.

    ``perf_counter`` is one clock for all processes of a machine, so the two ends' readings can be compared.
    """
    turns = {}
    for size in SIZES:
        room = _Room(size, device)
        all_turns = Turns()
        for _ in range(WARMUP + REPEATS):
            for sends in (first, not first):
                start = clock()
                if sends:
                    _wait([dist.P2POp(dist.isend, room.leaving(), peer)])
                    all_turns.sent.append(start)
                else:
                    _wait([dist.P2POp(dist.irecv, room.host, peer)])
                    room.take()
                    all_turns.arrived.append(clock())
        turns[size] = Turns(all_turns.sent[WARMUP:], all_turns.arrived[WARMUP:])
    return turns


def exchange(target: int, source: int, device: str = "cpu", clock: Clock = time.perf_counter) -> dict[int, list[float]]:
    """Send from ``device`` to ``target`` while receiving from ``source``; by size, seconds until both were done.

    As in a pipeline, in which every micro-batch has tensors of its own, a message is not in the caches yet.
    """
    seconds: dict[int, list[float]] = {}
    for size in SIZES:
        count = min(WARMUP + REPEATS, max(2, MEMORY_BYTES // size))
        rooms = [(_Room(size, device), _Room(size, device)) for _ in range(count)]
        seconds[size] = []
        for repeat in range(WARMUP + REPEATS):
            leaves, arrives = rooms[repeat % count]
            start = clock()
            _wait([dist.P2POp(dist.isend, leaves.leaving(), target), dist.P2POp(dist.irecv, arrives.host, source)])
            arrives.take()
            if repeat >= WARMUP:
                seconds[size].append(clock() - start)
    return seconds


def has_peer_access(source: str, target: str) -> bool | None:
    """Whether messages go straight from GPU to GPU; None where not both are GPUs.

    They do not where the user has told NCCL, over which a pipeline sends, to go through the host's memory, or where
    there is no NCCL.
    """
    if not (source.startswith("cuda") and target.startswith("cuda")):
        return None
    if os.environ.get("NCCL_P2P_DISABLE", "0") != "0" or not dist.is_nccl_available():
        return False
    return torch.cuda.can_device_access_peer(torch.device(source), torch.device(target))


def copy_within(source: str, target: str) -> dict[int, list[float]]:
    """Copy each size from ``source`` to ``target`` in this process; seconds of each copy, by size."""
    timer = _timer(source, target)
    seconds = {}
    for size in SIZES:
        copy = _copier(source, target, size)
        seconds[size] = [timer(copy)[1] for _ in range(WARMUP + REPEATS)][WARMUP:]
    return seconds


def _copier(source: str, target: str, size: int) -> Callable[[], Tensor]:
    """Copies ``size`` bytes as a placed model does or, without peer access between two GPUs, through the host."""
    leaves = torch.zeros(size, dtype=torch.uint8, device=source)
    if has_peer_access(source, target) is not False:
        return partial(leaves.to, target, copy=True)
    return partial(_copy_through, _host_room(size), leaves, torch.zeros(size, dtype=torch.uint8, device=target))


def _host_room(size: int) -> Tensor:
    """Memory of the host that a GPU reads and writes by itself."""
    return torch.empty(size, dtype=torch.uint8, pin_memory=torch.cuda.is_available())


def _copy_through(host: Tensor, source: Tensor, target: Tensor) -> Tensor:
    """Copy ``source`` to ``target`` by way of ``host``; both copies are over when it returns."""
    host.copy_(source)
    return target.copy_(host)


def copies_for(source: str, target: str, size: int, window_s: float = WINDOW_S) -> list[float]:
    """Copy ``size`` bytes over and over, as other processes do meanwhile.

    Returns:
        The seconds of each copy; there are as many as the window holds, and not fewer than ``REPEATS``.
    """
    timer = _timer(source, target)
    copy = _copier(source, target, size)
    seconds: list[float] = []
    end = time.perf_counter() + window_s
    while len(seconds) < WARMUP + REPEATS or time.perf_counter() < end:
        seconds.append(timer(copy)[1])
    return seconds[WARMUP:]


def _timer(source: str, target: str) -> Timer:
    """The timer for a copy: of the GPU whose stream PyTorch queues it on, the source's if both are GPUs.

    A copy through the host is queued on both GPUs and waited for, so the host's clock times it.
    """
    gpus = [torch.device(name) for name in (source, target) if name.startswith("cuda")]
    return cuda_timer(gpus[0]) if gpus and has_peer_access(source, target) is not False else host_timer()


# The probe: are the bytes that arrive the bytes that were sent?


def pattern(seed: int, size: int, device: str = "cpu") -> Tensor:
    """``size`` bytes that depend on ``seed``, the same on every device, each made where it is needed.

    The sender and the receiver make them apart, so that what is compared never crossed a link. The bytes are those of
    the PCG hash of a counter (Jarzynski and Olano, "Hash functions for GPU rendering", JCGT 2020), in 64-bit integers
    that hold its 32-bit products.
    """
    mask = 0xFFFFFFFF
    counter = torch.arange(size, dtype=torch.int64, device=device) + (seed & 0x7FFFFFFF)
    state = (counter * 747796405 + 2891336453) & mask
    word = (((state >> ((state >> 28) + 4)) ^ state) * 277803737) & mask
    return (((word >> 22) ^ word) & 0xFF).to(torch.uint8)


def probed_bytes() -> int:
    """How many bytes the probe of one link compares."""
    return sum(size for size, _ in CASES)


def _seeds(seed: int) -> Iterable[tuple[int, int, int]]:
    """Size, offset and a seed of its own for each message: one that arrives in another's place is wrong."""
    return ((size, offset, seed + 0x9E3779B * number) for number, (size, offset) in enumerate(CASES))


def send_patterns(peer: int, seed: int, device: str = "cpu") -> None:
    """Send the patterns of ``seed`` on ``device`` to ``peer``, which checks them with :func:`check_received`."""
    for size, offset, own_seed in _seeds(seed):
        room = torch.zeros(offset + size, dtype=torch.uint8, device=device)
        room[offset:] = pattern(own_seed, size, device)
        _send(room[offset:].to("cpu"), peer)


def check_received(peer: int, seed: int, device: str = "cpu") -> int:
    """Receive the patterns of ``seed`` from ``peer`` on ``device``; how many bytes are wrong there."""
    wrong = 0
    for size, offset, own_seed in _seeds(seed):
        expected = pattern(own_seed, size, device)
        room = torch.zeros(offset + size, dtype=torch.uint8)
        room[offset:] = ~expected.to("cpu")  # what does not arrive must not pass for what did
        _wait([dist.P2POp(dist.irecv, room[offset:], peer)])
        wrong += int((room[offset:].to(device) != expected).sum())
    return wrong


def _send(message: Tensor, peer: int) -> None:
    _wait([dist.P2POp(dist.isend, message, peer)])


def check_copies(source: str, target: str, seed: int) -> int:
    """Copy the patterns of ``seed`` from ``source`` to ``target`` in this process; how many bytes are wrong there."""
    wrong = 0
    staged = has_peer_access(source, target) is False
    for size, offset, own_seed in _seeds(seed):
        sent = torch.zeros(offset + size, dtype=torch.uint8, device=source)
        sent[offset:] = pattern(own_seed, size, source)
        expected = pattern(own_seed, size, target)
        room = torch.zeros(offset + size, dtype=torch.uint8, device=target)
        room[offset:] = ~expected
        _copy(sent[offset:], room[offset:], staged=staged)
        wrong += int((room[offset:] != expected).sum())
    return wrong


def _copy(source: Tensor, target: Tensor, *, staged: bool) -> None:
    if staged:
        _copy_through(_host_room(len(source)), source, target)
    else:
        target.copy_(source)
