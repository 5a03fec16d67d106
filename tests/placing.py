"""What the tests of placing share: a pair of devices, plans, and what it means that a placed model is the model."""

import copy

import torch
from torch import nn

import shardwright as sw
from shardwright.profiler.recording.inputs import outputs_of
from shardwright.sharder.runtime.placing.sim import Simulated, on_host

PAIR = {"cpu:0": "cpu", "cpu:1": "sim:0"}


def planned(captured_profile, model, args, microbatches=2, **options):
    return sw.plan(captured_profile(model, args, **options), microbatches=microbatches)


def gradients(model):
    return {name: on_host(p.grad) for name, p in model.named_parameters() if p.grad is not None}


def relative(a, b):
    return float((a - b).detach().abs().max() / b.detach().abs().max())


class Tied(nn.Module):
    """An embedding whose weight is the head's too."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(12, 8)
        self.layers = nn.ModuleList([nn.Linear(8, 8) for _ in range(4)])
        self.head = nn.Linear(8, 12, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        x = self.embed(ids)
        for layer in self.layers:
            x = x + layer(x)
        return self.head(x)


def assert_placed_alike(captured_profile, model, args, *, pins, devices=PAIR):
    """Verified and placed, ``model`` gives its outputs, and after two steps its gradients and buffers."""
    plan = sw.plan(captured_profile(model, args, microbatches=(1,)), microbatches=1, pins=pins)
    assert sw.verify(model, plan, args)
    placed = sw.place(copy.deepcopy(model), plan, devices=devices)
    for _ in range(2):
        with Simulated():
            found = placed(*copy.deepcopy(args))
        expected = model(*copy.deepcopy(args))
        for one, other in zip(outputs_of(found), outputs_of(expected), strict=True):
            torch.testing.assert_close(one, other)
        for output in (found, expected):
            sum(tensor.square().mean() for tensor in outputs_of(output)).backward()
    expected = gradients(model)
    assert expected
    for name, gradient in gradients(placed).items():
        torch.testing.assert_close(gradient, expected[name])
    for name, buffer in model.named_buffers():
        torch.testing.assert_close(on_host(placed.get_buffer(name)), buffer)
    return placed


INNER = {"0": "cpu:0", "1": "cpu:0"}
