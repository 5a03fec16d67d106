"""Stages computed anew in the backward: the model's gradients, the same random numbers, statistics updated once."""

import copy
import threading

import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

import shardwright as sw
from shardwright.errors import ShardwrightError
from shardwright.sharder.runtime.piping.recompute import Recomputation, RecomputedStage, Turns

WIDTH, BATCH = 6, 12


@pytest.fixture
def piped(captured_profile):
    """Places a copy of a model as a pipeline of recomputed stages; the copy."""

    def place(model, x, *, stages=2, microbatches=4):
        devices = [f"cpu:{index}" for index in range(stages)]
        profile = captured_profile(model, (x,), devices=devices, microbatches=(1, 2, 4))
        plan = sw.plan(profile, microbatches=4, recompute="always")
        assert len(plan.recomputed) == len(plan.stages) == stages
        return sw.place(copy.deepcopy(model), plan, microbatches=microbatches)

    return place


def stepped(model, x):
    """Output, and gradients of the input and all parameters."""
    model.zero_grad()
    given = x.clone().requires_grad_()
    output = model(given)
    output.pow(3).sum().backward()
    return output.detach(), given.grad, [p.grad for p in model.parameters()]


class Skips(nn.Module):
    """Skips over several stages."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(WIDTH, WIDTH) for _ in range(8)])

    def forward(self, x):
        kept = []
        for layer in self.layers[:4]:
            x = layer(x).tanh()
            kept.append(x)
        for layer in self.layers[4:]:
            x = layer(x + kept.pop())
        return x


class Thinned(nn.Module):
    """Products with a weight, of which half are dropped."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(WIDTH) + 0.5)

    def forward(self, x):
        return F.dropout(x * self.weight, 0.5, self.training)


class Counted(nn.Module):
    """Counts its calls in a buffer, and computes with the count."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return self.layer(x) * self.calls


@pytest.mark.parametrize("stages", [1, 2, 3])
def test_gradients_are_the_models(piped, stages):
    """With skips over stages, in one process: outputs and every gradient are those of the model."""
    model, x = Skips(), torch.randn(BATCH, WIDTH)
    torch.testing.assert_close(stepped(piped(model, x, stages=stages), x), stepped(model, x), rtol=1e-5, atol=1e-5)


def test_a_second_backward_computes_anew_again(piped):
    """What is computed anew in one backward with ``retain_graph`` is so in the next."""
    model, x = Skips(), torch.randn(BATCH, WIDTH)
    placed = piped(model, x)
    output = placed(x).sum()
    output.backward(retain_graph=True)
    once = [p.grad.clone() for p in placed.parameters()]
    output.backward()
    torch.testing.assert_close([p.grad for p in placed.parameters()], [2 * g for g in once])


def test_masks_are_those_of_the_first_forward(piped):
    """A product of weights and masks: the gradient of a weight is the output over it, if the masks are the same.

    All three stages draw from one generator, in threads that work at the same time; it is left where it was.
    """
    model, x = nn.Sequential(*[Thinned() for _ in range(6)]), torch.rand(240, WIDTH) + 0.5
    placed = piped(model, x, stages=3, microbatches=12)
    for _ in range(5):
        placed.zero_grad()
        output = placed(x)
        before = torch.get_rng_state()
        output.sum().backward()
        assert torch.equal(torch.get_rng_state(), before)
        assert output.count_nonzero() > 0
        for parameter in placed.parameters():
            torch.testing.assert_close(parameter.grad, (output.sum(0) / parameter).detach(), rtol=1e-4, atol=1e-4)


def test_masks_are_those_of_a_dropout_that_begins_later(piped):
    """A schedule that starts at no dropout: that the first calls draw nothing says nothing of the others."""
    model = nn.Sequential(*[nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Dropout(0.0)) for _ in range(4)])
    placed, x = piped(model, torch.rand(BATCH, WIDTH)), torch.rand(BATCH, WIDTH)
    for rate in (0.0, 0.5):
        for dropout in (m for m in placed.modules() if isinstance(m, nn.Dropout)):
            dropout.p = rate
        placed.zero_grad()
        output = placed(x)
        output.sum().backward()
        kept = output.detach().ne(0).float() / (1 - rate)  # the last mask, which scales the last layer's gradients
        torch.testing.assert_close(placed[3][0].bias.grad, kept.sum(0))


BEGUN, DREW = threading.Event(), threading.Event()
MEETING_S = 0.1
"""Two stages that compute at the same time have met by then; where one waits for its turn this passes by."""


class Early(nn.Module):
    """Drops nothing at first; later it does, while the next stage draws if it can."""

    def __init__(self):
        super().__init__()
        self.layer, self.rate = nn.Linear(WIDTH, WIDTH), 0.0

    def forward(self, x):
        if self.rate:
            BEGUN.wait(MEETING_S)
        x = F.dropout(self.layer(x), self.rate, self.training)
        DREW.set()
        return x


class Halves(nn.Module):
    """Draws one half of a mask, and the other when the stage before has drawn."""

    def __init__(self):
        super().__init__()
        self.weight, self.waits = nn.Parameter(torch.rand(WIDTH) + 0.5), False

    def forward(self, x):
        DREW.clear()
        first = torch.rand(len(x), WIDTH // 2)
        BEGUN.set()
        if self.waits:
            DREW.wait(MEETING_S)
        mask = torch.cat([first, torch.rand(len(x), WIDTH // 2)], dim=1)
        BEGUN.clear()
        return torch.ones_like(x) * self.weight * mask + 0 * x


def test_a_stage_that_begins_to_draw_takes_turns_from_then_on(captured_profile):
    """One that keeps its activations, and drew nothing in the first step, leaves the other's numbers alone later."""
    model, x = nn.Sequential(Early(), Halves()), torch.rand(BATCH, WIDTH)
    plan = sw.plan(
        captured_profile(model, (x,), microbatches=(1, 4)),
        microbatches=4,
        recompute="always",
        pins={"0": "cpu:0", "1": "cpu:1"},
    )
    stages = [plan.stages[0].model_copy(update={"recompute": False}), plan.stages[1]]
    placed = sw.place(model, plan.model_copy(update={"stages": tuple(stages)}), microbatches=4)
    placed(x).sum().backward()
    placed[0].rate, placed[1].waits = 0.5, True
    for _ in range(2):
        placed.zero_grad()
        output = placed(x)
        output.sum().backward()
        expected = (output.sum(0) / placed[1].weight).detach()
        torch.testing.assert_close(placed[1].weight.grad, expected)


class Normalised(nn.Module):
    """Batch statistics of a module, and of the forward itself."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH), nn.Linear(WIDTH, WIDTH))
        self.last = nn.Linear(WIDTH, WIDTH)
        self.register_buffer("mean", torch.zeros(WIDTH))
        self.register_buffer("var", torch.ones(WIDTH))

    def forward(self, x):
        return self.last(F.batch_norm(self.layers(x), self.mean, self.var, training=self.training))


@pytest.mark.parametrize("stages", [1, 2])
def test_batch_statistics_are_updated_once(piped, stages):
    """Running statistics and gradients are those of the micro-batches, each seen once."""
    model, x = Normalised(), torch.randn(BATCH, WIDTH)
    placed = piped(model, x, stages=stages)
    with pytest.warns(UserWarning, match="batch normalisation"):
        stepped(placed, x)
    stepped(placed, x)
    for _ in range(2):
        model.zero_grad()
        for piece in x.split(BATCH // 4):
            model(piece).pow(3).sum().backward()
    for key, value in model.state_dict().items():
        torch.testing.assert_close(placed.state_dict()[key], value)
    assert placed.layers[1].num_batches_tracked == 8
    grads = [[p.grad for p in one.parameters()] for one in (placed, model)]
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-4)


def test_a_buffer_that_the_forward_changes_is_refused_by_name():
    """The second forward would compute with another value."""
    stage = RecomputedStage(nn.Sequential(nn.Linear(WIDTH, WIDTH), Counted()), 1, torch.device("cpu"))
    with pytest.raises(ShardwrightError, match=r"stage 1 on cpu changes its buffer 1\.calls .*recompute='never'"):
        stage(torch.randn(2, WIDTH))


class Codes(nn.Module):
    """Changes a buffer past autograd's counter, after it was read or without ever reading it."""

    def __init__(self, *, reads):
        super().__init__()
        self.layer, self.reads = nn.Linear(WIDTH, WIDTH), reads
        self.register_buffer("codes", torch.ones(WIDTH))

    def forward(self, x):
        made = self.layer(x) * (self.codes.clone() if self.reads else 1)
        self.codes.data.mul_(0.9).add_(x.detach().mean(0), alpha=0.1)
        return made


def test_a_buffer_that_changes_unseen_is_refused_where_it_is_read():
    """As the codes of a quantisation that follow their means: the second forward would read later ones."""
    stage = RecomputedStage(Codes(reads=True), 1, torch.device("cpu"))
    with pytest.raises(ShardwrightError, match=r"stage 1 on cpu changes its buffer codes .*recompute='never'"):
        stage(torch.randn(2, WIDTH))


def test_a_buffer_that_changes_unseen_and_is_not_read_is_updated_once(piped):
    """Of each micro-batch, and the gradients are the model's."""
    model, x = nn.Sequential(*[Codes(reads=False) for _ in range(4)]), torch.randn(BATCH, WIDTH)
    placed = piped(model, x)
    for _ in range(2):
        placed(x).pow(2).sum().backward()
        for piece in x.split(BATCH // 4):
            model(piece).pow(2).sum().backward()
    for key, value in model.state_dict().items():
        torch.testing.assert_close(placed.state_dict()[key], value)
    torch.testing.assert_close(*[[p.grad for p in one.parameters()] for one in (placed, model)], rtol=1e-4, atol=1e-4)


def test_an_input_that_the_forward_changes_is_refused():
    """It is not there any more when it is needed again."""
    stage = RecomputedStage(nn.ReLU(inplace=True), 0, torch.device("cpu"))
    with pytest.raises(ShardwrightError, match="stage 0 on cpu changes its input 0"):
        stage(torch.randn(2, WIDTH))


def test_without_gradients_it_computes_as_it_is():
    """In evaluation nothing is checked or kept: a counter may count."""
    stage = RecomputedStage(Counted(), 0, torch.device("cpu"))
    with torch.no_grad():
        stage(torch.randn(2, WIDTH))
    assert stage.stage.calls == 1


def test_autocast_is_that_of_the_first_forward(piped):
    """The second forward computes in the same precision, though the backward is outside of the region."""
    model, x = Skips(), torch.randn(BATCH, WIDTH)
    placed = piped(model, x)
    found = []
    for one in (model, placed):
        with torch.autocast("cpu", torch.bfloat16):
            output = one(x)
        output.float().sum().backward()
        found.append((output.detach(), [p.grad for p in one.parameters()]))
    torch.testing.assert_close(found[1], found[0], rtol=3e-2, atol=3e-2)


def test_a_run_of_recomputed_stages_passes_the_gate(captured_profile):
    """Over two worker processes, with dropout and batch statistics, all gradients are the unsharded model's."""
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.3)) for _ in range(4)]
    model, x = nn.Sequential(*layers), torch.randn(16, 8)
    plan = sw.plan(captured_profile(model, (x,), microbatches=(1, 4)), microbatches=4, recompute="always")
    assert len(plan.stages) == 2
    run = sw.run(model, plan, (x,), steps=1)
    assert run.equality.gradients <= 1e-5
    assert run.equality.tensors == 4 + len(list(model.parameters()))


def test_a_turn_for_a_backward_holds_in_all_its_threads():
    """On a GPU a stage that is computed anew in it runs in a thread of PyTorch's, which must not wait for the turn."""
    turns = Turns(torch.device("cpu"), shared=False)
    module = nn.Dropout(0.5)
    anew = Recomputation("stage", {"": module}, turns)
    made = anew(module, [torch.ones(50, requires_grad=True)])
    thread = threading.Thread(target=made.sum().backward, daemon=True)
    with turns.kept():
        thread.start()
        thread.join(timeout=20)
        assert not thread.is_alive()


def test_a_backward_tells_nothing_of_what_a_stage_draws():
    """It leaves the generator as it was, whatever it draws again in between."""
    turns = Turns(torch.device("cpu"), shared=True)
    with turns.kept():
        pass
    with turns.taken() as state:
        torch.rand(1)
    assert state is not None
    assert turns.draws
