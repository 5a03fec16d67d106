"""The records of a split: its stages as a plan shows them, the stage of every node, and the ties that it splits."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from shardwright.profiler.profile import Profile
from shardwright.sharder.planning.plan import SplitTie, Stage
from shardwright.sharder.planning.pricing import Option
from shardwright.sharder.planning.problem import Problem, bits, in_flight
from shardwright.sharder.planning.schedules.interleaved_memory import device_peaks
from shardwright.sharder.planning.schedules.simulate import StageCost
from shardwright.sharder.planning.schedules.stage_bytes import stage_memories
from shardwright.sharder.planning.schedules.stage_costs import Stages, shares_of
from shardwright.sharder.planning.schedules.zero_bubble import held_at_most

__all__ = ["makers_of_numbers", "split_ties", "stage_of_nodes", "stages_of"]

NUMBER_BYTES = 16
"""The largest that one number takes: a complex one of two doubles."""


def makers_of_numbers(profile: Profile) -> set[str]:
    """The nodes that may make a tensor without dimensions: one of more bytes a sample than a number takes has some.

    Of one sample, for ``squeeze`` takes from a batch of one also the dimension that others have.
    """
    most = NUMBER_BYTES * profile.batch
    return {tensor.producer for tensor in profile.tensors if max(m * size for m, size in tensor.bytes.items()) <= most}


def stage_of_nodes(option: Option) -> dict[str, int]:
    """Node -> the index of its stage."""
    blocks = option.problem.blocks
    return {
        name: index
        for index, (_, members) in enumerate(option.split.stages)
        for v in bits(members)
        for name in blocks[v].nodes
    }


def stages_of(profile: Profile, option: Option) -> tuple[Stage, ...]:
    """The stages of ``option``, with their costs and peak memory."""
    problem, split = option.problem, option.split
    stage_of = stage_of_nodes(option)
    units: list[dict[str, None]] = [{} for _ in split.stages]
    param_bytes = [0] * len(split.stages)
    for node in profile.nodes:
        param_bytes[stage_of[node.name]] += node.param_bytes
        if node.kind == "unit":
            units[stage_of[node.name]][node.unit] = None
    stages, anew = [], option.anew
    held = _held(problem, split.stages, anew, train=profile.train)
    memories = stage_memories(problem, split.stages, anew, train=profile.train)
    for index, (device, _) in enumerate(split.stages):
        stages.append(
            Stage(
                index=index,
                device=problem.devices[device],
                units=tuple(units[index]),
                **_recorded(option.costs[index]),
                load_s=option.loads[index],
                param_bytes=param_bytes[index],
                memory_bytes=held[index][0],
                memory=memories[index],
                memory_cap_bytes=problem.caps[device],
                in_flight=held[index][1],
                recompute=anew[index],
                replica_devices=tuple(replica.devices[device] for replica in problem.replicas[1:]),
            )
        )
    return tuple(stages)


def _held(problem: Problem, stages: Stages, anew: Sequence[bool], *, train: bool) -> list[tuple[int, int]]:
    """By stage: its part of its device's peak in bytes, and the micro-batches that it holds at once.

    ``stages`` may also be one for each device, ``anew`` says which of those are computed anew.
    """
    if problem.stages_per_device > 1:
        peaks = device_peaks(problem, stages)
        rounds = zip(*(zip(peak.parts, peak.in_flight, strict=True) for peak in peaks), strict=True)
        return [(part, held if train else 1) for each in rounds for part, held in each]
    found = []
    closed = 0
    parted = problem.schedule == "zero-bubble"
    for index, (device, members) in enumerate(stages):
        after = len(stages) - 1 - index
        peak = problem.memory_bytes(
            closed, closed | members, device, after, recomputed=anew[index], before=index if parted else None
        )
        held = in_flight(problem.schedule, problem.microbatches, after)
        if parted:
            held = held_at_most(len(stages), index, problem.microbatches)
        found.append((peak, held if train else 1))
        closed |= members
    return found


def _recorded(cost: StageCost) -> dict[str, Any]:
    """The costs that a plan's stage records."""
    return {name: value for name, value in dataclasses.asdict(cost).items() if name in Stage.model_fields}


def split_ties(profile: Profile, option: Option) -> tuple[SplitTie, ...]:
    """The profile's ties with users in several stages; copies of buffers and constants have nothing in common."""
    named = {tie.name for tie in profile.ties}
    stages = option.split.stages
    shares = shares_of(stages, option.problem.stages_per_device)
    held = {
        tie.name: tuple(
            i for i, (_, members) in enumerate(stages) if members & tie.users and tie.held(shares[i % len(shares)][1])
        )
        for tie in option.problem.ties
        if tie.name in named
    }
    return tuple(SplitTie(name=name, stages=users) for name, users in held.items() if users)
