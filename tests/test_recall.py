"""A profile is handed out again only where model, code, inputs and capture are what they were."""

import functools
import importlib
import operator
import random
import sys
import threading
import time
import types

import pytest
import torch
from recording import ROWS, WIDTH, Layers, repeatable, rows
from torch import nn

import shardwright as sw
from shardwright.profiler import capture, recall
from shardwright.profiler.cache import Cache
from shardwright.profiler.capture import captures_of
from shardwright.profiler.recording.fingerprint import fingerprint_of
from shardwright.profiler.recording.state import Snapshot

__all__ = ["repeatable"]

FACTOR = 1.0


class Net(Layers):
    """Two layers, with things that its forward may depend on."""

    def __init__(self):
        super().__init__()
        self.skip, self.norm = False, nn.BatchNorm1d(WIDTH)
        self.settings = types.SimpleNamespace(scale=[1.0])
        self.gate = nn.Parameter(torch.zeros(WIDTH))
        self.register_buffer("places", torch.arange(WIDTH))

    def forward(self, x):
        """The layers, one after another."""
        return self.layers[1](self.norm(self.layers[0](x))) * self.gate


def scaled(x):
    """A function that finds its factor among the globals."""
    return x * FACTOR


def at_another_time(module):
    """A function whose code is not the same."""
    return lambda x: module.layers[0](x) + 1


def subject(model, x):
    return recall.Request(model, (x,), {}, (1, 2), True, "as ever")


@pytest.fixture
def known(captured_profile, tmp_path):
    """Keeps a profile of a model; then tells whether it is recalled for another one."""

    def keep(model, x):
        found = Snapshot(model)
        captures, _ = captures_of(model, (x,), {}, (1, 2), devices=2, train=True)
        before = recall.recall(subject(model, x), Cache(tmp_path), found)
        made = captured_profile(model, (x,), microbatches=(1, 2))
        recall.keep(subject(model, x), before, captures, made, Cache(tmp_path))

    def recalled(model, x):
        return recall.recall(subject(model, x), Cache(tmp_path), Snapshot(model)).profile

    return keep, recalled


def test_a_second_profile_captures_once_and_measures_nothing(monkeypatch, tmp_path):
    """The model runs once, at the smallest micro-batch, also one of other random weights and numbers."""
    monkeypatch.setenv("SHARDWRIGHT_CACHE", str(tmp_path))
    batches, told = [], []

    def profiled(**options):
        batches.clear()
        told.clear()
        model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH))
        x, tell = torch.randn(ROWS, WIDTH), lambda *news: told.append(news[0])
        return sw.profile(model, (x,), devices=["cpu:0"], rounds=6, progress=tell, **options)

    def watched(trace):
        @functools.wraps(trace)
        def watch(model, args, kwargs, **options):
            batches.append(len(args[0]))
            return trace(model, args, kwargs, **options)

        return watch

    for home, name in [(recall, "trace"), (capture, "trace"), (capture, "checked_trace")]:
        monkeypatch.setattr(home, name, watched(getattr(home, name)))
    first = profiled()
    assert sorted(batches) == [1, 2, 4]
    again = profiled(name="again")
    assert (batches, set(told)) == ([1], {"known"})
    assert again == first.model_copy(update={"model": "again"})
    assert profiled(precision=0.5).microbatches == first.microbatches
    assert sorted(batches) == [1, 2, 4]
    profiled(refresh=True)
    assert sorted(batches) == [1, 2, 4]
    assert "measure" in told


def test_other_weights_of_the_same_scale_are_no_other_model(known):
    """Numbers that are drawn anew, and another process's objects, change nothing."""
    keep, recalled = known
    keep(Net(), rows(0))
    assert recalled(Net(), rows(1)) is not None


CHANGES = {
    "attribute": lambda model: setattr(model, "skip", True),
    "object": lambda model: model.settings.scale.append(2.0),
    "buffer of numbers": lambda model: model.places.add_(1),
    "constant": lambda model: model.gate.data.fill_(0.5),
    "no longer constant": lambda model: model.gate.data.normal_(),
    "scale": lambda model: model.layers[0].weight.data.mul_(100),
    "shape": lambda model: setattr(model.layers, "0", nn.Linear(WIDTH, WIDTH, bias=False)),
    "frozen": lambda model: model.layers[0].requires_grad_(requires_grad=False),
    "tied": lambda model: setattr(model.layers[1], "weight", model.layers[0].weight),
    "hook": lambda model: model.layers[0].register_forward_hook(lambda *_: None),
    "own forward": lambda model: setattr(model, "forward", at_another_time(model)),
    "class": lambda model: setattr(model, "__class__", type("Net", (Net,), {"forward": at_another_time(model)})),
    "lock": lambda model: setattr(model, "lock", threading.Lock()),
    "chance": lambda model: setattr(model, "draw", random.random),
    "generator": lambda model: setattr(model, "generator", torch.Generator()),
    "not a number": lambda model: model.layers[0].weight.data.fill_(float("nan")),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_model_is_captured_anew(name, known):
    """Whatever the forward may see, or what hides what it sees."""
    keep, recalled = known
    keep(Net(), rows(0))
    model = Net()
    CHANGES[name](model)
    assert recalled(model, rows(0)) is None


def test_changed_inputs_are_captured_anew(known):
    """Another shape or dtype, and numbers that are a mask."""
    keep, recalled = known
    keep(Net(), rows(0))
    assert recalled(Net(), rows(0)[:2]) is None
    assert recalled(Net(), (rows(0) > 0).float()) is None


def test_what_functions_refer_to_counts(monkeypatch):
    """Globals, closures and defaults, of functions that the functions of a model call, too."""

    def held(function):
        model = Net()
        model.function = function
        return fingerprint_of(model, ()).digest

    def closed_over(factor):
        return lambda x: scaled(x) * factor

    before = held(closed_over(1))
    assert held(closed_over(1)) == before
    assert held(closed_over(2)) != before
    assert held(functools.partial(operator.mul, 2)) != held(functools.partial(operator.mul, 3))
    assert held(lambda x, factor=2: x * factor) != held(lambda x, factor=3: x * factor)
    monkeypatch.setitem(globals(), "FACTOR", 2.0)
    assert held(closed_over(1)) != before


def test_a_library_that_somebody_has_changed_is_no_library(monkeypatch):
    """A version says nothing of code that was put into it from elsewhere."""
    before = fingerprint_of(Net(), ()).digest
    monkeypatch.setattr(nn.Linear, "forward", lambda module, x: nn.functional.linear(x, module.weight, module.bias) + 1)
    assert fingerprint_of(Net(), ()).digest != before


class Reads(Layers):
    """Has a unit with a path that follows numbers."""

    def __init__(self):
        super().__init__()
        self.layers[1] = _Chooses()

    def forward(self, x):
        """The layers, one after another."""
        return self.layers[1](self.layers[0](x))


class _Chooses(nn.Linear):
    def __init__(self):
        super().__init__(WIDTH, WIDTH)

    def forward(self, x):
        return super().forward(x) if x.sum() > -1e9 else x


class Selects(Reads):
    """Makes a tensor whose shape follows numbers, and hides it again."""

    def __init__(self):
        super().__init__()
        self.layers[1] = _Selects()


class _Selects(_Chooses):
    def forward(self, x):
        return nn.Linear.forward(self, x) + x[x > 0].sum() * 0


@pytest.mark.parametrize("kind", [Reads, Selects])
def test_a_path_that_follows_numbers_is_not_remembered(kind, known):
    """Other numbers of the same scale could take another one."""
    keep, recalled = known
    keep(kind(), rows(0))
    assert recalled(kind(), rows(0)) is None


class Hidden(Layers):
    """Its forward asks something that no digest holds."""

    def forward(self, x):
        """Whatever the clock says."""
        x = self.layers[0](x)
        return self.layers[1](torch.relu(x) if time.time() > 1e9 else x)


def test_what_no_fingerprint_sees_shows_in_the_capture(known, monkeypatch):
    """The capture at the smallest micro-batch is made anew, and compared operator by operator."""
    keep, recalled = known
    keep(Hidden(), rows(0))
    assert recalled(Hidden(), rows(0)) is not None
    monkeypatch.setattr(time, "time", iter([0.0] * 9).__next__)
    assert recalled(Hidden(), rows(0)) is None


def in_package(tmp_path, monkeypatch, limit):
    """A package of the user's, two levels deep, whose inner module holds a number."""
    folder = tmp_path / "apackage" / "inner"
    folder.mkdir(parents=True, exist_ok=True)
    (tmp_path / "apackage" / "__init__.py").write_text("from . import inner\n")
    (folder / "__init__.py").write_text("from . import settings\n")
    (folder / "settings.py").write_text(f"LIMIT = {limit}\n")
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.startswith("apackage")]:
        del sys.modules[name]
    importlib.invalidate_caches()
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    return importlib.import_module("apackage")


@pytest.mark.parametrize("way", ["global", "attribute", "import"])
def test_what_modules_of_the_user_hold_is_looked_at(tmp_path, monkeypatch, way):
    """However deep, and however the forward comes by it."""

    def fingerprint(limit):
        package = in_package(tmp_path, monkeypatch, limit)
        model = nn.Sequential(nn.Linear(2, 2))
        if way == "attribute":
            model.settings = package
        space = {"apackage": package} if way == "global" else {}
        code = "import apackage.inner.settings as s; s.LIMIT" if way == "import" else "apackage.inner.settings.LIMIT"
        exec(f"def act(x):\n    {code}\n    return x\n", space)
        model.act = space["act"]
        return fingerprint_of(model, ()).digest

    assert fingerprint(1) != fingerprint(2)
    assert fingerprint(2) == fingerprint(2)


def test_code_that_reaches_beyond_what_is_seen_is_not_remembered():
    """Such as a global by a name that is made when it runs."""
    model = nn.Sequential(nn.Linear(2, 2))
    model.act = lambda x: x * globals()["FACTOR"]
    assert fingerprint_of(model, ()) is None


def test_an_optimizer_from_elsewhere_is_weighed_anew(monkeypatch, tmp_path):
    """Its name does not tell its state."""
    monkeypatch.setenv("SHARDWRIGHT_CACHE", str(tmp_path))
    model, told = nn.Sequential(nn.Linear(WIDTH, WIDTH)), []
    for _ in range(2):
        told.clear()
        sw.profile(
            model,
            (torch.randn(ROWS, WIDTH),),
            devices=["cpu:0"],
            rounds=1,
            optimizer="torch.optim.adam.Adam",
            progress=lambda *news: told.append(news[0]),
        )
    assert "capture" in told
