"""What the stages of a split cost, and the rules of their step, as the simulator wants them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypedDict

from shardwright.sharder.planning.exact.transfers import traffic_of
from shardwright.sharder.planning.problem import Block, Problem, Schedule, bits
from shardwright.sharder.planning.schedules.simulate import StageCost

__all__ = ["Rules", "Stages", "rules_of", "shares_of", "stage_costs", "stages_anew", "sums_s_of", "ties_s_of"]

Stages = Sequence[tuple[int, int]]
"""In order: a device index and a bit mask of blocks each."""


def shares_of(stages: Stages, stages_per_device: int) -> list[tuple[int, int]]:
    """Each device once, in the order in which the stages go around them, with all blocks of its stages."""
    count = len(stages) // stages_per_device
    shares = []
    for position in range(count):
        blocks = 0
        for _, members in stages[position::count]:
            blocks |= members
        shares.append((stages[position][0], blocks))
    return shares


def ties_s_of(problem: Problem, stages: Stages) -> list[tuple[float, float]]:
    """Seconds of a step that ties cost each stage: sums of gradients, and updates of copies.

    What a device's stages share, its first one has all of.
    """
    shares = shares_of(stages, problem.stages_per_device)
    own = [(problem.tie_sums_s(members, device), problem.copies_s(members, device)) for device, members in shares]
    return own + [(0.0, 0.0)] * (len(stages) - len(shares))


def sums_s_of(problem: Problem, stages: Stages) -> list[float]:
    """Seconds of a step in which each stage's gradients are summed over the replicas.

    What a device's sum takes at once is its first stage's, and so are the copies of tied parameters.
    """
    if not problem.replicas:
        return [0.0] * len(stages)
    own = [sum(problem.blocks[v].sum_s[device] for v in bits(members)) for device, members in stages]
    for position, (device, members) in enumerate(shares_of(stages, problem.stages_per_device)):
        latency_s, rate = problem.sums[device]
        copies = sum(tie.gradient_bytes for tie in problem.ties if not tie.counted(members))
        if copies or any(problem.blocks[v].sum_s[device] for v in bits(members)):
            own[position] += latency_s + copies / rate
    return own


def stage_costs(problem: Problem, stages: Stages, anew: Sequence[bool] = ()) -> tuple[StageCost, ...]:
    """Compute, transfers, ties, sums and engine of each stage; a single one that is all there is needs no engine.

    ``anew``: whether it is computed anew, by default none is.
    """
    relayed, by_engine = problem.transfers == "relayed", len(stages) > 1 or bool(problem.replicas)
    costs = []
    for position, ((device, members), traffic, (tie_s, copies_s), sum_s, again) in enumerate(
        zip(
            stages,
            traffic_of(problem, stages),
            ties_s_of(problem, stages),
            sums_s_of(problem, stages),
            anew or [False] * len(stages),
            strict=True,
        )
    ):
        blocks = [problem.blocks[v] for v in bits(members)]
        forward_s = sum(b.forward_s[device] for b in blocks)
        # Computed anew, the first forward keeps nothing, and the other one is a part of the backward.
        costs.append(
            StageCost(
                forward_s=sum(b.again_s(device) for b in blocks) if again else forward_s,
                backward_s=sum(b.backward_s[device] for b in blocks) + (forward_s if again else 0.0),
                update_s=copies_s + sum(b.update_s[device] - (b.sum_s[device] if b.sum_s else 0.0) for b in blocks),
                send_forward_s=traffic.forward_out_s,
                receive_backward_s=traffic.backward_in_s,
                tie_s=tie_s,
                engine_s=problem.engine_s[device] if problem.engine_s and by_engine else 0.0,
                receive_forward_s=None if relayed else traffic.forward_in_s,
                send_backward_s=None if relayed else traffic.backward_out_s,
                sum_s=sum_s,
                **(_parts_s(blocks, device, first=not position) if problem.schedule == "zero-bubble" else {}),
            )
        )
    return tuple(costs)


def _parts_s(blocks: Sequence[Block], device: int, *, first: bool) -> dict[str, float]:
    """The two parts of a stage's backward; the ``first`` stage has all of it in the second."""
    if first:
        return {"backward_input_s": 0.0, "backward_weight_s": sum(b.backward_s[device] for b in blocks)}
    inputs_s, weights_s = (sum(b.parts_s[device][part] for b in blocks) for part in (0, 1))
    return {"backward_input_s": inputs_s, "backward_weight_s": weights_s}


class Rules(TypedDict):
    """How a step is simulated."""

    schedule: Schedule
    stages_per_device: int
    train: bool
    transfers: Literal["serial", "overlapped"]
    staged: bool


def rules_of(problem: Problem, *, train: bool) -> Rules:
    """How a step of ``problem`` is simulated."""
    return Rules(
        schedule=problem.schedule,
        stages_per_device=problem.stages_per_device,
        train=train,
        transfers="overlapped" if problem.overlap else "serial",
        staged=problem.transfers == "staged",
    )


def stages_anew(problem: Problem, stages: Sequence[tuple[int, int]]) -> list[bool]:
    """Of each stage of a split that fits, whether it is computed anew."""
    found, closed = [], 0
    for position, (device, members) in enumerate(stages):
        found.append(problem.recomputes(closed, closed | members, device, len(stages) - 1 - position))
        closed |= members
    return found
