"""Workloads: the operators of one step's forward, backward and update, found out without running them.

The step runs as it is measured (see :mod:`shardwright.profiler.measure`), but on fake tensors, which have shapes and no
values. A step that needs values runs on copies of the real ones instead.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from shardwright.errors import ShardwrightError
from shardwright.profiler.measuring.gpu_kernels import kernels_of
from shardwright.profiler.measuring.optimizers import make_optimizer
from shardwright.profiler.measuring.timed import Lent
from shardwright.profiler.recording.operations import Operation, OperationRecorder
from shardwright.profiler.recording.regions import Region, regions_told
from shardwright.profiler.recording.shapes import fake_like, unlogged
from shardwright.profiler.recording.structure import map_tensors, tensors_in
from shardwright.profiler.recording.unitgraph import Call

__all__ = ["Mode", "Workload", "Workloads"]

HOST_ONLY = "aten._local_scalar_dense.default"
"""Optimizers read their step count, which lies on the host, with it."""


@dataclass(frozen=True)
class Mode:
    """How a step is run."""

    train: bool
    optimizer: str = ""
    """Its name; empty where nothing is updated."""
    accumulate: bool = False
    """Gradients are added to what is there, as from the second micro-batch on."""
    foreach: bool = False
    """The optimizer handles all parameters in one call, as it does on GPUs."""
    kind: str = "cpu"
    """Of device: attention and dropout take the operators that they are there."""


@dataclass(frozen=True)
class Workload:
    """The operators that do something, in order."""

    forward: tuple[Operation, ...]
    backward: tuple[Operation, ...] = ()
    update: tuple[Operation, ...] = ()


class Workloads:
    """Finds out workloads; calls whose forwards are equal share one, as the layers of a stack do.

    Equal are forwards with the same operators on tensors of the same forms and the same graph for the backward.
    """

    def __init__(self) -> None:
        self.known: dict[Hashable, Workload] = {}

    def of(self, call: Call, mode: Mode) -> Workload:
        """The operators of one step of ``call``; neither its module nor its tensors are changed.

        Raises:
            ShardwrightError: the step cannot be copied, or fails, as one does whose path depends on values that are
                not there.
        """
        try:
            with unlogged(), FakeTensorMode(allow_non_fake_inputs=True), kernels_of(mode.kind):
                return self._run(_copied(call, fake_like), mode)
        except Exception as error:
            if _is_without_values(call):
                raise ShardwrightError(
                    f"a step depends on values, which are not there: {_line(error)}; build the model with its weights, "
                    "or profile it where it runs"
                ) from error
        try:
            with kernels_of(mode.kind):
                return self._run(_copied(call, _real_copy), mode)
        except Exception as error:
            raise ShardwrightError(f"a step cannot be run to see its operators: {_line(error)}") from error

    def _run(self, call: Call, mode: Mode) -> Workload:
        """Run a step once, recorded; its backward and update only if no equal forward is known."""
        parameters: list[nn.Parameter] = []
        if isinstance(call.function, nn.Module):
            call.function.train(mode.train)
            parameters = [p for p in call.function.parameters() if p.requires_grad]
        if mode.train and mode.accumulate:
            for parameter in parameters:
                parameter.grad = torch.zeros_like(parameter)
        args, kwargs = map_tensors(Tensor.clone, (call.args, call.kwargs))
        regions: list[int] = []  # their operators run again in the backward, of which the graph does not tell
        done: list[Operation] = []

        @contextmanager
        def noted() -> Iterator[None]:
            regions.append(len(done))
            yield
            regions.append(len(done))

        with torch.set_grad_enabled(mode.train), regions_told(lambda *_: Region(dissolves=False, around=noted())):
            if call.context is None:
                forward, output = _recorded(partial(call.function, *args, **kwargs), done)
            else:
                forward, output = _recorded(partial(call.context.run, call.function, args, kwargs), done)
        outputs = [t for _, t in tensors_in(output) if t.requires_grad] if mode.train else []
        if not outputs:
            # At a parameter by itself a gradient arrives all the same; without one, nothing is updated.
            return Workload(forward, (), _update(parameters, mode) if isinstance(call.function, Lent) else ())
        forms = tuple((p.shape, p.dtype) for p in parameters)
        key = mode, call.context, tuple(regions), forms, tuple(o.text for o in forward), tuple(_graph(outputs))
        if key not in self.known:
            grads = [torch.empty_like(t) for t in outputs]
            backward, _ = _recorded(lambda: torch.autograd.backward(outputs, grads))
            self.known[key] = Workload(forward, backward, _update(parameters, mode))
        return self.known[key]


def _graph(outputs: Iterable[Tensor]) -> Iterator[str]:
    """The names of the functions that a backward calls, each with those that it hands on to."""
    waiting = [t.grad_fn for t in outputs]
    number: dict[Any, int] = {}
    while waiting:
        node = waiting.pop()
        if node is not None and node not in number:
            number[node] = len(number)
            following = [following for following, _ in node.next_functions]
            yield f"{node.name()} {[number.get(f, -1) if f is not None else None for f in following]}"
            waiting += following


def _update(parameters: Sequence[nn.Parameter], mode: Mode) -> tuple[Operation, ...]:
    """The operators of an optimizer's step, on stand-ins of the parameters, when it has its state already."""
    stand_ins = [nn.Parameter(torch.zeros_like(parameter)) for parameter in parameters]
    optimizer = make_optimizer(mode.optimizer, stand_ins) if mode.optimizer else None
    if optimizer is None:
        return ()
    for parameter in stand_ins:
        parameter.grad = torch.zeros_like(parameter)
    for group in optimizer.param_groups:
        group["foreach"] = mode.foreach
    optimizer.step()
    return tuple(operation for operation in _recorded(optimizer.step)[0] if operation.name != HOST_ONLY)


def _recorded(
    function: Callable[[], Any], operations: list[Operation] | None = None
) -> tuple[tuple[Operation, ...], Any]:
    """The operators of a call that move or compute anything, and its result; all are added to ``operations``."""
    operations = [] if operations is None else operations
    with OperationRecorder(operations.append):
        result = function()
    return tuple(operation for operation in operations if operation.bytes or operation.flops), result


# Copies


def _copied(call: Call, replace: Callable[[Tensor], Tensor]) -> Call:
    """The call with ``replace(tensor)`` for every tensor in its arguments and, in a copy, for its module's."""
    function = call.function
    if isinstance(function, nn.Module):
        memo: dict[int, Any] = {}
        for module in function.modules():
            for _, tensor in tensors_in({name: value for name, value in vars(module).items() if name != "_modules"}):
                if id(tensor) not in memo:
                    memo[id(tensor)] = replace(tensor)
        function = copy.deepcopy(function, memo)
    args, kwargs = map_tensors(replace, (call.args, call.kwargs))
    return Call(function, args, kwargs, call.context)


def _real_copy(tensor: Tensor) -> Tensor:
    made = tensor.detach().clone()
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(made, tensor.requires_grad)
    return made.requires_grad_(tensor.requires_grad)


def _is_without_values(call: Call) -> bool:
    """Whether some tensor of the call has a shape only."""
    parts: list[Any] = [call.args, call.kwargs]
    if isinstance(call.function, nn.Module):
        parts += [*call.function.parameters(), *call.function.buffers()]
    return any(isinstance(t, FakeTensor) or t.is_meta for _, t in tensors_in(parts))


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
