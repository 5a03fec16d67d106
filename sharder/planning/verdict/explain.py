"""Explanations: how good a plan is, and what stands in the way of a better one."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator

from shardwright.errors import ShardwrightError
from shardwright.sharder.planning.clock import clock_s
from shardwright.sharder.planning.exact.search import simple_bound_s
from shardwright.sharder.planning.formulation.relaxed import all_usable, without_sums
from shardwright.sharder.planning.formulation.words import links_in_words, name_of
from shardwright.sharder.planning.partition import Partition, partition
from shardwright.sharder.planning.plan import WORTHWHILE, Certificate
from shardwright.sharder.planning.pricing import Option
from shardwright.sharder.planning.problem import Problem, bits
from shardwright.sharder.planning.schedules.interleave import device_loads
from shardwright.sharder.planning.schedules.stage_costs import shares_of
from shardwright.sharder.planning.schedules.step_bound import step_bound_s
from shardwright.sharder.planning.schedules.step_search import SHORTER
from shardwright.sharder.planning.wide.ceilings import NEAR

__all__ = ["certify", "gap_percent", "what_binds"]


def gap_percent(value: float, bound: float) -> float:
    """How far ``value`` can be above the best, in percent of the proven ``bound``."""
    return max(0.0, 100.0 * (value / bound - 1.0)) if bound else 0.0


def certify(chosen: Option, options: list[Option], baseline: Option | None, deadline_s: float) -> Certificate:
    """Value, bound, gap and what binds."""
    split = chosen.split
    if chosen is baseline:
        # The bound is over the splits as well: one device was preferred to them for its step, not for its load.
        same = [option for option in options if option.problem.batch_microbatches == chosen.problem.microbatches]
        bound_s = min([split.value_s, *(option.split.bound_s for option in same)]) if same else 0.0
        fastest = min(options, key=lambda option: option.step_s)
        barred = [option for option in options if option.problem.unusable]
        return Certificate(
            value_s=split.value_s,
            bound_s=bound_s,
            gap_percent=gap_percent(split.value_s, bound_s),
            exact=bound_s == split.value_s,
            binds=(
                what_binds(max(barred, key=lambda option: option.problem.microbatches), deadline_s)
                if barred
                else f"filling and draining: a step of the best split takes {fastest.step_s / split.value_s:.2f}x this"
                if fastest.step_s > split.value_s > fastest.split.value_s * WORTHWHILE
                else "in the best split " * (len(fastest.split.stages) > 1 or bool(fastest.problem.replicas))
                + what_binds(fastest.of_least_load, deadline_s)
            ),
        )
    return Certificate(
        value_s=split.value_s,
        bound_s=split.bound_s,
        gap_percent=gap_percent(split.value_s, split.bound_s),
        exact=split.exact,
        binds="in the split with the least largest load: " * bool(chosen.least)
        + what_binds(chosen.of_least_load, deadline_s),
        least_s=chosen.least.split.value_s if chosen.least else None,
        least_step_s=chosen.least.step_s if chosen.least else None,
        step_gap_percent=_step_gap_percent(chosen),
    )


def _step_gap_percent(chosen: Option) -> float | None:
    """How far the step of ``chosen`` can be above the shortest, if anything is proven of that."""
    problem = chosen.problem
    if chosen.proven_step_s is not None:
        gap = gap_percent(chosen.timeline.step_s, chosen.proven_step_s)
        return gap if gap > 100 * SHORTER else 0.0
    if len(chosen.split.stages) == 1 or problem.stages_per_device > 1 or chosen.tiers or chosen.narrowed:
        return None
    if any(replica.seconds != problem.replicas[0].seconds for replica in problem.replicas):
        return None  # the bound is of what the slowest of them takes
    bound_s = step_bound_s(problem)
    if bound_s is None:
        return None
    if problem.schedule != "zero-bubble":  # whose steps have the parts of backwards, and its loads the whole
        bound_s = max(bound_s, chosen.split.bound_s)
    return gap_percent(chosen.timeline.step_s, bound_s)


def what_binds(chosen: Option, deadline_s: float) -> str:
    """The part of the largest load, or the cap, that keeps it from being smaller."""
    problem, split, loads = chosen.problem, chosen.split, chosen.loads
    for what, relaxed, enough in _relaxations(chosen.resident or problem):  # without caps nothing is brought
        if simple_bound_s(relaxed) >= enough * split.value_s:
            continue  # no split of it is so much better
        free = None
        with contextlib.suppress(ShardwrightError):  # no time is left to find a split of the relaxed problem
            free = partition(relaxed, time_limit_s=max(0.0, min(5.0, deadline_s - clock_s())))
        if free is not None and _is_known(free) and free.value_s < enough * split.value_s:
            return f"{what}: without them the largest load would be {free.value_s / split.value_s:.0%} of this"
    if not max(loads):
        return "nothing: no unit takes time"
    return _of_interleaved(problem, split) if problem.stages_per_device > 1 else _of_stages(chosen)


def _is_known(split: Partition) -> bool:
    """Whether its largest load is the least there is, or as near to it as is looked for."""
    return split.exact or split.value_s - split.bound_s <= NEAR * split.value_s


def _of_stages(chosen: Option) -> str:
    """What is most of the largest load."""
    problem, split, loads = chosen.problem, chosen.split, chosen.loads
    index = max(range(len(loads)), key=loads.__getitem__)
    device, members = split.stages[index]
    stage = f"stage {index} on {problem.devices[device]}"
    compute = {v: problem.work_s(v, device) for v in bits(members)}
    computes_s = sum(compute.values()) + problem.ties_s(members, device) + _anew_s(chosen, index)
    transfers = max(0.0, 1 - computes_s / loads[index])
    if problem.overlap and transfers > 1e-9:
        transfers = 1.0  # sends or receives are all of the load, and compute is beside them
    if transfers > 0.5:
        return f"the links of {stage}: transfers are {transfers:.0%} of its load"
    largest = max(compute, key=compute.__getitem__)
    block = problem.blocks[largest]
    share = compute[largest] / loads[index]
    name = name_of(block)
    if share > 0.9 * (1 - transfers):
        return f"{name}, which is {stage} alone and cannot be split"
    if split.value_s <= 1.02 * simple_bound_s(problem):
        return f"the work itself: {stage} holds an even share of it"
    return f"the grain of the units: {stage} cannot be evened out, its largest is {name} with {share:.0%}"


def _anew_s(chosen: Option, index: int) -> float:
    """Seconds of a step in which a stage of a split computes what it did not keep."""
    stages = chosen.split.stages
    before = sum(members for _, members in stages[:index])
    device, members = stages[index]
    return chosen.problem.more_s(before, before | members, device, len(stages) - 1 - index)


def _of_interleaved(problem: Problem, split: Partition) -> str:
    """What is most of the largest load where devices have several stages each."""
    loads = device_loads(problem, split.stages)
    index = max(range(len(loads)), key=loads.__getitem__)
    device, members = shares_of(split.stages, problem.stages_per_device)[index]
    name, stages = problem.devices[device], f"its {problem.stages_per_device} stages"
    computes_s = sum(problem.work_s(v, device) for v in bits(members)) + problem.ties_s(members, device)
    transfers = max(0.0, 1 - computes_s / loads[index])
    if transfers > 0.5:
        return f"the links of {name}: transfers are {transfers:.0%} of the load of {stages}"
    if split.value_s <= 1.02 * simple_bound_s(problem):
        return f"the work itself: {name} holds an even share of it in {stages}"
    if split.value_s * (1 - transfers) <= 1.02 * simple_bound_s(problem):
        return f"the transfers of {name}: they are {transfers:.0%} of the load of {stages}, the rest is an even share"
    return f"the grain of the units: {name} cannot be evened out with {stages}"


def _relaxations(problem: Problem) -> Iterator[tuple[str, Problem, float]]:
    """What may stand in the way of a smaller load, the problem without it, and the share of the load that tells."""
    whole = problem.memory_bytes(0, (1 << len(problem.blocks)) - 1, 0, len(problem.devices) - 1)
    if whole > min(problem.caps):
        caps = (whole * len(problem.devices),) * len(problem.devices)
        yield "the memory caps", dataclasses.replace(problem, caps=caps), 0.999
    if problem.unusable:
        yield (
            f"the faults of corrupt links, which are not used ({links_in_words(problem)})",
            all_usable(problem),
            0.999,
        )
    if any(any(block.sum_s) for block in problem.blocks):
        yield f"the sums of gradients over {len(problem.replicas)} replicas", without_sums(problem), 0.95
    if problem.ties:
        dearest = max(problem.ties, key=lambda tie: (tie.gradient_bytes, tie.copy_bytes)).name
        more = f" and {len(problem.ties) - 1} more" if len(problem.ties) > 1 else ""
        # Every split of a tied parameter pays something: it is worth naming when that is a good part.
        yield f"the copies of {dearest}{more}", dataclasses.replace(problem, ties=()), 0.95
