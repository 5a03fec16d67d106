"""Pipelining in one process: the model computes and learns what it did."""

import copy
import dataclasses
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from inprocess import BATCH, WIDTH, Chain, Skips, assert_same_step, forward_of, losses, piped
from torch import nn
from torch.nn import functional as F  # noqa: N812
from torch.nn.utils import prune

import shardwright as sw
from shardwright.sharder.runtime.local.baked import baked, changed_name, tree_of

__all__ = ["piped"]  # fixtures


class Tied(nn.Module):
    """The head computes with the table of the embedding, on another device."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(9, WIDTH)
        self.layers = nn.ModuleList([nn.Linear(WIDTH, WIDTH) for _ in range(4)])
        self.head = nn.Linear(WIDTH, 9, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        x = self.embed(ids)
        for layer in self.layers:
            x = x + layer(x)
        return self.head(x)


# What it computes


@pytest.mark.parametrize("stages", [1, 2, 3])
@pytest.mark.parametrize("microbatches", [1, 2, 6, 12])
def test_a_chain_learns_what_it_did(piped, stages, microbatches):
    """Outputs, and the gradients of all parameters and of the input, are the plain model's.

    To the last bit those of the micro-batches: some processors multiply matrices of a few rows in another way.
    """
    x = torch.randn(BATCH, WIDTH, requires_grad=True)
    model, placed = piped(Chain(), (x.detach(),), stages=stages, microbatches=microbatches)
    assert_same_step(model, placed, (x,))
    with torch.no_grad():
        assert torch.equal(placed(x), torch.cat([model(piece) for piece in x.chunk(microbatches)]))


def test_several_stages_on_each_device(piped):
    """An interleaved plan goes through all its stages, each device's cores shared among its own."""
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(WIDTH, WIDTH) for _ in range(6)])
    model, placed = piped(model, (torch.randn(BATCH, WIDTH),), schedule="interleaved")
    assert_same_step(model, placed, (torch.randn(BATCH, WIDTH),))


@pytest.mark.parametrize("stages", [2, 4])
def test_skips_several_inputs_and_outputs(piped, stages):
    """Skips are relayed; a whole number comes back as it is, an input for all samples gets the sum of its gradients."""
    args = torch.randn(BATCH, WIDTH), torch.randint(0, WIDTH, (BATCH, 2))
    model, placed = piped(Skips(), args, stages=stages)
    assert_same_step(model, placed, args)
    grads = []
    for one in (model, placed):
        scale = torch.full((1,), 3.0, requires_grad=True)
        losses(one(*args, scale=scale)).backward()
        grads.append(scale.grad)
    torch.testing.assert_close(grads[1], grads[0])
    assert placed(*args)["index"].grad_fn is None


def test_a_tied_weight_gets_the_sum(piped):
    """A parameter of two stages stays one, and its gradient is the sum of both, the same each time."""
    ids = torch.randint(0, 9, (BATCH, 5))
    model, placed = piped(Tied(), (ids,))
    assert placed.head.weight is placed.embed.weight
    assert_same_step(model, placed, (ids,))
    first = placed.embed.weight.grad.clone()
    assert_same_step(model, placed, (ids,))
    assert torch.equal(placed.embed.weight.grad, first)


@pytest.mark.parametrize("name", ["Net", "NetList", "NetDict"])
def test_the_article_s_networks(containers, captured_profile, name):
    """With batch statistics at rest, the three networks compute and learn what they did."""
    model = getattr(containers, name)()
    x = torch.randn(4, *type(model).sample_inputs()[0].shape[1:])[..., :16, :16]
    plan = sw.plan(captured_profile(model, (x,), microbatches=(1, 4)), microbatches=4)
    model.eval()
    placed = sw.place(copy.deepcopy(model), plan, microbatches=4)
    assert_same_step(model, placed, (x,))


def test_a_transformer_with_a_mask(piped):
    """Attention, layer normalisation and a mask for all samples."""

    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(
                [nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True) for _ in range(4)]
            )

        def forward(self, x, mask):
            for layer in self.layers:
                x = layer(x, src_mask=mask)
            return x.mean(1)

    x, mask = torch.randn(BATCH, 5, 8), nn.Transformer.generate_square_subsequent_mask(5)
    model, placed = piped(Encoder(), (x, mask))
    assert_same_step(model, placed, (x, mask))
    for one in (model, placed):
        one.eval()
    with torch.inference_mode():
        found = placed(x, mask)
        assert found.is_inference()
        torch.testing.assert_close(found, model(x, mask))


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_any_small_graph_is_the_model(captured_profile_once, data):
    """Whatever reads what, on however many stages and micro-batches."""
    layers = data.draw(st.integers(2, 7), "layers")
    sources = [data.draw(st.sets(st.integers(0, i), min_size=1, max_size=3), f"sources {i}") for i in range(layers)]
    outputs = data.draw(st.sets(st.integers(1, layers), min_size=1, max_size=3), "outputs")
    stages = data.draw(st.integers(1, 3), "stages")
    batch, microbatches = data.draw(st.sampled_from([(4, 1), (4, 2), (4, 4), (6, 3), (6, 6), (8, 4)]), "batch")

    class Graph(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(3, 3) for _ in range(layers)])

        def forward(self, x):
            made = [x]
            for layer, read in zip(self.layers, sources, strict=True):
                made.append(layer(sum(made[i] for i in sorted(read))).tanh())
            return tuple(made[i] for i in sorted(outputs))

    torch.manual_seed(layers)
    model, x = Graph(), torch.randn(batch, 3)
    devices = [f"cpu:{index}" for index in range(stages)]
    profile = captured_profile_once(model, (x,), devices=devices, microbatches=(1, microbatches))
    placed = sw.place(copy.deepcopy(model), sw.plan(profile, microbatches=microbatches), microbatches=microbatches)
    try:
        assert_same_step(model, placed, (x,))
    finally:
        sw.unplace(placed)


@pytest.fixture(scope="module")
def captured_profile_once():
    """``captured_profile`` for Hypothesis, which wants one for all of its examples."""
    import conftest

    return conftest.captured_profile._get_wrapped_function()()


# Training


@pytest.mark.parametrize("when", ["before", "after"])
def test_three_steps_of_adamw(captured_profile, when):
    """An optimizer made before or after placing trains the model's own parameters.

    In double precision: Adam makes a step of every gradient, one that is rounding alone too.
    """
    model, x = Chain().double(), torch.randn(BATCH, WIDTH).double()
    plan = sw.plan(captured_profile(model, (x,)), microbatches=4)
    placed = copy.deepcopy(model)
    optimizers = [torch.optim.AdamW(one.parameters(), lr=0.05) for one in (model, placed)]
    sw.place(placed, plan, microbatches=4)
    if when == "after":
        optimizers[1] = torch.optim.AdamW(placed.parameters(), lr=0.05)
    for _ in range(3):
        x, y = torch.randn(BATCH, WIDTH).double(), torch.randn(BATCH, WIDTH).double()
        pair = []
        for one, optimizer in zip((model, placed), optimizers, strict=True):
            optimizer.zero_grad()
            pair.append(F.mse_loss(one(x), y))
            pair[-1].backward()
            optimizer.step()
        torch.testing.assert_close(pair[1], pair[0])
    torch.testing.assert_close(placed.state_dict(), model.state_dict(), rtol=1e-5, atol=1e-7)


def test_a_stage_may_change_what_it_received(piped):
    """In place, through a view too, as a unit may that is handed a tensor which nobody else reads."""

    class Changing(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(WIDTH, WIDTH)

        def forward(self, x):
            inner = self.inner(x)
            inner[:, :2] *= 2
            return inner + 1

    class Graph(nn.Sequential):
        def forward(self, x):
            for unit in self:
                x = unit(x)
            x[:, 1:] *= 3
            return x

    x = torch.randn(BATCH, WIDTH, requires_grad=True)
    model, placed = piped(Graph(*[Changing() for _ in range(4)]), (x.detach(),))
    assert_same_step(model, placed, (x,))


def test_an_input_that_the_model_changes(piped):
    """A tensor with a history that the first stage changes in place, as a plain model may."""

    class Doubled(Chain):
        def forward(self, x):
            return super().forward(x.mul_(2))

    model, placed = piped(Doubled(), (torch.randn(BATCH, WIDTH),))
    x = torch.randn(BATCH, WIDTH, requires_grad=True)
    grads = []
    for one in (model, placed):
        x.grad = None
        losses(one(x * 1)).backward()
        grads.append(x.grad)
    torch.testing.assert_close(grads[1], grads[0])


def test_gradients_accumulate(piped):
    """Two calls add up, in either order of their backwards; another use of a parameter adds to it."""
    x, y = torch.randn(BATCH, WIDTH), torch.randn(BATCH, WIDTH)
    model, placed = piped(Chain(), (x,))
    for one in (model, placed):
        first, second = losses(one(x)), losses(one(y))
        (second + one[0][0].weight.square().sum()).backward()
        first.backward()
    torch.testing.assert_close([p.grad for p in placed.parameters()], [p.grad for p in model.parameters()])


def test_gradients_that_are_asked_for(piped):
    """``torch.autograd.grad`` of some parameters, frozen parameters, and a part of the outputs."""
    args = torch.randn(BATCH, WIDTH), torch.randint(0, WIDTH, (BATCH, 2))
    model, placed = piped(Skips(), args)
    found = [torch.autograd.grad(losses(one(*args)["rows"]), [one.gain, one.layers[0].bias]) for one in (model, placed)]
    torch.testing.assert_close(found[1], found[0])
    for one in (model, placed):
        one.layers[:5].requires_grad_(requires_grad=False)
        losses(one(*args)["x"]).backward()
    assert all(p.grad is None for p in placed.layers[:5].parameters())
    assert placed.gain.grad is None
    torch.testing.assert_close(placed.layers[6].weight.grad, model.layers[6].weight.grad)


def test_a_second_backward(piped):
    """Works if the first was told to keep the graph, and says so if not; a derivative of derivatives is refused."""
    x = torch.randn(BATCH, WIDTH)
    model, placed = piped(Chain(), (x,))
    for one in (model, placed):
        loss = losses(one(x))
        loss.backward(retain_graph=True)
        loss.backward()
    torch.testing.assert_close(placed[0][0].weight.grad, model[0][0].weight.grad)
    output = placed(x)
    output.sum().backward()
    with pytest.raises(sw.ShardwrightError, match="retain_graph=True"):
        output.mean().backward()
    with pytest.raises(sw.ShardwrightError, match="gradients of gradients"):
        torch.autograd.grad(placed(x).sum(), placed[0][0].weight, create_graph=True)


def test_hooks_on_parameters_see_the_whole_gradient_once(piped):
    """As without a pipeline: clipping in a hook would be another thing for each micro-batch."""
    x = torch.randn(BATCH, WIDTH)
    model, placed = piped(Chain(), (x,))
    calls = []
    for one in (model, placed):
        one[1][0].weight.register_hook(lambda g: calls.append("hook") or g.clamp(-1e-3, 1e-3) * 2)
        one[2][0].weight.register_post_accumulate_grad_hook(lambda _: calls.append("accumulated"))
    assert_same_step(model, placed, (x,))
    assert sorted(calls) == ["accumulated"] * 2 + ["hook"] * 2


def test_autocast_of_the_caller_is_the_threads(piped):
    """Operators compute in the caller's dtype, forward and backward."""
    x = torch.randn(BATCH, WIDTH)
    model, placed = piped(Chain(), (x,))
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = placed(x), model(x)
    assert found.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(found, expected)
    found.sum().backward()
    expected.sum().backward()
    torch.testing.assert_close(placed[0][0].weight.grad, model[0][0].weight.grad, rtol=2e-2, atol=2e-2)
    assert placed(x).dtype == torch.float32


# What is changed after the first call


@dataclasses.dataclass(slots=True)
class Slots:
    """Has no dictionary."""

    bias: float = 0.0


class Trainer:
    """An object on a model that counts, as many do."""

    steps = 0


class Switched(nn.Module):
    """Goes by a number, a switch, an entry of a dictionary and a tensor that is no parameter."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(WIDTH, WIDTH) for _ in range(4)])
        self.scale, self.skips, self.options, self.shift = 1.0, False, {"gain": [1.0]}, torch.ones(WIDTH)
        self.kept, self.slots, self.deep = {0, 2}, Slots(), {"a": {"b": {"c": {"d": 1.0}}}}
        self.register_parameter("gain", None)
        self.more = nn.ParameterList([nn.Parameter(torch.tensor(1.0))])
        self.layers[1].on = True
        self.trainer, self.metric = Trainer(), nn.Identity()

    def forward(self, x):
        x = self.layers[0](x) * self.scale
        if getattr(self.layers[1], "on", True):
            x = self.layers[1](x)
        if self.gain is not None:
            x = x * self.gain
        for factor in self.more:
            x = x * factor
        x = (x + self.slots.bias) * self.deep["a"]["b"]["c"]["d"]
        if not self.skips and 2 in self.kept:
            x = self.layers[2](x)
        return self.layers[3](x) * self.options["gain"][0] + self.shift


CHANGES = {
    "a number": lambda m: setattr(m, "scale", 0.5),
    "a switch": lambda m: setattr(m, "skips", True),
    "an entry": lambda m: m.options["gain"].__setitem__(0, 2.0),
    "a set": lambda m: m.kept.discard(2),
    "a tensor": lambda m: setattr(m, "shift", torch.zeros(WIDTH)),
    "a module": lambda m: m.layers.__setitem__(1, nn.Linear(WIDTH, WIDTH, bias=True).requires_grad_(False)),
    "a pruned unit": lambda m: prune.l1_unstructured(m.layers[1], "weight", 0.5),
    "what does not decide": lambda m: (setattr(m.trainer, "steps", 1), setattr(m.metric, "updates", 1)),
    "a unit's switch": lambda m: setattr(m.layers[1], "on", False),
    "a parameter that was none": lambda m: setattr(m, "gain", nn.Parameter(torch.tensor(2.0))),
    "a list of parameters": lambda m: m.more.append(nn.Parameter(torch.tensor(3.0))),
    "a slot": lambda m: setattr(m.slots, "bias", 1.0),
    "far inside": lambda m: m.deep["a"]["b"]["c"].__setitem__("d", 2.0),
    "nothing": lambda m: setattr(m, "scale", m.scale),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_changed_after_a_call_counts_in_the_next(piped, change):
    """The model is captured anew where its own forward may go by what has changed, and not where nothing has."""
    x = torch.randn(BATCH, WIDTH)
    model, placed = piped(Switched(), (x,))
    torch.testing.assert_close(placed(x), model(x))
    for one in (model, placed):
        torch.manual_seed(1)
        CHANGES[change](one)
    found, expected = placed(x), model(x)
    torch.testing.assert_close(found, expected)
    losses(found).backward()
    losses(expected).backward()
    pairs = zip(placed.named_parameters(), model.named_parameters(), strict=True)
    for (name, one), (_, other) in pairs:
        assert (one.grad is None) == (other.grad is None), name
        if one.grad is not None:
            torch.testing.assert_close(one.grad, other.grad)
    captured_anew = change not in ("nothing", "what does not decide", "a pruned unit")
    assert len(forward_of(placed).programs) == 1 + captured_anew


@pytest.mark.parametrize("value", [[float("nan")], {1, "a"}, {"gain": [1, (2, {3: 4.0})]}, True, range(3), object()])
def test_what_is_baked_is_equal_to_itself_and_changes_with_the_value(value):
    """Not-a-number too; a value of another type is another, as True is not 1; another object is not the same."""
    model = nn.Sequential(nn.Linear(1, 1))
    units = tree_of(["0"])
    model.held = value
    first = baked(model, units)
    assert first == baked(model, units)
    assert hash(first) == hash(baked(model, units))
    for other in ([value], 1, {2, "a"}, None):
        model.held = other
        assert baked(model, units) != first
        assert changed_name(first, baked(model, units)) == "held"
    model.held = value
    model[0] = nn.Linear(1, 1)
    assert baked(model, units) != first


def test_a_model_that_is_captured_again_and_again_says_why(piped):
    """A number that changes with each call: right each time, and a warning names it once."""
    x = torch.randn(BATCH, WIDTH)
    model, placed = piped(Switched(), (x,))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(8):
            model.scale = placed.scale = 1.0 + step
            torch.testing.assert_close(placed(x), model(x))
    said = [str(one.message) for one in caught if "captured anew" in str(one.message)]
    assert len(said) == 1
    assert said[0].startswith("scale has changed, and so the model was captured anew, for the 5th time")
