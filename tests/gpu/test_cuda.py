"""The same promises on a GPU: run with `pytest -m gpu` on a machine that has one."""

import copy

import pytest
import torch
from torch import nn

import shardwright as sw
from shardwright.profiler.measuring.messages import pattern

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here"),
]


def relative(a, b):
    return float((a.cpu() - b.cpu()).abs().max() / b.cpu().abs().max())


@pytest.fixture(autouse=True)
def full_precision():
    """TF32 would hide small errors."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


def test_a_gpu_is_measured(containers):
    """Times from CUDA events and the allocator's peak, for every unit; links both ways."""
    (x,) = containers.NetDict.sample_inputs()
    profile = sw.profile(containers.NetDict(), (x,), devices=["cuda:0", "cpu:0"], microbatches=[1, 4], rounds=2)
    rows = [m for m in profile.measurements if m.device == "cuda:0"]
    timed = [node for node in profile.nodes if node.kind in ("unit", "glue", "output")]
    assert len(rows) == 2 * len(timed)
    assert all(m.forward_s > 0 and m.peak_bytes is not None for m in rows)
    assert {(link.source, link.target) for link in profile.links} == {("cuda:0", "cpu:0"), ("cpu:0", "cuda:0")}
    assert all(link.bandwidth_bytes_per_s > 1e8 for link in profile.links)
    assert all(link.busy_bandwidth_bytes_per_s > 1e8 for link in profile.links)
    assert all(link.probed_bytes and not link.corrupt and link.peer is None for link in profile.links)


@pytest.mark.parametrize("device", ["cuda:0", "cpu"])
def test_a_pattern_is_the_same_on_every_device(device):
    """The GPU makes the bytes that the host makes, so that neither has to send them for the comparison."""
    assert torch.equal(pattern(2**31 - 5, 100_000, device).cpu(), pattern(2**31 - 5, 100_000))


@pytest.mark.parametrize("disabled", ["0", "1"])
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_two_gpus_are_linked(monkeypatch, disabled):
    """Both directions, straight where the GPUs can and NCCL may, and staged in the host's memory otherwise."""
    monkeypatch.setenv("NCCL_P2P_DISABLE", disabled)
    model, x = nn.Sequential(*[nn.Linear(64, 64) for _ in range(4)]), torch.randn(8, 64)
    profile = sw.profile(model, (x,), devices=["cuda:0", "cuda:1"], rounds=2)
    possible = torch.cuda.can_device_access_peer(0, 1) and torch.cuda.can_device_access_peer(1, 0)
    assert [link.peer for link in profile.links] == [possible and disabled == "0"] * 2
    assert all(link.probed_bytes and link.busy_bandwidth_bytes_per_s > 1e8 for link in profile.links)


@pytest.mark.parametrize("name", ["Net", "NetList", "NetDict"])
def test_placed_on_cpu_and_gpu(containers, captured_profile, name):
    """Outputs and gradients on (cpu, cuda:0) equal the CPU's within rounding; training steps on."""
    model = getattr(containers, name)()
    x = type(model).sample_inputs()[0][:4, :, :24, :24].contiguous()
    plan = sw.plan(captured_profile(model, (x,), devices=["cpu:0", "cuda:0"]), microbatches=2)
    placed = sw.place(copy.deepcopy(model), plan)
    assert {p.device.type for p in placed.parameters()} == {"cpu", "cuda"}
    expected, found = model(x), placed(x)
    assert found.device == x.device
    assert relative(found, expected) < 1e-4
    expected.square().mean().backward()
    found.square().mean().backward()
    gradients = dict(placed.named_parameters())
    for key, parameter in model.named_parameters():
        assert relative(gradients[key].grad, parameter.grad) < 1e-3
    torch.optim.Adam(placed.parameters()).step()
    sw.unplace(placed)
    assert {p.device.type for p in placed.parameters()} == {"cpu"}


def test_one_gpu_runs_and_is_compared():
    """A plan for one GPU goes through the workers, the gate and the timing."""
    model, x = nn.Sequential(*[nn.Linear(256, 256) for _ in range(4)]), torch.randn(64, 256)
    profile = sw.profile(model, (x,), devices=["cuda:0"], rounds=2)
    run = sw.run(model, sw.plan(profile), (x,), steps=3)
    assert run.devices == ("cuda:0",)
    assert run.equality.gradients < 1e-5
    assert run.accounts is not None
    account = run.accounts.stages[0].measured
    assert min(account.forward_s, account.backward_s, account.update_s) > 0
    assert account.step_s == pytest.approx(run.accounts.measured_s)
    (weighed,) = run.memory  # without the libraries' workspaces, which no plan counts
    assert weighed.measured_bytes == pytest.approx(weighed.predicted_bytes, rel=0.05, abs=2**20)


def test_verifying_leaves_cuda_training_alone(containers, captured_profile):
    """Simulated devices live in a process of their own, so that training on the GPU goes on after a check."""
    model = containers.NetList()
    x = type(model).sample_inputs()[0][:4, :, :24, :24].contiguous()
    plan = sw.plan(captured_profile(model, (x,), devices=["cuda:0", "cuda:1"]), microbatches=2)
    assert sw.verify(model, plan, (x,)).ok
    model.cuda()(x.cuda()).square().mean().backward()
    assert all(p.grad is not None for p in model.parameters())
