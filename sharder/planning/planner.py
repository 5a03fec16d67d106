"""From a profile to the plan: split at each number of micro-batches, simulate each, choose, certify.

What only other objectives, other costs than a profile's, or failures need is imported there: of the time that planning
from a saved profile takes as a command, more than half are imports.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, cast

from shardwright.errors import ShardwrightError
from shardwright.profiler.graph import costs_at
from shardwright.profiler.profile import Profile
from shardwright.sharder.planning.arguments import check_arguments, check_words
from shardwright.sharder.planning.clock import MOST_S, Budget, clock_s, ended_by_interrupt
from shardwright.sharder.planning.formulation.blocks import problem_from_graph
from shardwright.sharder.planning.options import Asked, nothing_fits, options_of, rates_of
from shardwright.sharder.planning.plan import (
    WORTHWHILE,
    Alternative,
    Candidate,
    Certificate,
    Objective,
    Placement,
    Plan,
    Prediction,
)
from shardwright.sharder.planning.pricing import Option, baseline_of, noise_s, solve, with_short_step
from shardwright.sharder.planning.problem import Problem, Recompute, Schedule, Transfers, Wanted
from shardwright.sharder.planning.recorded import makers_of_numbers, split_ties, stage_of_nodes, stages_of
from shardwright.sharder.planning.schedules.interleaved_options import pieces_asked
from shardwright.sharder.planning.schedules.replicas import Replicas, on_mesh_of, replicas_asked
from shardwright.sharder.planning.schedules.weighed import better_of, compared
from shardwright.sharder.planning.schedules.zero_bubble_options import is_zero_bubble, parted_asked
from shardwright.sharder.planning.verdict.alternatives import alternatives_of, kept_whole, priced_in_parallel
from shardwright.sharder.planning.verdict.changes import changes_tried, lifts_of
from shardwright.sharder.planning.verdict.explain import certify, gap_percent
from shardwright.sharder.planning.verdict.prices import Value, Wishes, load_without, prices_of
from shardwright.sharder.planning.verdict.sensitivity import rivals_of, sensitivity_of

if TYPE_CHECKING:
    import networkx as nx

    from shardwright.profiler.costgraph import CostGraph
    from shardwright.profiler.formats.costs import Costs

__all__ = ["plan"]

LEAST_DEVICES = 4
"""With fewer, replicas of more than one device are none."""


@ended_by_interrupt()
def plan(
    profile: Profile | Costs | nx.DiGraph[Any] | Sequence[Costs | nx.DiGraph[Any]],
    *,
    objective: Objective = "throughput",
    contiguous: bool = True,
    microbatches: int | Literal["auto"] = "auto",
    memory: Mapping[str, str | int] | None = None,
    pins: Mapping[str, str] | None = None,
    devices: Iterable[str] | None = None,
    schedule: Wanted = "1f1b",
    stages_per_device: int | None = None,
    replicas: Replicas = 1,
    transfers: Transfers = "relayed",
    overlap: bool = False,
    together: Iterable[str | Iterable[str]] = (),
    offload: bool = True,
    recompute: Recompute = "auto",
    time_limit_s: float = 30.0,
    replans: int = 0,
) -> Plan:
    """Split the profiled model over its devices.

    At each number of micro-batches the split with the smallest largest load is found and proven, and from it on one
    with a shorter step is looked for. The number with the shortest step, simulated, is chosen. With ``"auto"``, one
    device alone is chosen when no split is worth it, 3% faster.

    Args:
        profile: times and sizes, as measured or loaded; or costs as written by hand, or a graph of costs from anywhere,
            with the attributes that :mod:`shardwright.profiler.graph` lists. Several of these, each of another number
            of micro-batches, are as one profile. A plan of such costs has no model to be placed.
        objective: ``"throughput"``, the steady state of a pipeline; ``"latency"``, one input as fast as possible,
            branches on different devices at once; ``"memory"``, the fullest device as little full as possible.
        contiguous: whether the devices take stages that follow each other, as a pipeline does; else each unit may be on
            any device, and the plan can be placed, not run as a pipeline. Latency asks for no stages in any case.
        microbatches: one of the profiled numbers, or ``"auto"``.
        memory: caps by device, in bytes or as text (``"10GiB"``), that replace the devices' own.
        pins: unit, module or pattern -> device.
        devices: which devices to use; all that were profiled by default.
        schedule: ``"1f1b"``, and where that allows fewer stages than devices, for want of micro-batches, GPipe if its
            step is shorter; ``"gpipe"``, which holds all micro-batches at once; ``"interleaved"``, 1F1B with several
            stages on each device, which fills the pipeline sooner and sends more; ``"zero-bubble"``, 1F1B with each
            backward in two parts, of which the second fills waits and holds more, for profiles that have them; or
            ``"auto"``, whichever of 1F1B and the last two has the shorter step. Inference has forwards only.
        stages_per_device: if interleaved; 2 by default.
        replicas: into so many equal pipelines the devices are divided, each with an equal part of the micro-batches,
            and once a step the gradients are summed over them; ``"auto"``: as many as make the step shortest, of one
            pipeline over all devices up to data parallel. A pinned unit is on its device in one replica, and in the
            others on those that go with it.
        transfers: how tensors pass between stages: ``"relayed"`` from neighbour to neighbour, as the pipeline engine
            sends them; ``"direct"`` to each stage that reads them; ``"staged"`` through the host's memory, once out and
            once into each stage that reads.
        overlap: whether sends and receives go on beside compute and each other; a load is the longest of the three.
        together: units, modules or patterns, or groups of them, whose units must share a device.
        offload: whether, in inference, the weights of units that fit on no device may stay in the host's memory or on
            its disk, from where they are brought for each call.
        recompute: whether, in training, a stage keeps only what it receives of each micro-batch in flight, and computes
            its forward anew in the backward: ``"never"``, ``"always"`` all stages, or ``"auto"`` those that would not
            fit otherwise, if that is noticeably faster. Interleaved stages, zero-bubble, a free assignment and latency
            have none.
        time_limit_s: seconds for the whole search; after it, or Ctrl-C, the best so far with an honest gap.
        replans: how often to plan anew with costs drawn within the uncertainty of the profile's times, to see how the
            plan moves; the prediction is drawn anew in any case.

    Raises:
        ShardwrightError: nothing fits the memory, an argument names what the profile does not have, or a graph's
            attribute is missing or wrong.
    """
    profile, given = (profile, None) if isinstance(profile, Profile) else _of_costs(profile)
    check_words(objective, transfers, recompute)
    check_arguments(
        memory=memory,
        pins=pins,
        devices=devices,
        together=together,
        stages_per_device=stages_per_device,
        time_limit_s=time_limit_s,
        replans=replans,
    )
    chain = contiguous and objective != "latency"
    weighed = _weighed(
        profile, schedule, stages_per_device, replicas, objective, transfers, contiguous=contiguous, recompute=recompute
    )._replace(offload=offload)
    _check_recompute(recompute, chain=chain, train=profile.train)
    _check_replans(replans, made_anew=chain and objective != "memory")
    names = tuple(devices) if devices is not None else None
    groups = [together] if isinstance(together, str) else [g if isinstance(g, str) else tuple(g) for g in together]
    if not all(groups):
        raise ShardwrightError("together has a group that names no unit: give names, or leave it out")
    wishes = Wishes(pins or {}, groups)
    time_limit_s = min(time_limit_s, MOST_S)
    deadline_s = clock_s() + time_limit_s

    def problem_at(count: int, wishes: Wishes = wishes) -> Problem:
        graph = given if given is not None and count == profile.microbatches[0] else costs_at(profile, count)
        order: Schedule = "gpipe" if schedule == "gpipe" or not profile.train else "1f1b"
        return problem_from_graph(
            graph,
            devices=names,
            memory=memory,
            pins=wishes.pins,
            schedule=order,
            transfers=transfers,
            overlap=overlap,
            together=wishes.groups,
            recompute=recompute if chain else "never",
            chain=contiguous or objective == "latency",
        )

    problems = [problem_at(count) for count in (profile.microbatches if microbatches == "auto" else (microbatches,))]
    if not chain:
        one_at_a_time = objective == "latency" and microbatches == "auto"
        counts = [min(profile.microbatches)] if one_at_a_time else [p.microbatches for p in problems]
        from shardwright.sharder.planning.free.freely import plan_freely

        return plan_freely(profile, problem_at, counts, wishes, objective, deadline_s)
    if objective == "memory":
        return _for_memory(profile, problem_at, [problem.microbatches for problem in problems], wishes, deadline_s)
    return _for_throughput(
        profile,
        problem_at,
        problems,
        weighed,
        wishes,
        free=microbatches == "auto",
        replans=replans,
        deadline_s=deadline_s,
    )


def _of_costs(
    costs: Costs | nx.DiGraph[Any] | Sequence[Costs | nx.DiGraph[Any]],
) -> tuple[Profile, CostGraph | None]:
    """The profile of costs, and their cost graph where they are of one number of micro-batches."""
    from shardwright.profiler.formats.costs import Costs
    from shardwright.profiler.formats.from_graph import costs_from_graph, profile_from_graph

    if not isinstance(costs, Sequence):
        return costs_from_graph(costs.cost_graph() if isinstance(costs, Costs) else costs)
    from shardwright.profiler.formats.counts import profile_of_counts

    if not costs:
        raise ShardwrightError("there are no costs to plan; give those of one number of micro-batches, or of several")
    profiles = [
        one if isinstance(one, Profile) else one.profile() if isinstance(one, Costs) else profile_from_graph(one)
        for one in costs
    ]
    return (profile_of_counts(profiles) if len(profiles) > 1 else profiles[0]), None


def _weighed(
    profile: Profile,
    schedule: Wanted,
    stages_per_device: int | None,
    replicas: Replicas,
    objective: Objective,
    transfers: Transfers,
    *,
    contiguous: bool,
    recompute: Recompute,
) -> Asked:
    """What is to be weighed.

    Raises:
        ShardwrightError: some of it does not go together.
    """
    pieces = pieces_asked(schedule, stages_per_device, objective, transfers, contiguous=contiguous, recompute=recompute)
    asked = replicas_asked(replicas, objective, contiguous=contiguous)
    parted = parted_asked(
        profile, schedule, objective, transfers, contiguous=contiguous, recompute=recompute, replicas=asked
    )
    return Asked(schedule, pieces, parted, asked, offload=True)


def _check_recompute(recompute: Recompute, *, chain: bool, train: bool) -> None:
    """Refuse to compute every stage anew where there is no backward, or no stage."""
    if recompute != "always":
        return
    if not train:
        raise ShardwrightError("recompute 'always' is for training, and the profile is of inference: leave it out")
    if not chain:
        raise ShardwrightError(
            "recompute 'always' is for a chain of stages, which a free assignment and latency do not make: leave it out"
        )


def _check_replans(replans: int, *, made_anew: bool) -> None:
    """Refuse to plan anew for what is not the throughput of a chain."""
    if replans and not made_anew:
        raise ShardwrightError(
            f"replans is {replans}, and only plans for throughput in a chain of stages are made anew: leave it out"
        )


def _for_throughput(
    profile: Profile,
    problem_at: Callable[[int, Wishes], Problem],
    problems: list[Problem],
    weighed: Asked,
    wishes: Wishes,
    *,
    free: bool,
    replans: int,
    deadline_s: float,
) -> Plan:
    """The chain of stages with the shortest step that was found, or one device; ``free`` as to micro-batches."""
    options = options_of(problems, profile, weighed, deadline_s)
    by_count = {problem.microbatches: problem for problem in problems}
    every = [by_count.get(count) or problem_at(count, wishes) for count in sorted(profile.microbatches)]
    baseline = baseline_of(every, profile)
    alternatives = alternatives_of(problems, every, profile, baseline.step_s if baseline else None)
    plain = [option for option in options if option.problem.stages_per_device == 1 and not is_zero_bubble(option)]
    others = [option for option in options if option not in plain]
    chosen = best = better_of(others if others and weighed.schedule in ("interleaved", "zero-bubble") else options)
    if free and baseline is not None and not wishes.pins:
        # Among single devices only a difference beyond noise counts; a split has to be worth it.
        alone = len(best.split.stages) == 1 and not best.problem.replicas
        margin_s = noise_s(best, baseline) if alone else best.step_s * (WORTHWHILE - 1)
        if baseline.step_s < best.step_s + margin_s:
            chosen = baseline
    if len(chosen.split.stages) == 1 and len(chosen.problem.replicas) == len(problems[0].devices):
        # It is data parallel itself.
        alternatives = tuple(one for one in alternatives if one.name != "data parallel")
    alternatives += kept_whole(chosen, options, baseline.step_s if baseline else None)
    if weighed.replicas == 1 and len(problems[0].devices) >= LEAST_DEVICES and not profile.obstacles:
        from shardwright.sharder.planning.schedules.replicated import rival_in_replicas

        alternatives += rival_in_replicas(chosen, problems, profile, baseline.step_s if baseline else None, deadline_s)
    if len(chosen.split.stages) > 1 and not chosen.problem.replicas and not chosen.tiers and not profile.obstacles:
        from shardwright.sharder.planning.schedules.rivals import rival_schedules

        baseline_s = baseline.step_s if baseline else None
        alternatives += rival_schedules(chosen, weighed, profile, baseline_s, deadline_s)
    certificate = certify(chosen, options, baseline, deadline_s)

    def problems_with(wishes: Wishes) -> list[Problem]:
        mesh = [option.problem for option in options if len(option.problem.replicas) == len(chosen.problem.replicas)]
        counts = sorted({problem.batch_microbatches for problem in mesh} or {chosen.problem.batch_microbatches})
        return [on_mesh_of(problem_at(count, wishes), chosen.problem, profile) for count in counts]

    def least_load_with(wishes: Wishes, parts: int) -> Value:
        problem = on_mesh_of(problem_at(chosen.problem.batch_microbatches, wishes), chosen.problem, profile)
        left_s = max(0.0, deadline_s - clock_s())
        return load_without(chosen, problem, rates_of(profile, chosen.problem), left_s / parts)

    pin_prices, group_prices = prices_of(wishes, chosen.of_least_load.split.value_s, least_load_with)
    written = _write(profile, chosen, options, baseline, alternatives, certificate)
    return written.model_copy(
        update={
            "other_schedule": compared(chosen, options),
            "pins": pin_prices,
            "groups": group_prices,
            "changes": (
                None
                if baseline is None or (written.predicted.speedup or 0.0) >= WORTHWHILE
                else changes_tried(plain or options, baseline, profile, deadline_s, lifts_of(wishes, problems_with))
            ),
            "sensitivity": sensitivity_of(
                chosen,
                rivals_of(chosen, options, baseline),
                profile,
                parallel=priced_in_parallel(alternatives, every),
                replans=replans,
                deadline_s=deadline_s,
            ),
        }
    )


def _for_memory(
    profile: Profile,
    problem_at: Callable[[int, Wishes], Problem],
    counts: list[int],
    wishes: Wishes,
    deadline_s: float,
) -> Plan:
    """The split with the smallest peak share, and of those with no larger one that with the smallest largest load."""
    from shardwright.sharder.planning.free.freely import for_memory, least_of
    from shardwright.sharder.planning.free.least_memory import LeastShare, least_share, within_share

    def least_with(wishes: Wishes, deadline_s: float) -> tuple[Problem, LeastShare]:
        problems = [problem_at(count, wishes) for count in counts]
        # Stages computed anew take less almost always: they are for what does not fit otherwise.
        kept = [dataclasses.replace(p, recompute="never" if p.recompute == "auto" else p.recompute) for p in problems]
        found = least_of(kept, deadline_s) or least_of(problems, deadline_s)
        if found is None:
            raise nothing_fits(problems, profile, deadline_s)
        return found

    problem, share = least_with(wishes, deadline_s)

    def least_share_with(wishes: Wishes, parts: int) -> Value:
        """Under the plan's schedule, with what it computes anew."""
        others = [
            dataclasses.replace(problem_at(count, wishes), schedule=problem.schedule, recompute=problem.recompute)
            for count in counts
        ]
        until_s = clock_s() + max(0.0, deadline_s - clock_s()) / parts
        found = [
            least_share(one, Budget(max(0.0, until_s - clock_s()) / (len(others) - n))) for n, one in enumerate(others)
        ]
        shares = [one for one in found if one is not None]
        best = min(shares, key=lambda one: one.value)
        return Value(best.value, best.exact)

    option = solve(within_share(problem, share.value), profile, time_limit_s=max(0.0, deadline_s - clock_s()))
    if option is None:
        raise AssertionError("a split was found with these caps")
    option = with_short_step(option, profile)
    every = [problem_at(count, wishes) for count in sorted(profile.microbatches)]
    baseline = baseline_of(every, profile)
    problems = [one for one in every if one.microbatches in counts]
    alternatives = alternatives_of(problems, every, profile, baseline.step_s if baseline else None)
    alternatives += kept_whole(option, [option], baseline.step_s if baseline else None)
    certificate = certify(option, [option], None, deadline_s)
    pins, groups = prices_of(wishes, share.value, least_share_with, shares=True)
    written = _write(profile, option, [option], baseline, alternatives, certificate)
    written = written.model_copy(update={"pins": pins, "groups": groups})
    return for_memory(written, option, problem, share, deadline_s)


def _paces(profile: Profile, microbatches: int) -> dict[str, float]:
    """By device, the pace that its times go by: a GPU's do where they are its host's."""
    by_host = {m.device for m in profile.measurements if m.microbatches == microbatches and m.host_bound}
    return {
        device.name: device.pace_s
        for device in profile.devices
        if device.pace_s is not None and (device.kind != "cuda" or device.name in by_host)
    }


def _write(
    profile: Profile,
    chosen: Option,
    options: list[Option],
    baseline: Option | None,
    alternatives: tuple[Alternative, ...],
    certificate: Certificate,
) -> Plan:
    """The records of the chosen option."""
    problem = chosen.problem
    stages, stage_of = stages_of(profile, chosen), stage_of_nodes(chosen)
    producer = {tensor.name: tensor.producer for tensor in profile.tensors}
    numbers = makers_of_numbers(profile)
    baseline_s = baseline.step_s if baseline else None
    kept = {name: tier for v, tier in chosen.tiers.items() for name in problem.blocks[v].nodes}
    return Plan(
        model=profile.model,
        structure=profile.structure,
        inputs=profile.inputs,
        batch=profile.batch,
        train=profile.train,
        optimizer=profile.optimizer,
        profiled_devices=tuple(device.name for device in profile.devices),
        declared_devices=tuple(device.name for device in profile.devices if device.declared),
        paces=_paces(profile, problem.batch_microbatches),
        hosts=profile.hosts,
        objective="throughput",
        transfers=problem.transfers,
        overlap=problem.overlap,
        schedule=problem.schedule,
        stages_per_device=problem.stages_per_device,
        replicas=max(1, len(problem.replicas)),
        microbatches=problem.batch_microbatches,
        stages=stages,
        nodes=tuple(
            Placement(
                node=node.name,
                kind=node.kind,
                type=node.type,
                unit=node.unit,
                site=node.site,
                device=stages[stage_of[node.name]].device,
                stage=stage_of[node.name],
                inputs=tuple(dict.fromkeys(producer[tensor] for tensor in node.inputs)),
                numbers=node.name in numbers,
                weights=cast("Literal['device', 'cpu', 'disk']", kept.get(node.name, "device")),
            )
            for node in profile.nodes
        ),
        ties=split_ties(profile, chosen),
        obstacles=profile.obstacles,
        guards=profile.guards,
        certificate=certificate,
        predicted=Prediction(
            step_s=chosen.step_s,
            step_spread_s=chosen.step_spread_s,
            bubble=max(0.0, chosen.timeline.bubble),
            baseline_device=baseline.problem.devices[0] if baseline else None,
            baseline_microbatches=baseline.problem.microbatches if baseline else 1,
            baseline_s=baseline_s,
            speedup=_speedup(baseline_s, chosen.step_s),
        ),
        candidates=tuple(
            Candidate(
                microbatches=option.problem.batch_microbatches,
                stages=len(option.split.stages),
                stages_per_device=option.problem.stages_per_device,
                zero_bubble=is_zero_bubble(option),
                replicas=max(1, len(option.problem.replicas)),
                bottleneck_s=option.split.value_s,
                gap_percent=gap_percent(option.split.value_s, option.split.bound_s),
                step_s=option.step_s,
                speedup=_speedup(baseline_s, option.step_s),
                chosen=option is chosen,
            )
            for option in options
        ),
        alternatives=alternatives,
    )


def _speedup(baseline_s: float | None, step_s: float) -> float | None:
    return None if baseline_s is None else baseline_s / step_s if step_s else 1.0
