"""The whole model a unit at a time: for a comparison where there is no room for all of its weights and gradients.

The captured forward is computed unit by unit, all micro-batches of one before the next. A unit's weights are there for
its own call only, and no graph of autograd is kept inside of it. In the backward it is computed anew from what it was
given, as activation checkpointing does (Chen et al., "Training deep nets with sublinear memory cost", 2016); the glue
between units keeps its graph. So there has to be room for the largest unit and for what passes between units, and what
comes out is the model's outputs, and the gradients of one unit after another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from shardwright.errors import ShardwrightError
from shardwright.profiler.recording.inputs import all_microbatches, outputs_of
from shardwright.profiler.recording.structure import map_tensors
from shardwright.profiler.recording.unitgraph import mean_square_loss
from shardwright.profiler.workers.worker import resident
from shardwright.sharder.runtime.gates.resting import dropout_resting, full_precision
from shardwright.sharder.runtime.piping.cut import Instruction, Reference, StageProgram, mapped_arguments, on_device
from shardwright.sharder.runtime.piping.observing import direct, hands_on

__all__ = [
    "Modules",
    "Values",
    "begin_stream",
    "end_stream",
    "references",
    "stream_backward",
    "stream_forward",
    "stream_glue",
    "stream_gradients",
    "stream_outputs",
]

Modules = Mapping[str, nn.Module]
"""What one step calls, by name in the model."""
Values = dict[tuple[str, int], list[Tensor]]
"""Tensors of a step, by its name and the number of the micro-batch, on the CPU."""


@dataclass
class _Call:
    """A call of modules for one micro-batch, as the backward needs it."""

    given: list[Tensor]
    """What the glue handed to it: its gradients go on from there."""
    kept: Any
    """Arguments to compute it anew with."""
    made: list[Tensor]
    """Its results, whose gradients come together there."""


@dataclass(frozen=True)
class _Module:
    """Stands for a module that is handed to a function, or to another."""

    path: str


class _Stream:
    """The forward and backward of a batch in pieces.

    Args:
        program: of the whole forward; its attributes are those of the glue alone.
        inputs: of the model, all that the batch has.
        noting: whether the gradients of all that steps make are kept until they are asked for.
    """

    def __init__(
        self,
        program: StageProgram,
        inputs: tuple[Tensor, ...],
        microbatches: int,
        device: torch.device,
        *,
        train: bool,
        noting: bool,
    ) -> None:
        self.program, self.device, self.train, self.noting = program, device, train, noting
        self.attributes = {name: _brought(value, device) for name, value in program.attributes.items()}
        here = tuple(t.detach().to(device) for t in inputs)
        given = [each for each, _ in all_microbatches(here, {}, microbatches)]
        names = [shape.name for shape in program.inputs]
        self.pieces: list[dict[str, Any]] = [dict(zip(names, piece, strict=True)) for piece in given]
        self.calls: dict[int, list[_Call]] = {}
        self.last_use = {name: n for n, each in enumerate(program.instructions) for name in references(each)}
        self.gradients: dict[tuple[str, int], dict[int, Tensor]] = {}

    @contextmanager
    def computing(self, modules: Modules) -> Iterator[dict[str, nn.Module]]:
        """``modules`` on the device and as the gate has them."""
        here = {name: module.to(self.device).train(self.train) for name, module in modules.items()}
        with (
            dropout_resting(list(here.values())),
            full_precision(self.device),
            torch.set_grad_enabled(self.train),
        ):
            yield here

    def forward(self, start: int, end: int, modules: Modules, wanted: frozenset[str]) -> Values:
        """Compute the instructions from ``start`` to ``end``, of which the last may call ``modules``; what the
        ``wanted`` ones make."""
        notes: Values = {}
        with self.computing(modules) as here:
            for number, piece in enumerate(self.pieces):
                for position in range(start, end):
                    instruction = self.program.instructions[position]
                    if instruction.op != "output":
                        self._compute(position, instruction, piece, here if position == end - 1 else {}, number)
                        if instruction.name in wanted:
                            made = outputs_of(piece.get(instruction.name))
                            notes[instruction.name, number] = [t.detach().cpu().clone() for t in made]
                    for name in references(instruction) if instruction.op != "output" else ():
                        if self.last_use[name] == position:
                            piece.pop(name, None)
        return notes

    def _compute(
        self, position: int, instruction: Instruction, piece: dict[str, Any], modules: Modules, number: int
    ) -> None:
        if instruction.op == "placeholder":
            return
        if instruction.op == "get_attr":
            target = str(instruction.target)
            piece[instruction.name] = self.attributes.get(target, _Module(target))
            return
        arguments = self._arguments(instruction, piece)
        given = direct(*arguments)
        if modules:
            made = self._call_apart(position, instruction, arguments, modules, piece)
        else:
            made = _called(instruction, arguments, modules)
        piece[instruction.name] = made
        if self.noting and self.train:
            for index, tensor in enumerate(outputs_of(made)):
                if tensor.requires_grad and not hands_on(tensor, given):
                    tensor.register_hook(partial(self._sum, instruction.name, number, index))

    def _arguments(self, instruction: Instruction, piece: dict[str, Any]) -> Any:
        def resolve(leaf: Any) -> Any:
            return piece[leaf.name] if isinstance(leaf, Reference) else on_device(leaf, self.device)

        return mapped_arguments(instruction.args, resolve), mapped_arguments(instruction.kwargs, resolve)

    def _call_apart(
        self, position: int, instruction: Instruction, arguments: Any, modules: Modules, piece: dict[str, Any]
    ) -> Any:
        """Call modules on tensors of their own, and cut the graph before and behind them."""
        read = outputs_of(arguments)
        # What is read may be changed in place afterwards: the graph goes on from a copy.
        apart, given = _each(lambda t: t.clone(), arguments)
        kept, _ = _each(_detached, apart)
        fed, _ = _fed(kept)
        passed = outputs_of(fed)
        versions = [t._version for t in passed]
        result, made = _each(_detached, _called(instruction, fed, modules))
        changed = [t for t, now, version in zip(read, passed, versions, strict=True) if now._version != version]
        if changed:
            self._refuse_change(position, modules, changed, piece)
        if self.train:
            self.calls.setdefault(position, []).append(_Call(given, kept, made))
        # Copies, for a leaf cannot be changed in place.
        return map_tensors(lambda t: t.clone() if t.requires_grad else t, result)

    def _refuse_change(self, position: int, modules: Modules, tensors: list[Tensor], piece: dict[str, Any]) -> None:
        """Refuse modules that change ``tensors``, which later steps read: here they change copies."""
        changed = {t.untyped_storage().data_ptr() for t in tensors if t.layout == torch.strided}
        for name, value in piece.items():
            later = outputs_of(value) if self.last_use.get(name, -1) > position else []
            if any(t.layout == torch.strided and t.untyped_storage().data_ptr() in changed for t in later):
                raise ShardwrightError(
                    f"{' and '.join(modules)} changes in place what it is given, and others read that too, so it "
                    "cannot be computed apart from them; let it return what it makes"
                )

    def _sum(self, name: str, number: int, index: int, gradient: Tensor) -> None:
        """A gradient comes in as many parts as the tensor has readers, through different units."""
        found = self.gradients.setdefault((name, number), {})
        found[index] = gradient.detach().clone() if index not in found else found[index] + gradient

    def outputs(self) -> list[Tensor]:
        """The model's, of one micro-batch after another; in training the loss's backward begins."""
        output = self.program.instructions[-1]
        found: list[Tensor] = []
        for piece in self.pieces:
            tensors = [piece[reference.name] for reference in output.args[0]]
            found += [t.detach().cpu().clone() for t in tensors]
            if self.train:
                with torch.enable_grad():
                    loss = mean_square_loss(tensors) / len(self.pieces)
                    torch.autograd.backward([loss], retain_graph=True)
            piece.clear()
        return found

    def backward(self, position: int, modules: Modules) -> dict[tuple[str, str], Tensor]:
        """Take the gradients back through the call at ``position``; those of its parameters, on the CPU."""
        with self.computing(modules) as here:
            for call in self.calls.pop(position, ()):
                self._call_back(self.program.instructions[position], call, here)
        found: dict[int, tuple[tuple[str, str], Tensor]] = {}  # once, where one module holds another
        for path, module in here.items():
            for name, parameter in module.named_parameters():
                if parameter.grad is not None:
                    found.setdefault(id(parameter), ((path, name), parameter.grad.cpu()))
        return dict(found.values())

    def _call_back(self, instruction: Instruction, call: _Call, modules: Modules) -> None:
        if all(t.grad is None for t in call.made):
            return
        fed, leaves = _fed(call.kept)
        _, made = _each(lambda t: t, _called(instruction, fed, modules))
        known = [(t, leaf.grad) for t, leaf in zip(made, call.made, strict=True) if leaf.grad is not None]
        torch.autograd.backward([t for t, _ in known], [g for _, g in known])
        back = [(t, leaf.grad) for t, leaf in zip(call.given, leaves, strict=True) if leaf.grad is not None]
        if back:  # glue is gone through once more for each unit that reads from it
            torch.autograd.backward([t for t, _ in back], [g for _, g in back], retain_graph=True)


def _called(instruction: Instruction, arguments: Any, modules: Modules) -> Any:
    args, kwargs = pytree.tree_map(lambda it: modules[it.path] if isinstance(it, _Module) else it, arguments)
    if instruction.op == "call_module":
        return modules[str(instruction.target)](*args, **kwargs)
    if instruction.op == "call_method":
        return getattr(args[0], str(instruction.target))(*args[1:], **kwargs)
    assert not isinstance(instruction.target, str)  # a function
    return instruction.target(*args, **kwargs)


def _each(function: Callable[[Tensor], Tensor], value: Any) -> tuple[Any, list[Tensor]]:
    """``value`` with ``function`` applied to its tensors, and these in their order; one that comes twice is one."""
    found: dict[int, tuple[Tensor, Tensor]] = {}

    def mapped(tensor: Tensor) -> Tensor:
        if id(tensor) not in found:
            found[id(tensor)] = tensor, function(tensor)
        return found[id(tensor)][1]

    return map_tensors(mapped, value), [made for _, made in found.values()]


def _detached(tensor: Tensor) -> Tensor:
    return tensor.detach().requires_grad_(tensor.requires_grad)


def _fed(kept: Any) -> tuple[Any, list[Tensor]]:
    """Arguments for one call, which may change them, and the leaves where their gradients come together."""
    fresh, leaves = _each(_detached, kept)
    return _each(lambda t: t.clone(), fresh)[0], leaves


def _brought(value: Any, device: torch.device) -> Any:
    if isinstance(value, nn.Parameter):
        return nn.Parameter(value.detach().to(device).clone(), requires_grad=value.requires_grad)
    return value.to(device) if isinstance(value, Tensor) else value


def references(instruction: Instruction) -> list[str]:
    """The names of what ``instruction`` reads, in order."""
    names: dict[str, None] = {}

    def note(leaf: Any) -> Any:
        if isinstance(leaf, Reference):
            names[leaf.name] = None
        return leaf

    mapped_arguments((instruction.args, instruction.kwargs), note)
    return list(names)


def begin_stream(
    program: StageProgram, inputs: tuple[Tensor, ...], microbatches: int, train: bool, noting: bool
) -> None:
    """Make ready, in a worker, to compute ``program`` a unit at a time."""
    resident["stream"] = _Stream(program, inputs, microbatches, resident["device"], train=train, noting=noting)


def stream_forward(start: int, end: int, modules: Modules, wanted: frozenset[str]) -> Values:
    """See :meth:`_Stream.forward`."""
    stream: _Stream = resident["stream"]
    return stream.forward(start, end, modules, wanted)


def stream_outputs() -> list[Tensor]:
    """See :meth:`_Stream.outputs`."""
    stream: _Stream = resident["stream"]
    return stream.outputs()


def stream_backward(position: int, modules: Modules) -> dict[tuple[str, str], Tensor]:
    """See :meth:`_Stream.backward`."""
    stream: _Stream = resident["stream"]
    return stream.backward(position, modules)


def stream_gradients(names: frozenset[str]) -> dict[tuple[str, int], dict[int, Tensor]]:
    """The gradients of what the steps ``names`` make, by which of their tensors, on the CPU; they are given once."""
    stream: _Stream = resident["stream"]
    keys = [key for key in stream.gradients if key[0] in names]
    return {key: {index: t.cpu() for index, t in stream.gradients.pop(key).items()} for key in keys}


def stream_glue() -> dict[str, Tensor]:
    """The gradients of parameters that the glue itself reads, by name in the model, on the CPU."""
    attributes = (resident["stream"]).attributes.items()
    return {name: p.grad.cpu() for name, p in attributes if isinstance(p, nn.Parameter) and p.grad is not None}


def end_stream() -> None:
    """Let go of it."""
    resident.pop("stream", None)
