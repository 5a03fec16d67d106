"""Backwards in two parts: autograd's own gradients are the oracle, and what is computed when is seen operation by
operation."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from shardwright.profiler.measuring.parted import edges_of, inputs_first


def differs(model, inputs, outputs, gradients):
    """What is not as autograd has it: a gradient of an input, or of a parameter that had one before."""
    parameters = list(model.parameters())
    wanted = torch.autograd.grad(outputs, [*inputs, *parameters], gradients, retain_graph=True, allow_unused=True)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    of_inputs, left = inputs_first(outputs, gradients, edges_of(inputs), parameters)
    left.finish()
    found = [*of_inputs, *(parameter.grad - 1 for parameter in parameters)]
    own = [0 * p if g is None else g for p, g in zip(parameters, wanted[len(inputs) :], strict=True)]
    wanted = [*wanted[: len(inputs)], *own]
    return [
        position
        for position, (one, other) in enumerate(zip(found, wanted, strict=True))
        if (one is None) != (other is None) or (one is not None and not torch.allclose(one, other, atol=1e-5))
    ]


def parted(model, *shapes):
    """As :func:`differs`, of a call with random inputs."""
    torch.manual_seed(0)
    inputs = [torch.randn(shape, requires_grad=True) for shape in shapes]
    made = model(*inputs)
    outputs = [t for t in (made if isinstance(made, tuple) else (made,)) if t.requires_grad]
    return differs(model, inputs, outputs, [torch.randn_like(t) for t in outputs])


class Twice(nn.Module):
    """A layer that is used twice in a row, with another between; its output is a view."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        return self.a(torch.tanh(self.b(torch.tanh(self.a(x))))).view(-1, 2)


class Apart(nn.Module):
    """Outputs that depend on parameters alone, on an input as it is, and on a parameter as it is."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(8, 8)
        self.e, self.f = nn.Parameter(torch.randn(8)), nn.Parameter(torch.randn(8))

    def forward(self, x):
        y = torch.tanh(self.e * self.f)
        return self.a(x) + y, y, x, self.f, (y * self.e).sum()


class Shared(nn.Module):
    """Layers side by side that share a weight and have a bias each, the biases named first."""

    def __init__(self):
        super().__init__()
        self.one, self.other, self.weight = (nn.Parameter(torch.randn(s)) for s in ((8,), (8,), (8, 8)))

    def forward(self, x, y):
        return nn.functional.linear(x, self.weight, self.one), nn.functional.linear(y, self.weight, self.other)


class Cross(nn.Module):
    """Attention whose weights of queries, keys and values are one parameter, cut in three."""

    def __init__(self):
        super().__init__()
        self.inner = nn.MultiheadAttention(8, 2)

    def forward(self, queries, keys):
        return self.inner(queries, keys, keys + 1)[0]


class Recurrent(nn.Module):
    """A cell that is called for each row, beside a kernel that has them all in one node."""

    def __init__(self):
        super().__init__()
        self.cell, self.whole = nn.GRUCell(8, 8), nn.LSTM(8, 8)

    def forward(self, x):
        state = torch.zeros(x.shape[1], 8)
        for row in x:
            state = self.cell(row, state)
        return self.whole(x)[0] + state


class Checkpointed(nn.Module):
    """A layer that is computed anew in each part."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(8, 8), nn.Sigmoid(), nn.Linear(8, 8))

    def forward(self, x):
        return checkpoint(self.inner, x, use_reentrant=False)


class Hooked(nn.Module):
    """Tensors with hooks that change gradients: where a layer begins, off the way, and at the output."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.scale = nn.Linear(8, 8), nn.Linear(8, 8), nn.Parameter(torch.randn(8))

    def forward(self, x):
        hidden, scale = self.a(x), torch.exp(self.scale)
        output = self.b(torch.tanh(hidden)) * scale
        for factor, tensor in ((3, hidden), (5, scale), (7, output)):
            tensor.register_hook(lambda gradient, factor=factor: factor * gradient)
        return output


class Convolutions(nn.Sequential):
    """With batch statistics, groups, and a change in place."""

    def __init__(self):
        inner = nn.Conv2d(8, 8, 3, groups=2)
        super().__init__(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(inplace=True), inner, nn.GroupNorm(2, 8))


@pytest.mark.parametrize(
    ("kind", "shapes"),
    [
        (Twice, [(4, 8)]),
        (Apart, [(4, 8)]),
        (Shared, [(4, 8), (4, 8)]),
        (Cross, [(3, 2, 8), (3, 2, 8)]),
        (Recurrent, [(3, 2, 8)]),
        (Checkpointed, [(4, 8)]),
        (Hooked, [(4, 8)]),
        (Convolutions, [(2, 3, 9, 9)]),
    ],
)
def test_both_parts_make_the_gradients_of_one_backward(kind, shapes):
    """Inputs and parameters alike, added to what parameters had."""
    assert parted(kind(), *shapes) == []


class Program(nn.Module):
    """A program of sums, products and layers over a few inputs and parameters, any of which may be used often."""

    def __init__(self, inputs, steps, outputs):
        super().__init__()
        self.weights = nn.ParameterList(nn.Parameter(torch.rand(3, 3)) for _ in range(3))
        self.steps, self.outputs, self.count = steps, outputs, inputs

    def forward(self, *inputs):
        values = [*inputs, *self.weights]
        for what, one, other in self.steps:
            a, b = values[one % len(values)], values[other % len(values)]
            made = {"add": (a + b) / 2, "mul": a * b, "mm": a @ b / 3, "tanh": torch.tanh(a), "t": a.T}
            values.append(made[what])
        return tuple(values[number % len(values)] for number in self.outputs)


steps = st.tuples(st.sampled_from(["add", "mul", "mm", "tanh", "t"]), st.integers(0, 30), st.integers(0, 30))


@given(
    st.integers(1, 2), st.lists(steps, min_size=1, max_size=12), st.lists(st.integers(0, 30), min_size=1, max_size=3)
)
def test_random_programs(count, steps, outputs):
    """Whatever uses what, and whatever is returned."""
    torch.manual_seed(0)
    model = Program(count, steps, outputs).double()
    inputs = [torch.rand(3, 3, dtype=torch.float64, requires_grad=True) for _ in range(count)]
    made = model(*inputs)
    assert differs(model, inputs, made, [torch.randn_like(t) for t in made]) == []


class Products(TorchDispatchMode):
    """Counts products of matrices."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
        return func(*args, **(kwargs or {}))


def products(function, *args):
    with Products() as counter:
        result = function(*args)
    return counter.count, result


def test_nothing_is_computed_twice():
    """Of two layers each part has two products, one a layer; what comes in between the layers is held, and no more."""
    model, x = nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 4)), torch.randn(2, 8, requires_grad=True)
    output = model(x)
    first, (_, left) = products(inputs_first, [output], None, edges_of([x]), model.parameters())
    assert sorted(t.numel() for t in left.held) == [8, 12]
    second, _ = products(left.finish)
    assert (first, second) == (2, 2)


def test_a_weight_used_twice_in_a_row_is_done_in_the_first_part():
    """From its second use the way leads to the first: the product between them is not made again."""
    model, x = Twice(), torch.randn(2, 8, requires_grad=True)
    output = model(x)
    first, (_, left) = products(inputs_first, [output], None, edges_of([x]), model.parameters())
    second, _ = products(left.finish)
    assert (first, second) == (3 + 2, 1)


def test_without_an_input_all_is_left_for_the_second_part():
    """As on a first stage, whose inputs have no gradient; a loss is taken with a gradient of one."""
    model = nn.Linear(8, 4)
    loss = model(torch.randn(2, 8)).sum()
    first, (of_inputs, left) = products(inputs_first, [loss], None, [], model.parameters())
    assert (first, of_inputs) == (0, ())
    left.finish()
    assert torch.equal(model.bias.grad, torch.full((4,), 2.0))


def test_a_parameter_that_is_not_trained_or_not_used_is_left_alone():
    """And so is one that has no part in what is returned."""
    model = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8).requires_grad_(False), nn.Linear(8, 8)])
    x = torch.randn(2, 8, requires_grad=True)
    _, left = inputs_first([model[1](model[0](x))], None, edges_of([x]), model.parameters())
    left.finish()
    assert [parameter.grad is not None for parameter in model.parameters()] == [True, True, *[False] * 4]
