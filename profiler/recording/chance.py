"""Chance outside of tensors: the global random numbers of Python and of NumPy, which leave no trace in a capture.

A forward may drop a layer where ``random.random() < 0.1``: two runs that happen to keep it would look alike. So one of
the two runs that a checked capture compares draws the smallest numbers at first, the other the largest; whatever is
decided by numbers in [0, 1) outside the units then comes out otherwise, and what they cannot decide (a probability of
0) comes out alike. Other distributions draw until something fits, and after the extreme numbers the two runs draw
different ones, so that these are caught by chance; and generators of the model's own,
such as ``numpy.random.default_rng()``, are not looked at.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import numpy as np
import torch

__all__ = ["chance_kept", "let_draw"]

WORDS = 624
"""In the state of the Mersenne Twister, which puts out a bijection of each in turn (Matsumoto & Nishimura 1998)."""
EXTREME = 400
"""The first words, which are extreme. The others are not: who draws until a number fits must come to an end."""
SMALLEST = (0, 0x40)
"""Come out as they are, as 2**-53 in [0, 1), which has a logarithm.

Such a number takes two words. If it begins with the second it is 2**-26.
"""
LARGEST = (0x12DD9BB3, 0x12DD9BB3)
"""Come out with all their bits set."""


def let_draw(which: Literal["smallest", "largest"]) -> None:
    """Let the next 200 numbers in [0, 1) of Python and of NumPy be the smallest or the largest that there are."""
    extreme = SMALLEST if which == "smallest" else LARGEST
    others = random.Random(which)
    words = [*extreme] * (EXTREME // 2) + [others.getrandbits(32) for _ in range(WORDS - EXTREME)]
    random.setstate((3, (*words, 0), None))
    if np.random.get_state(legacy=False)["bit_generator"] == "MT19937":
        np.random.set_state(("MT19937", np.array(words, dtype=np.uint32), 0, 0, 0.0))


@contextmanager
def chance_kept() -> Iterator[None]:
    """Put the random states of PyTorch on the CPU, of Python and of NumPy back afterwards."""
    of_python, of_numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        random.setstate(of_python)
        np.random.set_state(of_numpy)
