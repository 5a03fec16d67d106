"""The processes of a training script as the devices of a pipeline: rank k has the stages of the plan's device k.

The process group is the script's own if it has one, else made from the environment that ``torchrun`` sets. What the
pipeline sends goes over groups of its own, so that it never mixes with the script's messages.

A rank that fails says why in the ranks' store before it raises. The others, whose messages to it then break off, find
it there, so that the error of one is the error of all. Before any message is sent they meet over the store, where one
that fails is noticed at once.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import HashStore, PrefixStore
from torch.distributed.rendezvous import rendezvous

from shardwright.errors import ShardwrightError
from shardwright.profiler.devices import available_cores
from shardwright.profiler.pool import loopback_interface
from shardwright.profiler.worker import root_of
from shardwright.sharder.planning.plan import Plan
from shardwright.sharder.runtime.board import Board

__all__ = ["Ranks", "stage_device"]

MEETING_S = 300.0
"""Processes that start one after another, each importing much, are waited for at least so long."""


class Ranks:
    """The process as one device of ``plan``, and its ways to the others.

    Args:
        timeout_s: how long a rank waits for another's message.
        ready: raises where this rank cannot take part; the others are told.

    Raises:
        ShardwrightError: there are more or fewer processes than devices, they do not meet, a GPU is not here, or a rank
            is not ready; the same on every rank.
    """

    def __init__(self, plan: Plan, timeout_s: float, ready: Callable[[], None] = lambda: None) -> None:
        self.timeout_s = timeout_s
        try:
            self._board, self.made_group = _join(plan, self._meeting_s, ready)
        except (dist.DistError, RuntimeError, ValueError) as error:
            if isinstance(error, ShardwrightError):
                raise
            raise ShardwrightError(f"the processes of the pipeline could not meet: {root_of(error)}") from error
        self.size, self.rank = dist.get_world_size(), dist.get_rank()
        self.name = plan.devices[self.rank]
        self.label = _stages_in_words(plan, self.rank)
        self.device = stage_device(self.name)
        limit = timedelta(seconds=timeout_s)
        # Objects and checkpoints go over the host's memory, tensors of a step between the devices.
        self.control = dist.new_group(backend="gloo", timeout=limit)
        self.data = dist.new_group(backend="nccl", timeout=limit) if self.device.type == "cuda" else self.control

    @property
    def _meeting_s(self) -> float:
        return max(self.timeout_s, MEETING_S)

    def assemble(self) -> None:
        """Wait for all ranks to come to the same point of a call, before they send messages.

        Raises:
            ShardwrightError: one has failed before it, or does not come.
        """
        self._board.assemble(self._meeting_s)

    @property
    def is_last(self) -> bool:
        """Whether this device has the outputs and the loss."""
        return self.rank == self.size - 1

    def pin(self, plan: Plan) -> None:
        """Give a CPU stage its share of the cores, as when it was profiled, if there is one for each."""
        workers = [name for name in plan.profiled_devices or plan.devices if name.startswith("cpu")]
        cores = available_cores()
        share = len(cores) // len(workers) if self.name in workers else 0
        if self.size == 1 or not share:
            return
        position = workers.index(self.name)
        torch.set_num_threads(share)
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, cores[position * share : (position + 1) * share])

    def close(self) -> None:
        """Leave the groups, and the process group if the pipeline made it."""
        if not dist.is_initialized():
            return
        for group in {self.control, self.data}:
            dist.destroy_process_group(group)
        if self.made_group:
            dist.destroy_process_group()

    def agree(self, what: str, mine: Any, remedy: str) -> None:
        """Make sure that ``mine`` is equal on all ranks.

        Raises:
            ShardwrightError: another rank's differs from that of rank 0; on every rank.
        """
        everyone: list[Any] = [None] * self.size
        dist.all_gather_object(everyone, mine, group=self.control)
        other = next((rank for rank, theirs in enumerate(everyone) if theirs != everyone[0]), None)
        if other is not None:
            raise ShardwrightError(f"rank {other} has {what} other than rank 0's; {remedy}")

    def spread(self, value: Tensor | None) -> Tensor:
        """The last device's number on every rank, in PyTorch's default dtype, on this rank's device."""
        number = torch.zeros((), dtype=torch.float64, device=self.device)
        if value is not None:
            number.copy_(value.detach().reshape(()))
        self.broadcast(number, self.size - 1)
        return number.to(torch.get_default_dtype())

    def broadcast(self, tensor: Tensor, source: int) -> None:
        """Fill ``tensor``, on this rank's device, with that of rank ``source``."""
        if self.size > 1:
            dist.broadcast(tensor, source, group=self.data)

    def reduce(self, number: Tensor, operation: Any) -> None:
        """Put all ranks' numbers together, in place."""
        if self.size > 1:
            dist.all_reduce(number, operation, group=self.data)

    def carry(self, tensor: Tensor | None, like: Tensor, source: int, target: int) -> Tensor | None:
        """Bring a tensor in the host's memory from one rank to another; all others get None.

        Args:
            tensor: given on ``source``.
            like: has the shape and dtype, on ``target``.
        """
        if source == target:
            return tensor if self.rank == target else None
        if self.rank == source:
            assert tensor is not None  # it is the source's
            dist.send(tensor.contiguous(), target, group=self.control)
        if self.rank == target:
            found = torch.empty(like.shape, dtype=like.dtype)
            dist.recv(found, source, group=self.control)
            return found
        return None

    def share(self, value: Any, source: int) -> Any:
        """An object of rank ``source`` on every rank."""
        box = [value]
        if self.size > 1:
            dist.broadcast_object_list(box, source, group=self.control)
        return box[0]

    @contextmanager
    def failing_together(self) -> Iterator[None]:
        """Tell the others of an error in this block, or tell this rank of theirs.

        Raises:
            ShardwrightError: the first error of any rank, in one line.
        """
        self._board.begin()
        try:
            yield
        except Exception as error:
            if _is_broken_off(error):
                raise ShardwrightError(self._board.failure() or self._lost(error)) from error
            ours = next((e for e in _chain(error) if isinstance(e, ShardwrightError)), None)
            text = str(ours) if ours is not None else f"{self.label} failed: {root_of(error)}"
            self._board.fail(text)
            raise ShardwrightError(text) from error

    def _lost(self, error: BaseException) -> str:
        return (
            f"{self.label} lost another stage, which has ended or did not answer within "
            f"{self.timeout_s:.0f} s: {root_of(error)}"
        )


def stage_device(name: str) -> torch.device:
    """The torch device of a plan's device: CPU workers are ``cpu``, each in a process of its own.

    Raises:
        ShardwrightError: there is no such GPU.
    """
    if name.startswith("cpu"):
        return torch.device("cpu")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= count:
        raise ShardwrightError(f"the plan uses {name}, and this machine has {count} CUDA devices; plan for those here")
    return device


def _join(plan: Plan, limit_s: float, ready: Callable[[], None]) -> tuple[Board, bool]:
    """Enter the default process group when all ranks are ready; the ranks' board, and whether the group was made."""
    if not dist.is_available():
        raise ShardwrightError("this PyTorch was built without torch.distributed, which a pipeline needs")
    limit = timedelta(seconds=limit_s)
    there = dist.is_initialized()
    if there:
        store, rank, size = dist.distributed_c10d._get_default_store(), dist.get_rank(), dist.get_world_size()
    elif "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        store, rank, size = next(iter(rendezvous("env://", timeout=limit)))
    elif len(plan.devices) == 1:
        store, rank, size = HashStore(), 0, 1
    else:
        ready()
        count = len(plan.devices)
        raise ShardwrightError(
            f"the plan has {_counted(plan)}, and this is one process: start the script with torchrun --nproc-per-node "
            f"{count} SCRIPT, or pipeline in one process with place(model, plan, microbatches={plan.microbatches})"
        )
    board = Board(store, rank, size)
    try:
        ready()
        if size != len(plan.devices):
            raise ShardwrightError(_miscounted(plan, size))
        stage_device(plan.devices[rank])
    except Exception as error:
        board.fail(f"rank {rank} is not ready: {root_of(error)}" if size == len(plan.devices) else str(error))
        raise
    board.assemble(limit_s)
    if not there:
        if os.environ.get("MASTER_ADDR") in ("localhost", "127.0.0.1"):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback_interface())
        gpus = plan.devices[0].startswith("cuda")
        if gpus:
            torch.cuda.set_device(stage_device(plan.devices[rank]))
        own = PrefixStore(f"{board.name}/group", store)
        backend = "cpu:gloo,cuda:nccl" if gpus else "gloo"
        dist.init_process_group(backend, store=own, rank=rank, world_size=size, timeout=limit)
    return board, not there


def _miscounted(plan: Plan, size: int) -> str:
    return (
        f"the plan has {_counted(plan)} ({', '.join(plan.devices)}), and there are {size} processes: start "
        f"the script with torchrun --nproc-per-node {len(plan.devices)}, or plan for {size} devices"
    )


def _counted(plan: Plan) -> str:
    """``4 stages``, ``4 stages on 2 devices``."""
    stages = f"{len(plan.stages)} stages"
    return f"{stages} on {len(plan.devices)} devices" if plan.stages_per_device > 1 else stages


def _stages_in_words(plan: Plan, rank: int) -> str:
    """``stage 1 on cpu:1``, ``stages 1 and 3 on cpu:1``."""
    stages = [str(stage.index) for stage in plan.stages if stage.device == plan.devices[rank]]
    names = " and ".join([", ".join(stages[:-1]), stages[-1]] if len(stages) > 1 else stages)
    return f"stage{'s' if len(stages) > 1 else ''} {names} on {plan.devices[rank]}"


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _is_broken_off(error: BaseException) -> bool:
    """Whether a message to or from another rank failed, most often because that rank did."""
    return any(
        isinstance(e, dist.DistError) or (isinstance(e, RuntimeError) and ("gloo" in str(e) or "NCCL" in str(e)))
        for e in _chain(error)
    )
