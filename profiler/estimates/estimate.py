"""Estimates: the time of a step on a device that is not there, and what measurements teach about it.

The roofline (Williams, Waterman and Patterson, Communications of the ACM 52(4), 2009): an operator takes as long as its
arithmetic or as its bytes, whichever is longer, and each takes a little beside that::

    t = sum over operators of max(flops / (c * peak[dtype]), bytes / (m * bandwidth)) + o

The efficiencies c and m, the shares of the peaks that programs reach, and the time o an operator are fitted to
measurements, where there are any.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from shardwright.errors import ShardwrightError
from shardwright.profiler.estimates.catalogue import Dtype, Rates
from shardwright.profiler.recording.operations import Operation

__all__ = ["ASSUMED", "NOMINAL", "Demand", "Efficiency", "Fit", "demand_of", "fit", "roofline_s"]

_Array = npt.NDArray[np.float64]
_KEYS: dict[str, Dtype] = {
    **{"float64": "float64", "float32": "float32", "float16": "float16", "bfloat16": "bfloat16", "int8": "int8"},
    **{"complex128": "float64", "complex64": "float32", "complex32": "float16", "uint8": "int8"},
    **{f"float8_{kind}": "float8" for kind in ("e4m3fn", "e4m3fnuz", "e5m2", "e5m2fnuz")},
}
_ROUNDS = 20
"""Which operators are bound by what settles after a few."""
_LEAST = 1e-3
"""A prediction so much below the time is no worse than this part of it: weights stay finite."""


@dataclass(frozen=True)
class Efficiency:
    """Shares of the peak rates that are reached, and seconds that each operator takes beside."""

    compute: float
    memory: float
    operation_s: float


ASSUMED = Efficiency(compute=0.6, memory=0.9, operation_s=5e-6)
"""Until something is measured, as on a GPU: of what was tried, near the best for the units of ten models on an H100,
2026-11-28 (docs/accuracy.md). Caches are in it: more of the bandwidth than memory alone gives. The host's time is not,
of which an operator took 27 to 92 us there: networks of small operators wait for it."""

NOMINAL = Rates(
    peak_flops=dict.fromkeys(("float64", "float32", "tf32", "float16", "bfloat16", "float8", "int8"), 1e12),
    memory_bytes_per_s=1e11,
)
"""For a measured device whose peaks are not known: its efficiencies then mean nothing, except in the same place."""


@dataclass(frozen=True)
class Demand:
    """What operators ask for: one entry for each kind of call."""

    flops: _Array
    bytes: _Array
    count: _Array
    """How often it is called."""
    dtypes: tuple[Dtype, ...]
    """What each one's arithmetic is done in."""


def demand_of(operations: Iterable[Operation]) -> Demand:
    """Sum up ``operations``; what a GPU does in tf32 is told by torch's switches for convolutions and products."""
    counts = Counter((_key(operation), operation.flops, operation.bytes) for operation in operations)
    rows = list(counts)
    return Demand(
        flops=np.array([flops for _, flops, _ in rows], float),
        bytes=np.array([moved for _, _, moved in rows], float),
        count=np.array([counts[row] for row in rows], float),
        dtypes=tuple(key for key, _, _ in rows),
    )


def roofline_s(demand: Demand, rates: Rates, efficiency: Efficiency) -> float:
    """Seconds that the operators take.

    Raises:
        ShardwrightError: they compute in a dtype that ``rates`` does not have.
    """
    compute, memory = _at_peak(demand, rates)
    longest = np.maximum(compute / efficiency.compute, memory / efficiency.memory)
    return float(np.sum(demand.count * (longest + efficiency.operation_s)))


def _at_peak(demand: Demand, rates: Rates) -> tuple[_Array, _Array]:
    """Seconds of each entry's arithmetic and of its bytes at the peak rates."""
    peaks = np.array(
        [_peak(rates, key) if flops else 1.0 for key, flops in zip(demand.dtypes, demand.flops, strict=True)]
    )
    return demand.flops / peaks if len(peaks) else demand.flops, demand.bytes / rates.memory_bytes_per_s


def _peak(rates: Rates, key: Dtype) -> float:
    """The rate of a dtype; float32 stands in for tf32 where the device has none."""
    peaks: Mapping[Any, float] = rates.peak_flops
    rate = peaks.get(key) or (peaks.get("float32") if key == "tf32" else None)
    if rate is None:
        raise ShardwrightError(
            f"the model computes in {key}, and a declared device has no rate for it, only {', '.join(peaks)}; give "
            f"peak_flops = {{ {key} = ... }} in the cluster file"
        )
    return rate


def _key(operation: Operation) -> Dtype:
    """The name of the rate that an operator's arithmetic has; of float32 where it has none of its own."""
    key = _KEYS.get(str(operation.dtype).removeprefix("torch."), "float32")
    if key == "float32" and operation.flops:
        by_cudnn = "conv" in operation.name or "rnn" in operation.name
        if torch.backends.cudnn.allow_tf32 if by_cudnn else torch.backends.cuda.matmul.allow_tf32:
            return "tf32"
    return key


# Calibration


@dataclass(frozen=True)
class Fit:
    """What measurements say of a device."""

    efficiency: Efficiency
    median_error: float
    """Of the times that it was fitted to, relative."""
    bound_by: tuple[bool, bool]
    """Whether arithmetic and bytes showed in the times at all; an efficiency that did not is the assumed one."""


def fit(demands: Sequence[Demand], seconds: Sequence[float], rates: Rates) -> Fit:
    """The efficiencies with which the roofline comes nearest to the measured ``seconds``.

    Least squares of the errors relative to the mean of both, so that half the time counts like twice the time (plain
    relative errors would favour times that are too short), and no negative time for anything. For a given choice of
    what binds each operator the roofline is linear; the choice, the weights and the efficiencies are found in turn,
    from several starts.

    Raises:
        ShardwrightError: there is nothing to fit to.
    """
    pairs = [(demand, s) for demand, s in zip(demands, seconds, strict=True) if s > 0 and len(demand.flops)]
    if not pairs:
        raise ShardwrightError("no operator was timed, so nothing can be learned of the device; profile a model")
    times = np.array([s for _, s in pairs])
    table = _Table.of([demand for demand, _ in pairs], rates)
    best = np.zeros(3)
    least = float("inf")
    for ratio in (0.03, 0.3, 1.0, 3.0, 30.0):
        slowness = np.array([ratio, 1.0, 0.0])
        scale = times
        for _ in range(_ROUNDS):
            slowness = _non_negative(table.features(slowness) / scale[:, None], times / scale)
            predicted = table.seconds(slowness)
            scale = np.sqrt(times * np.maximum(predicted, times * _LEAST))
            loss = float(np.sum(((predicted - times) / scale) ** 2))
            if loss < least:
                least, best = loss, slowness
    return Fit(
        efficiency=Efficiency(
            compute=float(1 / best[0]) if best[0] else ASSUMED.compute,
            memory=float(1 / best[1]) if best[1] else ASSUMED.memory,
            operation_s=float(best[2]),
        ),
        median_error=float(np.median(np.abs(table.seconds(best) / times - 1))),
        bound_by=(bool(best[0]), bool(best[1])),
    )


@dataclass(frozen=True)
class _Table:
    """The operators of all steps, one entry each.

    ``slowness`` is what the fit looks for: seconds a second of arithmetic at the peak, of bytes likewise, and seconds
    an operator.
    """

    step: npt.NDArray[np.intp]
    compute: _Array
    """Seconds at the peak rates, of all its calls."""
    memory: _Array
    count: _Array

    @classmethod
    def of(cls, demands: Sequence[Demand], rates: Rates) -> _Table:
        peaks = [_at_peak(demand, rates) for demand in demands]
        count = np.concatenate([demand.count for demand in demands])
        return cls(
            step=np.repeat(np.arange(len(demands)), [len(demand.count) for demand in demands]),
            compute=np.concatenate([compute for compute, _ in peaks]) * count,
            memory=np.concatenate([memory for _, memory in peaks]) * count,
            count=count,
        )

    def features(self, slowness: _Array) -> _Array:
        """By step: seconds at the peaks of what arithmetic binds and of what bytes bind, and how many operators."""
        by_compute = self.compute * slowness[0] > self.memory * slowness[1]
        columns = (self.compute * by_compute, self.memory * ~by_compute, self.count)
        return np.stack([np.bincount(self.step, weights=column) for column in columns], axis=1)

    def seconds(self, slowness: _Array) -> _Array:
        """Of each step, on the roofline."""
        longest = np.maximum(self.compute * slowness[0], self.memory * slowness[1])
        return np.bincount(self.step, weights=longest + self.count * slowness[2]).astype(float)


def _non_negative(design: _Array, target: _Array) -> _Array:
    """The least squares solution of ``design @ x = target`` with no ``x`` below 0, by trying which of them are 0.

    The minimum over a set of free variables is the answer if it is feasible and no other feasible one is lower; with
    three variables there are seven sets.
    """
    best, least = np.zeros(design.shape[1]), float("inf")
    for size in range(1, design.shape[1] + 1):
        for free in itertools.combinations(range(design.shape[1]), size):
            columns = design[:, free]
            found = np.linalg.lstsq(columns, target, rcond=None)[0]
            loss = float(np.sum((columns @ found - target) ** 2))
            if found.min() >= 0 and loss < least:
                least = loss
                best = np.zeros(design.shape[1])
                best[list(free)] = found
    return best
