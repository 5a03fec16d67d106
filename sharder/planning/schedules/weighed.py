"""Interleaved stages and zero-bubble weighed against 1F1B: which schedule has the shorter step, and why."""

from __future__ import annotations

from collections.abc import Sequence

from shardwright.sharder.planning.exact.transfers import traffic_of
from shardwright.sharder.planning.plan import WORTHWHILE, OtherSchedule
from shardwright.sharder.planning.pricing import Option
from shardwright.sharder.planning.schedules.stage_costs import shares_of
from shardwright.sharder.planning.schedules.zero_bubble_options import is_zero_bubble

__all__ = ["better_of", "compared"]


def _kind(option: Option) -> tuple[int, int, bool]:
    """By what options differ, the plainest first."""
    return len(option.problem.replicas), option.problem.stages_per_device, is_zero_bubble(option)


def better_of(options: Sequence[Option]) -> Option:
    """The option with the shortest step; more replicas or stages a device have to be worth it, which add messages, and
    backwards in two parts, which hold more."""

    bests = [
        min((option for option in options if _kind(option) == one), key=lambda option: option.step_s)
        for one in sorted(set(map(_kind, options)))
    ]
    found = bests[0]
    for option in bests[1:]:
        found = option if option.step_s * WORTHWHILE <= found.step_s else found
    return found


def compared(chosen: Option, options: Sequence[Option]) -> OtherSchedule | None:
    """The best of the ``options`` with another schedule than ``chosen``; None if there is none."""
    replicas = len(chosen.problem.replicas)
    others = [
        option
        for option in options
        if _kind(option)[1:] != _kind(chosen)[1:]
        and len(option.split.stages) > 1
        and len(option.problem.replicas) == replicas
    ]
    if not others or len(chosen.split.stages) == 1:
        return None
    best = min(others, key=lambda option: option.step_s)
    schedule = best.problem.schedule
    return OtherSchedule(
        schedule=schedule,
        stages_per_device=best.problem.stages_per_device,
        devices=len(shares_of(best.split.stages, best.problem.stages_per_device)) * max(1, replicas),
        microbatches=best.problem.batch_microbatches,
        step_s=best.step_s,
        bubble=max(0.0, best.timeline.bubble),
        transfer_s=_transfer_s(best),
        own_transfer_s=_transfer_s(chosen),
    )


def _transfer_s(option: Option) -> float:
    """Seconds of a step that the device which is longest at it sends and receives."""
    problem, stages = option.problem, option.split.stages
    traffic, count = traffic_of(problem, stages), len(stages) // problem.stages_per_device
    return problem.microbatches * max(
        sum(each.out_s + each.in_s for each in traffic[position::count]) for position in range(count)
    )
