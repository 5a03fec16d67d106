"""Placing in place: the model stays itself, tensors that cross follow, and everything can be undone."""

import copy
import io
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from placing import INNER, PAIR, Tied, assert_placed_alike, gradients, planned, relative
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook

import shardwright as sw
from shardwright.profiler.recording.placed import placement_hooks
from shardwright.sharder.runtime.placing.hooks import MoveInputs, UnitForward
from shardwright.sharder.runtime.placing.sim import on_host, sim_device


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


def test_a_compiled_unit_is_placed(captured_profile):
    """A unit compiled by itself goes on working where it is placed."""
    model = nn.Sequential(*[nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(4)])
    x = torch.randn(4, 8)
    expected = model(x).detach()
    model[0].compile(backend="eager")
    plan = planned(captured_profile, model, (x,))
    sw.place(model, plan, devices={d: PAIR["cpu:1"] if i else "cpu" for i, d in enumerate(plan.devices)})
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


def test_a_placed_model_is_not_profiled(captured_profile):
    """Its transfers would be measured as part of it; the remedy is named."""
    model, ids = Tied(), torch.randint(0, 12, (4, 3))
    sw.place(model, planned(captured_profile, model, (ids,)), devices=PAIR)
    with pytest.raises(sw.ShardwrightError, match=r"the model is placed.*shardwright\.unplace"):
        sw.profile(model, (ids,), devices=["cpu:0"])


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
