"""What the devices of an interleaved pipeline hold at most, as PyTorch's engine runs it.

The engine (that of torch 2.11 and 2.13 alike, _PipelineScheduleRuntime) works through a device's fixed list of
operations. With the terms of problem.py, of each stage s: buffers for all micro-batches, as with one stage a device;
from a forward to the end of its backward kept(s); and from then to the end of the step what was sent for it, out(s) and
the gradients g(s), since the engine waits for its sends only there. So while an operation on stage s runs the device
holds, over all its stages t,

    static(t) + buffers(t) + begun(t) * kept(t) + done(t) * (out(t) + g(t)) - G(t) before the first backward of t

with the operation's own micro-batch apart: its forward(s), or relayed(s) + backward(s), or in the first backward
relayed(s) + first(s) - G(s). Ties and the optimizer's step are of all blocks of the device together.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from shardwright.sharder.planning.problem import Problem, bits
from shardwright.sharder.planning.schedules.schedule import FORWARD, Order, order
from shardwright.sharder.planning.schedules.stage_costs import Stages, shares_of

__all__ = ["DevicePeak", "device_peaks"]

_Bytes = npt.NDArray[np.int64]


class DevicePeak(NamedTuple):
    """The most that a device holds at once."""

    bytes: int
    parts: tuple[int, ...]
    """Of each of its stages, then; ``bytes`` is their sum."""
    in_flight: tuple[int, ...]
    """By stage: micro-batches whose saved tensors are held at once, at most."""


class _Piece(NamedTuple):
    """Bytes of a stage; see the head of this module."""

    static: int
    kept: int
    left: int
    """out + g: of each micro-batch that is done."""
    forward: int
    backward: int
    """relayed + backward"""
    first: int
    """relayed + first - G"""
    gradients: int


@lru_cache(maxsize=32)
def _order(devices: int, microbatches: int, train: bool, stages_per_device: int) -> Order:
    return order("interleaved", devices, microbatches, train=train, stages_per_device=stages_per_device)


def device_peaks(problem: Problem, stages: Stages) -> list[DevicePeak]:
    """By device, in the order in which the stages go around them."""
    shares = shares_of(stages, problem.stages_per_device)
    todo = _order(len(shares), problem.microbatches, not problem.forward_only, problem.stages_per_device)
    pieces, start = [], 0
    for position, (_, members) in enumerate(stages):
        pieces.append(_piece(problem, start, members, last=position == len(stages) - 1))
        start |= members
    return [
        _peak(problem, share, pieces[position :: len(shares)], todo, position) for position, share in enumerate(shares)
    ]


def _piece(problem: Problem, start: int, members: int, *, last: bool) -> _Piece:
    end = start | members
    received, sent = problem.received(start, members), problem.sent(end, members)
    one = problem.walk(members)
    buffers = sum(c.forward_bytes for c in received) + sum(c.backward_bytes for c in sent)
    gradients = sum(c.backward_bytes for c in received)
    relayed = sum(c.backward_bytes for c in received if c.readers & ~end and not c.readers & members)
    return _Piece(
        static=sum(problem.blocks[v].static_bytes for v in bits(members)) + problem.microbatches * buffers,
        kept=one.kept,
        left=gradients + (0 if last else one.sent),
        forward=one.forward,
        backward=relayed + one.backward,
        first=relayed + one.first - one.gradients,
        gradients=one.gradients,
    )


def _peak(problem: Problem, share: tuple[int, int], pieces: Sequence[_Piece], todo: Order, position: int) -> DevicePeak:
    device, members = share
    held, in_flight = _held(pieces, todo, position)
    copies = sum(tie.copy_bytes for tie in problem.ties if not tie.counted(members))
    at_most = held[:, int(held.sum(axis=0).argmax())].tolist()
    together = device < len(problem.updates_together) and problem.updates_together[device]
    walk = problem.walk(members)
    update = walk.update_together if together else walk.update
    static = [piece.static for piece in pieces]
    parts = at_most if sum(at_most) >= sum(static) + update else [static[0] + update, *static[1:]]
    parts[0] += copies
    return DevicePeak(sum(parts), tuple(parts), in_flight)


def _held(pieces: Sequence[_Piece], todo: Order, position: int) -> tuple[_Bytes, tuple[int, ...]]:
    """By stage and operation of the device: bytes while it runs; and micro-batches in flight at most."""
    forward = todo.kinds[position] == FORWARD
    own = todo.stages[position] // todo.devices
    rows, in_flight = [], []
    for number, piece in enumerate(pieces):
        mine = own == number
        begun, done = np.cumsum(mine & forward), np.cumsum(mine & ~forward)
        in_flight.append(int((begun - done + (mine & ~forward)).max()))
        before_begun, before_done = begun - (mine & forward), done - (mine & ~forward)
        others = before_begun - before_done - (mine & ~forward)  # without the micro-batch of a backward that runs
        working = np.where(forward, piece.forward, np.where(before_done == 0, piece.first, piece.backward))
        missing = np.where((before_done == 0) & ~(mine & ~forward), piece.gradients, 0) if (~forward).any() else 0
        rows.append(
            piece.static + others * piece.kept + before_done * piece.left - missing + np.where(mine, working, 0)
        )
    return np.array(rows, np.int64), tuple(in_flight)
