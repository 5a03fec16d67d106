"""Glue of a placed model: its operands are brought together where they lie apart, and nowhere else."""

import copy

import pytest
import torch
from placing import PAIR, assert_placed_alike, gradients, planned, relative
from torch import nn
from torch.overrides import TorchFunctionMode, _len_torch_function_stack
from torch.utils.checkpoint import checkpoint

import shardwright as sw
from shardwright.profiler.recording.placed import placement_hooks
from shardwright.sharder.runtime.placing import hooks as hooks_module
from shardwright.sharder.runtime.placing import moving as moving_module
from shardwright.sharder.runtime.placing.sim import on_host, sim_device
from shardwright.sharder.runtime.placing.whole import Window


class Outside(nn.Module):
    """Uses a parameter and a buffer outside every unit, and returns a dict."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 4) for _ in range(4)])
        self.scale = nn.Parameter(torch.rand(4))
        self.register_buffer("shift", torch.rand(4), persistent=False)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x).tanh() + self.shift
        return {"out": x * self.scale}


def test_parameters_and_buffers_outside_units_follow(captured_profile):
    """What the forward uses outside units is where it is used; outputs come back to the inputs' device."""
    model, x = Outside(), torch.randn(2, 4)
    plan = planned(captured_profile, model, (x,))
    assert len(plan.stages) == 2
    placed = sw.place(copy.deepcopy(model), plan, devices=PAIR)
    found = placed(x)["out"]
    assert found.device.type == "cpu"
    assert torch.equal(found, model(x)["out"])
    assert sw.verify(model, plan, (x,))


class Residual(nn.Module):
    """Glue in a loop: one call site, several devices."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(8, 8) for _ in range(6)])

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x).relu()
        return x


class Makes(Residual):
    """Glue that makes tensors, a mask written in place, and parameters of the root used at both ends."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Parameter(torch.rand(8)), nn.Parameter(torch.rand(8))
        self.head = nn.Linear(8, 8)

    def forward(self, x):
        x = super().forward(x * self.first)
        mask = torch.zeros(x.shape[0], 8, device=x.device)
        mask[:, :4] = 1.0
        position = torch.arange(8, device=x.device)
        return self.head(torch.cat(torch.chunk(x, 2, 1), 1) * mask + position[None]) * self.last


@pytest.mark.parametrize("kind", [Residual, Makes])
@pytest.mark.parametrize("stages", [2, 3])
def test_glue_in_loops_and_glue_that_makes_tensors(captured_profile, kind, stages):
    """One call site on several devices, and tensors made on the way, are aligned as the forward needs it."""
    model, x = kind(), torch.randn(4, 8)
    devices = [f"cpu:{i}" for i in range(stages)]
    plan = planned(captured_profile, model, (x,), microbatches=4, devices=devices)
    where = [devices[min(i * stages // len(plan.nodes), stages - 1)] for i in range(len(plan.nodes))]
    nodes = tuple(n.model_copy(update={"device": d}) for n, d in zip(plan.nodes, where, strict=True))
    first = plan.stages[0]
    all_stages = tuple(first.model_copy(update={"index": i, "device": d}) for i, d in enumerate(devices))
    spread = plan.model_copy(update={"nodes": nodes, "stages": all_stages})
    assert sw.verify(model, spread, (x,)), sw.verify(model, spread, (x,))


class Follows(nn.Module):
    """Glue that takes its result to the device of an operand, or to one that it names."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(8, 8) for _ in range(6)])

    def forward(self, x):
        first = self.layers[0](x)
        for layer in self.layers[1:5]:
            x = layer(first + x)
        x = (2 * x).type_as(first)
        x = self.layers[5](x).to(first.device)
        return x + first


@pytest.mark.parametrize("last", ["cpu:0", "cpu:1"])
def test_glue_that_moves_its_result_is_followed(captured_profile, last):
    """A unit or a sum after `type_as` and `to` finds its operands on its own device."""
    model, x = Follows(), torch.randn(4, 8)
    expected = model(x).detach()
    plan = planned(captured_profile, model, (x,))
    nodes = [n.model_copy(update={"device": last}) if n.node == "layers.5" else n for n in plan.nodes]
    sw.place(model, plan.model_copy(update={"nodes": tuple(nodes)}), devices=PAIR)
    assert torch.equal(model(x).detach(), expected)


class Halves(nn.Module):
    """Glue that joins what two units made, in halves whose activations may be computed anew in the backward pass."""

    reentrant = None

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(8, 8) for _ in range(4)])

    def half(self, x, at):
        first = self.layers[at](x)
        second = self.layers[at + 1](first)
        return torch.cat([first, second], 1)[:, 4:12] + x

    def forward(self, x):
        for at in (0, 2):
            if self.reentrant is None:
                x = self.half(x, at)
            else:
                x = checkpoint(self.half, x, at, use_reentrant=self.reentrant)
        return x


@pytest.mark.parametrize("reentrant", [True, False])
def test_activations_are_computed_anew_across_a_cut(captured_profile, reentrant):
    """Checkpointed glue between two devices is aligned in the backward pass too, and no mode stays."""
    model, x = Halves(), torch.randn(4, 8, requires_grad=True)
    plan = sw.plan(captured_profile(model, (x,)), microbatches=2, pins={"layers.0": "cpu:0", "layers.1": "cpu:1"})
    model(x).square().sum().backward()
    expected = gradients(model)
    model.zero_grad()
    model.reentrant = reentrant
    sw.place(model, plan, devices=PAIR)
    depth = _len_torch_function_stack()
    model(x).square().sum().backward()
    assert _len_torch_function_stack() == depth
    found = gradients(model)
    assert found.keys() == expected.keys()
    assert all(relative(found[name], expected[name]) <= 1e-5 for name in expected)


class Passes(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


class Modal(nn.Module):
    """A forward that ends a mode of its own between two units."""

    def __init__(self, mode):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(8, 8) for _ in range(3)])
        self.mode = mode

    def forward(self, x):
        with self.mode():
            first = self.layers[0](x)
            second = self.layers[1](first)
        return self.layers[2](first + second) + second


@pytest.mark.parametrize("mode", [Passes, lambda: torch.device("cpu")])
def test_a_mode_of_the_forward_ends_as_it_should(captured_profile, mode):
    """A function mode that a forward enters before a cut and leaves behind it is the one that is left."""
    model, x = Modal(mode), torch.randn(4, 8)
    expected = model(x).detach()
    pins = {"layers.0": "cpu:0", "layers.1": "cpu:1"}
    plan = sw.plan(captured_profile(model, (x,)), microbatches=2, pins=pins)
    sw.place(model, plan, devices=PAIR)
    depth = _len_torch_function_stack()
    assert torch.equal(model(x).detach(), expected)
    assert _len_torch_function_stack() == depth


def test_lengths_beside_inputs_on_a_device_stay_on_the_cpu(captured_profile):
    """PyTorch packs by lengths on the CPU only; alone, or where all is on the CPU, whole numbers move."""

    class Looks(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])

        def forward(self, x, lengths):
            seen.append(lengths.device)
            return self.layers[1](self.layers[0](x))

    seen = []
    model, x, lengths = Looks(), torch.randn(4, 8), torch.arange(4)
    plan = planned(captured_profile, model, (x, lengths))
    sw.place(model, plan, devices={d: sim_device(i) for i, d in enumerate(plan.devices)})
    seen.clear()
    with torch.no_grad():
        model(x.to(sim_device(0)), lengths)
        model(lengths=lengths, x=x.to(sim_device(0)))
        model(x, lengths)
    assert [str(device) for device in seen] == ["cpu", "cpu", "sim:0"]


class Skipping(nn.Module):
    """Sums over the cut, of which only the first has operands on two devices; ``scaled``: by a number that is made."""

    def __init__(self, *, scaled):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(8, 8) for _ in range(6)])
        self.scaled = scaled

    def forward(self, x):
        share = x.mean() if self.scaled else None
        for layer in self.layers:
            x = x + layer(x)
            if self.scaled:
                x = x * share
        return x


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("homes", [("sim:0", "cpu"), ("cpu", "sim:0"), ("sim:0", "sim:1")])
def test_only_sums_at_the_cut_are_aligned(captured_profile, homes, scaled):
    """Behind the cut operands are known to be together, on the CPU too; a number there may have come from anywhere."""
    model, x = Skipping(scaled=scaled), torch.randn(8, 8)
    pins = {f"layers.{index}": f"cpu:{index // 3}" for index in range(6)}
    plan = sw.plan(captured_profile(model, (x,)), microbatches=1, pins=pins)
    with torch.no_grad():
        expected = model(x)
        sw.place(model, plan, devices=dict(zip(plan.devices, homes, strict=True)))
        assert torch.equal(on_host(model(x)), expected)
    windows = [hooks[key] for _, hooks, key in placement_hooks(model) if isinstance(hooks[key], Window)]
    if not scaled:
        assert len([window for window in windows if window.opens]) == 1


class Squeezed(nn.Module):
    """A weight for each sample, which of a single one has no dimension."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.weigh = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 1)

    def forward(self, x):
        x = self.first(x)
        y = self.second(x)
        return x.sum(1) * self.weigh(y).squeeze() + y.sum(1)


@pytest.mark.parametrize("homes", [("sim:0", "cpu"), ("cpu", "sim:0")])
def test_of_one_sample_a_result_may_have_no_dimension(captured_profile, homes):
    """What is planned for a batch takes one sample as well, and leaves it where a number does."""
    model, x = Squeezed(), torch.randn(8, 8)
    pins = {"first": "cpu:0", "second": "cpu:1", "weigh": "cpu:1"}
    plan = sw.plan(captured_profile(model, (x,)), microbatches=1, pins=pins)
    with torch.no_grad():
        expected = model(x), model(x[:1])
        sw.place(model, plan, devices=dict(zip(plan.devices, homes, strict=True)))
        assert torch.allclose(on_host(model(x)), expected[0])
        assert torch.allclose(on_host(model(x[:1])), expected[1])


class Overwrites(nn.Module):
    """A unit that changes its input in place, which the forward reads again: made by glue beside an earlier unit."""

    def __init__(self, how):
        super().__init__()
        self.first, self.second, self.last = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.act = Doubling() if how == "of two" else nn.ReLU(inplace=True)
        if how == "hooked":
            self.act.register_forward_hook(lambda *_: None)
        self.how = how

    def forward(self, x):
        h = self.first(x) + x
        changed = self.act(h, x) if self.how == "of two" else self.act(h)
        return self.last(self.second(changed) + h)


class Doubling(nn.Module):
    """Adds the second of its inputs to the first, in place."""

    def forward(self, h, x):
        return h.add_(x)


@pytest.mark.parametrize("how", ["plain", "hooked", "of two"])
def test_what_a_unit_changes_in_place_is_changed_for_all(captured_profile, how):
    """The sum is made where its operands are, and the unit, elsewhere, changes a copy: outputs and gradients agree."""
    args = (torch.randn(2, 4),)
    model = Overwrites(how)
    assert_placed_alike(captured_profile, model, args, pins={"first": "cpu:0", "second": "cpu:1"})
    plan = sw.plan(captured_profile(model, args), microbatches=1, pins={"first": "cpu:0", "second": "cpu:1"})
    placed = sw.place(copy.deepcopy(model), plan, devices=PAIR)
    for without in (torch.no_grad, torch.inference_mode):
        with without():
            torch.testing.assert_close(on_host(placed(*args)), model(*args))


@pytest.mark.parametrize("hooked", [False, True])
def test_what_no_unit_changes_is_not_written_back(captured_profile, monkeypatch, hooked):
    """Nor is anything given a gradient in inference mode, or refused of a tensor that was made there."""
    model, x = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Identity(), nn.Linear(4, 4)), torch.randn(2, 4)
    if hooked:
        model[1].register_forward_hook(lambda *_: None)
    plan = sw.plan(captured_profile(model, (x,)), microbatches=1, pins={"0": "cpu:0", "1": "cpu:1", "3": "cpu:1"})
    placed = sw.place(copy.deepcopy(model), plan, devices=PAIR)
    written = []
    for room in (hooks_module, moving_module):
        monkeypatch.setattr(room, "write_back", lambda *tensors: written.append(tensors))
    with torch.inference_mode():
        made_there = x.clone()
        assert not placed(made_there).requires_grad
    for without in (torch.no_grad, torch.inference_mode, torch.enable_grad):
        for given in (x, made_there, x[:1].expand(2, 4)):
            if not (without is torch.enable_grad and given is made_there):
                with without():
                    torch.testing.assert_close(on_host(placed(given)).detach(), model(given).detach())
    assert not written
