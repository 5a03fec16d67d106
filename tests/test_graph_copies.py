"""Copies of placed graph modules, which are built from their graph: what placing added is there again."""

import copy
import io
import pickle

import pytest
import torch
from torch import fx, nn

import shardwright as sw
from shardwright.profiler.recording.placed import placement_hooks
from shardwright.sharder.runtime.placing.graph_copies import _Placement

PAIR = {"cpu:0": "cpu", "cpu:1": "sim:0"}


class Skip(nn.Module):
    """Glue that joins two devices when the second layer is on another than the first."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = (nn.Linear(6, 6) for _ in range(3))

    def forward(self, x):
        h = self.first(x)
        return self.third(self.second(h) + h)


class Around(nn.Module):
    """A graph module as one unit beside others, which shares its second layer's weight with one of them."""

    def __init__(self):
        super().__init__()
        self.before, self.inner, self.after = nn.Linear(6, 6), fx.symbolic_trace(Skip()), nn.Linear(6, 6)
        self.after.weight = self.inner.second.weight

    def forward(self, x):
        return self.after(self.inner(self.before(x)))


PLACED = {
    "the whole": (lambda: fx.symbolic_trace(Skip()), {"first": "cpu:0", "second": "cpu:1", "third": "cpu:0"}),
    "a unit": (Around, {"before": "cpu:0", "inner": "cpu:1", "after": "cpu:0"}),
}


@pytest.fixture(params=PLACED)
def placed(request, captured_profile):
    """A model on two devices of which one is simulated, the same unplaced, an input, and its plan."""
    make, pins = PLACED[request.param]
    torch.manual_seed(0)
    model, x = make(), torch.randn(4, 6)
    plan = sw.plan(captured_profile(model, (x,), microbatches=(1,)), microbatches=1, pins=pins, contiguous=False)
    plain = copy.deepcopy(model)
    return sw.place(model, plan, devices=PAIR), plain, x, plan


def marks(model):
    """What placing added, by module and place."""
    names = {id(module): name for name, module in model.named_modules()}
    return [(names[id(module)], key, type(hooks[key])) for module, hooks, key in placement_hooks(model)]


def kept(model):
    return [hook for m in model.modules() if isinstance(m, fx.GraphModule) for hook in m._deepcopy_hooks]


def test_a_deep_copy_is_placed(placed):
    """Also one of a copy: it computes with its own weights over both devices, and comes off its devices alone."""
    model, plain, x, _ = placed
    twin = copy.deepcopy(copy.deepcopy(model))
    assert marks(twin) == marks(model)
    assert {p.device.type for p in twin.parameters()} == {"cpu", "sim"}
    assert torch.equal(twin(x), plain(x))
    with torch.no_grad():
        next(twin.parameters()).add_(1)
    assert not torch.equal(twin(x), plain(x))
    assert torch.equal(model(x), plain(x))
    sw.unplace(twin)
    assert {p.device.type for p in twin.parameters()} == {"cpu"}
    assert not marks(twin)
    assert not kept(twin)
    assert marks(model)
    assert torch.equal(model(x), plain(x))


def test_a_copy_of_what_was_unplaced_is_plain(placed):
    """Nothing of the placement is left, and it can be pickled again."""
    model, plain, x, _ = placed
    sw.unplace(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert not marks(twin)
        assert not kept(twin)
        assert torch.equal(twin(x), plain(x))


def test_placed_anew_it_is_kept_once(placed):
    """A copy of it has each hook once."""
    model, plain, x, plan = placed
    before = marks(model)
    sw.place(model, plan, devices=PAIR)
    twin = copy.deepcopy(model)
    assert len(marks(twin)) == len(before)
    assert sum(isinstance(hook, _Placement) for hook in kept(twin)) == 1
    assert torch.equal(twin(x), plain(x))


def test_a_hook_that_took_the_forward_s_place_is_copied(placed):
    """A user's hook on a unit has it move its inputs by a hook, also in copies that are made then."""
    model, plain, x, _ = placed
    handles = [unit.register_forward_pre_hook(lambda *_: None) for unit in model.modules() if unit is not model]
    model(x)
    for handle in handles:
        handle.remove()
    twin = copy.deepcopy(model)
    assert marks(twin) == marks(model)
    assert torch.equal(twin(x), plain(x))


@pytest.mark.parametrize("save", [pickle.dumps, lambda model: torch.save(model, io.BytesIO())])
def test_a_placed_one_is_not_pickled(placed, save):
    """Said in one line, with what to do; its state dict is saved as ever."""
    model, _, _, _ = placed
    with pytest.raises(sw.ShardwrightError, match=r"placed fx.GraphModule cannot be pickled.*state_dict.*unplace"):
        save(model)
    torch.save({name: t.cpu() for name, t in model.state_dict().items()}, io.BytesIO())


def test_a_copy_is_pipelined_as_its_original(captured_profile):
    """With threads of its own: micro-batches pass through both stages."""
    model, x = fx.symbolic_trace(Skip()), torch.randn(4, 6)
    plan = sw.plan(
        captured_profile(model, (x,), microbatches=(1, 2)), microbatches=2, pins={"first": "cpu:0", "third": "cpu:1"}
    )
    expected, seen = model(x), []
    twin = copy.deepcopy(sw.place(model, plan, microbatches=2))
    twin.first.register_forward_hook(lambda _module, args, _output: seen.append(len(args[0])))
    twin(x)  # captured and compared
    seen.clear()
    assert torch.equal(twin(x), expected)
    assert seen == [2, 2]
    sw.unplace(twin)
    sw.unplace(model)
