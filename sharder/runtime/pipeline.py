"""What the workers do in a run: hold their stages, or the whole model, and take steps with them.

Stages run on ``torch.distributed.pipelining``, as :mod:`shardwright.sharder.runtime.piping.engine` sets it up.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from shardwright.profiler.devices import free_host_bytes
from shardwright.profiler.measuring.optimizers import make_optimizer
from shardwright.profiler.memory import MemoryCounter, total_bytes
from shardwright.profiler.recording.inputs import all_microbatches, is_batched, outputs_of
from shardwright.profiler.recording.structure import map_tensors, tensors_in
from shardwright.profiler.recording.unitgraph import mean_square_loss
from shardwright.profiler.workers.worker import advance, resident
from shardwright.sharder.runtime.accounts import Noted
from shardwright.sharder.runtime.gates.resting import dropout_resting, full_precision
from shardwright.sharder.runtime.piping.cut import Share, StageProgram, trainable
from shardwright.sharder.runtime.piping.engine import SharedGradients, SharedParameter, make_schedule, make_stage
from shardwright.sharder.runtime.piping.noting import Notes
from shardwright.sharder.runtime.piping.observing import Drawing, Seen, observed
from shardwright.sharder.runtime.piping.prompt_stage import PromptStage
from shardwright.sharder.runtime.piping.replicas import Groups, ReplicaGradients
from shardwright.sharder.runtime.record import What

__all__ = [
    "Comparison",
    "Job",
    "check_stage",
    "check_whole",
    "free_bytes",
    "hold_stages",
    "hold_whole",
    "note_stage",
    "observe_stage",
    "release_stages",
    "release_whole",
    "step_stage",
    "step_whole",
    "weigh_stage",
]


@dataclass(frozen=True)
class Job:
    """What all workers of a run agree on."""

    schedule: str
    microbatches: int
    """Of one replica."""
    stages: int
    """Of the whole pipeline."""
    batch: int
    """Of one replica."""
    train: bool
    optimizer: str
    output_places: tuple[int, ...]
    """Which of the tensors that the model returns come out of the pipeline."""
    ties: tuple[SharedParameter, ...] = ()
    units: tuple[str, ...] = ()
    """The units' paths in the whole model."""
    name: str = "plan"
    """Of the pipeline, among those that a worker holds."""
    ranks: tuple[int, ...] = ()
    """Of each device, one replica after another, that of its worker among all; () for the whole model."""
    replicas: int = 1
    divided: tuple[bool, ...] = ()
    """Of each input of the model, whether micro-batches have a part of it; () = as its length says."""
    hosted: bool = False
    """Whether what the stages exchange goes through the host's memory, as between devices of several kinds."""
    backend: str | None = None
    """Of the pipeline's process groups; None: that of all workers'."""


@dataclass(frozen=True)
class Comparison:
    """What the gate compares: outputs of every micro-batch in order, and gradients by parameter name."""

    outputs: list[Tensor]
    gradients: dict[str, Tensor]
    """Of a parameter with several names one tensor."""


@dataclass
class _Held:
    """What stays in the worker between calls."""

    job: Job
    device: torch.device
    module: nn.Module
    optimizer: torch.optim.Optimizer | None
    step: Callable[[], None]
    """One step without the optimizer."""
    outputs: list[Tensor] | None = None
    """Filled during a check."""
    inputs: tuple[Tensor, ...] = ()
    buffers: Callable[[], list[Tensor]] = list
    """The engine's own."""
    stages: tuple[PromptStage, ...] = ()
    group: dist.ProcessGroup | None = None
    """Of the devices of all replicas; None: all workers."""
    shared: SharedGradients | None = None
    groups: tuple[dist.ProcessGroup, ...] = ()
    """All that this device is in, ties apart."""
    notes: Notes | None = None
    """Filled in a step that is noted."""

    def noting(self, what: What, number: int | None = None, *, piece: int = 0) -> AbstractContextManager[None]:
        """Note the block, if this step is noted."""
        return self.notes.slot(what, number, piece) if self.notes else nullcontext()

    def tying(self, number: int) -> AbstractContextManager[None]:
        """Note the sum of one tie's gradients, if this step is noted."""
        if self.notes:
            self.notes.post("tie", number)
        return self.noting("tie", number)

    def summing(self) -> AbstractContextManager[None]:
        """Note the sum of the gradients over the replicas likewise."""
        if self.notes:
            self.notes.post("sum")
        return self.noting("sum")


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def hold_stages(job: Job, programs: Sequence[StageProgram], inputs: tuple[Tensor, ...], replica: int = 0) -> None:
    """Take in this device's stages of a pipeline, beside those of others; ``inputs`` are the model's, all that the
    replica has of the batch.

    All workers call it, for its groups are made by all; those without a stage have no ``programs``, and only the first
    stage has inputs.
    """
    device: torch.device = resident["device"]
    groups = Groups.of(job.ranks, job.replicas, job.backend)
    ties = job.ties if job.train else ()
    position = programs[0].index if programs else -1
    module = nn.Module()
    if programs:
        _bring((value for program in programs for value in program.attributes.values()), device)
        share = Share(programs, device)
        module = share.whole.train(job.train)
    by_replica = [
        SharedGradients(ties, position if number == replica else -1, module, ranks=ranks, backend=job.backend)
        for number, ranks in enumerate(groups.ranks)
    ]
    summing = ReplicaGradients(module, groups.of_position[position] if job.train and programs else None)
    if not programs:
        return
    ranks, group, shared = groups.ranks[replica], groups.of_replica[replica], by_replica[replica]
    stages = tuple(
        make_stage(program, stage, job.stages, device, group, hosted=job.hosted, parted=job.schedule == "zero-bubble")
        for program, stage in zip(programs, share.modules, strict=True)
    )
    # The engine of several stages a process, and of zero-bubble, finds the ranks by itself, in rising order.
    assert (len(stages) == 1 and job.schedule != "zero-bubble") or list(ranks) == sorted(ranks)
    for stage in stages:
        # PyTorch numbers the ranks of a group in rising order, whatever the order of the devices is.
        stage.stage_index_to_group_rank = {
            index: sorted(ranks).index(ranks[index % len(ranks)]) for index in range(job.stages)
        }
    here = tuple(t.to(device) for t in inputs)
    held = _Held(job, device, module, _optimizer(job, module), lambda: None)
    held.shared, held.groups = shared, groups.having(replica, position)
    held.inputs, held.buffers, held.stages, held.group = here, partial(_engine_buffers, stages), stages, groups.all
    parts = job.microbatches * job.replicas

    def loss(outputs: Any, _target: Tensor) -> Tensor:
        with held.noting("loss", piece=len(stages) - 1):
            return mean_square_loss(outputs) / parts

    batched = job.divided or [is_batched(t, job.batch) for t in inputs]
    schedule = make_schedule(stages, job.schedule, job.microbatches, loss if job.train else None, batched)
    target = torch.zeros(job.batch, device=device)
    first, last = programs[0].index == 0, programs[-1].index == job.stages - 1

    def step() -> None:
        with (
            summing.summed(held.summing),
            shared.summed(held.tying),
            nullcontext() if job.train else torch.no_grad(),
        ):
            schedule.step(
                *(here if first else ()),
                target=target if last and job.train else None,
                return_outputs=False,
            )

    held.step = step
    if last:
        # Of the stage as the engine calls it: what is computed anew in a backward is no output.
        stages[-1].submod.register_forward_hook(lambda _module, _args, output: _keep(held, output))
    if device.type == "cuda" and not job.hosted:
        _connect((groups.all, *held.groups, *shared.groups), device)
    resident[_key(job.name)] = held


def _connect(groups: Iterable[dist.ProcessGroup | None], device: torch.device) -> None:
    """Have NCCL connect the devices of each group, which takes seconds and memory, before a step is timed or weighed.

    In one order on all devices: each waits here for those of the group.
    """
    for group in dict.fromkeys(groups):
        dist.all_reduce(torch.zeros(1, device=device), group=group)
    torch.cuda.synchronize(device)


def _key(name: str) -> str:
    """Where the stages of a pipeline stay."""
    return f"stages of {name}"


def hold_whole(job: Job, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Take in the whole model with its batch, to run it on this device alone, in ``job.microbatches`` pieces."""
    device: torch.device = resident["device"]
    _let_go("whole")  # one that was held before goes first: two may not fit
    _bring((model,), device)
    model.to(device).train(job.train)
    args, kwargs = map_tensors(lambda t: t.to(device), (args, kwargs))
    held = _Held(job, device, model, _optimizer(job, model), lambda: None)

    def step() -> None:
        for piece_args, piece_kwargs in all_microbatches(args, kwargs, job.microbatches):
            with torch.set_grad_enabled(job.train):
                found = outputs_of(model(*piece_args, **piece_kwargs))
            output = tuple(found[place] for place in job.output_places)
            _keep(held, output)
            if job.train:
                (mean_square_loss(output) / job.microbatches).backward()

    held.step = step
    resident["whole"] = held


def _bring(values: Iterable[Any], device: torch.device) -> None:
    """Move the parameters to ``device`` one by one, in place, and tell of each: all of them may take long."""
    for value in values:
        parameters = value.parameters() if isinstance(value, nn.Module) else (value,)
        for parameter in parameters:
            if isinstance(parameter, nn.Parameter):
                parameter.data = parameter.data.to(device)
                advance(parameter.numel() * parameter.element_size())


def _let_go(key: str) -> _Held | None:
    """Forget what is held, so that its memory is free at once: it refers to itself."""
    held: _Held | None = resident.pop(key, None)
    if held is not None:
        held.step = lambda: None
        held.stages, held.optimizer, held.module, held.buffers = (), None, nn.Module(), list
        gc.collect()
    return held


def _optimizer(job: Job, module: nn.Module) -> torch.optim.Optimizer | None:
    return make_optimizer(job.optimizer, module.parameters()) if job.train else None


def _keep(held: _Held, output: Any) -> None:
    if held.outputs is not None:
        held.outputs += [t.detach().cpu().clone() for t in outputs_of(output)]


def _meet(held: _Held) -> None:
    """Begin together with the pipeline's other devices."""
    dist.all_reduce(torch.zeros(1), group=held.group)  # a barrier that never waits for a GPU's stream


def step_stage(name: str = "plan", count: int = 1) -> list[float]:
    """Steps of this device's stages in a row, each begun together with the others; seconds of each."""
    held: _Held = resident[_key(name)]
    seconds = []
    for _ in range(count):
        _meet(held)
        seconds.append(_timed_step(held))
    return seconds


def step_whole(count: int = 1) -> list[float]:
    """Steps of the whole model in a row; seconds of each."""
    return [_timed_step(resident["whole"]) for _ in range(count)]


def _timed_step(held: _Held) -> float:
    _synchronize(held.device)
    start = time.perf_counter()
    _whole_step(held)
    _synchronize(held.device)
    return time.perf_counter() - start


def _whole_step(held: _Held) -> None:
    if held.optimizer is not None:
        with held.noting("update"):
            held.optimizer.zero_grad()
    held.step()
    if held.optimizer is not None:
        with held.noting("update"):
            held.optimizer.step()


def note_stage(name: str = "plan", warm: bool = False) -> Noted:
    """One more step of this device's stages, begun together with the others; what it was at when.

    Args:
        warm: whether another comes right before.
    """
    held: _Held = resident[_key(name)]
    if warm:
        _meet(held)
        _timed_step(held)
    held.notes = notes = Notes(held.device)
    try:
        with notes.engine(held.stages, train=held.job.train):
            _meet(held)
            with notes.whole():
                _whole_step(held)
    finally:
        held.notes = None
    _synchronize(held.device)
    return notes.noted()


def weigh_stage(name: str = "plan") -> int:
    """One more step of this device's stages, together with the others; its peak in bytes.

    A GPU's allocator says it, less the libraries' workspaces, so nothing else may be held there. On the CPU storages
    are counted: those that are there before the step, the engine's buffers among them, and those that come and go in
    it.
    """
    held: _Held = resident[_key(name)]
    gc.collect()  # what earlier steps left in cycles is not this step's
    _meet(held)
    if held.optimizer is not None:
        held.optimizer.zero_grad()
    if held.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(held.device)
        _timed_step(held)
        return torch.cuda.max_memory_allocated(held.device) - int(resident.get("workspace_bytes", 0))
    states = [t for _, t in tensors_in(list(held.optimizer.state.values()))] if held.optimizer is not None else []
    there = [*held.module.parameters(), *held.module.buffers(), *states, *held.inputs, *held.buffers()]
    counter = MemoryCounter()
    with counter:
        _timed_step(held)
    return total_bytes(there) + counter.peak_bytes


def _engine_buffers(stages: Sequence[PromptStage]) -> list[Tensor]:
    """What the engine receives into: it holds them for the whole of the training."""
    kinds = [by_chunk for stage in stages for by_chunk in (stage.args_recv_info, stage.grad_recv_info)]
    infos = [info for by_chunk in kinds for info in by_chunk.values()]
    buffers = [getattr(received, "buffer", None) for each in infos for received in each or ()]
    return [buffer for buffer in buffers if isinstance(buffer, Tensor)]


def check_stage(name: str = "plan") -> Comparison:
    """One step of this device's stages without an update, for the gate."""
    return _compared(resident[_key(name)])


def check_whole() -> Comparison:
    """One step of the whole model without an update, for the gate."""
    return _compared(resident["whole"])


def observe_stage(name: str, wanted: frozenset[str], gradients: bool) -> tuple[Seen, Drawing]:
    """One step of this device's stages without an update; what the ``wanted`` steps of the forward make in it, or the
    gradients of that, and which steps draw random numbers."""
    held: _Held = resident[_key(name)]
    seen: Seen = {}
    drawing: Drawing = set()
    with ExitStack() as watched:
        for stage in held.stages:
            watched.enter_context(observed(stage, wanted, seen, drawing, gradients=gradients))
        _step_at_rest(held)
    held.module.zero_grad()
    return seen, drawing


def release_whole() -> None:
    """Let go of the whole model, if it is held."""
    _let_go("whole")


def release_stages(name: str = "plan") -> None:
    """Let go of this device's stages likewise, and leave their groups."""
    held = _let_go(_key(name))
    if held is not None and held.shared is not None:
        held.shared.close()
    for group in held.groups if held is not None else ():
        dist.destroy_process_group(group)
    del held
    gc.collect()


def free_bytes() -> int:
    """What this worker's device has free; a CPU worker's is the whole host's."""
    device: torch.device = resident["device"]
    if device.type == "cpu":
        return free_host_bytes()
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(torch.cuda.mem_get_info(device)[0]) + kept


def _step_at_rest(held: _Held) -> None:
    """One step that can be compared, from no gradients on."""
    held.module.zero_grad()
    units = [held.module.get_submodule(path) for path in held.job.units] or [held.module]
    with dropout_resting(units), full_precision(held.device):
        held.step()
    _synchronize(held.device)


def _compared(held: _Held) -> Comparison:
    held.outputs = []
    _step_at_rest(held)
    outputs, held.outputs = held.outputs, None
    named = {name: p for name, p in trainable(held.module).items() if p.grad is not None}
    copies = {id(p): p.grad.cpu().clone() for p in named.values() if p.grad is not None}
    gradients = {name: copies[id(p)] for name, p in named.items()}
    held.module.zero_grad()
    return Comparison(outputs, gradients)
