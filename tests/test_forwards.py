"""What stands in the place of a forward: the module's users, other tools, copies and the compiler find the module."""

import copy
import gc
import inspect
import io
import pickle
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from functools import wraps

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.overrides import _get_current_function_mode

import shardwright as sw
from shardwright.profiler.recording.placed import FORWARDS, placement_hooks
from shardwright.sharder.runtime.placing.calls import OPEN
from shardwright.sharder.runtime.placing.forwards import InstanceForward
from shardwright.sharder.runtime.placing.hooks import MoveInputs, UnitForward
from shardwright.sharder.runtime.placing.relocate import relocate
from shardwright.sharder.runtime.placing.whole import WholeForward

PAIR = {"cpu:0": "cpu", "cpu:1": "sim:0"}
PINS = {"layers.0": "cpu:0", "layers.1": "cpu:1", "layers.2": "cpu:1"}
CROSSING = "layers.1"


class Chain(nn.Module):
    """Units in a row: only the second gets its input from another device."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))

    def forward(self, x, scale=1.0):
        for layer in self.layers:
            x = layer(x)
        return x * scale


class Sums(Chain):
    """Glue that joins two devices, which is aligned."""

    def forward(self, x):
        first = self.layers[0](x)
        return self.layers[2](self.layers[1](first) + first)


@pytest.fixture
def plan_of(captured_profile):
    """Plans with the second and third layer on the other device."""

    def make(model, x):
        return sw.plan(captured_profile(model, (x,), microbatches=(1,)), microbatches=1, pins=PINS)

    return make


@pytest.fixture
def placed(plan_of):
    """A chain, placed on two devices, its twin that is not, and an input."""
    model, x = Chain(), torch.randn(4, 6)
    twin = copy.deepcopy(model)
    return sw.place(model, plan_of(model, x), devices=PAIR), twin, x


def moves_by_hook(unit):
    return [hook for hook in unit._forward_pre_hooks.values() if isinstance(hook, MoveInputs)]


def bring_to_cpu(model):
    """The tensors of a placed chain, and what moves them, with nothing left to move."""
    cpu = torch.device("cpu")
    relocate(model, {id(p): cpu for p in model.parameters()})
    for _, hooks, key in placement_hooks(model):
        if isinstance(hooks[key], UnitForward):
            hooks[key].device = cpu
        else:
            hooks[key].layout.move_to(dict.fromkeys(hooks[key].layout.homes, cpu))


# What it is on one module


class Adds(nn.Module):
    def forward(self, x):
        return x + 1


class AddsToo(InstanceForward):
    """Adds a number of its own."""

    def __init__(self, module, number):
        super().__init__(module)
        self.number = number

    def __call__(self, x):
        return self.plain(x) + (0 if self.passes else self.number)


@given(st.lists(st.integers(0, 9) | st.none(), max_size=6), st.randoms(use_true_random=False))
def test_layers_of_forwards_come_off_in_any_order(layers, random):
    """Of several, and of wrappers of other tools (None) between them, always those not removed have effect."""
    module = Adds()
    ours, expected = [], 1
    for number in layers:
        if number is None:
            module.forward = lambda x, inner=module.forward: inner(x) * 1 + 10
        else:
            ours.append(AddsToo(module, number))
            ours[-1].put()
        expected += 10 if number is None else number
        assert module(0) == expected
    random.shuffle(ours)
    for forward in ours:
        assert sum(1 for _ in placement_hooks(module)) == sum(not one.passes for one in ours)
        forward.remove()
        expected -= forward.number
        assert module(0) == expected
    assert FORWARDS not in vars(module)
    assert None in layers or "forward" not in vars(module)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_a_copy_calls_itself(copied):
    """Each of two forwards of a copy is the copy's, and comes off it alone."""
    module = nn.Linear(2, 2)
    for number in (1, 2):
        AddsToo(module, number).put()
    x = torch.randn(3, 2)
    twin = copied(module)
    assert torch.equal(twin(x), module(x))
    with torch.no_grad():
        twin.bias += 1
    assert torch.allclose(twin(x), module(x) + 1)
    sw.unplace(twin)
    assert torch.allclose(twin(x) + 3, module(x) + 1)


def test_a_shallow_copy_whose_original_is_gone_says_so():
    """It has the original's forward, as it has its hooks."""
    module = nn.Linear(2, 2)
    AddsToo(module, 1).put()
    shallow, x = copy.copy(module), torch.randn(3, 2)
    assert torch.equal(shallow(x), module(x))
    del module
    with pytest.raises(sw.ShardwrightError, match=r"shallow copy.*deepcopy"):
        shallow(x)


@pytest.mark.parametrize("called_before", [True, False])
def test_of_a_script_module_too(called_before):
    """Whose class does not bind its forward as others do."""
    module, x = torch.jit.script(nn.Linear(2, 2)), torch.randn(3, 2)
    if called_before:
        module(x)
    forward = AddsToo(module, 1)
    forward.put()
    assert torch.allclose(module(x), nn.Linear.forward(module, x) + 1)
    forward.remove()
    assert torch.equal(module(x), nn.Linear.forward(module, x))
    assert FORWARDS not in vars(module)


# What it is on a placed model


def test_trainers_find_the_models_own_parameters(placed):
    """By name and default, of the model and of a unit."""
    model, twin, _ = placed
    assert isinstance(vars(model)["forward"], WholeForward)
    assert isinstance(vars(model.layers[1])["forward"], UnitForward)
    assert inspect.signature(model.forward) == inspect.signature(twin.forward)
    assert inspect.signature(model.layers[1].forward) == inspect.signature(twin.layers[1].forward)


def test_the_forward_may_be_called_itself(placed):
    """Past PyTorch's call and its hooks, placed all the same; with glue to align too."""
    model, twin, x = placed
    assert torch.equal(model.forward(x), twin(x))
    assert torch.equal(model.forward(x, scale=2.0), twin(x, scale=2.0))


@pytest.mark.parametrize("device", ["cpu", "sim:0"])
@pytest.mark.parametrize("kind", [Chain, Sums])
def test_hooks_on_the_model_see_what_the_caller_does(plan_of, kind, device):
    """Its own tensors, on its device, before and after; whether they were there before the placement or came later."""
    model, x = kind(), torch.randn(4, 6)
    plan, seen = plan_of(model, x), []

    def before(_module, args):
        seen.append(args[0])

    def after(_module, args, output):
        seen.extend([args[0], output])

    for hooked in (True, False):
        if hooked:
            handles = [model.register_forward_pre_hook(before), model.register_forward_hook(after)]
        sw.place(model, plan, devices=PAIR)
        if not hooked:
            handles = [model.register_forward_pre_hook(before), model.register_forward_hook(after)]
        given = x.to(device)
        output = model(given)
        assert all(one is given for one in seen[:2])
        assert seen[2] is output
        assert str(output.device) == device
        for handle in handles:
            handle.remove()
        seen.clear()


@pytest.mark.parametrize("late", ["forward", "pre", "backward", "backward pre", "prepended"])
def test_hooks_that_come_later_see_what_was_moved(placed, late):
    """When the model is called it finds them, and has the unit move its inputs by a hook before them from then on."""
    model, twin, x = placed
    unit, seen = model.get_submodule(CROSSING), []
    add = {
        "forward": lambda: unit.register_forward_hook(lambda _unit, args, _output: seen.append(args[0].device)),
        "pre": lambda: unit.register_forward_pre_hook(lambda _unit, args: seen.append(args[0].device)),
        "prepended": lambda: unit.register_forward_pre_hook(
            lambda _unit, args: seen.append(args[0].device), prepend=True
        ),
        "backward": lambda: unit.register_full_backward_hook(lambda _unit, into, _out: seen.append(into[0].device)),
        "backward pre": lambda: unit.register_full_backward_pre_hook(lambda _unit, out: seen.append(out[0].device)),
    }
    assert not moves_by_hook(unit)
    assert "forward" in vars(unit)
    add[late]()
    for times in (1, 2):
        output = model(x)
        assert torch.equal(output, twin(x))
        output.sum().backward()
        assert seen == [torch.device("sim:0")] * times
    assert len(moves_by_hook(unit)) == 1
    assert "forward" not in vars(unit)
    sw.unplace(model)
    assert not list(placement_hooks(model))
    assert torch.equal(model(x), twin(x))


def test_threads_that_find_a_hook_add_one(placed):
    """Whichever comes first; the others' calls go on."""
    model, twin, x = placed
    unit, expected = model.get_submodule(CROSSING), twin(x)
    unit.register_forward_hook(lambda *_: None)
    barrier = threading.Barrier(4)

    def forward(_):
        barrier.wait(30)
        with torch.no_grad():
            return model(x)

    with ThreadPoolExecutor(4) as threads:
        assert all(torch.equal(found, expected) for found in threads.map(forward, range(4)))
    assert len(moves_by_hook(unit)) == 1


@pytest.mark.parametrize("kind", [Chain, Sums])
def test_an_interrupt_leaves_nothing(plan_of, kind):
    """Ctrl-C in a unit ends what the forward has begun at once."""
    model, x = kind(), torch.randn(4, 6)
    expected = model(x)
    sw.place(model, plan_of(model, x), devices=PAIR)

    def interrupt(*_):
        raise KeyboardInterrupt

    handle = model.layers[2].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model(x.to("sim:0"))
    assert not OPEN
    assert _get_current_function_mode() is None
    handle.remove()
    assert torch.equal(model(x), expected)


class Lists(nn.Module):
    """Its last layer takes a list."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(6, 6), Stacks(6, 6)])

    def forward(self, x):
        held = [self.layers[0](x), x]
        return self.layers[1](held)


class Stacks(nn.Linear):
    fails = False

    def forward(self, held):
        assert {one.device for one in held} == {self.weight.device}
        if self.fails:
            raise KeyboardInterrupt
        held.append(super().forward(held[0] + held[1]))
        return held[-1]


def test_a_list_is_the_callers_again_after_a_unit_without_hooks(captured_profile):
    """Also where the unit is interrupted; what it appended stays."""
    model, x = Lists(), torch.randn(4, 6)
    expected = model(x)
    profile = captured_profile(model, (x,), microbatches=(1,))
    pins = {"layers.0": "cpu:0", "layers.1": "cpu:1"}
    sw.place(model, sw.plan(profile, microbatches=1, pins=pins), devices=PAIR)
    assert torch.equal(model(x), expected)
    unit, held = model.layers[1], [x, x]
    assert isinstance(vars(unit)["forward"], UnitForward)
    unit(held)
    assert held[0] is x
    assert held[1] is x
    assert len(held) == 3
    unit.fails = True
    held = [x, x]
    with pytest.raises(KeyboardInterrupt):
        unit(held)
    assert all(one is x for one in held)
    assert not OPEN


def test_a_model_that_is_dropped_is_free_at_once(plan_of):
    """Its memory, that is, without a collection of garbage."""
    model, x = Chain(), torch.randn(4, 6)
    sw.place(model, plan_of(model, x), devices=PAIR)
    model(x)
    dropped = [weakref.ref(model), weakref.ref(model.layers[1])]
    gc.collect()
    gc.disable()
    try:
        del model
        assert [ref() for ref in dropped] == [None, None]
    finally:
        gc.enable()


@pytest.mark.parametrize("wrapped", ["before", "after"])
def test_a_forward_of_another_tool_lives_on(plan_of, wrapped):
    """Wrapped before, it is what is placed, and there again afterwards; wrapped after, it goes on without us."""
    model, x = Chain(), torch.randn(4, 6)
    plan = plan_of(model, x)
    plain = model(x)

    def wrap():
        inner = model.forward

        @wraps(inner)
        def forward(*args, **kwargs):
            return inner(*args, **kwargs) + 1

        model.forward = forward
        return forward

    other = wrap() if wrapped == "before" else None
    sw.place(model, plan, devices=PAIR)
    other = other or wrap()
    for _ in range(2):
        assert torch.allclose(model(x), plain + 1)
        assert torch.allclose(model(x.to("sim:0")).to("cpu"), plain + 1)
        assert sw.unplace(model).forward is other
        assert not list(placement_hooks(model))
        assert {p.device.type for p in model.parameters()} == {"cpu"}
        assert torch.allclose(model(x), plain + 1)
        assert inspect.signature(model.forward) == inspect.signature(Chain().forward)
        sw.place(model, plan, devices=PAIR)


@pytest.mark.parametrize("first", ["accelerate", "shardwright"])
def test_accelerates_hooks_and_ours_come_off_in_any_order(plan_of, first):
    """Its hooks replace the forward of an instance too."""
    accelerate = pytest.importorskip("accelerate.hooks")
    model, x = Chain(), torch.randn(4, 6)
    plan, plain = plan_of(model, x), model(x)

    class Doubles(accelerate.ModelHook):
        def post_forward(self, _module, output):
            return output * 2

    for last in ("accelerate", "shardwright"):
        if first == "accelerate":
            accelerate.add_hook_to_module(model, Doubles())
        sw.place(model, plan, devices=PAIR)
        if first == "shardwright":
            accelerate.add_hook_to_module(model, Doubles())
        assert torch.equal(model(x), plain * 2)
        assert torch.equal(copy.deepcopy(model)(x), plain * 2)
        if last == "accelerate":
            sw.unplace(model)
            assert torch.equal(model(x), plain * 2)
        accelerate.remove_hook_from_module(model)
        sw.unplace(model)
        assert not list(placement_hooks(model))
        assert {p.device.type for p in model.parameters()} == {"cpu"}
        assert torch.equal(model(x), plain)


def test_a_placed_model_is_saved_whole(placed):
    """Its copy by torch.save is placed too, and unplaced by itself; on the CPU, since simulated tensors stay here."""
    model, twin, x = placed
    bring_to_cpu(model)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    assert [type(hooks[key]) for _, hooks, key in placement_hooks(loaded)] == [WholeForward, UnitForward]
    assert vars(loaded)["forward"].standing[0][0] is loaded.layers[1]
    assert list(loaded.state_dict()) == list(twin.state_dict())
    assert torch.equal(loaded(x), twin(x))
    sw.unplace(loaded)
    assert not list(placement_hooks(loaded))
    assert list(placement_hooks(model))


def test_a_placed_chain_is_compiled_as_one_graph(placed):
    """The moves are in it: nothing is left to Python where there is no glue to align."""
    model, twin, x = placed
    bring_to_cpu(model)
    assert torch.equal(torch.compile(model, backend="eager", fullgraph=True)(x), twin(x))


@pytest.mark.filterwarnings("ignore")  # the compiler tells what it leaves to Python
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_unit_may_be_compiled(plan_of, when):
    """The one at the cut, before the placement, with calls in between, or after it."""
    model, x = Chain(), torch.randn(4, 6)
    expected = model(x).detach()
    plan, unit = plan_of(model, x), model.get_submodule(CROSSING)
    if when == "before":
        unit.compile(backend="eager")
        model(x)
    sw.place(model, plan, devices=PAIR)
    if when == "after":
        unit.compile(backend="eager")
    for _ in range(2):
        assert torch.equal(model(x).detach(), expected)
    sw.unplace(model)
    assert torch.equal(model(x).detach(), expected)


def test_verify_leaves_a_pipelined_model_at_work(captured_profile):
    """Its threads end with the replay, and the next call begins them anew."""
    model, x = nn.Sequential(*(nn.Linear(6, 6) for _ in range(4))), torch.randn(4, 6)
    plan = sw.plan(captured_profile(model, (x,), microbatches=(1, 2)), microbatches=2)
    expected = model(x)
    sw.place(model, plan, microbatches=2)
    torch.testing.assert_close(model(x), expected)
    assert sw.verify(model, plan, (x,))
    torch.testing.assert_close(model(x), expected)
    sw.unplace(model)
    assert "forward" not in vars(model)
