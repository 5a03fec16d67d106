"""The workers of a run: they hold one pipeline or several, and the whole model, and take steps with one at a time.

Every worker is in one group; a pipeline's stages have a group of their own where they are not all of them in order. So
pipelines of other plans, over other devices or in another order, stand beside each other and never mix.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from shardwright.profiler.campaign import START_LIMIT_S
from shardwright.profiler.devices import available_cores, free_host_bytes
from shardwright.profiler.links import join
from shardwright.profiler.measure import prepare
from shardwright.profiler.measuring.pace import pace_now
from shardwright.profiler.profile import Device
from shardwright.profiler.recording.inputs import is_batched, outputs_of
from shardwright.profiler.recording.unitgraph import UnitGraph
from shardwright.profiler.workers.pool import Pool
from shardwright.sharder.planning.plan import Plan
from shardwright.sharder.runtime.accounts import Noted
from shardwright.sharder.runtime.check import units_of
from shardwright.sharder.runtime.pipeline import (
    Comparison,
    Job,
    check_stage,
    check_whole,
    free_bytes,
    hold_stages,
    hold_whole,
    note_stage,
    observe_stage,
    release_stages,
    release_whole,
    step_stage,
    step_whole,
    weigh_stage,
)
from shardwright.sharder.runtime.piping.cut import StageProgram
from shardwright.sharder.runtime.piping.engine import shared_parameters
from shardwright.sharder.runtime.piping.hosted import backend_of, is_hosted
from shardwright.sharder.runtime.piping.observing import Drawing, Seen

__all__ = ["COPIES", "Session", "Split", "job_of", "steps_in_row"]

LONG_S = 0.5
"""Steps of so many seconds hardly feel that their core waited before."""
MOST_IN_ROW = 4
HOST_LIMIT_S = 1800.0
"""What fits on no device is computed on the host once, which may take long."""

COPIES = 3
"""Of what goes to another process: as it is sent, as it arrives, and at work."""


@dataclass(frozen=True)
class Split:
    """A plan that is run as a pipeline."""

    name: str
    plan: Plan
    programs: Sequence[StageProgram]
    """Of its stages."""
    output_places: tuple[int, ...]
    capture: UnitGraph | None = None
    """What the programs were cut from; None where nothing is to be compared unit by unit."""


class Session:
    """The workers of a run.

    Args:
        pool: of ``devices``.
        splits: all that may be held.
        limit_s: seconds after which a worker that does not answer counts as hung.
    """

    def __init__(
        self,
        pool: Pool,
        model: nn.Module,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        splits: Sequence[Split],
        limit_s: float,
    ) -> None:
        self.pool, self.model, self.args, self.kwargs, self.limit_s = pool, model, args, dict(kwargs), limit_s
        names = dict.fromkeys(device for split in splits for device in split.plan.devices)
        self.ranks = {device: rank for rank, device in enumerate(names)}
        self.backend = backend_of(names)

    def begin(self, devices: Sequence[Device], store: str) -> None:
        """Wait for the workers and have those of pipelines meet over the file ``store``."""
        ready = {d.name: (prepare, (d.name, max(1, len(d.cores)))) for d in devices}
        self.pool.call(ready, limit_s=START_LIMIT_S, loading=True)
        # Who does not answer is ended by the pool, and takes its connections along: no message ends a run before.
        group = len(self.ranks), store, self.backend, HOST_LIMIT_S
        joining = {d: (join, (rank, *group)) for d, rank in self.ranks.items()}
        self.pool.call(joining, limit_s=self.limit_s)

    def hold(self, split: Split) -> None:
        """Give the stages of ``split`` to their workers."""
        ranks = tuple(self.ranks[device] for device in split.plan.devices)
        plan = split.plan
        given = outputs_of((self.args, self.kwargs))
        job = job_of(plan, self.model, split.output_places, split.name, ranks)
        backend = backend_of(plan.devices)
        job = replace(
            job,
            divided=tuple(is_batched(t, plan.batch) for t in given),
            hosted=is_hosted(plan),
            backend=backend if backend != self.backend else None,
        )
        calls: dict[str, Any] = dict.fromkeys(self.ranks, (hold_stages, (job, (), ())))  # a group is made by all
        for number, devices in enumerate(plan.pipelines):
            inputs = tuple(_part_of(t, plan, number) for t in given)
            for position, device in enumerate(devices):
                programs = split.programs[position :: plan.depth]
                calls[device] = hold_stages, (job, programs, inputs if position == 0 else (), number)
        self.pool.call(calls, limit_s=START_LIMIT_S, loading=True)

    def release(self, split: Split) -> None:
        """Have its stages let go of."""
        self._all(split, release_stages)

    def check(self, split: Split) -> list[Comparison]:
        """One step without an update: what each device's stages gave, in order.

        It is the first: on GPUs kernels are loaded in it, and NCCL connects neighbours.
        """
        on_gpus = any(device.startswith("cuda") for device in split.plan.devices)
        return self._all(split, check_stage, before_s=START_LIMIT_S if on_gpus else 0.0)

    def observe(self, split: Split, wanted: frozenset[str], *, gradients: bool) -> list[tuple[Seen, Drawing]]:
        """Another such step: what the ``wanted`` steps of the forward make on each device, or the gradients of that,
        and which steps draw random numbers."""
        calls = dict.fromkeys(split.plan.devices, (observe_stage, (split.name, wanted, gradients)))
        found = self.pool.call(calls, limit_s=HOST_LIMIT_S)
        return [found[device] for device in split.plan.devices]

    def step(self, split: Split) -> float:
        """Seconds of one step, until the last device has done it; see :func:`steps_in_row`."""
        count = steps_in_row(split.plan.predicted.step_s)
        found = self._all(split, step_stage, count, steps=count)
        return _of_row([max(each) for each in zip(*found, strict=True)])

    def note(self, split: Split) -> list[Noted]:
        """One step, and what each device was at when."""
        warm = steps_in_row(split.plan.predicted.step_s) > 1
        return self._all(split, note_stage, warm, steps=1 + warm)

    def weigh(self, split: Split) -> list[int]:
        """One step, and the peak bytes of each device in it."""
        return self._all(split, weigh_stage)

    def paces(self, devices: Collection[str]) -> dict[str, float]:
        """The pace of each of ``devices``, all at once, as in the profile: one whose neighbours rest is faster."""
        calls: dict[str, Any] = {d: (pace_now, ()) for d in devices if d in self.pool.workers}
        return self.pool.call(calls, limit_s=self.limit_s) if calls else {}

    def room(self) -> dict[str, int]:
        """Free bytes of each device; CPU workers share the host's."""
        return self.pool.call(dict.fromkeys(self.pool.workers, (free_bytes, ())), limit_s=self.limit_s)

    def hold_whole(self, device: str, microbatches: int, output_places: tuple[int, ...], plan: Plan) -> None:
        """Give the whole model to one worker, to be run in so many micro-batches."""
        whole = hold_whole, (self._whole_job(microbatches, output_places, plan), self.model, self.args, self.kwargs)
        self.pool.call({device: whole}, limit_s=START_LIMIT_S, loading=True)

    def check_whole(self, device: str) -> Comparison:
        """One step of it without an update."""
        found: Comparison = self.pool.call({device: (check_whole, ())}, limit_s=self.limit_s)[device]
        return found

    def host_bytes(self, plan: Plan) -> tuple[int, int]:
        """What it takes to compute the whole model in a process of its own, in training with its gradients; what the
        host has free."""
        tensors = {id(t): t for t in (*self.model.parameters(), *self.model.buffers())}.values()
        needed = COPIES * sum(t.nbytes * (1 + (plan.train and t.requires_grad)) for t in tensors)
        return needed, free_host_bytes()

    def check_on_host(self, microbatches: int, output_places: tuple[int, ...], plan: Plan) -> Comparison:
        """One step of the whole model without an update, by all processors in a process of its own that then ends."""
        job = self._whole_job(microbatches, output_places, plan)
        with self.reference(None) as call:
            call(hold_whole, job, self.model, self.args, self.kwargs)
            found: Comparison = call(check_whole)
        return found

    @contextmanager
    def reference(self, device: str | None) -> Iterator[Callable[..., Any]]:
        """What calls a function where the unsharded model is computed: in the worker of ``device``, which lets go of
        the whole model, or by all processors in a process of its own that then ends."""
        if device is not None:
            self.pool.call({device: (release_whole, ())}, limit_s=self.limit_s)
            yield _calling(self.pool, device)
            return
        cores = tuple(available_cores())
        host = Device(
            name="host", kind="cpu", description="all processors", memory_bytes=free_host_bytes(), cores=cores
        )
        with Pool([host]) as pool:
            pool.call({host.name: (prepare, (host.name, len(cores)))}, limit_s=START_LIMIT_S, loading=True)
            yield _calling(pool, host.name)

    def _whole_job(self, microbatches: int, output_places: tuple[int, ...], plan: Plan) -> Job:
        units = tuple(units_of(plan, self.model))
        return Job("", microbatches, 1, plan.batch, plan.train, plan.optimizer, output_places, units=units)

    def step_whole(self, device: str, expected_s: float | None = None) -> float:
        """Seconds of one step of it, which is expected to take so many."""
        count = steps_in_row(expected_s) if expected_s is not None else 1
        return _of_row(self.pool.call({device: (step_whole, (count,))}, limit_s=count * self.limit_s)[device])

    def _all(self, split: Split, function: Any, *args: Any, steps: int = 1, before_s: float = 0.0) -> list[Any]:
        """The results of all its devices, in order.

        Args:
            steps: how many steps ``function`` takes.
            before_s: how long what comes before the first may take.
        """
        calls = {device: (partial(function, split.name), args) for device in split.plan.devices}
        found = self.pool.call(calls, limit_s=before_s + steps * self.limit_s)
        return [found[device] for device in split.plan.devices]


def steps_in_row(expected_s: float) -> int:
    """How many steps, expected to take so long, are taken in a row to time one.

    A core that has waited for its turn is slow at first: of two cores of a virtual machine, by a fifth to a third for
    some hundredths of a second. A training loop does not wait between its steps. So short steps come in a row, of
    which the first does not count.
    """
    return 1 if expected_s >= LONG_S else min(MOST_IN_ROW, 1 + math.ceil(LONG_S / max(expected_s, 1e-9) / 2))


def _of_row(seconds: Sequence[float]) -> float:
    """The seconds of one step, from those of a row."""
    return float(statistics.fmean(seconds[1:] or seconds))


def _calling(pool: Pool, device: str) -> Callable[..., Any]:
    def call(function: Callable[..., Any], *args: Any) -> Any:
        return pool.call({device: (function, args)}, limit_s=HOST_LIMIT_S, loading=True)[device]

    return call


def job_of(
    plan: Plan, model: nn.Module, output_places: tuple[int, ...], name: str = "plan", ranks: tuple[int, ...] = ()
) -> Job:
    """The job of the stages of ``plan``; ``ranks`` are those of its devices among the workers, by default in order."""
    return Job(
        plan.schedule,
        plan.pipeline_microbatches,
        len(plan.stages),
        plan.batch // plan.replicas,
        plan.train,
        plan.optimizer,
        output_places,
        shared_parameters(plan, model),
        name=name,
        ranks=ranks or tuple(range(len(plan.devices))),
        replicas=plan.replicas,
    )


def _part_of(tensor: Tensor, plan: Plan, replica: int) -> Tensor:
    """The samples of one replica, without the memory of the others'; what is not divided goes to each whole."""
    if plan.replicas == 1 or not is_batched(tensor, plan.batch):
        return tensor
    return tensor.tensor_split(plan.replicas)[replica].clone(memory_format=torch.contiguous_format)
