"""Captured graphs as modules over what they call, held by its names."""

import traceback

import pytest
import torch
from torch import fx, nn

from shardwright.profiler.recording.replayed import Replayed
from shardwright.profiler.trace import trace

TAKEN = sorted(set(dir(fx.GraphModule)) - set(dir(nn.Module)) - {"__annotations__", "__module__", "__orig_bases__"})
"""Names that ``fx.GraphModule`` has for itself."""


def named(names):
    """A model with a layer, a parameter and a buffer at each of ``names``, one after another."""

    class Part(nn.Module):
        def __init__(self, layer, weight, table):
            super().__init__()
            setattr(self, layer, nn.Linear(4, 4))
            setattr(self, weight, nn.Parameter(torch.rand(4)))
            self.register_buffer(table, torch.rand(4))

        def forward(self, x):
            layer, weight, table = (getattr(self, name) for name in names)
            return layer(x) * weight + table

    return Part(*names)


@pytest.mark.parametrize("names", [("graph", "code", "recompile"), ("code", "recompile", "graph"), TAKEN[-3:]])
def test_children_named_as_attributes_of_a_graph_module(names):
    """At the top and below: outputs, parameters and the names of the state are the model's."""
    model = nn.Sequential(named(names), nn.ReLU(), named(names))
    for whole, name in ((model, "0."), (model[0], "")):
        capture = trace(whole, (torch.randn(2, 4),))
        replayed, x = capture.module(), torch.randn(2, 4)
        assert torch.equal(replayed(x)[0], whole(x))
        state, expected = replayed.state_dict(), whole.state_dict()
        assert f"{name}{names[1]}" in state
        assert state.keys() == expected.keys()
        assert all(t.data_ptr() == expected[key].data_ptr() for key, t in state.items())
        assert {*replayed.parameters()} == {*whole.parameters()}


def test_parameters_are_in_the_order_of_the_graph():
    """Optimizers and sums over all parameters go by it, so it is the same in every process."""
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(12)))
    replayed = trace(model, (torch.randn(2, 4),)).module()
    assert [name for name, _ in replayed.named_parameters()] == [name for name, _ in model.named_parameters()]


def test_parts_of_what_is_held_are_the_same():
    """A parameter of a module that is called too is held once, and what is not referred to not at all."""
    layer, graph = nn.Linear(3, 3), fx.Graph()
    made = graph.call_module("layer", (graph.placeholder("x"),))
    graph.output(graph.call_function(torch.add, (made, graph.get_attr("layer.bias"))))
    replayed = Replayed({"layer": layer, "layer.bias": layer.bias, "other": nn.ReLU()}, graph)
    x = torch.randn(2, 3)
    assert torch.equal(replayed(x), layer(x) + layer.bias)
    assert [name for name, _ in replayed.named_parameters(remove_duplicate=False)] == ["layer.weight", "layer.bias"]
    assert replayed.layer is layer


def test_an_error_shows_the_line():
    """Of the graph's code, and of what it called."""
    graph = fx.Graph()
    graph.output(graph.call_function(torch.matmul, (graph.placeholder("x"), graph.placeholder("y"))))
    with pytest.raises(RuntimeError, match="size") as raised:
        Replayed({}, graph)(torch.ones(2), torch.ones(3))
    shown = "".join(traceback.format_exception(raised.value))
    assert "matmul = torch.matmul(x, y)" in shown
