"""Placing in place: the model stays itself, tensors that cross follow, and everything can be undone."""

import copy
import io
from collections import OrderedDict, defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode, _len_torch_function_stack
from torch.utils.checkpoint import checkpoint

import shardwright as sw
from shardwright.profiler.inputs import outputs_of
from shardwright.profiler.placed import placement_hooks
from shardwright.sharder.runtime.calls import open_calls
from shardwright.sharder.runtime.hooks import MoveInputs, UnitForward
from shardwright.sharder.runtime.sim import Simulated, on_host, sim_device
from shardwright.sharder.runtime.whole import Window

PAIR = {"cpu:0": "cpu", "cpu:1": "sim:0"}


def planned(captured_profile, model, args, microbatches=2, **options):
    return sw.plan(captured_profile(model, args, **options), microbatches=microbatches)


def gradients(model):
    return {name: on_host(p.grad) for name, p in model.named_parameters() if p.grad is not None}


def relative(a, b):
    return float((a - b).detach().abs().max() / b.detach().abs().max())


@pytest.mark.parametrize("name", ["Net", "NetList", "NetDict"])
def test_outputs_equal_and_gradients_match_on_two_devices(containers, captured_profile, name):
    """Each network placed on (cpu, sim:0) computes and learns what it did."""
    model = getattr(containers, name)()
    x = type(model).sample_inputs()[0][:2, :, :24, :24]
    plan = planned(captured_profile, model, (x,))
    placed = sw.place(copy.deepcopy(model), plan, devices=PAIR)
    assert {p.device.type for p in placed.parameters()} == {"cpu", "sim"}
    expected, found = model(x), placed(x)
    assert torch.equal(expected, found)
    expected.square().mean().backward()
    found.square().mean().backward()
    for key, gradient in gradients(model).items():
        assert relative(gradients(placed)[key], gradient) <= 1e-5


def test_a_free_assignment_is_followed(containers, captured_profile):
    """Glue between streams on different devices is aligned, whichever unit is where."""
    model, x = containers.NetDict(), torch.randn(2, 1, 16, 16)
    plan = planned(captured_profile, model, (x,))
    for seed in range(8):
        generator = torch.Generator().manual_seed(seed)
        where = torch.randint(0, 2, (len(plan.nodes),), generator=generator).tolist()
        nodes = tuple(
            node.model_copy(update={"device": plan.devices[side]}) for node, side in zip(plan.nodes, where, strict=True)
        )
        mixed = plan.model_copy(update={"nodes": nodes})
        placed = sw.place(copy.deepcopy(model), mixed, devices=PAIR)
        assert torch.equal(model(x), placed(x))
        assert sw.verify(model, mixed, (x,))


def test_the_model_stays_itself(containers, captured_profile):
    """Names, state_dict, modes, deepcopy, save and load are as before; its class is not touched."""
    model, x = containers.NetDict(), torch.randn(2, 1, 16, 16)
    names = [name for name, _ in model.named_parameters()]
    reference = copy.deepcopy(model)
    placed = sw.place(model, planned(captured_profile, model, (x,)), devices=PAIR)
    assert placed is model
    assert type(placed).forward is containers.NetDict.forward
    assert [name for name, _ in placed.named_parameters()] == names
    assert list(placed.state_dict()) == list(reference.state_dict())
    assert not placed.eval().training
    twin = copy.deepcopy(placed.train())
    assert torch.equal(twin(x), reference(x))
    buffer = io.BytesIO()
    torch.save({name: on_host(value) for name, value in placed.state_dict().items()}, buffer)
    buffer.seek(0)
    fresh = containers.NetDict()
    fresh.load_state_dict(torch.load(buffer))
    assert torch.equal(fresh(x), reference(x))


def test_hooks_only_where_tensors_cross(containers, captured_profile):
    """A unit whose inputs are made on its own device has neither a hook nor another forward."""
    model, x = containers.NetDict(), torch.randn(2, 1, 16, 16)
    plan = planned(captured_profile, model, (x,))
    placed = sw.place(model, plan, devices=PAIR)
    crossed, hooked = set(), set()
    names = {unit: name for name, unit in placed.named_modules() if name in plan.placement()}
    for unit, hooks, key in placement_hooks(placed):
        if isinstance(hooks[key], (UnitForward, MoveInputs)):
            hooked.add(names[unit])

    def look(unit, args):
        if unit in names and args[0].device != next(unit.parameters()).device:
            crossed.add(names[unit])

    with register_module_forward_pre_hook(look):  # before what the unit has itself
        placed(x)
    assert hooked == crossed
    assert 0 < len(hooked) < 15


def test_on_one_torch_device_nothing_is_added(containers, captured_profile):
    """Two CPU workers are one torch device in one process: no hook, same results."""
    model, x = containers.NetList(), torch.randn(2, 16, 8, 8)
    expected = model(x)
    placed = sw.place(model, planned(captured_profile, model, (x,)))
    assert not list(placement_hooks(placed))
    assert torch.equal(placed(x), expected)


def test_unplace_undoes_everything(containers, captured_profile):
    """After unplace there is no hook of ours, every tensor is home, and the user's own hooks are still there."""
    model, x = containers.NetDict(), torch.randn(2, 1, 16, 16)
    calls = []
    model.net1["block12"].register_forward_pre_hook(lambda *_: calls.append("unit"))
    model.register_forward_hook(lambda *_: calls.append("model"))
    plan = planned(captured_profile, model, (x,))
    calls.clear()
    expected = model(x)
    sw.place(model, plan, devices=PAIR)
    model(x)
    sw.unplace(model)
    assert not list(placement_hooks(model))
    assert {p.device.type for p in model.parameters()} == {"cpu"}
    assert torch.equal(model(x), expected)
    assert calls == ["unit", "model"] * 3


def test_placing_again_replaces(containers, captured_profile):
    """A placed model can be placed by another plan; hooks do not pile up."""
    model, x = containers.NetDict(), torch.randn(2, 1, 16, 16)
    profile = captured_profile(model, (x,))
    one = sw.plan(profile, microbatches=2)
    other = sw.plan(profile, microbatches=2, pins={"net1.block23": "cpu:0"})
    expected = model(x)
    sw.place(model, one, devices=PAIR)
    sw.place(model, other, devices=PAIR)
    assert model.net1["block23"].shortcut.weight.device.type == "cpu"
    assert torch.equal(model(x), expected)
    assert sum(type(hooks[key]).__name__ == "WholeForward" for _, hooks, key in placement_hooks(model)) == 1


def test_a_failing_forward_leaves_no_mode_behind(containers, captured_profile):
    """An error in the forward ends the alignment of glue; the next call works."""
    model, x = containers.NetDict(), torch.randn(2, 1, 16, 16)
    sw.place(model, planned(captured_profile, model, (x,)), devices=PAIR)
    with pytest.raises(RuntimeError):
        model(torch.randn(2, 3, 16, 16))
    assert torch.overrides._get_current_function_mode() is None
    model(x)


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


def test_a_plan_for_another_model_is_refused(containers, captured_profile):
    """Another class, or another width, is named; nothing is moved."""
    model, x = containers.NetDict(), torch.randn(2, 1, 16, 16)
    plan = planned(captured_profile, model, (x,))
    with pytest.raises(sw.ShardwrightError, match=r"for another model \(NetDict\): NetList has no unit net1.block11"):
        sw.place(containers.NetList(), plan)
    wider = containers.NetDict()
    wider.net1["block11"] = containers.Block1(1, 33)
    with pytest.raises(sw.ShardwrightError, match="shapes of parameters differ"):
        sw.place(wider, plan)


def test_replicas_are_not_placed(captured_profile):
    """A model is placed once; what such a plan is for is said, and `verify` replays one replica of it."""
    model, x = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), torch.randn(4, 4)
    profile = captured_profile(model, (x,), devices=[f"cpu:{i}" for i in range(4)], microbatches=(1, 4))
    plan = sw.plan(profile, microbatches=4, replicas=2)
    for options in ({}, {"microbatches": 2}):
        with pytest.raises(sw.ShardwrightError, match="the plan has 2 replicas of the model"):
            sw.place(model, plan, **options)
    check = sw.verify(model, plan, (x,))
    assert (check.ok, check.transfers) == (True, 1)


def test_a_device_that_is_not_here_is_refused(containers, captured_profile, monkeypatch):
    """A plan for GPUs on a machine without says so, and how to check it all the same."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    model, x = containers.NetDict(), torch.randn(2, 1, 16, 16)
    plan = planned(captured_profile, model, (x,), devices=("cuda:0", "cuda:1"))
    with pytest.raises(sw.ShardwrightError, match=r"the plan uses cuda:0, and this machine has 0 CUDA devices.*verify"):
        sw.place(model, plan)
    assert sw.verify(model, plan, (x,))
    with pytest.raises(sw.ShardwrightError, match="does not use cuda:7; it uses cuda:0, cuda:1"):
        sw.place(model, plan, devices={"cuda:7": "cpu"})


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


def test_forwards_of_several_threads_do_not_disturb_each_other(containers, captured_profile):
    """Each thread aligns its own forward, and leaves no mode behind."""
    model, x = containers.NetDict(), torch.randn(2, 1, 16, 16)
    sw.place(model, planned(captured_profile, model, (x,)), devices=PAIR)
    expected = model(x).detach()

    def forwards(_):
        equal = all(torch.equal(model(x).detach(), expected) for _ in range(5))
        return equal, torch.overrides._get_current_function_mode()

    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(forwards, range(4))) == [(True, None)] * 4


def test_a_users_hook_keeps_its_flags(containers, captured_profile):
    """A hook of the user that is called after errors still is, after unplace."""
    model, x = containers.NetDict(), torch.randn(2, 1, 16, 16)
    plan = planned(captured_profile, model, (x,))
    handle = model.register_forward_hook(lambda *_: None, always_call=True)
    sw.unplace(sw.place(model, plan, devices=PAIR))
    assert handle.id in model._forward_hooks_always_called


def test_weights_come_from_a_checkpoint_onto_their_devices(captured_profile, tmp_path):
    """A model built without values is planned by its shapes, placed, and each weight is read onto its own device."""
    save_file = pytest.importorskip("safetensors.torch").save_file

    def build():
        model = nn.Sequential(nn.Embedding(10, 8), *[nn.Linear(8, 8) for _ in range(4)], nn.Linear(8, 10, bias=False))
        model[-1].weight = model[0].weight
        return model

    model, ids = build(), torch.randint(0, 10, (4, 3))
    plan = sw.plan(captured_profile(model, (ids,), devices=["cuda:0", "cuda:1"]), microbatches=2)
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items() if name != "5.weight"}
    save_file(tensors, tmp_path / "model.safetensors")
    with sw.empty_weights():
        empty = build()
    assert all(parameter.is_meta for parameter in empty.parameters())
    simulated = {device: sim_device(index) for index, device in enumerate(plan.devices)}
    with pytest.raises(sw.ShardwrightError, match=r"0.weight has no values: give them with place"):
        sw.place(empty, plan, devices=simulated)
    sw.place(empty, plan, devices=simulated, checkpoint=tmp_path)
    assert {str(p.device) for p in empty.parameters()} == {"sim:0", "sim:1"}
    assert empty[5].weight is empty[0].weight
    with torch.no_grad():
        assert torch.equal(model(ids), empty(ids))


class Tied(nn.Module):
    """An embedding whose weight is the head's too."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(12, 8)
        self.layers = nn.ModuleList([nn.Linear(8, 8) for _ in range(4)])
        self.head = nn.Linear(8, 12, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        x = self.embed(ids)
        for layer in self.layers:
            x = x + layer(x)
        return self.head(x)


def test_a_tied_weight_stays_one_tensor(captured_profile):
    """It lies with its first user and is lent for the other's call: gradients add up, an optimizer moves both."""
    model, ids = Tied(), torch.randint(0, 12, (4, 3))
    plain = copy.deepcopy(model)
    plan = planned(captured_profile, model, (ids,))
    assert len(plan.stages) == 2
    sw.place(model, plan, devices=PAIR)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    assert model.head.weight is model.embed.weight
    assert str(model.embed.weight.device) != str(model.layers[3].weight.device)
    for one, step in ((plain, torch.optim.SGD(plain.parameters(), lr=0.1)), (model, optimizer)):
        for _ in range(2):
            step.zero_grad()
            one(ids).square().mean().backward()
            step.step()
    expected = {name: parameter.detach() for name, parameter in plain.named_parameters()}
    assert model.head.weight is model.embed.weight
    assert all(relative(on_host(p), expected[name]) < 1e-5 for name, p in model.named_parameters())
    state = io.BytesIO()
    torch.save({name: on_host(tensor) for name, tensor in model.state_dict().items()}, state)
    assert len(model.state_dict()) == len(plain.state_dict())
    other = copy.deepcopy(model)
    assert other.head.weight is other.embed.weight
    assert other.head.weight is not model.head.weight
    assert torch.equal(other(ids), model(ids))
    sw.unplace(model)
    assert model.head.weight is model.embed.weight
    assert {str(p.device) for p in model.parameters()} == {"cpu"}
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_what_was_lent_is_returned_after_an_error(captured_profile):
    """A failing call leaves no copy in the place of the parameter."""
    model, ids = Tied(), torch.randint(0, 12, (4, 3))
    sw.place(model, planned(captured_profile, model, (ids,)), devices=PAIR)
    weight = model.head.weight
    failing = model.head.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(ids)
    failing.remove()
    assert model.head.weight is weight
    assert model(ids).shape == (4, 3, 12)


def test_a_compiled_unit_is_placed(captured_profile):
    """A unit compiled by itself goes on working where it is placed."""
    model = nn.Sequential(*[nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(4)])
    x = torch.randn(4, 8)
    expected = model(x).detach()
    model[0].compile(backend="eager")
    plan = planned(captured_profile, model, (x,))
    sw.place(model, plan, devices={d: PAIR["cpu:1"] if i else "cpu" for i, d in enumerate(plan.devices)})
    assert torch.equal(model(x).detach(), expected)


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


def test_threads_take_turns_with_a_tied_weight(captured_profile):
    """Forwards in several threads each find the weight, and it is the parameter again afterwards."""
    model, ids = Tied(), torch.randint(0, 12, (4, 3))
    expected = model(ids).detach()
    sw.place(model, planned(captured_profile, model, (ids,)), devices=PAIR)
    weight = model.head.weight

    def forward(_):
        with torch.no_grad():
            return model(ids)

    with ThreadPoolExecutor(3) as pool:
        assert all(torch.equal(found, expected) for found in pool.map(forward, range(60)))
    assert model.head.weight is weight


class Writes(nn.Module):
    """A unit that leaves what it made in a dictionary of its caller."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(8, 8), Leaves()])

    def forward(self, x):
        context = {"x": self.layers[0](x)}
        self.layers[1](context)
        return context["y"] + context["x"]


class Leaves(nn.Linear):
    def __init__(self):
        super().__init__(8, 8)

    def forward(self, context):
        context["y"] = super().forward(context["x"])
        return context["x"]


def test_a_dictionary_that_a_unit_writes_stays_the_callers(captured_profile):
    """What a unit on another device writes there, the forward finds."""
    model, x = Writes(), torch.randn(4, 8)
    expected = model(x).detach()
    plan = planned(captured_profile, model, (x,))
    nodes = [n.model_copy(update={"device": "cpu:1"}) if n.node == "layers.1" else n for n in plan.nodes]
    stages = [plan.stages[0], plan.stages[0].model_copy(update={"index": 1, "device": "cpu:1"})]
    plan = plan.model_copy(update={"nodes": tuple(nodes), "stages": tuple(stages)})
    sw.place(model, plan, devices=PAIR)
    assert torch.equal(model(x).detach(), expected)


def test_a_name_that_is_no_device_is_refused(captured_profile):
    """A torch device that does not exist is one line with the remedy."""
    model, x = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), torch.randn(4, 8)
    with pytest.raises(sw.ShardwrightError, match="'gpu:0' is no device; write for example"):
        sw.place(model, planned(captured_profile, model, (x,)), devices={"cpu:0": "gpu:0"})


@pytest.mark.parametrize("device", ["cuda:7", "xpu:0"])
def test_a_placement_that_fails_leaves_the_last_one(captured_profile, device):
    """Whatever is wrong with a device or a checkpoint is found before a placed model is touched."""
    model, ids = Tied(), torch.randint(0, 12, (4, 3))
    plan = planned(captured_profile, model, (ids,))
    sw.place(model, plan, devices=PAIR)
    before, places = len(list(placement_hooks(model))), [p.device for p in model.parameters()]
    with pytest.raises(sw.ShardwrightError):
        sw.place(model, plan, devices={"cpu:1": device})
    with pytest.raises(sw.ShardwrightError, match=r"there is no such file|needs safetensors"):
        sw.place(model, plan, devices=PAIR, checkpoint="nowhere")
    assert len(list(placement_hooks(model))) == before
    assert [p.device for p in model.parameters()] == places


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


def test_a_copy_of_a_unit_that_borrows_is_that_unit(captured_profile):
    """Deep-copying a unit with a tied weight does not copy the model that it came from."""
    model, ids = Tied(), torch.randint(0, 12, (4, 3))
    sw.place(model, planned(captured_profile, model, (ids,)), devices=PAIR)
    assert list(placement_hooks(model.head))
    held = [
        hooks[key].held for _, hooks, key in placement_hooks(copy.deepcopy(model.head)) if "held" in vars(hooks[key])
    ]
    assert all(owner is not model.head for pairs in held for owner, _ in pairs)
    assert {type(owner) for pairs in held for owner, _ in pairs} <= {nn.Linear}


@pytest.mark.filterwarnings("ignore")  # the compiler tells where it leaves the hooks to Python
def test_a_placed_model_is_compiled_as_a_whole(captured_profile):
    """Compiled code leaves the hooks to Python: a tied weight is still lent, and the parameter again afterwards."""
    model, ids = Tied(), torch.randint(0, 12, (4, 3))
    expected = model(ids).detach()
    sw.place(model, planned(captured_profile, model, (ids,)), devices=PAIR)
    weight = model.head.weight
    assert torch.equal(torch.compile(model, backend="eager")(ids).detach(), expected)
    assert model.head.weight is weight


def test_a_placed_model_is_not_profiled(captured_profile):
    """Its transfers would be measured as part of it; the remedy is named."""
    model, ids = Tied(), torch.randint(0, 12, (4, 3))
    sw.place(model, planned(captured_profile, model, (ids,)), devices=PAIR)
    with pytest.raises(sw.ShardwrightError, match=r"the model is placed.*shardwright\.unplace"):
        sw.profile(model, (ids,), devices=["cpu:0"])


def assert_placed_alike(captured_profile, model, args, *, pins, devices=PAIR):
    """Verified and placed, ``model`` gives its outputs, and after two steps its gradients and buffers."""
    plan = sw.plan(captured_profile(model, args, microbatches=(1,)), microbatches=1, pins=pins)
    assert sw.verify(model, plan, args)
    placed = sw.place(copy.deepcopy(model), plan, devices=devices)
    for _ in range(2):
        with Simulated():
            found = placed(*copy.deepcopy(args))
        expected = model(*copy.deepcopy(args))
        for one, other in zip(outputs_of(found), outputs_of(expected), strict=True):
            torch.testing.assert_close(one, other)
        for output in (found, expected):
            sum(tensor.square().mean() for tensor in outputs_of(output)).backward()
    expected = gradients(model)
    assert expected
    for name, gradient in gradients(placed).items():
        torch.testing.assert_close(gradient, expected[name])
    for name, buffer in model.named_buffers():
        torch.testing.assert_close(on_host(placed.get_buffer(name)), buffer)
    return placed


class Slopes(nn.Module):
    """A bias that is made by the first call and kept ready for the others, as ALiBi is in x-transformers."""

    def __init__(self):
        super().__init__()
        self.register_buffer("slopes", torch.arange(8.0), persistent=False)
        self.register_buffer("bias", None, persistent=False)

    def forward(self):
        if self.bias is None:
            self.register_buffer("bias", self.slopes * 2, persistent=False)
        return self.bias


class TakesModule(nn.Linear):
    """A unit that is given a module, and calls it."""

    def forward(self, x, bias):
        return super().forward(x) + bias()


class HandsModule(nn.Module):
    """Hands one module to all its units."""

    def __init__(self):
        super().__init__()
        self.bias = Slopes()
        self.layers = nn.ModuleList(TakesModule(8, 8) for _ in range(3))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x, self.bias)
        return x


@pytest.mark.parametrize("called", [True, False], ids=["made before", "made placed"])
def test_a_given_module_is_lent_with_what_it_keeps_ready(captured_profile, called):
    """The capture takes what the first call made for a constant; it may be made only once the model is placed."""
    model, x = HandsModule(), torch.randn(4, 8)
    pins = {"layers.0": "cpu:0", "layers.1": "cpu:1"}
    plan = sw.plan(captured_profile(model, (x,), microbatches=(1,)), microbatches=1, pins=pins)
    assert len(plan.stages) == 2
    expected = copy.deepcopy(model)(x)
    if called:
        model(x)
    else:
        model.bias.register_buffer("bias", None, persistent=False)
    placed = sw.place(model, plan, devices=PAIR)
    for _ in range(2):
        with Simulated():
            torch.testing.assert_close(on_host(placed(x)), expected)


@dataclass
class State:
    h: torch.Tensor
    seen: torch.Tensor


class Item(nn.Linear):
    """Writes `["h"]`, at any depth."""

    def forward(self, state):
        state = state.get("inner", state)
        state["h"] = super().forward(state["h"])


class Attribute(nn.Linear):
    """Writes `.h` and `.seen`."""

    def forward(self, state):
        state.h = super().forward(state.h)
        state.seen = state.seen + state.h


class Appends(nn.Linear):
    """Appends to the list in a tuple."""

    def forward(self, state):
        (made,) = state
        made.append(super().forward(made[-1]))


WRITTEN = {
    "dict": (Item, lambda x: {"h": x}, lambda state: state["h"]),
    "OrderedDict": (Item, lambda x: OrderedDict(h=x), lambda state: state["h"]),
    "defaultdict": (Item, lambda x: defaultdict(list, h=x), lambda state: state["h"]),
    "dict in a dict": (Item, lambda x: {"inner": {"h": x}}, lambda state: state["inner"]["h"]),
    "dataclass": (Attribute, lambda x: State(x, x * 0), lambda state: state.h + state.seen),
    "namespace": (Attribute, lambda x: SimpleNamespace(h=x, seen=x * 0), lambda state: state.h + state.seen),
    "list in a tuple": (Appends, lambda x: ([x],), lambda state: sum(state[0])),
}


class Fills(nn.Module):
    """Units that take one state and return nothing."""

    def __init__(self, layer, made, read):
        super().__init__()
        self.layers = nn.ModuleList(layer(8, 8) for _ in range(3))
        self.head = nn.Linear(8, 8)
        self.made, self.read = made, read

    def forward(self, x):
        state = self.made(x)
        for layer in self.layers:
            layer(state)
        return self.head(self.read(state))


@pytest.mark.parametrize("kind", WRITTEN)
@pytest.mark.parametrize("cut", [1, 2])
def test_what_a_unit_writes_into_its_argument_is_found(captured_profile, kind, cut):
    """Whatever holds it, and wherever the cut is."""
    model, x = Fills(*WRITTEN[kind]), torch.randn(4, 8)
    pins = {f"layers.{k}": f"cpu:{int(k >= cut)}" for k in range(3)} | {"head": "cpu:1"}
    assert_placed_alike(captured_profile, model, (x,), pins=pins)


class Sums(nn.Linear):
    def forward(self, features):
        return super().forward(sum(features))


class Lists(nn.Module):
    """Reads its list again after a unit has read it."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8), Sums(8, 8)])

    def forward(self, x):
        first = self.layers[0](x)
        features = [first, self.layers[1](x)]
        made = self.layers[2](features)
        return made, features[0] * 2 + first


def test_a_list_is_the_callers_again_after_a_unit(captured_profile):
    """Its tensors are where they were, for the glue that comes."""
    pins = {"layers.0": "cpu:0", "layers.1": "cpu:0", "layers.2": "cpu:1"}
    assert_placed_alike(captured_profile, Lists(), (torch.randn(4, 8),), pins=pins)


class HandsList(nn.Module):
    """Hands a list to a unit whose own hook takes a tensor out of it."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.layers[1].register_forward_pre_hook(lambda _module, args: (args[0][0],))

    def forward(self, x):
        held = [self.layers[0](x)]
        y = self.layers[1](held)
        return held[0] + self.layers[2](y)


def test_a_list_is_the_callers_again_whatever_hooks_make_of_it(captured_profile):
    """That a user's hook hands the unit one tensor does not hide that a list was given."""
    pins = {"layers.0": "cpu:0", "layers.1": "cpu:1", "layers.2": "cpu:1"}
    assert_placed_alike(captured_profile, HandsList(), (torch.randn(4, 8),), pins=pins)
    assert open_calls() == []


def test_users_hooks_see_what_placing_before_or_after_them_means(captured_profile):
    """One from before finds the list as the unit got it, one from after as it was; from the first such call on."""
    model, x = Lists(), torch.randn(4, 8)
    pins = {"layers.0": "cpu:0", "layers.1": "cpu:0", "layers.2": "cpu:1"}
    plan = sw.plan(captured_profile(model, (x,), microbatches=(1,)), microbatches=1, pins=pins)
    seen = []

    def see(_module, args, _output):
        seen.append(args[0][0].device)

    model.layers[2].register_forward_hook(see)
    sw.place(model, plan, devices=PAIR)
    model.layers[2].register_forward_hook(see)
    first, second = (torch.device(name) for name in PAIR.values())
    for placed in (model, copy.deepcopy(model)):
        for _ in range(2):
            seen.clear()
            placed.layers[2]([x.to(first), x.to(first)])
            assert seen == [second, first]


def test_a_list_is_the_callers_again_after_an_error(captured_profile):
    """Also where the unit fails."""
    model, x = Lists(), torch.randn(4, 8)
    pins = {"layers.0": "cpu:0", "layers.1": "cpu:0", "layers.2": "cpu:1"}
    plan = sw.plan(captured_profile(model, (x,), microbatches=(1,)), microbatches=1, pins=pins)
    sw.place(model, plan, devices=PAIR)
    features = [x, x]
    model.layers[2].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model.layers[2](features)
    assert features[0] is x
    assert features[1] is x


class Fetches(nn.Module):
    """Leaves its hidden state with its caller, in the dictionary and the list that it was given."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

    def forward(self, batch):
        h = self.layers[1](self.layers[0](batch["x"]))
        batch["h"] = h
        batch["all"].append(h)
        return self.layers[2](h)


@pytest.mark.parametrize("devices", [PAIR, {"cpu:0": "sim:0", "cpu:1": "cpu"}])
def test_what_the_forward_writes_into_its_inputs_is_found(captured_profile, devices):
    """On the device of the inputs, which stay the very tensors; the inputs may have to move."""
    model, x = Fetches(), torch.randn(4, 8)
    model({"x": x, "all": []})
    profile = captured_profile(model, ({"x": x, "all": []},), microbatches=(1,))
    plan = sw.plan(profile, microbatches=1, pins={"layers.0": "cpu:0", "layers.1": "cpu:0", "layers.2": "cpu:1"})
    expected = {"x": x, "all": []}
    model(expected)
    sw.place(model, plan, devices=devices)
    found = {"x": x, "all": []}
    model(found)
    assert found["x"] is x
    assert found["all"] == [found["h"]]
    assert torch.equal(found["h"], expected["h"])


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


class Normalised(nn.Module):
    """Two normalisations with the same running statistics."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            *(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 8))
        )
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            setattr(self.layers[3], name, getattr(self.layers[1], name))

    def forward(self, x):
        return self.layers(x)


@pytest.mark.parametrize("cut", [2, 3])
def test_tied_running_statistics_learn_on_both_devices(captured_profile, cut):
    """What a unit changes in a buffer that it borrows is changed where the buffer lies."""
    pins = {f"layers.{k}": f"cpu:{int(k >= cut)}" for k in range(5)}
    model = Normalised()
    assert_placed_alike(captured_profile, model, (torch.randn(4, 8),), pins=pins)
    assert model.layers[1].num_batches_tracked == 4


class Averages(nn.Module):
    """Makes its buffer anew in every call."""

    def __init__(self, mean):
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.register_buffer("mean", mean)

    def forward(self, x):
        x = self.linear(x)
        if self.training:
            self.mean = self.mean * 0.9 + x.detach().mean(0) * 0.1
        return x - self.mean


def test_a_borrowed_buffer_that_is_made_anew_is_kept(captured_profile):
    """A unit that replaces a tied buffer has its own from then on, as without a placement."""
    mean = torch.zeros(8)
    model = nn.Sequential(Averages(mean), nn.Linear(8, 8), Averages(mean))
    x = torch.randn(4, 8)
    profile = captured_profile(model, (x,), train=False, microbatches=(1,))
    plan = sw.plan(profile, microbatches=1, pins={"0": "cpu:0", "1": "cpu:1", "2": "cpu:1"})
    placed = sw.place(copy.deepcopy(model), plan, devices=PAIR).train()
    model.train()
    placed(x)
    model(x)
    assert not torch.equal(model[0].mean, model[2].mean)
    for at in (0, 2):
        torch.testing.assert_close(on_host(placed[at].mean), model[at].mean)


class Scaled(nn.Linear):
    def __init__(self):
        super().__init__(8, 8)
        self.scale = nn.Parameter(torch.full((8,), 0.3))
        self.register_forward_pre_hook(lambda module, args: (args[0] * module.scale,))
        self.register_forward_hook(lambda module, _args, output: output + module.bias)


def test_a_users_hook_sees_its_unit_where_it_is(captured_profile):
    """Hooks that compute with the unit's parameters find the arguments beside them."""
    model = nn.Sequential(nn.Linear(8, 8), Scaled(), nn.Linear(8, 8))
    assert_placed_alike(captured_profile, model, (torch.randn(4, 8),), pins={"0": "cpu:0", "1": "cpu:1", "2": "cpu:1"})


class Whole(nn.Module):
    def __init__(self):
        super().__init__()
        self.part = nn.Sequential(*[nn.Linear(8, 8) for _ in range(3)])
        self.head = nn.Linear(8, 8)

    def forward(self, x):
        return self.head(self.part(x))


def test_unplace_undoes_the_placement_of_a_part(captured_profile):
    """Also where the whole was placed afterwards, or before."""
    model, x = Whole(), torch.randn(4, 8)
    expected = model(x).detach()
    part = sw.plan(captured_profile(model.part, (x,), microbatches=(1,)), microbatches=1, pins={"2": "cpu:1"} | INNER)
    pins = {"part.0": "cpu:0", "part.1": "cpu:1", "part.2": "cpu:1", "head": "cpu:1"}
    whole = sw.plan(captured_profile(model, (x,), microbatches=(1,)), microbatches=1, pins=pins)
    for placements in (
        [(model.part, part)],
        [(model.part, part), (model, whole)],
        [(model, whole), (model.part, part)],
    ):
        for module, plan in placements:
            sw.place(module, plan, devices=PAIR)
        assert {p.device.type for p in model.parameters()} == {"cpu", "sim"}
        sw.unplace(model)
        assert not list(placement_hooks(model))
        assert {p.device.type for p in model.parameters()} == {"cpu"}
        assert torch.equal(model(x).detach(), expected)


INNER = {"0": "cpu:0", "1": "cpu:0"}


@pytest.mark.filterwarnings("ignore")  # the compiler tells where it leaves the hooks to Python
def test_a_compiled_model_hands_lists_on(captured_profile):
    """What is written into a list, and read from it, is the same as without the compiler."""
    model, x = Lists(), torch.randn(4, 8)
    pins = {"layers.0": "cpu:0", "layers.1": "cpu:0", "layers.2": "cpu:1"}
    plan = sw.plan(captured_profile(model, (x,), microbatches=(1,)), microbatches=1, pins=pins)
    expected = [tensor.detach() for tensor in model(x)]
    sw.place(model, plan, devices=PAIR)
    for found, tensor in zip(torch.compile(model, backend="eager")(x), expected, strict=True):
        assert torch.equal(found.detach(), tensor)


class Residual(nn.Module):
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
    model, x = Residual(scaled=scaled), torch.randn(8, 8)
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
