"""What a training's pipeline gives back: losses, results in evaluation, statistics, and what it refuses."""

import warnings

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F  # noqa: N812
from training import Chain, adamw, alone, made, made_pipe, on_ranks, planned, unsharded, workers

import shardwright as sw

__all__ = ["alone", "workers"]  # fixtures


def in_a_group_of_the_scripts(kind, plan):
    """In a rank: the script has a process group of its own, and keeps it."""
    dist.init_process_group("gloo")
    pipe = made_pipe(kind, plan)
    args, kwargs, target = kind.batch(0)
    loss = float(pipe.step(*args, target=target, **kwargs))
    pipe.close()
    total = torch.ones(1)
    dist.all_reduce(total)
    return loss, float(total)


def test_the_scripts_own_process_group_is_used(workers, captured_profile):
    """What the script has initialised serves, and outlives the pipeline."""
    ((loss, _),), _ = unsharded(Chain, [[0]])
    for found, total in on_ranks(workers, 2, in_a_group_of_the_scripts, Chain, planned(captured_profile, Chain, 2)):
        assert (found, total) == (pytest.approx(loss, rel=1e-5), 2.0)


class Normed(Chain):
    """Batch statistics."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Linear(6, 6), nn.Linear(6, 6))


@pytest.mark.usefixtures("alone")
def test_batch_statistics_are_those_of_micro_batches(captured_profile):
    """A warning names the layer and both sizes; the running statistics are as of four batches of two."""
    plan = planned(captured_profile, Normed, 1)
    with pytest.warns(UserWarning, match=r"layers\.1 normalises over a micro-batch of 2 samples .* the batch of 8"):
        pipe = made_pipe(Normed, plan)
    (x,), _, target = Normed.batch(0)
    pipe.step(x, target=target)
    model = made(Normed)
    for piece in x.split(2):
        model(piece)
    for key, value in pipe.state_dict().items():
        torch.testing.assert_close(value, model.state_dict()[key])


def normed_in_replicas(plan):
    """In a rank: what was warned of, and the whole state after a step."""
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        pipe = made_pipe(Normed, plan)
    (x,), _, target = Normed.batch(0)
    pipe.step(x, target=target)
    return [str(each.message) for each in warned], pipe.state_dict(full=True)


def test_batch_statistics_are_each_replicas_own(workers, captured_profile):
    """A warning says so, and those that are gathered are of the first replica's two batches of two."""
    (told_, state), _ = on_ranks(workers, 2, normed_in_replicas, planned(captured_profile, Normed, 1, replicas=2))
    assert any("running statistics for each replica, of which the first's are saved" in line for line in told_)
    model = made(Normed)
    (x,), _, _ = Normed.batch(0)
    for piece in x[:4].split(2):
        model(piece)
    for key, value in model.named_buffers():
        torch.testing.assert_close(state[key], value)


def normed_and_evaluated(plan):
    """In a rank: the result for a batch after some steps, and the whole state."""
    pipe = made_pipe(Normed, plan)
    for seed in range(3):
        (x,), _, target = Normed.batch(seed)
        pipe.step(x, target=target)
    return pipe(*Normed.batch(9)[0]), pipe.state_dict(full=True)


def test_one_model_is_evaluated(workers, captured_profile):
    """All replicas evaluate with the first's statistics: the result is that of the model that is saved."""
    plan = planned(captured_profile, Normed, 1, replicas=2)
    (found, state), (other, _) = on_ranks(workers, 2, normed_and_evaluated, plan)
    model = made(Normed)
    model.load_state_dict(state)
    expected = model.eval()(*Normed.batch(9)[0])
    torch.testing.assert_close(found, expected)
    assert torch.equal(found, other)


@pytest.mark.usefixtures("alone")
def test_a_loss_may_be_a_sum(captured_profile):
    """With reduction="sum" the micro-batches' losses and gradients are added up."""
    pipe = made_pipe(Chain, planned(captured_profile, Chain, 1), loss=summed, reduction="sum")
    (x,), _, target = Chain.batch(0)
    model = made(Chain)
    expected = summed(model(x), target)
    expected.backward()
    assert float(pipe.step(x, target=target)) == pytest.approx(float(expected.detach()), rel=1e-5)
    gradients = {name: p.grad for name, p in pipe.named_parameters()}
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad)


def summed(output, target):
    return F.mse_loss(output, target, reduction="sum")


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("recompute", ["never", "always"])
def test_batch_statistics_are_updated_once_a_step(captured_profile, recompute):
    """Also where the forward comes again in the backward, in steps and not in evaluation."""
    with pytest.warns(UserWarning, match="normalises over a micro-batch"):
        pipe = made_pipe(Normed, planned(captured_profile, Normed, 1, recompute=recompute))
    (x,), _, target = Normed.batch(0)
    pipe.step(x, target=target)
    pipe.evaluate(x, target=target)
    assert pipe.state_dict()["layers.1.num_batches_tracked"] == 4


class Dropped(Chain):
    """Dropout inside units and between them."""

    def forward(self, x):
        return F.dropout(self.layers(x), 0.5, self.training)


@pytest.mark.usefixtures("alone")
def test_results_are_those_of_evaluation(captured_profile):
    """Dropout in the forward itself works in steps and rests in results, whatever the mode; no gradient is kept."""
    pipe = made_pipe(Dropped, planned(captured_profile, Dropped, 1))
    (x,), _, target = Dropped.batch(0)
    model = made(Dropped).eval()
    torch.testing.assert_close(pipe(x), model(x))
    assert not pipe(x).requires_grad
    assert float(pipe.evaluate(x, target=target)) == pytest.approx(
        float(F.mse_loss(model(x), target).detach()), rel=1e-5
    )
    assert len({float(pipe.step(x, target=target)) for _ in range(3)}) == 3
    assert pipe.module.training


@pytest.mark.usefixtures("alone")
def test_autocast_is_part_of_the_pipeline(captured_profile):
    """Made in a region it computes as the model does there, loss included; outside of it a step is refused."""
    plan = planned(captured_profile, Chain, 1)
    (x,), _, target = Chain.batch(0)
    seen = []

    def loss(output, target):
        seen.append((output.dtype, torch.is_autocast_enabled("cpu")))
        return F.mse_loss(output.float(), target)

    with torch.autocast("cpu", torch.bfloat16):
        expected = F.mse_loss(made(Chain)(x).float(), target)
        pipe = made_pipe(Chain, plan, loss=loss)
        found = pipe.step(x, target=target)
    assert float(found) == pytest.approx(float(expected.detach()), rel=1e-3)
    assert set(seen) == {(torch.bfloat16, True)}
    with pytest.raises(sw.ShardwrightError, match=r"autocast is none here and was torch\.bfloat16 where"):
        pipe.step(x, target=target)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda pipe, x: pipe.step(x.double(), target=x),
            r"made for inputs \[0\] float32 8x6, .*these are .*float64 8x6",
        ),
        (lambda pipe, x: pipe.step(x[:, :3], target=x), "these are .*float32 8x3: call it as its sample"),
        (lambda pipe, x: pipe.step(input=x, target=x), r"these are \['input'\] float32 8x6"),
        (lambda pipe, x: pipe.step(x[:0], target=x), "these inputs hold no samples"),
        (lambda pipe, _: pipe.load("nowhere"), "no checkpoint in nowhere"),
        (lambda pipe, _: pipe.load_state_dict({}), r"the state has no layers.0.weight"),
        (lambda pipe, x: pipe.load_state_dict(pipe.state_dict() | {"more": x}), "has more, which the model has not"),
        (
            lambda pipe, x: pipe.load_state_dict(pipe.state_dict() | {"layers.0.bias": x}),
            r"layers.0.bias has shape \(8, 6",
        ),
        (lambda pipe, _: pipe.optimizer_state_dict(adamw(nn.Linear(2, 2))), "make it over pipe.parameters"),
        (lambda pipe, _: pipe.load_optimizer_state_dict(adamw(pipe), {}), "has nothing for layers.0.weight"),
    ],
)
@pytest.mark.usefixtures("alone")
def test_what_does_not_fit_is_refused(captured_profile, call, message):
    """One line says what was given and what belongs there."""
    pipe = made_pipe(Chain, planned(captured_profile, Chain, 1))
    with pytest.raises(sw.ShardwrightError, match=message) as caught:
        call(pipe, Chain.batch(0)[0][0])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda output, _: output, r"the loss function returned a tensor of shape \(2, 6\)"),
        (lambda *_: 1.0, "the loss function returned float"),
        (None, "there is no loss to train with"),
    ],
)
@pytest.mark.usefixtures("alone")
def test_a_loss_is_one_number(captured_profile, loss, message):
    """What else a loss function returns is refused."""
    pipe = made_pipe(Chain, planned(captured_profile, Chain, 1), loss=loss)
    (x,), _, target = Chain.batch(0)
    with pytest.raises(sw.ShardwrightError, match=message):
        pipe.step(x, target=target)


class Guarded(Chain):
    """Writes a buffer where no gradient is wanted: in evaluation nothing is, and the capture has other steps."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(6))

    def forward(self, x):
        x = self.layers(x)
        with torch.no_grad():
            self.mean.mul_(0.5).add_(x.mean(0))
        return x + self.mean


@pytest.mark.usefixtures("alone")
def test_a_region_without_gradients_is_evaluated_too(captured_profile):
    """And trained with another size of batch than the plan's, which is captured anew."""
    plan = planned(captured_profile, Guarded, 1)
    with pytest.warns(UserWarning, match="mean is written by the forward, once for each of 4 micro-batches"):
        pipe = made_pipe(Guarded, plan)
    (x,), _, target = Guarded.batch(0)
    model = made(Guarded)
    torch.testing.assert_close(pipe(x[:2]), model(x[:2]))
    assert torch.isfinite(pipe.step(x[:6], target=target[:6]))


@pytest.mark.usefixtures("alone")
def test_another_size_of_batch_under_autocast(captured_profile):
    """Views and casts that the plan's capture has not are where what they read is made."""
    with torch.autocast("cpu", torch.bfloat16):
        plan = planned(captured_profile, Chain, 1)
        pipe = made_pipe(Chain, plan)
        (x,), _, target = Chain.batch(0)
        found = float(pipe.step(x[:5], target=target[:5]))
        expected = Chain.loss(made(Chain)(x[:5]), target[:5]).item()
    assert found == pytest.approx(expected, rel=1e-2)
