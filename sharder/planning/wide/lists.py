"""What is asked of a problem with too many closed sets: listed once for all ceilings, and for all who ask."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cached_property

import numpy as np

from shardwright.sharder.planning.formulation.relaxed import in_shares
from shardwright.sharder.planning.problem import Problem
from shardwright.sharder.planning.wide.device_sets import MOST_STATES, DeviceSetSearch, how_many_states
from shardwright.sharder.planning.wide.device_weights import best_weights, weights_by_speed
from shardwright.sharder.planning.wide.listing import Floats, Listing
from shardwright.sharder.planning.wide.little_cut import LittleCut
from shardwright.sharder.planning.wide.measures import Measures, in_proportion
from shardwright.sharder.planning.wide.mincut import least_transfer_s
from shardwright.sharder.planning.wide.windows import ChainSearch, Row

__all__ = ["Lists"]

LEAST = 0.05
"""No weight is less than this share of the one by speed, or loads of that device could not be told from rounding."""


def _listed_with_transfers(problem: Problem) -> bool:
    """Whether the loads by which sets are listed have all transfers in them; else the bounds are on work alone."""
    summed = problem.transfers == "relayed" and not problem.overlap
    return summed or not any(least_transfer_s(problem, tensor) for tensor in problem.crossings)


def _classes(problem: Problem, *, pinned: bool) -> dict[tuple[float, ...], list[int]]:
    """Devices by the seconds of each block, infinite where it may not be if that counts."""
    classes: dict[tuple[float, ...], list[int]] = {}
    for device in range(len(problem.devices)):
        own = zip(problem.seconds, problem.blocks, strict=True)
        times = tuple(s[device] if block.allowed[device] or not pinned else math.inf for s, block in own)
        classes.setdefault(times, []).append(device)
    return classes


class Lists:
    """What is listed of one problem, once for all who ask.

    Args:
        problem: blocks, devices and links.
    """

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.with_transfers = _listed_with_transfers(problem)
        classes = _classes(problem, pinned=True)
        if how_many_states(list(classes.values())) > MOST_STATES:
            classes = _classes(problem, pinned=False)
        self.classes = [*classes.values()]
        """Devices with the same times and, unless these are too many, the same pins."""
        self._times = [*classes]
        self._listing: Listing | None = None
        self._little: LittleCut | None = None

    @property
    def alike(self) -> bool:
        """Whether all devices are."""
        return len(self.classes) == 1

    @property
    def possible(self) -> bool:
        """Whether the devices are alike, or few, and have work."""
        if self.alike:
            return True
        some = all(any(math.isfinite(s) and s for s in times) for times in self._times)
        return some and how_many_states(self.classes) <= MOST_STATES

    @cached_property
    def weights(self) -> list[float]:
        """Of each class; none is next to nothing, as it is the best where another device must have too much."""
        counts = [len(class_) for class_ in self.classes]
        if self.alike:
            return [1.0]
        least = LEAST * np.array(weights_by_speed(self._seconds, counts))
        weights = np.maximum(best_weights(self._seconds, counts), least)
        return [float(weight) for weight in weights / (weights @ counts)]

    @property
    def weight_of_each(self) -> list[float]:
        """By device, the weight of its class."""
        found = {d: weight for class_, weight in zip(self.classes, self.weights, strict=True) for d in class_}
        return [found[d] for d in range(len(found))]

    @cached_property
    def _seconds(self) -> Floats:
        return np.array(self._times).reshape(len(self._times), -1)

    @cached_property
    def _weighed(self) -> Floats:
        seconds: Floats = np.array(self.weights)[:, None] * self._seconds
        return seconds

    def listing(self, out_of_time: Callable[[], bool]) -> Listing:
        """The blocks with the least that they count, weighed, on any device.

        Raises:
            OutOfTimeError: the time has passed.
        """
        if self._listing is None:
            problem = self.problem
            if not self.alike:
                problem = in_shares(problem, [float(s) for s in self._weighed.min(axis=0)])
            self._listing = Listing(problem, out_of_time)
        return self._listing.timed(out_of_time)

    def little(self, out_of_time: Callable[[], bool]) -> LittleCut:
        """The sets with little transfer.

        Raises:
            OutOfTimeError: the time has passed.
        """
        listing = self.listing(out_of_time)
        if self._little is None:
            self._little = LittleCut(listing)
        return self._little.of(listing)

    def searched(
        self, devices: Sequence[int], ceiling_s: float, part: tuple[int, int] | None, out_of_time: Callable[[], bool]
    ) -> ChainSearch | DeviceSetSearch:
        """What is asked whether there is a split with loads of ``ceiling_s`` at most.

        Args:
            devices: those that may be used; where they are alike and only a ``part`` is split, in this order.
            ceiling_s: seconds of a step.
            part: the closed sets that the stages are between, as bit masks; None = all blocks are split.
            out_of_time: asked now and then.

        Raises:
            OutOfTimeError: the time has passed.
        """
        listing = self.listing(out_of_time)
        if self.alike:
            counts = [len(devices)] if part else range(min(self.problem.most_stages, len(devices)), 0, -1)
            rows = [Row(tuple(devices[:count]), (1.0,) * count) for count in counts]
            return ChainSearch(listing.between(*part) if part else listing, rows, ceiling_s)
        kinds = [[d for d in class_ if d in devices] for class_ in self.classes]
        used = [number for number, kind in enumerate(kinds) if kind]
        weights = [self.weights[number] for number in used]
        if len(used) == 1 and self.in_proportion and part:
            row = Row(tuple(devices), (weights[0],) * len(devices))
            return ChainSearch(listing.between(*part), [row], ceiling_s)
        little = self.little(out_of_time)
        most = len(devices) if part else self.problem.most_stages
        return DeviceSetSearch(
            little.between(*part) if part else little,
            [kinds[number] for number in used],
            self._weighed[used],
            weights,
            most,
            ceiling_s,
        )

    @cached_property
    def in_proportion(self) -> bool:
        """Whether each block counts the same on every device, once weighed."""
        return in_proportion(self._weighed)

    def slack_s(self, ceiling_s: float, out_of_time: Callable[[], bool]) -> float:
        """Loads nearer than that to a ceiling are not told from it: what rounding may take from work, on any device.

        Raises:
            OutOfTimeError: the time has passed.
        """
        listing = self.listing(out_of_time)
        if self.alike:
            return 4 * listing.slack_s
        counts = [len(class_) for class_ in self.classes]
        most_s = [weight * ceiling_s for weight in self.weights]
        return 4 * Measures(listing, self._weighed, counts, most_s).slack_s / min(self.weights)
