"""Capture: one run of a model becomes the graph of its unit calls and the glue between them.

The model runs once, unchanged, under a ``TorchFunctionMode`` and with forward hooks on its units. What happens inside a
unit is not looked at. Outside, every unit call becomes a ``call_module`` and every torch function a ``call_function``
of a straight-line ``torch.fx`` graph; a tensor is recognised by its identity. So any Python in the forward is fine, but
the graph holds for the shapes and the path that this run took.
"""

from __future__ import annotations

import itertools
import operator
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils import _pytree as pytree

from shardwright.errors import ShardwrightError
from shardwright.profiler.profile import NodeKind
from shardwright.profiler.units import find_units

__all__ = [
    "Call",
    "Step",
    "UnitGraph",
    "Value",
    "call_site",
    "evaluating",
    "function_name",
    "mean_square_loss",
    "nbytes",
    "set_item",
    "trace",
]


@dataclass(frozen=True)
class Call:
    """What a step calls, and the tensors it was called with (detached, ``requires_grad`` kept)."""

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass
class Step:
    """One step of the forward, in the order of the run."""

    name: str
    kind: NodeKind
    type: str
    node: fx.Node
    unit: str = ""
    site: str = ""
    reads: tuple[str, ...] = ()
    call: Call | None = None
    output_bytes: int = 0
    saved_bytes: int = 0


@dataclass(frozen=True)
class Value:
    """A tensor that a step made."""

    name: str
    producer: str
    node: fx.Node
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    requires_grad: bool

    @property
    def bytes(self) -> int:
        """Its elements' bytes; what a transfer moves."""
        return self.dtype.itemsize * torch.Size(self.shape).numel()


@dataclass
class UnitGraph:
    """A captured forward.

    ``graph`` takes the input tensors in ``input_names``' order and returns the flat tuple of output tensors.
    """

    model: nn.Module
    units: dict[str, nn.Module]
    graph: fx.Graph
    steps: list[Step]
    values: dict[str, Value]
    input_names: tuple[str, ...]
    outputs: tuple[str, ...]
    constants: dict[str, Any]
    colocate: list[tuple[str, ...]] = field(default_factory=list)

    def step_of(self) -> dict[fx.Node, Step]:
        """The step that each graph node belongs to: a ``getitem`` belongs to the step whose result it unpacks."""
        owner = {step.node: step for step in self.steps}
        for value in self.values.values():
            node = value.node
            while node not in owner:
                node = node.args[0]  # type: ignore[assignment]  # a getitem's first argument is a node
            owner[value.node] = owner[node]
        for node in self.graph.nodes:
            if node not in owner and node.op == "call_function":
                owner[node] = owner[node.args[0]]
        return owner

    def module(self) -> fx.GraphModule:
        """The graph over the model's own units: replays the captured forward on flat input tensors."""
        return fx.GraphModule(graph_root(self.model, self.constants), self.graph)


def graph_root(model: nn.Module, constants: Mapping[str, Any]) -> dict[str, Any]:
    """Everything that a captured graph can refer to, by its target."""
    root: dict[str, Any] = {name: module for name, module in model.named_modules() if name}
    root |= dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    return root | dict(constants)


def set_item(tensor: Tensor, index: Any, value: Any) -> Tensor:
    """``tensor[index] = value`` as an expression, so that later readers depend on it."""
    tensor[index] = value
    return tensor


def nbytes(tensor: Tensor) -> int:
    """Bytes of the tensor's elements."""
    return tensor.element_size() * tensor.numel()


def call_site(frame: FrameType | None) -> str:
    """``file.py:line:column`` of the innermost call outside torch and this package; columns from Python 3.11 on."""
    while frame is not None:
        name = frame.f_globals.get("__name__", "")
        if not (name == "torch" or name.startswith(("torch.", "shardwright."))):
            positions = next(itertools.islice(frame.f_code.co_positions(), frame.f_lasti // 2, None))
            return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}:{(positions[2] or 0) + 1}"
        frame = frame.f_back
    return ""


def trace(
    model: nn.Module,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    train: bool = True,
) -> UnitGraph:
    """Run ``model`` once on the inputs and capture it at unit level.

    The model's buffers, training flags and the random state are put back afterwards.

    Raises:
        ShardwrightError: the forward fails, or a unit's call cannot be represented.
    """
    units = find_units(model)
    if "" in units:
        raise ShardwrightError(
            f"{type(model).__name__} has no child modules, so there is nothing to split; "
            "pass the model that holds it, or put its layers in an nn.Sequential"
        )
    lazy = [name for name, p in model.named_parameters() if isinstance(p, nn.UninitializedParameter)]
    if lazy:
        raise ShardwrightError(f"{lazy[0]} has no shape yet: run one forward of the model before it is profiled")
    with _state_kept(model), torch.random.fork_rng(devices=[]), torch.set_grad_enabled(train):
        model.train(train)
        return _Recorder(model, units, train=train).record(args, dict(kwargs or {}))


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode, with its state and the random state put back afterwards."""
    with _state_kept(model), torch.random.fork_rng(devices=[]):
        model.eval()
        yield


@contextmanager
def _state_kept(model: nn.Module) -> Iterator[None]:
    """Put buffers and training flags back, which a forward in training mode may change (batch statistics)."""
    buffers = {name: buffer.detach().clone() for name, buffer in model.named_buffers()}
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
        with torch.no_grad():
            for name, buffer in model.named_buffers():
                if name in buffers and buffer.shape == buffers[name].shape:
                    buffer.copy_(buffers[name])


class _Recorder(TorchFunctionMode):
    """The mode and the hooks that write the graph while the model runs."""

    def __init__(self, model: nn.Module, units: dict[str, nn.Module], *, train: bool) -> None:
        super().__init__()
        self.model = model
        self.units = units
        self.train = train
        self.graph = fx.Graph()
        self.steps: list[Step] = []
        self.values: dict[str, Value] = {}
        self.constants: dict[str, Any] = {}
        # Steps that change tensors in place -> the values that change, all that share the storage.
        self.mutators: dict[str, tuple[str, ...]] = {}
        self.attribute_ids: dict[str, int] = {}
        self.depth = 0
        self.calls: dict[str, int] = {}
        self.current: Step | None = None
        # Tensors by identity; the references keep every identity valid until the capture ends.
        self.name_of: dict[int, str] = {}
        self.alive: list[Tensor] = []
        self.tensors: dict[str, Tensor] = {}
        self.readers: dict[str, list[str]] = {}
        self.parameters = {id(p): name for name, p in model.named_parameters(remove_duplicate=False)}
        self.parameters |= {id(b): name for name, b in model.named_buffers(remove_duplicate=False)}
        self.saved_storages: dict[int, torch.UntypedStorage] = {}

    # Running

    def record(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> UnitGraph:
        leaves, _ = pytree.tree_flatten_with_path((args, kwargs))
        input_names = tuple(self._input(path, leaf) for path, leaf in leaves if isinstance(leaf, Tensor))
        for tensor in [*self.model.parameters(), *self.model.buffers(), *self.alive]:
            self._storage_counted(tensor)
        hooks = ExitStack()
        for path, unit in self.units.items():
            hooks.callback(unit.register_forward_pre_hook(self._before(path), with_kwargs=True).remove)
            hooks.callback(unit.register_forward_hook(self._after, with_kwargs=True).remove)
        saving = torch.autograd.graph.saved_tensors_hooks(self._saved, lambda token: token)
        with hooks, saving, self:
            try:
                output = self.model(*args, **kwargs)
            except ShardwrightError:
                raise
            except Exception as error:
                inside = f" in unit {self.current.name}" if self.current is not None and self.depth else ""
                raise ShardwrightError(
                    f"the forward of {type(self.model).__name__} failed{inside} on the sample inputs: "
                    f"{type(error).__name__}: {' '.join(str(error).split())}"
                ) from error
        return self._finish(input_names, output)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.depth:
            return func(*args, **kwargs)
        return self._glue(func, args, kwargs)

    def _glue(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        read = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        versions = [tensor._version for tensor in read]
        step = Step(name="", kind="glue", type=function_name(func), node=None)  # type: ignore[arg-type]  # made below
        self.current = step
        result = func(*args, **kwargs)
        changed = [t for t, version in zip(read, versions, strict=True) if t._version != version]
        made = [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)]
        target, made_by = _expression(func, args)
        if not made and not (changed and result is None):
            return result  # a query: a size, a dtype, a number
        step.call = Call(target, self._detached(made_by), self._detached(kwargs))
        step.node = self.graph.call_function(target, self._arguments(made_by, step), self._arguments(kwargs, step))
        step.name = step.node.name
        step.site = call_site(sys._getframe())
        self._add(step, result if made else args[0], changed)
        return result

    def _before(self, path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self.depth += 1
            if self.depth == 1:
                with torch._C.DisableTorchFunction():  # the recorder's own queries are not the model's
                    enter(module, args, kwargs)

        def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            count = self.calls[path] = self.calls.get(path, 0) + 1
            step = Step(
                name=path if count == 1 else f"{path}#{count}",
                kind="unit",
                type=type(module).__name__,
                node=None,  # type: ignore[arg-type]  # made below
                unit=path,
                call=Call(module, self._detached(args), self._detached(kwargs)),
            )
            step.node = self.graph.call_module(path, self._arguments(args, step), self._arguments(kwargs, step))
            self.current = step
            self.versions = [(t, t._version) for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]

        return hook

    def _after(self, _module: nn.Module, _args: Any, _kwargs: Any, output: Any) -> None:
        if self.depth == 1 and self.current is not None:
            with torch._C.DisableTorchFunction():
                changed = [t for t, version in self.versions if t._version != version]
                self._add(self.current, output, changed)
        self.depth -= 1

    def _saved(self, tensor: Tensor) -> int:
        """Count a tensor that autograd keeps, once by storage; this run is never differentiated."""
        if self.current is not None:
            self.current.saved_bytes += self._storage_counted(tensor)
        return 0

    def _storage_counted(self, tensor: Tensor) -> int:
        """The storage's bytes when first seen, else 0; it is kept, so that its address stays its own."""
        storage = tensor.untyped_storage()
        if storage._cdata in self.saved_storages:
            return 0
        self.saved_storages[storage._cdata] = storage
        return storage.nbytes()

    # Writing

    def _input(self, path: tuple[Any, ...], tensor: Tensor) -> str:
        parts = [str(getattr(key, "key", getattr(key, "idx", key))) for key in path[1:]]
        node = self.graph.placeholder("_".join(["input", *parts]))
        step = Step(name=node.name, kind="input", type="input", node=node)
        self.steps.append(step)
        self._name(tensor, step, node.name, node)
        return node.name

    def _add(self, step: Step, result: Any, changed: list[Tensor]) -> None:
        """Enter a finished step: its outputs by name, its bytes, and what it changed in place."""
        self.steps.append(step)
        for name in step.reads:
            self.readers.setdefault(name, []).append(step.name)
        if changed:
            # Every tensor that shares the storage has changed with it, views that this step did not see included.
            storages = {t.untyped_storage()._cdata for t in changed}
            self.mutators[step.name] = tuple(
                name for name, t in self.tensors.items() if t.untyped_storage()._cdata in storages
            )
        leaves, _ = pytree.tree_flatten_with_path(result)
        for path, leaf in leaves:
            if isinstance(leaf, Tensor):
                node, name = step.node, step.name
                for key in path:
                    node, name = self._unpack(node, key), f"{name}{pytree.keystr((key,))}"
                self._name(leaf, step, name, node)
                step.output_bytes += nbytes(leaf)

    def _unpack(self, node: fx.Node, key: Any) -> fx.Node:
        if isinstance(key, pytree.GetAttrKey):
            return self.graph.call_function(getattr, (node, key.name))
        return self.graph.call_function(
            operator.getitem, (node, key.key if isinstance(key, pytree.MappingKey) else key.idx)
        )

    def _name(self, tensor: Tensor, step: Step, name: str, node: fx.Node) -> None:
        self.alive.append(tensor)
        self.tensors[name] = tensor
        self.name_of[id(tensor)] = name
        self.values[name] = Value(
            name, step.name, node, tuple(tensor.shape), tuple(tensor.stride()), tensor.dtype, tensor.requires_grad
        )

    def _arguments(self, value: Any, step: Step) -> Any:
        """``value`` with its tensors replaced by graph nodes, noted as read by ``step``."""

        def replace(leaf: Any) -> Any:
            if isinstance(leaf, Tensor):
                name = self.name_of.get(id(leaf)) or self._attribute(leaf)
                step.reads = tuple(dict.fromkeys((*step.reads, name)))
                return self.values[name].node
            if isinstance(
                leaf, (str, int, float, bool, complex, type(None), torch.dtype, torch.device, torch.layout)
            ) or (leaf is Ellipsis or isinstance(leaf, torch.memory_format)):
                return leaf
            return self._constant(leaf, self.graph.get_attr)

        return fx.node.map_aggregate(value, replace)

    def _attribute(self, tensor: Tensor) -> str:
        """A tensor that no step made: a parameter or buffer of the model, else a constant."""
        target = self.parameters.get(id(tensor))
        if target is None:
            node = self._constant(tensor.detach(), self.graph.get_attr)
            step = Step(name=node.name, kind="parameter", type="constant", node=node)
        else:
            node = self.graph.get_attr(target)
            step = Step(name=target, kind="parameter", type="parameter", node=node, unit=target)
        self.steps.append(step)
        self.attribute_ids[step.name] = id(tensor)
        self._name(tensor, step, step.name, node)
        return step.name

    def _constant(self, value: Any, make: Callable[[str], fx.Node]) -> fx.Node:
        name = f"constant_{len(self.constants)}"
        self.constants[name] = value
        return make(name)

    @staticmethod
    def _detached(value: Any) -> Any:
        def detach(leaf: Any) -> Any:
            return leaf.detach().requires_grad_(leaf.requires_grad) if isinstance(leaf, Tensor) else leaf

        return pytree.tree_map(detach, value)

    def _finish(self, input_names: tuple[str, ...], output: Any) -> UnitGraph:
        step = Step(name="output", kind="output", type="output", node=None)  # type: ignore[arg-type]  # made below
        tensors = [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]
        if not tensors:
            raise ShardwrightError(f"the forward of {type(self.model).__name__} returns no tensor")
        step.node = self.graph.output(self._arguments(tuple(tensors), step))
        step.call = Call(mean_square_loss, (self._detached(tuple(tensors)),), {})
        self.steps.append(step)
        return UnitGraph(
            model=self.model,
            units=self.units,
            graph=self.graph,
            steps=self.steps,
            values=self.values,
            input_names=input_names,
            outputs=tuple(self.name_of[id(t)] for t in tensors),
            constants=self.constants,
            colocate=self._colocate(),
        )

    def _colocate(self) -> list[tuple[str, ...]]:
        """Groups of steps that must share a device: calls of one unit, users of one parameter, in-place changes."""
        calls: dict[str, list[str]] = {}
        owners: dict[int, list[str]] = {}
        for step in self.steps:
            if step.kind == "unit":
                calls.setdefault(step.unit, []).append(step.name)
                for parameter in self.units[step.unit].parameters():
                    owners.setdefault(id(parameter), []).append(step.name)
            elif step.kind == "parameter":
                owners.setdefault(self.attribute_ids[step.name], []).append(step.name)
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
        groups = [*map(tuple, changes), *map(tuple, calls.values()), *map(tuple, owners.values())]
        return list(dict.fromkeys(tuple(dict.fromkeys(group)) for group in groups if len(set(group)) > 1))


def mean_square_loss(outputs: Any) -> Tensor:
    """The stand-in loss for timing and gates: the mean square of each floating output, summed.

    It averages over the batch, so that the micro-batches' mean gradient is the whole batch's.
    """
    losses = [
        t.float().square().mean()
        for t in pytree.tree_leaves(outputs)
        if isinstance(t, Tensor) and t.is_floating_point()
    ]
    if not losses:
        raise ShardwrightError(
            "the model returns no floating tensor, so it cannot be trained; profile with --inference"
        )
    return torch.stack(losses).sum() if len(losses) > 1 else losses[0]


def function_name(func: Any) -> str:
    """The function's public name, short: ``torch.cat``, ``add``, ``relu``."""
    name = resolve_name(func) or getattr(func, "__name__", str(func))
    return str(name).removeprefix("torch.Tensor.").removeprefix("torch.nn.functional.")


def _expression(func: Any, args: tuple[Any, ...]) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """A function and arguments that return what ``func`` returns or changes, and that can be written in source."""
    name = getattr(func, "__name__", "")
    if func is Tensor.__setitem__:
        return set_item, args
    if name == "__get__":  # a property such as x.T; its descriptor's name is in the bound getset
        return getattr, (args[0], func.__self__.__name__)
    return func, args
