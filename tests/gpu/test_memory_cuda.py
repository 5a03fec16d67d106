"""Counted memory held against the CUDA allocator's own figures: `pytest -m gpu` on a machine that has a GPU."""

import gc
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import shardwright as sw
from shardwright.profiler.memory import CUDA_BLOCK_BYTES, MemoryCounter, total_bytes

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here"),
]


def encoder():
    """Of a size at which the allocator's blocks, up to 1 MiB larger than what is asked for, do not count."""
    return nn.Sequential(*[nn.TransformerEncoderLayer(512, 8, 2048, batch_first=True) for _ in range(4)])


def step_of(model, x, optimizer, microbatches=1):
    """One training step; gradients are added to those from before."""

    def step():
        for piece in x.chunk(microbatches):
            model(piece).square().mean().backward()
        optimizer.step()

    return step


def allocator_peak(step):
    """The allocator's own peak during ``step``, beyond what was held before it."""
    torch.cuda.synchronize()
    held = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - held


@pytest.mark.parametrize("microbatches", [1, 4])
def test_the_counter_is_the_allocator(microbatches):
    """With its rounding, the counter's peak of a training step is within 3% of max_memory_allocated."""
    model, x = encoder().cuda(), torch.randn(64, 128, 512, device="cuda")
    step = step_of(model, x, torch.optim.Adam(model.parameters()), microbatches)
    step()  # libraries take their workspaces now
    counter = MemoryCounter(granularity=CUDA_BLOCK_BYTES)
    with counter:
        step()
    assert counter.peak_bytes == pytest.approx(allocator_peak(step), rel=0.03)


@pytest.mark.parametrize("microbatches", [1, 4])
def test_the_plan_is_the_allocator(captured_profile, microbatches):
    """The predicted peak of one GPU, counted on the CPU, is within 10% of max_memory_allocated in a real step there.

    The kernels differ: attention on a GPU keeps other things than on a CPU.
    """
    model, x = encoder(), torch.randn(64, 128, 512)
    profile = captured_profile(model, (x,), devices=["cuda:0"], microbatches=(1, microbatches), counted=True)
    predicted = sw.plan(profile, microbatches=microbatches).stages[0].memory_bytes
    model.cuda()
    x = x.cuda()
    optimizer = torch.optim.Adam(model.parameters())
    step = step_of(model, x, optimizer, microbatches)
    step()
    held = [*model.parameters(), *(p.grad for p in model.parameters()), x]
    held += [t for state in optimizer.state.values() for t in state.values()]
    assert predicted == pytest.approx(total_bytes(held) + allocator_peak(step), rel=0.10)


class Checkpointed(nn.Module):
    """An encoder whose layers are computed anew in the backward, in reentrant regions or others."""

    def __init__(self, *, reentrant):
        super().__init__()
        self.first = nn.Linear(512, 512)
        self.layers = nn.ModuleList(encoder())
        self.reentrant = reentrant

    def forward(self, x):
        x = self.first(x)
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=self.reentrant)
        return x


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_layers_are_predicted(captured_profile, reentrant):
    """The predicted peak is within 10% of the allocator's."""
    model, x = Checkpointed(reentrant=reentrant), torch.randn(64, 128, 512)
    profile = captured_profile(model, (x,), devices=["cuda:0"], microbatches=(1,), counted=True)
    predicted = sw.plan(profile, microbatches=1).stages[0].memory_bytes
    model.cuda()
    x = x.cuda()
    optimizer = torch.optim.Adam(model.parameters())
    step = step_of(model, x, optimizer)
    step()
    held = [*model.parameters(), *(p.grad for p in model.parameters()), x]
    held += [t for state in optimizer.state.values() for t in state.values()]
    peak = total_bytes(held) + allocator_peak(step)
    assert predicted == pytest.approx(peak, rel=0.10)


OWN_BYTES = 1 << 30
"""A process that has let go of its tensors takes no more of a GPU."""


def test_the_budget_leaves_room_for_the_context():
    """What a plan may use of a GPU, a worker process can really allocate."""
    gc.collect()
    torch.cuda.empty_cache()
    free, whole = torch.cuda.mem_get_info()
    if whole - free > OWN_BYTES:
        pytest.skip(f"{(whole - free) >> 20} MiB of the GPU are in use: it has to be free, so no tests beside")
    profile = sw.profile(nn.Sequential(nn.Linear(8, 8), nn.ReLU()), (torch.randn(4, 8),), devices=["cuda:0"], rounds=1)
    budget = profile.devices[0].memory_bytes
    program = f"import torch; torch.empty({budget}, dtype=torch.uint8, device='cuda:0'); torch.cuda.synchronize()"
    subprocess.run([sys.executable, "-c", program], check=True)
