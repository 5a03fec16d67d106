"""A step on one device, made ready to be timed: its forward, its backward and its parameters' update."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge
from torch.utils import _pytree as pytree

from shardwright.profiler.measuring.optimizers import make_optimizer
from shardwright.profiler.measuring.parted import WeightsLeft, edges_of, inputs_first
from shardwright.profiler.measuring.stopwatch import QueueFiller, Reading, Stopwatch
from shardwright.profiler.measuring.timed import Lent
from shardwright.profiler.recording.structure import map_tensors, tensors_in
from shardwright.profiler.recording.unitgraph import Call

__all__ = ["Subject", "as_input"]


class Subject:
    """A step made ready to be timed over and over, one phase at a time, with fresh inputs every time.

    Phases come in the order of a training step: :meth:`forward`, :meth:`backward`, :meth:`update`; :meth:`recompute` is
    a forward that keeps nothing. What a forward saves is held until the backward, or :meth:`release`. With ``parted``
    there are :meth:`backward_input` and :meth:`backward_weight` too, between forward and backward.
    """

    def __init__(
        self,
        call: Call,
        device: torch.device,
        *,
        train: bool,
        optimizer: str | None,
        accumulate: bool,
        parted: bool = False,
    ) -> None:
        self.device = device
        self.train = train
        self.parted = parted and train
        self.accumulate = accumulate
        self.function = call.function.to(device) if isinstance(call.function, nn.Module) else call.function
        self.context = call.context
        self.leaves, self.spec = pytree.tree_flatten((call.args, call.kwargs))
        self.leaves = [self._leaf(leaf, device) for leaf in self.leaves]
        self.copied = [as_input if isinstance(leaf, Tensor) else partial(map_tensors, as_input) for leaf in self.leaves]
        self.names = [*call.kwargs] if _are_leaves([*call.args, *call.kwargs.values()]) else None
        """Of the inputs by keyword, where no input holds others."""
        self.parameters: list[nn.Parameter] = []
        if isinstance(self.function, nn.Module):
            self.function.train(train)
            self.parameters = [p for p in self.function.parameters() if p.requires_grad]
        self.optimizer_name = optimizer
        self.optimizer = make_optimizer(optimizer, self.parameters) if train and optimizer else None
        if isinstance(self.function, Lent) and self.optimizer is not None:
            self.function.parameter.grad = torch.randn_like(self.function.parameter)  # no backward brings one
        self.outputs: list[Tensor] = []
        self.grads: list[Tensor] | None = None
        self.peak = _Peak(device)
        self.edges: list[GradientEdge] = []
        """Where the gradients of the inputs of the last forward arrive."""
        self.left: WeightsLeft | None = None
        phases = ("forward", "backward", "backward_input", "backward_weight", "update", "recompute")
        self.fillers = {phase: QueueFiller() for phase in phases}

    @staticmethod
    def _leaf(leaf: Any, device: torch.device) -> Any:
        if isinstance(leaf, torch.device):
            return device
        return map_tensors(lambda t: t.detach().to(device).requires_grad_(t.requires_grad), leaf)

    def forward(self, stopwatch: Stopwatch) -> Reading:
        """Time the forward; in training its outputs are held."""
        with self.peak.forward():
            output, reading = self._called("forward", stopwatch, keeping=self.train)
        self.hold(output)
        return reading

    def hold(self, output: Any) -> None:
        """Keep what the backward of a forward begins with; in training only."""
        if self.train:
            self.outputs = [t for _, t in tensors_in(output) if t.requires_grad]
            if self.grads is None:
                self.grads = [torch.randn_like(t) for t in self.outputs]

    def backward(self, stopwatch: Stopwatch) -> Reading | None:
        """Time the backward of the forward before; None if there is none."""
        if not self.outputs:
            self.release()
            return None
        outputs = self.outputs
        self.let_go_gradients()
        gradients = [t.clone() for t in self.begin_backward()]
        with self.peak.backward():
            _, reading = self.fillers["backward"].time(stopwatch, partial(torch.autograd.backward, outputs, gradients))
            del outputs
        return reading

    def begin_backward(self) -> list[Tensor]:
        """The gradients that the backward of what is held begins with; what is held is let go."""
        assert self.grads is not None  # made when it was held
        self.release()
        return self.grads

    def backward_input(self, stopwatch: Stopwatch) -> Reading | None:
        """Time the backward up to the gradients of the inputs; the graph stays."""
        if not self.outputs or not self.parted:
            return None
        self.let_go_gradients()
        gradients = [t.clone() for t in self.grads or ()]
        first = partial(inputs_first, self.outputs, gradients, self.edges, self.parameters)
        (_, self.left), reading = self.fillers["backward_input"].time(stopwatch, first)
        return reading

    def backward_weight(self, stopwatch: Stopwatch) -> Reading | None:
        """Time what that left to do for the parameters; the graph stays."""
        left, self.left = self.left, None
        return None if left is None else self.fillers["backward_weight"].time(stopwatch, left.finish)[1]

    def let_go_gradients(self) -> None:
        """Have those of parameters and inputs arrive as in a step."""
        if not self.accumulate:
            for parameter in self.parameters:
                parameter.grad = None
        for leaf in self.leaves:
            if isinstance(leaf, Tensor):
                leaf.grad = None

    def update(self, stopwatch: Stopwatch) -> Reading | None:
        """Time the update of the parameters; None if there is nothing to update."""
        return self.fillers["update"].time(stopwatch, self.optimizer.step)[1] if self.optimizer is not None else None

    @property
    def is_recomputed(self) -> bool:
        """Whether its forward may be computed again, for the backward."""
        return self.train and self.context is None and isinstance(self.function, nn.Module)

    def recompute(self, stopwatch: Stopwatch) -> Reading | None:
        """Time a forward that keeps nothing; None where none would be computed again."""
        if not self.is_recomputed:
            return None
        return self._called("recompute", stopwatch, keeping=False)[1]

    def release(self) -> None:
        """Let go of what a forward saved."""
        self.outputs, self.edges, self.left = [], [], None

    def prepared(self, *, keeping: bool) -> Callable[[], Any]:
        """A forward with inputs of its own, to be called once, with gradients on or off."""
        # A copy of each input: units may change theirs in place, and a producer would just have written it.
        given = [copied(leaf) for copied, leaf in zip(self.copied, self.leaves, strict=True)]
        if keeping and self.parted:
            self.edges = edges_of(tensor for _, tensor in tensors_in(given))
        if self.names is not None:  # nothing is to be looked for in them
            first = len(given) - len(self.names)
            args, kwargs = given[:first], dict(zip(self.names, given[first:], strict=True))
        else:
            args, kwargs = pytree.tree_unflatten(given, self.spec)
        if self.context is not None:
            return partial(self.context.run, self.function, args, kwargs)
        return partial(self.function, *args, **kwargs)

    def _called(self, phase: str, stopwatch: Stopwatch, *, keeping: bool) -> tuple[Any, Reading]:
        function = self.prepared(keeping=keeping)
        with torch.set_grad_enabled(keeping):
            return self.fillers[phase].time(stopwatch, function)


_Sink = getattr(torch._C._functions, "UndefinedGrad", None)


def _are_leaves(values: list[Any]) -> bool:
    return all(pytree.tree_structure(value).is_leaf() for value in values)


def as_input(leaf: Tensor) -> Tensor:
    """A copy whose gradient is computed and then let go, as a producer's backward takes it.

    To accumulate it in ``leaf`` could mean to copy it into another layout.
    """
    plain = type(leaf) in (Tensor, nn.Parameter) and leaf.layout == torch.strided
    return _Sink()(leaf) if _Sink is not None and plain and leaf.requires_grad else leaf.clone()


class _Peak:
    """What a step takes on a GPU at the most beyond what was there before it; nothing is known on other devices."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.bytes: int | None = None
        self.saved = 0

    @contextmanager
    def forward(self) -> Iterator[None]:
        """Around a forward."""
        if self.device.type != "cuda":
            yield
            return
        before = self._begin()
        yield
        self.bytes = torch.cuda.max_memory_allocated(self.device) - before
        self.saved = torch.cuda.memory_allocated(self.device) - before

    @contextmanager
    def backward(self) -> Iterator[None]:
        """Around a backward: what the forward saved is there before it."""
        if self.device.type != "cuda":
            yield
            return
        before = self._begin()
        yield
        self.bytes = max(self.bytes or 0, torch.cuda.max_memory_allocated(self.device) - before + self.saved)

    def _begin(self) -> int:
        torch.cuda.reset_peak_memory_stats(self.device)
        return torch.cuda.memory_allocated(self.device)
