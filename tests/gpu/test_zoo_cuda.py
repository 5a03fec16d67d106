"""The zoo on real devices: placed over the CPU and a GPU, loss and gradients are the model's own."""

import warnings

import numpy as np
import pytest
import torch
from zoo import ZOO

import shardwright as sw
from shardwright.profiler.recording.inputs import outputs_of
from shardwright.profiler.recording.unitgraph import mean_square_loss

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here"),
    pytest.mark.filterwarnings("ignore"),
]


def step(model, args, kwargs):
    """Loss and gradients of one step in evaluation, where nothing is drawn; in double precision rounding is small."""
    model.zero_grad()
    loss = mean_square_loss([t for t in outputs_of(model(*args, **kwargs)) if t.requires_grad])
    loss.backward()
    return {"loss": loss.detach().cpu()} | {n: p.grad.cpu() for n, p in model.named_parameters() if p.grad is not None}


NO_BACKWARD = {"rwkv", "monai_vae"}
"""In evaluation these change in place what their backward would need, on any device."""


@pytest.mark.parametrize("name", [name for name, entry in ZOO.items() if entry.trains and name not in NO_BACKWARD])
def test_placed_on_cpu_and_gpu(captured_profile, name):
    """Loss and gradients on (cpu, cuda:0) are the CPU's within rounding."""
    entry = ZOO[name]
    if entry.library != "torch":
        pytest.importorskip(entry.library.replace("-", "_"))
    torch.manual_seed(0)
    np.random.seed(0)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, args, kwargs = entry.make()
        model.eval()
        profile = captured_profile(model, args, kwargs, devices=["cpu:0", "cuda:0"], microbatches=(1,), refined=True)
        plan = sw.plan(profile, microbatches=1)
        torch.manual_seed(0)
        expected = step(model, args, kwargs)
        sw.place(model, plan)
        torch.manual_seed(0)
        found = step(model, args, kwargs)
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    for key, tensor in expected.items():
        difference = float((tensor - found[key]).abs().max())
        assert difference <= 2e-3 * float(tensor.abs().max()) + 1e-5 * largest, f"{key} differs by {difference:.2g}"
