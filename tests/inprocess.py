"""What the tests of pipelines in one process share: models, a way to place them, and when a step is the same."""

import copy

import pytest
import torch
from torch import nn

import shardwright as sw

WIDTH, BATCH = 6, 12


@pytest.fixture
def piped(captured_profile):
    """Places a copy of a model as a pipeline; the model and the copy."""

    def place(model, args, kwargs=None, *, microbatches=4, stages=2, schedule="1f1b", **options):
        devices = [f"cpu:{index}" for index in range(stages)]
        profile = captured_profile(model, args, kwargs, devices=devices, microbatches=(1, 2, 4), **options)
        plan = sw.plan(profile, microbatches=4, schedule=schedule)
        assert len(plan.devices) == stages
        return model, sw.place(copy.deepcopy(model), plan, microbatches=microbatches)

    return place


def forward_of(model):
    """What a pipelined model has for a forward."""
    return vars(model)["forward"]


def losses(output):
    """A loss of each sample's outputs that no symmetry makes zero."""
    tensors = output if isinstance(output, tuple) else output.values() if isinstance(output, dict) else [output]
    return sum((t.float() * torch.linspace(0.5, 1.5, t.numel()).view_as(t)).square().mean() for t in tensors)


def assert_same_step(model, placed, args=(), kwargs=None, *, tolerance=1e-5):
    """Outputs and the gradients of parameters and inputs are the same."""
    kwargs = kwargs or {}
    results = []
    for one in (model, placed):
        one.zero_grad()
        given = [t.detach().clone().requires_grad_(t.requires_grad) for t in args]
        output = one(*given, **kwargs)
        losses(output).backward()
        results.append((output, [t.grad for t in given], [p.grad for p in one.parameters()]))
    (expected, *of_model), (found, *of_placed) = results
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(of_placed, of_model, rtol=tolerance, atol=tolerance)
    assert forward_of(placed).programs


class Chain(nn.Sequential):
    def __init__(self, layers=6):
        super().__init__(*[nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(layers)])


class Skips(nn.Module):
    """Skips over several stages, an integer input, a parameter outside of units, and two outputs of different kinds."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(WIDTH, WIDTH) for _ in range(8)])
        self.gain = nn.Parameter(torch.rand(WIDTH))

    def forward(self, x, index, *, scale=None):
        kept = []
        for layer in self.layers[:4]:
            x = layer(x).tanh()
            kept.append(x)
        for layer in self.layers[4:]:
            x = layer(x + kept.pop())
        rows = torch.gather(x * self.gain, 1, index)
        if scale is not None:
            rows = rows * scale
        return {"rows": rows, "index": index + 1, "x": x}
