"""Pipelines of one process on a GPU: streams, a thread a device; `pytest -m gpu` on a machine that has one."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

import shardwright as sw

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here"),
]
PLACES = {"two stages on one GPU": "cuda:0", "a CPU worker and a GPU": "cpu"}


class Branches(nn.Module):
    """Layers whose first output is added again behind the cut: a skip crosses it beside the activation."""

    def __init__(self, width=256):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(width, width) for _ in range(6)])
        self.head = nn.Linear(width, 10)

    def forward(self, x):
        x = skip = self.layers[0](x)
        for layer in self.layers[1:]:
            x = torch.relu(layer(x)) + 0.1 * skip
        return self.head(x)


@pytest.fixture(autouse=True)
def full_precision():
    """TF32 would hide small errors."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


def placed(model, x, captured_profile, home, microbatches):
    """A copy of the model as a pipeline over two stages, the second on cuda:0."""
    profile = captured_profile(model, (x,), devices=["cpu:0", "cuda:0"], microbatches=(1, microbatches))
    pins = {"layers.0": "cpu:0", "layers.1": "cpu:0", "layers.2": "cpu:0", "head": "cuda:0", "layers.5": "cuda:0"}
    plan = sw.plan(profile, microbatches=microbatches, pins=pins)
    return sw.place(copy.deepcopy(model), plan, devices={"cpu:0": home}, microbatches=microbatches)


@pytest.mark.parametrize("home", PLACES.values(), ids=PLACES.keys())
@pytest.mark.parametrize("microbatches", [1, 4, 8])
def test_training_is_the_plain_model(captured_profile, home, microbatches):
    """Losses and weights of 20 steps of AdamW, other values each: a tensor read too early would not be the same."""
    torch.manual_seed(0)
    model = Branches()
    batches = [(torch.randn(64, 256), torch.randint(0, 10, (64,))) for _ in range(20)]
    pipelined = placed(model, batches[0][0], captured_profile, home, microbatches)
    assert {p.device.type for p in pipelined.parameters()} == {torch.device(home).type, "cuda"}
    ours, theirs = (torch.optim.AdamW(m.parameters(), lr=1e-3) for m in (pipelined, model))
    for x, y in batches:
        losses = []
        for m, optimizer in ((pipelined, ours), (model, theirs)):
            optimizer.zero_grad()
            loss = F.cross_entropy(m(x), y)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    for found, expected in zip(pipelined.parameters(), model.parameters(), strict=True):
        assert torch.allclose(found.cpu(), expected, atol=2e-4)


@pytest.mark.parametrize("home", PLACES.values(), ids=PLACES.keys())
def test_a_busy_gpu_is_waited_for(captured_profile, home):
    """What the caller has in the default stream is done before a stage reads it, and the other way round."""
    torch.manual_seed(0)
    model = Branches(1024)
    x = torch.randn(64, 1024)
    pipelined = placed(model, x, captured_profile, home, 8)
    heavy = torch.randn(4096, 4096, device="cuda")
    for number in range(5):
        given = torch.empty(64, 1024, device="cuda")
        for _ in range(10):
            heavy = heavy @ heavy
            heavy /= heavy.norm()
        given.copy_(x.cuda() * (number + 1))  # enqueued behind the products
        found = pipelined(given) * 2.0  # enqueued on the caller's stream
        assert found.device.type == "cuda"
        expected = model(x * (number + 1)) * 2.0
        assert torch.allclose(found.cpu(), expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))
