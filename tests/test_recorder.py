"""The recorder on hostile models: what it captures faithfully, and what it says that it cannot."""

import copy
import dataclasses
import enum
import inspect
import math
import random
import threading
import warnings
from collections import OrderedDict, namedtuple
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812
from torch.utils.checkpoint import checkpoint

from shardwright.errors import ShardwrightError
from shardwright.profiler.inputs import outputs_of
from shardwright.profiler.trace import checked_trace, trace
from shardwright.profiler.unitgraph import Context

WIDTH, ROWS = 6, 4


@pytest.fixture(autouse=True)
def repeatable():
    """Weights are the same in every run, and small models are quicker on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield
    torch.set_num_threads(threads)


class Layers(nn.Module):
    """Linear layers, which every test wires in its own way."""

    def __init__(self, count=2):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(count))


def rows(seed):
    """A batch."""
    return torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(seed))


def batch(seed):
    return (rows(seed),), {}


def with_mask(mask):
    """A batch and the same mask with it, whatever the seed."""
    return lambda seed: ((rows(seed), mask.clone()), {})


def marked(model):
    """Where the line is that ends in an arrow, as ``file:line:``."""
    lines, first = inspect.getsourcelines(type(model))
    (offset,) = [index for index, line in enumerate(lines) if line.rstrip().endswith("# <--")]
    return f"test_recorder.py:{first + offset}:"


def results(run, model, *, train, places=None):
    """What ``run`` returns and the gradients that its floating outputs give the model, from a fixed seed."""
    torch.manual_seed(5)
    model.zero_grad()
    with torch.set_grad_enabled(train):
        outputs = outputs_of(run())
        outputs = outputs if places is None else [outputs[place] for place in places]
    trained = [t for t in outputs if t.requires_grad]
    if trained:
        torch.stack([t.float().square().sum() for t in trained]).sum().backward()
    gradients = {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}
    return [t.detach() for t in outputs], gradients


def assert_replays(capture, model, args, kwargs, *, train=True):
    """On these inputs, the graph gives the model's own outputs, bit for bit, and its gradients."""
    inputs = [t.clone() for t in outputs_of((args, kwargs))]
    expected = results(lambda: model(*args, **kwargs), model, train=train, places=capture.output_places)
    found = results(lambda: capture.module()(*inputs), model, train=train)
    assert len(found[0]) == len(expected[0])
    for one, other in zip(found[0], expected[0], strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)
    for name, gradient in expected[1].items():
        other = found[1][name]
        assert (gradient is None) == (other is None), name
        assert gradient is None or torch.allclose(gradient, other, rtol=1e-5, atol=1e-6), name


def faithful(model, make=batch, *, train=True, **options):
    """The capture of a model that a graph can hold: without obstacles, and right on inputs that it never saw."""
    capture = checked_trace(model, *make(0), train=train, **options)
    assert capture.obstacles == []
    model.train(train)
    assert_replays(capture, model, *make(1), train=train)
    return capture


def obstacles(model, make=batch, *, train=True):
    """The obstacles of a model that a graph cannot hold."""
    found = checked_trace(model, *make(0), train=train).obstacles
    assert found
    return found


def step(capture, name):
    (found,) = [step for step in capture.steps if step.name == name]
    return found


# Arguments and results


@dataclasses.dataclass
class State:
    """What some models hand from layer to layer."""

    hidden: Any
    scale: Any = None
    name: str = ""


@dataclasses.dataclass
class Output(OrderedDict):
    """A mapping that is a dataclass too, as transformers' ModelOutput."""

    hidden: Any = None
    extra: Any = None

    def __post_init__(self):
        for field in dataclasses.fields(self):
            if getattr(self, field.name) is not None:
                self[field.name] = getattr(self, field.name)

    def __reduce__(self):
        return type(self), tuple(getattr(self, field.name) for field in dataclasses.fields(self))


Pair = namedtuple("Pair", ["hidden", "extra"])  # the untyped kind, as models have it


class Mix(nn.Module):
    """A unit that takes its tensors by keyword and nested."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x, *rest, pairs=(), state=None, table=None, offset=None):
        total = self.linear(x) + sum(rest)
        for left, right in pairs:
            total = total + left * right
        if state is not None:
            total = total + state.hidden * state.scale["by"]
        if table is not None:
            total = total + table[3] * table["deep"][0]
        return total if offset is None else total + offset


def test_keyword_and_nested_arguments_of_units():
    """Tensors reach a unit by position, keyword, in lists of tuples, in dicts and in dataclasses."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([Mix(), Mix()])

        def forward(self, x):
            y = self.layers[0](x, x * 2, 3, pairs=[(x, x + 1), (2, x)], state=State(x, {"by": x}), offset=None)
            return self.layers[1](y, table={3: x, "deep": [y]}, offset=x.mean())

    capture = faithful(Model())
    assert {"layers.0", "input_0", "mean"} <= set(step(capture, "layers.1").reads)


def test_nested_inputs_of_the_model():
    """The model's own inputs may be nested and named; the graph takes their tensors in the order they are written."""

    class Model(Layers):
        def forward(self, x, *, pair, state, flag="on"):
            y = self.layers[0](x) + pair["left"][0] * 2 + pair["right"]
            return self.layers[1](y * state.hidden) if flag == "on" else y

    def make(seed):
        pair = {"left": (rows(seed + 20),), "right": rows(seed + 30)}
        return (rows(seed),), {"pair": pair, "state": State(rows(seed + 40)), "flag": "on"}

    capture = faithful(Model(), make)
    assert len(capture.input_names) == 4


RESULTS = {
    "a tuple": (lambda y, z: (y, z), 2),
    "a list with None": (lambda y, z: [None, y, [z, "text"]], 2),
    "a dict": (lambda y, z: {"hidden": y, 7: (z,)}, 2),
    "a namedtuple": (lambda y, z: Pair(y, {"deep": z}), 2),
    "a dataclass": (lambda y, z: State(y, [z]), 2),
    "a ModelOutput": (Output, 2),
    "a ModelOutput without all": (lambda y, z: Output(extra=y + z), 1),
    "one tensor": (lambda y, z: y * z, 1),
    "the same tensor twice": (lambda y, z: (y, z, y), 3),
}


@pytest.mark.parametrize("form", list(RESULTS))
def test_results_of_units_and_of_the_model(form):
    """Whatever a unit returns its tensors in, the parent finds them there, and so with what the model returns."""
    wrap, count = RESULTS[form]

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(WIDTH, WIDTH)

        def forward(self, x):
            return wrap(self.linear(x), x * 3)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([Two(), nn.Linear(WIDTH, WIDTH)])

        def forward(self, x):
            tensors = outputs_of(self.layers[0](x))
            return wrap(self.layers[1](sum(tensors)), tensors[-1])

    assert len(faithful(Model()).outputs) == count


class Mode(enum.Enum):
    """An option as an enumeration."""

    PLAIN = 1
    DOUBLE = 2


def test_arguments_that_are_no_tensors():
    """None, text, enumerations, ranges, dtypes, functions and sizes are passed on as they are."""

    class Picky(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(WIDTH, WIDTH)

        def forward(self, x, mask, mode, part, dtype, function, shape, where=..., *, sizes, text=None):
            assert mask is None
            assert text == "none"
            assert mode is Mode.DOUBLE
            x = function(self.linear(x)).reshape(shape).to(dtype)[where]
            return x[:, part] * 2 * len(sizes)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([Picky(), nn.Linear(3, 3)])

        def forward(self, x, mask=None):
            y = self.layers[0](
                x, mask, Mode.DOUBLE, slice(1, 4), torch.float32, F.gelu, x.shape, ..., sizes={1, 2}, text="none"
            )
            return self.layers[1](y)

    faithful(Model(), lambda seed: ((rows(seed), None), {}))


class Takes(nn.Linear):
    """A unit that takes whatever ``look`` knows how to look into."""

    look = staticmethod(lambda value: value)

    def forward(self, value):
        return super().forward(self.look(value))


FORMS = {
    "a namedtuple": (lambda x: Pair(x, {"deep": x * 2}), lambda v: v.hidden + v.extra["deep"]),
    "a sorted tensor": (lambda x: x.sort(-1), lambda v: v.values + v.indices),
    "a mapping of tuples": (lambda x: {(1, 2): x}, lambda v: v[1, 2]),
    "an ordered dict": (lambda x: OrderedDict(x=x), lambda v: next(iter(v.values()))),
    "a dataclass": (lambda x: State(x, [x]), lambda v: v.hidden * v.scale[0]),
    "a ModelOutput": (Output, lambda v: v["hidden"] + v.hidden),
    "a packed sequence": (
        lambda x: nn.utils.rnn.pack_padded_sequence(x[:, None], [1] * len(x), batch_first=True),
        lambda v: v.data,
    ),
}


@pytest.mark.parametrize("form", list(FORMS))
def test_forms_of_arguments(form):
    """Whatever the parent wraps tensors in for a unit, the unit gets it in the replay, of the same class."""
    wrap, look = FORMS[form]

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(WIDTH, WIDTH), Takes(WIDTH, WIDTH)])
            self.layers[1].look = look

        def forward(self, x):
            return self.layers[1](wrap(self.layers[0](x)))

    assert "input_0" not in step(faithful(Model()), "layers.1").reads


def test_a_lock_among_the_arguments():
    """An object that holds something uncopyable is rebuilt around it."""

    class Session:
        def __init__(self, hidden):
            self.hidden, self.lock = hidden, threading.Lock()

    class Careful(nn.Linear):
        def forward(self, x, session):
            with session.lock:
                return super().forward(x) + session.hidden

    class Model(nn.Sequential):
        def forward(self, x):
            session = Session(self[0](x))
            return self[1](x, session)

    faithful(Model(nn.Linear(WIDTH, WIDTH), Careful(WIDTH, WIDTH)))


def test_what_cannot_be_made_anew_is_an_obstacle():
    """An object that refuses to be copied cannot be passed on with other tensors: it is named by its class."""

    class Only:
        def __init__(self, hidden):
            self.hidden = hidden

        def __deepcopy__(self, memo):
            raise TypeError("there is one of me")

    class Model(nn.Sequential):
        def forward(self, x):
            return self[1](Only(self[0](x)))  # <--

    model = Model(nn.Linear(WIDTH, WIDTH), Takes(WIDTH, WIDTH))
    model[1].look = lambda only: only.hidden
    (found,) = obstacles(model)
    assert found.startswith(marked(model))
    assert "passes a Only, which cannot be made anew" in found


# Glue


def test_in_place_glue():
    """Writes by operator, index, method and ``out=``, and through views, come out as the model's."""

    class Model(Layers):
        def forward(self, x):
            y = self.layers[0](x).clone()
            y += x
            y[:, 0] = 0.5
            y[:, 1:3].mul_(2)
            y.masked_fill_(x > 1, 0.0)
            y.index_add_(0, torch.tensor([0, 2]), x[:2])
            y.relu_()
            out = torch.empty_like(x)
            torch.mul(x, 2, out=out)
            canvas = torch.zeros(x.shape[0], 2 * WIDTH)
            canvas[:, :WIDTH] = y
            canvas[:, WIDTH:].copy_(out)
            return self.layers[1](canvas.unfold(1, WIDTH, WIDTH).sum(1))

    faithful(Model())


def test_an_input_changed_in_place():
    """A forward that writes into its input is captured, writes included."""

    class Model(Layers):
        def forward(self, x):
            x.mul_(2)
            y = x + 1
            x[:, 0] = 0
            return self.layers[1](self.layers[0](x) + y), x

    faithful(Model())


def test_a_unit_that_changes_its_input_in_place():
    """What reads the tensor afterwards, or a view of it, reads the changed one, and stays with the unit."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(WIDTH, WIDTH), nn.ReLU(inplace=True), nn.Linear(WIDTH, WIDTH)])

        def forward(self, x):
            y = self.layers[0](x) * 1
            view = y[:, :3]
            self.layers[1](y)
            return self.layers[2](y) + view.sum()

    capture = faithful(Model())
    assert any({"layers.1", "sum_1"} <= set(group) for group in capture.colocate)


def test_views():
    """Slices, transpositions, properties and expansions are glue like any other."""

    class Model(Layers):
        def forward(self, x):
            y = self.layers[0](x)
            left, right = y.view(ROWS, 2, 3).unbind(1)
            first, *rest = y.split(2, dim=-1)
            z = torch.cat([left.T.T, right.mT.mT], -1) + y.narrow(0, 0, 1).expand(ROWS, -1)
            z = z + y.as_strided((ROWS, WIDTH), (WIDTH, 1)) + y[None, ..., ::1][0] + y.t().contiguous().t()
            return self.layers[1](z), first, rest, [row for row in y], y.detach()  # noqa: C416

    faithful(Model())


def test_factory_functions():
    """Tensors made from shapes, in every way, are steps of the graph or constants."""

    class Model(Layers):
        def forward(self, x):
            length = x.size(0)
            position = torch.arange(length, device=x.device).unsqueeze(1)
            table = torch.exp(torch.arange(0, WIDTH, 2, dtype=x.dtype) * (-math.log(100.0) / WIDTH))
            angles = position * table
            code = torch.stack([angles.sin(), angles.cos()], -1).flatten(1)
            causal = torch.full((length, length), float("-inf")).triu(1)
            ones = x.new_ones(length, 1) + torch.ones_like(x) + torch.eye(length, WIDTH) + torch.tensor([x.shape[1]])
            y = self.layers[0](x + code + ones + torch.linspace(0, 1, WIDTH) + torch.Tensor([1.0]))
            return self.layers[1]((causal + y @ y.T).softmax(-1) @ y)

    faithful(Model())


def test_parameters_and_buffers_of_the_parent():
    """A class token, a table and a scale that the forward uses itself are read from the model and trained."""

    class Model(Layers):
        def __init__(self):
            super().__init__()
            self.token = nn.Parameter(torch.randn(1, WIDTH))
            self.table = nn.Parameter(torch.randn(10, WIDTH))
            self.scales = nn.ParameterList([torch.ones(WIDTH), torch.rand(WIDTH)])
            self.register_buffer("offset", torch.rand(WIDTH))

        def forward(self, x):
            x = torch.cat([self.token, x])
            x = x + self.table[: len(x)] + F.embedding(torch.arange(len(x)), self.table)
            return self.layers[1](self.layers[0](x) * self.scales[1] + self.offset)

    model = Model()
    capture = faithful(model)
    kinds = {s.name: s.type for s in capture.steps if s.kind == "parameter"}
    assert {"token": "parameter", "scales.1": "parameter", "offset": "buffer"}.items() <= kinds.items()
    model.offset.add_(1)  # it is read from the model, not remembered
    assert_replays(capture, model, *batch(2))


def test_parameters_made_anew():
    """Weights that the forward computes from parameters are computed again in every call."""

    class Model(Layers):
        def __init__(self):
            super().__init__()
            self.magnitude = nn.Parameter(torch.rand(WIDTH, 1))

        def forward(self, x):
            weight = self.magnitude * F.normalize(self.layers[0].weight)
            return self.layers[1](F.linear(self.layers[0](x), weight))

    faithful(Model())


def test_parametrized_weights():
    """A weight that is computed when it is read, by a module of its own, is computed again in every call."""

    class Model(Layers):
        def __init__(self):
            super().__init__()
            nn.utils.parametrizations.weight_norm(self.layers[0])

        def forward(self, x):
            return self.layers[1](F.linear(self.layers[0](x), self.layers[0].weight))

    faithful(Model())


def test_copies_of_tensors():
    """A tensor that the forward clones or deep-copies is followed."""

    class Model(Layers):
        def forward(self, x):
            return self.layers[1](self.layers[0](copy.deepcopy(x) + x.clone()))

    faithful(Model())


def test_gradients_changed_by_a_hook_are_an_obstacle():
    """A hook on a tensor's gradient is no step of the forward: it is named."""

    class Model(Layers):
        def forward(self, x):
            y = self.layers[0](x)
            y.register_hook(lambda grad: grad * 2)  # <--
            return self.layers[1](y)

    model = Model()
    (found,) = obstacles(model)
    assert found.startswith(marked(model))


def test_a_gradient_taken_in_the_forward():
    """A force, the derivative of an energy, is glue."""

    class Model(Layers):
        def forward(self, x):
            x = x.detach().requires_grad_()
            energy = self.layers[1](self.layers[0](x).tanh()).square().sum()
            (force,) = torch.autograd.grad(energy, x, create_graph=True)
            return energy, force

    faithful(Model())


# Units


def test_shared_units():
    """A unit that is called again, or reached by two names, is one unit with several steps."""

    class Model(Layers):
        def __init__(self):
            super().__init__()
            self.again = nn.ModuleList([self.layers[0]])

        def forward(self, x):
            return self.again[0](self.layers[1](self.layers[0](x)))

    capture = faithful(Model())
    assert [s.name for s in capture.steps if s.kind == "unit"] == ["layers.0", "layers.1", "layers.0#2"]
    assert ("layers.0", "layers.0#2") in capture.colocate


def test_a_loop_over_one_unit():
    """A recurrence over a fixed number of steps is as many steps."""

    class Model(Layers):
        def forward(self, x):
            state = torch.zeros_like(x[0])
            for row in x:
                state = self.layers[0](row + state).tanh()
            return self.layers[1](state)

    assert sum(s.unit == "layers.0" for s in faithful(Model()).steps) == ROWS


def test_a_forward_called_past_its_hooks():
    """A unit whose forward is called by name is glue, which reads the unit's parameters."""

    class Model(Layers):
        def forward(self, x):
            return self.layers[1](self.layers[0].forward(x))

    capture = faithful(Model())
    assert [s.name for s in capture.steps if s.kind == "unit"] == ["layers.1"]
    assert {"layers.0.weight", "layers.0.bias"} <= {s.name for s in capture.steps}


def test_units_with_hooks_of_their_own():
    """What the user's hooks do to a unit's arguments, results and gradients happens once, in the replay too."""

    class Model(Layers):
        def forward(self, x):
            return self.layers[1](self.layers[0](x) * 2)

    model = Model()
    model.layers[0].register_forward_pre_hook(lambda _, args: (args[0] + 1,))
    model.layers[0].register_forward_hook(lambda _, args, result: result * args[0])
    model.layers[1].register_full_backward_hook(lambda _, grads, __: (grads[0] * 3,))
    faithful(model)


def test_a_unit_that_calls_another_in_secret_is_an_obstacle():
    """A unit inside another that neither holds it nor was handed it would leave its device: it is named."""

    class Calls(nn.Linear):
        other = ()

        def forward(self, x):
            return self.other[0](super().forward(x))  # <--

    class Model(nn.Sequential):
        def forward(self, x):
            return self[0](x)

    model = Model(Calls(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH))
    model[0].other = (model[1],)
    found = obstacles(model)
    assert found == [f"{found[0].split()[0]} calls 1 inside 0, which does not hold it"]
    assert found[0].startswith(marked(model[0]))


def test_a_unit_called_by_a_custom_function_is_an_obstacle():
    """A custom autograd function that runs a unit, as reversible networks have it, hides the unit: it is named."""

    class Runs(torch.autograd.Function):
        @staticmethod
        def forward(_ctx, x, unit):
            return unit(x)

        @staticmethod
        def backward(_ctx, grad):
            return grad, None

    class Model(Layers):
        def forward(self, x):
            return Runs.apply(self.layers[0](x), self.layers[1])

    (found,) = obstacles(Model())
    assert found.startswith("test_recorder.py:")
    assert "calls layers.1 inside Runs.apply" in found


def test_a_unit_that_fails_and_is_caught():
    """A forward that tries a unit and goes on without it is refused, with the unit's name."""

    class Model(Layers):
        def forward(self, x):
            try:
                return self.layers[0](x, mask=None)
            except TypeError:
                return self.layers[1](x)

    with pytest.raises(ShardwrightError, match=r"unit layers\.0 of Model failed and the forward caught its error"):
        trace(Model(), (rows(0),))


def test_a_unit_that_calls_what_it_holds_or_is_handed():
    """A unit that two parents share, or that is passed to another, may be called inside it; they are tied."""

    class Holds(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return self.inner(x) * 2

    class Handed(nn.Linear):
        def forward(self, x, inner):
            return inner(super().forward(x))

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            inner = nn.Linear(WIDTH, WIDTH)
            self.layers = nn.ModuleList([inner, Holds(inner), Handed(WIDTH, WIDTH)])

        def forward(self, x):
            return self.layers[2](self.layers[1](self.layers[0](x)), inner=self.layers[0])

    units = ("layers.0", "layers.1", "layers.2")
    assert [(name, set(steps)) for name, steps in faithful(Model()).ties] == [
        ("layers.0.weight", set(units)),
        ("layers.0.bias", set(units)),
    ]


def test_units_never_called():
    """A unit that the forward leaves out is no step, and hinders nothing."""

    class Model(Layers):
        def forward(self, x):
            return self.layers[2](self.layers[0](x))

    capture = faithful(Model(3))
    assert [s.name for s in capture.steps if s.kind == "unit"] == ["layers.0", "layers.2"]


def test_a_list_of_skips():
    """Tensors that wait in a list reach the units that take them, as in a U-Net."""

    class Model(Layers):
        def forward(self, x):
            skips = []
            for layer in self.layers[:3]:
                x = layer(x).relu()
                skips.append(x)
            for layer in self.layers[3:]:
                x = layer(x + skips.pop()).relu()
            return x, len(skips)

    capture = faithful(Model(6))
    assert {"relu_2", "relu_1"} & set(capture.values)
    assert len(capture.outputs) == 1


def test_identity_units():
    """A unit that returns its very input is a step that hands it on."""
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Identity(), nn.Dropout(0.0), nn.Linear(WIDTH, WIDTH))
    capture = faithful(model)
    assert step(capture, "1").reads == ("0",)
    assert step(capture, "2").reads == ("1",)


def test_a_module_as_argument():
    """A unit that is handed another's module reads its parameters, which ties the two."""

    class Decoder(nn.Module):
        def forward(self, x, embedding):
            return F.linear(x, embedding.weight)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.body, self.decode = nn.Embedding(9, WIDTH), nn.Linear(WIDTH, WIDTH), Decoder()

        def forward(self, ids):
            return self.decode(self.body(self.embed(ids)), embedding=self.embed)

    model = Model()
    units = {name: model.get_submodule(name) for name in ("embed", "body", "decode")}
    capture = faithful(model, lambda seed: ((torch.arange(8).reshape(2, 4).roll(seed),), {}), units=units)
    assert "embed.weight" in step(capture, "decode").reads
    assert capture.ties == [("embed.weight", ("embed", "decode"))]


def test_tied_units():
    """Two units with one weight need not stay together: their tie is told."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([nn.Embedding(9, WIDTH), nn.Linear(WIDTH, 9, bias=False)])
            self.layers[1].weight = self.layers[0].weight

        def forward(self, ids):
            return self.layers[1](self.layers[0](ids))

    capture = faithful(Model(), lambda seed: ((torch.arange(8).reshape(2, 4).roll(seed),), {}))
    assert capture.ties == [("layers.0.weight", ("layers.0", "layers.1"))]
    assert capture.colocate == []


def test_a_parameter_of_glue_and_a_unit():
    """A head that the parent computes with the embedding's weight is tied to the embedding."""

    class Model(Layers):
        def forward(self, x):
            return F.linear(self.layers[1](self.layers[0](x)), self.layers[0].weight)

    assert faithful(Model()).ties == [("layers.0.weight", ("layers.0", "linear"))]


def test_a_parameter_of_two_glue_steps():
    """A parameter that glue uses twice is tied to both steps."""

    class Model(Layers):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.rand(WIDTH))

        def forward(self, x):
            return self.layers[1](self.layers[0](x) * self.scale) - self.scale

    assert faithful(Model()).ties == [("scale", ("mul", "sub"))]


# Modes


@pytest.mark.parametrize("where", ["glue", "unit"])
def test_dropout(where):
    """From the same seed, the replay drops the same elements as the model."""

    class Model(Layers):
        def forward(self, x):
            y = self.layers[0](x)
            y = F.dropout(y, 0.5, training=self.training) if where == "glue" else self.layers[2](y)
            return self.layers[1](y) + 0.01 * torch.rand_like(y)

    model = Model()
    model.layers.append(nn.Dropout(0.5))
    faithful(model)


def test_regions_without_gradient():
    """Under no_grad, units and glue compute without gradient in the replay too; what stands outside has its own."""

    class Model(Layers):
        def __init__(self):
            super().__init__(4)
            self.scale = nn.Parameter(torch.rand(WIDTH))

        @torch.no_grad()
        def target(self, x):
            return self.layers[1](x) * self.scale

        def forward(self, x):
            y = self.layers[0](x)
            with torch.no_grad():
                z = self.layers[2](y) + 1
                with torch.enable_grad():
                    inside = self.layers[3](x)
            return y * z + self.target(y), inside

    model = Model()
    capture = faithful(model)
    assert step(capture, "layers.2").call.context == Context(grad=False)
    assert step(capture, "layers.3").call.context is None
    assert not capture.values["layers.2"].requires_grad
    _, gradients = results(lambda: capture.module()(rows(3)), model, train=True)
    assert {name for name, g in gradients.items() if g is None} == {
        *("layers.1.weight", "layers.1.bias", "layers.2.weight", "layers.2.bias", "scale")
    }


def test_inference_mode_inside():
    """A region of inference mode is one without gradient."""

    class Model(Layers):
        def forward(self, x):
            with torch.inference_mode():
                y = self.layers[0](x)
            return self.layers[1](x) * y.sum(0, keepdim=True).clone()

    assert step(faithful(Model(), train=False), "layers.0").call.context is None
    assert step(trace(Model(), (rows(0),)), "layers.0").call.context == Context(grad=False)


def test_detached_branches():
    """A detached tensor carries no gradient back in the replay either."""

    class Model(Layers):
        def forward(self, x):
            y = self.layers[0](x)
            return self.layers[1](y.detach()) + y.data

    model = Model()
    faithful(model)
    assert model.layers[0].weight.grad is None


def test_regions_of_autocast():
    """Under autocast, units and glue compute in its dtype in the replay too, and in theirs outside."""

    class Model(Layers):
        def forward(self, x):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                y = self.layers[0](x)
                product = y @ y.T
                with torch.autocast("cpu", enabled=False):
                    exact = self.layers[1](y.float())
            return product, exact, self.layers[2](x)

    capture = faithful(Model(3))
    assert step(capture, "layers.0").call.context == Context(grad=True, autocast=torch.bfloat16)
    assert step(capture, "layers.1").call.context is None
    assert [capture.values[name].dtype for name in capture.outputs] == [torch.bfloat16, torch.float32, torch.float32]


def test_autocast_around_the_model():
    """A forward captured under the user's autocast replays under it, wherever it is called."""
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        capture = checked_trace(model, (rows(0),))
        expected = model(rows(1))
    assert torch.equal(capture.module()(rows(1))[0], expected)


class Tripled(torch.autograd.Function):
    """Hands on what it takes, with three times the gradient."""

    @staticmethod
    def forward(_ctx, x, _factor):
        return x * 1

    @staticmethod
    def backward(_ctx, grad):
        return 3 * grad, None


apply_tripled = Tripled.apply
"""An alias made at import, which cannot be intercepted."""


def test_custom_autograd_functions():
    """A custom function is one step, and the replay uses its own backward, which no derivative would give."""

    class Model(Layers):
        def forward(self, x):
            return self.layers[1](Tripled.apply(self.layers[0](x), 2))

    class Honest(Layers):
        def forward(self, x):
            return self.layers[1](self.layers[0](x))

    model = Model()
    capture = faithful(model)
    (applied,) = [s for s in capture.steps if s.kind == "glue"]
    assert applied.type == "Tripled.apply"
    (_, tripled), (_, honest) = (
        results(lambda run=run: run(rows(3)), model, train=True)
        for run in (capture.module(), Honest.forward.__get__(model))
    )
    assert torch.allclose(tripled["layers.0.weight"], 3 * honest["layers.0.weight"])


def test_custom_autograd_functions_with_several_results():
    """Tuples, none-tensors and tensors kept for the backward pass are fine in a custom function."""

    class Halves(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, weight, at):
            ctx.save_for_backward(x, weight)
            ctx.at = at
            return (x * weight)[:, :at].clone(), (x * weight)[:, at:].clone()

        @staticmethod
        def backward(ctx, left, right):
            x, weight = ctx.saved_tensors
            grad = torch.cat([left, right], 1)
            return grad * weight, 2 * (grad * x).sum(0), None

    class Model(Layers):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.rand(WIDTH))

        def forward(self, x):
            left, right = Halves.apply(self.layers[0](x), self.weight, 2)
            with torch.no_grad():
                fixed, _ = Halves.apply(x, self.weight, 2)
            return self.layers[1](torch.cat([right, left], 1)) + fixed.sum()

    assert "weight" in {name for name, _ in faithful(Model()).ties}


@pytest.mark.parametrize("place", ["for glue", "for a unit", "as output"])
def test_an_alias_of_apply_is_an_obstacle(place):
    """A custom function called through an alias made at import is named, wherever its result goes."""

    class Model(Layers):
        def forward(self, x):
            y = apply_tripled(self.layers[0](x), 2)  # <--
            return {"for glue": lambda: self.layers[1](y + 1), "for a unit": lambda: self.layers[1](y)}.get(
                place, lambda: y
            )()

    model = Model()
    (found,) = obstacles(model)
    # The step that is known is the one inside the function's forward.
    assert "is part of a custom autograd function" in found
    assert found.startswith("test_recorder.py:")


def test_an_alias_of_apply_without_gradients_is_none():
    """In inference nothing depends on a custom function's backward."""

    class Model(Layers):
        def forward(self, x):
            return self.layers[1](apply_tripled(self.layers[0](x), 2))

    faithful(Model(), train=False)


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])
def test_checkpoints(reentrant):
    """Activation checkpointing, both kinds, is looked through: the replay computes the same, dropout included."""

    class Model(Layers):
        def part(self, x, scale):
            return F.dropout(self.layers[1](x), 0.3, self.training) * scale

        def forward(self, x):
            y = checkpoint(self.part, self.layers[0](x), 2.0, use_reentrant=reentrant)
            return checkpoint(self.layers[2], y, use_reentrant=reentrant)

    capture = faithful(Model(3))
    assert [s.name for s in capture.steps if s.kind == "unit"] == ["layers.0", "layers.1", "layers.2"]


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
    assert found[0].startswith(f"test_recorder.py:{read.__code__.co_firstlineno}:"), found


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
    assert found[0].startswith(f"test_recorder.py:{read.__code__.co_firstlineno}:"), found
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


def test_chance_of_python_that_decides_is_caught():
    """Python's own dice leave no trace in tensors; a path that they change is caught by the second run."""

    class Model(Layers):
        def forward(self, x):
            y = self.layers[0](x)
            return self.layers[1](y) * random.random()

    with pytest.raises(ShardwrightError, match="is not the model"):
        checked_trace(Model(), (rows(0),))


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
