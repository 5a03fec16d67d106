"""Verifying without a GPU: a missing transfer is found and named."""

import copy
import random

import pytest
import torch
from torch import nn

import shardwright as sw
from shardwright.profiler.recording.placed import placement_hooks
from shardwright.sharder.runtime.placing.hooks import UnitForward
from shardwright.sharder.runtime.placing.sim import sim_device
from shardwright.sharder.runtime.placing.whole import WholeForward
from shardwright.sharder.runtime.verify import _verified_apart


@pytest.fixture
def netdict(containers, captured_profile):
    model, x = containers.NetDict(), torch.randn(2, 1, 16, 16)
    return model, x, sw.plan(captured_profile(model, (x,)), microbatches=2)


@pytest.mark.parametrize("name", ["Net", "NetList", "NetDict"])
def test_a_plan_verifies(containers, captured_profile, name):
    """Each network's plan holds, and what crosses is counted."""
    model = getattr(containers, name)()
    x = type(model).sample_inputs()[0][:2, :, :16, :16]
    plan = sw.plan(captured_profile(model, (x,)), microbatches=2)
    check = sw.verify(model, plan, (x,))
    assert check
    assert check.transfers > 0
    assert {p.device.type for p in model.parameters()} == {"cpu"}
    assert not list(placement_hooks(model))


def test_a_planted_missing_transfer_is_caught(netdict):
    """Where nothing fetches a unit's input, the unit and its operation are named."""
    model, x, plan = netdict
    placed = sw.place(copy.deepcopy(model), plan, devices={d: sim_device(i) for i, d in enumerate(plan.devices)})
    assert sw.verify(placed, plan, (x,))
    names = {module: name for name, module in placed.named_modules()}
    hooks = [(module, hooks[key]) for module, hooks, key in placement_hooks(placed)]
    planted = [(module, hook) for module, hook in hooks if isinstance(hook, UnitForward)]
    assert planted
    for module, hook in planted:
        hook.passes = True
        check = sw.verify(placed, plan, (x,))
        assert not check
        assert check.mismatch.unit == names[module]
        assert check.mismatch.operation == "aten.convolution"
        assert check.mismatch.site.startswith("containers.py:")
        assert set(check.mismatch.devices) == set(plan.devices)
        assert names[module] in str(check)
        hook.passes = False
    assert sw.verify(placed, plan, (x,))


def test_a_replay_in_another_process_leaves_the_placement(captured_profile):
    """Where there is CUDA the model goes elsewhere without its placement; here it is placed as it was."""
    model, x = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), torch.randn(2, 4)
    expected = model(x)
    plan = sw.plan(captured_profile(model, (x,)), microbatches=1, pins={"0": "cpu:0", "1": "cpu:1"})
    placed = sw.place(model, plan, devices={d: sim_device(i) for i, d in enumerate(plan.devices)})
    assert _verified_apart(placed, plan, (x,), {})
    hooks = [hooks[key] for _, hooks, key in placement_hooks(placed)]
    assert {type(hook) for hook in hooks} == {WholeForward, UnitForward}
    assert not any(hook.passes for hook in hooks)
    assert torch.equal(placed(x), expected)


def test_a_planted_missing_alignment_of_glue_is_caught(netdict):
    """Glue whose operands are not brought together is named as glue, with its line."""
    model, x, plan = netdict
    nodes = tuple(
        n.model_copy(update={"device": plan.devices["2" in n.unit.partition(".")[2][-2:-1]]}) if n.kind == "unit" else n
        for n in plan.nodes
    )
    streams = plan.model_copy(update={"nodes": nodes})
    assert sw.verify(model, streams, (x,))
    placed = sw.place(copy.deepcopy(model), streams, devices={d: sim_device(i) for i, d in enumerate(plan.devices)})
    for _, hooks, key in placement_hooks(placed):
        if isinstance(hooks[key], WholeForward):
            hooks[key].layout.glue = {}
    check = sw.verify(placed, streams, (x,))
    assert check.mismatch.unit == "glue"
    assert check.mismatch.operation == "aten.cat"
    assert "in glue, outside every unit (containers.py:" in str(check)


def test_outputs_that_differ_fail_the_check(captured_profile):
    """A forward that looks at where its tensors are gives other outputs when placed, and that is said."""

    class Vain(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])

        def forward(self, x):
            x = self.layers[1](self.layers[0](x))
            return x if x.device.type == "cpu" else x + 1

    model, x = Vain(), torch.ones(2, 2)
    check = sw.verify(model, sw.plan(captured_profile(model, (x,)), microbatches=2), (x,))
    assert check.mismatch is None
    assert not check
    assert "outputs differ" in str(check)


def test_other_inputs_are_refused(netdict):
    """Both shapes are named."""
    model, _, plan = netdict
    with pytest.raises(sw.ShardwrightError, match="for inputs float32 2x1x16x16; these are float32 4x1x16x16"):
        sw.verify(model, plan, (torch.randn(4, 1, 16, 16),))


class Counts(nn.Module):
    """Counts its calls in a buffer, in inference too, and halves what it is given in place."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        x = x.mul_(0.5)
        return self.layers[1](self.layers[0](x)) * self.calls


def test_what_a_forward_changes_is_put_back(captured_profile):
    """Both replays begin with the same buffers and inputs, and the caller finds them as they were."""
    model, x = Counts(), torch.ones(2, 2)
    profile = captured_profile(model, (x.clone(),), train=False, microbatches=(1,))
    plan = sw.plan(profile, microbatches=1, pins={"layers.0": "cpu:0", "layers.1": "cpu:1"})
    before = model.calls.clone()
    assert sw.verify(model, plan, (x,))
    assert torch.equal(model.calls, before)
    assert torch.equal(x, torch.ones(2, 2))


def test_of_replicas_the_first_is_replayed_with_its_part(captured_profile):
    """Half of the samples cross, and half of them reach the model, in which all that is not divided is whole."""

    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.Sequential(*[nn.Linear(4, 4) for _ in range(4)])

        def forward(self, x, *, scale):
            seen.append((len(x), len(scale)))
            return self.layers(x) * scale

    seen = []
    model, x, scale = Scaled(), torch.randn(8, 4), torch.rand(4)
    devices = [f"cpu:{i}" for i in range(4)]
    profile = captured_profile(model, (x,), {"scale": scale}, devices=devices, microbatches=(1, 4))
    plan = sw.plan(profile, microbatches=4, replicas=2)
    assert (plan.replicas, plan.depth) == (2, 2)
    seen.clear()
    check = sw.verify(model, plan, (x,), {"scale": scale})
    assert check
    assert set(seen) == {(4, 4)}
    assert check.transfer_bytes == 4 * 4 * 4 + 4 * 4  # one activation of four samples and the scale, in float32


class Slope(nn.Module):
    """The gradient of something, as its forward."""

    def __init__(self):
        super().__init__()
        self.energy = nn.Linear(4, 1)

    def forward(self, x):
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            (slope,) = torch.autograd.grad(self.energy(x).tanh().sum(), x)
        return slope


def test_a_unit_that_takes_gradients_is_told_to_be_beyond_simulated_devices(captured_profile):
    """PyTorch's engine knows one device of a made-up kind; the unit, the line and what to do are named."""
    model, x = nn.Sequential(nn.Linear(4, 4), Slope(), nn.Linear(4, 4)), torch.randn(4, 4)
    profile = captured_profile(model, (x,), train=False)
    plan = sw.plan(profile, microbatches=2, pins={"0": "cpu:0", "1": "cpu:1"})
    with pytest.raises(
        sw.ShardwrightError, match=r"takes gradients itself in unit 1 \(test_verify.py:\d+\), which sim"
    ):
        sw.verify(model, plan, (x,))


class Jitter(nn.Module):
    """Scales by a number that Python draws."""

    def forward(self, x):
        return x * random.uniform(0.5, 1.5)


class Fading(nn.Module):
    """Writes a parameter in its forward, past autograd, and draws."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), Jitter(), nn.Linear(4, 4))

    def forward(self, x):
        self.layers[1].weight.data.mul_(0.9)
        return self.layers(x)


def test_a_forward_that_changes_the_model_is_verified_from_the_same_beginning(captured_profile):
    """Both runs begin with the same weights and random numbers, and leave them as they were."""
    model, x = Fading(), torch.randn(4, 4)
    before = copy.deepcopy(model.state_dict())
    plan = sw.plan(captured_profile(model, (x,)), microbatches=1, pins={"layers.0": "cpu:0", "layers.3": "cpu:1"})
    for placed in (False, True):
        if placed:
            sw.place(model, plan, devices={d: sim_device(i) for i, d in enumerate(plan.devices)})
        assert sw.verify(model, plan, (x,))
    torch.testing.assert_close(sw.unplace(model).state_dict(), before)


def test_inputs_by_position_that_were_planned_by_keyword_are_told(captured_profile):
    """The shapes are the same; where each is among the arguments is said, and what to do."""
    model, x = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), torch.randn(4, 4)
    plan = sw.plan(captured_profile(model, (), {"input": x}), microbatches=1, pins={"0": "cpu:0", "1": "cpu:1"})
    says = r"inputs \['input'\] float32 4x4; these are \[0\] float32 4x4: give the same tensors as in the profile"
    with pytest.raises(sw.ShardwrightError, match=says):
        sw.verify(model, plan, (x,))
    assert sw.verify(model, plan, kwargs={"input": x})
