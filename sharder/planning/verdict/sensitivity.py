"""How a plan and its prediction move within the uncertainty of what was measured.

The profile says of each unit how sure its median is (half of its 95% interval), and of an estimate how far those were
off where they were fitted. Costs are drawn within that, the same for units that share a measurement, and the chosen
split and its rivals are simulated with the same draws. A rival that is faster in a good part of them is as good as the
plan, for all that is known.

Drawn is what units and glue take to compute, and nothing else. The times of links, with them those in which offloaded
weights come, are the same in every draw, since a profile does not say how sure these are. Rivals are what one may
decide for instead: other numbers of micro-batches, one device, data parallel. The equal splits are none: they are
splits like the plan, with the same costs and no shorter step.
"""

from __future__ import annotations

import contextlib
import dataclasses
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from shardwright.errors import ShardwrightError
from shardwright.profiler.profile import Measurement, Profile
from shardwright.sharder.planning.clock import clock_s
from shardwright.sharder.planning.partition import partition
from shardwright.sharder.planning.plan import Replans, Sensitivity
from shardwright.sharder.planning.pricing import Option
from shardwright.sharder.planning.problem import Problem, Replica, bits
from shardwright.sharder.planning.schedules.replicas import own_factors, slowest_steps
from shardwright.sharder.planning.schedules.simulate import steps_at
from shardwright.sharder.planning.schedules.stage_costs import Rules, Stages, rules_of, shares_of
from shardwright.sharder.planning.split_loads import largest_load_s
from shardwright.sharder.planning.verdict.alternatives import share_of

__all__ = ["rivals_of", "sensitivity_of"]

DRAWS = 101
WIDTH_OF_95 = 1.96
"""Half of a 95% interval, in standard deviations of a normal distribution."""
MEDIAN_OF_ABSOLUTE = 0.6745
"""The median of the absolute value, likewise."""
LEAST_FACTOR = 0.1
"""No draw makes anything faster than this."""

NOTICEABLE = 0.005
"""Another split counts as better when its largest load is smaller by this share."""

_Floats = npt.NDArray[np.float64]


@dataclass
class _Draws:
    """Relative times of nodes, drawn when they are first asked for; equal measurements have the same."""

    profile: Profile
    deviations: Mapping[str, float] = field(init=False)
    """By declared device: the standard deviation of an estimate there."""
    drawn: dict[tuple[float, ...], _Floats] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.generator = np.random.default_rng(0)
        self.deviations = {
            estimate.device: estimate.median_error / MEDIAN_OF_ABSOLUTE
            for estimate in self.profile.estimates
            if estimate.median_error is not None
        }

    def deviation(self, row: Measurement) -> float:
        """Standard deviation of a time, as a part of it; 0 where nothing is known.

        A time that was taken from another device of the same model is as sure as it was there.
        """
        if row.median_error is not None and row.source != "estimated":
            return row.median_error / WIDTH_OF_95
        return 0.0 if row.source == "measured" else self.deviations.get(row.device, 0.0)

    def of(self, row: Measurement) -> _Floats:
        """The factors of one measurement, by draw.

        Units of a kind share one measurement, and so do devices of a model if only one of them was timed; estimates
        from equal figures are off together. All of these have equal times and are equally sure of them, which
        measurements apart never are.
        """
        deviation = self.deviation(row)
        key = (row.microbatches, row.forward_s, row.backward_s, row.update_s, deviation)
        if key not in self.drawn:
            normal = self.generator.standard_normal(DRAWS)
            self.drawn[key] = np.maximum(LEAST_FACTOR, 1 + deviation * normal)
        return self.drawn[key]

    def added_s(self, nodes: Iterable[str], device: str, microbatches: int, *, passes: int) -> _Floats:
        """What ``passes`` micro-batches through ``nodes`` and an update take more than by their medians, by draw."""
        added = np.zeros(DRAWS)
        for node in nodes:
            row = self.profile.measurement(node, device, microbatches)
            if row is not None:
                added += (passes * (row.forward_s + row.backward_s) + row.update_s) * (self.of(row) - 1)
        return added

    def factors(self, problem: Problem, members: int, device: int, replica: Replica | None = None) -> _Floats:
        """By draw: the time of the blocks in ``members`` on ``device``, that of ``replica``, over that by medians."""
        blocks = [*bits(members)]
        row = problem.seconds if replica is None else replica.seconds
        seconds = sum(row[v][device] for v in blocks)
        if not seconds:
            return np.ones(DRAWS)
        nodes = (node for v in blocks for node in problem.blocks[v].nodes)
        name = (problem if replica is None else replica).devices[device]
        return 1 + self.added_s(nodes, name, problem.batch_microbatches, passes=problem.microbatches) / seconds

    def known(self) -> bool:
        """Whether the profile says anything of how sure its times are."""
        return any(self.deviation(row) for row in self.profile.measurements)


def sensitivity_of(
    chosen: Option,
    rivals: Sequence[tuple[str, Option]],
    profile: Profile,
    *,
    parallel: tuple[Problem, float] | None = None,
    replans: int,
    deadline_s: float,
) -> Sensitivity | None:
    """How the step of ``chosen`` moves, and how it stands to its nearest rival; None where nothing is known.

    Args:
        chosen: the option that was chosen.
        rivals: the others, each with its name.
        profile: with the uncertainty of its times.
        parallel: of data parallel, where it is possible, the problem that it is priced at, and the step.
        replans: how many of the draws are planned anew.
        deadline_s: of ``clock_s()``, for planning anew.
    """
    draws = _Draws(profile)
    if not draws.known():
        return None
    own = _steps(chosen, draws, profile)
    twentieths = statistics.quantiles(own.tolist(), n=20)
    others = [(name, option.step_s, _steps(option, draws, profile)) for name, option in rivals]
    if parallel is not None:
        problem, step_s = parallel
        name = f"data parallel over {len(problem.devices)} devices"
        others.append((name, step_s, step_s + _more_in_parallel_s(problem, draws)))
    share, rival, rival_step_s = min(
        ((float(np.mean(own <= steps)), name, step_s) for name, step_s, steps in others),
        default=(1.0, "", 0.0),
    )
    return Sensitivity(
        draws=DRAWS,
        step_low_s=twentieths[0],
        step_high_s=twentieths[-1],
        rival=rival,
        rival_step_s=rival_step_s,
        faster_share=share,
        replans=_replans_of(chosen, draws, replans, deadline_s) if replans else None,
    )


def rivals_of(chosen: Option, options: Sequence[Option], baseline: Option | None) -> list[tuple[str, Option]]:
    """The other options that were weighed, each with a name."""
    rivals = [(_name_of(o), o) for o in options if o is not chosen and len(o.split.stages) > 1]
    if baseline is not None and chosen is not baseline:
        rivals.append((f"{baseline.problem.devices[0]} alone", baseline))
    return rivals


def _name_of(option: Option) -> str:
    """A split that was weighed, in words."""
    problem, stages = option.problem, len(option.split.stages)
    pieces = problem.stages_per_device
    what = "interleaved split" if pieces > 1 else "split"
    what = "zero-bubble split" if problem.schedule == "zero-bubble" else what
    replicas = f"{len(problem.replicas)} replicas of " if problem.replicas else ""
    counted = problem.batch_microbatches
    return f"the best {what} over {replicas}{stages // pieces} devices at {counted} micro-batches"


def _steps(option: Option, draws: _Draws, profile: Profile) -> _Floats:
    """The median step at each draw."""
    problem = option.problem
    shares = shares_of(option.split.stages, problem.stages_per_device)
    rules = rules_of(problem, train=profile.train)
    if problem.replicas:
        steps, median_s = _steps_of_replicas(option, draws, shares, rules)
    else:
        factors = [draws.factors(problem, members, device) for device, members in shares]
        steps = steps_at(option.costs, np.array(factors).T, problem.microbatches, **rules)
        median_s = option.timeline.step_s
    # What unsteady devices add to the step of the median times is taken as in proportion.
    return np.array(steps) * (option.step_s / median_s if median_s else 1.0)


def _steps_of_replicas(option: Option, draws: _Draws, shares: Stages, rules: Rules) -> tuple[list[float], float]:
    """The step of the slowest replica at each draw, and that of the median times."""
    problem = option.problem
    own = np.array(own_factors(problem, shares))[:, None, :]
    drawn = [
        [draws.factors(problem, members, device, replica) for device, members in shares] for replica in problem.replicas
    ]
    steps = slowest_steps(problem, option.costs, own * np.array(drawn).transpose(0, 2, 1), **rules)
    return steps, slowest_steps(problem, option.costs, own, **rules)[0]


def _more_in_parallel_s(problem: Problem, draws: _Draws) -> _Floats:
    """By draw: how much longer than by the medians all wait for the slowest device, each with its share."""
    count = share_of(problem)
    nodes = [node for block in problem.blocks for node in block.nodes]
    devices = range(len(problem.devices))
    medians_s = np.array(
        [sum(count * (b.forward_s[d] + b.backward_s[d]) + b.update_s[d] for b in problem.blocks) for d in devices]
    )
    added_s = [draws.added_s(nodes, problem.devices[d], problem.microbatches, passes=count) for d in devices]
    slowest_s: _Floats = (medians_s[:, None] + np.array(added_s)).max(axis=0)
    return slowest_s - float(medians_s.max())


def _replans_of(chosen: Option, draws: _Draws, count: int, deadline_s: float) -> Replans:
    """Plan with drawn costs: how often another split is better then, and by how much it has the smaller largest load.

    Draws that the time does not allow are left out.
    """
    problem = chosen.problem
    planned = others = 0
    most = 0.0
    for draw in range(min(count, DRAWS)):
        drawn = _drawn(problem, draws, draw)
        split = None
        with contextlib.suppress(ShardwrightError):
            split = partition(drawn, time_limit_s=max(0.0, deadline_s - clock_s()) / (count - draw))
        value_s = largest_load_s(drawn, chosen.of_least_load.split.stages)
        if split is None or value_s is None:
            continue
        planned += 1
        lost = max(0.0, 1 - split.value_s / value_s) if value_s else 0.0
        others += lost > NOTICEABLE
        most = max(most, lost)
    return Replans(planned=planned, others=others, most_lost_percent=100 * most)


def _drawn(problem: Problem, draws: _Draws, draw: int) -> Problem:
    """The problem with the costs of one draw."""
    blocks = []
    for v, block in enumerate(problem.blocks):
        first = problem.replicas[0] if problem.replicas else None
        factors = [float(draws.factors(problem, 1 << v, device, first)[draw]) for device in range(len(problem.devices))]
        blocks.append(
            dataclasses.replace(
                block,
                forward_s=tuple(s * f for s, f in zip(block.forward_s, factors, strict=True)),
                backward_s=tuple(s * f for s, f in zip(block.backward_s, factors, strict=True)),
                update_s=tuple(s * f for s, f in zip(block.update_s, factors, strict=True)),
                recompute_s=tuple(s * f for s, f in zip(block.recompute_s, factors, strict=bool(block.recompute_s))),
                parts_s=tuple((i * f, w * f) for (i, w), f in zip(block.parts_s, factors, strict=bool(block.parts_s))),
            )
        )
    return dataclasses.replace(problem, blocks=tuple(blocks))
