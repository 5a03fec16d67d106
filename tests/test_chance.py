"""Random numbers of Python and NumPy: extreme ones for comparing runs, and states that are put back."""

import random

import numpy as np
import pytest
import torch

from shardwright.profiler.recording.chance import chance_kept, let_draw


@pytest.mark.parametrize(("which", "expected"), [("smallest", 2**-53), ("largest", 1 - 2**-53)])
def test_the_first_numbers_are_extreme(which, expected):
    """Python and NumPy draw a number near 0, which has a logarithm, or the largest below 1, two hundred times."""
    with chance_kept():
        let_draw(which)
        assert {random.random() for _ in range(200)} == {expected}
        assert set(np.random.rand(200)) == {expected}


@pytest.mark.parametrize("which", ["smallest", "largest"])
def test_drawing_until_a_number_fits_ends(which):
    """Normal numbers, whole numbers and permutations are drawn by rejection, which ends; and in the same way again."""

    def drawn():
        let_draw(which)
        own = [
            random.gauss(),
            random.normalvariate(),
            random.gammavariate(0.5, 1),
            random.randrange(3),
            random.sample(range(9), 5),
        ]
        return own, np.random.randn(3).tolist(), np.random.choice(9, 5, replace=False).tolist(), np.random.randint(3)

    with chance_kept():
        assert drawn() == drawn()


def test_states_are_put_back():
    """After an error too, all three go on as if nothing had been drawn."""

    def numbers():
        return random.random(), np.random.rand(), torch.rand(1).item()

    with chance_kept():
        expected = numbers()
    with pytest.raises(KeyError), chance_kept():
        raise KeyError(numbers())
    assert numbers() == expected
