"""Pipelining in one process: a placed model whose call divides the batch, so that its devices work at the same time.

``place(model, plan, microbatches=8)`` replaces the forward of this one model (not of its class), and ``unplace`` gives
it back. A call takes the whole batch and returns the whole batch's outputs; the caller's ``loss.backward()`` goes
through the stages likewise. The model is captured at micro-batch size when it is first called with inputs of a shape,
in a mode (training, gradients, autocast), and when attributes have changed that its forward may go by
(:mod:`shardwright.sharder.runtime.local.baked`); what the capture gives is held against the model then. What cannot be
divided evenly, and calls under modes of the caller's that its threads do not have, run the placed forward, one device
after the other.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import _get_current_function_mode_stack
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _get_current_dispatch_mode

from shardwright.errors import ShardwrightError
from shardwright.profiler.devices import available_cores, share_cores
from shardwright.profiler.recording.inputs import is_batched
from shardwright.profiler.recording.placed import placement_hooks
from shardwright.profiler.recording.structure import filled, tensors_in
from shardwright.sharder.planning.plan import Plan
from shardwright.sharder.runtime.check import check_plan_can_be_piped, written_in_words
from shardwright.sharder.runtime.local.baked import baked, changed_name, tree_of
from shardwright.sharder.runtime.local.flight import Flight, through
from shardwright.sharder.runtime.local.prepare import Program, prepared
from shardwright.sharder.runtime.local.threads import Seat, StageThreads
from shardwright.sharder.runtime.placing.align import AlignGlue
from shardwright.sharder.runtime.placing.forwards import InstanceForward
from shardwright.sharder.runtime.placing.relocate import relocate, tensors_of

__all__ = ["PipelinedForward", "check_threads", "pipe"]

OFTEN = 5
"""So many captures for changed attributes, and a warning names the last one."""
MOST_PROGRAMS = 16
"""So many captures are kept; the one that was made first goes first."""
_PLAIN = (str, bytes, int, float, complex, bool, type(None), torch.dtype, torch.device)


def check_threads(plan: Plan, homes: Mapping[str, torch.device], microbatches: int) -> None:
    """Refuse what threads of one process cannot pipeline.

    Raises:
        ShardwrightError: the number of micro-batches, the model or a device.
    """
    if isinstance(microbatches, bool) or not isinstance(microbatches, int) or microbatches < 1:
        raise ShardwrightError(f"{microbatches!r} micro-batches hold nothing; use 1 or more, or None for no pipeline")
    check_plan_can_be_piped(plan)
    other = next((name for name, home in homes.items() if home.type not in ("cpu", "cuda")), None)
    if other is not None:
        raise ShardwrightError(
            f"{other} is placed on {homes[other]}, and a pipeline of threads is for CPU workers and CUDA devices: "
            "place it there, or without microbatches"
        )


def pipe(
    model: nn.Module, plan: Plan, homes: Mapping[str, torch.device], origins: Mapping[str, torch.device], count: int
) -> None:
    """Have calls of ``model``, which is placed already, divide the batch into ``count`` micro-batches.

    Args:
        homes: plan device -> torch device, in the order of the stages.
        origins: where each parameter and buffer was before it was placed, by name.
    """
    PipelinedForward(model, plan, dict(homes), dict(origins), count).put()


class PipelinedForward(InstanceForward):
    """The forward of one pipelined model. A copy of it, and one that was pickled, begins without threads."""

    def __init__(
        self,
        model: nn.Module,
        plan: Plan,
        homes: dict[str, torch.device],
        origins: dict[str, torch.device],
        count: int,
    ) -> None:
        super().__init__(model)
        self.plan, self.homes, self.origins, self.count = plan, homes, origins, count
        self._tree = tree_of(path for path in plan.placement() if path)
        self._begin()

    def _begin(self) -> None:
        self.threads: StageThreads | None = None
        self.programs: dict[Any, Program] = {}
        self.busy = threading.RLock()
        self.capturing = False
        self.warned: set[str] = set()
        self.captured_anew = 0

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__()
        for name in ("threads", "programs", "busy", "capturing", "warned", "captured_anew"):
            del state[name]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._begin()

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the whole batch through the pipeline."""
        with self.busy:  # callers take turns: a capture would record what others call
            given = None if self.passes or self.capturing or _under_modes() else _Given.of(args, kwargs, self.count)
            if given is None:
                return self.plain(*args, **kwargs)
            program, threads = self._program(given, args, kwargs)
            flight = Flight(program.stages, threads, given.tensors, given.batch, self.count)
            outputs = through(flight, given.tensors)
        return filled(program.template, outputs)

    def _program(self, given: _Given, args: Any, kwargs: Any) -> tuple[Program, StageThreads]:
        """What was captured for such inputs in this mode, captured now if need be."""
        training = tuple([module.training for module in self.module.modules()])
        attributes = baked(self.module, self._tree)
        key = (given.key, _modes(), training, attributes)
        if key not in self.programs:
            self._tell_of_captures(key)
            with self._as_it_was() as brought:
                moved = (args, kwargs) if brought is None else pytree.tree_map_only(Tensor, brought, (args, kwargs))
                program = prepared(self.module, self.plan, self.homes, *moved, count=self.count)
            while len(self.programs) >= MOST_PROGRAMS:
                del self.programs[next(iter(self.programs))]
            self.programs[key] = program
            self._warn(program)
        if self.threads is None or not self.threads.are_here():
            self.threads = StageThreads(_seats(self.plan, self.homes))
        return self.programs[key], self.threads

    def _tell_of_captures(self, key: tuple[Any, ...]) -> None:
        """Warn where the model is captured again and again for what has changed on it."""
        alike = [known for known in self.programs if known[:-1] == key[:-1]]
        self.captured_anew += bool(alike)
        if alike and self.captured_anew == OFTEN:
            warnings.warn(
                f"{changed_name(alike[-1][-1], key[-1])} has changed, and so the model was captured anew, for the "
                f"{OFTEN}th time: what changes often and does not decide the forward, keep elsewhere than on the model",
                stacklevel=6,
            )

    def _warn(self, program: Program) -> None:
        """Say once what is done for each micro-batch, and would be done once for the whole batch."""
        norms = any(isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training for m in self.module.modules())
        said = [
            f"batch normalisation sees each of the {self.count} micro-batches by itself, not the whole batch" * norms,
            written_in_words(program.changes, self.count),
        ]
        new = [each for each in said if each and each not in self.warned] if self.count > 1 else []
        if new:
            self.warned |= {*new}
            warnings.warn("; ".join(new), stacklevel=6)

    @contextmanager
    def _as_it_was(self) -> Iterator[Callable[[Tensor], Tensor] | None]:
        """The model without its placement for a while; what brings inputs to it, if it is elsewhere then."""
        model = self.module
        marked = list(placement_hooks(model))
        kept = [(hooks, dict(hooks)) for _, hooks, _ in marked]
        others = [hook for hook in (hooks.pop(key) for _, hooks, key in marked) if isinstance(hook, InstanceForward)]
        others = [hook for hook in others if hook is not self and not hook.passes]
        for hook in others:
            hook.passes = True
        self.capturing = True
        homes = {name: tensor.device for name, tensor in tensors_of(model)}
        elsewhere = any(self.origins.get(name, home) != home for name, home in homes.items())
        try:
            if elsewhere:
                relocate(model, {id(t): self.origins.get(name, t.device) for name, t in tensors_of(model)})
            origin = next(iter(self.origins.values()), torch.device("cpu"))
            yield (lambda tensor: tensor.detach().to(origin)) if elsewhere else None
        finally:
            if elsewhere:
                relocate(model, {id(t): homes.get(name, t.device) for name, t in tensors_of(model)})
            self.capturing = False
            for hook in others:
                hook.passes = False
            for hooks, content in kept:
                hooks.clear()
                hooks.update(content)

    def remove(self) -> None:
        """Give the model its own forward back, and end the threads."""
        super().remove()
        self.end()

    def end(self) -> None:
        """End the threads."""
        with self.busy:
            threads, self.threads = self.threads, None
            self.programs.clear()
        if threads is not None:
            threads.end()


class _Given(NamedTuple):
    """The inputs of a call."""

    key: Any
    """What the capture depends on: shapes and kinds of tensors, and all other values."""
    tensors: list[Tensor]
    batch: int

    @classmethod
    def of(cls, args: Any, kwargs: Any, count: int) -> _Given | None:
        """None where they cannot be divided into ``count`` micro-batches, or hold what may be changed by the call."""
        leaves, spec = pytree.tree_flatten((args, kwargs))
        tensors = [tensor for _, tensor in tensors_in((args, kwargs))]
        shaped = next((t for t in tensors if not t.is_nested and t.dim()), None)
        if shaped is None or shaped.shape[0] % count or not shaped.shape[0]:
            return None
        if len(tensors) != sum(isinstance(leaf, Tensor) for leaf in leaves):
            return None  # an object holds some
        if not all(isinstance(leaf, (Tensor, *_PLAIN)) for leaf in leaves) or any(t.is_nested for t in tensors):
            return None
        batch = shaped.shape[0]
        key = (spec, batch, tuple([_kind(leaf, batch) for leaf in leaves]))
        try:
            hash(key)
        except TypeError:  # of a container whose class compares by value and is not hashable
            return None
        return cls(key, tensors, batch)


def _kind(leaf: Any, batch: int) -> tuple[Any, ...]:
    if isinstance(leaf, Tensor):
        return leaf.shape, leaf.dtype, leaf.layout, leaf.device.type, leaf.requires_grad, is_batched(leaf, batch)
    return type(leaf), leaf


def _modes() -> tuple[Any, ...]:
    """The caller's modes that a capture depends on."""
    autocast = [torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None for kind in ("cpu", "cuda")]
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), *autocast


def _under_modes() -> bool:
    """Whether the caller has modes that the threads do not have: transforms, counters, hooks of saved tensors."""
    return (
        any(not isinstance(mode, AlignGlue) for mode in _get_current_function_mode_stack())
        or _get_current_dispatch_mode() is not None
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
    )


def _seats(plan: Plan, homes: Mapping[str, torch.device]) -> list[Seat]:
    """A seat a stage; the cores are shared out as they were for the profile. Stages of one device share its cores."""
    cores = share_cores(plan.profiled_devices or plan.devices, available_cores())
    return [
        Seat(name, homes[name], cores.get(name, ()) if homes[name].type == "cpu" else ())
        for name in (stage.device for stage in plan.stages)
    ]
