"""Pipelining in one process: batches of any size, results of any structure, and what is refused."""

import inspect
import warnings
from dataclasses import dataclass

import pytest
import torch
from inprocess import BATCH, WIDTH, Chain, assert_same_step, losses, piped
from torch import nn
from torch.nn import functional as F  # noqa: N812

import shardwright as sw
from shardwright.profiler.recording.placed import placement_hooks
from shardwright.sharder.runtime.placing.sim import sim_device

__all__ = ["piped"]  # fixtures


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
