"""Stages on devices of several kinds: a CPU worker and a simulated device, which like a GPU has tensors of its own."""

import os

import pytest
import torch
from torch import nn

import shardwright as sw
from shardwright.profiler.measure import prepare
from shardwright.profiler.profile import Device
from shardwright.profiler.trace import trace
from shardwright.profiler.workers.pool import Pool
from shardwright.profiler.workers.worker import resident
from shardwright.sharder.runtime import session as session_module
from shardwright.sharder.runtime.check import check_can_be_piped, units_of
from shardwright.sharder.runtime.gates.gate import compare
from shardwright.sharder.runtime.gates.unitwise import UnitByUnit
from shardwright.sharder.runtime.piping.cut import cut
from shardwright.sharder.runtime.piping.hosted import HostedStage, backend_of, is_hosted
from shardwright.sharder.runtime.placing.sim import parameters_may_move, sim_device
from shardwright.sharder.runtime.session import Session, Split


class Positions(nn.Module):
    """Makes tensors of its own between its units, on the device of its input, and has a skip and tied weights."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(12, 8)
        self.place = nn.Embedding(5, 8)
        self.layers = nn.ModuleList([nn.Linear(8, 8) for _ in range(4)])
        self.head = nn.Linear(8, 12, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens):
        x = skip = self.embed(tokens) + self.place(torch.arange(5, device=tokens.device))
        for layer in self.layers:
            x = torch.relu(layer(x))
        return self.head(x + skip) * torch.arange(1, 6, device=tokens.device)[:, None]


def become_simulated():
    """From now on this worker's device is one that does not mix with the host."""
    from shardwright.sharder.runtime import pipeline

    pipeline._bring = lambda *_: None  # in place, which a simulated device cannot; .to(device) follows
    resident["device"] = sim_device(0)
    resident["moving"] = parameters_may_move()
    resident["moving"].__enter__()


@pytest.mark.parametrize("simulated", ["cpu:0", "cpu:1"])
@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
def test_mixed_stages_are_the_model(monkeypatch, tmp_path, captured_profile, simulated, schedule):
    """On PyTorch's engine, with either stage elsewhere: outputs and gradients of the plain model, ties among them; and
    what every step makes, and its gradients."""
    torch.manual_seed(0)
    model, tokens = Positions(), torch.randint(0, 12, (8, 5))
    profile = captured_profile(model, (tokens,), microbatches=(1, 4))
    pins = {"layers.0": "cpu:0", "layers.1": "cpu:0", "layers.2": "cpu:1", "layers.3": "cpu:1"}
    plan = sw.plan(profile, microbatches=4, pins=pins, schedule=schedule)
    assert len(plan.stages) == 2
    assert plan.ties
    capture = trace(model, (tokens[:2],), {}, train=True, units=units_of(plan, model))
    split = Split("plan", plan, cut(capture, plan), capture.output_places, capture)
    core = sorted(os.sched_getaffinity(0))[0]
    devices = [Device(name=d, kind="cpu", description="", memory_bytes=1, cores=(core,)) for d in plan.devices]
    monkeypatch.setattr(session_module, "is_hosted", lambda _: True)
    other = next(device for device in plan.devices if device != simulated)
    with Pool(devices) as pool:
        pool.call({d.name: (prepare, (d.name, 1)) for d in devices}, limit_s=120)
        pool.call({simulated: (become_simulated, ())}, limit_s=60)
        session = Session(pool, model, (tokens,), {}, [split], 60.0)
        monkeypatch.setattr(session_module, "prepare", lambda *_: None)
        session.begin(devices, str(tmp_path / "store"))
        session.hold(split)
        found = session.check(split)
        session.hold_whole(other, 4, split.output_places, plan)
        equality = compare(session.check_whole(other), found)
        steps = frozenset(value.node.name for value in capture.values.values())
        seen = [*session.observe(split, steps, gradients=False), *session.observe(split, steps, gradients=True)]
        assert [{key.stage for key in each} for each, _ in seen] == [{0}, {1}] * 2
        assert not any(drawing for _, drawing in seen)
        with session.reference(other) as call:
            by_units = UnitByUnit(session, split, found, other_kernels=False).compared(call, observing=True)
        assert (by_units.tensors, by_units.how) == (equality.tensors, "unit by unit")
        assert session.step(split) > 0
    assert equality.gradients < 1e-5
    assert "embed.weight" in found[0].gradients
    assert torch.equal(found[0].gradients["embed.weight"], found[1].gradients["head.weight"])


def test_a_plan_of_one_kind_is_not_hosted(captured_profile):
    """Workers of the CPU talk as they did, and a hosted stage stays where it is when the engine moves it."""
    model, x = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), torch.randn(8, 4)
    assert not is_hosted(sw.plan(captured_profile(model, (x,), microbatches=(1, 2)), microbatches=2))
    mixed = sw.plan(captured_profile(model, (x,), devices=["cpu:0", "cuda:0"], microbatches=(1, 2)), microbatches=2)
    assert is_hosted(mixed)
    check_can_be_piped(mixed, model)
    meta = HostedStage(model.to("meta"), torch.device("meta"), last=False)
    assert meta.to("cpu") is meta
    assert {p.device.type for p in meta.parameters()} == {"meta"}


@pytest.mark.parametrize(
    ("devices", "there", "backend", "hosted"),
    [
        (("cuda:0", "cuda:1"), True, "cpu:gloo,cuda:nccl", False),
        (("cuda:0", "cuda:1"), False, "gloo", True),
        (("cuda:0",), False, "gloo", True),
        (("cpu:0", "cuda:0"), True, "gloo", True),
        (("cpu:0", "cpu:1"), True, "gloo", False),
    ],
)
def test_gpus_without_nccl_are_hosted(monkeypatch, captured_profile, devices, there, backend, hosted):
    """Where PyTorch was built without it; workers of the CPU are where the engine is."""
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: there)
    model, x = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), torch.randn(8, 4)
    pins = dict(zip("01", devices, strict=False)) if len(devices) > 1 else {}
    plan = sw.plan(captured_profile(model, (x,), devices=devices, microbatches=(1, 2)), microbatches=2, pins=pins)
    assert plan.devices == devices
    assert (backend_of(plan.devices), is_hosted(plan)) == (backend, hosted)
