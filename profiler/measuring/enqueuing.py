"""The host's turn: what it takes to enqueue the steps of a model one after another, as a training loop does.

A step that is called by itself finds the host cold: between two calls inputs are copied, memory is counted and events
are made, and each backward enters PyTorch's engine and wakes its thread. On the host of an H100 the forwards of a small
network took half as long again in that way, and their backwards too (benchmarks/clocks.py, docs/accuracy.md). So here
all inputs are made first, between two forwards there is a look at the clock, and all backwards are one call.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

import torch
from torch import Tensor

from shardwright.profiler.measuring.in_a_row import forwards
from shardwright.profiler.measuring.stopwatch import CudaStopwatch, Enqueued
from shardwright.profiler.measuring.subject import Subject

__all__ = ["enqueue_backwards", "enqueue_forwards", "shares"]

Key = TypeVar("Key")


def enqueue_forwards(
    subjects: Mapping[Key, Subject], stopwatch: CudaStopwatch, *, keeping: bool
) -> dict[Key, Enqueued]:
    """What the host takes for each forward, in their order; with ``keeping`` their outputs are held for a backward."""
    stopwatch.finish()
    seconds = forwards(dict(subjects), stopwatch.clock, keeping=keeping, ahead=True)
    return {key: _on_host(each) for key, each in seconds.items()}


def enqueue_backwards(subjects: Mapping[Key, Subject], stopwatch: CudaStopwatch) -> float:
    """Seconds that the host takes for the backwards of what is held, in one call of PyTorch's engine."""
    outputs: list[Tensor] = []
    gradients: list[Tensor] = []
    for subject in subjects.values():
        if subject.outputs:
            subject.let_go_gradients()
            outputs += subject.outputs
            gradients += [t.clone() for t in subject.begin_backward()]
    if not outputs:
        return 0.0
    stopwatch.finish()
    begin = stopwatch.clock()
    torch.autograd.backward(outputs, gradients)
    return stopwatch.clock() - begin


def shares(total_s: float, alone_s: Mapping[Key, float], empty_s: float) -> dict[Key, Enqueued]:
    """``total_s`` divided as what each takes alone, of which entering the engine, ``empty_s``, is none's."""
    parts = {key: max(seconds - empty_s, 0.0) for key, seconds in alone_s.items()}
    if not (whole := sum(parts.values())):
        parts, whole = dict.fromkeys(alone_s, 1.0), float(len(alone_s))
    return {key: _on_host(total_s * part / whole) for key, part in parts.items()}


def _on_host(seconds: float) -> Enqueued:
    """A reading of the host's clock alone."""
    return Enqueued(lambda: 0.0, seconds)
