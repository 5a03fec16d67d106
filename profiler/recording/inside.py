"""What units do with tensors: what they make, what its numbers follow from, and what they take past their arguments.

A graph of units holds what goes in and out of them. A tensor that reaches a unit in another way, by an object that two
units hold or by a reference to another module, is missing in it: in a pipeline, the unit would find an old one or none.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import replace
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from shardwright.profiler.recording.structure import tensors_in, tensors_of
from shardwright.profiler.recording.unitgraph import Step
from shardwright.profiler.recording.writer import GraphWriter, Sources

__all__ = ["READS_BACK", "UnitWatcher", "follows", "tensors_of_modules"]

READS_BACK = frozenset(
    {"item", "tolist", "numpy", "equal", "allclose", "is_nonzero", "__array__", "__bool__", "__int__", "__float__"}
    | {"__index__", "__complex__", "__contains__"}
)
"""Tensor functions that give Python a number."""
SHAPES_ONLY = frozenset(
    {"zeros_like", "ones_like", "empty_like", "full_like", "new_zeros", "new_ones", "new_empty", "new_full"}
    | {"rand_like", "randn_like"}
)
"""Functions that look at their operand's shape, not at its numbers."""
RANDOM = frozenset(
    {"rand", "randn", "randint", "randperm", "rand_like", "randn_like", "randint_like", "bernoulli", "multinomial"}
    | {"normal", "dropout", "uniform_", "normal_", "bernoulli_", "random_", "exponential_"}
)


def follows(func: Any, operands: Iterable[Sources]) -> Sources:
    """What the numbers that ``func`` makes follow from, given what its operands' numbers follow from."""
    name = getattr(func, "__name__", "")
    chance: Sources = frozenset({"chance"} if name in RANDOM else ())
    return chance if name in SHAPES_ONLY else chance.union(*operands)


def tensors_of_modules(modules: Iterable[nn.Module]) -> list[Tensor]:
    """The parameters and buffers that these modules have themselves, not those of modules in them."""
    own = (held.values() for module in modules for held in (module._parameters, module._buffers))
    return [tensor for held in own for tensor in held if tensor is not None]


class _Made(NamedTuple):
    """Where a tensor was made, inside of a unit."""

    unit: str
    sources: Sources


class UnitWatcher(GraphWriter):
    """A graph in the making that knows what goes on inside units, as far as torch functions tell."""

    def __init__(self, model: nn.Module, units: dict[str, nn.Module], *, train: bool) -> None:
        super().__init__(model, units, train=train)
        self.current: Step | None = None
        self.astray = False  # whether the unit that runs has called others, which have their own parameters
        self.inside: Any = WeakTensorKeyDictionary()
        # What the unit that runs may read: its arguments, and what it and the modules among them hold; by identity, and
        # alive as long as the call.
        self.handed: dict[int, Tensor] = {}
        self.hook_ids: set[int] = set()  # of the hooks that watch units
        self.reads_numbers = False
        self.told: Sources = frozenset()  # what the numbers follow from that it has read back to Python

    def _enter_unit(self, step: Step, arguments: Iterable[Tensor], modules: Iterable[nn.Module]) -> None:
        """``step``, a call of a unit with ``arguments``, begins; ``modules`` are all that it may call."""
        self.handed = {id(t): t for t in (*tensors_of_modules(modules), *arguments)}
        self.told = frozenset()
        self.astray = False
        self.current = step

    def _called_inside(self, func: Any, args: Any, kwargs: dict[str, Any], result: Any) -> None:
        """Note what a function that ran inside a step read and made."""
        step = self.current
        if step is None:
            return
        name = getattr(func, "__name__", "")
        made = tensors_of(result)
        if not made and name != "__setitem__" and name not in READS_BACK:
            return  # a query: a size, a dtype
        read = tensors_of((args, kwargs))
        if name == "__setitem__":
            made = read[:1]
        if name.endswith("_"):  # what a view shows has changed with it
            made += [tensor._base for tensor in made if tensor._base is not None]
        if step.kind == "unit" and not self.astray:
            for tensor in read:
                self._note_read(tensor, step)
        sources = follows(func, map(self._sources_of, read)) | self.told
        if not made:
            self.told = sources
            self.reads_numbers = True
        for tensor in made:
            self.inside[tensor] = _Made(step.unit, sources)

    def _note_read(self, tensor: Tensor, step: Step) -> None:
        """Note a tensor that a unit reads though it was not handed to it."""
        if id(tensor) in self.handed:
            return
        maker = self.inside.get(tensor)
        if maker is not None and maker.unit == step.unit:
            return
        told = f"{step.site} calls {step.unit}, which"
        owner = self.parameters.get(id(tensor)) or self.buffers.get(id(tensor))
        if owner is not None:
            self._obstacle(f"{told} reads {owner} of another module")
            self._read(tensor, step)
            made_by = self.values[self.name_of[id(tensor)]].producer
        elif self._sources_of(tensor):
            name = self.name_of.get(id(tensor))
            made_by = self.values[name].producer if name else self._last_call(maker.unit) if maker else ""
            if made_by:
                self._obstacle(f"{told} reads a tensor of {made_by} that is not among its arguments")
        else:
            return  # a table that follows from shapes, which it would make itself
        if id(tensor) in self.parameters or not made_by:  # a parameter may be lent to another device
            return
        if step.name not in (reader for _, reader in self.neighbours):
            self._keep_as_it_is(step)
        self.neighbours.append((made_by, step.name))

    def _keep_as_it_is(self, step: Step) -> None:
        """Have ``step`` call its unit as it is now, with what others have left on it, so that it can run alone.

        Its parameters and buffers stay the model's own.
        """
        unit = self.units[step.unit]
        hanging = [t for module in unit.modules() for _, t in tensors_in(vars(module))]
        memo: dict[int, Any] = {id(t): t.detach() for t in hanging}
        memo |= {id(t): t for t in (*self.model.parameters(), *self.model.buffers())} | {id(self): self}
        try:
            alone = copy.deepcopy(unit, memo)
        except Exception:  # what cannot be copied is called as it will be found
            return
        for module in alone.modules():
            for hooks in (module._forward_pre_hooks, module._forward_hooks):
                for key in self.hook_ids & hooks.keys():
                    del hooks[key]
            for flags in (module._forward_pre_hooks_with_kwargs, module._forward_hooks_with_kwargs):
                for key in self.hook_ids & flags.keys():
                    del flags[key]
        if step.call is not None:
            step.call = replace(step.call, function=alone)

    def _last_call(self, unit: str) -> str:
        return next((step.name for step in reversed(self.steps) if step.kind == "unit" and step.unit == unit), "")

    def _sources_of(self, tensor: Tensor) -> Sources:
        """What the numbers of ``tensor`` follow from, wherever it was made."""
        name, maker = self.name_of.get(id(tensor)), self.inside.get(tensor)
        sources: Sources = frozenset() if name is None else self.sources[name]
        if maker is not None:
            sources |= maker.sources
        if id(tensor) in self.parameters:
            sources |= {"parameters"}
        if id(tensor) in self.buffers:
            sources |= {"buffers"}
        return sources | {"inputs"} if tensor.grad_fn is not None and name is None and maker is None else sources
