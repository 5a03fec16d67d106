"""Capture: one run of a model becomes the graph of its unit calls and the glue between them.

The model runs unchanged, under the :class:`~shardwright.profiler.recording.recorder.Recorder`. So any Python in the
forward is fine, but the graph holds for the shapes and the path that this run took. :func:`checked_trace` therefore
runs the model on other values as well, and holds the replayed graph against it.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from shardwright.errors import ShardwrightError
from shardwright.profiler.recording.callsites import functions_applied
from shardwright.profiler.recording.chance import chance_kept, let_draw
from shardwright.profiler.recording.compiler import eager, uncompiled
from shardwright.profiler.recording.equality import relative_difference, tolerance
from shardwright.profiler.recording.inputs import copied_inputs, other_values, outputs_of
from shardwright.profiler.recording.placed import refuse_placed
from shardwright.profiler.recording.recorder import Recorder, SavedTensorsUncountedError
from shardwright.profiler.recording.regions import not_reentrant
from shardwright.profiler.recording.state import Snapshot, attributes_kept
from shardwright.profiler.recording.unitgraph import UnitGraph, mean_square_loss
from shardwright.profiler.units import find_units

__all__ = ["CaptureError", "as_found", "attributes_kept", "checked_trace", "evaluating", "refuse_lazy", "trace"]


class CaptureError(ShardwrightError):
    """The captured graph is not the model, on other values than those that it was captured with."""


@uncompiled
def trace(
    model: nn.Module,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    train: bool = True,
    units: Mapping[str, nn.Module] | None = None,
    found: Snapshot | None = None,
    echoes: bool = False,
) -> UnitGraph:
    """Run ``model`` once on the inputs and capture it at unit level.

    The model's state, also what hangs on its modules, and the random state are put back afterwards; the inputs are
    copied before.

    Args:
        units: the modules that are placed whole, by path; by default those of :func:`find_units`.
        found: the model as it is now, where that is known from earlier.
        echoes: of arithmetic of one form only the first is computed, and its result stands in for the others', in a
            forward that is known to go the same way whatever the numbers are.

    Raises:
        ShardwrightError: the forward fails.
    """
    units = _checked(model, units)
    found = found or Snapshot(model)
    with found.attributes_kept():
        return _captured(model, units, args, kwargs or {}, found, train=train, echoes=echoes)


@uncompiled
def checked_trace(
    model: nn.Module,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    train: bool = True,
    units: Mapping[str, nn.Module] | None = None,
    found: Snapshot | None = None,
) -> UnitGraph:
    """Capture as :func:`trace` does, and hold the graph against the model on a second input with other values.

    The captured input proves nothing, for a number that was baked in would pass. Outputs are compared, and in training
    the gradients of all parameters. A capture with obstacles is not compared: it says itself where it is unfaithful.

    Raises:
        CaptureError: the graph and the model differ.
        ShardwrightError: the forward fails.
    """
    units = _checked(model, units)
    args, kwargs = copied_inputs(args, kwargs or {})
    found = found or Snapshot(model)
    with found.attributes_kept():
        with as_found(found, train=train):
            earlier, other, expected = _run_on_other_values(model, units, args, kwargs, train=train)
        # Where the other run drew the smallest random numbers, this one draws the largest.
        capture = _captured(model, units, args, kwargs, found, train=train, earlier=earlier, draws="largest")
    if earlier is not None and not capture.obstacles:
        # A pipeline gets the model as it was: what these runs have left on its modules must not help the graph.
        with found.attributes_kept(), as_found(found, train=train):
            _compare(capture, other, expected, train=train)
    return capture


SEED = 1234


def _draw_alike() -> None:
    """Let the run that follows draw the random numbers of every other that begins so."""
    torch.manual_seed(SEED)
    let_draw("smallest")


def _captured(
    model: nn.Module,
    units: dict[str, nn.Module],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    found: Snapshot,
    *,
    train: bool,
    earlier: Recorder | None = None,
    echoes: bool = False,
    draws: Literal["largest"] | None = None,
) -> UnitGraph:
    """Record one forward of the model as found; once more where some of what it checkpoints cannot be made anew."""
    plain = frozenset(earlier.overwritten if earlier is not None else ())
    while True:
        with as_found(found, train=train):
            if draws is not None:
                let_draw(draws)
            inputs = copied_inputs(args, kwargs)
            recorder, capture, _ = _recorded(
                model, units, *inputs, train=train, earlier=earlier, echoes=echoes, plain=plain
            )
        if recorder.overwritten <= plain:
            return capture
        plain |= recorder.overwritten


def _recorded(
    model: nn.Module,
    units: dict[str, nn.Module],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    train: bool,
    earlier: Recorder | None = None,
    counts: bool = True,
    echoes: bool = False,
    plain: Container[str] = (),
) -> tuple[Recorder, UnitGraph, Any]:
    """Record one forward, without the bytes that autograd saves where they cannot be counted.

    Args:
        counts: whether operators and what autograd saves are counted at all, or the graph alone is made.
    """
    options: dict[str, Any] = {"train": train, "earlier": earlier, "echoes": echoes, "plain": plain}
    recorder = Recorder(model, units, counts_saved=counts, counts_operations=counts, **options)
    try:
        return recorder, *recorder.record(args, kwargs)
    except SavedTensorsUncountedError:
        recorder = Recorder(model, units, counts_saved=False, **options)
        return recorder, *recorder.record(args, kwargs)


def _run_on_other_values(
    model: nn.Module, units: dict[str, nn.Module], args: tuple[Any, ...], kwargs: dict[str, Any], *, train: bool
) -> tuple[Recorder | None, list[Tensor], dict[str, Tensor]]:
    """Run the model on the first other input that it takes; the recorder, that input, and what came of it."""
    for candidate in other_values(args, kwargs):
        _draw_alike()
        inputs = [t.detach().clone() for t in outputs_of(candidate)]
        try:
            recorder, graph, output = _recorded(model, units, *candidate, train=train, counts=False)
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
    _draw_alike()
    name = type(capture.model).__name__
    try:
        with torch.set_grad_enabled(train), functions_applied(not_reentrant):
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
                f"{difference:.2g} of its largest value; something in the forward is remembered between calls, "
                "handed on outside arguments and results, or decided by random numbers of Python or NumPy"
            )


def _checked(model: nn.Module, units: Mapping[str, nn.Module] | None) -> dict[str, nn.Module]:
    refuse_placed(model, "profile")
    found = dict(units) if units is not None else find_units(model)
    if "" in found:
        raise ShardwrightError(
            f"{type(model).__name__} has no child modules, so there is nothing to split; "
            "pass the model that holds it, or put its layers in an nn.Sequential"
        )
    refuse_lazy(model)
    return found


def refuse_lazy(model: nn.Module) -> None:
    """Refuse a model whose lazy modules have not run yet."""
    named = (*model.named_parameters(), *model.named_buffers())
    without = UninitializedBuffer, UninitializedParameter
    lazy = next((name for name, tensor in named if isinstance(tensor, without)), None)
    if lazy is not None:
        raise ShardwrightError(f"{lazy} has no shape yet: run one forward of the model before it is profiled")


@contextmanager
def as_found(found: Snapshot, *, train: bool) -> Iterator[None]:
    """Run the model in training or not; its state, its mode and the random state are put back afterwards."""
    with eager(), found.state_kept(), chance_kept(), torch.set_grad_enabled(train):
        try:
            found.model.train(train)
        except NotImplementedError as error:
            raise ShardwrightError(
                f"{type(found.model).__name__} cannot be put into training or evaluation ({error}), as one that was "
                "exported (torch.export): profile the model that it was made from"
            ) from error
        yield


@contextmanager
def evaluating(model: nn.Module, found: Snapshot | None = None) -> Iterator[None]:
    """The model in evaluation mode, with its state and the random state put back afterwards."""
    found = found or Snapshot(model)
    with eager(), found.attributes_kept(), found.state_kept(), chance_kept():
        model.eval()
        yield
