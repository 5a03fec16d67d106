"""Optimizers by name, class and partial: what they are called, and the bytes that they really take."""

import math
from functools import partial

import pytest
import torch
from torch import nn

import shardwright as sw
from shardwright.profiler.measuring.optimizers import OPTIMIZERS, OptimizerMemory, make_optimizer, optimizer_name
from shardwright.profiler.memory import MemoryCounter, total_bytes
from shardwright.profiler.recording.structure import tensors_in


class Half(torch.optim.Optimizer):
    """Keeps one number a row of each parameter, in a dictionary of its own."""

    def __init__(self, parameters, *, scale):
        super().__init__(parameters, {"scale": scale})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter].setdefault("rows", {"mean": torch.zeros(parameter.shape[0])})


def real(name, shapes, dtype=torch.float32, foreach=None):
    """Bytes of the state of a real optimizer on real parameters, and the peak of its second step."""
    parameters = [nn.Parameter(torch.rand(shape, dtype=dtype)) for shape in shapes]
    optimizer = make_optimizer(name, parameters)
    for group in optimizer.param_groups:
        if "foreach" in group:
            group["foreach"] = foreach
    for parameter in parameters:
        parameter.grad = torch.rand_like(parameter)
    optimizer.step()
    counter = MemoryCounter()
    with counter:
        optimizer.step()
    return total_bytes(t for _, t in tensors_in(list(optimizer.state.values()))), counter.peak_bytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", [*OPTIMIZERS, "sgd(momentum=0.9)", "adam(amsgrad=True)", "torch.optim.AdamW(lr=0.1)"])
def test_bytes_are_those_of_the_real_optimizer(name, dtype):
    """State and both workspaces, counted without numbers, equal those of the class on real parameters of that shape."""
    shape = (6, 10)
    parameter = nn.Parameter(torch.zeros(shape, dtype=dtype))
    found = OptimizerMemory(name).of([parameter])
    assert (found.state, found.update) == real(name, [shape], dtype)
    assert found.update_together == real(name, [shape], dtype, foreach=True)[1]


@pytest.mark.parametrize("name", ["adam", "adafactor", "sgd"])
def test_parameters_follow_each_other(name):
    """Over several parameters states add up, and each update finds what the one before has left."""
    shapes = [(6, 10), (6, 10), (3,), (20,)]
    found = OptimizerMemory(name).of([nn.Parameter(torch.zeros(shape)) for shape in shapes])
    assert (found.state, found.update) == real(name, shapes)


def test_state_that_follows_the_shape():
    """Adafactor keeps a row and a column of a matrix, and every element of a vector."""
    memory = OptimizerMemory("adafactor")
    matrix, vector = nn.Parameter(torch.zeros(30, 40)), nn.Parameter(torch.zeros(30))
    assert memory.of([matrix]).state == 4 * (1 + 30 + 40)
    assert memory.of([vector]).state == 4 * (1 + 30)


def test_frozen_parameters_take_nothing():
    """What is not trained has no state."""
    assert OptimizerMemory("adam").of([nn.Parameter(torch.zeros(5), requires_grad=False)]).state == 0


def test_master_weights_are_four_bytes_and_states_of_four():
    """A parameter of lower precision has an fp32 copy, and the optimizer's state is that of the copy."""
    low, full = (nn.Parameter(torch.zeros(8, 8, dtype=dtype)) for dtype in (torch.bfloat16, torch.float32))
    plain, master = OptimizerMemory("adam"), OptimizerMemory("adam", master_weights=True)
    assert plain.of([low]).state == 2 * 64 * 2 + 4
    assert master.of([low]).state == 64 * 4 + 2 * 64 * 4 + 4
    assert master.of([full]) == plain.of([full])


@pytest.mark.parametrize(
    ("optimizer", "name"),
    [
        ("adam", "adam"),
        (torch.optim.AdamW, "adamw"),
        (partial(torch.optim.SGD, lr=0.1, momentum=0.9), "sgd(lr=0.1, momentum=0.9)"),
        (partial(partial(torch.optim.Adam, lr=0.1), lr=0.2), "adam(lr=0.2)"),
    ],
)
def test_names(optimizer, name):
    """A class or a partial is written as text that makes it again, with its settings."""
    assert optimizer_name(optimizer) == name
    made = make_optimizer(name, [nn.Parameter(torch.zeros(2))])
    wanted = optimizer if callable(optimizer) else torch.optim.Adam
    expected = wanted([nn.Parameter(torch.zeros(2))])
    assert type(made) is type(expected)
    if isinstance(optimizer, partial):
        assert all(made.param_groups[0][key] == value for key, value in optimizer.keywords.items())


def test_a_class_of_ones_own(monkeypatch):
    """A class is named by its module, and its state is counted wherever the class keeps it."""
    monkeypatch.setitem(__import__("sys").modules, "halves", __import__("types").SimpleNamespace(Half=Half))
    monkeypatch.setattr(Half, "__module__", "halves")
    name = optimizer_name(partial(Half, scale=2))
    assert name == "halves.Half(scale=2)"
    assert OptimizerMemory(name).of([nn.Parameter(torch.zeros(3, 5))]).state == 12


@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        ("lion", "optimizer 'lion' is not known; choose one of adadelta, adafactor"),
        ("adam(0.1)", "cannot be read: write a name, or settings too"),
        ("adam(lr=os.getcwd())", "cannot be read"),
        ("adam(", "cannot be read"),
        ("os.path", "optimizer 'os.path' is not known"),
        (torch.optim.LBFGS, "is not known"),
        (nn.Linear, "is neither a name nor a class of optimizers"),
        (partial(torch.optim.SGD, 3), "has positional settings"),
    ],
)
def test_what_is_no_optimizer_is_refused(optimizer, message):
    """The mistake is named, and what can be written instead."""
    if optimizer is torch.optim.LBFGS:
        optimizer = "lbfgs"
    with pytest.raises(sw.ShardwrightError, match=message.replace("(", r"\(")):
        optimizer_name(optimizer)


def test_a_class_that_workers_cannot_import_is_refused(monkeypatch):
    """A class of a script or of a function is refused before a worker starts, with what to do."""

    class Local(Half):
        pass

    monkeypatch.setattr(Half, "__module__", "__main__")
    for optimizer in (Local, Half):
        with pytest.raises(sw.ShardwrightError, match="cannot import it; move it to the top of a module"):
            optimizer_name(optimizer)


def test_wrong_settings_are_refused():
    """A setting that the class does not have is refused with its reason."""
    with pytest.raises(sw.ShardwrightError, match="optimizer sgd\\(speed=1\\) cannot be made"):
        OptimizerMemory("sgd(speed=1)").of([nn.Parameter(torch.zeros(2))])


def test_a_parameter_that_the_optimizer_refuses():
    """Muon takes matrices only, and says so in one line."""
    with pytest.raises(sw.ShardwrightError, match="Muon only supports 2D"):
        OptimizerMemory("muon").of([nn.Parameter(torch.zeros(2))])


def test_counting_takes_no_memory():
    """A parameter of a tebibyte is weighed without its numbers."""
    huge = nn.Parameter(torch.empty(2**20, 2**18, device="meta"))
    assert math.isclose(OptimizerMemory("adam").of([huge]).state, 2 * 2**40, rel_tol=1e-9)
