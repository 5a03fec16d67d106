"""Writing the graph of a forward: steps, the tensors that they make and read, and what follows from what.

A tensor is recognised by its identity. A parameter or buffer becomes an attribute of the graph, an unknown tensor a
constant, and an object among the arguments is made anew for every call, with its tensors in their places.
"""

from __future__ import annotations

import operator
import sys
from functools import cache
from typing import Any

import torch
from torch import Tensor, fx, nn

from shardwright.errors import ShardwrightError
from shardwright.profiler.memory import storages_of
from shardwright.profiler.recording.callsites import call_site
from shardwright.profiler.recording.inputs import is_mask
from shardwright.profiler.recording.structure import (
    Hole,
    copied,
    has_state,
    map_tensors,
    nbytes,
    tensor_at,
    tensors_in,
)
from shardwright.profiler.recording.unitgraph import (
    Context,
    Step,
    Value,
    in_context,
    rebuilt,
    remade,
)

__all__ = ["GraphWriter", "Sources"]

Sources = frozenset[str]
"""What a tensor's numbers follow from: "inputs" (floating ones), "indices" (whole numbers and masks among the inputs),
"parameters", "buffers", "chance"; nothing = shapes and constants."""

_NUMBERS = (str, int, float, bool, complex, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format)


class GraphWriter:
    """A graph in the making.

    Args:
        model: whose parameters, buffers and modules the graph refers to.
        units: the modules that are steps, by path.
        train: whether the forward is for training; the modes of steps are noted where they differ from it.
    """

    buffers: dict[int, str]

    def __init__(self, model: nn.Module, units: dict[str, nn.Module], *, train: bool) -> None:
        super().__init__()
        self.model = model
        self.units = units
        self.train = train
        self.graph = fx.Graph()
        # The steps of units and attributes bear these names; glue gets others.
        parameters, buffers = list(model.named_parameters()), list(model.named_buffers())
        for name in (*units, *(name for name, _ in (*parameters, *buffers))):
            self.graph._graph_namespace.create_name(name, None)
        self.steps: list[Step] = []
        self.values: dict[str, Value] = {}
        self.constants: dict[str, Any] = {}
        self.obstacles: dict[str, None] = {}
        # Steps that change tensors in place -> the values that change, all that share the storage.
        self.mutators: dict[str, tuple[str, ...]] = {}
        # Steps, and those that read what they made past their arguments, so that nothing brings it to another device.
        self.neighbours: list[tuple[str, ...]] = []
        self.attribute_ids: dict[str, int] = {}
        # Tensors by identity; the references keep every identity valid until the capture ends.
        self.name_of: dict[int, str] = {}
        # Storages by address -> the first value that has them; "" for the model's own.
        held = (tensor for _, tensor in (*parameters, *buffers))
        self.storages: dict[int, str] = {s._cdata: "" for tensor in held for s in storages_of(tensor)}
        self.alive: list[Any] = []
        self.tensors: dict[str, Tensor] = {}
        self.sources: dict[str, Sources] = {}
        self.readers: dict[str, list[str]] = {}
        self.objects: dict[int, fx.Node] = {}
        self.changing: set[int] = set()
        self.parameters = {id(p): name for name, p in parameters}
        self.buffers = {id(b): name for name, b in buffers}
        self.modules = {id(module): path for path, module in model.named_modules() if path}

    def _obstacle(self, text: str) -> None:
        """Note what the graph cannot hold."""
        self.obstacles[text] = None

    def _check_constant(self, tensor: Tensor) -> None:
        """Note a tensor that came neither with the model nor from a step, if that is wrong."""

    def _input(self, path: str, tensor: Tensor) -> str:
        parts = "".join(c if c.isalnum() or c == "_" else " " for c in path).split()[1:]
        node = self.graph.placeholder("_".join(["input", *parts]))
        step = Step(name=node.name, kind="input", type="input", node=node)
        self.steps.append(step)
        source = "indices" if not tensor.is_floating_point() or is_mask(tensor) else "inputs"
        self._name(tensor, step, node.name, node, frozenset({source}))
        return node.name

    def _node(
        self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], step: Step, context: Context | None
    ) -> fx.Node:
        """The graph's node for a call: of a unit, by path, or of a function."""
        new_args = tuple(self._argument(arg, step) for arg in args)
        new_kwargs = {key: self._argument(arg, step) for key, arg in kwargs.items()}
        unit = isinstance(target, str)
        if context is None and (unit or _can_be_written(target)):
            make = self.graph.call_module if unit else self.graph.call_function
            return make(target, new_args, new_kwargs)
        called = self.graph.get_attr(target) if unit else self._constant(target)
        modes = self._constant(context or Context(grad=self.train))
        return self.graph.call_function(in_context, (modes, called, *new_args), new_kwargs)

    def _add(self, step: Step, result: Any, changed: list[Tensor], sources: Sources) -> None:
        """Enter a finished step: its outputs by name, its bytes, and what it changed in place."""
        self.steps.append(step)
        for name in step.reads:
            self.readers.setdefault(name, []).append(step.name)
        if changed:
            # Every tensor that shares the storage has changed with it, views that this step did not see included.
            storages = set[int]().union(*map(_storages, changed))
            aliases = [n for n, t in self.tensors.items() if not storages.isdisjoint(_storages(t))]
            self.mutators[step.name] = tuple(aliases)
            for name in aliases:
                self.sources[name] |= sources
        for index, (path, tensor) in enumerate(tensors_in(result)):
            self._name(tensor, step, f"{step.name}{path}", self._unpack(step.node, path, result, index), sources)
            step.output_bytes += nbytes(tensor)

    def _unpack(self, node: fx.Node, path: str, result: Any, index: int) -> fx.Node:
        if not path:
            return node
        if isinstance(result, (tuple, list)) and path == f"[{index}]":
            return self.graph.call_function(operator.getitem, (node, index))
        return self.graph.call_function(tensor_at, (node, index))

    def _name(self, tensor: Tensor, step: Step, name: str, node: fx.Node, sources: Sources) -> None:
        if tensor.is_nested:
            raise ShardwrightError(
                f"{step.site or call_site(sys._getframe())} has a nested tensor between units, which has no shape to "
                "plan with; keep it inside of one unit, or pad it, as torch.nested.to_padded_tensor does"
            )
        self.alive.append(tensor)
        self.tensors[name] = tensor
        self.name_of[id(tensor)] = name
        self.sources[name] = sources
        stride = tuple(tensor.stride()) if tensor.layout == torch.strided else None
        self.values[name] = Value(
            name,
            step.name,
            node,
            tuple(tensor.shape),
            stride,
            tensor.dtype,
            tensor.requires_grad,
            nbytes(tensor),
            *self._storage(name, tensor),
        )

    def _storage(self, name: str, tensor: Tensor) -> tuple[str, int]:
        """The earlier value that has the storage of ``tensor``, if one has, and the bytes that are new with it."""
        found = storages_of(tensor)
        known = [self.storages[s._cdata] for s in found if s._cdata in self.storages]
        new = {s._cdata: s.nbytes() for s in found if s._cdata not in self.storages}
        self.storages |= dict.fromkeys(new, name)
        return next(filter(None, known), ""), sum(new.values())

    def _argument(self, value: Any, step: Step) -> Any:
        """``value`` with its tensors replaced by graph nodes, noted as read by ``step``."""
        if isinstance(value, Tensor):
            return self._read(value, step)
        if isinstance(value, _NUMBERS) or value is Ellipsis:
            # NumPy's floats and members of enumerations are numbers too, and no literals when they are written.
            literal = type(value) in _NUMBERS or not isinstance(value, (str, int, float, complex))
            return value if literal else self._constant(value)
        if isinstance(value, nn.Module) and id(value) in self.modules:
            return self.graph.get_attr(self.modules[id(value)])
        if isinstance(value, slice):
            return slice(*(self._argument(part, step) for part in (value.start, value.stop, value.step)))
        if type(value) in (tuple, list, torch.Size) or (isinstance(value, tuple) and hasattr(value, "_fields")):
            return self._sequence(value, step)
        plain = type(value) is dict and all(isinstance(key, (str, int)) for key in value)
        return {k: self._argument(v, step) for k, v in value.items()} if plain else self._object(value, step)

    def _sequence(self, value: Any, step: Step) -> Any:
        made = [self._argument(item, step) for item in value]
        if hasattr(value, "_fields"):  # made by its class: some check what they are given
            return self.graph.call_function(remade, (self._constant(type(value)), made))
        return made if isinstance(value, list) else tuple(made)

    def _object(self, value: Any, step: Step) -> fx.Node:
        """An object: made anew for every call, with the tensors that steps made in their places.

        One that holds none stays as it was when it was first passed: a cache that units fill is empty for each of them,
        so that what one leaves there for another is missed when the capture is checked.
        """
        held = [t for _, t in tensors_in(value)]
        known = [t for t in held if id(t) in self.name_of or id(t) in self.parameters or id(t) in self.buffers]
        template = None if known else self.objects.get(id(value))
        if template is None:
            self.alive.append(value)
            holes = {id(t): Hole(index) for index, t in enumerate(known)}
            kept = copied(value, lambda t: holes.get(id(t)) or t.detach()) if known or has_state(value) else value
            if any(id(t) in holes for _, t in tensors_in(kept)):
                where = step.site or call_site(sys._getframe())
                self._obstacle(f"{where} passes a {type(value).__name__}, which cannot be made anew with other tensors")
            template = self._constant(kept)
            if not known:
                self.objects[id(value)] = template
        if not known and not has_state(value):
            return template
        return self.graph.call_function(rebuilt, (template, [self._read(t, step) for t in known]))

    def _read(self, tensor: Tensor, step: Step) -> fx.Node:
        name = self.name_of.get(id(tensor)) or self._attribute(tensor)
        step.reads = tuple(dict.fromkeys((*step.reads, name)))
        value = self.values[name]
        if tensor.requires_grad != value.requires_grad and not tensor.is_leaf and id(tensor) not in self.changing:
            maker = next(s for s in self.steps if s.name == value.producer)
            self._obstacle(f"{maker.site or maker.name} ({maker.type}) is part of a custom autograd function")
        return value.node

    def _attribute(self, tensor: Tensor) -> str:
        """A tensor that no step made: a parameter or buffer of the model, else a constant."""
        target = self.parameters.get(id(tensor)) or self.buffers.get(id(tensor))
        if target is None:
            self._check_constant(tensor)
            node = self._constant(tensor.detach())
            step = Step(name=node.name, kind="parameter", type="constant", node=node)
        else:
            node = self.graph.get_attr(target)
            type_ = "parameter" if id(tensor) in self.parameters else "buffer"
            step = Step(name=target, kind="parameter", type=type_, node=node, unit=target)
        self.steps.append(step)
        self.attribute_ids[step.name] = id(tensor)
        self._name(tensor, step, step.name, node, frozenset({f"{step.type}s"} if target is not None else ()))
        return step.name

    def _constant(self, value: Any) -> fx.Node:
        name = f"constant_{len(self.constants)}"
        self.constants[name] = value
        return self.graph.get_attr(name)

    @staticmethod
    def _snapshot(value: Any) -> Any:
        """The arguments as they are now, outside autograd."""
        return map_tensors(lambda t: t.detach().requires_grad_(t.requires_grad), value)

    def _colocate(self) -> list[tuple[str, ...]]:
        """Groups of steps that must share a device: calls of one unit, in-place changes, and reads past arguments."""
        calls: dict[str, list[str]] = {}
        for step in self.steps:
            if step.kind == "unit":
                calls.setdefault(step.unit, []).append(step.name)
        # All who see a tensor under a name that it had before the change stay with the change: a copy elsewhere would
        # not change. Who reads the changing step's own result depends on it anyway.
        changes = [
            [
                *(self.values[name].producer for name in names),
                *(r for name in names for r in self.readers.get(name, ())),
                step,
            ]
            for step, names in self.mutators.items()
        ]
        groups = [*map(tuple, changes), *map(tuple, calls.values()), *self.neighbours]
        return list(dict.fromkeys(tuple(dict.fromkeys(group)) for group in groups if len(set(group)) > 1))

    def _ties(self) -> list[tuple[str, tuple[str, ...]]]:
        """Parameters with several users: units by their own, glue by reading."""
        users: dict[int, list[Step]] = {}
        names = {self.attribute_ids[s.name]: s.name for s in self.steps if s.kind == "parameter" and s.unit}
        for step in self.steps:
            if step.kind == "unit":
                for parameter in self.units[step.unit].parameters():
                    users.setdefault(id(parameter), []).append(step)
            for name in step.reads:
                if self.attribute_ids.get(name) in self.parameters:
                    users.setdefault(self.attribute_ids[name], []).append(step)
        return [
            (names.get(key) or self.parameters[key], tuple(dict.fromkeys(step.name for step in steps)))
            for key, steps in users.items()
            if len({step.unit or step.name for step in steps}) > 1
        ]


def _storages(tensor: Tensor) -> set[int]:
    return {storage._cdata for storage in storages_of(tensor)}


@cache
def _can_be_written(function: Any) -> bool:
    """Whether the graph's code can refer to ``function`` by a qualified name."""
    try:
        found: Any = torch
        for part in fx.node._get_qualified_name(function).split(".")[1:]:
            found = getattr(found, part)
    except (AttributeError, RuntimeError):
        homes = ("builtins", "_operator", rebuilt.__module__, tensor_at.__module__)
        return hasattr(function, "__name__") and getattr(function, "__module__", None) in homes
    return bool(found == function)
