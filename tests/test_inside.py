"""What units take past their arguments is noticed, however it reaches them."""

import pickle

import pytest
import torch
from recording import ROWS, WIDTH, Layers, batch, faithful, marked, repeatable, rows
from torch import nn
from torch.nn import functional as F  # noqa: N812

from shardwright.errors import ShardwrightError
from shardwright.profiler.trace import checked_trace, trace

__all__ = ["repeatable"]


class Peer(nn.Module):
    """A unit that reads from another module, by a reference of its own."""

    def __init__(self, other, read):
        super().__init__()
        self.linear, self.others, self.read = nn.Linear(WIDTH, WIDTH), [other], read

    def forward(self, x):
        return self.read(self.linear(x), self.others[0])


class Chain(nn.Module):
    """Units one after another; the second one reads from the first."""

    def __init__(self, first, read):
        super().__init__()
        self.layers = nn.ModuleList([first, Peer(first, read)])

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)  # <--
        return x


@pytest.mark.parametrize(
    "read",
    [
        lambda x, other: F.linear(x, other.weight),
        lambda x, other: F.linear(x, weight=other.weight),
        lambda x, other: torch.stack([x, x * other.weight.sum()])[1],
        lambda x, other: x * torch.cat([other.weight, other.weight])[:1],
        lambda x, other: x + other.weight[0, 0].item(),
    ],
)
def test_a_neighbours_parameter_is_an_obstacle(read):
    """A unit that reads another's weight, as any argument of any function, is named, and the tie with it."""
    model = Chain(nn.Linear(WIDTH, WIDTH), read)
    capture = checked_trace(model, *batch(0))
    assert capture.obstacles == [f"{marked(model)}17 calls layers.1, which reads layers.0.weight of another module"]
    assert capture.ties == [("layers.0.weight", ("layers.0", "layers.1"))]


def test_a_question_about_a_neighbours_parameter_is_none():
    """To ask another module for its dtype, device or shape takes no tensor."""
    faithful(Chain(nn.Linear(WIDTH, WIDTH), lambda x, other: x.to(other.weight.dtype) * other.weight.shape[0]))


def test_a_neighbours_buffer_keeps_both_on_one_device():
    """A unit that reads another's running mean is named, and stays beside it, for a buffer is lent to nobody."""
    model = Chain(nn.BatchNorm1d(WIDTH), lambda x, other: x + other.running_mean)
    capture = checked_trace(model, *batch(0))
    assert capture.obstacles[0].endswith("calls layers.1, which reads layers.0.running_mean of another module")
    assert any({"layers.0.running_mean", "layers.1"} <= set(group) for group in capture.colocate)


class Box:
    """An object that two units hold."""

    kept = None


class Shared(nn.Module):
    """The first unit leaves a tensor in the box, the last takes it."""

    def __init__(self, leave):
        super().__init__()

        class Leaves(nn.Linear):
            def forward(self, x):
                y = super().forward(x)
                self.box.kept = leave(y)
                return y

        class Takes(nn.Linear):
            def forward(self, x):
                return super().forward(x) + self.box.kept

        self.layers = nn.ModuleList([Leaves(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), Takes(WIDTH, WIDTH)])
        self.layers[0].box = self.layers[2].box = Box()

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)  # <--
        return x


class _Doubled(torch.autograd.Function):
    @staticmethod
    def forward(_ctx, x):
        return x * 2

    @staticmethod
    def backward(_ctx, grad):
        return grad * 2


def _filled(x):
    table = torch.zeros(WIDTH)
    table[:2] = x[0, :2]
    return table


def _filled_by_view(x):
    table = torch.zeros(WIDTH)
    table[:2].copy_(x[0, :2])
    return table


@pytest.mark.parametrize(
    "leave",
    [
        lambda y: y,
        lambda y: y.detach(),
        torch.rand_like,
        lambda y: torch.tensor(y.sum().item()),
        lambda y: _filled(y.detach()),
        lambda y: _filled_by_view(y.detach()),
        lambda y: _Doubled.apply(y.detach()),
    ],
)
def test_a_tensor_that_units_share_by_an_object_is_an_obstacle(leave):
    """What one unit leaves in an object that another holds too is named; the two stay together."""
    model = Shared(leave)
    capture = checked_trace(model, *batch(0), train=False)
    (found,) = capture.obstacles
    assert found.startswith(marked(model))
    assert found.endswith("calls layers.2, which reads a tensor of layers.0 that is not among its arguments")
    assert ("layers.0", "layers.2") in capture.colocate
    assert model.layers[0].box.kept is None


def test_a_tensor_that_the_parent_leaves_on_a_unit_is_an_obstacle():
    """What glue made and a unit finds on itself is named."""

    class Adds(nn.Linear):
        def forward(self, x):
            return super().forward(x) + self.skip

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(WIDTH, WIDTH), Adds(WIDTH, WIDTH)])

        def forward(self, x):
            y = self.layers[0](x)
            self.layers[1].skip = x * 2
            return self.layers[1](y)

    (found,) = checked_trace(Model(), *batch(0)).obstacles
    assert found.endswith("calls layers.1, which reads a tensor of mul that is not among its arguments")


def test_what_a_unit_keeps_for_itself_is_fine():
    """A unit that is called twice may take up what its first call has left."""

    class Keeps(nn.Linear):
        last = None

        def forward(self, x):
            y = super().forward(x)
            y, self.last = (y if self.last is None else y + self.last), y
            return y

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([Keeps(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)])

        def forward(self, x):
            self.layers[0].last = None
            return self.layers[0](self.layers[1](self.layers[0](x)))

    assert checked_trace(Model(), *batch(0)).obstacles == []


class Table(nn.Module):
    """A unit that makes a table in its first call, for later ones too."""

    def __init__(self, make):
        super().__init__()
        self.make, self.table = make, None
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        if self.table is None:
            self.table = self.make(x)
        return self.linear(x) + self.table


class Reader(nn.Module):
    """Hands a unit's table to the next."""

    def __init__(self, make):
        super().__init__()
        self.layers = nn.ModuleList([Table(make), nn.Linear(WIDTH, WIDTH)])

    def forward(self, x):
        self.layers[0](x)
        return self.layers[1](x + self.layers[0].table)


def test_a_table_that_a_unit_makes_from_shapes_is_fine():
    """A bias that a unit computed from shapes alone, and keeps from the first call on, tells nothing of that call."""
    make = lambda x: torch.arange(WIDTH).cumsum(0) / WIDTH + torch.ones_like(x[:1])  # noqa: E731
    faithful(Reader(make))


def test_a_table_that_a_unit_makes_from_values_is_an_obstacle():
    """A bias that a unit computed from the first call's numbers is named."""
    for make in (lambda x: x.detach().mean(0), lambda x: torch.tensor(x.mean().item()), lambda _: torch.rand(WIDTH)):
        found = checked_trace(Reader(make), *batch(0)).obstacles
        assert found
        assert found[0].endswith("takes a tensor kept from an earlier call")


def test_an_attribute_that_the_parent_sets_is_caught():
    """A number that the forward puts on a unit is not there when the graph runs on the model as it was."""

    class Scaled(nn.Linear):
        scale = 1.0

        def forward(self, x):
            return super().forward(x) * self.scale

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(Scaled(WIDTH, WIDTH) for _ in range(3))

        def forward(self, x):
            for index, layer in enumerate(self.layers):
                layer.scale = 1 / (index + 2)
                x = layer(x)
            return x

    with pytest.raises(ShardwrightError, match=r"is not the model: .* handed on outside arguments"):
        checked_trace(Model(), *batch(0))


@pytest.mark.parametrize("early", [True, False])
def test_running_statistics_of_the_parent_stay_with_all_who_read_them(early):
    """F.batch_norm changes the statistics that it is given, though PyTorch does not count it as a change."""

    class Model(Layers):
        def __init__(self):
            super().__init__()
            self.register_buffer("mean", torch.zeros(WIDTH))
            self.register_buffer("var", torch.ones(WIDTH))

        def forward(self, x):
            y = self.layers[0](x)
            y = y + self.mean if early else y
            y = F.batch_norm(y, self.mean, self.var, training=self.training)
            return self.layers[1](y if early else y + self.mean)

    groups = trace(Model(), *batch(0)).colocate
    assert any({"mean", "add", "batch_norm"} <= set(group) for group in groups)
    assert not trace(Model(), *batch(0), train=False).colocate


class Returns(nn.Module):
    """Glue whose result is its operand, both of which are used afterwards."""

    def __init__(self, glue):
        super().__init__()
        self.glue = glue
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x):
        a = self.layers[0](x)
        b = self.layers[1](a)
        c = self.glue(a, b)
        return self.layers[2](b * c) + a * b


def _without_gradient(a, _):
    with torch.no_grad():
        return a.contiguous()


@pytest.mark.parametrize(
    "glue",
    [
        lambda a, b: a.type_as(b),
        lambda a, b: torch.broadcast_tensors(a, b)[0],
        lambda a, _: a.contiguous(),
        lambda a, _: F.dropout(a, 0.5, training=False),
        lambda a, _: a.real,
        _without_gradient,
    ],
)
def test_glue_that_returns_its_operand_makes_a_value_of_its_own(glue):
    """Who reads the operand depends on what made it, and not on glue that handed it through."""
    capture = faithful(Returns(glue))
    (product,) = [step for step in capture.steps if step.name == "mul_1"]
    assert set(product.reads) == {"layers.0", "layers.1"}


def test_glue_that_changes_its_operand_returns_it():
    """In place, the result is the operand, under its new name."""

    def glue(a, b):
        c = a.add_(b)
        assert c is a
        assert a.requires_grad_() is a
        return c

    capture = trace(Returns(glue), *batch(0))
    (product,) = [step for step in capture.steps if step.name == "mul_1"]
    assert "layers.0" not in product.reads


@pytest.mark.parametrize("layout", [torch.jagged, torch.strided])
def test_nested_tensors_between_units_are_refused(layout):
    """A nested tensor has no shape to plan with; the message says where it is made and what to do."""

    class Model(Layers):
        def forward(self, x):
            y = self.layers[0](x)
            ragged = torch.nested.as_nested_tensor([y[0], y[1]], layout=layout)
            return self.layers[1](torch.nested.to_padded_tensor(ragged, 0.0))

    with pytest.raises(ShardwrightError, match=r"has a nested tensor between .* pad it") as caught:
        trace(Model(), (torch.randn(ROWS, 3, WIDTH),))
    assert str(caught.value).startswith("test_inside.py:")


@pytest.mark.parametrize("layout", [torch.jagged, torch.strided])
def test_nested_tensors_inside_of_a_unit_are_fine(layout):
    """What a unit does with nested tensors is its own affair."""

    class Ragged(nn.Linear):
        def forward(self, x):
            ragged = torch.nested.as_nested_tensor([super().forward(x[0]), x[1]], layout=layout)
            return torch.nested.to_padded_tensor(ragged * 2, 0.0)

    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), Ragged(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH))
    capture = trace(model, (torch.randn(2, 3, WIDTH),))
    assert capture.obstacles == []
    assert len([step for step in capture.steps if step.kind == "unit"]) == 3


def test_one_tensor_given_twice_is_two_inputs():
    """A sample that is passed for both arguments does not make the graph read one of them only."""

    class Model(Layers):
        def forward(self, x, y):
            return self.layers[0](x) - self.layers[1](y)

    x = rows(0)
    model = Model()
    capture = trace(model, (x, x), train=False)
    other = (rows(1), rows(2))
    assert torch.equal(capture.module()(*other)[0], model(*other))


def test_a_unit_that_reads_past_its_arguments_can_run_alone():
    """What a profile times is the unit with what others had left on it; the model itself is as it was."""
    model = Shared(lambda y: y)
    capture = checked_trace(model, *batch(0))
    (call,) = [step.call for step in capture.steps if step.name == "layers.2"]
    alone = call.function
    assert alone is not model.layers[2]
    assert alone.weight is model.layers[2].weight
    assert model.layers[2].box.kept is None
    assert not alone._forward_hooks
    assert not alone._forward_pre_hooks
    assert not alone.box.kept.requires_grad
    pickle.dumps(vars(alone.box))
    first = model.layers[0](rows(0))
    expected = F.linear(call.args[0], alone.weight, alone.bias) + first
    assert torch.allclose(alone(*call.args), expected)
