"""Pipelining in one process: the model computes and learns what it did, and everything ends and can be undone."""

import copy
import gc
import inspect
import os
import pickle
import signal
import threading
import time
import traceback
import warnings
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F  # noqa: N812
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import shardwright as sw
from shardwright.profiler.placed import placement_hooks
from shardwright.sharder.runtime import place as place_module
from shardwright.sharder.runtime.sim import sim_device
from shardwright.sharder.runtime.threads import Seat, StageThreads

WIDTH, BATCH = 6, 12


@pytest.fixture
def piped(captured_profile):
    """Places a copy of a model as a pipeline; the model and the copy."""

    def place(model, args, kwargs=None, *, microbatches=4, stages=2, schedule="1f1b", **options):
        devices = [f"cpu:{index}" for index in range(stages)]
        profile = captured_profile(model, args, kwargs, devices=devices, microbatches=(1, 2, 4), **options)
        plan = sw.plan(profile, microbatches=4, schedule=schedule)
        assert len(plan.devices) == stages
        return model, sw.place(copy.deepcopy(model), plan, microbatches=microbatches)

    return place


def forward_of(model):
    """What a pipelined model has for a forward."""
    return vars(model)["forward"]


def stage_threads():
    """The threads of stages that are alive."""
    return {thread for thread in threading.enumerate() if thread.name.startswith("shardwright")}


def losses(output):
    """A loss of each sample's outputs that no symmetry makes zero."""
    tensors = output if isinstance(output, tuple) else output.values() if isinstance(output, dict) else [output]
    return sum((t.float() * torch.linspace(0.5, 1.5, t.numel()).view_as(t)).square().mean() for t in tensors)


def assert_same_step(model, placed, args=(), kwargs=None, *, tolerance=1e-5):
    """Outputs and the gradients of parameters and inputs are the same."""
    kwargs = kwargs or {}
    results = []
    for one in (model, placed):
        one.zero_grad()
        given = [t.detach().clone().requires_grad_(t.requires_grad) for t in args]
        output = one(*given, **kwargs)
        losses(output).backward()
        results.append((output, [t.grad for t in given], [p.grad for p in one.parameters()]))
    (expected, *of_model), (found, *of_placed) = results
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(of_placed, of_model, rtol=tolerance, atol=tolerance)
    assert forward_of(placed).programs


class Chain(nn.Sequential):
    def __init__(self, layers=6):
        super().__init__(*[nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(layers)])


class Skips(nn.Module):
    """Skips over several stages, an integer input, a parameter outside of units, and two outputs of different kinds."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(WIDTH, WIDTH) for _ in range(8)])
        self.gain = nn.Parameter(torch.rand(WIDTH))

    def forward(self, x, index, *, scale=None):
        kept = []
        for layer in self.layers[:4]:
            x = layer(x).tanh()
            kept.append(x)
        for layer in self.layers[4:]:
            x = layer(x + kept.pop())
        rows = torch.gather(x * self.gain, 1, index)
        if scale is not None:
            rows = rows * scale
        return {"rows": rows, "index": index + 1, "x": x}


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
    """Outputs, and the gradients of all parameters and of the input, are the plain model's."""
    x = torch.randn(BATCH, WIDTH, requires_grad=True)
    model, placed = piped(Chain(), (x.detach(),), stages=stages, microbatches=microbatches)
    assert_same_step(model, placed, (x,))
    with torch.no_grad():
        assert torch.equal(placed(x), model(x)) or microbatches == BATCH  # a matrix of one row is multiplied otherwise


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


def test_modes_are_followed(piped):
    """Dropout, as a module and between units, in training and not; no history without gradients."""

    class Dropping(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Dropout(0.5)) for _ in range(4)])

        def forward(self, x):
            for layer in self.layers:
                x = F.dropout(layer(x), 0.5, self.training)
            return x

    x = torch.randn(BATCH, WIDTH)
    model, placed = piped(Dropping(), (x,))
    assert (placed(x) == 0).any()
    placed.eval()
    model.eval()
    assert_same_step(model, placed, (x,))
    with torch.no_grad():
        assert placed(x).grad_fn is None
    placed.train()
    with torch.no_grad():
        assert (placed(x) == 0).any()


def test_batch_statistics_are_of_micro_batches(piped):
    """Said once; the running statistics are those of the micro-batches one after the other."""
    x = torch.randn(BATCH, WIDTH)
    model, placed = piped(
        nn.Sequential(*[nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH))] * 1, Chain(3)), (x,)
    )
    with pytest.warns(UserWarning, match="batch normalisation sees each of the 4 micro-batches by itself"):
        found = placed(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        placed(torch.randn(2 * BATCH, WIDTH))
    expected = torch.cat([model(piece) for piece in x.chunk(4)])
    torch.testing.assert_close(found, expected)
    sw.unplace(placed)
    assert placed[0][1].num_batches_tracked == 8


def test_batches_of_other_sizes(piped):
    """One that divides is pipelined, one that does not runs as a whole; both are the model's."""
    x = torch.randn(BATCH, WIDTH)
    model, placed = piped(Chain(), (x,))
    sizes = []
    placed[0][0].register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    for batch in (12, 20, 7, 2, 12):
        other = torch.randn(batch, WIDTH)
        placed(other)
        sizes.clear()
        losses(placed(other)).backward()
        model.zero_grad()
        placed.zero_grad()
        assert sizes == ([batch // 4] * 4 if batch % 4 == 0 else [batch])
        losses(model(other)).backward()
        losses(placed(other)).backward()
        torch.testing.assert_close(placed[0][0].weight.grad, model[0][0].weight.grad)


def test_values_that_steer_the_forward_are_kept_apart(piped):
    """An argument that is no tensor is part of what was captured."""

    class Steered(Chain):
        def forward(self, x, times: int = 1, *, negative: bool = False):
            for layer in self:
                x = layer(x * times)
            return -x if negative else x

    x = torch.randn(BATCH, WIDTH)
    model, placed = piped(Steered(), (x,))
    for args, kwargs in (((), {}), ((2,), {}), ((3.0,), {}), ((), {"negative": True}), ((2,), {})):
        torch.testing.assert_close(placed(x, *args, **kwargs), model(x, *args, **kwargs))
    assert inspect.signature(placed.forward) == inspect.signature(model.forward)


def test_results_of_any_structure(piped):
    """A dataclass of the model's own comes back as one, with a tensor named twice still one tensor."""

    @dataclass
    class Result:
        hidden: torch.Tensor
        again: torch.Tensor
        kind: str

    class Structured(Chain):
        def forward(self, x):
            x = super().forward(x)
            return Result(x * 2, x, "chain"), [x]

    x = torch.randn(BATCH, WIDTH)
    model, placed = piped(Structured(), (x,))
    (found, rest), (expected, _) = placed(x), model(x)
    assert type(found) is Result
    assert found.kind == "chain"
    torch.testing.assert_close(found.hidden, expected.hidden)
    torch.testing.assert_close(rest[0], expected.again)


# What is refused


class Averaged(Chain):
    def forward(self, x):
        x = super().forward(x)
        return x, x.mean()


class Mixing(Chain):
    def forward(self, x):
        x = super().forward(x)
        return x - x.mean(0)


class Counted(Chain):
    def forward(self, x):
        return super().forward(x), len(x)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (Averaged, r"output 1 of Averaged has the shape \(\), not the 12 samples"),
        (Mixing, "depends on how the batch is divided: output 0 of 4 micro-batches"),
        (Counted, "returns 12 for the batch and 3 for a micro-batch of 4"),
    ],
)
def test_results_that_cannot_be_put_together(piped, kind, words):
    """A mean, samples that see one another, and a number that follows the batch are refused when they are seen."""
    x = torch.randn(BATCH, WIDTH)
    model, placed = piped(kind(), (x,))
    with pytest.raises(sw.ShardwrightError, match=words):
        placed(x)
    torch.testing.assert_close(sw.unplace(placed)(x), model(x))


def test_an_obstacle_is_refused_as_by_run(captured_profile):
    """A forward that follows its inputs' values is placed and not pipelined, by the same line, with nothing changed."""

    class Following(Chain):
        def forward(self, x):
            for layer in self:
                x = layer(x) if x.sum() > 0 else layer(-x)
            return x

    model, x = Following(), torch.randn(BATCH, WIDTH)
    plan = sw.plan(
        captured_profile(model, (x,), microbatches=(1,)), microbatches=1, pins={"0.0": "cpu:0", "5.1": "cpu:1"}
    )
    assert plan.obstacles
    assert len(plan.stages) > 1
    with pytest.raises(sw.ShardwrightError) as refused:
        sw.place(model, plan, microbatches=4)
    with pytest.raises(sw.ShardwrightError) as by_run:
        sw.run(model, plan, (x,))
    assert str(refused.value) == str(by_run.value)
    assert not list(placement_hooks(model))
    assert "forward" not in vars(model)


@pytest.mark.parametrize("microbatches", [0, -1, 2.5, True])
def test_numbers_of_micro_batches(captured_profile, microbatches):
    """None of none, of less, or of something else."""
    model, x = Chain(), torch.randn(BATCH, WIDTH)
    plan = sw.plan(captured_profile(model, (x,)), microbatches=4)
    with pytest.raises(sw.ShardwrightError, match="use 1 or more"):
        sw.place(model, plan, microbatches=microbatches)
    with pytest.raises(sw.ShardwrightError, match="cpu:1 is placed on sim:0"):
        sw.place(model, plan, microbatches=4, devices={"cpu:1": sim_device(0)})


# What goes wrong


class Failing(nn.Module):
    """Passes its input on, and fails at its third call once it is armed, there or in the backward."""

    def __init__(self, where):
        super().__init__()
        self.where = where
        self.left = None

    def forward(self, x):
        if self.where == "forward":
            self.count()
        elif x.requires_grad:
            x = x * 1
            x.register_hook(self.count)
        return x

    def count(self, _gradient=None):
        if self.left is not None:
            self.left -= 1
            if not self.left:
                raise LookupError("the third")


@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("layer", [0, 3, 5])
def test_an_error_in_a_stage_is_the_caller_s(piped, where, layer):
    """Its own type and traceback, where it was, no thread at work, and the next call is as if nothing had been."""
    model = Chain()
    model[layer].append(Failing(where))
    x = torch.randn(BATCH, WIDTH)
    model, placed = piped(model, (x,), stages=3)
    placed(x)
    placed[layer][2].left = 3
    with pytest.raises(LookupError, match="the third") as caught:
        losses(placed(x)).backward()
    number = 2 if where == "forward" else 1  # the backward begins with the last
    stage = next(node.stage for node in forward_of(placed).plan.nodes if node.unit == f"{layer}.2")
    assert caught.value.__notes__ == [f"in stage {stage} of 3 on cpu, micro-batch {number} of 4"]
    functions = [frame.name for frame in traceback.extract_tb(caught.value.__traceback__)]
    assert functions[0] == "test_an_error_in_a_stage_is_the_caller_s"
    assert functions[-1] == "count"
    placed[layer][2].left = None
    assert_same_step(model, placed, (x,))


@pytest.mark.parametrize("who", ["caller", "stage"])
def test_an_interrupt_ends_the_pass_in_all_threads(who):
    """The caller goes on when every thread is idle, and no micro-batch is begun after that."""
    threads = StageThreads([Seat(f"cpu:{i}", torch.device("cpu")) for i in range(2)])
    begun, released = [], threading.Event()

    def step(stage, number, _received):
        begun.append((stage, number))
        if stage == 1 and not number:
            released.set()
            if who == "stage":
                raise KeyboardInterrupt
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        if number:
            assert released.wait(60)
            time.sleep(1e-3)  # so that the caller comes to its turn; all would take half an hour
        return number

    many = 1_000_000
    with pytest.raises(KeyboardInterrupt):
        threads.run(step, range(many))
    assert len(begun) < 2 * many
    count = len(begun)
    passed = []
    threads.run(lambda stage, number, received: passed.append((stage, number, received)) or number, range(3))
    assert len(begun) == count
    assert [it for it in passed if it[0]] == [(1, number, number) for number in range(3)]
    before = stage_threads()
    threads.end()
    assert len(before - stage_threads()) == 2


def test_a_pass_goes_back_from_the_last_stage():
    """Each stage gets what the one behind it has sent, in the order asked for."""
    threads = StageThreads([Seat(f"cpu:{i}", torch.device("cpu")) for i in range(3)])
    last = []

    def step(stage, number, received):
        if stage == 0:
            last.append((number, received))
        return [*(received or []), stage]

    threads.run(step, reversed(range(4)), backward=True)
    assert last == [(number, [2, 1]) for number in (3, 2, 1, 0)]
    threads.end()


def test_callers_in_several_threads_take_turns(piped):
    """Forwards and backwards of several callers do not block one another."""
    x = torch.randn(BATCH, WIDTH)
    model, placed = piped(Chain(), (x,), stages=3)
    placed(x)

    def step(factor):
        given = (x * factor).requires_grad_()
        losses(placed(given)).backward()
        return given.grad

    with ThreadPoolExecutor(4) as callers:
        found = list(callers.map(step, range(12)))
    for factor, gradient in enumerate(found):
        given = (x * factor).requires_grad_()
        losses(model(given)).backward()
        torch.testing.assert_close(gradient, given.grad)


# Being a model


def test_unplace_removes_everything(piped):
    """Forward, hook and threads are gone; the forward that the instance had of its own is back."""
    x = torch.randn(BATCH, WIDTH)
    model, placed = piped(Chain(), (x,))
    before = stage_threads()
    placed(x)
    assert len(stage_threads() - before) == 2
    sw.unplace(placed)
    assert stage_threads() <= before
    assert "forward" not in vars(placed)
    assert not list(placement_hooks(placed))
    assert torch.equal(placed(x), model(x))


def test_an_own_forward_of_the_instance_is_kept(captured_profile):
    """What another tool has put in its place is called, and there again after unplace."""
    model, x = Chain(), torch.randn(BATCH, WIDTH)
    plan = sw.plan(captured_profile(model, (x,)), microbatches=4)
    plain = model.forward
    model.forward = own = lambda x: plain(x) + 1
    expected = model(x)
    sw.place(model, plan, microbatches=4)
    torch.testing.assert_close(model(x), expected)
    sw.unplace(model)
    assert model.forward is own


@pytest.mark.parametrize("there", ["first", "last"])
def test_inputs_come_and_outputs_go_back(captured_profile, monkeypatch, there):
    """With a stage on a device that mixes with no other: results are on the caller's, with and without a pipeline."""
    monkeypatch.setattr(place_module, "check_threads", lambda *_: None)  # which no simulated device passes
    model, inputs = Skips(), (torch.randn(BATCH, WIDTH), torch.zeros(BATCH, 1, dtype=torch.long))
    plan = sw.plan(captured_profile(model, inputs), microbatches=4)
    devices = {plan.devices[0 if there == "first" else -1]: "sim:0", plan.devices[-1 if there == "first" else 0]: "cpu"}
    with torch.no_grad():
        expected = model(*inputs)
        for _ in range(2):
            sw.place(model, plan, devices=devices, microbatches=4)
            found = model(*inputs)
            assert {t.device.type for t in found.values()} == {"cpu"}
            torch.testing.assert_close(found, expected)
            assert forward_of(model).own.programs
            torch.testing.assert_close(model(*(t[:3] for t in inputs)), {k: t[:3] for k, t in expected.items()})
    sw.unplace(model)
    assert "forward" not in vars(model)
    assert {t.device.type for t in model.parameters()} == {"cpu"}


def test_a_backward_after_unplace_says_so(piped):
    """The threads that would run it are gone."""
    x = torch.randn(BATCH, WIDTH)
    _, placed = piped(Chain(), (x,))
    output = placed(x)
    sw.unplace(placed)
    with pytest.raises(sw.ShardwrightError, match="unplaced after its forward"):
        output.sum().backward()


def test_placing_anew_replaces(captured_profile):
    """With another number of micro-batches, and with none."""
    model, x = Chain(), torch.randn(BATCH, WIDTH)
    plan = sw.plan(captured_profile(model, (x,)), microbatches=4)
    expected = model(x)
    for microbatches in (4, 2, None):
        sw.place(model, plan, microbatches=microbatches)
        torch.testing.assert_close(model(x), expected)
        assert len([h for _, hooks, key in placement_hooks(model) for h in [hooks[key]]]) == (microbatches is not None)
    assert "forward" not in vars(model)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_pipelined_by_themselves(piped, copied):
    """A deep copy and a pickled model have parameters and threads of their own."""
    x = torch.randn(BATCH, WIDTH)
    model, placed = piped(Skips(), (x, torch.zeros(BATCH, 1, dtype=torch.long)))
    placed(x, torch.zeros(BATCH, 1, dtype=torch.long))
    twin = copied(placed)
    assert forward_of(twin).module is twin
    assert_same_step(model, twin, (x, torch.zeros(BATCH, 1, dtype=torch.long)))
    assert all(p.grad is None for p in placed.parameters())
    assert forward_of(twin).threads is not forward_of(placed).threads
    assert list(twin.state_dict()) == list(model.state_dict())


def test_replaced_parameters_are_found(piped):
    """A state dict that takes the parameters' places, in units and between them, is what is computed with."""
    args = torch.randn(BATCH, WIDTH), torch.randint(0, WIDTH, (BATCH, 2))
    model, placed = piped(Skips(), args)
    placed(*args)
    other = Skips().state_dict()
    for one in (model, placed):
        one.load_state_dict({name: t.clone() for name, t in other.items()}, assign=True)
    assert_same_step(model, placed, args)


def test_a_model_that_is_dropped_ends_its_threads(piped):
    """Nothing holds it: no thread, no graph."""
    x = torch.randn(BATCH, WIDTH)
    _, placed = piped(Chain(), (x,))
    losses(placed(x)).backward()
    gone = weakref.ref(placed)
    del placed
    gc.collect()
    assert gone() is None


def test_a_call_leaves_no_ring(piped):
    """What a forward keeps for its backward goes with the output, without waiting for the collector."""
    x = torch.randn(BATCH, WIDTH)
    _, placed = piped(Chain(), (x,))
    kept = []
    placed[0][1].register_forward_hook(lambda _module, _args, output: kept.append(weakref.ref(output)))
    placed(x)
    kept.clear()
    gc.collect()
    gc.disable()
    try:
        output = placed(x)
        assert all(ref() is not None for ref in kept)
        del output
        assert [ref() for ref in kept] == [None] * 4
    finally:
        gc.enable()


def test_under_modes_of_the_caller_the_forward_is_the_model_s(piped):
    """A counter of operations counts what a plain model does."""
    x = torch.randn(BATCH, WIDTH)
    model, placed = piped(Chain(), (x,))
    placed(x)
    counts = []
    for one in (model, placed):
        with FlopCounterMode(display=False) as counter:
            one(x)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


def test_activations_computed_anew(piped):
    """Checkpointing without reentrance, inside of units, works in the threads."""

    class Saving(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH))

        def forward(self, x):
            return checkpoint(self.inner, x, use_reentrant=False)

    x = torch.randn(BATCH, WIDTH)
    model, placed = piped(nn.Sequential(*[Saving() for _ in range(4)]), (x,))
    assert_same_step(model, placed, (x,))


# Cores


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="threads are pinned on Linux only")
def test_threads_are_pinned_and_the_caller_is_not():
    """Each stage's thread has its own cores and as many threads within an operator; the caller keeps what it had."""
    cores = sorted(os.sched_getaffinity(0))
    before = torch.get_num_threads(), os.sched_getaffinity(0)
    threads = StageThreads(
        [Seat("cpu:0", torch.device("cpu"), (cores[0],)), Seat("cpu:1", torch.device("cpu"), (cores[-1],))]
    )
    seen = {}

    def step(stage, _number, _received):
        seen[stage] = os.sched_getaffinity(0), torch.get_num_threads()

    threads.run(step, range(1))
    threads.end()
    assert seen == {0: ({cores[0]}, 1), 1: ({cores[-1]}, 1)}
    assert (torch.get_num_threads(), os.sched_getaffinity(0)) == before
    later = []
    thread = threading.Thread(target=lambda: later.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert later == [before[0]]
