"""Graphs with too many closed sets: some stages beside each other are split anew, as well as they can be together.

Moves of a block or two (shifting.py) end where each move by itself is for the worse. What a few neighbours may be
together is far less than what all stages may be, since what comes before them and behind them stays: so it is listed
(windows.py), for each order of their devices. All loads are to be brought below a ceiling, a little under the best
largest load. As long as one is above, the neighbours of the largest are asked whether they can be split with loads
below it; first two of them, then more. Such a search of large neighbourhoods by an exact method is that of Shaw, "Using
constraint programming and local search methods to solve vehicle routing problems", CP 1998.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator

from shardwright.sharder.planning.exact.search import OutOfTimeError, Stages
from shardwright.sharder.planning.wide.lists import Lists
from shardwright.sharder.planning.wide.windows import UndecidedError

__all__ = ["Neighbours"]

AIMS = 4e-3, 1e-3, 3e-4
"""Ceilings are so much below the best, in turn while each can be reached."""
WIDEST, WIDEST_ALIKE = 4, 6
"""So many stages are split anew together, at most; more where devices are alike, where it does not begin afresh."""
STEPS = 300_000
"""So many undecided sets are gone through for what a cut may be, in words of 64 blocks."""
ROUNDING = 1e-9

Loads = Callable[[Stages], list[float] | None]


class Neighbours:
    """Stages of one problem that are split anew.

    Args:
        lists: of the problem. Where the transfers are not all in what is listed nothing is split anew.
        loads_of: of each stage of a split, in seconds of a step, or None where it does not fit.
        out_of_time: asked now and then.
    """

    def __init__(self, lists: Lists, loads_of: Loads, out_of_time: Callable[[], bool]) -> None:
        self.lists, self.loads_of, self.out_of_time = lists, loads_of, out_of_time

    def split_anew(self, stages: Stages, widest: int = WIDEST) -> Iterator[Stages]:
        """Splits, each with a smaller largest load than the one before; the first than that of ``stages``, which fit.

        Args:
            stages: where it begins.
            widest: so many are split anew together, at most.
        """
        with contextlib.suppress(OutOfTimeError):
            if len(stages) < 2 or not (self.lists.possible and self.lists.with_transfers):
                return
            for aim in AIMS:
                found: Stages | None = stages
                while found is not None:
                    stages = found
                    largest_s = max(self._loads(stages))
                    found = self._below(stages, (1 - aim) * largest_s, widest) if 0 < largest_s < math.inf else None
                    if found is not None:
                        yield found

    def _loads(self, stages: Stages) -> list[float]:
        loads = self.loads_of(stages)
        assert loads is not None  # what it begins with fits, and so does what is made of it
        return loads

    def _below(self, stages: Stages, ceiling_s: float, widest: int) -> Stages | None:
        """``stages`` made anew until no load is above the ceiling; None where that is not reached."""
        while max(self._loads(stages)) > ceiling_s * (1 + ROUNDING):
            better = self._better(stages, ceiling_s, widest)
            if better is None:
                return None
            stages = better
        return stages

    def _better(self, stages: Stages, ceiling_s: float, widest: int) -> Stages | None:
        """A split with fewer loads above the ceiling, or None where there is none."""
        loads, most = self._loads(stages), ceiling_s * (1 + ROUNDING)
        heaviest, above = loads.index(max(loads)), sum(load > most for load in loads)
        for width in range(2, min(widest, len(stages)) + 1):
            firsts = range(max(0, heaviest - width + 1), min(heaviest, len(stages) - width) + 1)
            for first in sorted(firsts, key=lambda first: sum(loads[first : first + width])):
                parts = stages[:first], stages[first : first + width], stages[first + width :]
                before, inside = (sum(members for _, members in part) for part in parts[:2])
                devices = tuple(device for device, _ in parts[1])
                anew = self._anew(before, before | inside, devices, ceiling_s)
                if anew is None:
                    continue
                better = *parts[0], *anew, *parts[2]
                found = self.loads_of(better)
                if found is not None and sum(load > most for load in found) < above:
                    return better
        return None

    def _anew(self, before: int, behind: int, devices: tuple[int, ...], ceiling_s: float) -> Stages | None:
        """Stages between two closed sets with loads below the ceiling, by work and transfers alone."""
        with contextlib.suppress(UndecidedError):
            return self.lists.searched(devices, ceiling_s, (before, behind), self.out_of_time).stages(STEPS)
        return None
