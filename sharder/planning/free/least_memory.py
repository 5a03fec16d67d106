"""The smallest peak share: of all splits or assignments that fit, one whose fullest device is least full.

    least over splits of   the largest over devices of   memory(d) / cap(d)

Contiguous, a split with no larger share than s is a split that fits caps of s times their size: without times the exact
search of partition.py says at once whether there is one. The share is bisected until it is known to WITHIN; then a
last question, caps just below what was found, either proves it or finds a smaller one. Free, branch and bound decides
a few blocks by their static bytes, CP-SAT more by linear lower bounds of the peaks, which are weighed exactly and cut
off where they were too low (cpsat.py).
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from shardwright.errors import ShardwrightError
from shardwright.sharder.planning.clock import Budget, pass_second
from shardwright.sharder.planning.exact.search import ROUNDING, Stages
from shardwright.sharder.planning.formulation.relaxed import timeless
from shardwright.sharder.planning.free.assign import NOTHING_FOUND
from shardwright.sharder.planning.free.assignment import (
    NOWHERE,
    Assignment,
    Best,
    classes_of,
    held_at_once,
    loads_of,
    masks_of,
    peak_bytes,
)
from shardwright.sharder.planning.free.cpsat import RESOLUTION, Shares
from shardwright.sharder.planning.partition import Partition, partition
from shardwright.sharder.planning.problem import Problem, bits
from shardwright.sharder.planning.solver import has_ortools, run_solver

__all__ = [
    "Larger",
    "LeastShare",
    "fullest",
    "larger_batch",
    "largest_batch",
    "least_share",
    "least_share_freely",
    "share_of",
    "within_share",
]

WITHIN = 1e-3
"""How near the smallest share is found before the last question."""
MOST_MICROBATCHES = 2**16
"""More of them are not tried: any batch fits."""
QUICK_S = 3.0
SMALL = 10


@dataclass(frozen=True)
class LeastShare:
    """A split whose fullest device has the share ``value`` of its cap; no split has less than ``bound``."""

    stages: Stages
    value: float
    bound: float
    exact: bool


def within_share(problem: Problem, share: float) -> Problem:
    """Caps of so large a share of their own, and of a byte at least: units without bytes fit there, too."""
    caps = tuple(max(1, math.floor(cap * share * (1 + ROUNDING))) for cap in problem.caps)
    return dataclasses.replace(problem, caps=caps)


def share_of(problem: Problem, stages: Sequence[tuple[int, int]]) -> float:
    """The largest peak over cap of the stages of a split, computed anew where that may be and is less."""
    closed, most = 0, 0.0
    for position, (device, members) in enumerate(stages):
        at = closed, closed | members, device, len(stages) - 1 - position
        size = problem.memory_bytes(*at)
        if problem.recompute == "auto":
            size = min(size, problem.memory_bytes(*at, recomputed=True))
        most = max(most, size / problem.caps[device])
        closed |= members
    return most


def _simple_bound(problem: Problem) -> float:
    """All that stays over all there is, and each block where it takes the smallest share."""
    static = sum(block.static_bytes for block in problem.blocks)
    return max(
        static / sum(problem.caps),
        *(
            min(
                (problem.least_bytes(v, d) / problem.caps[d] for d, ok in enumerate(block.allowed) if ok),
                default=math.inf,
            )
            for v, block in enumerate(problem.blocks)
        ),
    )


def least_share(problem: Problem, budget: Budget) -> LeastShare | None:
    """The split with the smallest peak share; None when none fits.

    Raises:
        ShardwrightError: none that fits was found in the time.
    """
    without_times = timeless(problem)
    first = partition(without_times, time_limit_s=budget.left_s)
    if first is None:
        return None
    stages = first.stages
    low, high = min(_simple_bound(problem), share_of(problem, stages)), share_of(problem, stages)

    def ask(caps: Problem) -> Partition | None:
        return partition(caps, time_limit_s=budget.left_s / 4)

    exact = False
    with contextlib.suppress(ShardwrightError, KeyboardInterrupt):  # what is known so far is honest
        while not budget.spent() and low < high:
            last = high <= low * (1 + WITHIN)
            middle = (low + high) / 2
            # Just below: every cap has to be smaller than the fullest device needs.
            below = tuple(math.ceil(cap * high * (1 - ROUNDING)) - 1 for cap in problem.caps)
            asked = dataclasses.replace(without_times, caps=below) if last else within_share(without_times, middle)
            found = ask(asked)
            if found is not None:
                stages = found.stages
                high = share_of(problem, stages)
            elif last:
                exact = True
                break
            else:
                low = middle
    exact = exact or low >= high
    return LeastShare(stages, high, high if exact else min(low, high), exact)


def fullest(problem: Problem, of: Sequence[int]) -> float:
    """The largest peak over cap of an assignment; infinite where it uses a link that is not to be used."""
    if any(map(math.isinf, loads_of(problem, of))):
        return math.inf
    masks = masks_of(of, len(problem.devices))
    return max(peak_bytes(problem, mask, d) / problem.caps[d] for d, mask in enumerate(masks))


def least_share_freely(problem: Problem, budget: Budget, seeds: Sequence[Sequence[int]] = ()) -> Assignment | None:
    """The free assignment with the smallest peak share; None when none fits.

    Raises:
        ShardwrightError: none that fits was found in the time.
    """
    bound = _simple_bound(dataclasses.replace(problem, microbatches=1))
    best = Best(problem, bound, price=fullest)
    if math.isinf(bound):
        return None
    try:
        for of in (*seeds, *([d] * len(problem.blocks) for d in range(len(problem.devices))), *_listed(problem)):
            best.offer(of)
        _improved(best, budget)
        if len(problem.blocks) <= SMALL or not has_ortools():
            _branch_and_bound(best, Budget(min(budget.left_s, QUICK_S)) if has_ortools() else budget)
        if has_ortools():
            _improve_by_cpsat(best, budget)
    except KeyboardInterrupt:
        pass_second()
        budget.stop()
    if not best.of and not best.closed:
        raise ShardwrightError(NOTHING_FOUND)
    return best.result()


def _listed(problem: Problem) -> Sequence[list[int]]:
    """Block by block, in the order of the forward and largest first, to where the share stays smallest."""
    blocks = range(len(problem.blocks))
    found = []
    for order in (list(blocks), sorted(blocks, key=lambda v: -problem.blocks[v].static_bytes)):
        held, of = [0] * len(problem.devices), [NOWHERE] * len(problem.blocks)
        for v in order:
            allowed = [d for d, ok in enumerate(problem.blocks[v].allowed) if ok]
            of[v] = min(allowed, key=lambda d, v=v: peak_bytes(problem, held[d] | 1 << v, d) / problem.caps[d])  # type: ignore[misc]
            held[of[v]] |= 1 << v
        found.append(of)
    return found


def _improved(best: Best, budget: Budget) -> None:
    """Move single blocks while that helps."""
    helped = bool(best.of)
    while helped and not best.proven:
        helped = False
        for v, block in enumerate(best.problem.blocks):
            for device, allowed in enumerate(block.allowed):
                if allowed and best.of[v] != device:
                    helped |= best.offer([*best.of[:v], device, *best.of[v + 1 :]])
            if budget.spent():
                return


def _branch_and_bound(best: Best, budget: Budget) -> None:
    """Every assignment whose static bytes alone allow it to be better."""
    problem = best.problem
    order = sorted(range(len(problem.blocks)), key=lambda v: -problem.blocks[v].static_bytes)
    of, held, static = [NOWHERE] * len(order), [0] * len(problem.devices), [0] * len(problem.devices)
    alike = classes_of(problem)

    def descend(position: int) -> bool:
        if position == len(order):
            best.offer(of)
            return True
        if budget.spent():
            return False
        v, empty = order[position], set()
        for device, allowed in enumerate(problem.blocks[v].allowed):
            first = bool(held[device]) or alike[device] not in empty
            if not held[device]:
                empty.add(alike[device])
            size = static[device] + problem.blocks[v].static_bytes
            least = size / problem.caps[device]
            if not allowed or not first or least > 1 or least >= best.value * (1 - ROUNDING):
                continue
            of[v], static[device] = device, size
            held[device] |= 1 << v
            done = descend(position + 1)
            held[device] ^= 1 << v
            of[v], static[device] = NOWHERE, size - problem.blocks[v].static_bytes
            if not done:
                return False
        return True

    if not best.proven and descend(0):
        best.closed = True


class _Fullest(Shares):
    """The model whose objective is the linear lower bound of the largest share."""

    def __init__(self, best: Best) -> None:
        super().__init__(best.problem, best.of)
        self.scale = RESOLUTION / (best.value if best.of and best.value > 0 else 1.0)
        self.most = self.model.new_int_var(0, 2**60, "")
        for device in self.devices:
            for terms in self.memory(device):
                units = [(math.floor(c * self.scale / self.problem.caps[device]), x) for c, x in terms]
                self.model.add(self.most >= sum(c * x for c, x in units if c))
            for sums in self.seconds(device):
                for seconds, variable in sums:
                    if math.isinf(seconds) and not isinstance(variable, int):
                        self.model.add(variable == 0)
        self.model.minimize(self.most)

    def raise_to(self, share: float, members: int, device: int) -> None:
        """The share of exactly these blocks on ``device`` is so large."""
        self.at_least(self.most, math.floor(share * self.scale), members, device)


def _improve_by_cpsat(best: Best, budget: Budget) -> None:
    """Improve ``best``, which is changed, and its bound, within the time."""
    problem = best.problem
    if best.proven or budget.spent():
        return
    model = _Fullest(best)
    if problem.schedule == "1f1b" and held_at_once(problem) > 1:
        model.whole_apart()
    while not budget.spent() and not best.proven:
        last: list[list[int]] = []

        def found(value: Callable[[Any], int], last: list[list[int]] = last) -> None:
            last[:] = [model.where(value)]
            best.offer(last[0])

        answer = run_solver(model.model, budget, found)
        if answer is None:
            best.closed = True
            return
        bound = answer[1] / model.scale * (1 - ROUNDING)
        best.bound = max(best.bound, min(best.value, bound))
        if not answer[0] or not last or (best.result() is not None and best.result().exact):  # type: ignore[union-attr]
            return
        masks = masks_of(last[0], len(problem.devices))
        shares = [peak_bytes(problem, mask, d) / problem.caps[d] for d, mask in enumerate(masks)]
        for device, (mask, share) in enumerate(zip(masks, shares, strict=True)):
            if share > 1:
                model.forbid(mask, device)
            elif share > bound:
                model.raise_to(share, mask, device)


def largest_batch(problem: Problem, batch: int, fits_at: Callable[[Problem], bool]) -> int | None:
    """Samples that fit in micro-batches of the same size, by the same split; None where any number does.

    What a micro-batch takes is as profiled, so that nothing is estimated: the number of micro-batches is what grows.

    Args:
        problem: at the profiled number of micro-batches of ``batch`` samples.
        batch: samples of a step.
        fits_at: whether the split fits the problem with another number.
    """
    low, high = problem.microbatches, 2 * problem.microbatches

    def fits(count: int) -> bool:
        return fits_at(dataclasses.replace(problem, microbatches=count))

    while fits(high):
        if high >= MOST_MICROBATCHES:
            return None
        low, high = high, min(2 * high, MOST_MICROBATCHES)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return batch * low // problem.microbatches


class Larger(NamedTuple):
    """Another split that holds a larger batch."""

    batch: int | None
    """Samples; None where any number fits."""
    stages: Stages
    proven: bool
    """Whether no split holds more."""


def larger_batch(problem: Problem, batch: int, largest: int | None, budget: Budget) -> Larger | None:
    """The largest batch that any split was found to hold, where that is more than ``largest``.

    Args:
        problem: at the profiled number of micro-batches of ``batch`` samples.
        batch: samples of a step.
        largest: samples that the split that is known holds; None where any number.
        budget: the time.
    """
    if largest is None:
        return None
    untimed, unsure = timeless(problem), False
    best: Stages = ()

    def fits(count: int) -> bool:
        nonlocal best, unsure
        try:
            found = partition(dataclasses.replace(untimed, microbatches=count), time_limit_s=budget.left_s / 4)
        except ShardwrightError:  # the time was too short to tell
            unsure = True
            return False
        best = found.stages if found else best
        return found is not None

    low = largest * problem.microbatches // batch
    high = low + 1
    # With fewer micro-batches than devices 1F1B has as few stages: with more of them more stages may hold it.
    if high < len(problem.devices) and not fits(high) and not budget.spent() and fits(len(problem.devices)):
        low = len(problem.devices)
        high = low + 1
    while not budget.spent() and fits(high):
        if high >= MOST_MICROBATCHES:
            return Larger(None, best, proven=True)
        low, high = high, min(2 * high, MOST_MICROBATCHES)
    while not budget.spent() and high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    proven = not unsure and high - low == 1 and high >= len(problem.devices)
    return Larger(batch * low // problem.microbatches, best, proven) if best else None


def stages_fit(stages: Stages, caps: Sequence[int]) -> Callable[[Problem], bool]:
    """Whether the stages of a split fit ``caps``, for :func:`largest_batch`."""

    def check(problem: Problem) -> bool:
        return share_of(dataclasses.replace(problem, caps=tuple(caps)), stages) <= 1

    return check


def assignment_fits(of: Sequence[int]) -> Callable[[Problem], bool]:
    """Likewise for a free assignment."""

    def check(problem: Problem) -> bool:
        masks = masks_of(of, len(problem.devices))
        return all(peak_bytes(problem, m, d) <= problem.caps[d] for d, m in enumerate(masks) if any(bits(m)))

    return check
