"""Schedules and their simulation: who computes what when, and how long a step takes.

A stage works through a fixed list of operations. An operation starts when the stage is free and what it needs has
arrived. A transfer of t seconds keeps its sender busy for t after the operation; the receiver is busy with it for t as
well, at the same time if it is waiting and afterwards if it is not. So a stage is busy for its load (problem.py) in
every step, and the rest of the step is its bubble.

1F1B on 3 stages, 4 micro-batches (F forward, B backward; Narayanan et al., SOSP 2019):

    stage 0   F0 F1 F2 .. .. B0 F3 B1 .. B2 .. B3
    stage 1   .. F0 F1 .. B0 F2 B1 F3 B2 .. B3
    stage 2   .. .. F0 B0 F1 B1 F2 B2 F3 B3
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from shardwright.sharder.planning.problem import Schedule

__all__ = ["Operation", "Slot", "StageCost", "Timeline", "expected_step_s", "operations", "simulate"]


class Operation(NamedTuple):
    """Forward or backward of one micro-batch on one stage."""

    kind: Literal["F", "B"]
    microbatch: int


class Slot(NamedTuple):
    """When a stage ran an operation, in seconds from the start of the step; transfers excluded."""

    stage: int
    operation: Operation
    start_s: float
    end_s: float


@dataclass(frozen=True)
class StageCost:
    """Seconds of one micro-batch on one stage, and of the transfers to the stage behind it."""

    forward_s: float
    backward_s: float = 0.0
    update_s: float = 0.0
    send_forward_s: float = 0.0
    """Activations to the next stage."""
    receive_backward_s: float = 0.0
    """Gradients from the next stage."""
    tie_s: float = 0.0
    """Summing the gradients of tied parameters with the other copies, once a step before the update."""


@dataclass(frozen=True)
class Timeline:
    """A simulated step."""

    step_s: float
    slots: tuple[Slot, ...]
    busy_s: tuple[float, ...]
    """By stage: compute, transfers, ties and update."""

    @property
    def bubble(self) -> float:
        """Share of all the stages' time in which they wait."""
        whole = self.step_s * len(self.busy_s)
        return 1.0 - sum(self.busy_s) / whole if whole else 0.0


def operations(schedule: Schedule, stage: int, stages: int, microbatches: int, *, train: bool) -> list[Operation]:
    """The operations of one stage, in order."""
    forwards = [Operation("F", m) for m in range(microbatches)]
    if not train:
        return forwards
    backwards = [Operation("B", m) for m in range(microbatches)]
    if schedule == "gpipe":
        return forwards + backwards
    warmup = min(microbatches, stages - stage)
    steady = [op for pair in zip(backwards, forwards[warmup:], strict=False) for op in pair]
    return forwards[:warmup] + steady + backwards[microbatches - warmup :]


def simulate(
    costs: Sequence[StageCost], microbatches: int, *, schedule: Schedule = "1f1b", train: bool = True
) -> Timeline:
    """Play one step of ``microbatches`` micro-batches through the stages."""
    count = len(costs)
    todo = [operations(schedule, s, count, microbatches, train=train) for s in range(count)]
    position = [0] * count
    free = [0.0] * count
    busy = [0.0] * count
    arrived: dict[tuple[int, Operation], float] = {}
    slots: list[Slot] = []
    waiting = list(range(count))
    while waiting:
        stage = waiting.pop()
        while position[stage] < len(todo[stage]):
            operation = todo[stage][position[stage]]
            forward = operation.kind == "F"
            peer = stage - 1 if forward else stage + 1
            start = free[stage]
            if 0 <= peer < count:
                if (stage, operation) not in arrived:
                    break
                receive = costs[peer].send_forward_s if forward else costs[stage].receive_backward_s
                start = max(arrived[stage, operation], free[stage] + receive)
                busy[stage] += receive
            cost = costs[stage].forward_s if forward else costs[stage].backward_s
            slots.append(Slot(stage, operation, start, start + cost))
            receiver = stage + 1 if forward else stage - 1
            send = 0.0
            if 0 <= receiver < count:
                send = costs[stage].send_forward_s if forward else costs[receiver].receive_backward_s
                arrived[receiver, operation] = start + cost + send
                if receiver not in waiting:
                    waiting.append(receiver)
            free[stage] = start + cost + send
            busy[stage] += cost + send
            position[stage] += 1
    last = [cost.tie_s + cost.update_s for cost in costs]
    finish = [free[s] + last[s] for s in range(count)]
    busy = [busy[s] + last[s] for s in range(count)]
    slots.sort(key=lambda slot: (slot.start_s, slot.stage))
    return Timeline(max(finish), tuple(slots), tuple(busy))


def expected_step_s(
    costs: Sequence[StageCost],
    variations: Sequence[Sequence[float]],
    microbatches: int,
    *,
    schedule: Schedule = "1f1b",
    train: bool = True,
    draws: int = 101,
) -> tuple[float, float]:
    """Median and interquartile range of the step when each stage's speed varies as it did while it was measured.

    A pipeline waits for whichever device is slow at the moment, so its median step is longer than the step of the
    median times. ``variations`` holds for each stage the relative times to draw from, 1 being the median; the draws are
    the same every time.
    """
    if all(len(set(relative)) < 2 for relative in variations):
        return simulate(costs, microbatches, schedule=schedule, train=train).step_s, 0.0
    generator = random.Random(0)
    steps = []
    for _ in range(draws):
        factors = [generator.choice(relative) if relative else 1.0 for relative in variations]
        drawn = [
            replace(c, forward_s=c.forward_s * f, backward_s=c.backward_s * f, update_s=c.update_s * f)
            for c, f in zip(costs, factors, strict=True)
        ]
        steps.append(simulate(drawn, microbatches, schedule=schedule, train=train).step_s)
    low, median, high = statistics.quantiles(steps, n=4)
    return median, high - low
