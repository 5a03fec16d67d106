"""Replicas weighed: for each number of them the best splits on its meshes, and the rival of a plan with none."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

from shardwright.errors import ShardwrightError
from shardwright.profiler.profile import Profile
from shardwright.sharder.planning.clock import clock_s
from shardwright.sharder.planning.exact.search import simple_bound_s
from shardwright.sharder.planning.formulation.words import links_in_words, size_of
from shardwright.sharder.planning.plan import WORTHWHILE, Alternative
from shardwright.sharder.planning.pricing import Option, solve_each
from shardwright.sharder.planning.problem import Problem
from shardwright.sharder.planning.schedules.replicas import on_meshes, possible_replicas

__all__ = ["nothing_fits_in", "rival_in_replicas", "with_replicas"]

RIVAL_SHARE = 0.1
"""Of the time for the search, what looking for a rival may take."""

MOST_TIMES = 50_000
"""For more blocks times devices none is looked for: making the problems would take as long as the plan."""

Solved = tuple[list[Option], ShardwrightError | None]


def _why_not_shared(problems: Sequence[Problem], profile: Profile, replicas: int) -> str:
    """Why the devices or the micro-batches of ``problems`` cannot be shared by ``replicas``; nothing if they can."""
    devices = len(problems[0].devices)
    if devices < replicas:
        there = "there is 1" if devices == 1 else f"there are {devices}"
        return f"{replicas} replicas need a device each, and {there}: ask for fewer, or name more devices"
    if devices % replicas:
        return (
            f"{replicas} replicas take equally many devices each, and {replicas} does not divide {devices}: "
            f"name {devices // replicas * replicas} with --devices, or ask for another number"
        )
    if all(problem.microbatches % replicas for problem in problems):
        if profile.batch % replicas:
            what, how = ("samples", "profile") if profile.of_model else ("micro-batches", "give costs of")
            return (
                f"{replicas} replicas take equal parts of a batch, and {replicas} does not divide {profile.batch} "
                f"{what}: {how} a batch that it divides, or ask for another number"
            )
        counts = ", ".join(str(problem.microbatches) for problem in problems)
        shared = ", ".join(str(count) for count in profile.microbatches if count % replicas == 0)
        return (
            f"{replicas} replicas take equally many micro-batches each, and {replicas} does not divide {counts}: "
            + (f"take {shared}, or auto" if shared else f"profile --microbatches {replicas}, or a multiple of it")
        )
    return ""


def with_replicas(
    plain: Sequence[Problem], profile: Profile, replicas: int, solved: Callable[[list[Problem]], Solved]
) -> Solved:
    """The best split in ``replicas`` pipelines at each number of micro-batches that they can share.

    Args:
        plain: the problems of one pipeline.
        solved: finds splits of problems.

    Raises:
        ShardwrightError: the devices or the micro-batches cannot be shared, or gradients cannot be summed.
    """
    why = _why_not_shared(plain, profile, replicas)
    if why:
        raise ShardwrightError(why)
    joint = on_meshes(plain, profile, replicas)
    if not joint:
        raise ShardwrightError(
            f"{replicas} replicas cannot sum their gradients without corrupt links ({links_in_words(plain[0])}), which "
            "change what they carry: mend the links, or name other devices with --devices"
        )
    options, unfinished = solved(joint)
    return _bests(options), unfinished


def _bests(options: Sequence[Option]) -> list[Option]:
    """Of the meshes at each number of micro-batches and stages a device the one with the shortest step."""
    best: dict[tuple[int, int], Option] = {}
    for option in options:
        key = option.problem.stages_per_device, option.problem.microbatches
        if key not in best or option.shortest.step_s < best[key].shortest.step_s:
            best[key] = option
    return list(best.values())


def nothing_fits_in(plain: Sequence[Problem], replicas: int) -> ShardwrightError:
    """That no pipeline fits into its part of the devices."""
    problem = max(plain, key=lambda p: p.microbatches)
    whole = sum(block.static_bytes for block in problem.blocks)
    depth = len(problem.devices) // replicas
    return ShardwrightError(
        f"no pipeline of {depth} {'stages fits' if depth > 1 else 'stage fits'} in {replicas} replicas: each holds the "
        f"whole model, {size_of(whole)} of weights, gradients and optimizer state, on {depth} of the devices; ask for "
        "fewer with --replicas, or give the devices more memory with --memory"
    )


def rival_in_replicas(
    chosen: Option, problems: Sequence[Problem], profile: Profile, baseline_s: float | None, deadline_s: float
) -> tuple[Alternative, ...]:
    """The best split in several replicas of several devices each, where its step is noticeably shorter than that of
    ``chosen``, which has one.

    Data parallel, a replica on each device, is an alternative by itself.

    Args:
        problems: of one pipeline over all devices, at each number of micro-batches.
        deadline_s: of ``clock_s()``; a part of the time until then is taken.
    """
    devices = len(problems[0].devices)
    if devices * len(problems[0].blocks) > MOST_TIMES:
        return ()
    until_s = clock_s() + RIVAL_SHARE * max(0.0, deadline_s - clock_s())
    hopeful: list[Problem] = []
    for problem, count in itertools.product(problems, possible_replicas(devices)):
        if count < devices and clock_s() < until_s:
            joint = on_meshes([problem], profile, count)
            hopeful += [each for each in joint if simple_bound_s(each) * WORTHWHILE <= chosen.step_s]
    found, _ = solve_each(hopeful, profile, until_s)
    best = min((option.shortest for option in found), key=lambda option: option.step_s, default=None)
    if best is None or best.step_s * WORTHWHILE > chosen.step_s:
        return ()
    replicas = len(best.problem.replicas)
    return (
        Alternative(
            name="replicas",
            microbatches=best.problem.batch_microbatches,
            devices=replicas * len(best.split.stages),
            replicas=replicas,
            step_s=best.step_s,
            speedup=baseline_s / best.step_s if baseline_s and best.step_s else None,
        ),
    )
