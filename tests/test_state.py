"""What a model and its caller keep is as it was, whatever the forward did to it."""

import copy
import threading
from collections import Counter, OrderedDict, UserDict, deque
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from recording import WIDTH, Layers, batch, repeatable, rows

import shardwright as sw
from shardwright.profiler.capture import captures_of
from shardwright.profiler.recording.state import Snapshot, attributes_kept
from shardwright.profiler.trace import checked_trace

__all__ = ["repeatable"]


class Plain:
    """An object with attributes."""

    def __init__(self):
        self.calls, self.inner, self.lock = 0, {"list": []}, threading.Lock()


@dataclass(slots=True)
class Slots:
    """An object without a dictionary."""

    calls: int = 0
    log: list[int] = field(default_factory=list)


class Cycle:
    """An object that knows itself."""

    def __init__(self):
        self.me, self.calls = self, 0


class Log(list):
    """A list with an opinion of its own about what is added."""

    def extend(self, _items):
        raise AssertionError("restoring goes past it")


def _count(thing):
    thing.calls += 1


def _plain(thing):
    thing.calls += 1
    thing.new = 3
    thing.inner["list"].append(thing)
    vars(thing).pop("lock", None)


def _slots(thing):
    thing.calls += 1
    thing.log.append(1)


def _user(thing):
    thing["x"] = 2
    thing["new"] = 1


def _counted(thing):
    thing["a"] += 1
    thing["b"] += 1


def _in_tuple(thing):
    thing[0].append(1)
    thing[1].calls += 1


STATES = {
    "object": (Plain, _plain, lambda t: (t.calls, t.inner, sorted(vars(t)))),
    "slots": (Slots, _slots, lambda t: (t.calls, t.log)),
    "cycle": (Cycle, _count, lambda t: (t.calls, t.me is t)),
    "own list": (lambda: Log([1]), lambda t: t.append(2), list),
    "user dict": (lambda: UserDict(x=1), _user, dict),
    "counter": (lambda: Counter("a"), _counted, dict),
    "ordered": (lambda: OrderedDict(a=1, b=2), lambda t: t.move_to_end("a"), lambda t: list(t.items())),
    "deque": (lambda: deque([1, 2], maxlen=2), lambda t: t.append(3), lambda t: (list(t), t.maxlen)),
    "set": (lambda: {1}, lambda t: t.add(2), set),
    "tuple": (lambda: ([], Plain()), _in_tuple, lambda t: (t[0], t[1].calls)),
    "array": (lambda: np.zeros(3), lambda t: np.add(t, 1, out=t), lambda t: t.tolist()),
    "array of objects": (lambda: np.array([None, 1], dtype=object), lambda t: t.fill(2), lambda t: t.tolist()),
    "tensor": (lambda: torch.zeros(3), lambda t: t.add_(1), lambda t: t.tolist()),
    "tensors in an object": (lambda: _held(torch.ones(2)), lambda t: t.tensor.mul_(2), lambda t: t.tensor.tolist()),
}


def _held(tensor):
    made = Plain()
    made.tensor = tensor
    return made


@pytest.mark.parametrize("name", STATES)
def test_what_hangs_on_a_module_is_put_back(name):
    """Objects, containers, plain tensors and arrays that a forward changes are the same things, as they were."""
    make, change, seen = STATES[name]

    class Model(Layers):
        def __init__(self):
            super().__init__()
            self.thing = make()

        def forward(self, x):
            change(self.thing)
            return self.layers[1](self.layers[0](x))

    model = Model()
    thing, before = model.thing, copy.deepcopy(seen(model.thing))
    with torch.no_grad():
        model(rows(0))
    assert seen(thing) != before
    model = Model()
    thing = model.thing
    checked_trace(model, *batch(0))
    assert model.thing is thing
    assert seen(thing) == before


def test_a_read_only_array_and_what_has_no_attributes_are_left_alone():
    """What cannot change needs no copy."""
    model = Layers()
    model.array = np.zeros(3)
    model.array.flags.writeable = False
    model.others = [object(), threading.Lock(), None, (), frozenset(), b"", range(3)]
    with attributes_kept(model):
        model.others.clear()
    assert len(model.others) == 7


def test_a_tensor_that_requires_a_gradient_is_put_back_too():
    """A leaf and a tensor with a history are written past autograd."""
    model = Layers()
    model.leaf = [torch.ones(2, requires_grad=True)]
    model.made = [model.layers[0].weight.detach().requires_grad_() * 1]
    before = model.made[0].detach().clone()
    with attributes_kept(model), torch.no_grad():
        model.leaf[0].add_(1)
        model.made[0].add_(1)
    assert model.leaf[0].tolist() == [1, 1]
    assert torch.equal(model.made[0], before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.complex64])
def test_parameters_that_a_run_wrote_are_put_back(dtype):
    """Also past autograd, one of many numbers, and into one that is not laid out row by row."""
    model = Layers()
    first, last = model.layers[0], model.layers[-1]
    first.weight = torch.nn.Parameter(first.weight.detach().to(dtype).t())
    before = [parameter.detach().clone() for parameter in model.parameters()]
    with Snapshot(model).state_kept():
        first.weight.data[-1, 0] += 1
        with torch.no_grad():
            last.bias.zero_()
    assert all(map(torch.equal, model.parameters(), before))


def test_objects_in_objects_end_somewhere():
    """A trainer that a module knows, with all its data, is not looked through."""
    model = Layers()
    model.trainer = _chain(6)
    with attributes_kept(model):
        model.trainer.calls += 1
        model.trainer.inner.inner.inner.inner.inner.calls += 1
    assert model.trainer.calls == 0
    assert model.trainer.inner.inner.inner.inner.inner.calls == 1


def _chain(length):
    made = Plain()
    made.inner = _chain(length - 1) if length > 1 else None
    return made


class ChangesInputs(Layers):
    """A forward that changes the tensor and the list that it is given."""

    def forward(self, x, log):
        x.mul_(0.5)
        log.append(x)
        return self.layers[1](self.layers[0](x))


def test_the_sample_is_the_callers():
    """A capture, and the choice of units with its checks, leave the caller's tensors and lists alone."""
    x, log, model = rows(0), [], ChangesInputs()
    captures, _ = captures_of(model, (x, log), {}, [1, 2], devices=2, train=False)
    assert set(captures) == {1, 2}
    assert captures[1].obstacles == []
    assert torch.equal(x, rows(0))
    assert log == []


def test_verify_leaves_the_sample_alone(captured_profile):
    """A replay runs the forward twice on the same numbers, none of which are the caller's to lose."""
    x, log, model = rows(0), [], ChangesInputs()
    plan = sw.plan(
        captured_profile(model, (x, log), train=False, microbatches=(1,)),
        microbatches=1,
        pins={"layers.0": "cpu:0", "layers.1": "cpu:1"},
    )
    assert sw.verify(model, plan, (x, log))
    assert torch.equal(x, rows(0))
    assert log == []


def test_plain_tensors_begin_alike_in_both_runs_of_a_replay(captured_profile):
    """A running mean that is no buffer is put back between the two runs that verify compares."""

    class Counts(Layers):
        def __init__(self):
            super().__init__()
            self.seen = torch.zeros(WIDTH)

        def forward(self, x):
            y = self.layers[0](x)
            self.seen.add_(1)
            return self.layers[1](y) * self.seen.to(y.device)

    model = Counts()
    profile = captured_profile(model, (rows(0),), train=False, microbatches=(1,))
    plan = sw.plan(profile, microbatches=1, pins={"layers.0": "cpu:0", "layers.1": "cpu:1"})
    assert sw.verify(model, plan, (rows(0),))
    assert not model.seen.any()
