"""The recorder on numbers that are read back, on chance, and on state: what no graph can hold is named."""

import copy
import random
import warnings
from collections import Counter, deque

import numpy as np
import pytest
import torch
from recording import ROWS, WIDTH, Layers, batch, faithful, marked, obstacles, repeatable, rows, with_mask
from torch import nn
from torch.nn import functional as F  # noqa: N812

from shardwright.errors import ShardwrightError
from shardwright.profiler.inputs import outputs_of
from shardwright.profiler.trace import checked_trace, trace

__all__ = ["repeatable"]

# Numbers that are read


class Reading(Layers):
    """Reads something of what the first layer gives, and uses it."""

    def __init__(self, read):
        super().__init__()
        self.read = read

    def forward(self, x, *rest):
        return self.layers[1](self.layers[0](x) * self.read(x, *rest))


def numpy_round_trip(x):
    return torch.from_numpy(x.detach().numpy() * 2)


READS = {
    "item": lambda x: x.sum().item(),
    "a branch": lambda x: 2 if x.sum() > 0 else 3,
    "and": lambda x: 2 if x.sum() > 0 and x.max() > 0 else 3,
    "int": lambda x: int(x.max()) + 2,
    "float": lambda x: float(x.max()),
    "tolist": lambda x: x[0].tolist()[0],
    "round": lambda x: range(8)[(x > 0).sum() % 8] + 1,
    "format": lambda x: len(f"{x.max():.3f}") + int(x.argmax().item()),
    "contained": lambda x: 2 if 0.5 in x else 3,
    "equal": lambda x: 2 if torch.equal(x[0], x[1]) else 3,
    "allclose": lambda x: 2 if torch.allclose(x[0], x[1]) else 3,
    "any": lambda x: 2 if (x > 100).any() else 3,
    "max of a list": lambda x: max(x[:, 0]).item(),
    "a comprehension": lambda x: sum(1 for row in x if row.sum() > 0) + 1,
    "numpy": lambda x: torch.from_numpy(x.detach().numpy() * 2),
    "nan check": lambda x: x.nan_to_num() if torch.isnan(x).any() else x,
    "multinomial": lambda x: torch.multinomial(x.exp(), 1).tolist()[0][0] + 1,
}


@pytest.mark.parametrize("name", list(READS))
def test_a_number_read_from_the_inputs_is_an_obstacle(name):
    """What gives Python a number that follows from the inputs is named with file and line."""
    read = READS[name]
    found = obstacles(Reading(read))
    assert all("depends on the inputs' values" in text for text in found)
    assert found[0].startswith(f"test_recorder_reads.py:{read.__code__.co_firstlineno}:"), found


SHAPED = {
    "a mask": lambda x: x[x > 0].sum(),
    "nonzero": lambda x: (x > 0).nonzero().float().sum(),
    "as tuple": lambda x: torch.nonzero(x > 0, as_tuple=True)[0].float().sum(),
    "where": lambda x: torch.where(x > 0)[0].float().sum(),
    "masked_select": lambda x: x.masked_select(x > 0).sum(),
    "masked_select by name": lambda x: torch.masked_select(input=x, mask=x > 0).sum(),
    "unique": lambda x: x.round().unique().sum(),
    "rows by mask": lambda x: x[x[:, 0] > 0, 1:].sum(),
    "repeated": lambda x: x[0].repeat_interleave(x[0].abs().long()).sum(),
    "repeated by name": lambda x: torch.repeat_interleave(x[0], repeats=x[0].abs().long()).sum(),
    "repeated indices": lambda x: torch.repeat_interleave(x[0].abs().long()).float().sum(),
    "one_hot": lambda x: F.one_hot(x[0].abs().long()).sum(),
    "packed": lambda x: nn.utils.rnn.pack_padded_sequence(
        x.unsqueeze(2), x[:, 0].abs().long() + 1, batch_first=True, enforce_sorted=False
    ).data.sum(),
}


@pytest.mark.parametrize("name", list(SHAPED))
def test_a_shape_that_follows_from_the_inputs_is_an_obstacle(name):
    """A tensor whose size depends on numbers is named with file and line."""
    read = SHAPED[name]
    found = obstacles(Reading(read))
    assert found[0].startswith(f"test_recorder_reads.py:{read.__code__.co_firstlineno}:"), found
    assert "whose shape depends on the inputs' values" in found[0]


def test_an_assignment_by_mask_is_none():
    """Writing numbers where a mask is true changes no shape."""

    class Model(Layers):
        def forward(self, x):
            y = self.layers[0](x).clone()
            y[x > 0] = 0.0
            return self.layers[1](y + torch.where(x > 0, x, -x))

    faithful(Model())


def test_a_number_read_from_parameters_is_an_obstacle():
    """A scale that is read to Python would stay at its first value while it is trained."""

    class Model(Layers):
        def forward(self, x):
            return self.layers[1](self.layers[0](x) * self.layers[0].weight.norm().item())  # <--

    model = Model()
    (found,) = obstacles(model)
    assert found.startswith(marked(model))
    assert found.endswith("that depends on parameters")


FROM_SHAPES = {
    "a causal mask": lambda x: 2 if (torch.arange(len(x))[:, None] >= torch.arange(len(x))).all() else 3,
    "a length": lambda x: torch.tensor(x.shape[0]).item(),
    "ones like": lambda x: 2 if torch.ones_like(x).sum() > 3 else 3,
    "a constant": lambda _: int(torch.zeros(3).sum()) + 2,
    "nonzero": lambda x: (torch.arange(len(x)) > 1).nonzero().float().sum(),
    "rows by position": lambda x: x[torch.arange(len(x)) > 1].sum(),
    "selected": lambda x: x.masked_select(torch.eye(*x.shape) > 0).sum(),
    "repeated": lambda x: x.repeat_interleave(torch.arange(len(x)), 0).sum(),
    "repeated to a size": lambda x: x[0].repeat_interleave((x[0] * 0).long() + 1, output_size=WIDTH).sum(),
    "one-hot": lambda x: F.one_hot((x[0] > 0).long(), 2).sum() + F.one_hot((x[0] > 0).long(), num_classes=2).sum(),
    "a size": lambda x: x.numel() + x.dim() + x.stride(0) + len(x) + x.element_size(),
    "a dtype": lambda x: 2 if x.dtype == torch.float32 and x.is_floating_point() and not x.is_cuda else 3,
    "no position": lambda x: torch.linspace(0, 1, len(x)).tolist()[1],
}


@pytest.mark.parametrize("name", list(FROM_SHAPES))
def test_a_number_that_follows_from_shapes_is_no_obstacle(name):
    """What is the same for all inputs of these shapes may be read freely, and needs no guard."""
    assert faithful(Reading(FROM_SHAPES[name])).guards == []


# Guards


class Masked(Layers):
    """Skips the mask when it masks nothing, as many models do."""

    def forward(self, x, mask):
        y = self.layers[0](x)
        if not mask.all():  # <--
            y = y * mask[:, None]
        return self.layers[1](y)


def test_a_read_of_a_mask_becomes_a_guard():
    """A read of an integer input is checked in every replay: inputs that give another answer are refused with file and
    line.
    """
    ones = torch.ones(ROWS, dtype=torch.bool)
    model = Masked()
    capture = faithful(model, with_mask(ones))
    (guard,) = capture.guards
    assert guard.startswith(f"__bool__ at {marked(model)}")
    assert guard.endswith(" gives True")
    holes = ones.clone()
    holes[1] = False
    with pytest.raises(ShardwrightError, match=f"{marked(model)}.* for these inputs .* for the sample inputs"):
        capture.module()(rows(1), holes)


def test_a_guard_holds_for_other_inputs_that_give_the_same():
    """Captured with holes in the mask, other holes are fine and none at all is refused."""
    holes = torch.tensor([1, 1, 0, 1])
    capture = faithful(Masked(), lambda seed: ((rows(seed), holes.roll(seed)), {}))
    with pytest.raises(ShardwrightError, match="profile with inputs like these"):
        capture.module()(rows(1), torch.ones(ROWS, dtype=torch.long))


def test_guards_compare_lists_and_numbers():
    """Lengths that are read as a list, and a largest length, are held to what they were."""

    class Model(Layers):
        def forward(self, x, lengths):
            longest = int(lengths.max())
            parts = x.split(lengths.sort().values.tolist())
            return self.layers[1](self.layers[0](torch.stack([part.sum(0) for part in parts]) * longest))

    capture = faithful(Model(), lambda seed: ((rows(seed), torch.tensor([3, 1]).roll(seed)), {}))
    assert [guard.partition(" at ")[0] for guard in capture.guards] == ["__int__", "tolist"]
    assert [guard.rpartition(" gives ")[2] for guard in capture.guards] == ["3", "[1, 3]"]


def test_a_guard_that_comes_out_differently_is_an_obstacle():
    """A number that the second input does not give is named as one that follows from the inputs."""

    class Model(Layers):
        def forward(self, x, lengths):
            first = int(lengths[0])  # <--
            return self.layers[1](self.layers[0](x[:first]).sum(0))

    model = Model()
    (found,) = obstacles(model, with_mask(torch.tensor([3, 2, 4, 1])))
    assert found.startswith(marked(model))
    assert "depends on the inputs' values" in found


def test_a_guard_that_the_second_input_never_meets_is_an_obstacle():
    """A branch that leads to further reads differs in their number, and is named."""

    class Model(Layers):
        def forward(self, x, ids):
            y = self.layers[0](x)
            if ids[0] == 3 and ids.sum() == 10:
                y = y * 2
            return self.layers[1](y)

    assert obstacles(Model(), with_mask(torch.tensor([3, 2, 4, 1])))


def test_a_floating_number_from_a_mask_is_an_obstacle():
    """Only whole numbers can be held to: a share of masked positions is an obstacle."""

    class Model(Layers):
        def forward(self, x, mask):
            return self.layers[1](self.layers[0](x) * mask.float().mean().item())  # <--

    model = Model()
    (found,) = obstacles(model, with_mask(torch.ones(ROWS, dtype=torch.bool)))
    assert found.startswith(marked(model))


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
