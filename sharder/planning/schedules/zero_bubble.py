"""Zero-bubble pipelines (ZB-H1, schedule.py) of one stage a device: what divides the micro-batches, and what is held.

PyTorch's engine (_PipelineScheduleRuntime, which runs interleaved pipelines too: interleaved_memory.py) keeps of a
micro-batch, with the terms of problem.py and memory.py: kept from its forward F until the gradients of its weights W
are made, deferred beside it from the gradients of its inputs B until W, the gradients g that it sent from B to the end
of the step, and what it sent forward, out, from W to the end of the step. So while an operation runs, with f forwards,
b backwards and w weights done before it, a stage holds, its own micro-batch apart,

    (f - b) * kept + (b - w) * (kept + deferred) + w * out + b * g - G before the first W      of the others
    forward  in F;  relayed + parted  in B and in W

The first stage has no gradients to send: its B does nothing, and its W is the whole backward, so that it holds nothing
deferred. A last stage lets its outputs go. The position of a stage says how late its W come, and so how many
micro-batches it holds: as many as there are stages, once there are enough of them, on every device.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from shardwright.sharder.planning.formulation.memory import Walk
from shardwright.sharder.planning.schedules.schedule import BACKWARD, FORWARD, WEIGHTS, order

__all__ = ["divides", "held_at_most", "peak_bytes"]


def divides(stages: int, microbatches: int) -> bool:
    """Whether the engine takes so many micro-batches through so many stages: its rounds have to be equal."""
    return microbatches % max(1, microbatches // stages) == 0


class _Moments(NamedTuple):
    """By operation of one stage: its kind, and how many of each kind are done before it."""

    kinds: npt.NDArray[np.uint8]
    forwards: npt.NDArray[np.int64]
    backwards: npt.NDArray[np.int64]
    weights: npt.NDArray[np.int64]


@lru_cache(maxsize=64)
def _moments(stages: int, position: int, microbatches: int) -> _Moments:
    kinds = order("zero-bubble", stages, microbatches).kinds[position]
    done = [np.cumsum(kinds == kind, dtype=np.int64) - (kinds == kind) for kind in (FORWARD, BACKWARD, WEIGHTS)]
    return _Moments(kinds, *done)


@lru_cache(maxsize=256)
def held_at_most(stages: int, position: int, microbatches: int) -> int:
    """Micro-batches whose saved tensors the stage at ``position`` holds at once."""
    moments = _moments(stages, position, microbatches)
    return int((moments.forwards - moments.weights + (moments.kinds == FORWARD)).max())


def peak_bytes(one: Walk, *, stages: int, position: int, microbatches: int, gradients: int, relayed: int) -> int:
    """The peak of what comes and goes in a step of the stage at ``position`` of two or more ``stages``.

    Args:
        one: its walk, of one micro-batch.
        gradients: of each micro-batch, the bytes of gradients that it sends.
        relayed: of these, those that are copies.
    """
    kinds, f, b, w = _moments(stages, position, microbatches)
    deferred = one.deferred if position else 0
    sent = 0 if position == stages - 1 else one.sent
    waiting = b - w - (kinds == WEIGHTS)  # without the micro-batch of a W that runs
    begun = f - b - (kinds == BACKWARD)  # and without that of a B
    held = begun * one.kept + waiting * (one.kept + deferred) + w * sent + b * gradients
    first = w == 0
    if position:
        working = np.where(kinds == FORWARD, one.forward, relayed + one.parted)
        held -= np.where(first & (kinds != WEIGHTS), one.gradients, 0)
    else:
        backward = np.where(first, one.first - one.gradients, one.backward)
        working = np.where(kinds == FORWARD, one.forward, np.where(kinds == WEIGHTS, backward, one.kept))
        held -= np.where(first & (kinds != WEIGHTS), one.gradients, 0)
    return int((held + working).max())
