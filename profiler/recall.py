"""Recall: a profile that was made before is handed out again where nothing has changed that it follows from.

What is kept with a profile is a fingerprint of the model, its code and its inputs (see
:mod:`shardwright.profiler.recording.fingerprint`), and what its capture at the smallest micro-batch was like, operator
by operator. The fingerprint says that the other captures and all checks would come out as they did; that capture is
made anew every time, and says the same of what no fingerprint can see. Only a forward that never turns numbers of
tensors into numbers of Python is remembered: its path follows from shapes alone, and so do its captures.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from torch import Tensor, nn

from shardwright.errors import ShardwrightError
from shardwright.files import Record
from shardwright.profiler.cache import Cache
from shardwright.profiler.measuring.signature import step_key
from shardwright.profiler.profile import Profile
from shardwright.profiler.recording.fingerprint import Fingerprint, Scale, fingerprint_of, raw_bytes
from shardwright.profiler.recording.inputs import microbatch
from shardwright.profiler.recording.shapes import has_values
from shardwright.profiler.recording.state import Snapshot
from shardwright.profiler.recording.structure import dense_parts
from shardwright.profiler.recording.unitgraph import UnitGraph
from shardwright.profiler.trace import trace

__all__ = ["Known", "Request", "keep", "recall"]

METHOD = 2
"""How profiles are made; counted up when those of an earlier release would not be made alike."""


class Request(NamedTuple):
    """What is profiled, and how."""

    model: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    counts: tuple[int, ...]
    train: bool
    how: str
    """All else that the profile follows from: devices and options."""
    is_plain: bool = True
    """Whether all that ``how`` names is told by its name: an optimizer from elsewhere than PyTorch is not."""


class _Remembered(Record):
    """A profile, with what it was made from."""

    units: tuple[str, ...]
    scales: tuple[tuple[float, float, float], ...]
    capture: str
    """Digest of the capture at the smallest micro-batch."""
    profile: Profile


class Known(NamedTuple):
    """What is known of a request before it is profiled."""

    fingerprint: Fingerprint | None
    profile: Profile | None


def recall(request: Request, cache: Cache, found: Snapshot) -> Known:
    """The profile of an equal ``request`` from ``cache``, if it would be made alike today; the model runs once then.

    Args:
        found: the model as it is now.
    """
    inputs = (request.args, request.kwargs)
    fingerprint = fingerprint_of(request.model, inputs) if has_values(request.model) and request.is_plain else None
    remembered = cache.get(_key(request, fingerprint), _Remembered) if fingerprint is not None else None
    if fingerprint is None or remembered is None or not _alike(fingerprint.scales, remembered.scales):
        return Known(fingerprint, None)
    units = {path: request.model.get_submodule(path) for path in remembered.units}
    try:
        piece = microbatch(*inputs, request.counts[-1])
        capture = trace(request.model, *piece, train=request.train, units=units, found=found)
    except ShardwrightError:  # the captures will say what is wrong
        return Known(fingerprint, None)
    same = _digest(capture, train=request.train) == remembered.capture
    return Known(fingerprint, remembered.profile if same else None)


def keep(request: Request, known: Known, captures: Mapping[int, UnitGraph], profile: Profile, cache: Cache) -> None:
    """Have ``profile`` recalled for equal requests, if its captures do not depend on numbers."""
    whole = captures[1]
    if known.fingerprint is None or tuple(captures) != request.counts or profile.misfits:
        return
    if any(capture.obstacles or capture.guards or capture.reads_numbers for capture in captures.values()):
        return
    smallest = captures[request.counts[-1]]
    remembered = _Remembered(
        units=tuple(whole.units),
        scales=tuple(map(tuple, known.fingerprint.scales)),  # type: ignore[arg-type]  # three numbers each
        capture=_digest(smallest, train=request.train),
        profile=profile,
    )
    cache.put(_key(request, known.fingerprint), remembered)


def _key(request: Request, fingerprint: Fingerprint) -> str:
    return f"profile {METHOD} {fingerprint.digest} {request.counts} {request.train} {request.how}"


def _alike(scales: Sequence[Scale], others: Sequence[tuple[float, float, float]]) -> bool:
    return len(scales) == len(others) and all(
        scale.like(Scale(*other)) for scale, other in zip(scales, others, strict=True)
    )


def _digest(capture: UnitGraph, *, train: bool) -> str:
    """Everything that a capture has seen, in 32 letters."""
    digest = hashlib.sha256()

    def add(*facts: Any) -> None:
        digest.update(f"{facts}\n".encode())

    for step in capture.steps:
        work = step_key(step, train=train, optimizer=None, accumulate=False) if step.call is not None else ""
        add(
            step.name, step.kind, step.type, step.unit, step.site, step.reads, step.output_bytes, step.saved_bytes, work
        )
    for value in capture.values.values():
        add(replace(value, node=None))  # type: ignore[arg-type]  # nodes are told below
    for node in capture.graph.nodes:
        target = node.target if isinstance(node.target, str) else ""
        add(node.name, node.op, target, [operand.name for operand in node.all_input_nodes])
    for name, constant in capture.constants.items():
        parts = dense_parts(constant) if isinstance(constant, Tensor) else ()
        add(name, type(constant).__qualname__, [(part.dtype, part.shape, raw_bytes(part)) for part in parts])
    add(tuple(capture.units), capture.input_names, capture.outputs, capture.output_places, capture.colocate)
    add(capture.ties, capture.guards, capture.saved_by, capture.obstacles, capture.reads_numbers)
    return digest.hexdigest()[:32]
