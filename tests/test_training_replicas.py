"""Ranks beside each other: replicas that start alike, draw apart, and sum what some of them reach."""

import itertools
import os

import pytest
import torch
from torch import nn
from training import Branches, Chain, made, made_pipe, on_ranks, planned, workers

import shardwright as sw

__all__ = ["workers"]  # fixtures


def seeded_apart(kind, plan):
    """In a rank: the weights that it starts with, where every rank's model was made with numbers of its own."""
    torch.manual_seed(int(os.environ["RANK"]))
    args, kwargs, _ = kind.batch(0)
    pipe = sw.pipeline(kind(), plan, args, kwargs, loss=kind.loss, timeout_s=20.0)
    return {name: value.clone() for name, value in pipe.state_dict().items()}


class Kinds(Chain):
    """What gloo knows no dtype of, what does not lie in its memory as it is read, and what is empty."""

    def __init__(self):
        super().__init__()
        self.turned = nn.Parameter(torch.rand(6, 6).t())
        self.register_buffer("short", torch.randint(9, (6,), dtype=torch.int16))
        self.register_buffer("turns", torch.view_as_complex(torch.rand(6, 2)))
        self.register_buffer("mask", torch.rand(6) > 0.5)
        self.register_buffer("repeated", torch.rand(6, 1, 1).expand(6, 6, 500))
        self.register_buffer("none", torch.rand(0, 3))

    def forward(self, x):
        x = (x @ self.turned + self.short + self.turns.real) * self.mask + self.repeated[:, 0, 0]
        return self.layers(x) + self.none.sum()


@pytest.mark.parametrize(("kind", "stages"), [(Branches, 2), (Kinds, 1)])
def test_replicas_start_alike(workers, captured_profile, kind, stages):
    """Whatever the ranks' models were made with, weights and buffers are the first replica's."""
    plan = planned(captured_profile, kind, stages, replicas=2)
    found = on_ranks(workers, 2 * stages, seeded_apart, kind, plan)
    for own, other in zip(found[:stages], found[stages:], strict=True):
        assert own.keys() == other.keys()
        assert all(torch.equal(own[name], other[name]) for name in own)


class Graph(Chain):
    """A sparse matrix, which the first and the last stage multiply by."""

    layout = torch.sparse_coo

    def __init__(self):
        super().__init__()
        self.register_buffer("edges", torch.diag(torch.rand(6) + 0.5).to_sparse(layout=self.layout))

    def forward(self, x):
        return (self.edges @ self.layers((self.edges @ x.t()).t()).t()).t()


class Rows(Graph):
    """The same in compressed rows."""

    layout = torch.sparse_csr


def sparse_states(kind, plan):
    """In a rank whose model was made with numbers of its own: its matrix, the loss, and the matrix twice as large."""
    torch.manual_seed(int(os.environ["RANK"]))
    (x,), _, target = kind.batch(0)
    pipe = sw.pipeline(kind(), plan, (x,), loss=kind.loss, timeout_s=20.0)
    own, loss = pipe.state_dict()["edges"].to_dense(), float(pipe.step(x, target=target))
    whole = pipe.state_dict(full=True)
    pipe.load_state_dict({key: value * 2 for key, value in whole.items()}, full=True)
    return own, loss, pipe.state_dict()["edges"].to_dense()


@pytest.mark.parametrize("kind", [Graph, Rows])
@pytest.mark.parametrize(("stages", "replicas"), [(2, 1), (1, 2)])
@pytest.mark.filterwarnings("ignore:Sparse CSR")
def test_sparse_buffers_are_the_first_ones(workers, captured_profile, kind, stages, replicas):
    """In all stages and replicas that have one, from the beginning and where a state is handed out."""
    plan = planned(captured_profile, kind, stages, replicas=replicas)
    (first, loss, twice), (other, same, again) = on_ranks(workers, 2, sparse_states, kind, plan)
    torch.manual_seed(0)
    assert torch.equal(first, kind().edges.to_dense())
    assert torch.equal(first, other)
    assert loss == same
    assert torch.equal(twice, 2 * first)
    assert torch.equal(again, 2 * first)


class Way(nn.Module):
    """Of three layers the one that the samples' sign says; the third is never taken."""

    def __init__(self):
        super().__init__()
        self.up, self.down, self.never = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x):
        return self.up(x) if bool(x.sum() > 0) else self.down(x)


class Routed(Chain):
    """A layer whose parameters the first half of a batch reaches otherwise than the second."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(Way(), nn.Linear(6, 6), nn.Linear(6, 6).requires_grad_(False))

    @staticmethod
    def batch(seed, size=8):
        (x,), _, target = Chain.batch(seed, size)
        return (x.abs() * torch.ones(size, 1).index_fill_(0, torch.arange(size // 2, size), -1.0),), {}, target


class Repeated(Chain):
    """Beside its result, whole numbers and a part of the input that repeat their memory."""

    def forward(self, x):
        return {"found": self.layers(x), "places": torch.arange(6).expand(3, 6), "wide": x[:, :1].expand(-1, 6)}


def result(kind, plan):
    """In a rank: the model's result for a batch."""
    return made_pipe(kind, plan)(*kind.batch(1)[0])


@pytest.mark.parametrize(("stages", "replicas"), [(2, 1), (1, 2)])
def test_results_may_repeat_their_memory(workers, captured_profile, stages, replicas):
    """Every rank has their values."""
    expected = made(Repeated)(*Repeated.batch(1)[0])
    plan = planned(captured_profile, Repeated, stages, replicas=replicas)
    for found in on_ranks(workers, 2, result, Repeated, plan):
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value)


def gradients_of(kind, plan):
    """In a rank: the gradients of two batches, of which the second trains what was frozen."""
    pipe = made_pipe(kind, plan)
    for seed in range(2):
        (x,), _, target = kind.batch(seed)
        pipe.step(x, target=target)
        for parameter in pipe.parameters():
            parameter.requires_grad_()
    return {name: None if p.grad is None else p.grad.clone() for name, p in pipe.named_parameters()}


def test_what_the_samples_of_some_replicas_reach_is_summed(workers, captured_profile):
    """One replica's samples reach other parameters than the other's, and what no sample reaches has no gradient."""
    model = made(Routed)
    for seed in range(2):
        (x,), _, target = Routed.batch(seed)
        for part, wanted in zip(x.split(2), target.split(2), strict=True):
            (Routed.loss(model(part), wanted) / 4).backward()
        model.requires_grad_()
    for found in on_ranks(workers, 2, gradients_of, Routed, planned(captured_profile, Routed, 1, replicas=2)):
        for name, parameter in model.named_parameters():
            assert (found[name] is None) == (parameter.grad is None) == ("never" in name), name
            if parameter.grad is not None:
                torch.testing.assert_close(found[name], parameter.grad)


class Noisy(Chain):
    """Dropout in the first layers alone."""

    def __init__(self):
        super().__init__()
        noisy = [nn.Linear(6, 6), nn.Dropout(0.5), nn.Linear(6, 6), nn.Dropout(0.5)]
        self.layers = nn.Sequential(*noisy, *[nn.Linear(6, 6) for _ in range(4)])


def noise(plan, seed):
    """In a rank: what dropout left in two steps, and a number that the script draws after them."""
    torch.manual_seed(seed)
    pipe, seen = made_pipe(Noisy, plan), []
    torch.manual_seed(seed)
    for module in pipe.module.modules():
        if isinstance(module, nn.Dropout):
            module.register_forward_hook(lambda _module, _args, output: seen.append(output != 0))
    (x,), _, target = Noisy.batch(0)
    for _ in range(2):
        pipe.step(x, target=target)
    return torch.stack(seen) if seen else None, float(torch.rand(()))


def test_ranks_draw_numbers_of_their_own(workers, captured_profile):
    """Replicas that are seeded alike drop other entries, again the same ones; and the script's numbers go on alike."""
    plan = planned(captured_profile, Noisy, 2, replicas=2)
    first, again = (on_ranks(workers, 4, noise, plan, 0) for _ in range(2))
    torch.manual_seed(0)
    assert [number for _, number in first] == [float(torch.rand(()))] * 4
    masks = [mask for mask, _ in first if mask is not None]
    assert len(masks) in (2, 4)
    pairs = itertools.combinations([step for mask in masks for step in mask.chunk(2)], 2)
    assert not any(a.shape == b.shape and torch.equal(a, b) for a, b in pairs)
    for (mask, _), (other, _) in zip(first, again, strict=True):
        assert (mask is None and other is None) or torch.equal(mask, other)
