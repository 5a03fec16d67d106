"""Calls that are broken off: what hooks began is ended by the next hook that sees it, in whatever thread."""

import copy
import gc
import threading
import weakref
from types import FrameType

import pytest
import torch
from torch import nn
from torch.overrides import _get_current_function_mode

import shardwright as sw
from shardwright.sharder.runtime.placing.calls import OPEN, Begun, begin, end, open_calls, settle

PAIR = {"cpu:0": "cpu", "cpu:1": "sim:0"}
PINS = {"layers.0": "cpu:0", "layers.1": "cpu:1", "layers.2": "cpu:1"}


class Ends(Begun):
    def __init__(self, hook):
        super().__init__(hook)
        self.undone = 0

    def undo(self):
        self.undone += 1


class Runs(nn.Module):
    """Calls a function as a module: with PyTorch's frames around it."""

    def forward(self, function):
        return function()


def begun(hook):
    """Something begun in the call that runs now."""
    made = Ends(hook)
    begin(made)
    return made


def broken_off(function):
    """``function``, interrupted as by Ctrl-C."""
    function()
    raise KeyboardInterrupt


@pytest.fixture(autouse=True)
def nothing_open():
    """No test leaves anything begun to the next."""
    yield
    settle()
    assert not OPEN


def test_what_a_call_began_it_ends():
    """The hook's own is handed back, once, and not undone."""

    def call():
        made = begun("hook")
        assert end("other") is None
        assert end("hook") is made
        assert end("hook") is None
        return made

    assert Runs()(call).undone == 0


def test_calls_inside_calls_end_their_own():
    """A module that calls itself finds in each call what began there."""
    run = Runs()

    def inner():
        assert end("hook") is None  # that of the outer call is not this call's
        made = begun("hook")
        assert end("hook") is made

    def outer():
        made = begun("hook")
        run(inner)
        assert end("hook") is made

    run(outer)


def test_what_was_broken_off_inside_is_undone_with_the_outer():
    """An outer call that goes on after an interrupt inside ends with its own, and what was left inside is undone."""
    run, left = Runs(), []

    def outer():
        made = begun("hook")
        with pytest.raises(KeyboardInterrupt):
            run(lambda: broken_off(lambda: left.append(begun("hook"))))
        assert end("hook") is made

    run(outer)
    assert left[0].undone == 1


def test_only_calls_that_are_over_are_settled():
    """What a running call began stays, from inside deeper calls too; after an interrupt it is undone."""
    run, made = Runs(), []

    def outer():
        made.append(begun("hook"))
        run(settle)
        assert made[0].undone == 0

    with pytest.raises(KeyboardInterrupt):
        run(lambda: broken_off(outer))
    assert made[0].undone == 0
    settle()
    assert made[0].undone == 1


def test_of_another_threads_call_it_is_known_whether_it_is_over():
    """A call runs while its thread is inside it, and is over when the thread has left it or ended."""
    entered, leave, made = threading.Event(), threading.Event(), []

    def call():
        made.append(begun("hook"))
        entered.set()
        leave.wait(10)
        end("hook")

    thread = threading.Thread(target=Runs(), args=(call,))
    thread.start()
    entered.wait(10)
    assert not made[0].is_over()
    leave.set()
    thread.join()
    assert made[0].is_over()


class Tied(nn.Module):
    """Layers the last of which has the first's weight, between them glue that joins two devices."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
        self.layers[2].weight = self.layers[0].weight

    def forward(self, x):
        first = self.layers[0](x)
        return self.layers[2](self.layers[1](first) + first) + x


@pytest.fixture
def interrupted(captured_profile):
    """A placed model whose last forward was interrupted inside the unit that borrows, its twin, and inputs."""
    torch.manual_seed(0)
    model, x = Tied(), torch.randn(4, 6)
    twin = copy.deepcopy(model)
    profile = captured_profile(model, (x,), microbatches=(1,))
    plan = sw.plan(profile, microbatches=1, pins=PINS)
    sw.place(model, plan, devices=PAIR)

    def interrupt(*_):
        raise KeyboardInterrupt

    handle = model.layers[2].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model(x)
    handle.remove()
    return model, twin, x


def test_training_goes_on_after_an_interrupt(interrupted):
    """Steps after Ctrl-C in a unit with a tied weight are the unplaced model's, and no mode stays."""
    model, twin, x = interrupted
    model(x)
    assert model.layers[2].weight is model.layers[0].weight
    for one in (model, twin):
        optimizer = torch.optim.SGD(one.parameters(), lr=0.5)
        for _ in range(2):
            optimizer.zero_grad()
            one(x).square().mean().backward()
            optimizer.step()
    assert torch.allclose(model(x), twin(x), atol=1e-6)
    assert _get_current_function_mode() is None
    assert open_calls() == []


def test_another_thread_gets_its_turn_after_an_interrupt(interrupted):
    """What a thread borrowed in a call that was broken off does not keep others waiting."""
    model, twin, x = interrupted
    found = []
    thread = threading.Thread(target=lambda: found.append(model(x).detach()), daemon=True)
    thread.start()
    thread.join(30)
    assert len(found) == 1
    assert torch.allclose(found[0], twin(x), atol=1e-6)
    assert model.layers[2].weight is model.layers[0].weight


def test_unplace_after_an_interrupt_returns_what_was_lent(interrupted):
    """The tied weight is one parameter again, on the CPU."""
    model, twin, x = interrupted
    sw.unplace(model)
    assert model.layers[2].weight is model.layers[0].weight
    assert isinstance(model.layers[2].weight, nn.Parameter)
    assert torch.equal(model(x), twin(x))
    assert _get_current_function_mode() is None


def test_a_forward_that_ended_is_not_kept(captured_profile):
    """Its inputs, and what lay on the other device, are free at once, without a collection of garbage."""
    model, x = Tied(), torch.randn(4, 6)
    plan = sw.plan(captured_profile(model, (x,), microbatches=(1,)), microbatches=1, pins=PINS)
    sw.place(model, plan, devices=PAIR)
    made = []
    model.layers[1].register_forward_pre_hook(lambda _module, args: made.append(weakref.ref(args[0])))
    gc.collect()
    gc.disable()
    try:
        with torch.no_grad():
            model(x)
        assert made[0]() is None
        assert [kept for kept in gc.get_referrers(x) if isinstance(kept, FrameType | tuple | list)] == []
    finally:
        gc.enable()


def test_nothing_is_noted_of_a_call_that_has_nothing_to_undo(captured_profile):
    """One tensor on the first device, and no glue to align; an output goes back to where its input came from."""
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3))
    x = torch.randn(2, 3)
    profile = captured_profile(model, (x,), microbatches=(1,))
    pins = {"0": "cpu:0", "1": "cpu:1", "2": "cpu:1"}
    sw.place(model, sw.plan(profile, microbatches=1, pins=pins), devices=PAIR)
    noted = []
    model[1].register_forward_hook(lambda *_: noted.append(len(open_calls())))
    here = model(x)
    there = model(x.to("sim:0"))
    assert noted == [0, 1]
    assert (here.device.type, str(there.device)) == ("cpu", "sim:0")
