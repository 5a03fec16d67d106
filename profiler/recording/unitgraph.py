"""The captured forward as data: steps, the tensors between them, and the ``torch.fx`` graph that replays them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.overrides import resolve_name
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

from shardwright.errors import ShardwrightError
from shardwright.profiler.profile import NodeKind
from shardwright.profiler.recording.operations import Operation
from shardwright.profiler.recording.replayed import Replayed
from shardwright.profiler.recording.structure import filled

__all__ = [
    "ApplyFunction",
    "Call",
    "Context",
    "Step",
    "UnitGraph",
    "Value",
    "function_name",
    "graph_root",
    "held_to",
    "in_context",
    "mean_square_loss",
    "rebuilt",
    "remade",
    "set_item",
]


@dataclass(frozen=True)
class Context:
    """The modes that a step runs under, where they differ from an ordinary call's."""

    grad: bool
    autocast: torch.dtype | None = None
    checkpointed: bool = False
    """Whether it keeps only its arguments for the backward, which computes it anew (``torch.utils.checkpoint``), where
    there is one: where the caller wants gradients."""

    def run(self, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Call ``function`` under these modes; autocast is that of the device of the first tensor argument."""
        grad = self.grad
        if self.checkpointed:
            grad = torch.is_grad_enabled()
            if isinstance(function, nn.Module) and not isinstance(function, torch.jit.ScriptModule):
                function = partial(nn.Module.__call__, function)  # a class's own __call__ may begin a region as well
            if grad:
                function = partial(checkpoint, function, use_reentrant=False)
        if self.autocast is None:
            with torch.set_grad_enabled(grad):
                return function(*args, **kwargs)
        leaves = pytree.tree_leaves((args, kwargs))
        device = next((leaf.device.type for leaf in leaves if isinstance(leaf, Tensor)), "cpu")
        with torch.set_grad_enabled(grad), torch.autocast(device, self.autocast):
            return function(*args, **kwargs)


@dataclass(frozen=True)
class Call:
    """What a step calls, and the tensors it was called with (detached, ``requires_grad`` kept)."""

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    context: Context | None = None


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
    checkpointed: bool = False
    """Whether its backward computes it anew, all or in part, as the model asks (``torch.utils.checkpoint``)."""
    saved_bytes: int = 0
    operations: list[Operation] = field(default_factory=list)
    """What PyTorch did in its forward, in order."""
    regions: list[tuple[int, int]] = field(default_factory=list)
    """Which of these it checkpoints inside, from and to."""


@dataclass(frozen=True)
class Value:
    """A tensor that a step made."""

    name: str
    producer: str
    node: fx.Node
    shape: tuple[int, ...]
    stride: tuple[int, ...] | None
    """None = a sparse tensor."""
    dtype: torch.dtype
    requires_grad: bool
    bytes: int
    """What a transfer moves."""
    storage: str = ""
    """The first value that has the same storage; "" = this one."""
    held_bytes: int = 0
    """What it adds to what is held: bytes of its storage, 0 if an earlier value or the model has that."""


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
    output_places: tuple[int, ...]
    """Which of the tensors in the model's result the ``outputs`` are; the others cannot be had from a pipeline."""
    constants: dict[str, Any]
    colocate: list[tuple[str, ...]] = field(default_factory=list)
    ties: list[tuple[str, tuple[str, ...]]] = field(default_factory=list)
    """A parameter that several units or glue steps use, with those steps."""
    guards: list[str] = field(default_factory=list)
    """Numbers that the forward read back from masks and indices: the graph is for inputs that give the same."""
    saved_by: dict[str, str] = field(default_factory=dict)
    """Values whose storage autograd keeps -> the step whose ``saved_bytes`` count it, the first to save it."""
    reads_numbers: bool = False
    """Whether anything in the forward, inside of units too, made a number of Python or a shape of tensors' values."""
    changes: tuple[str, ...] = ()
    """Parameters and buffers that the forward writes, running statistics of normalisations apart."""
    checkpointed_modules: frozenset[str] = frozenset()
    """Modules whose calls are regions of checkpointing, outside of units or as units."""
    obstacles: list[str] = field(default_factory=list)
    """What the graph cannot represent faithfully, with file and line: such a model can be placed, not piped."""

    def step_of(self) -> dict[fx.Node, Step]:
        """The step that each graph node belongs to: an unpacking belongs to the step whose result it unpacks."""
        owner = {step.node: step for step in self.steps}
        for value in self.values.values():
            chain = []
            node = value.node
            while node not in owner:
                chain.append(node)
                node = node.args[0]  # type: ignore[assignment]  # what an unpacking unpacks
            owner |= dict.fromkeys(chain, owner[node])
        for node in reversed(self.graph.nodes):  # what makes an argument belongs to the step that takes it
            if node not in owner and node.op == "call_function":
                owner[node] = owner[next(iter(node.users))] if node.users else owner[node.args[0]]
        return owner

    def module(self) -> Replayed:
        """The graph over the model's own units: replays the captured forward on flat input tensors."""
        return Replayed(graph_root(self.model, self.constants), self.graph)


def graph_root(model: nn.Module, constants: Mapping[str, Any]) -> dict[str, Any]:
    """Everything that a captured graph can refer to, by its target."""
    root: dict[str, Any] = {name: module for name, module in model.named_modules(remove_duplicate=False) if name}
    root |= dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    return root | dict(constants)


def set_item(tensor: Tensor, index: Any, value: Any) -> Tensor:
    """``tensor[index] = value`` as an expression, so that later readers depend on it."""
    tensor[index] = value
    return tensor


def in_context(context: Context, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
    """Call ``function`` as the captured forward did, in a region such as ``torch.no_grad()``."""
    return context.run(function, args, kwargs)


def held_to(site: str, name: str, expected: Any, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> None:
    """Make sure that a number which steers the forward is the one it was when the forward was captured.

    Raises:
        ShardwrightError: it is another, so these inputs take another path.
    """
    found = function(*args, **kwargs)
    if found != expected:
        raise ShardwrightError(
            f"{site}: {name} gives {found} for these inputs and gave {expected} for the sample inputs, which the "
            "pipeline was made for; profile with inputs like these"
        )


def rebuilt(template: Any, tensors: list[Tensor]) -> Any:
    """An object among the arguments of a call, a new one each time, with its tensors."""
    return filled(template, tensors)


def remade(kind: Any, items: list[Any]) -> Any:
    """A named tuple among the arguments of a call."""
    return kind(*items)


@dataclass(frozen=True)
class ApplyFunction:
    """A custom autograd function, as a callable that travels to workers."""

    function: type[torch.autograd.Function]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Apply it."""
        return self.function.apply(*args, **kwargs)


def mean_square_loss(outputs: Any) -> Tensor:
    """The stand-in loss for timing and gates: the mean square of each floating output, summed.

    It averages over the batch, so that the micro-batches' mean gradient is the whole batch's.
    """
    losses = [
        t.float().square().mean()
        for t in pytree.tree_leaves(outputs)
        if isinstance(t, Tensor) and t.is_floating_point() and t.numel()
    ]
    if not losses:
        raise ShardwrightError(
            "the model returns no floating tensor, so it cannot be trained; profile with --inference"
        )
    return torch.stack(losses).sum() if len(losses) > 1 else losses[0]


@cache  # torch looks through all its functions, under a filter for warnings
def function_name(func: Any) -> str:
    """The function's public name, short: ``torch.cat``, ``add``, ``relu``."""
    name = resolve_name(func) or getattr(func, "__name__", str(func))
    return str(name).removeprefix("torch.Tensor.").removeprefix("torch.nn.functional.")
