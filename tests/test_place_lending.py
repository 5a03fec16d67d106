"""What units on several devices share: one parameter or buffer, lent to each for its calls."""

import copy
import io
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from placing import PAIR, Tied, assert_placed_alike, planned, relative
from torch import nn

import shardwright as sw
from shardwright.profiler.recording.placed import placement_hooks
from shardwright.sharder.runtime.placing.sim import Simulated, on_host


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
