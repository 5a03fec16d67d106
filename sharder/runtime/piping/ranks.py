"""The processes of a training script as the devices of a pipeline: rank k has the stages of the plan's device k.

With replicas each is a pipeline of consecutive ranks, and a rank's position is that in its pipeline. What follows from
the weights alone, such as a checkpoint, is the first replica's to tell.

On several nodes the devices of each are counted together (:mod:`shardwright.sharder.runtime.nodes`). The process group
is the script's own if it has one, else made from the environment that ``torchrun`` sets, with the ranks in the order of
the stages. What the pipeline sends goes over groups of its own, so that it never mixes with the script's messages.

A rank that fails says why in the ranks' store before it raises. The others, whose messages to it then break off, find
it there, so that the error of one is the error of all; of a rank that has ended without a word they find that it lives
no more. Before any message is sent they meet over the store, where one that fails or ends is noticed at once.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import HashStore, PrefixStore, TCPStore
from torch.distributed.rendezvous import rendezvous

from shardwright.errors import ShardwrightError
from shardwright.profiler.devices import available_cores, share_cores, visible_gpus
from shardwright.profiler.workers.worker import root_of
from shardwright.sharder.planning.plan import Plan
from shardwright.sharder.runtime.board import LOOK_S, Board
from shardwright.sharder.runtime.nodes import Place, choose_interface, device_order, place_of
from shardwright.sharder.runtime.piping.hosted import backend_of, is_hosted

__all__ = ["Ranks", "stage_device"]

MEETING_S = 300.0
"""Processes that start one after another, each importing much, are waited for at least so long."""
PORT = "shardwright/port"
"""Under which the ranks find their store, and are counted in it."""
CONNECT_S = 30.0
"""They connect when all are there, which takes no longer unless they cannot reach each other."""


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
        self._midway, self._broken = False, ""
        self.closed = False
        try:
            self._board, self._place, self.made_group = _join(plan, self._meeting_s, ready)
        except (dist.DistError, RuntimeError, ValueError) as error:
            if isinstance(error, ShardwrightError):
                raise
            raise ShardwrightError(f"the processes of the pipeline could not meet: {root_of(error)}") from error
        self.size, self.rank = dist.get_world_size(), dist.get_rank()
        self.replicas, self.depth = plan.replicas, plan.depth
        self.replica, self.position = divmod(self.rank, self.depth)
        self.name = plan.devices[self.rank]
        self.label = _stages_in_words(plan, self.rank)
        self.device = stage_device(self._place.device)
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)  # NCCL, checkpoints and kernels of others' take the current one
        limit = timedelta(seconds=timeout_s)
        with self.failing_together():
            # Objects and checkpoints go over the host's memory, tensors of a step between the devices.
            self.control = dist.new_group(backend="gloo", timeout=limit)
            self.hosted = is_hosted(plan)
            on_gpus = self.device.type == "cuda" and not self.hosted
            self.data = dist.new_group(backend="nccl", timeout=limit) if on_gpus else self.control
            self.backend = dist.get_backend(self.data)
            self.pipe: dist.ProcessGroup = self.data
            self.alike: dist.ProcessGroup | None = None
            if self.replicas > 1:
                self.pipe, self.alike = self._of_replicas(limit)

    def _of_replicas(self, limit: timedelta) -> tuple[dist.ProcessGroup, dist.ProcessGroup]:
        """The group of this rank's pipeline, and that of the ranks with the same stages; all ranks make all."""
        ranks = [range(first, first + self.depth) for first in range(0, self.size, self.depth)]
        pipes = [dist.new_group(list(own), backend=self.backend, timeout=limit) for own in ranks]
        alike = [
            dist.new_group([own[position] for own in ranks], backend=self.backend, timeout=limit)
            for position in range(self.depth)
        ]
        return pipes[self.replica], alike[self.position]

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
        """Whether this device has outputs and a loss: those of its replica."""
        return self.position == self.depth - 1

    @property
    def last_ranks(self) -> range:
        """By replica: the rank that has its outputs."""
        return range(self.depth - 1, self.size, self.depth)

    def pin(self) -> None:
        """Give a CPU stage its share of the cores, as when it was profiled, if there is one for each."""
        cores = available_cores()
        workers = sum(name.startswith("cpu") for name in self._place.beside)
        mine = share_cores(self._place.beside, cores).get(self.name)
        if self.size == 1 or mine is None or workers > len(cores):
            return
        torch.set_num_threads(len(mine))
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, mine)

    def close(self) -> None:
        """Leave the groups, and the process group if the pipeline made it."""
        self.closed = True
        self._board.close()
        if not dist.is_initialized():
            return
        for group in dict.fromkeys((self.control, self.data, self.pipe, self.alike)):  # in one order on all ranks
            if group is not None:
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

    def differ(self, mine: int) -> bool:
        """Whether the ranks have other numbers than this one."""
        everyone: list[Any] = [None] * self.size
        dist.all_gather_object(everyone, mine, group=self.control)
        return any(theirs != mine for theirs in everyone)

    def spread(self, value: Tensor | None) -> Tensor:
        """The sum of the replicas' last devices' numbers on every rank, in PyTorch's default dtype, on its device."""
        number = torch.zeros(1, dtype=torch.float64, device=self.device)
        if value is not None:
            number[0] = value.detach().reshape(())
        self._add_up(number)
        return number[0].to(torch.get_default_dtype())

    def spread_what(self, found: Callable[[], Tensor | None]) -> Tensor:
        """Likewise of what is ``found``; if that fails on a rank, all hear of it, and no message is left.

        Raises:
            ShardwrightError: it failed on another rank.
        """
        number = torch.zeros(2, dtype=torch.float64, device=self.device)
        failed: Exception | None = None
        try:
            value = found()
            if value is not None:
                number[0] = value.detach().reshape(())
        except Exception as error:
            failed = error
            number[1] = 1.0
        self._add_up(number)
        if failed is not None:
            raise failed
        if number[1]:
            raise ShardwrightError(self._board.failure() or "another rank failed, and has not said why")
        return number[0].to(torch.get_default_dtype())

    def _add_up(self, numbers: Tensor) -> None:
        """Put the numbers of the last devices together, on every rank."""
        if self.replicas == 1:
            self.broadcast(numbers, self.size - 1)
        else:
            self.reduce(numbers, dist.ReduceOp.SUM, everywhere=True)

    def broadcast(self, tensor: Tensor, source: int) -> None:
        """Fill ``tensor``, on this rank's device, with that of rank ``source``."""
        if self.size > 1:
            _broadcast(tensor, source, self.data)

    def reduce(self, number: Tensor, operation: Any, *, everywhere: bool = False) -> None:
        """Put the numbers of this rank's pipeline together, in place, or those of all ranks."""
        if (self.size if everywhere else self.depth) > 1:
            dist.all_reduce(number, operation, group=self.data if everywhere else self.pipe)

    def make_alike(self, tensors: Iterable[Tensor]) -> None:
        """Give ``tensors``, on this rank's device, the values of the first replica's."""
        if self.alike is None:
            return
        for tensor in tensors:
            _broadcast(tensor, self.position, self.alike)

    def carry(self, tensor: Tensor | None, like: Tensor, source: int, target: int) -> Tensor | None:
        """Bring a tensor in the host's memory from one rank of the first replica to another; all others get None.

        Args:
            tensor: given on ``source``.
            like: has the shape and dtype, on ``target``.
        """
        if source == target:
            return tensor if self.rank == target else None
        is_sparse = like.layout != torch.strided
        if self.rank == source:
            assert tensor is not None  # it is the source's
            if is_sparse:
                dist.send_object_list([tensor], target, group=self.control)
                return None
            dist.send(tensor.contiguous(), target, group=self.control)
        if self.rank == target:
            if is_sparse:
                box: list[Any] = [None]
                dist.recv_object_list(box, source, group=self.control)
                return cast("Tensor", box[0])
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

    def do_alike(self, what: str) -> None:
        """Make sure that the others do the same in this call, before messages meet that are not for each other.

        Raises:
            ShardwrightError: one that came before does something else.
        """
        first = self._board.same(what)
        if first != what:
            raise ShardwrightError(
                f"{self.label} is called for {what}, while another rank is called for {first}: call every rank alike, "
                "in the same order and with the whole batch"
            )

    @contextmanager
    def messages(self) -> Iterator[None]:
        """Send and receive in this block: what fails in it leaves messages behind, and no call can follow."""
        before, self._midway = self._midway, True
        yield
        self._midway = before

    @contextmanager
    def failing_together(self) -> Iterator[None]:
        """Tell the others of an error in this block, or tell this rank of theirs.

        Raises:
            ShardwrightError: the first error of any rank, in one line; or that of an earlier block, in which messages
                broke off.
        """
        if self.closed:
            raise ShardwrightError("the pipeline was closed: make all calls, and save, before close()")
        self._board.begin()
        self._midway = False
        if self._broken:
            raise ShardwrightError(self._board.fail(self._broken))
        try:
            yield
        except Exception as error:
            broken_off = _is_broken_off(error)
            if broken_off:
                text = self._board.failure() or self._board.fail(self._lost(error))
            else:
                ours = next((e for e in _chain(error) if isinstance(e, ShardwrightError)), None)
                text = self._board.fail(str(ours) if ours is not None else f"{self.label} failed: {root_of(error)}")
            if broken_off or self._midway:
                self._break(text)
            # What broke off tells nothing where another rank failed, whose own process shows how.
            raise ShardwrightError(text) from (None if broken_off else error)
        except BaseException as error:  # Ctrl-C, after which a script may go on
            if self._midway:
                self._break(type(error).__name__)
            raise

    def _break(self, why: str) -> None:
        """Take no further call: messages of this one are left."""
        if self.size > 1:
            self._broken = (
                f"the pipeline broke off in an earlier call, of which messages are left ({why}); start the "
                "processes again, from the last checkpoint"
            )

    def _lost(self, error: BaseException) -> str:
        if gone := self._board.gone():
            return f"{' and '.join(gone)} left the pipeline: the process has ended, is frozen, or called close()"
        return (
            f"{self.label} lost another stage, which has ended or did not answer within "
            f"{self.timeout_s:.0f} s: {root_of(error)}"
        )


def _broadcast(tensor: Tensor, source: int, group: dist.ProcessGroup) -> None:
    """Fill ``tensor`` with that of rank ``source``, as bytes: gloo does not know every dtype.

    It takes the memory as it lies, and an expanded tensor, which has to be so on every rank, has less than its values
    would take: each is sent once. A sparse tensor is an object.
    """
    if tensor.layout != torch.strided:
        box = [tensor.cpu()]
        dist.broadcast_object_list(box, source, group=group, device=tensor.device)
        tensor.copy_(box[0])
        return
    for dimension, (stride, length) in enumerate(zip(tensor.stride(), tensor.shape, strict=True)):
        if not stride and length > 1:
            tensor = tensor.narrow(dimension, 0, 1)
    values = tensor.contiguous()
    dist.broadcast(values.reshape(-1).view(torch.uint8), source, group=group)
    if values is not tensor:
        tensor.copy_(values)


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
        here = f"this {'process sees' if (seen := visible_gpus()) else 'machine has'} {count} CUDA devices{seen}"
        raise ShardwrightError(f"the plan uses {name}, and {here}; plan for those here")
    return device


def _join(plan: Plan, limit_s: float, ready: Callable[[], None]) -> tuple[Board, Place, bool]:
    """Enter the default process group when all ranks are ready.

    Returns:
        The ranks' board, this one's place, and whether the group was made here.
    """
    if not dist.is_available():
        raise ShardwrightError("this PyTorch was built without torch.distributed, which a pipeline needs")
    there = dist.is_initialized()
    if there:
        store, rank, size = dist.distributed_c10d._get_default_store(), dist.get_rank(), dist.get_world_size()
    elif "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        store, rank, size = _met(limit_s)
    elif len(plan.devices) == 1:
        store, rank, size = HashStore(), 0, 1
    else:
        ready()
        count, one = len(plan.devices), plan.replicas == 1
        raise ShardwrightError(
            f"the plan has {_counted(plan)}, and this is one process: start the script with torchrun --nproc-per-node "
            f"{count} SCRIPT"
            + (f", or pipeline in one process with place(model, plan, microbatches={plan.microbatches})" * one)
        )
    fits = size == len(plan.devices)
    order = device_order(plan) if fits else tuple(range(size))
    names = [f"rank {order.index(position)}" for position in range(size)]
    if fits:
        names = [f"{name} ({_stages_in_words(plan, position)})" for position, name in enumerate(names)]
    board = Board(store, order[rank], size, names)
    try:
        if not fits:
            raise ShardwrightError(_miscounted(plan, size))
        ready()
        place = place_of(plan, rank, os.environ)
        if there and place.position != rank:
            raise ShardwrightError(_apart(plan))
        choose_interface(os.environ)
        stage_device(place.device)
    except Exception as error:
        text = f"{names[order[rank]]} is not ready: {root_of(error)}" if fits else str(error)
        raise ShardwrightError(board.fail(text)) from error
    board.assemble(limit_s)
    if not there:
        _make_group(plan, place, PrefixStore(f"{board.name}/group", store), board, limit_s)
    return board, place, not there


_kept: dict[tuple[str | None, ...], tuple[Any, int, int]] = {}
"""A store of the pipelines' own, by the environment of the processes that met: the last only."""


def _met(limit_s: float) -> tuple[Any, int, int]:
    """The store of the ranks that the environment names, this one's number, and how many there are.

    ``torchrun`` hosts a store that outlives all pipelines. Else rank 0 does, and if that let go of it with each
    pipeline, others could find the one that is about to end when they make their next, and wait in it for ever. It
    cannot be kept either: PyTorch gives whoever meets at the same port later, as for a group of the script's own, the
    same store with what was left in it. So the ranks meet there once, for the port of a store that is theirs alone.
    """
    limit = timedelta(seconds=limit_s)
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        return _meeting(limit)
    key = tuple(os.environ.get(name) for name in ("MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE"))
    if key not in _kept:
        _kept.clear()
        _kept[key] = _own_store(limit)
    store, rank, size = _kept[key]
    store.set_timeout(limit)
    return store, rank, size


def _meeting(limit: timedelta) -> tuple[Any, int, int]:
    """The store that the environment names, with the rank and the count of ranks."""
    store, rank, size = next(iter(rendezvous("env://", timeout=limit)))
    return store, rank, size


def _own_store(limit: timedelta) -> tuple[Any, int, int]:
    """A store that rank 0 hosts at a free port, once all are there."""
    meeting, rank, size = _meeting(limit)
    host, first = os.environ["MASTER_ADDR"], rank == 0
    port = 0 if first else int(meeting.get(PORT))
    store = TCPStore(host, port, is_master=first, timeout=limit, wait_for_workers=False)
    if first:
        meeting.set(PORT, str(store.port))
    here, end = store.add(PORT, 1), time.monotonic() + limit.total_seconds()
    while first and here < size:  # they need the meeting's store until then
        if time.monotonic() > end:
            raise dist.DistError(f"{size - here} of {size} processes did not come within {limit.total_seconds():.0f} s")
        time.sleep(LOOK_S)
        here = store.add(PORT, 0)
    return store, rank, size


def _make_group(plan: Plan, place: Place, store: Any, board: Board, limit_s: float) -> None:
    """Make the default process group, the ranks in the order of the stages; all are there."""
    if place.device.startswith("cuda"):
        torch.cuda.set_device(stage_device(place.device))
    backend = backend_of(plan.devices)
    size, limit = len(plan.devices), timedelta(seconds=CONNECT_S)
    try:
        dist.init_process_group(backend, store=store, rank=place.position, world_size=size, timeout=limit)
    except Exception as error:
        over = os.environ.get("GLOO_SOCKET_IFNAME", "the interface of its name")
        text = (
            f"{_stages_in_words(plan, place.position)} could not connect to the others over {over}: {root_of(error)}; "
            "if it is not the network that the nodes share, name that by GLOO_SOCKET_IFNAME on each of them"
        )
        raise ShardwrightError(board.fail(text)) from error
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=limit_s))


def _miscounted(plan: Plan, size: int) -> str:
    each = "on its nodes together" if plan.hosts else str(len(plan.devices))
    return (
        f"the plan has {_counted(plan)} ({', '.join(plan.devices)}), and there are {size} processes: start "
        f"the script with torchrun --nproc-per-node {each}, or plan for {size} devices"
    )


def _apart(plan: Plan) -> str:
    order = ", ".join(f"{device} on {plan.hosts[device]!r}" for device in plan.devices)
    return (
        f"the plan's stages go back to a node ({order}), so that the ranks are not in their order: let pipeline() make "
        "the process group, or plan for devices listed node by node"
    )


def _counted(plan: Plan) -> str:
    """``4 stages``, ``4 stages on 2 devices``."""
    stages = f"{len(plan.stages)} stage{'s' if len(plan.stages) > 1 else ''}"
    if plan.replicas > 1:
        return f"{plan.replicas} replicas of {stages} on {len(plan.devices)} devices"
    return f"{stages} on {len(plan.devices)} devices" if plan.stages_per_device > 1 else stages


def _stages_in_words(plan: Plan, rank: int) -> str:
    """``stage 1 on cpu:1``, ``stages 1 and 3 on cpu:1``."""
    stages = [str(index) for index in range(rank % plan.depth, len(plan.stages), plan.depth)]
    names = " and ".join([", ".join(stages[:-1]), stages[-1]] if len(stages) > 1 else stages)
    of = f" of replica {rank // plan.depth}" if plan.replicas > 1 else ""
    device = plan.devices[rank]
    host = f", node {plan.hosts[device]!r}" if plan.hosts else ""
    return f"stage{'s' if len(stages) > 1 else ''} {names}{of} on {device}{host}"


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
