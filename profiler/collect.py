"""The profiler: capture at each micro-batch size, measure every step on every device, weigh, time the links."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from shardwright.errors import ShardwrightError
from shardwright.profiler.devices import find_devices, spare_host_bytes
from shardwright.profiler.equality import relative_difference
from shardwright.profiler.inputs import (
    all_microbatches,
    batch_size,
    default_counts,
    input_specs,
    is_batched,
    microbatch,
    outputs_of,
)
from shardwright.profiler.links import disk_rate, fetch_rates, measure_links
from shardwright.profiler.measure import (
    Samples,
    add_subject,
    measure_all,
    prepare,
    summary,
)
from shardwright.profiler.memory import StepMemory, count_step
from shardwright.profiler.optimizers import OptimizerLike, OptimizerMemory, optimizer_name
from shardwright.profiler.pool import Pool
from shardwright.profiler.profile import Device, Measurement, Node, Profile, Tie, Variation
from shardwright.profiler.profile import Tensor as TensorRecord
from shardwright.profiler.trace import CaptureError, as_found, attributes_kept, checked_trace, evaluating, trace
from shardwright.profiler.unitgraph import Step, UnitGraph, nbytes
from shardwright.profiler.units import choose_units, find_units, structure_digest

__all__ = [
    "START_LIMIT_S",
    "Progress",
    "captures_of",
    "count_steps",
    "measurements_of",
    "nodes_of",
    "profile",
    "silent",
    "tensors_of",
    "ties_of",
]

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how much of it is done, and how much there is."""

DIVISION_TOLERANCE = 1e-3
"""Rounding of any dtype stays below it, mixing samples up does not."""
START_LIMIT_S = 120.0
ROUND_LIMIT_S = 600.0
"""A round may take so long before a worker counts as hung."""


def profile(
    model: nn.Module,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    devices: Sequence[str] | None = None,
    train: bool = True,
    optimizer: OptimizerLike = "adam",
    master_weights: bool = False,
    microbatches: Sequence[int] | None = None,
    depth: int | None = None,
    units: Sequence[str] = (),
    rounds: int = 11,
    budget_s: float = 120.0,
    name: str | None = None,
    progress: Progress | None = None,
) -> Profile:
    """Time and weigh every unit of ``model`` on every device, each in a worker process of its own.

    The model is not changed. All devices measure at once, as they will compute at once when the model is split.

    Args:
        args: a batch, as the model is called.
        kwargs: likewise.
        devices: ``["cuda:0", "cpu:0"]``; all CUDA devices by default, or two CPU workers where there is none.
        train: measure backward and update too.
        optimizer: one of ``torch.optim`` by its class's name (``"adamw"``, ``"sgd(momentum=0.9)"``), a class of
            optimizers, or a ``functools.partial`` of one.
        master_weights: parameters of lower precision have a copy in fp32 that the optimizer works on; its bytes are
            counted, the copying is not timed.
        microbatches: into how many micro-batches the batch is to be divided; 1, 2, 4 and 8 by default.
        depth: units are the modules so deep in the model, 1 = its own children; by default the children of containers,
            opened where one does too much of the work.
        units: paths of modules, such as ``"decoder.layers.*"``, that are units, whatever they hold.
        rounds: how often each step is timed, at most.
        budget_s: seconds of measuring after which no further round begins, once there are three.
        name: what the profile calls the model; its class by default.
        progress: told what is being done.

    Raises:
        ShardwrightError: the forward fails, a device does not exist, or a worker fails.
    """
    kwargs = dict(kwargs or {})
    tell = progress or silent
    weighed = OptimizerMemory(optimizer_name(optimizer), master_weights=master_weights) if train else None
    if train and not any(p.requires_grad for p in model.parameters()):
        raise ShardwrightError("no parameter requires a gradient: there is nothing to train; profile with --inference")
    if rounds < 1:
        raise ShardwrightError(f"{rounds} rounds measure nothing; use 3 or more")
    batch = batch_size(args, kwargs)
    counts = tuple(sorted({1, *(microbatches if microbatches is not None else default_counts(batch))}))
    found = find_devices(devices)

    captures, undivided = captures_of(
        model,
        args,
        kwargs,
        counts,
        devices=len(found),
        depth=depth,
        units=units,
        train=train,
        strict=microbatches is not None,
        tell=tell,
    )
    counted = {count: count_steps(capture, train=train) for count, capture in captures.items()}
    with Pool(found) as pool:
        samples = _measure(
            pool,
            found,
            captures,
            train=train,
            optimizer=weighed.name if weighed else "",
            rounds=rounds,
            budget_s=budget_s,
            tell=tell,
        )
        tell("links", 0, 1)
        links = measure_links(pool, found)
        rates = {} if train else fetch_rates(pool, found)
        tell("links", 1, 1)
    whole = captures[1]
    return Profile(
        model=name or type(model).__name__,
        structure=structure_digest(model),
        inputs=input_specs(args, kwargs),
        batch=batch,
        train=train,
        optimizer=weighed.name if weighed else "none",
        master_weights=master_weights and train,
        torch_version=torch.__version__,
        microbatches=tuple(captures),
        devices=tuple(d.model_copy(update={"fetch_bytes_per_s": rates.get(d.name)}) for d in found),
        links=links,
        nodes=nodes_of(captures, weighed, counted),
        tensors=tensors_of(captures),
        colocate=tuple(whole.colocate),
        ties=ties_of(whole, weighed),
        obstacles=tuple(whole.obstacles),
        guards=tuple(whole.guards),
        undivided=undivided,
        host_bytes=0 if train else spare_host_bytes(found),
        disk_bytes_per_s=None if train else disk_rate(Path(tempfile.gettempdir())),
        measurements=measurements_of([step.name for step in whole.steps], samples),
        variations=tuple(variation_of(device, taken.values()) for device, taken in samples.items()),
    )


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
            chosen = choose_units(model, *smallest, devices=devices, depth=depth, patterns=units)
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
    captures: dict[int, UnitGraph] = {}
    try:
        # The smallest micro-batch is the quickest to check, and all take the same path.
        for done, count in enumerate(reversed(counts)):
            tell("capture", done, len(counts))
            captures[count] = _capture(model, args, kwargs, count, units, train=train, check=count == counts[-1])
            if captures[count].obstacles:
                break
        else:
            _same_path(captures)
            if len(counts) > 1:
                check_divisible(model, args, kwargs, counts[-1])
            return {count: captures[count] for count in counts}, ""
        reason = captures[count].obstacles[0]
    except ShardwrightError as error:
        if strict or len(counts) == 1:
            raise
        reason = str(error)
    finally:
        tell("capture", len(counts), len(counts))
    return {1: _capture(model, args, kwargs, 1, units, train=train, check=True)}, reason if len(counts) > 1 else ""


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
        if not check:
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
        whole = outputs_of(model(*args, **kwargs))
        again = outputs_of(model(*args, **kwargs))
        pieces = [outputs_of(model(*piece[0], **piece[1])) for piece in all_microbatches(args, kwargs, count)]
    batch = batch_size(args, kwargs)
    for index, expected in enumerate(whole):
        if not is_batched(expected, batch) or not torch.equal(expected, again[index]):
            continue
        found = torch.cat([piece[index] for piece in pieces])
        difference = relative_difference(expected, found)
        if difference > DIVISION_TOLERANCE:
            raise ShardwrightError(
                f"the result depends on how the batch is divided: output {index} of {count} micro-batches differs from "
                f"the whole batch's by {difference:.2g} of its largest value; is dimension 0 of the inputs the batch? "
                "profile with --microbatches 1"
            )


def _same_path(captures: Mapping[int, UnitGraph]) -> None:
    """Refuse a forward whose path depends on the size of the batch."""
    paths = {count: [(step.name, step.type) for step in capture.steps] for count, capture in captures.items()}
    for count, path in sorted(paths.items()):
        if path != paths[1]:
            pairs = itertools.zip_longest(paths[1], path, fillvalue=("nothing", ""))
            whole, part = next((a, b) for a, b in pairs if a != b)
            raise ShardwrightError(
                f"the forward takes another path at {count} micro-batches: {part[0]} where the whole batch has "
                f"{whole[0]}; profile with --microbatches 1"
            )


def _measure(
    pool: Pool,
    devices: Sequence[Device],
    captures: Mapping[int, UnitGraph],
    *,
    train: bool,
    optimizer: str,
    rounds: int,
    budget_s: float,
    tell: Progress,
) -> dict[str, dict[tuple[int, str], Samples]]:
    """Hand every step to every device and time them, all devices at once."""
    tell("start workers", 0, 1)
    pool.call({d.name: (prepare, (d.name, max(1, len(d.cores)))) for d in devices}, limit_s=START_LIMIT_S)
    tell("start workers", 1, 1)
    by_name = {count: {step.name: step for step in capture.steps} for count, capture in captures.items()}
    add = partial(add_subject, train=train, optimizer=optimizer)
    timed = [step.name for step in captures[1].steps if step.call is not None and (train or step.kind != "output")]
    calls = {
        name: {count: call for count, steps in by_name.items() if (call := steps[name].call) is not None}
        for name in timed
    }
    for done, name in enumerate(timed):
        tell("send units", done, len(timed))
        pool.call({d.name: (add, (name, calls[name])) for d in devices}, limit_s=START_LIMIT_S)
    tell("send units", len(timed), len(timed))
    finished = dict.fromkeys((d.name for d in devices), 0)

    def on_round(device: str, round_: int) -> None:
        finished[device] = round_ + 1
        tell("measure", min(finished.values()), rounds + 1)

    tell("measure", 0, rounds + 1)
    return pool.call(
        {d.name: (measure_all, (rounds, budget_s)) for d in devices}, limit_s=ROUND_LIMIT_S, on_progress=on_round
    )


def count_steps(capture: UnitGraph, *, train: bool) -> dict[str, StepMemory]:
    """What each step of ``capture`` takes when it runs alone, by name; the model is left as it was.

    Raises:
        ShardwrightError: a step fails.
    """
    counted = {}
    last = {step.unit: step for step in capture.steps if step.kind == "unit"}
    with attributes_kept(capture.model), as_found(capture.model, train=train):
        for step in capture.steps:
            try:
                if step.call is not None and (train or step.kind != "output"):
                    again = step.kind == "unit" and last[step.unit] is not step
                    counted[step.name] = count_step(step.call, train=train, called_again=again)
            except Exception as error:
                raise ShardwrightError(
                    f"{step.name} failed when it ran alone for its memory to be counted: "
                    f"{type(error).__name__}: {' '.join(str(error).split())}"
                ) from error
    return counted


def nodes_of(
    captures: Mapping[int, UnitGraph],
    optimizer: OptimizerMemory | None,
    counted: Mapping[int, Mapping[str, StepMemory]] | None = None,
) -> tuple[Node, ...]:
    """The records of the captured steps, with their bytes at each number of micro-batches.

    Args:
        optimizer: counts what it takes; None for inference.
        counted: by number of micro-batches and step, what :func:`count_steps` found.
    """
    steps = {count: {step.name: step for step in capture.steps} for count, capture in captures.items()}
    weights = _Weights(captures[1], optimizer)

    def peaks(name: str, what: str) -> dict[int, int]:
        return {count: getattr(found[name], what) for count, found in (counted or {}).items() if name in found}

    return tuple(
        Node(
            name=step.name,
            kind=step.kind,
            type=step.type,
            unit=step.unit,
            site=step.site,
            inputs=step.reads,
            **weights.of(step),
            output_bytes={count: steps[count][step.name].output_bytes for count in captures},
            saved_bytes={count: steps[count][step.name].saved_bytes if optimizer else 0 for count in captures},
            forward_peak_bytes=peaks(step.name, "forward_peak_bytes"),
            backward_peak_bytes=peaks(step.name, "backward_peak_bytes") if optimizer else {},
            input_gradient_bytes=peaks(step.name, "gradient_bytes") if optimizer else {},
        )
        for step in captures[1].steps
    )


def ties_of(capture: UnitGraph, optimizer: OptimizerMemory | None) -> tuple[Tie, ...]:
    """The records of the parameters that several steps use; ``optimizer`` counts their state, None for inference."""
    parameters = dict(capture.model.named_parameters())
    made = []
    for name, steps in capture.ties:
        parameter = parameters[name]
        trained = [parameter] if optimizer and parameter.requires_grad else []
        gradient_bytes = sum(map(nbytes, trained))
        state_bytes = optimizer.of(trained).state if optimizer else 0
        made.append(
            Tie(
                name=name,
                nodes=steps,
                copy_bytes=nbytes(parameter) + gradient_bytes + state_bytes,
                gradient_bytes=gradient_bytes,
            )
        )
    return tuple(made)


def tensors_of(captures: Mapping[int, UnitGraph]) -> tuple[TensorRecord, ...]:
    """The records of the tensors between steps."""
    return tuple(
        TensorRecord(
            name=value.name,
            producer=value.producer,
            requires_grad=value.requires_grad,
            bytes=(sizes := {count: capture.values[value.name].bytes for count, capture in captures.items()}),
            storage=value.storage,
            held_bytes={} if (held := _held(value.name, captures)) == sizes else held,
            saved_by=captures[1].saved_by.get(value.name, ""),
        )
        for value in captures[1].values.values()
    )


def _held(name: str, captures: Mapping[int, UnitGraph]) -> dict[int, int]:
    return {count: capture.values[name].held_bytes for count, capture in captures.items()}


def measurements_of(
    names: Sequence[str], samples: Mapping[str, Mapping[tuple[int, str], Samples]]
) -> tuple[Measurement, ...]:
    """Medians and spreads, in the order of the forward; the update, timed once, is given at each number."""
    order = {name: position for position, name in enumerate(names)}
    keys = sorted(
        ((step, device, count) for device, taken in samples.items() for count, step in taken),
        key=lambda key: (order[key[0]], key[2]),
    )
    rows = []
    for step, device, count in keys:
        taken = samples[device]
        forward, backward = summary(taken[count, step].forward_s), summary(taken[count, step].backward_s)
        rows.append(
            Measurement(
                node=step,
                device=device,
                microbatches=count,
                repeats=len(taken[count, step].forward_s),
                forward_s=forward[0],
                forward_spread_s=forward[1],
                backward_s=backward[0],
                backward_spread_s=backward[1],
                update_s=summary(taken[1, step].update_s)[0],
                peak_bytes=taken[count, step].peak_bytes,
            )
        )
    return tuple(rows)


def variation_of(device: str, taken: Iterable[Samples]) -> Variation:
    """The time of each round over everything that was timed, relative to the median round."""
    rounds = np.sum([np.add(samples.forward_s, samples.backward_s) for samples in taken], axis=0)
    return Variation(device=device, relative=tuple(float(r) for r in rounds / np.median(rounds)))


class _Weights:
    """Bytes of parameters, buffers, gradients and optimizer state by step; a shared tensor counts at its first user."""

    def __init__(self, capture: UnitGraph, optimizer: OptimizerMemory | None) -> None:
        self.capture = capture
        self.optimizer = optimizer
        self.counted: set[int] = set()

    def of(self, step: Step) -> dict[str, Any]:
        parameters, buffers = self._held(step)
        if self.optimizer is None:
            return {"param_bytes": sum(map(nbytes, parameters)), "buffer_bytes": sum(map(nbytes, buffers))}
        taken = self.optimizer.of(parameters)
        return {
            "param_bytes": sum(map(nbytes, parameters)),
            "buffer_bytes": sum(map(nbytes, buffers)),
            "grad_bytes": sum(nbytes(p) for p in parameters if p.requires_grad),
            "optimizer_bytes": taken.state,
            "update_peak_bytes": {"cpu": taken.update, "cuda": taken.update_together},
            "update_left_bytes": taken.update_left,
        }

    def _held(self, step: Step) -> tuple[list[nn.Parameter], list[Tensor]]:
        """The parameters and buffers that ``step`` is the first to use."""
        tensors: list[Tensor] = []
        if step.kind == "unit":
            unit = self.capture.units[step.unit]
            tensors = [*unit.parameters(), *unit.buffers()]
        elif step.kind == "parameter" and step.unit:
            holder, _, name = step.unit.rpartition(".")
            tensors = [getattr(self.capture.model.get_submodule(holder), name)]
        new = [t for t in tensors if id(t) not in self.counted]
        self.counted |= {id(t) for t in new}
        return [t for t in new if isinstance(t, nn.Parameter)], [t for t in new if not isinstance(t, nn.Parameter)]
