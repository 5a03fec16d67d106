"""Stages of a pipeline in this process: what each computes on its device, with the model's own parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from shardwright.profiler.recording.callsites import functions_applied
from shardwright.profiler.recording.regions import not_reentrant
from shardwright.profiler.recording.replayed import Replayed
from shardwright.sharder.runtime.piping.cut import Reference, StageProgram, mapped_arguments, on_device
from shardwright.sharder.runtime.piping.recompute import Recomputation, Turns

__all__ = ["Border", "Gradients", "Stage"]

Gradients = tuple[Tensor | None, ...]
"""Of tensors in an order, None where there is none."""


class Border(NamedTuple):
    """Tensors, or gradients, on their way from stage to stage."""

    tensors: Gradients
    ready: torch.cuda.Event | None
    """When a GPU has made them."""


class Stage:
    """One stage of ``model`` on its device.

    Parameters and buffers that glue reads are looked up in the model for each call, so that others which have taken
    their places are found. A stage that computes ``in_turn`` does so alone among those of this process that draw random
    numbers, since one of them is computed anew with the same numbers; where units are, as the model checkpoints them
    itself, that comes in the backwards, which are then ``back_in_turn`` likewise.
    """

    def __init__(
        self,
        program: StageProgram,
        model: nn.Module,
        device: torch.device,
        *,
        in_turn: bool = False,
        back_in_turn: bool = False,
    ) -> None:
        self.device = device
        self._side: dict[torch.device, torch.cuda.Stream] = {}
        own = {name for name, _ in model.named_parameters(remove_duplicate=False)}
        own |= {name for name, _ in model.named_buffers(remove_duplicate=False)}
        self._attributes: list[Callable[[], Tensor]] = []
        graph, nodes = fx.Graph(), dict[str, fx.Node]()

        def resolve(leaf: Any) -> Any:
            return nodes[leaf.name] if isinstance(leaf, Reference) else on_device(leaf, device)

        read = [i for i in program.instructions if self._is_tensor(i.op, program.attributes.get(str(i.target)))]
        for given in (*(i for i in program.instructions if i.op == "placeholder"), *read):
            nodes[given.name] = graph.placeholder(given.name)
        for made in read:
            self._attributes.append(_getter(model, str(made.target), program.attributes[str(made.target)], own))
        for op, name, target, args, kwargs in program.instructions:
            if name not in nodes:
                arguments = mapped_arguments(args, resolve), mapped_arguments(kwargs, resolve)
                nodes[name] = graph.create_node(op, target, *arguments, name)
        graph.lint()
        units = {name: held for name, held in program.attributes.items() if not isinstance(held, Tensor)}
        self._run = Replayed(units, graph).forward  # called as a module it would cut off tracebacks
        modules = {name: module for name, module in units.items() if isinstance(module, nn.Module)}
        self._back_in_turn = back_in_turn
        # One that is computed anew takes its turn whether it draws or not.
        watched = () if program.recompute else modules.values()
        self._turns = Turns(device, shared=not program.recompute, modules=watched) if in_turn else None
        self._anew: Recomputation | None = None
        if program.recompute:
            assert self._turns is not None, "stages that are computed anew compute in turn"
            named = {str(i.target): get for i, get in zip(read, self._attributes, strict=True)}
            named = {name: get for name, get in named.items() if not isinstance(get(), nn.Parameter)}
            self._anew = Recomputation(
                f"stage {program.index} on {device}",
                modules,
                self._turns,
                lambda: {name: get() for name, get in named.items()},
            )
        self._units = tuple(modules.values())

    @staticmethod
    def _is_tensor(op: str, held: Any) -> bool:
        return op == "get_attr" and isinstance(held, Tensor)

    def trained(self) -> list[Tensor]:
        """The parameters, and what else it reads, that want a gradient now."""
        held = [*_parameters_in(self._units), *(get() for get in self._attributes)]
        return list({id(t): t for t in held if t is not None and t.requires_grad}.values())

    def __call__(self, received: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """What it makes of tensors on its device."""
        attributes = [get().to(self.device) for get in self._attributes]

        def run(*tensors: Tensor) -> tuple[Tensor, ...]:
            with functions_applied(not_reentrant):  # the backward asks for gradients of what it received
                made: tuple[Tensor, ...] = self._run(*tensors, *attributes)
            return made

        if self._anew is not None:
            anew: tuple[Tensor, ...] = self._anew(run, received)
            return anew
        if self._turns is None or not torch.is_grad_enabled():
            return run(*received)
        with self._turns.taken():
            return run(*received)

    @contextmanager
    def going_back(self) -> Iterator[None]:
        """Around a backward, in which units that are checkpointed draw their random numbers again."""
        with self._turns.kept() if self._turns is not None and self._back_in_turn else nullcontext():
            yield

    def send(self, tensors: Gradients) -> Border:
        """Note when they are made."""
        if self.device.type != "cuda":
            return Border(tensors, None)
        ready = torch.cuda.Event()
        ready.record(torch.cuda.current_stream(self.device))
        return Border(tensors, ready)

    def bring(self, border: Border) -> Gradients:
        """The tensors on this stage's device."""
        return tuple([None if t is None else self._brought(t, border.ready) for t in border.tensors])

    def _brought(self, tensor: Tensor, ready: torch.cuda.Event | None) -> Tensor:
        """``tensor`` on this device; copied beside what the GPUs compute, or it would wait for all that is queued."""
        if tensor.device == self.device:
            return tensor
        gpus = [end for end in (tensor.device, self.device) if end.type == "cuda"]
        with ExitStack() as beside:
            for gpu in gpus:
                beside.enter_context(torch.cuda.stream(self._side_stream(gpu)))
            if ready is not None:
                self._side_stream(tensor.device).wait_event(ready)
            there = tensor.to(self.device, non_blocking=len(gpus) == 2)
        if tensor.device.type == "cuda":
            tensor.record_stream(self._side_stream(tensor.device))
        if self.device.type == "cuda":
            computing = torch.cuda.current_stream(self.device)
            computing.wait_stream(self._side_stream(self.device))
            there.record_stream(computing)
        return there

    def _side_stream(self, gpu: torch.device) -> torch.cuda.Stream:
        if gpu not in self._side:
            self._side[gpu] = torch.cuda.Stream(gpu)
        return self._side[gpu]


def _parameters_in(modules: Iterable[nn.Module]) -> Iterator[Tensor | None]:
    """All that there are now: hooks may have put others in their places, and modules beside them."""
    left: list[nn.Module | None] = list(modules)
    while left:
        if (module := left.pop()) is not None:
            yield from module._parameters.values()
            left += module._modules.values()


def _getter(model: nn.Module, target: str, held: Tensor, own: set[str]) -> Callable[[], Tensor]:
    """Looks up a parameter or buffer of ``model``, which may be another tensor by then; a constant stays itself."""
    if target not in own:
        return lambda: held
    path, _, name = target.rpartition(".")
    owner = model.get_submodule(path)
    return lambda: getattr(owner, name)
