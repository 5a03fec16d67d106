"""The recorder on chance: a branch that might turn out otherwise is named."""

import random

import numpy as np
import pytest
import torch
from recording import WIDTH, Layers, faithful, obstacles, rows
from torch import nn

from shardwright.errors import ShardwrightError
from shardwright.profiler.trace import checked_trace

# Chance


class LayerDrop(Layers):
    """Leaves out layers by chance, decided as ``decide`` does."""

    def __init__(self, decide, probability):
        super().__init__(3)
        self.decide, self.probability = decide, probability

    def forward(self, x):
        for layer in self.layers:
            if self.training and self.decide(x) < self.probability:
                continue
            x = layer(x)
        return x + self.layers[0](x)


DECISIONS = {
    "rand": lambda _: torch.rand([]),
    "item": lambda _: torch.rand(1).item(),
    "in place": lambda _: torch.empty(1).uniform_(0, 1),
    "like the input": lambda x: torch.rand_like(x[0, :1]),
    "by rows": lambda x: torch.rand(len(x)).min(),
}


@pytest.mark.parametrize("name", [name for name in DECISIONS if name != "item"])
def test_a_branch_on_chance_that_never_turns_out_otherwise(name):
    """Layers that are dropped with probability 0 are always there: no obstacle."""
    assert faithful(LayerDrop(DECISIONS[name], 0.0)).guards == []


@pytest.mark.parametrize("name", list(DECISIONS))
def test_a_branch_on_chance_that_may_turn_out_otherwise(name):
    """Layers that are dropped now and then are an obstacle, and none outside training."""
    found = obstacles(LayerDrop(DECISIONS[name], 0.1))
    assert all("that depends on chance" in text for text in found)
    faithful(LayerDrop(DECISIONS[name], 0.1), train=False)


def test_chance_from_a_buffer():
    """A probability that is a buffer is no hindrance to trying a branch again."""

    class Model(Layers):
        def __init__(self, probability):
            super().__init__()
            self.register_buffer("probability", torch.tensor([probability]))

        def forward(self, x):
            y = self.layers[0](x)
            return self.layers[1](y) if torch.bernoulli(self.probability).bool() else y

    faithful(Model(1.0))
    assert "chance" in obstacles(Model(0.5))[0]


OWN_DICE = {"Python": random.random, "NumPy": np.random.rand}
"""They leave no trace in tensors: what they decide is caught by the second run."""


@pytest.mark.parametrize("name", list(OWN_DICE))
def test_dice_of_python_that_scale_are_caught(name):
    """A number that the forward draws by itself, and computes with, is not taken for a constant."""

    class Model(Layers):
        def forward(self, x):
            y = self.layers[0](x)
            return self.layers[1](y) * OWN_DICE[name]()

    with pytest.raises(ShardwrightError, match=r"is not the model: .* decided by random numbers of Python or NumPy"):
        checked_trace(Model(), (rows(0),))


@pytest.mark.parametrize("name", list(OWN_DICE))
@pytest.mark.parametrize("probability", [1e-9, 0.5, 1 - 1e-9])
def test_dice_of_python_that_leave_out_layers_are_caught(name, probability):
    """However seldom a layer is left out, or kept, the capture of one path is refused; and nothing out of training."""
    model = LayerDrop(lambda _: OWN_DICE[name](), probability)
    with pytest.raises(ShardwrightError, match="is not the model"):
        checked_trace(model, (rows(0),))
    faithful(model, train=False)


@pytest.mark.parametrize("name", list(OWN_DICE))
def test_dice_of_python_that_decide_nothing_are_harmless(name):
    """Layers that are left out with probability 0 are always there, and a unit may draw what it likes inside."""

    class Shaken(nn.Linear):
        def forward(self, x):
            return super().forward(x) * (1 + OWN_DICE[name]())

    model = LayerDrop(lambda _: OWN_DICE[name](), 0.0)
    model.layers[1] = Shaken(WIDTH, WIDTH)
    checked_trace(model, (rows(0),))
