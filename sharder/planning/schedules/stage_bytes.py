"""What each stage of a split holds at which moment of a step: the planner's peaks (problem.py), taken apart again."""

from __future__ import annotations

from collections.abc import Sequence

from shardwright.sharder.planning.formulation.memory import Walk
from shardwright.sharder.planning.problem import Problem, bits, in_flight
from shardwright.sharder.planning.schedules.stage_costs import Stages, shares_of
from shardwright.sharder.planning.stage_memory import StageMemory

__all__ = ["stage_memories"]


def stage_memories(problem: Problem, stages: Stages, anew: Sequence[bool], *, train: bool) -> list[StageMemory]:
    """By stage; ``anew`` says which are computed anew. Copies and the update of a device are its first stage's."""
    shares = shares_of(stages, problem.stages_per_device)
    found, start = [], 0
    for position, (device, members) in enumerate(stages):
        once = {"copies": 0, "update": 0}
        if position < len(shares):
            share = shares[position][1]
            together = device < len(problem.updates_together) and problem.updates_together[device]
            whole = problem.walk(share, recomputed=anew[position])
            once["copies"] = sum(tie.copy_bytes for tie in problem.ties if not tie.counted(share))
            once["update"] = whole.update_together if together else whole.update
        one = problem.walk(members, recomputed=anew[position])
        found.append(_memory(problem, one, start, members, len(stages) - 1 - position, train=train, **once))
        start |= members
    return found


def _memory(
    problem: Problem, one: Walk, start: int, members: int, after: int, *, train: bool, copies: int, update: int
) -> StageMemory:
    """Of a stage with so many stages ``after`` it; ``start`` are the blocks before it."""
    end = start | members
    received, sent = problem.received(start, members), problem.sent(end, members)
    buffers = sum(c.forward_bytes for c in received) + sum(c.backward_bytes for c in sent)
    parts = {
        "static_bytes": sum(problem.blocks[v].static_bytes for v in bits(members))
        + copies
        + problem.microbatches * buffers,
        "held_bytes": one.kept,
        "forward_bytes": one.forward,
        "later_forward_bytes": one.forward,
        "input_backward_bytes": one.kept,
        "first_backward_bytes": one.backward,
        "backward_bytes": one.backward,
        "update_bytes": update,
    }
    if start or sent or problem.schedule == "interleaved":  # else it is counted without the engine
        gradients = sum(c.backward_bytes for c in received)
        relayed = sum(c.backward_bytes for c in received if c.readers & ~end and not c.readers & members)
        parts |= {
            "gradient_bytes": one.gradients,
            "first_backward_bytes": relayed + one.first - one.gradients,
            "backward_bytes": relayed + one.backward,
            **_by_schedule(problem, one, first=not start, after=after, gradients=gradients, relayed=relayed),
        }
    if not train:
        parts["forward_bytes"] = max(parts["forward_bytes"], parts["first_backward_bytes"])
    return StageMemory(**parts)


def _by_schedule(
    problem: Problem, one: Walk, *, first: bool, after: int, gradients: int, relayed: int
) -> dict[str, int]:
    """What a schedule's engine lets wait: ``gradients`` that a stage sends for one micro-batch, and its outputs."""
    if problem.schedule != "1f1b":
        found = {"sent_bytes": one.sent if after else 0, "sent_gradient_bytes": gradients}
        if problem.schedule == "zero-bubble" and not first:
            working = relayed + one.parted
            parts = dict.fromkeys(("input_backward_bytes", "first_backward_bytes", "backward_bytes"), working)
            found |= parts | {"deferred_bytes": one.deferred}
        return found
    held = in_flight(problem.schedule, problem.microbatches, after)
    stays = one.sent if problem.microbatches >= 2 * held - 1 else 0
    backward = gradients + relayed + one.backward
    return {
        "waiting_bytes": gradients,
        "later_forward_bytes": gradients + stays + one.forward,
        # A last stage's output before goes while it makes the next; an earlier stage's stays.
        "backward_bytes": backward + (stays if held > 1 else 0),
    }
