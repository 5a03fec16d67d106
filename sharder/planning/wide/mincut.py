r"""A bound with the transfers that no split avoids, for devices that are alike.

Let all loads be at most T, and I be what comes before the s-th cut of S stages. Then I is predecessor-closed and

    W - (S - s) T  <=  work(I)  <=  s T              W = work of all blocks
    sum of all loads  =  W + 2 * sum over s of X(I)  X(I) = transfer seconds of what crosses the cut behind I

so that T >= (W + 2 * sum of least X) / S. What is staged or direct does not pay for every cut: it costs its sender and
one reader at least, however many cuts are between them, and the largest least X counts in place of the sum. Transfers
beside compute are a sum by themselves: what all send is at most S T, as W is.

A block is in I for sure if all that may come without it is less work than
I has at least, and out of it if what must come before it is more than I has at most. Between those the least X is a
minimum cut: a tensor is cut once, however many readers are behind it, and an infinite edge from each block back to its
predecessors keeps I closed (Picard, "Maximal closure of a graph and applications to combinatorial problems",
Management Science 1976). Ties and memory only add to loads and are left out.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from shardwright.sharder.planning.exact.transfers import seconds_of
from shardwright.sharder.planning.problem import Crossing, Problem, bits
from shardwright.sharder.planning.wide.flow import Network

__all__ = ["least_transfer_s", "transfer_bound_s"]

GRAIN = 10**9
"""So many parts of the ceiling a flow is counted in: whole numbers, rounded down, keep the bound a bound."""


def transfer_bound_s(problem: Problem, ceiling_s: float, out_of_time: Callable[[], bool] = lambda: False) -> float:
    """What no largest load is below; ``ceiling_s``, some split's largest load, where none is better.

    0 where the devices differ, as the work before a cut then depends on their order. Once it is ``out_of_time`` cuts
    count as what was found of them, and those that are left as free.
    """
    if problem.times_differ or not 0 < ceiling_s < math.inf:
        return 0.0
    work = np.array([seconds[0] for seconds in problem.seconds])
    needed, behind = _work_around(problem, work)
    most_without = work.sum() - behind
    price = [least_transfer_s(problem, tensor) for tensor in problem.crossings]
    together: Callable[[list[float]], float] = sum if problem.transfers == "relayed" else max
    bounds = [ceiling_s]
    for stages in range(1, problem.most_stages + 1):
        whole = float(work.sum())
        if whole >= ceiling_s * stages:
            continue
        moved = [0.0]
        for cut in range(1, stages):
            inside = most_without < (work.sum() - (stages - cut) * ceiling_s) * (1 - 1e-9)
            outside = needed > cut * ceiling_s * (1 + 1e-9)
            moved.append(_least_cut_s(problem, price, inside, outside, ceiling_s, out_of_time))
        moved_s = together(moved)
        bounds.append((max(whole, moved_s) if problem.overlap else whole + moved_s) / stages)
    return min(bounds) * (1 - 1e-12)


def _work_around(
    problem: Problem, work: npt.NDArray[np.float64]
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
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


def _least_cut_s(
    problem: Problem,
    price: list[float],
    inside: npt.NDArray[np.bool_],
    outside: npt.NDArray[np.bool_],
    ceiling_s: float,
    out_of_time: Callable[[], bool],
) -> float:
    """The least transfer seconds of a cut with some blocks before it for sure, and some behind it; or less, in time."""
    if not inside.any() or not outside.any() or out_of_time():
        return 0.0
    count = len(inside)
    node = [count if i else count + 1 if o else v for v, (i, o) in enumerate(zip(inside, outside, strict=True))]
    network = Network(count + 2 + len(problem.crossings))
    capacities = [int(s / ceiling_s * GRAIN) if math.isfinite(s) else 0 for s in price]
    unbounded = sum(capacities) + 1
    for v, before in enumerate(problem.predecessors):
        for u in bits(before):
            if node[v] != node[u] != count:
                network.join(node[v], node[u], unbounded)
    for number, (tensor, capacity) in enumerate(zip(problem.crossings, capacities, strict=True)):
        readers = {node[v] for v in bits(tensor.readers)} - {count}
        if node[tensor.producer] == count + 1 or not readers or not capacity:
            continue
        network.join(node[tensor.producer], count + 2 + number, capacity)
        for reader in readers:
            network.join(count + 2 + number, reader, unbounded)
    return network.largest_flow(count, count + 1, out_of_time) / GRAIN * ceiling_s
