"""Captures for a profile: units of the right grain, and a graph at each size of the micro-batch."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from shardwright.errors import ShardwrightError
from shardwright.profiler.equality import relative_difference, same_values
from shardwright.profiler.inputs import (
    all_microbatches,
    batch_size,
    copied_inputs,
    input_specs,
    is_batched,
    microbatch,
    outputs_of,
)
from shardwright.profiler.shapes import has_values
from shardwright.profiler.trace import CaptureError, checked_trace, evaluating, trace
from shardwright.profiler.unitgraph import UnitGraph
from shardwright.profiler.units import choose_units, find_units

__all__ = ["Progress", "captures_of", "check_divisible", "silent"]

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how much of it is done, and how much there is."""
DIVISION_TOLERANCE = 1e-3
"""Rounding of any dtype stays below it, mixing samples up does not."""


def silent(_what: str, _done: int, _whole: int) -> None:
    """Progress that nobody asked for."""


def captures_of(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    counts: Sequence[int],
    *,
    devices: int,
    depth: int | None = None,
    units: Sequence[str] = (),
    train: bool,
    strict: bool = True,
    tell: Progress | None = None,
) -> tuple[dict[int, UnitGraph], str]:
    """Captures at each number of micro-batches, with units of the right grain for so many devices; see :func:`profile`.

    A module that was opened may turn out to be something that cannot be captured, such as a loop that follows the data;
    then the units are those that the structure gives.

    Returns:
        The captures, and why there is one only, if so.
    """
    options: dict[str, Any] = {"train": train, "strict": strict, "tell": tell or silent}
    refined = depth is None and not units
    try:
        with evaluating(model):
            smallest = microbatch(args, kwargs, counts[-1])
            chosen = choose_units(model, *copied_inputs(*smallest), devices=devices, depth=depth, patterns=units)
    except ShardwrightError:
        raise
    except Exception:  # what is wrong with the forward is told by the capture
        chosen = find_units(model)
    coarse = find_units(model)
    if not refined or chosen.keys() == coarse.keys() or "" in chosen:
        return _captures(model, args, kwargs, counts, chosen, **options)
    try:
        fine = _captures(model, args, kwargs, counts, chosen, **options)
        if not fine[0][1].obstacles:
            return fine
    except ShardwrightError:
        pass
    return _captures(model, args, kwargs, counts, coarse, **options)


def _captures(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    counts: Sequence[int],
    units: Mapping[str, nn.Module],
    *,
    train: bool,
    strict: bool,
    tell: Progress,
) -> tuple[dict[int, UnitGraph], str]:
    """A capture for each number of micro-batches; unless ``strict``, of the whole batch alone where it does not divide.

    Returns:
        The captures in the order of ``counts``, and why there is one only, if so.
    """
    try:
        captures = _captures_at(model, args, kwargs, counts, units, train=train, checked=counts[-1:], tell=tell)
        obstacles = [obstacle for capture in captures.values() for obstacle in capture.obstacles]
        if not obstacles and _other_path(captures):
            # A first call may fill a table that later calls read. What is checked runs the model before, so it is late.
            captures = _captures_at(model, args, kwargs, counts, units, train=train, checked=counts, tell=tell)
            obstacles = [obstacle for capture in captures.values() for obstacle in capture.obstacles]
        if not obstacles:
            other = _other_path(captures)
            if other:
                raise ShardwrightError(other)
            if len(counts) > 1 and has_values(model):
                check_divisible(model, args, kwargs, counts[-1])
            return {count: captures[count] for count in counts}, ""
        reason = obstacles[0]
    except ShardwrightError as error:
        if strict or len(counts) == 1:
            raise
        reason = str(error)
    finally:
        tell("capture", len(counts), len(counts))
    return {1: _capture(model, args, kwargs, 1, units, train=train, check=True)}, reason if len(counts) > 1 else ""


def _captures_at(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    counts: Sequence[int],
    units: Mapping[str, nn.Module],
    *,
    train: bool,
    checked: Sequence[int],
    tell: Progress,
) -> dict[int, UnitGraph]:
    """Captures at each of ``counts``, up to an obstacle; those that are ``checked`` run on other values too.

    The smallest micro-batch comes first: it is the quickest to check.
    """
    captures: dict[int, UnitGraph] = {}
    for done, count in enumerate(reversed(counts)):
        tell("capture", done, len(counts))
        captures[count] = _capture(model, args, kwargs, count, units, train=train, check=count in checked)
        if captures[count].obstacles:
            break
    return captures


def _capture(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    count: int,
    units: Mapping[str, nn.Module],
    *,
    train: bool,
    check: bool,
) -> UnitGraph:
    try:
        piece = microbatch(args, kwargs, count)
        if not check or not has_values(model):
            return trace(model, *piece, train=train, units=units)
        try:
            return checked_trace(model, *piece, train=train, units=units)
        except CaptureError as error:  # a pipeline would compute something else; a placed model runs its own forward
            capture = trace(model, *piece, train=train, units=units)
            capture.obstacles.append(str(error))
            return capture
    except ShardwrightError as error:
        if count == 1:
            raise
        batch = batch_size(args, kwargs)
        divided = [spec.name for spec in input_specs(args, kwargs) if spec.shape[:1] == (batch,)]
        raise ShardwrightError(
            f"at {count} micro-batches, inputs {', '.join(divided)} divided along dimension 0: {error}; "
            "profile with --microbatches 1 if that is not the batch"
        ) from error


def check_divisible(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], count: int) -> None:
    """Refuse a model whose result depends on how the batch is divided.

    Compared in evaluation, where batch normalisation treats each sample alone; a model that draws numbers even there
    cannot be compared and passes.

    Raises:
        ShardwrightError: the outputs of ``count`` micro-batches are not those of the whole batch.
    """
    with evaluating(model), torch.no_grad():
        whole, again = (outputs_of(_called(model, *copied_inputs(args, kwargs))) for _ in range(2))
        pieces = [outputs_of(_called(model, *piece)) for piece in all_microbatches(*copied_inputs(args, kwargs), count)]
    batch = batch_size(args, kwargs)
    for index, expected in enumerate(whole):
        if not is_batched(expected, batch) or not same_values(expected, again[index]):
            continue
        found = torch.cat([piece[index] for piece in pieces])
        difference = relative_difference(expected, found)
        if difference > DIVISION_TOLERANCE:
            raise ShardwrightError(
                f"the result depends on how the batch is divided: output {index} of {count} micro-batches differs from "
                f"the whole batch's by {difference:.2g} of its largest value; is dimension 0 of the inputs the batch? "
                "profile with --microbatches 1"
            )


def _called(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return model(*args, **kwargs)


def _other_path(captures: Mapping[int, UnitGraph]) -> str:
    """Where the forward takes another path than with the whole batch; nothing if it does not."""
    paths = {count: [(step.name, step.type) for step in capture.steps] for count, capture in captures.items()}
    for count, path in sorted(paths.items()):
        if path != paths[1]:
            pairs = itertools.zip_longest(paths[1], path, fillvalue=("nothing", ""))
            whole, part = next((a, b) for a, b in pairs if a != b)
            return (
                f"the forward takes another path at {count} micro-batches: {part[0]} where the whole batch has "
                f"{whole[0]}; profile with --microbatches 1"
            )
    return ""
