"""Stages whose messages pass while they compute, on one core as well.

Of a message over gloo the call does the least. A thread of gloo's in each process takes the notice that the receiver is
ready, writes then, and reads at the other end. On the core of a stage that thread comes when the stage's own makes a
system call or has used up its time. With the lazy preemption of Linux from 6.13 on that is after milliseconds, in which
a small stage has computed several micro-batches, and the stage that waits for the first of them none. So of a prompt
stage

- all receives of a step are posted when it begins, each into the buffer that the engine keeps for it. Notices are there
  before anything is sent, and a send writes in its own call;
- after a send the stage's thread lets others of its core run once.

Stages of GPipe are, one a device, in training and in inference. Under 1F1B a stage waits for its messages in any case;
what arrives beside its computing only disturbs that, and steps are longer. For figures see docs/accuracy.md.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, Literal

import torch.distributed as dist
from torch import Tensor
from torch.distributed.pipelining import PipelineStage

__all__ = ["PromptStage"]

Way = Literal["forward", "backward"]


class PromptStage(PipelineStage):
    """A stage of PyTorch's engine; where it is ``prompt``, its messages are.

    The engine calls ``op`` of the operations that a stage gives it; one that is a function of ours it leaves to
    :func:`torch.distributed.batch_isend_irecv`.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.prompt = False
        """Only over gloo, and where each neighbour sends forwards or backwards alone, in the order of micro-batches."""
        self._posted: dict[tuple[Way, int], list[dist.Work]] = {}

    def get_fwd_recv_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        """What receives the inputs of a forward."""
        if self.prompt and fwd_chunk_id == 0:
            self._post_all()
        return self._as_posted(super().get_fwd_recv_ops(fwd_chunk_id), "forward", fwd_chunk_id)

    def get_bwd_recv_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        """What receives the gradients for a backward."""
        return self._as_posted(super().get_bwd_recv_ops(bwd_chunk_id), "backward", bwd_chunk_id)

    def get_fwd_send_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        """What sends the outputs of a forward."""
        return self._giving_way(super().get_fwd_send_ops(fwd_chunk_id))

    def get_bwd_send_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        """What sends the gradients of a backward."""
        return self._giving_way(super().get_bwd_send_ops(bwd_chunk_id))

    def _post_all(self) -> None:
        """Post every receive of the step."""
        ways: list[tuple[Way, Any, Callable[[int], list[dist.P2POp]]]] = [
            ("forward", self.args_recv_info, super().get_fwd_recv_ops),
            ("backward", self.grad_recv_info if self.has_backward else {}, super().get_bwd_recv_ops),
        ]
        for way, infos, receiving in ways:
            for chunk in sorted(infos):
                self._posted[way, chunk] = [
                    each.op(each.tensor, group=each.group, tag=each.tag, group_src=each.group_peer)
                    for each in receiving(chunk)
                ]

    def _as_posted(self, operations: list[dist.P2POp], way: Way, chunk: int) -> list[dist.P2POp]:
        """The ``operations``, of which those that are posted already give that."""
        for each, work in zip(operations, self._posted.pop((way, chunk), ()), strict=False):

            def irecv(*_args: Any, work: dist.Work = work, **_kwargs: Any) -> dist.Work:
                return work

            each.op = irecv
        return operations

    def _giving_way(self, operations: list[dist.P2POp]) -> list[dist.P2POp]:
        """The ``operations``, of which the last lets other threads run once it has sent."""
        if operations and self.prompt and hasattr(os, "sched_yield"):
            last = operations[-1]
            peer = last.group_peer  # not the operation itself, which would hold what it sends in a circle

            def isend(tensor: Tensor, *_args: Any, group: Any = last.group, tag: int = last.tag, **_kwargs: Any) -> Any:
                work = dist.isend(tensor, group=group, tag=tag, group_dst=peer)
                os.sched_yield()
                return work

            last.op = isend
        return operations
