"""Capture: one run of a model becomes the graph of its unit calls and the glue between them.

The model runs unchanged, under the :class:`~shardwright.profiler.recorder.Recorder`. So any Python in the forward is
fine, but the graph holds for the shapes and the path that this run took. :func:`checked_trace` therefore runs the model
on other values as well, and holds the replayed graph against it.
"""

from __future__ import annotations

from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from shardwright.errors import ShardwrightError
from shardwright.profiler.equality import relative_difference, same_values, tolerance
from shardwright.profiler.inputs import other_values, outputs_of
from shardwright.profiler.placed import refuse_placed
from shardwright.profiler.recorder import Recorder, SavedTensorsUncountedError
from shardwright.profiler.structure import nbytes
from shardwright.profiler.unitgraph import UnitGraph, mean_square_loss
from shardwright.profiler.units import find_units

__all__ = ["CaptureError", "as_found", "attributes_kept", "checked_trace", "evaluating", "trace"]


class CaptureError(ShardwrightError):
    """The captured graph is not the model, on other values than those that it was captured with."""


def trace(
    model: nn.Module,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    train: bool = True,
    units: Mapping[str, nn.Module] | None = None,
) -> UnitGraph:
    """Run ``model`` once on the inputs and capture it at unit level.

    The model's buffers, training flags and the random state are put back afterwards.

    Args:
        units: the modules that are placed whole, by path; by default those of :func:`find_units`.

    Raises:
        ShardwrightError: the forward fails.
    """
    units = _checked(model, units)
    with attributes_kept(model), as_found(model, train=train):
        return _recorded(model, units, args, dict(kwargs or {}), train=train)[1]


def checked_trace(
    model: nn.Module,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    train: bool = True,
    units: Mapping[str, nn.Module] | None = None,
) -> UnitGraph:
    """Capture as :func:`trace` does, and hold the graph against the model on a second input with other values.

    The captured input proves nothing, for a number that was baked in would pass. Outputs are compared, and in training
    the gradients of all parameters. A capture with obstacles is not compared: it says itself where it is unfaithful.

    Raises:
        CaptureError: the graph and the model differ.
        ShardwrightError: the forward fails.
    """
    units = _checked(model, units)
    kwargs = dict(kwargs or {})
    with attributes_kept(model):
        with as_found(model, train=train):
            earlier, other, expected = _run_on_other_values(model, units, args, kwargs, train=train)
        with as_found(model, train=train):
            _, capture, _ = _recorded(model, units, args, kwargs, train=train, earlier=earlier)
        if earlier is not None and not capture.obstacles:
            with as_found(model, train=train):
                _compare(capture, other, expected, train=train)
    return capture


@contextmanager
def attributes_kept(model: nn.Module) -> Iterator[None]:
    """Give every module its attributes back: parameters, buffers, hooks, and what a forward left on it (a cache).

    Not a copy of the model: a function that a module holds may refer to the model itself, and would to the original.
    """
    kept = [(module, dict(vars(module))) for module in model.modules()]
    contents = [(container, container.copy()) for _, attributes in kept for container in _containers(attributes)]
    try:
        yield
    finally:
        for container, content in contents:
            container.clear()
            container.extend(content) if isinstance(container, (list, deque)) else container.update(content)
        for module, attributes in kept:
            vars(module).clear()
            vars(module).update(attributes)


_CONTAINERS = (dict, OrderedDict, defaultdict, Counter, list, set, deque)


def _containers(value: Any, seen: set[int] | None = None) -> Iterator[Any]:
    """Python's own changeable containers in ``value``, which is one, or in each other."""
    seen = set() if seen is None else seen
    seen.add(id(value))
    yield value
    for inner in value.values() if isinstance(value, dict) else value:
        if type(inner) in _CONTAINERS and id(inner) not in seen:
            yield from _containers(inner, seen)


SMALL_BYTES = 2**31
"""Of parameters so large together no copy is kept while the model is captured."""
SEED = 1234
"""Both runs that are compared draw the same random numbers."""


def _recorded(
    model: nn.Module,
    units: dict[str, nn.Module],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    train: bool,
    earlier: Recorder | None = None,
) -> tuple[Recorder, UnitGraph, Any]:
    """Record one forward, without the bytes that autograd saves where they cannot be counted."""
    recorder = Recorder(model, units, train=train, earlier=earlier)
    try:
        return recorder, *recorder.record(args, kwargs)
    except SavedTensorsUncountedError:
        recorder = Recorder(model, units, train=train, earlier=earlier, counts_saved=False)
        return recorder, *recorder.record(args, kwargs)


def _run_on_other_values(
    model: nn.Module, units: dict[str, nn.Module], args: tuple[Any, ...], kwargs: dict[str, Any], *, train: bool
) -> tuple[Recorder | None, list[Tensor], dict[str, Tensor]]:
    """Run the model on the first other input that it takes; the recorder, that input, and what came of it."""
    for candidate in other_values(args, kwargs):
        torch.manual_seed(SEED)
        inputs = [t.detach().clone() for t in outputs_of(candidate)]
        try:
            recorder, graph, output = _recorded(model, units, *candidate, train=train)
        except ShardwrightError:
            continue  # not every value is an input: an index out of range, a mask that masks all
        found = outputs_of(output)
        return recorder, inputs, _results([found[i] for i in graph.output_places], model, train=train)
    return None, [], {}


def _results(outputs: list[Tensor], model: nn.Module, *, train: bool) -> dict[str, Tensor]:
    """Outputs, and in training the gradients that the stand-in loss gives the parameters, by what they are."""
    results = {f"output {index}": t.detach() for index, t in enumerate(outputs)}
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    floating = [t for t in outputs if t.is_floating_point() and t.requires_grad]
    if train and trained and floating:
        grads = torch.autograd.grad(mean_square_loss(floating), list(trained.values()), allow_unused=True)
        pairs = zip(trained, grads, strict=True)
        results |= {f"the gradient of {name}": grad for name, grad in pairs if grad is not None}
    return results


def _compare(capture: UnitGraph, inputs: list[Tensor], expected: dict[str, Tensor], *, train: bool) -> None:
    """Replay ``capture`` on ``inputs`` and hold what comes out against ``expected``."""
    torch.manual_seed(SEED)
    name = type(capture.model).__name__
    try:
        with torch.set_grad_enabled(train):
            found = _results(list(capture.module()(*inputs)), capture.model, train=train)
    except Exception as error:
        raise CaptureError(
            f"the capture of {name} does not replay on other values than the sample inputs: "
            f"{type(error).__name__}: {' '.join(str(error).split())}"
        ) from error
    for what, tensor in expected.items():
        other = found.get(what)
        if other is None and not bool(tensor.count_nonzero()):
            continue
        difference = float("inf") if other is None else relative_difference(tensor, other)
        if not difference <= 10 * tolerance(tensor.dtype):
            raise CaptureError(
                f"the capture of {name} is not the model: on other values than the sample inputs, {what} differs by "
                f"{difference:.2g} of its largest value; something in the forward is remembered between calls or "
                "handed on outside arguments and results"
            )


def _checked(model: nn.Module, units: Mapping[str, nn.Module] | None) -> dict[str, nn.Module]:
    refuse_placed(model, "profile")
    found = dict(units) if units is not None else find_units(model)
    if "" in found:
        raise ShardwrightError(
            f"{type(model).__name__} has no child modules, so there is nothing to split; "
            "pass the model that holds it, or put its layers in an nn.Sequential"
        )
    lazy = [name for name, p in model.named_parameters() if isinstance(p, nn.UninitializedParameter)]
    if lazy:
        raise ShardwrightError(f"{lazy[0]} has no shape yet: run one forward of the model before it is profiled")
    return found


@contextmanager
def as_found(model: nn.Module, *, train: bool) -> Iterator[None]:
    """Run the model in training or not; its state, its mode and the random state are put back afterwards."""
    with _eager(), _state_kept(model), torch.random.fork_rng(devices=[]), torch.set_grad_enabled(train):
        model.train(train)
        yield


def _eager() -> Any:
    """Have compiled modules run as Python, where hooks and modes see what they do."""
    return torch.compiler.set_stance("force_eager")


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode, with its state and the random state put back afterwards."""
    with _eager(), attributes_kept(model), _state_kept(model), torch.random.fork_rng(devices=[]):
        model.eval()
        yield


@contextmanager
def _state_kept(model: nn.Module) -> Iterator[None]:
    """Put back what a forward may change: buffers (batch statistics), also replaced ones, and training flags.

    Parameters too, which some forwards write (codebooks), unless a copy of them would be large.
    """
    held = {name: (buffer, buffer.detach().clone()) for name, buffer in model.named_buffers()}
    parameters = list(model.parameters())
    small = sum(nbytes(p) for p in parameters) <= SMALL_BYTES
    kept = [(p, p.detach().clone()) for p in parameters if small]
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
        with torch.no_grad():
            for parameter, values in kept:
                if not same_values(parameter, values):
                    parameter.data.copy_(values)
            for name, (buffer, before) in held.items():
                if buffer.shape == before.shape and not same_values(buffer, before):
                    buffer.copy_(before)
                holder, _, own = name.rpartition(".")
                model.get_submodule(holder)._buffers[own] = buffer
