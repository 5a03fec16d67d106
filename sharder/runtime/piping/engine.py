"""PyTorch's pipelining engine, as our stages use it: static shapes, equal micro-batches, shared gradients summed.

Shapes are given to the engine beforehand, so that it does not try them out with a step of its own, which would change
batch statistics. Gradients are left as the backward makes them: who wants their mean divides the loss.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import (
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
    ScheduleLoopedBFS,
    _utils,
)
from torch.distributed.pipelining.microbatch import TensorChunkSpec, _Replicate

from shardwright.errors import ShardwrightError
from shardwright.sharder.planning.plan import Plan
from shardwright.sharder.planning.schedules.zero_bubble import divides
from shardwright.sharder.runtime.piping.cut import StageProgram, trainable
from shardwright.sharder.runtime.piping.hosted import HOST, HostedStage
from shardwright.sharder.runtime.piping.parted_stage import PartedStage
from shardwright.sharder.runtime.piping.prompt_stage import PromptStage
from shardwright.sharder.runtime.piping.recompute import RecomputedStage

__all__ = [
    "Schedule",
    "SharedGradients",
    "SharedParameter",
    "gradients_apart",
    "make_schedule",
    "make_stage",
    "names_by_tensor",
    "sendable",
    "shared_parameters",
]


Schedule = Schedule1F1B | ScheduleGPipe | ScheduleInterleaved1F1B | ScheduleInterleavedZeroBubble | ScheduleLoopedBFS


@dataclass(frozen=True)
class SharedParameter:
    """A parameter of which several devices hold a copy; their gradients are summed once a step."""

    names: frozenset[str]
    """All that it has in the model."""
    holders: tuple[int, ...]
    """Positions of the devices, in the order in which the stages go around them."""


def names_by_tensor(model: nn.Module) -> dict[int, set[str]]:
    """Every name that each parameter and buffer has, by the ``id`` of the tensor."""
    names: dict[int, set[str]] = {}
    both = (model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False))
    for name, tensor in (pair for pairs in both for pair in pairs):
        names.setdefault(id(tensor), set()).add(name)
    return names


def shared_parameters(plan: Plan, model: nn.Module) -> tuple[SharedParameter, ...]:
    """The plan's ties over several devices, with every name that the parameter has."""
    names = names_by_tensor(model)
    every = dict(model.named_parameters(remove_duplicate=False))
    count = plan.depth
    held = {tie.name: tuple(sorted({stage % count for stage in tie.stages})) for tie in plan.ties}
    return tuple(
        SharedParameter(frozenset(names[id(every[name])]), holders)
        for name, holders in held.items()
        if len(holders) > 1
    )


def sendable(programs: list[StageProgram], *, train: bool) -> list[StageProgram]:
    """The stages, unless in training they send what an older PyTorch cannot: whole numbers, what has no gradient."""
    crossing = [shape.name for program in programs[1:] for shape in program.inputs if not shape.requires_grad]
    if train and crossing and not hasattr(_utils, "TensorMeta"):
        raise ShardwrightError(
            f"{crossing[0]} crosses between stages and has no gradient, which the pipeline engine of torch "
            f"{torch.__version__} cannot send in training: use torch 2.13, or place(model, plan)"
        )
    return programs


def make_stage(
    program: StageProgram,
    module: nn.Module,
    stages: int,
    device: torch.device,
    group: dist.ProcessGroup | None = None,
    *,
    hosted: bool = False,
    parted: bool = False,
) -> PromptStage:
    """``program``, with ``module`` to compute it on ``device``, as one of ``stages`` that go around ``group``'s ranks.

    The stage's ``submod`` is ``module``, or what computes it anew in the backward, or what keeps it ``hosted``: on its
    device with its messages in the host's memory. If ``parted`` its backward can be in two parts.
    """
    if program.recompute:
        module = RecomputedStage(module, program.index, device)
    examples = tuple(shape.example() for shape in program.inputs)
    if program.index == 0:
        examples = tuple(t.detach() for t in examples)
    outputs = tuple(shape.example() for shape in program.outputs)
    if hosted:
        module, device = HostedStage(module, device, last=program.index == stages - 1), HOST
    kind = PartedStage if parted else PromptStage
    return kind(module, program.index, stages, device, input_args=examples, output_args=outputs, group=group)


def make_schedule(
    stages: Sequence[PromptStage],
    kind: str,
    microbatches: int,
    loss: Callable[[Any, Tensor], Tensor] | None,
    batched: Sequence[bool],
) -> Schedule:
    """What drives this process's ``stages`` through ``microbatches`` micro-batches, backward too with a ``loss``.

    Several stages a process go by interleaved 1F1B where it can divide the micro-batches into equal rounds, and else by
    looped breadth first, which is GPipe for them: all micro-batches through one stage, then through the next
    (Lamy-Poirier, "Breadth-first pipeline parallelism", MLSys 2023). Zero-bubble, for stages that are parted, takes
    equal rounds too; where there are none it is 1F1B, and without a loss there is nothing to divide.

    Args:
        kind: of problem.Schedule.
        batched: of each input of the model, whether it is divided along its first dimension; others go to each whole.
    """
    chunks: Any = tuple(TensorChunkSpec(0) if divided else _Replicate() for divided in batched)
    first = any(stage.is_first for stage in stages)
    options: Any = {
        "n_microbatches": microbatches,
        "loss_fn": loss,
        "args_chunk_spec": chunks if first else None,
        # It would divide the gradients by the number of micro-batches, after each step all of them once more, earlier
        # ones too, and what several stages of a process share more than once; nor does it know other replicas.
        "scale_grads": False,
    }
    for stage in stages:
        stage.prompt = kind == "gpipe" and len(stages) == 1 and stage.device.type == "cpu"
    if len(stages) > 1:
        rounds = max(1, microbatches // stages[0].group_size)
        if microbatches % rounds == 0:
            return ScheduleInterleaved1F1B(list(stages), **options)
        del options["args_chunk_spec"]  # which this one has forgotten to take
        looped = ScheduleLoopedBFS(list(stages), **options)
        looped._args_chunk_spec = chunks if first else None
        return looped
    if kind == "zero-bubble" and loss is not None and divides(stages[0].num_stages, microbatches):
        return ScheduleInterleavedZeroBubble(list(stages), **options)
    return ScheduleGPipe(stages[0], **options) if kind == "gpipe" else Schedule1F1B(stages[0], **options)


@contextmanager
def gradients_apart(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Let ``parameters`` have the gradients of this block alone, and add them to the earlier ones at its end.

    Those are not lost with a block that fails.
    """
    earlier = [parameter.grad for parameter in parameters]
    for parameter in parameters:
        parameter.grad = None
    try:
        yield
    except BaseException:
        for parameter, before in zip(parameters, earlier, strict=True):
            parameter.grad = before
        raise
    for parameter, before in zip(parameters, earlier, strict=True):
        if before is not None:
            parameter.grad = before if parameter.grad is None else before.add_(parameter.grad)


class SharedGradients:
    """Sums the gradients of the parameters that this process shares with others.

    Every process makes one, with the same ``ties`` in the same order: those of the same devices have a process group.

    Args:
        position: of this process's device among ``holders``.
        ranks: of each device, its rank in the process group; by default its position.
        backend: of these groups; by default that of the process group.
        limit: how long one process waits for another there; by default PyTorch's.
    """

    def __init__(
        self,
        ties: Sequence[SharedParameter],
        position: int,
        module: nn.Module,
        *,
        ranks: Sequence[int] = (),
        backend: str | None = None,
        limit: timedelta | None = None,
    ) -> None:
        named = trainable(module)
        self.shared: list[tuple[int, nn.Parameter, dist.ProcessGroup]] = []
        """With the number of the tie."""
        self.groups: list[dist.ProcessGroup] = []
        made: dict[tuple[int, ...], dist.ProcessGroup] = {}
        for number, tie in enumerate(ties):
            members = tuple(ranks[each] if ranks else each for each in tie.holders)
            if members not in made:
                made[members] = dist.new_group(list(members), backend=backend, timeout=limit)
            group = made[members]
            if position in tie.holders:
                if group not in self.groups:
                    self.groups.append(group)
                self.shared += [(number, named[name], group) for name in sorted(tie.names & named.keys())[:1]]

    @contextmanager
    def summed(self, noting: Callable[[int], AbstractContextManager[None]] = lambda _: nullcontext()) -> Iterator[None]:
        """Sum what the backwards in this block add to the gradients, and that only.

        Args:
            noting: called with the number of each tie, for a block around its sum.
        """
        with gradients_apart([parameter for _, parameter, _ in self.shared]):
            yield
            for number, parameter, group in self.shared:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                with noting(number):
                    dist.all_reduce(parameter.grad, group=group)

    def close(self) -> None:
        """Leave the groups."""
        for group in self.groups:
            dist.destroy_process_group(group)
        self.groups.clear()
