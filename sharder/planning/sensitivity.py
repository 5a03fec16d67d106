"""How a plan and its prediction move within the uncertainty of what was measured.

The profile says of each unit how sure its median is (half of its 95% interval), and of an estimate how far those were
off where they were fitted. Costs are drawn within that, the same for units that share a measurement, and the chosen
split and its rivals are simulated with the same draws. A rival that is faster in a good part of them is as good as the
plan, for all that is known.
"""

from __future__ import annotations

import contextlib
import dataclasses
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from shardwright.errors import ShardwrightError
from shardwright.profiler.profile import Measurement, Profile
from shardwright.sharder.planning.partition import partition, stage_loads
from shardwright.sharder.planning.plan import Replans, Sensitivity
from shardwright.sharder.planning.pricing import Option, rules_of
from shardwright.sharder.planning.problem import Problem, bits
from shardwright.sharder.planning.simulate import steps_at

__all__ = ["replans_of", "sensitivity_of"]

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
    drawn: dict[tuple[object, ...], _Floats] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.generator = np.random.default_rng(0)
        self.deviations = {
            estimate.device: estimate.median_error / MEDIAN_OF_ABSOLUTE
            for estimate in self.profile.estimates
            if estimate.median_error is not None
        }

    def deviation(self, row: Measurement) -> float:
        """Standard deviation of a time, as a part of it; 0 where nothing is known."""
        if row.source == "measured":
            return (row.median_error or 0.0) / WIDTH_OF_95
        return self.deviations.get(row.device, 0.0)

    def of(self, row: Measurement) -> _Floats:
        """The factors of one measurement, by draw."""
        key = (row.device, row.microbatches, row.forward_s, row.backward_s, row.update_s)
        if key not in self.drawn:
            normal = self.generator.standard_normal(DRAWS)
            self.drawn[key] = np.maximum(LEAST_FACTOR, 1 + self.deviation(row) * normal)
        return self.drawn[key]

    def of_nodes(self, nodes: Sequence[str], device: str, microbatches: int) -> _Floats:
        """The factors of a piece of several nodes, weighed by their times."""
        whole, changed = 0.0, np.zeros(DRAWS)
        for node in nodes:
            row = self.profile.measurement(node, device, microbatches)
            if row is not None:
                seconds = microbatches * (row.forward_s + row.backward_s) + row.update_s
                whole += seconds
                changed += seconds * self.of(row)
        return changed / whole if whole else np.ones(DRAWS)

    def known(self) -> bool:
        """Whether the profile says anything of how sure its times are."""
        return any(self.deviation(row) for row in self.profile.measurements)


def sensitivity_of(
    chosen: Option, rivals: Sequence[tuple[str, Option]], profile: Profile, *, replans: int, deadline_s: float
) -> Sensitivity | None:
    """How the step of ``chosen`` moves, and how it stands to its nearest rival; None where nothing is known.

    Args:
        chosen: the option that was chosen.
        rivals: the others, each with its name.
        profile: with the uncertainty of its times.
        replans: how many of the draws are planned anew.
        deadline_s: of ``time.monotonic()``, for planning anew.
    """
    draws = _Draws(profile)
    if not draws.known():
        return None
    own = _steps(chosen, draws, profile)
    deciles = statistics.quantiles(own.tolist(), n=20)
    share, rival, step_s = min(
        ((float(np.mean(own <= _steps(option, draws, profile))), name, option.step_s) for name, option in rivals),
        default=(1.0, "", 0.0),
    )
    return Sensitivity(
        draws=DRAWS,
        step_low_s=deciles[0],
        step_high_s=deciles[-1],
        rival=rival,
        rival_step_s=step_s,
        faster_share=share,
        replans=replans_of(chosen, draws, replans, deadline_s) if replans else None,
    )


def _steps(option: Option, draws: _Draws, profile: Profile) -> _Floats:
    """The median step at each draw."""
    problem = option.problem
    factors = []
    for device, members in option.split.stages:
        nodes = [node for v in bits(members) for node in problem.blocks[v].nodes]
        factors.append(draws.of_nodes(nodes, problem.devices[device], problem.microbatches))
    rules = rules_of(problem, train=profile.train)
    steps = steps_at(option.costs, np.array(factors).T, problem.microbatches, **rules)
    # What unsteady devices add to the step of the median times is taken as in proportion.
    scale = option.step_s / option.timeline.step_s if option.timeline.step_s else 1.0
    return np.array(steps) * scale


def replans_of(chosen: Option, draws: _Draws, count: int, deadline_s: float) -> Replans:
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
            split = partition(drawn, time_limit_s=max(0.0, deadline_s - time.monotonic()) / (count - draw))
        loads = stage_loads(drawn, chosen.split.stages)
        if split is None or loads is None:
            continue
        planned += 1
        lost = max(0.0, 1 - split.value_s / max(loads)) if max(loads) else 0.0
        others += lost > NOTICEABLE
        most = max(most, lost)
    return Replans(planned=planned, others=others, most_lost_percent=100 * most)


def _drawn(problem: Problem, draws: _Draws, draw: int) -> Problem:
    """The problem with the costs of one draw."""
    blocks = []
    for block in problem.blocks:
        factors = [draws.of_nodes(block.nodes, name, problem.microbatches)[draw] for name in problem.devices]
        blocks.append(
            dataclasses.replace(
                block,
                forward_s=tuple(float(s * f) for s, f in zip(block.forward_s, factors, strict=True)),
                backward_s=tuple(float(s * f) for s, f in zip(block.backward_s, factors, strict=True)),
                update_s=tuple(float(s * f) for s, f in zip(block.update_s, factors, strict=True)),
            )
        )
    return dataclasses.replace(problem, blocks=tuple(blocks))
