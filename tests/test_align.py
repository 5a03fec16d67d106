"""Glue of a placed model: operands come together, and what a function writes is written where it lies."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import shardwright as sw
from shardwright.sharder.runtime.placing.align import changes_operand
from shardwright.sharder.runtime.placing.sim import Simulated, on_host

PAIR = {"cpu:0": "cpu", "cpu:1": "sim:0"}
WIDTH = 6


class Layers(nn.Module):
    """Three layers, the last of which is told apart by what the forward does before it."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x):
        first = self.layers[0](x)
        return self.layers[2](self.joined(first, self.layers[1](first)))


class Out(Layers):
    def joined(self, first, second):
        made = torch.empty_like(second)
        torch.add(first, second, out=made)
        return made


class OutCat(Layers):
    def joined(self, first, second):
        made = torch.empty(2 * first.shape[0], WIDTH, device=second.device)
        torch.cat([first, second], out=made)
        return made


class EachInPlace(Layers):
    def joined(self, first, second):
        made = [first * 1, second * 1]
        torch._foreach_add_(made, [second, first])
        torch._foreach_mul_(made, [0.5, 2.0])
        return made[0] + made[1]


class Each(Layers):
    def joined(self, first, second):
        made = torch._foreach_mul([first, second], 2.0)
        return sum(torch._foreach_add(made, [second, first]))


class Statistics(Layers):
    """Running statistics of the root, which an earlier step reads."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(WIDTH))
        self.register_buffer("variance", torch.ones(WIDTH))

    def forward(self, x):
        return super().forward(x + self.mean)

    def joined(self, first, second):
        return nn.functional.batch_norm(first * 0.1 + second, self.mean, self.variance, training=self.training)


class Packed(nn.Module):
    """A recurrent layer on sequences packed by their lengths."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(WIDTH, WIDTH), nn.GRU(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)])

    def forward(self, x, lengths):
        packed = pack_padded_sequence(self.layers[0](x), lengths.cpu(), enforce_sorted=False)
        padded, found = pad_packed_sequence(self.layers[1](packed)[0])
        return self.layers[2](padded), found


def inputs_of(kind):
    torch.manual_seed(0)
    return (torch.randn(5, 4, WIDTH), torch.tensor([5, 3, 4, 2])) if kind is Packed else (torch.randn(4, WIDTH),)


def plan_at(captured_profile, model, args, cut, *, train):
    """A plan whose second device begins at the unit ``cut``."""
    profile = captured_profile(model, args, train=train, microbatches=(1,))
    units = [node.name for node in profile.nodes if node.kind == "unit"]
    pins = {name: f"cpu:{int(index >= cut)}" for index, name in enumerate(units)}
    return sw.plan(profile, microbatches=1, pins=pins)


@pytest.mark.parametrize("cut", [1, 2])
@pytest.mark.parametrize("kind", [Out, OutCat, EachInPlace, Each, Packed])
def test_glue_that_joins_devices_computes_what_it_did(captured_profile, kind, cut):
    """Also where it writes into other operands than its first, on the placed model and simulated."""
    torch.manual_seed(1)
    model, args = kind(), inputs_of(kind)
    with torch.no_grad():
        expected = model(*args)
    plan = plan_at(captured_profile, model, args, cut, train=False)
    assert sw.verify(model, plan, args)
    sw.place(model, plan, devices=PAIR)
    with torch.no_grad(), Simulated():
        found = model(*args)
    torch.testing.assert_close(on_host(found), expected)


@pytest.mark.parametrize("cut", [2])  # who reads the statistics before is on the device of who writes them
def test_running_statistics_are_written_where_they_lie(captured_profile, cut):
    """Two steps of training on another device than theirs change them as on one device."""
    model, (x,) = Statistics(), inputs_of(Statistics)
    twin = copy.deepcopy(model)
    sw.place(model, plan_at(captured_profile, model, (x,), cut, train=True), devices=PAIR)
    for one in (model, twin):
        for _ in range(2):
            one(x).square().mean().backward()
    assert twin.mean.abs().min() > 0
    torch.testing.assert_close(on_host(model.mean), twin.mean)
    torch.testing.assert_close(on_host(model.variance), twin.variance)
    for name, parameter in twin.named_parameters():
        torch.testing.assert_close(on_host(model.get_parameter(name).grad), parameter.grad)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        *(("add_", True), ("__iadd__", True), ("__setitem__", True), ("_foreach_add_", True)),
        *(("add", False), ("__add__", False), ("torch.Tensor.mul_", True), ("__getitem__", False)),
    ],
)
def test_names_say_what_is_written(name, changes):
    """PyTorch's names of functions that change their first operand."""
    assert changes_operand(name) == changes
