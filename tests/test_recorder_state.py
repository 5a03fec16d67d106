"""The recorder on state that is kept between calls: what no graph can hold is named."""

import copy
import warnings
from collections import Counter, deque

import pytest
import torch
from recording import ROWS, WIDTH, Layers, batch, faithful, marked, obstacles, rows
from torch import nn

from shardwright.errors import ShardwrightError
from shardwright.profiler.recording.inputs import outputs_of
from shardwright.profiler.recording.state import Versions
from shardwright.profiler.trace import checked_trace, trace

# State


def test_state_kept_between_calls_is_an_obstacle():
    """A tensor that a former call left behind is named where it is used."""

    class Model(Layers):
        last = None

        def forward(self, x):
            y = self.layers[0](x)
            if self.last is not None:
                y = y + self.last  # <--
            self.last = y.detach()
            return self.layers[1](y)

    for train in (True, False):
        model = Model()
        (found,) = obstacles(model, train=train)
        assert found.startswith(marked(model))
        assert found.endswith("takes a tensor kept from an earlier call")


@pytest.mark.parametrize("follows", ["inputs", "itself"])
def test_a_buffer_that_is_replaced_is_an_obstacle(follows):
    """A running mean or a counter that the forward assigns anew, instead of changing it in place, is named."""

    class Model(Layers):
        def __init__(self):
            super().__init__()
            self.register_buffer("kept", torch.ones(WIDTH))

        def forward(self, x):
            y = self.layers[0](x)
            self.kept = self.kept + (y.detach().mean(0) if follows == "inputs" else 1)  # <--
            return self.layers[1](y * self.kept)

    model = Model()
    (found,) = obstacles(model)
    assert found.startswith(marked(model))
    assert "the buffer kept" in found


def test_a_buffer_that_is_replaced_by_its_like_is_fine():
    """A buffer that is cast, or a table that grows with the shapes, says nothing about earlier calls."""

    class Model(Layers):
        def __init__(self):
            super().__init__()
            self.register_buffer("steps", torch.arange(WIDTH, dtype=torch.float64))
            self.register_buffer("table", torch.zeros(1))

        def forward(self, x):
            self.steps = self.steps.to(x.dtype)
            if len(self.table) < len(x):
                self.table = torch.arange(len(x), dtype=x.dtype) * self.steps[1] + self.table[:1]
            return self.layers[1](self.layers[0](x) + self.steps + self.table[: len(x), None])

    faithful(Model())


def test_state_that_carries_gradient_is_an_obstacle():
    """A kept tensor with its whole history is named too."""

    class Model(Layers):
        last = None

        def forward(self, x):
            y = self.layers[0](x)
            y = y if self.last is None else self.layers[1](y + self.last)  # <--
            self.last = y
            return y

    model = Model()
    (found,) = obstacles(model)
    assert found.startswith(marked(model))


def test_a_table_cached_from_shapes_is_fine():
    """What a former call computed from shapes alone may be kept: it is a constant."""

    class Model(Layers):
        table = None

        def forward(self, x):
            if self.table is None:
                self.table = torch.arange(WIDTH) / WIDTH + torch.ones_like(x[0])
            return self.layers[1](self.layers[0](x) + self.table)

    capture = faithful(Model())
    assert capture.constants


def test_a_count_of_calls_is_caught():
    """A number that Python counts up is baked into the graph; the second run shows it."""

    class Model(Layers):
        calls = 0

        def forward(self, x):
            self.calls += 1
            return self.layers[1](self.layers[0](x)) * self.calls

    with pytest.raises(ShardwrightError, match=r"is not the model: .* remembered between calls"):
        checked_trace(Model(), (rows(0),))


@pytest.mark.parametrize("fill", [torch.zeros, torch.ones])
def test_a_baked_number_is_caught_on_samples_without_variety(fill):
    """Sample inputs that are all ones or zeros are changed as well for the second run."""

    with warnings.catch_warnings(action="ignore"):

        @torch.jit.script
        def invisible(x):
            return x * 2

    class Model(Layers):
        def forward(self, x):
            return self.layers[1](self.layers[0](x)) * invisible(x.detach() + 1)

    with pytest.raises(ShardwrightError, match="is not the model"):
        checked_trace(Model(), (fill(ROWS, WIDTH),), train=False)


def test_a_tensor_left_on_a_unit_is_an_obstacle():
    """A loss that a unit leaves on itself for the parent to collect is not seen by a pipeline: it is named."""

    class Expert(nn.Linear):
        def forward(self, x):
            y = super().forward(x)
            self.loss = y.square().mean()
            return y

    class Model(nn.Sequential):
        def forward(self, x):
            y = self[1](self[0](x))
            return y, self[0].loss + self[1].loss  # <--

    for train in (True, False):
        model = Model(Expert(WIDTH, WIDTH), Expert(WIDTH, WIDTH))
        found = obstacles(model, train=train)
        assert all(text.startswith(marked(model)) for text in found)
        assert "a unit made and handed on otherwise than by returning it" in found[0]


def test_a_result_that_a_unit_also_keeps_is_fine():
    """What a unit returns is known, wherever else the parent finds it."""

    class Keeps(nn.Linear):
        def forward(self, x):
            self.last = super().forward(x)
            return self.last

    class Model(nn.Sequential):
        def forward(self, x):
            self[0](x)
            return self[1](self[0].last)

    faithful(Model(Keeps(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)))


class Cache:
    """Keys by layer, as decoders keep them."""

    def __init__(self):
        self.keys = {}

    def update(self, layer, keys):
        held = self.keys.get(layer)
        self.keys[layer] = keys if held is None else torch.cat([held, keys], 0)
        return self.keys[layer]


class Caching(nn.Module):
    """A layer that keeps its keys in the cache."""

    def __init__(self, index):
        super().__init__()
        self.linear, self.index = nn.Linear(WIDTH, WIDTH), index

    def forward(self, x, cache=None):
        keys = self.linear(x)
        return x + (keys if cache is None else cache.update(self.index, keys)).mean(0)


class Decoder(nn.Module):
    """Layers that share a cache, which is returned."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([Caching(0), Caching(1)])

    def forward(self, x):
        cache = Cache()
        for layer in self.layers:
            x = layer(x, cache=cache)
        return {"cache": cache, "hidden": x}


def test_a_cache_that_units_fill():
    """Every replay has fresh caches, so nothing is carried over, and their tensors are left out of the outputs."""
    model = Decoder()
    capture = faithful(model)
    assert len(outputs_of(model(rows(0)))) == 3
    assert capture.output_places == (2,)
    assert capture.outputs == ("layers.1",)
    graph = capture.module()
    assert torch.equal(graph(rows(2))[0], graph(rows(2))[0])


def test_a_cache_that_came_filled():
    """What the caller's cache holds already is an input like any other."""

    class Continues(Decoder):
        def forward(self, x, cache):
            for layer in self.layers:
                x = layer(x, cache=cache)
            return x

    def make(seed):
        cache = Cache()
        cache.keys = {0: rows(seed + 50), 1: rows(seed + 60)}
        return (rows(seed), cache), {}

    assert len(faithful(Continues(), make).input_names) == 3


class Carrier:
    """Hands the hidden state on beside the arguments."""

    def __init__(self):
        self.hidden = None


@pytest.mark.parametrize("by", ["attribute", "list"])
def test_a_hidden_state_handed_on_through_an_object_is_caught(by):
    """A graph in which one unit reads what another left in an object is not the model, and is refused."""

    class Leaves(nn.Linear):
        def forward(self, x, carrier):
            if by == "list":
                carrier.append(super().forward(x))
            else:
                carrier.hidden = super().forward(x)
            return x

    class Takes(nn.Linear):
        def forward(self, x, carrier):
            hidden = carrier[-1] if by == "list" else carrier.hidden
            return super().forward(x + hidden)

    class Model(nn.Sequential):
        def forward(self, x):
            carrier = [] if by == "list" else Carrier()
            return self[1](self[0](x, carrier), carrier)

    try:
        found = checked_trace(Model(Leaves(WIDTH, WIDTH), Takes(WIDTH, WIDTH)), (rows(0),)).obstacles
    except ShardwrightError as error:
        found = [str(error)]
    assert found


def test_other_parameters_for_a_unit_are_an_obstacle():
    """A functional call of a unit with weights that are not its own is named."""

    class Model(Layers):
        def forward(self, x):
            weights = {"weight": self.layers[0].weight * 2, "bias": self.layers[0].bias}
            return self.layers[1](torch.func.functional_call(self.layers[0], weights, (x,)))  # <--

    model = Model()
    found = obstacles(model)
    assert any(text.startswith(marked(model)) and "layers.0 with other parameters" in text for text in found)


def test_a_capture_leaves_no_trace():
    """Function.apply, hooks and the weights are as they were, also after a forward that fails."""

    class Fails(Layers):
        def forward(self, x):
            self.layers[0](x)
            raise ValueError("no")

    before = torch.autograd.Function.__dict__["apply"]
    model = Fails()
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(ShardwrightError, match="ValueError: no"):
        checked_trace(model, (rows(0),))
    assert torch.autograd.Function.__dict__["apply"] is before
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    assert torch._C._len_torch_function_stack() == 0


@pytest.mark.parametrize("made", [lambda: deque([1]), lambda: {"nested": [{"deep": []}]}, Counter])
def test_containers_are_as_they_were(made):
    """What forwards leave in containers of a module, nested ones too, is gone when the capture is done."""

    class Model(Layers):
        def __init__(self):
            super().__init__()
            self.log = made()

        def forward(self, x):
            if isinstance(self.log, Counter):
                self.log["calls"] += 1
            else:
                (self.log if isinstance(self.log, deque) else self.log["nested"][0]["deep"]).append(2)
            return self.layers[1](self.layers[0](x))

    model = Model()
    log = model.log
    trace(model, *batch(0))
    assert model.log is log
    assert log == made()


class Keeping(nn.Module):
    """Holds a tensor of each kind, and normalises."""

    def __init__(self):
        super().__init__()
        self.inner = nn.BatchNorm1d(WIDTH)
        self.weight = nn.Parameter(torch.ones(WIDTH))
        self.register_buffer("mean", torch.zeros(WIDTH))
        self.count, self.cache = torch.zeros(()), torch.zeros(())

    def forward(self, x):
        return self.inner(x) * self.weight


CHANGES = {
    "nothing": (lambda _: None, ()),
    "a parameter": (lambda m: m.weight.detach().mul_(2), ("weight",)),
    "a buffer": (lambda m: m.mean.add_(1), ("mean",)),
    "a buffer in its place": (lambda m: setattr(m, "mean", torch.ones(WIDTH)), ("mean",)),
    "an attribute": (lambda m: m.count.add_(1), ("count",)),
    "a cache that is made anew": (lambda m: setattr(m, "cache", torch.ones(())), ()),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_a_forward_has_written_is_named(change):
    """Running statistics and their counters apart, of which batch normalisations speak themselves."""
    write, names = CHANGES[change]
    model = Keeping()
    versions = Versions(model)
    model(torch.randn(ROWS, WIDTH))
    write(model)
    assert versions.changed() == names
