"""Plans that are no chain of stages, and plans of the objectives latency and memory: from problems to records."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from shardwright.errors import ShardwrightError
from shardwright.profiler.profile import Profile
from shardwright.sharder.planning.assign import assign, bound_s
from shardwright.sharder.planning.assignment import (
    Assignment,
    Budget,
    as_free,
    held_at_once,
    loads_of,
    masks_of,
    peak_bytes,
    traffic_by_device,
)
from shardwright.sharder.planning.cpsat import EXTRA, has_ortools
from shardwright.sharder.planning.explain import gap_percent
from shardwright.sharder.planning.fastest import fastest
from shardwright.sharder.planning.latency import Race, Schedule
from shardwright.sharder.planning.least_memory import (
    LeastShare,
    assignment_fits,
    largest_batch,
    least_share,
    least_share_freely,
    stages_fit,
    within_share,
)
from shardwright.sharder.planning.partition import partition
from shardwright.sharder.planning.plan import (
    Certificate,
    Objective,
    PeakShare,
    Placement,
    Plan,
    Prediction,
    SplitTie,
    Stage,
    Timed,
)
from shardwright.sharder.planning.pricing import Option, baseline_of
from shardwright.sharder.planning.problem import Problem, bits
from shardwright.sharder.planning.relaxed import unpinned
from shardwright.sharder.planning.words import links_in_words, name_of, size_of

__all__ = ["for_memory", "least_of", "plan_freely"]


@dataclass(frozen=True)
class _Found:
    """A free assignment at one number of micro-batches."""

    problem: Problem
    assignment: Assignment
    """Its value is the largest load, under latency the finishing time."""
    share: Assignment | None = None
    """Objective memory: its value is the peak share."""
    schedule: Schedule | None = None
    microbatches: int = 1
    """As profiled; under latency ``problem`` has one of them."""

    @property
    def rank(self) -> tuple[float, float]:
        """What is compared between numbers of micro-batches."""
        return (self.share.value if self.share else 0.0), self.assignment.value


def plan_freely(
    profile: Profile,
    problems: Sequence[Problem],
    every: Sequence[Problem],
    *,
    objective: Objective,
    time_limit_s: float,
) -> Plan:
    """The best plan that puts each unit on any device.

    Args:
        profile: times and sizes.
        problems: at the numbers of micro-batches that may be chosen.
        every: at all profiled numbers, for the baseline.
        objective: see :func:`~shardwright.sharder.planning.planner.plan`.
        time_limit_s: for all of it; after it, or Ctrl-C, the best so far with an honest gap.

    Raises:
        ShardwrightError: nothing fits, or nothing was found in the time.
    """
    budget = Budget(time_limit_s)
    found: list[_Found] = []
    unfinished: ShardwrightError | None = None
    for position, problem in enumerate(map(as_free, problems)):
        with budget.part(len(problems) - position) as part:
            try:
                one = _solve(problem, objective, part)
            except ShardwrightError as error:
                unfinished = error
                continue
            if one is not None:
                found.append(one)
    if not found:
        raise unfinished or ShardwrightError(_why_none([*map(as_free, problems)]))
    best = min(found, key=lambda one: one.rank)
    return _Writer(profile, best).plan(objective, _baseline(profile, best, every))


def _solve(problem: Problem, objective: Objective, budget: Budget) -> _Found | None:
    seeds = _seeds(problem, budget)
    if objective == "latency":
        quickest = fastest(problem, budget, seeds)
        if quickest is None:
            return None
        schedule = quickest.schedule
        found = Assignment(schedule.of, schedule.value_s, quickest.bound_s, quickest.exact)
        return _Found(
            dataclasses.replace(problem, microbatches=1), found, schedule=schedule, microbatches=problem.microbatches
        )
    if objective == "memory":
        with budget.part(2) as part:
            share = least_share_freely(problem, part, seeds)
        if share is None:
            return None
        lightest = assign(within_share(problem, share.value), budget, [share.of])
        return None if lightest is None else _Found(problem, lightest, share, None, problem.microbatches)
    lightest = assign(problem, budget, seeds)
    return None if lightest is None else _Found(problem, lightest, None, None, problem.microbatches)


def _seeds(problem: Problem, budget: Budget) -> list[list[int]]:
    """The best chain of stages, if a fifth of the time finds one."""
    with contextlib.suppress(ShardwrightError):
        split = partition(problem, time_limit_s=budget.left_s / 5)
        if split is not None:
            stage_of = {v: device for device, members in split.stages for v in bits(members)}
            return [[stage_of[v] for v in range(len(problem.blocks))]]
    return []


def _why_none(problems: Sequence[Problem]) -> str:
    """Which block or whole exceeds the memory."""
    problem = max(problems, key=lambda p: p.microbatches)
    alone = dataclasses.replace(problem, microbatches=1)
    for v, block in enumerate(problem.blocks):
        rooms = [(problem.caps[d], name) for d, name in enumerate(problem.devices) if block.allowed[d]]
        if not rooms:
            return f"{name_of(block)} is pinned to where it does not fit, not even alone: remove the pin"
        need = alone.least_bytes(v, 0)
        if need > max(rooms)[0]:
            return (
                f"{name_of(block)} needs {size_of(need)}; {max(rooms)[1]}, the roomiest device that it may be on, has "
                f"{size_of(max(rooms)[0])}: profile more micro-batches, or use a larger device"
            )
    static = sum(block.static_bytes for block in problem.blocks)
    caps = ", ".join(f"{name} {size_of(cap)}" for name, cap in zip(problem.devices, problem.caps, strict=True))
    count = held_at_once(problem)
    held = "" if count == 1 else f", with {count} micro-batches held at once"
    links = f"; corrupt links are not used ({links_in_words(problem)})" if problem.unusable else ""
    return (
        f"no free assignment fits{held}: weights, gradients and optimizer state alone take {size_of(static)}; the "
        f"devices have {caps}{links}: raise --memory, add devices, or profile smaller micro-batches"
    )


@dataclass(frozen=True)
class _Alone:
    """One device alone."""

    device: str | None = None
    microbatches: int = 1
    step_s: float | None = None


def _baseline(profile: Profile, found: _Found, every: Sequence[Problem]) -> _Alone:
    """The fastest single device: of one input under latency, else of a step."""
    if found.schedule is None:
        option = baseline_of(every, profile)
        return _Alone(option.problem.devices[0], option.problem.microbatches, option.step_s) if option else _Alone()
    problem = unpinned(found.problem)
    race, order = Race(problem), range(len(problem.blocks))
    ends = [
        (race.schedule([d] * len(order), race.forward.order, race.backward.order).value_s, d)
        for d in range(len(problem.devices))
        if race.may([d] * len(order))
    ]
    step_s, device = min(ends, default=(None, 0))
    return _Alone() if step_s is None else _Alone(problem.devices[device], found.microbatches, step_s)


class _Writer:
    """The records of a free assignment; the devices used count as stages, in the order of their first blocks."""

    def __init__(self, profile: Profile, found: _Found) -> None:
        self.profile, self.found, self.problem = profile, found, found.problem
        of = found.assignment.of
        self.masks = masks_of(of, len(self.problem.devices))
        self.used = list(dict.fromkeys(of))
        self.loads = loads_of(self.problem, of)

    def plan(self, objective: Objective, alone: _Alone) -> Plan:
        """The whole record; ``alone`` is the one device that it is held against."""
        profile, problem, found = self.profile, self.problem, self.found
        value_s = found.assignment.value
        # Under latency the problem is of one input, which is one of the profile's micro-batches.
        busy_s = [stage.load_s for stage in self._stages()]
        whole_s = value_s * len(self.used)
        proven = found.assignment.exact and (found.share is None or found.share.exact)
        return Plan(
            model=profile.model,
            structure=profile.structure,
            inputs=profile.inputs,
            batch=profile.batch,
            train=profile.train,
            optimizer=profile.optimizer,
            profiled_devices=tuple(device.name for device in profile.devices),
            declared_devices=tuple(device.name for device in profile.devices if device.declared),
            objective=objective,
            contiguous=False,
            transfers=problem.transfers,
            overlap=True if found.schedule else problem.overlap,
            schedule=problem.schedule,
            microbatches=found.microbatches,
            stages=self._stages(),
            nodes=self._nodes(),
            ties=self._ties(),
            obstacles=profile.obstacles,
            guards=profile.guards,
            certificate=self._certificate(),
            peak=None if found.share is None else self._peak(found.share),
            timeline=self._timeline(),
            advice="" if proven or has_ortools() else f"OR-tools would search further: {EXTRA}",
            predicted=Prediction(
                step_s=value_s,
                bubble=max(0.0, 1 - sum(busy_s) / whole_s) if whole_s else 0.0,
                baseline_device=alone.device,
                baseline_microbatches=alone.microbatches,
                baseline_s=alone.step_s,
                speedup=None if alone.step_s is None else alone.step_s / value_s if value_s else 1.0,
            ),
            candidates=(),
        )

    def _stages(self) -> tuple[Stage, ...]:
        problem, found, profile = self.problem, self.found, self.profile
        traffic = traffic_by_device(problem, found.assignment.of)
        params = {node.name: node.param_bytes for node in profile.nodes}
        stages = []
        for index, d in enumerate(self.used):
            blocks = [problem.blocks[v] for v in bits(self.masks[d])]
            names = {name for block in blocks for name in block.nodes}
            update_s, tie_s = sum(b.update_s[d] for b in blocks), problem.ties_s(self.masks[d], d)
            forward_s, backward_s = sum(b.forward_s[d] for b in blocks), sum(b.backward_s[d] for b in blocks)
            whole = len(self.used) == 1 and problem.schedule == "1f1b"
            stages.append(
                Stage(
                    index=index,
                    device=problem.devices[d],
                    units=tuple(dict.fromkeys(n.unit for n in profile.nodes if n.kind == "unit" and n.name in names)),
                    forward_s=forward_s,
                    backward_s=backward_s,
                    update_s=update_s,
                    tie_s=tie_s,
                    send_forward_s=traffic[d].forward_out_s,
                    receive_backward_s=traffic[d].backward_in_s,
                    receive_forward_s=traffic[d].forward_in_s,
                    send_backward_s=traffic[d].backward_out_s,
                    load_s=forward_s + backward_s + update_s + tie_s if found.schedule else self.loads[d],
                    param_bytes=sum(params[name] for name in names),
                    memory_bytes=peak_bytes(problem, self.masks[d], d),
                    memory_cap_bytes=problem.caps[d],
                    in_flight=1 if whole or not profile.train else held_at_once(problem),
                    finish_s=found.schedule.done_s[d] if found.schedule else None,
                )
            )
        return tuple(stages)

    def _nodes(self) -> tuple[Placement, ...]:
        producer = {tensor.name: tensor.producer for tensor in self.profile.tensors}
        device_of = {
            name: device
            for block, device in zip(self.problem.blocks, self.found.assignment.of, strict=True)
            for name in block.nodes
        }
        return tuple(
            Placement(
                node=node.name,
                kind=node.kind,
                type=node.type,
                unit=node.unit,
                site=node.site,
                device=self.problem.devices[device_of[node.name]],
                stage=self.used.index(device_of[node.name]),
                inputs=tuple(dict.fromkeys(producer[tensor] for tensor in node.inputs)),
            )
            for node in self.profile.nodes
        )

    def _ties(self) -> tuple[SplitTie, ...]:
        named = {tie.name for tie in self.profile.ties}
        held = {
            tie.name: tuple(index for index, d in enumerate(self.used) if tie.held(self.masks[d]))
            for tie in self.problem.ties
            if tie.name in named
        }
        return tuple(SplitTie(name=name, stages=stages) for name, stages in held.items() if stages)

    def _certificate(self) -> Certificate:
        found = self.found.assignment
        return Certificate(
            value_s=found.value,
            bound_s=found.bound,
            gap_percent=gap_percent(found.value, found.bound),
            exact=found.exact,
            binds=self._binds_latency() if self.found.schedule else self._binds_load(),
        )

    def _binds_load(self) -> str:
        problem, value_s = self.problem, self.found.assignment.value
        if not value_s:
            return "nothing: no unit takes time"
        device = max(self.used, key=self.loads.__getitem__)
        name = problem.devices[device]
        compute = {v: problem.work_s(v, device) for v in bits(self.masks[device])}
        if sum(compute.values()) + problem.ties_s(self.masks[device], device) < value_s / 2:
            return f"the transfers of {name}"
        largest = max(compute, key=compute.__getitem__)
        if compute[largest] > 0.9 * value_s:
            return f"{name_of(problem.blocks[largest])}, which is on {name} and cannot be split"
        if value_s <= 1.02 * bound_s(problem):
            return "the work itself: the devices share it evenly"
        return (
            f"the grain of the units, their transfers and the memory: on {name} the largest is "
            f"{name_of(problem.blocks[largest])} with {compute[largest] / value_s:.0%}"
        )

    def _binds_latency(self) -> str:
        race, value_s = Race(self.problem), self.found.assignment.value
        if not value_s:
            return "nothing: no unit takes time"
        forward, backward, _ = race.least
        way_s = max(race.forward.tails(forward)) + max(race.backward.tails(backward))
        if value_s <= 1.02 * way_s:
            return "the longest way through the graph, each unit where it is fastest"
        work_s = bound_s(self.problem)
        if value_s <= 1.02 * work_s:
            return "the work itself: the devices share it evenly"
        return (
            f"dependences, transfers and the grain of the units: the longest way alone is {way_s / value_s:.0%} of "
            f"this, the work shared out evenly {work_s / value_s:.0%}"
        )

    def _peak(self, share: Assignment) -> PeakShare:
        of = self.found.assignment.of
        return _peak_share(
            self._stages(),
            share.bound,
            exact=share.exact,
            largest=largest_batch(self.problem, self.profile.batch, assignment_fits(of)),
        )

    def _timeline(self) -> tuple[Timed, ...]:
        schedule, problem = self.found.schedule, self.problem
        if schedule is None:
            return ()
        phases: list[tuple[Literal["forward", "backward"], Sequence[tuple[int, float, float]]]] = [
            ("forward", schedule.forward),
            ("backward", schedule.backward if self.profile.train else ()),
        ]
        return tuple(
            Timed(
                device=problem.devices[schedule.of[v]],
                nodes=problem.blocks[v].nodes,
                units=problem.blocks[v].units,
                phase=phase,
                start_s=start_s,
                end_s=end_s,
            )
            for phase, ran in phases
            for v, start_s, end_s in ran
        )


def _peak_share(stages: Sequence[Stage], bound: float, *, exact: bool, largest: int | None) -> PeakShare:
    fullest = max(stages, key=lambda stage: stage.memory_bytes / stage.memory_cap_bytes)
    value = fullest.memory_bytes / fullest.memory_cap_bytes
    return PeakShare(
        value=value,
        bound=value if exact else min(bound, value),
        gap_percent=0.0 if exact else gap_percent(value, bound),
        exact=exact,
        binds=f"{fullest.device}: {size_of(fullest.memory_bytes)} of {size_of(fullest.memory_cap_bytes)}",
        largest_batch=largest,
    )


def least_of(problems: Sequence[Problem], deadline_s: float) -> tuple[Problem, LeastShare] | None:
    """The number of micro-batches and the split with the smallest peak share; None when none fits.

    Under GPipe where 1F1B leaves too few stages to fit.

    Raises:
        ShardwrightError: nothing that fits was found in the time.
    """
    found: list[tuple[Problem, LeastShare]] = []
    unfinished: ShardwrightError | None = None
    for position, problem in enumerate(problems):
        budget = Budget(max(0.0, deadline_s - time.monotonic()) / (len(problems) - position + 1))
        attempts = [problem]
        if problem.most_stages < len(problem.devices):
            attempts.append(dataclasses.replace(problem, schedule="gpipe"))
        for attempt in attempts:
            try:
                share = least_share(attempt, budget)
            except ShardwrightError as error:
                unfinished = error
                continue
            if share is not None:
                found.append((attempt, share))
                break
    if not found and unfinished is not None:
        raise unfinished
    return min(found, key=lambda pair: pair[1].value, default=None)


def for_memory(written: Plan, option: Option, problem: Problem, share: LeastShare) -> Plan:
    """The plan of a split that was found within caps of ``share``, with the caps of ``problem`` and the certificate."""
    caps = dict(zip(problem.devices, problem.caps, strict=True))
    stages = tuple(stage.model_copy(update={"memory_cap_bytes": caps[stage.device]}) for stage in written.stages)
    # A link that no plan may use makes a split worthless that needs it.
    assert math.isfinite(option.split.value_s)
    largest = largest_batch(option.problem, written.batch, stages_fit(option.split.stages, problem.caps))
    peak = _peak_share(stages, share.bound, exact=share.exact, largest=largest)
    return written.model_copy(update={"objective": "memory", "stages": stages, "peak": peak})
