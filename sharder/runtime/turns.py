"""Taking turns: steps of several contenders one after another, so that a noisy machine treats them alike."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Collection, Mapping
from types import MappingProxyType

__all__ = ["WARMUP_STEPS", "Pacing", "in_turn", "spread_over"]

WARMUP_STEPS = 2


def in_turn(
    contenders: Mapping[str, Callable[[], float]],
    steps: int,
    *,
    bounded: Mapping[str, int] = MappingProxyType({}),
    limit_s: float,
    between: Callable[[int], None] = lambda _: None,
) -> dict[str, list[float]]:
    """Seconds of ``steps`` steps of each, after those of a warm-up, in rounds that begin with one after the other.

    Args:
        contenders: name -> takes a step, or several in a row, and returns the seconds of one.
        bounded: those whose steps may take ``limit_s`` seconds in all, by what the last of the warm-up took, with how
            many steps each takes at a turn; if not all fit, they take part in fewer rounds, at least in one, spread
            over the others'.
        between: called with the number of each round when it is over, those of the warm-up counted.
    """
    names = [*contenders]
    found: dict[str, list[float]] = {name: [] for name in names}
    their_rounds: Collection[int] = range(WARMUP_STEPS + steps)
    for number in range(WARMUP_STEPS + steps):
        if number == WARMUP_STEPS:
            spent_s = sum(count * sum(found[name]) for name, count in bounded.items())
            round_s = sum(count * found[name][-1] for name, count in bounded.items())
            fitting = int((limit_s - spent_s) / round_s) if round_s else steps
            their_rounds = spread_over(steps, max(1, fitting))
        first = number % len(names)
        for name in names[first:] + names[:first]:
            if name not in bounded or number in their_rounds:
                found[name].append(contenders[name]())
        between(number)
    return {name: seconds[WARMUP_STEPS:] for name, seconds in found.items()}


def spread_over(steps: int, most: int) -> list[int]:
    """At most so many of the rounds of ``steps`` after the warm-up, evenly: what slows the machine slows both alike."""
    count = min(most, steps)
    return [WARMUP_STEPS + steps * position // count for position in range(count)]


class Pacing:
    """Notes the devices' paces at each contender's steps.

    Args:
        paces: gives the pace of each device right after a step, in s; none for devices that have none.
    """

    def __init__(self, paces: Callable[[], Mapping[str, float]]) -> None:
        self.paces = paces
        self.found: dict[str, list[dict[str, float]]] = {}
        """Contender -> for each of its steps the devices' paces."""

    def beside(self, name: str, step: Callable[[], float]) -> Callable[[], float]:
        """``step``, for the contender ``name``, with the paces noted."""
        taken = self.found.setdefault(name, [])

        def paced() -> float:
            seconds = step()
            taken.append(dict(self.paces()))
            return seconds

        return paced

    def of(self, name: str) -> dict[str, float]:
        """The median pace of each device at that contender's steps, those of the warm-up apart."""
        steps = self.found[name][WARMUP_STEPS:]
        return {device: statistics.median(step[device] for step in steps) for device in steps[0]} if steps else {}
