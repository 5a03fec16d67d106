"""Lists and dictionaries that units and forwards are given: they stay the caller's, with what was written."""

import copy
from collections import OrderedDict, defaultdict
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from placing import PAIR, assert_placed_alike, planned
from torch import nn

import shardwright as sw
from shardwright.sharder.runtime.placing.calls import open_calls


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


class Graphs:
    """A batch of an own class, which knows how to move, in place."""

    def __init__(self, x, scale):
        self.x, self.scale = x, scale

    def to(self, device):
        self.x, self.scale = self.x.to(device), self.scale.to(device)
        return self


@pytest.mark.parametrize("whole", [False, True], ids=["tensors", "objects"])
def test_a_batch_of_an_own_class_comes_to_its_units(captured_profile, whole):
    """Read by the forward or by the units themselves, on both devices; the caller's batch stays where it is."""

    class Unit(nn.Linear):
        def forward(self, x, batch):
            return super().forward(x) * (batch.scale if whole else batch)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(Unit(8, 8) for _ in range(4))

        def forward(self, batch):
            x = batch.x
            for layer in self.layers:
                x = layer(x, batch if whole else batch.scale)
            return x

    batch = Graphs(torch.randn(4, 8), torch.rand(8))
    pins = {"layers.[01]": "cpu:0", "layers.[23]": "cpu:1"}
    assert_placed_alike(captured_profile, Model(), (batch,), pins=pins)
    assert batch.x.device.type == batch.scale.device.type == "cpu"


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
