"""Captures for a profile: units of the right grain, and a graph at each size of the micro-batch."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from shardwright.errors import ShardwrightError
from shardwright.profiler.recording.compiler import uncompiled
from shardwright.profiler.recording.equality import relative_difference, same_values
from shardwright.profiler.recording.inputs import (
    all_microbatches,
    batch_size,
    copied_inputs,
    input_specs,
    is_batched,
    microbatch,
    outputs_of,
)
from shardwright.profiler.recording.shapes import has_values
from shardwright.profiler.recording.state import Snapshot
from shardwright.profiler.recording.unitgraph import UnitGraph
from shardwright.profiler.trace import CaptureError, checked_trace, evaluating, trace
from shardwright.profiler.units import choose_units, find_units

__all__ = ["Progress", "captures_of", "check_divisible", "silent"]

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how much of it is done, and how much there is."""
DIVISION_TOLERANCE = 1e-3
"""Rounding of any dtype stays below it, mixing samples up does not."""


def silent(_what: str, _done: int, _whole: int) -> None:
    """Progress that nobody asked for."""


@uncompiled
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
    found: Snapshot | None = None,
) -> tuple[dict[int, UnitGraph], str]:
    """Captures at each number of micro-batches, with units of the right grain for so many devices; see :func:`profile`.

    A module that was opened may turn out to be something that cannot be captured, such as a loop that follows the data;
    then the units are those that the structure gives.

    Args:
        found: the model as it is now, where that is known from earlier.

    Returns:
        The captures, and why there is one only, if so.
    """
    found = found or Snapshot(model)
    refined = depth is None and not units
    smallest: list[Any] = []
    try:
        with evaluating(model, found):
            piece = copied_inputs(*microbatch(args, kwargs, counts[-1]))
            chosen = choose_units(model, *piece, devices=devices, depth=depth, patterns=units, returned=smallest.append)
    except ShardwrightError:
        raise
    except Exception:  # what is wrong with the forward is told by the capture
        chosen = find_units(model)
    coarse = find_units(model)
    sample = _Sample(model, args, kwargs, chosen, train, found, tuple(map(outputs_of, smallest)))
    options: dict[str, Any] = {"strict": strict, "tell": tell or silent}
    if not refined or chosen.keys() == coarse.keys() or "" in chosen:
        return _captures(sample, counts, **options)
    try:
        fine = _captures(sample, counts, **options)
        checkpointed = fine[0][1].checkpointed_modules
        if checkpointed:  # which are known now; in evaluation most models checkpoint nothing
            with evaluating(model, found):
                piece = copied_inputs(*microbatch(args, kwargs, counts[-1]))
                again = choose_units(model, *piece, devices=devices, checkpointed=checkpointed)
            if again.keys() != chosen.keys():
                fine = _captures(replace(sample, units=again), counts, **options)
        if not fine[0][1].obstacles:
            return fine
    except ShardwrightError:
        pass
    return _captures(replace(sample, units=coarse), counts, **options)


@dataclass(frozen=True)
class _Sample:
    """What is captured, and how."""

    model: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    units: Mapping[str, nn.Module]
    train: bool
    found: Snapshot
    smallest: Sequence[list[Tensor]] = ()
    """What the model returned for the first of the smallest micro-batches in evaluation, if that has been run."""


def _captures(
    sample: _Sample, counts: Sequence[int], *, strict: bool, tell: Progress
) -> tuple[dict[int, UnitGraph], str]:
    """A capture for each number of micro-batches; unless ``strict``, of the whole batch alone where it does not divide.

    Returns:
        The captures in the order of ``counts``, and why there is one only, if so.
    """
    try:
        captures = _captures_at(sample, counts, checked=counts[-1:], tell=tell)
        obstacles = [obstacle for capture in captures.values() for obstacle in capture.obstacles]
        if not obstacles and _other_path(captures):
            # A first call may fill a table that later calls read. What is checked runs the model before, so it is late.
            captures = _captures_at(sample, counts, checked=counts, tell=tell)
            obstacles = [obstacle for capture in captures.values() for obstacle in capture.obstacles]
        if not obstacles:
            other = _other_path(captures)
            if other:
                raise ShardwrightError(other)
            if len(counts) > 1 and has_values(sample.model):
                check_divisible(
                    sample.model, sample.args, sample.kwargs, counts[-1], sample.found, known=sample.smallest
                )
            return {count: captures[count] for count in counts}, ""
        reason = obstacles[0]
    except ShardwrightError as error:
        if strict or len(counts) == 1:
            raise
        reason = str(error)
    finally:
        tell("capture", len(counts), len(counts))
    return {1: _capture(sample, 1, check=True)}, reason if len(counts) > 1 else ""


def _captures_at(
    sample: _Sample, counts: Sequence[int], *, checked: Sequence[int], tell: Progress
) -> dict[int, UnitGraph]:
    """Captures at each of ``counts``, up to an obstacle; those that are ``checked`` run on other values too.

    The smallest micro-batch comes first: it is the quickest to check. Where it tells that numbers decide nothing, those
    that are not checked compute arithmetic of one form once.
    """
    captures: dict[int, UnitGraph] = {}
    for done, count in enumerate(reversed(counts)):
        tell("capture", done, len(counts))
        first = captures.get(counts[-1])
        short = None if first is None or count in checked else _short_capture(sample, count, first)
        captures[count] = short or _capture(sample, count, check=count in checked)
        if captures[count].obstacles:
            break
    return captures


def _short_capture(sample: _Sample, count: int, first: UnitGraph) -> UnitGraph | None:
    """A capture that computes arithmetic of one form once, as the layers of a stack have it; None if that may mislead.

    It may unless ``first``, captured with all its numbers, made no number of Python and no shape of a tensor's values,
    and the steps now are the same and make none either.
    """
    if not has_values(sample.model) or not _follows_from_shapes(first):
        return None
    try:
        piece = microbatch(sample.args, sample.kwargs, count)
        capture = trace(sample.model, *piece, train=sample.train, units=sample.units, found=sample.found, echoes=True)
    except ShardwrightError:  # told of the real numbers, if of these
        return None
    return capture if _follows_from_shapes(capture) and _path(capture) == _path(first) else None


def _follows_from_shapes(capture: UnitGraph) -> bool:
    return not (capture.obstacles or capture.guards or capture.reads_numbers)


def _capture(sample: _Sample, count: int, *, check: bool) -> UnitGraph:
    model = sample.model
    options: dict[str, Any] = {"train": sample.train, "units": sample.units, "found": sample.found}
    try:
        piece = microbatch(sample.args, sample.kwargs, count)
        if not check or not has_values(model):
            return trace(model, *piece, **options)
        try:
            return checked_trace(model, *piece, **options)
        except CaptureError as error:  # a pipeline would compute something else; a placed model runs its own forward
            capture = trace(model, *piece, **options)
            capture.obstacles.append(str(error))
            return capture
    except ShardwrightError as error:
        if count == 1:
            raise
        batch = batch_size(sample.args, sample.kwargs)
        divided = [spec.name for spec in input_specs(sample.args, sample.kwargs) if spec.shape[:1] == (batch,)]
        raise ShardwrightError(
            f"at {count} micro-batches, inputs {', '.join(divided)} divided along dimension 0: {error}; "
            "profile with --microbatches 1 if that is not the batch"
        ) from error


def check_divisible(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    count: int,
    found: Snapshot | None = None,
    *,
    known: Sequence[list[Tensor]] = (),
) -> None:
    """Refuse a model whose result depends on how the batch is divided.

    Compared in evaluation, where batch normalisation treats each sample alone; a model that draws numbers even there
    cannot be compared and passes.

    All micro-batches are compared: where each of two has the longest sample of the batch, the two tell nothing of a
    model that divides by the greatest length.

    Args:
        count: how many micro-batches there are.
        found: the model as it is now, where that is known from earlier.
        known: what the first micro-batch is known to give, if it is: its outputs, as the only item.

    Raises:
        ShardwrightError: the outputs of the micro-batches are not those of the whole batch.
    """

    def run(piece: tuple[tuple[Any, ...], dict[str, Any]]) -> list[Tensor]:
        return [t.detach() for t in outputs_of(model(*piece[0], **piece[1]))]

    def compared(first: Sequence[list[Tensor]]) -> tuple[list[Tensor], dict[int, float]]:
        pieces = list(all_microbatches(*copied_inputs(args, kwargs), count))
        expected = run(copied_inputs(args, kwargs))
        parts = [*first, *map(run, pieces[len(first) :])]
        return expected, _differences(expected, parts, batch_size(args, kwargs))

    def both_compared() -> tuple[list[Tensor], list[Tensor], dict[int, float]]:
        expected, differences = compared(known)
        again, confirmed = compared(()) if differences else (expected, differences)
        return expected, again, confirmed

    with evaluating(model, found):
        try:
            with torch.no_grad():
                expected, again, confirmed = both_compared()
        except RuntimeError as error:
            if "does not require grad" not in str(error):
                raise
            known = ()
            expected, again, confirmed = both_compared()  # it takes gradients itself
    for index, difference in confirmed.items():
        if same_values(expected[index], again[index]):
            raise ShardwrightError(
                f"the result depends on how the batch is divided: output {index} of {count} micro-batches differs from "
                f"the whole batch's by {difference:.2g} of its largest value; is dimension 0 of the inputs the batch? "
                "profile with --microbatches 1"
            )


def _differences(whole: list[Tensor], pieces: list[list[Tensor]], batch: int) -> dict[int, float]:
    """By output, how far the pieces are from the whole batch's, where that is more than rounding."""
    found = {}
    for index, output in enumerate(whole):
        if is_batched(output, batch):
            shape = batch // len(pieces), *output.shape[1:]
            alike = all(len(piece) == len(whole) and piece[index].shape == shape for piece in pieces)
            parts = [piece[index] for piece in pieces] if alike else []
            found[index] = relative_difference(output, torch.cat(parts)) if alike else float("inf")
    return {index: difference for index, difference in found.items() if difference > DIVISION_TOLERANCE}


def _other_path(captures: Mapping[int, UnitGraph]) -> str:
    """Where the forward takes another path than with the whole batch; nothing if it does not."""
    paths = {count: _path(capture) for count, capture in captures.items()}
    for count, path in sorted(paths.items()):
        if path != paths[1]:
            pairs = itertools.zip_longest(paths[1], path, fillvalue=("nothing", ""))
            whole, part = next((a, b) for a, b in pairs if a != b)
            return (
                f"the forward takes another path at {count} micro-batches: {part[0]} where the whole batch has "
                f"{whole[0]}; {_remedy(captures[1].guards, captures[count].guards)}profile with --microbatches 1"
            )
    return ""


def _remedy(whole: Sequence[str], part: Sequence[str]) -> str:
    """What to do where the two paths part at a number that is read from a mask or from indices; else nothing."""
    differing = next(((a, b) for a, b in zip(whole, part, strict=False) if a != b), None)
    if differing is None:
        return ""
    before, now = differing[0].rpartition(" gives ")[2], differing[1]
    return (
        f"{now} for the first of them, and {before} for all samples together: give sample inputs that decide "
        "this alike in every sample, such as a mask with padding in each of them or in none, or "
    )


def _path(capture: UnitGraph) -> list[tuple[str, str]]:
    return [(step.name, step.type) for step in capture.steps]
