"""The speeds of devices from step to step: draws of the times that were seen while they were measured.

The draws of a device are evenly spaced quantiles of its times, in an order of its own (Latin hypercube sampling; McKay,
Beckman and Conover, Technometrics 21 (2), 1979). So their median is the median that was measured, and no median step is
shorter than the load of a device in it, as it may be by chance where each draw is made at random.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

__all__ = ["drawn"]

DRAWS = 101
"""An odd number, so that one of the draws is the median."""


def drawn(variations: Sequence[Sequence[float]]) -> npt.NDArray[np.float64]:
    """Relative times, shape (draws, devices), the same every time; one draw of ones where all devices are steady.

    Args:
        variations: by device, the relative times that were seen, 1 being the median; none for a steady one.
    """
    if all(len(set(relative)) < 2 for relative in variations):
        return np.ones((1, len(variations)))
    generator, shares = random.Random(0), (np.arange(DRAWS) + 0.5) / DRAWS
    columns = []
    for relative in variations:
        order = generator.sample(range(DRAWS), DRAWS)
        columns.append(np.quantile(relative, shares)[order] if relative else np.ones(DRAWS))
    return np.stack(columns, axis=1)
