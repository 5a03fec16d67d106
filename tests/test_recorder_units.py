"""The recorder on units and the modes that they run in."""

import pytest
import torch
from recording import ROWS, WIDTH, Layers, batch, faithful, marked, obstacles, repeatable, results, rows, step
from torch import nn
from torch.nn import functional as F  # noqa: N812
from torch.utils.checkpoint import checkpoint

from shardwright.errors import ShardwrightError
from shardwright.profiler.recording.unitgraph import Context
from shardwright.profiler.trace import checked_trace, trace

__all__ = ["repeatable"]

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
    assert found.startswith("test_recorder_units.py:")
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
    assert found.startswith("test_recorder_units.py:")


def test_an_alias_of_apply_without_gradients_is_none():
    """In inference nothing depends on a custom function's backward."""

    class Model(Layers):
        def forward(self, x):
            return self.layers[1](apply_tripled(self.layers[0](x), 2))

    faithful(Model(), train=False)


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])
def test_checkpoints(reentrant):
    """Units in regions of checkpointing, of both kinds, are steps: the replay computes the same, dropout included."""

    class Model(Layers):
        def part(self, x, scale):
            return F.dropout(self.layers[1](x), 0.3, self.training) * scale

        def forward(self, x):
            y = checkpoint(self.part, self.layers[0](x), 2.0, use_reentrant=reentrant)
            return checkpoint(self.layers[2], y, use_reentrant=reentrant)

    capture = faithful(Model(3))
    assert [s.name for s in capture.steps if s.kind == "unit"] == ["layers.0", "layers.1", "layers.2"]


def test_a_neighbours_parameter_is_an_obstacle():
    """A unit that reads another's weight by a reference of its own is named: a stage would have a copy of it."""

    class Peer(nn.Module):
        def __init__(self, other):
            super().__init__()
            self.linear, self.others = nn.Linear(WIDTH, WIDTH), [other]

        def forward(self, x):
            return F.linear(self.linear(x), self.others[0].weight)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            first = nn.Linear(WIDTH, WIDTH)
            self.layers = nn.ModuleList([first, Peer(first)])

        def forward(self, x):
            return self.layers[1](self.layers[0](x))  # <--

    model = Model()
    capture = checked_trace(model, *batch(0))
    assert capture.obstacles == [f"{marked(model)}20 calls layers.1, which reads layers.0.weight of another module"]
    assert capture.ties == [("layers.0.weight", ("layers.0", "layers.1"))]
