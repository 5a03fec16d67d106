"""The record of a plan that is no chain of stages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from shardwright.profiler.profile import Profile
from shardwright.sharder.planning.formulation.words import name_of, used_of
from shardwright.sharder.planning.free.assignment import (
    Assignment,
    held_at_once,
    loads_of,
    masks_of,
    peak_bytes,
    traffic_by_device,
)
from shardwright.sharder.planning.free.bounds import bound_s
from shardwright.sharder.planning.free.latency import Race, Schedule
from shardwright.sharder.planning.free.least_memory import (
    assignment_fits,
    largest_batch,
)
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
from shardwright.sharder.planning.problem import Problem, bits
from shardwright.sharder.planning.recorded import makers_of_numbers
from shardwright.sharder.planning.solver import EXTRA, has_ortools
from shardwright.sharder.planning.verdict.explain import gap_percent

__all__ = ["Alone", "Found", "Writer", "peak_share"]


@dataclass(frozen=True)
class Found:
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


@dataclass(frozen=True)
class Alone:
    """One device alone."""

    device: str | None = None
    microbatches: int = 1
    step_s: float | None = None


class Writer:
    """The records of a free assignment; the devices used count as stages, in the order of their first blocks."""

    def __init__(self, profile: Profile, found: Found) -> None:
        self.profile, self.found, self.problem = profile, found, found.problem
        of = found.assignment.of
        self.masks = masks_of(of, len(self.problem.devices))
        self.used = list(dict.fromkeys(of))
        self.loads = loads_of(self.problem, of)

    def plan(self, objective: Objective, alone: Alone) -> Plan:
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
            hosts=profile.hosts,
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
            update_s = sum(b.update_s[d] for b in blocks) + problem.copies_s(self.masks[d], d)
            tie_s = problem.tie_sums_s(self.masks[d], d)
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
        numbers = makers_of_numbers(self.profile)
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
                numbers=node.name in numbers,
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
        return peak_share(
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


def peak_share(stages: Sequence[Stage], bound: float, *, exact: bool, largest: int | None) -> PeakShare:
    """The record of the fullest of ``stages``; ``largest`` is the largest batch that fits."""
    fullest = max(stages, key=lambda stage: stage.memory_bytes / stage.memory_cap_bytes)
    value = fullest.memory_bytes / fullest.memory_cap_bytes
    return PeakShare(
        value=value,
        bound=value if exact else min(bound, value),
        gap_percent=0.0 if exact else gap_percent(value, bound),
        exact=exact,
        binds=f"{fullest.device}: {used_of(fullest.memory_bytes, fullest.memory_cap_bytes)}",
        largest_batch=largest,
    )
