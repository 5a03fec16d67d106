"""Process groups of replicas, and their gradients: each has those of its part of the batch, summed once a step.

Which parameters a backward reaches may depend on the samples, as in a mixture of experts. So all are summed in every
replica, with zeros where its own samples reached one not, and what no replica's reached stays without a gradient.

A gradient of ALONE bytes or more is summed where it is, and all of these go on at once, so that their latencies
overlap. Smaller ones are copied together up to COPIED bytes, one such sum after another, which is all the memory that
it takes: a sum over gloo takes about a millisecond beside its bytes, on one core a process (docs/accuracy.md).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from shardwright.errors import ShardwrightError
from shardwright.sharder.planning.schedules.replicas import ALONE, COPIED
from shardwright.sharder.runtime.piping.engine import gradients_apart

__all__ = ["Groups", "ReplicaGradients", "buckets"]


class Groups(NamedTuple):
    """The process groups of a pipeline; None: all processes."""

    ranks: tuple[tuple[int, ...], ...]
    """By replica."""
    all: dist.ProcessGroup | None
    of_replica: tuple[dist.ProcessGroup | None, ...]
    of_position: tuple[dist.ProcessGroup | None, ...]
    """Of the devices that have the same stages; None where there is one replica."""

    @classmethod
    def of(cls, ranks: Sequence[int], replicas: int, backend: str | None = None) -> Groups:
        """Make them, in the same order in every process; ``ranks`` are those of one replica after another."""

        def made(some: Sequence[int]) -> dist.ProcessGroup | None:
            every = tuple(some) == tuple(range(dist.get_world_size()))
            return None if every else dist.new_group(list(some), backend=backend)

        depth = len(ranks) // replicas
        own = tuple(tuple(ranks[first : first + depth]) for first in range(0, len(ranks), depth))
        every = made(ranks)
        if replicas == 1:
            return cls(own, every, (every,), (None,) * depth)
        positions = [
            dist.new_group([pipeline[position] for pipeline in own], backend=backend) for position in range(depth)
        ]
        return cls(own, every, tuple(map(made, own)), tuple(positions))

    def having(self, replica: int, position: int) -> tuple[dist.ProcessGroup, ...]:
        """Each of them that a device is in, once."""
        found = (self.all, self.of_replica[replica], self.of_position[position])
        return tuple({id(group): group for group in found if group is not None}.values())


def buckets(gradients: Iterable[Tensor]) -> list[list[Tensor]]:
    """``gradients`` in groups of one dtype whose sum is one message; a large one is alone."""
    found: list[list[Tensor]] = []
    open_: dict[torch.dtype, tuple[list[Tensor], int]] = {}
    for gradient in gradients:
        size = gradient.nbytes
        if size >= ALONE:
            found.append([gradient])
            continue
        group, filled = open_.get(gradient.dtype, ([], COPIED))
        if filled + size > COPIED:
            group, filled = [], 0
            found.append(group)
        group.append(gradient)
        open_[gradient.dtype] = group, filled + size
    return found


class ReplicaGradients:
    """Sums the gradients of the parameters in ``module`` over the processes of ``group``, which have the same.

    Args:
        group: None: there is one replica, and nothing is summed.
    """

    def __init__(self, module: nn.Module, group: dist.ProcessGroup | None) -> None:
        self.module, self.group = module, group

    @contextmanager
    def summed(self, noting: Callable[[], AbstractContextManager[None]] = nullcontext) -> Iterator[None]:
        """Sum what the backwards in this block add to the gradients, and that only.

        Args:
            noting: called for a block around the sum.

        Raises:
            ShardwrightError: a gradient is sparse.
        """
        if self.group is None:
            yield
            return
        named = {name: p for name, p in self.module.named_parameters() if p.requires_grad}
        with gradients_apart(list(named.values())):
            yield
            _refuse_sparse(named)
            with noting():
                self._sum_all(list(named.values()))

    def _sum_all(self, parameters: Sequence[nn.Parameter]) -> None:
        """Sum the gradients of ``parameters``, which are the same in every replica: so are the messages."""
        if not parameters:
            return
        own = [parameter.grad is not None for parameter in parameters]
        reached = torch.tensor(own, dtype=torch.uint8, device=parameters[0].device)
        told = dist.all_reduce(reached, dist.ReduceOp.MAX, group=self.group, async_op=True)
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        self._sum([parameter.grad for parameter in parameters if parameter.grad is not None])
        told.wait()
        if not all(own):  # to look at what was told is to wait for a GPU
            for parameter, by_any in zip(parameters, reached.tolist(), strict=True):
                parameter.grad = parameter.grad if by_any else None

    def _sum(self, gradients: Sequence[Tensor]) -> None:
        groups = buckets(gradients)
        large = [group[0] for group in groups if len(group) == 1 and group[0].is_contiguous()]
        works = [dist.all_reduce(gradient, group=self.group, async_op=True) for gradient in large]
        for group in groups:
            if len(group) == 1 and group[0].is_contiguous():
                continue
            whole = torch.cat([gradient.reshape(-1) for gradient in group])
            dist.all_reduce(whole, group=self.group)
            for gradient, part in zip(group, whole.split([gradient.numel() for gradient in group]), strict=True):
                gradient.copy_(part.view_as(gradient))
            _free(whole)
        for work in works:
            work.wait()


def _free(message: Tensor) -> None:
    """Free what ``message`` is in now: the thread of Gloo that sent it may hold it for a while after."""
    message.untyped_storage().resize_(0)
    message.resize_(0)  # an operation, so that the counter of live storages sees the size


def _refuse_sparse(named: Mapping[str, nn.Parameter]) -> None:
    """Refuse gradients that have no place in a sum of dense ones."""
    for name, parameter in named.items():
        if parameter.grad is not None and parameter.grad.layout != torch.strided:
            raise ShardwrightError(
                f"{name} has a sparse gradient, and replicas sum dense ones: make its module with sparse=False, or "
                "plan with 1 replica"
            )
