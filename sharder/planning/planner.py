"""From a profile to the plan: split at each number of micro-batches, simulate each, choose, certify."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, cast

from shardwright.errors import ShardwrightError
from shardwright.profiler.from_graph import profile_from_graph
from shardwright.profiler.graph import cost_graph
from shardwright.profiler.profile import Profile
from shardwright.sharder.planning.blocks import problem_from_graph
from shardwright.sharder.planning.offload import Rates
from shardwright.sharder.planning.offload import offload as offload_some
from shardwright.sharder.planning.partition import Partition, partition, stage_loads
from shardwright.sharder.planning.plan import Candidate, Certificate, Placement, Plan, Prediction, SplitTie, Stage
from shardwright.sharder.planning.problem import Block, Problem, Schedule, bits, in_flight
from shardwright.sharder.planning.search import simple_bound_s
from shardwright.sharder.planning.simulate import StageCost, expected_step_s, simulate
from shardwright.sharder.planning.timeline import Timeline

if TYPE_CHECKING:
    import networkx as nx

__all__ = ["plan"]

LEAST_NOISE = 0.05
"""One device counts as faster than an earlier one from this relative difference on, however steady both were."""


@dataclass(frozen=True)
class _Option:
    """A split at one number of micro-batches, priced."""

    problem: Problem
    split: Partition
    loads: list[float]
    costs: tuple[StageCost, ...]
    timeline: Timeline
    """Of the median times."""
    step_s: float
    """The median step of devices whose speed varies."""
    step_spread_s: float
    tiers: Mapping[int, str] = dataclasses.field(default_factory=dict)
    """Blocks whose weights stay elsewhere -> where."""


def plan(
    profile: Profile | nx.DiGraph[Any],
    *,
    objective: Literal["throughput"] = "throughput",
    microbatches: int | Literal["auto"] = "auto",
    memory: Mapping[str, str | int] | None = None,
    pins: Mapping[str, str] | None = None,
    devices: Iterable[str] | None = None,
    schedule: Schedule = "1f1b",
    offload: bool = True,
    time_limit_s: float = 30.0,
) -> Plan:
    """Split the profiled model over its devices.

    At each number of micro-batches the split with the smallest largest load is found and proven; the pipeline's step
    is then simulated, and the number with the shortest step is chosen. With ``"auto"``, one device alone is chosen
    when no split is faster.

    Args:
        profile: times and sizes, as measured or loaded; or a graph of costs from anywhere, with the attributes that
            :mod:`shardwright.profiler.graph` lists. A plan of such costs has no model to be placed.
        objective: ``"throughput"``, the steady state of a pipeline.
        microbatches: one of the profiled numbers, or ``"auto"``.
        memory: caps by device, in bytes or as text (``"10GiB"``), that replace the devices' own.
        pins: unit name or pattern -> device.
        devices: which devices to use; all that were profiled by default.
        schedule: ``"1f1b"``, or ``"gpipe"``, which holds all micro-batches at once; inference has forwards only.
        offload: whether, in inference, the weights of units that fit on no device may stay in the host's memory or on
            its disk, from where they are brought for each call.
        time_limit_s: seconds for the whole search; after it, the best so far with an honest gap.

    Raises:
        ShardwrightError: nothing fits the memory, an argument names what the profile does not have, or a graph's
            attribute is missing or wrong.
    """
    if not isinstance(profile, Profile):
        profile = profile_from_graph(profile)
    if objective != "throughput":
        raise ShardwrightError(f"objective {objective!r} is not known; the planner has: throughput")
    if schedule not in ("1f1b", "gpipe"):
        raise ShardwrightError(f"schedule {schedule!r} is not known; the planner has: 1f1b, gpipe")
    names = tuple(devices) if devices is not None else None
    deadline_s = time.monotonic() + time_limit_s

    def problem_at(count: int) -> Problem:
        graph = cost_graph(profile, count)
        order: Schedule = schedule if profile.train else "gpipe"
        return problem_from_graph(graph, devices=names, memory=memory, pins=pins, schedule=order)

    problems = [problem_at(count) for count in (profile.microbatches if microbatches == "auto" else (microbatches,))]
    options: list[_Option] = []
    unfinished: ShardwrightError | None = None
    for position, problem in enumerate(problems):
        share_s = max(0.0, deadline_s - time.monotonic()) / (len(problems) - position)
        try:
            option = _solve(problem, profile, time_limit_s=share_s)
        except ShardwrightError as error:
            unfinished = error
            continue
        if option is not None:
            options.append(option)
    if not options and offload and not profile.train:
        options = _offloaded(problems, profile, deadline_s)
    if not options:
        raise unfinished or ShardwrightError(_why_nothing_fits(problems, deadline_s))

    by_count = {problem.microbatches: problem for problem in problems}
    every = (by_count.get(count) or problem_at(count) for count in sorted(profile.microbatches))
    baseline = _baseline(every, profile)
    best = min(options, key=lambda option: option.step_s)
    chosen = best
    if microbatches == "auto" and baseline is not None and not pins:
        # Among single devices only a difference beyond noise counts; a split has to be faster.
        margin_s = _noise_s(best, baseline) if len(best.split.stages) == 1 else 0.0
        if baseline.step_s < best.step_s + margin_s:
            chosen = baseline
    return _write(profile, chosen, options, baseline, deadline_s)


def _solve(problem: Problem, profile: Profile, *, time_limit_s: float) -> _Option | None:
    """The best split of ``problem``, under GPipe if 1F1B leaves too few stages to fit; None when nothing fits."""
    attempts = [problem]
    if problem.most_stages < len(problem.devices):
        attempts.append(dataclasses.replace(problem, schedule="gpipe"))
    unfinished: ShardwrightError | None = None
    for attempt in attempts:
        try:
            split = partition(attempt, time_limit_s=time_limit_s / len(attempts))
        except ShardwrightError as error:
            unfinished = error
            continue
        if split is not None:
            return _price(attempt, split, profile)
    if unfinished is not None:
        raise unfinished
    return None


def _offloaded(problems: list[Problem], profile: Profile, deadline_s: float) -> list[_Option]:
    """The last resort at the smallest micro-batch: a split with the weights of some blocks elsewhere, if one fits."""
    problem = max(problems, key=lambda p: p.microbatches)
    fetch = {device.name: device.fetch_bytes_per_s for device in profile.devices}
    rates = Rates(tuple(fetch[name] for name in problem.devices), profile.disk_bytes_per_s, profile.host_bytes)
    found = offload_some(problem, rates, time_limit_s=max(0.5, (deadline_s - time.monotonic()) / 10))
    if found is None:
        return []
    return [dataclasses.replace(_price(found.problem, found.split, profile), tiers=found.tiers)]


def _price(problem: Problem, split: Partition, profile: Profile) -> _Option:
    """Loads, costs of each stage, and the simulated step."""
    loads = stage_loads(problem, split.stages)
    assert loads is not None, "a split that was found is feasible"
    costs = []
    closed = 0
    for position, (device, members) in enumerate(split.stages):
        blocks = [problem.blocks[v] for v in bits(members)]
        closed |= members
        send, receive = 0.0, 0.0
        if position + 1 < len(split.stages):
            send, receive = problem.transfer_s(problem.crossing(closed), device, split.stages[position + 1][0])
        costs.append(
            StageCost(
                forward_s=sum(b.forward_s[device] for b in blocks),
                backward_s=sum(b.backward_s[device] for b in blocks),
                update_s=sum(b.update_s[device] for b in blocks),
                send_forward_s=send,
                receive_backward_s=receive,
                tie_s=problem.ties_s(members, device),
            )
        )
    schedule, train = problem.schedule, profile.train
    timeline = simulate(costs, problem.microbatches, schedule=schedule, train=train)
    varied = {variation.device: variation.relative for variation in profile.variations}
    relative = [varied.get(problem.devices[device], ()) for device, _ in split.stages]
    step_s, spread_s = expected_step_s(costs, relative, problem.microbatches, schedule=schedule, train=train)
    return _Option(problem, split, loads, tuple(costs), timeline, step_s, spread_s)


def _baseline(problems: Iterable[Problem], profile: Profile) -> _Option | None:
    """One device alone: the fastest that holds the model, in the first of ``problems`` in which one does."""
    for problem in problems:
        best: _Option | None = None
        for device in _unlike(problem, profile):
            alone = problem.alone(device)
            if not all(block.allowed[0] for block in alone.blocks):
                continue
            whole = ((0, (1 << len(alone.blocks)) - 1),)
            loads = stage_loads(alone, whole)
            if loads is None:
                continue
            option = _price(alone, Partition(whole, loads[0], loads[0], exact=True), profile)
            if best is None or option.step_s < best.step_s - _noise_s(option, best):
                best = option
        if best is not None:
            return best
    return None


def _unlike(problem: Problem, profile: Profile) -> list[int]:
    """The devices without those on which the model would take the same time and memory as on an earlier one."""
    rows = zip(*(b.forward_s + b.backward_s + b.update_s + b.unfit for b in problem.blocks), strict=True)
    columns, count = list(rows), len(problem.devices)
    varied = {variation.device: variation.relative for variation in profile.variations}
    first: dict[tuple[object, ...], int] = {}
    for device, (name, cap) in enumerate(zip(problem.devices, problem.caps, strict=True)):
        together = problem.updates_together[device : device + 1]
        first.setdefault((cap, together, varied.get(name), *columns[device::count]), device)
    return list(first.values())


def _noise_s(one: _Option, other: _Option) -> float:
    """The difference of two steps that says nothing about their devices: their spread while they were measured."""
    return max(LEAST_NOISE * other.step_s, one.step_spread_s, other.step_spread_s)


def _write(
    profile: Profile, chosen: _Option, options: list[_Option], baseline: _Option | None, deadline_s: float
) -> Plan:
    """The records of the chosen option."""
    problem, split = chosen.problem, chosen.split
    stage_of: dict[str, int] = {}
    stages = []
    closed = 0
    nodes = {node.name: node for node in profile.nodes}
    for index, (device, members) in enumerate(split.stages):
        after = len(split.stages) - 1 - index
        names = {n for v in bits(members) for n in problem.blocks[v].nodes}
        stage_of |= dict.fromkeys(names, index)
        stages.append(
            Stage(
                index=index,
                device=problem.devices[device],
                units=tuple(
                    dict.fromkeys(node.unit for node in profile.nodes if node.kind == "unit" and node.name in names)
                ),
                **_recorded(chosen.costs[index]),
                load_s=chosen.loads[index],
                param_bytes=sum(nodes[n].param_bytes for n in names),
                memory_bytes=problem.memory_bytes(closed, closed | members, device, after),
                memory_cap_bytes=problem.caps[device],
                in_flight=in_flight(problem.schedule, problem.microbatches, after) if profile.train else 1,
            )
        )
        closed |= members
    producer = {tensor.name: tensor.producer for tensor in profile.tensors}
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
        objective="throughput",
        transfers="relayed",
        schedule=problem.schedule,
        microbatches=problem.microbatches,
        stages=tuple(stages),
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
                weights=cast("Literal['device', 'cpu', 'disk']", kept.get(node.name, "device")),
            )
            for node in profile.nodes
        ),
        ties=_split_ties(profile, chosen),
        obstacles=profile.obstacles,
        guards=profile.guards,
        certificate=_certify(chosen, options, baseline, deadline_s),
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
                microbatches=option.problem.microbatches,
                stages=len(option.split.stages),
                bottleneck_s=option.split.value_s,
                gap_percent=_gap_percent(option.split.value_s, option.split.bound_s),
                step_s=option.step_s,
                speedup=_speedup(baseline_s, option.step_s),
                chosen=option is chosen,
            )
            for option in options
        ),
    )


def _recorded(cost: StageCost) -> dict[str, float]:
    """The costs that a plan's stage records: no schedule that is planned splits the backward."""
    return {name: value for name, value in dataclasses.asdict(cost).items() if name in Stage.model_fields}


def _split_ties(profile: Profile, chosen: _Option) -> tuple[SplitTie, ...]:
    """The profile's ties with users in several stages; copies of buffers and constants have nothing in common."""
    named = {tie.name for tie in profile.ties}
    held = {
        tie.name: tuple(i for i, (_, members) in enumerate(chosen.split.stages) if tie.held(members))
        for tie in chosen.problem.ties
        if tie.name in named
    }
    return tuple(SplitTie(name=name, stages=stages) for name, stages in held.items() if stages)


def _gap_percent(value: float, bound: float) -> float:
    return max(0.0, 100.0 * (value / bound - 1.0)) if bound else 0.0


def _speedup(baseline_s: float | None, step_s: float) -> float | None:
    return None if baseline_s is None else baseline_s / step_s if step_s else 1.0


def _certify(chosen: _Option, options: list[_Option], baseline: _Option | None, deadline_s: float) -> Certificate:
    """Value, bound, gap and what binds."""
    split = chosen.split
    if chosen is baseline:
        # The bound is over the splits as well: one device was preferred to them for its step, not for its load.
        same = [option for option in options if option.problem.microbatches == chosen.problem.microbatches]
        bound_s = min([split.value_s, *(option.split.bound_s for option in same)]) if same else 0.0
        fastest_s = min(option.step_s for option in options)
        barred = [option for option in options if option.problem.unusable]
        return Certificate(
            value_s=split.value_s,
            bound_s=bound_s,
            gap_percent=_gap_percent(split.value_s, bound_s),
            exact=bound_s == split.value_s,
            binds=(
                _what_binds(max(barred, key=lambda option: option.problem.microbatches), deadline_s)
                if barred
                else f"filling and draining: a step of the best split takes {fastest_s / split.value_s:.2f}x this"
                if fastest_s > split.value_s
                else _what_binds(chosen, deadline_s)
            ),
        )
    return Certificate(
        value_s=split.value_s,
        bound_s=split.bound_s,
        gap_percent=_gap_percent(split.value_s, split.bound_s),
        exact=split.exact,
        binds=_what_binds(chosen, deadline_s),
    )


def _what_binds(chosen: _Option, deadline_s: float) -> str:
    """The part of the largest load, or the cap, that keeps it from being smaller."""
    problem, split, loads = chosen.problem, chosen.split, chosen.loads
    for what, relaxed, enough in _relaxations(problem):
        free = None
        with contextlib.suppress(ShardwrightError):  # no time is left to find a split of the relaxed problem
            free = partition(relaxed, time_limit_s=max(0.0, min(5.0, deadline_s - time.monotonic())))
        if free is not None and free.exact and free.value_s < enough * split.value_s:
            return f"{what}: without them the largest load would be {free.value_s / split.value_s:.0%} of this"
    index = max(range(len(loads)), key=loads.__getitem__)
    if not loads[index]:
        return "nothing: no unit takes time"
    device, members = split.stages[index]
    stage = f"stage {index} on {problem.devices[device]}"
    compute = {v: problem.work_s(v, device) for v in bits(members)}
    transfers = 1 - (sum(compute.values()) + problem.ties_s(members, device)) / loads[index]
    if transfers > 0.5:
        return f"the links of {stage}: transfers are {transfers:.0%} of its load"
    largest = max(compute, key=compute.__getitem__)
    block = problem.blocks[largest]
    share = compute[largest] / loads[index]
    name = _name(block)
    if share > 0.9 * (1 - transfers):
        return f"{name}, which is {stage} alone and cannot be split"
    if split.value_s <= 1.02 * simple_bound_s(problem):
        return f"the work itself: {stage} holds an even share of it"
    return f"the grain of the units: {stage} cannot be evened out, its largest is {name} with {share:.0%}"


def _relaxations(problem: Problem) -> Iterator[tuple[str, Problem, float]]:
    """What may stand in the way of a smaller load, the problem without it, and the share of the load that tells."""
    whole = problem.memory_bytes(0, (1 << len(problem.blocks)) - 1, 0, len(problem.devices) - 1)
    if whole > min(problem.caps):
        caps = (whole * len(problem.devices),) * len(problem.devices)
        yield "the memory caps", dataclasses.replace(problem, caps=caps), 0.999
    if problem.unusable:
        yield (
            f"the faults of corrupt links, which are not used ({_links_in_words(problem)})",
            _all_usable(problem),
            0.999,
        )
    if problem.ties:
        dearest = max(problem.ties, key=lambda tie: (tie.gradient_bytes, tie.copy_bytes)).name
        more = f" and {len(problem.ties) - 1} more" if len(problem.ties) > 1 else ""
        # Every split of a tied parameter pays something: it is worth naming when that is a good part.
        yield f"the copies of {dearest}{more}", dataclasses.replace(problem, ties=()), 0.95


def _all_usable(problem: Problem) -> Problem:
    """The problem with corrupt links that cost nothing but their bandwidth: no worse than if they were mended."""
    links = tuple(tuple((0.0 if math.isinf(s) else s, rate) for s, rate in row) for row in problem.links)
    return dataclasses.replace(problem, links=links)


def _links_in_words(problem: Problem) -> str:
    return ", ".join(f"{source} -> {target}" for source, target in problem.unusable)


def _fits(problem: Problem, deadline_s: float) -> bool:
    """Whether some split of ``problem`` was found in the time that is left."""
    with contextlib.suppress(ShardwrightError):
        return partition(problem, time_limit_s=max(0.0, min(5.0, deadline_s - time.monotonic()))) is not None
    return False


def _name(block: Block) -> str:
    """A block in words: its first unit, and how many nodes stay with it."""
    first = block.units[0] if block.units else block.nodes[0]
    others = len(block.nodes) - 1
    return f"{first} and {others} node{'s that stay' if others > 1 else ' that stays'} with it" if others else first


def _size(count: int) -> str:
    """Bytes in words, for an error."""
    unit, name = next(((u, n) for u, n in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")) if count >= u), (1, "B"))
    return f"{count / unit:.4g} {name}"


def _why_nothing_fits(problems: list[Problem], deadline_s: float) -> str:
    """Which block or whole exceeds the memory, at the smallest micro-batch, or that the pins leave nothing."""
    problem = max(problems, key=lambda p: p.microbatches)
    for v, block in enumerate(problem.blocks):
        rooms = [
            (problem.caps[d], name, problem.least_bytes(v, d))
            for d, name in enumerate(problem.devices)
            if block.allowed[d]
        ]
        if not rooms:
            return f"{_name(block)} is pinned to where it does not fit, not even alone: remove the pin"
        room, device, need = max(rooms)
        if need > room:
            which = "the roomiest device" if all(block.allowed) else "where it is pinned"
            return (
                f"{_name(block)} needs {_size(need)} at {problem.microbatches} micro-batches; {device}, {which}, has "
                f"{_size(room)}: profile more micro-batches, or use a larger device"
            )
    if problem.unusable and _fits(_all_usable(problem), deadline_s):
        return (
            f"no split fits without corrupt links ({_links_in_words(problem)}), which change what they carry: give the "
            "devices more memory with --memory, or mend the links; `report` on the profile says how"
        )
    if not all(all(block.allowed) for block in problem.blocks):
        every = range(len(problem.devices))
        blocks = tuple(
            dataclasses.replace(block, allowed=tuple(block.fits_on(d) for d in every)) for block in problem.blocks
        )
        unpinned = dataclasses.replace(problem, blocks=blocks)
        if _fits(unpinned, deadline_s):
            return (
                "no split obeys the pins, though one without them fits: each device takes one piece of the forward, in "
                "its order; pin neighbours alike, or remove a pin"
            )
    static = sum(block.static_bytes for block in problem.blocks)
    whole = problem.memory_bytes(0, (1 << len(problem.blocks)) - 1, 0, 0)
    caps = ", ".join(f"{device} {_size(cap)}" for device, cap in zip(problem.devices, problem.caps, strict=True))
    return (
        f"no split fits: at {problem.microbatches} micro-batches the model needs {_size(whole)} in one piece "
        f"({_size(static)} of it weights, gradients and optimizer state); the devices have {caps}: add a device, raise "
        "--memory, or profile more micro-batches"
    )
