"""The recorder on arguments, results and glue: what it captures faithfully."""

import copy
import dataclasses
import enum
import math
import threading
import warnings
from collections import OrderedDict, namedtuple
from typing import Any

import pytest
import torch
from recording import (
    ROWS,
    WIDTH,
    Layers,
    Takes,
    assert_replays,
    batch,
    faithful,
    marked,
    obstacles,
    repeatable,
    rows,
    step,
)
from torch import nn
from torch.nn import functional as F  # noqa: N812

from shardwright.profiler.recording.inputs import outputs_of
from shardwright.profiler.recording.structure import dense_parts
from shardwright.profiler.trace import trace

__all__ = ["repeatable"]

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

    capture = faithful(Model())
    assert not any(isinstance(constant, torch.Tensor) for constant in capture.constants.values())


@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr, torch.sparse_csc])
def test_a_sparse_matrix(layout):
    """A graph network multiplies by a sparse buffer; its bytes are those of what it holds."""

    class Model(Layers):
        def __init__(self):
            super().__init__()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # PyTorch calls compressed layouts beta
                self.register_buffer("neighbours", torch.eye(ROWS).to_sparse(layout=layout))

        def forward(self, x):
            return self.layers[1](self.neighbours @ self.layers[0](x))

    capture = faithful(Model())
    held = capture.values["neighbours"]
    assert held.stride is None
    assert held.bytes == sum(t.nbytes for t in dense_parts(capture.model.neighbours))


def test_a_sparse_input():
    """It goes with the inputs, as other values of the same pattern."""

    class Model(Layers):
        def forward(self, x, neighbours):
            return self.layers[1](neighbours @ self.layers[0](x))

    faithful(Model(), lambda seed: ((rows(seed), torch.eye(ROWS).to_sparse()), {}))


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


def test_what_the_capture_copies_is_no_operator_of_the_model():
    """Autograd's saved tensors are counted by a copy outside autograd, which the operators of a step do not hold."""
    model = nn.Sequential(nn.Sequential(nn.Linear(3, 4), nn.GELU()), nn.Linear(4, 2))
    captured = trace(model, (torch.randn(5, 3),))
    assert all(step.saved_bytes for step in captured.steps if step.kind == "unit" and step.unit == "0")
    names = {operation.name for step in captured.steps for operation in step.operations}
    assert "aten.addmm.default" in names
    assert "aten.detach.default" not in names
