"""Micro-batches come together as the others expect them, and gradients survive a step that fails."""

import pytest
import torch
from torch import nn

from shardwright.sharder.runtime.batches import OutputForm
from shardwright.sharder.runtime.engine import SharedGradients


def test_results_are_joined_as_they_are_received():
    """In the memory layout of a new tensor, whatever the model's: a broadcast sends bytes, and no strides."""
    parts = [torch.randn(2, 4, 3, 3).contiguous(memory_format=torch.channels_last) for _ in range(2)]
    (whole,) = OutputForm(parts[0], [0], 2).joined([[part] for part in parts])
    assert torch.equal(whole, torch.cat(parts))
    assert whole.stride() == torch.empty(4, 4, 3, 3).stride()


def test_a_step_that_fails_leaves_the_gradients_of_shared_parameters():
    """What was accumulated over earlier steps is there again."""
    weight = nn.Parameter(torch.ones(2))
    weight.grad = earlier = torch.full((2,), 3.0)
    shared = SharedGradients((), 0, nn.Linear(1, 1))
    shared.shared = [(0, weight, None)]

    def step():
        with shared.summed():
            weight.grad = torch.ones(2)
            raise RuntimeError("no memory")

    with pytest.raises(RuntimeError, match="no memory"):
        step()
    assert weight.grad is earlier
