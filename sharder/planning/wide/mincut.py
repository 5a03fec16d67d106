r"""A bound with the transfers that no split avoids, for devices that are alike.

Let all loads be at most T, and I be what comes before the s-th cut of S stages. Then I is predecessor-closed and

    W - (S - s) T  <=  work(I)  <=  s T              W = work of all blocks
    sum of all loads  =  W + 2 * sum over s of X(I)  X(I) = transfer seconds of what crosses the cut behind I

so that T >= (W + 2 * sum of least X) / S. What is staged or direct does not pay for every cut: it costs its sender and
one reader at least, however many cuts are between them, and the largest least X counts in place of the sum. Transfers
beside compute are a sum by themselves: what all send is at most S T, as W is.

Of the first s stages the loads have the transfers over the cuts between them twice, and those over the s-th cut once.
So where transfers are summed with compute, what is known of the other cuts leaves less room for the work before this
one, and likewise behind it,

    work(I)  <=  s T - 2 * sum over earlier cuts of X - X(I)

and with that its least X may be more: cuts are gone through again.

A block is in I for sure if all that may come without it is less work than I has at least, and out of it if what must
come before it is more than I has at most. Between those the least X is a minimum cut: a tensor is cut once, however
many readers are behind it, and an infinite edge from each block back to its predecessors keeps I closed (Picard,
"Maximal closure of a graph and applications to combinatorial problems", Management Science 1976). If that has too much
work, high being the most, then each second of it is given a price p, and

    X(I)  >=  X(I) + p (work(I) - high)  >=  the least of that over all closed sets

which again is a minimum cut, for any p: a Lagrangian relaxation (Geoffrion, "Lagrangean relaxation for integer
programming", Mathematical Programming Study 1974). The best p is found by going along the lower hull of X over work,
from the set with too much and one with too little. With too little work it is the other way round. Ties and memory
only add to loads and are left out.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from shardwright.sharder.planning.exact.transfers import by_block, seconds_of
from shardwright.sharder.planning.problem import Crossing, Problem, bits
from shardwright.sharder.planning.wide.flow import Network

__all__ = ["LeastCuts", "least_transfer_s", "transfer_bound_s"]

Floats = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]

GRAIN = 10**9
"""So many parts of the ceiling a flow is counted in: whole numbers, rounded down, keep the bound a bound."""
ROUNDING = 1e-9
"""Of the work or the ceiling: sums in another order are nearer to each other."""
SWEEPS = 4
"""So often all cuts are gone through at most, each time with what was found of the others."""
WORTH = 1e-6
"""And no more where the last time added no more than this share of the ceiling."""


def transfer_bound_s(problem: Problem, ceiling_s: float, out_of_time: Callable[[], bool] = lambda: False) -> float:
    """What no largest load is below; ``ceiling_s``, some split's largest load, where none is better.

    0 where the devices differ, as the work before a cut then depends on their order. Once it is ``out_of_time`` cuts
    count as what was found of them, and those that are left as free.
    """
    if problem.times_differ or not 0 < ceiling_s < math.inf:
        return 0.0
    work = np.array([seconds[0] for seconds in problem.seconds])
    cuts = LeastCuts(problem, ceiling_s, out_of_time, work)
    bounds = [ceiling_s]
    for stages in range(1, problem.most_stages + 1):
        if cuts.whole_s >= ceiling_s * stages:
            continue
        moved_s = _least_moved_s(problem, cuts, stages)
        bounds.append((max(cuts.whole_s, moved_s) if problem.overlap else cuts.whole_s + moved_s) / stages)
    return min(bounds) * (1 - 1e-12)


def _least_moved_s(problem: Problem, cuts: LeastCuts, stages: int) -> float:
    """Seconds that all transfers between so many stages take at least, infinite where no split is below the ceiling."""
    relayed = problem.transfers == "relayed"
    ends = 1 if problem.overlap else 2  # both ends of a transfer have it in their load, but for one that is beside
    shared = relayed and not problem.overlap
    moved = [0.0] * stages  # over each cut, for all that pay: 2 X where both ends do; the first is none
    for _ in range(SWEEPS if shared else 1):
        before = sum(moved)
        for cut in range(1, stages):
            own, earlier, later = moved[cut], sum(moved[:cut]), sum(moved[cut + 1 :])
            high = cut * cuts.ceiling_s - (earlier + own / 2) * shared
            low = cuts.whole_s - (stages - cut) * cuts.ceiling_s + (later + own / 2) * shared
            moved[cut] = max(own, ends * cuts.least_s(low, high))
        if sum(moved) - before <= WORTH * cuts.ceiling_s or math.isinf(sum(moved)):
            break
    return sum(moved) if relayed else max(moved)


class LeastCuts:
    """The least transfers over a cut, by the work before it.

    Args:
        problem: blocks, devices and links.
        ceiling_s: of loads.
        out_of_time: asked now and then.
        work: of each block.
    """

    def __init__(self, problem: Problem, ceiling_s: float, out_of_time: Callable[[], bool], work: Floats) -> None:
        self.problem, self.ceiling_s, self.out_of_time, self.work = problem, ceiling_s, out_of_time, work
        self.whole_s = float(work.sum())
        self.needed, behind = _work_around(problem, work)
        self.most_without = self.whole_s - behind
        ends = 1 if problem.overlap else 2
        prices = [least_transfer_s(problem, tensor) / ends for tensor in problem.crossings]
        self.price = [price if math.isfinite(price) else 0.0 for price in prices]
        """Of each tensor, for one end of the transfer; none for one that no link takes, which a bound may leave out."""
        self.slack_s = ROUNDING * max(self.whole_s, ceiling_s)
        self.maker, self.readers, _, _ = by_block(problem)

    def least_s(self, low_s: float, high_s: float) -> float:
        """No closed set with work between these has less, for one end; infinite where there is no such set.

        Less than could be said where the time passes.
        """
        inside = self.most_without < low_s - self.slack_s
        outside = self.needed > high_s + self.slack_s
        if low_s > high_s + self.slack_s or (inside & outside).any():
            return math.inf
        if self.out_of_time() or not (inside.any() or outside.any()):  # nothing and all cut nothing
            return 0.0
        least, chosen = self._cut(inside, outside, 0.0)
        if chosen is None or low_s - self.slack_s <= self._work(chosen) <= high_s + self.slack_s:
            return least
        too_much = self._work(chosen) > high_s
        limit_s = high_s if too_much else low_s
        # Two points of the lower hull: one on the side of the limit that is not allowed, and one on the other side.
        near, far = chosen, inside if too_much else ~outside
        while chosen is not None and self._work(near) != self._work(far):
            rate = (self._moved_s(far) - self._moved_s(near)) / (self._work(near) - self._work(far))
            if (rate <= 0) if too_much else (rate >= 0):  # what is near has the least of all already
                break
            reached, chosen = self._cut(inside, outside, rate)
            least = max(least, reached - rate * limit_s)
            on_line_s = self._moved_s(near) + rate * self._work(near)
            if (
                chosen is None
                or self._moved_s(chosen) + rate * self._work(chosen) >= on_line_s - WORTH * self.ceiling_s
            ):
                break
            if (self._work(chosen) > limit_s) == too_much:
                near = chosen
            else:
                far = chosen
        return least

    def _work(self, blocks: Flags) -> float:
        return float(self.work[blocks].sum())

    def _moved_s(self, inside: Flags) -> float:
        """X of a closed set, for one end."""
        crossing = zip(self.price, self.maker, self.readers, strict=True)
        return sum(price for price, maker, readers in crossing if inside[maker] and not inside[readers].all())

    def _cut(self, inside: Flags, outside: Flags, rate: float) -> tuple[float, Flags | None]:
        """The least X + ``rate`` * work of a closed set with some blocks in it for sure, and some not; and such a set.

        Less, and no set, where the time passes.
        """
        count = len(inside)
        first, last = count, count + 1
        node = [first if i else last if o else v for v, (i, o) in enumerate(zip(inside, outside, strict=True))]
        network = Network(count + 2 + len(self.price))
        capacities = [self._in_grains(price) for price in self.price]
        work = [self._in_grains(abs(rate) * float(seconds)) for seconds in self.work]
        unbounded = sum(capacities) + sum(work) + 1
        for v, before in enumerate(self.problem.predecessors):
            for u in bits(before):
                if node[v] != node[u] != first:
                    network.join(node[v], node[u], unbounded)
            if rate > 0 and node[v] != last:
                network.join(node[v], last, work[v])
            elif rate < 0 and node[v] != first:
                network.join(first, node[v], work[v])
        for number, (maker, readers, capacity) in enumerate(zip(self.maker, self.readers, capacities, strict=True)):
            reading = {node[v] for v in readers} - {first}
            if node[maker] == last or not reading or not capacity:
                continue
            network.join(node[maker], count + 2 + number, capacity)
            for reader in reading:
                network.join(count + 2 + number, reader, unbounded)
        flow = network.largest_flow(first, last, self.out_of_time)
        reached = flow / GRAIN * self.ceiling_s + min(rate, 0.0) * self.whole_s
        if self.out_of_time():
            return reached, None
        chosen = np.array(network.reached_from(first)[:count]) | inside
        return reached, chosen & ~outside

    def _in_grains(self, seconds: float) -> int:
        return int(seconds / self.ceiling_s * GRAIN)


def _work_around(problem: Problem, work: Floats) -> tuple[Floats, Floats]:
    """By block: the work of all that comes before it, and of all that comes behind it, its own included in both."""
    before = np.eye(len(work), dtype=bool)
    behind = np.zeros(len(work))
    for v, direct in enumerate(problem.predecessors):
        for u in bits(direct):
            before[v] |= before[u]
        behind[before[v]] += work[v]
    return np.array([work[row].sum() for row in before]), behind


def least_transfer_s(problem: Problem, tensor: Crossing) -> float:
    """Seconds of a step that crossing a cut makes ``tensor`` cost all its ends at least; if overlapped, the senders."""
    forward, backward = tensor.forward_bytes, tensor.backward_bytes
    if problem.transfers == "staged":
        out_s, in_s = (
            min(seconds_of(forward, ways[i]) for ways in problem.ways)
            + min(seconds_of(backward, ways[i]) for ways in problem.ways) * bool(backward)
            for i in range(2)
        )
        return problem.microbatches * (out_s if problem.overlap else out_s + in_s)
    each = (sum(problem.transfer_s([tensor], a, b)) for a, b in problem.unlike_pairs)
    return problem.microbatches * min(each, default=0.0) * (1 if problem.overlap else 2)
