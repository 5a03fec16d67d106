"""Units: which modules are placed whole, how much work they do, and what tells two models apart."""

import copy
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from shardwright.errors import ShardwrightError
from shardwright.profiler.trace import checked_trace, trace
from shardwright.profiler.units import choose_units, find_units, module_work, structure_digest

WIDTH = 8


@pytest.fixture(autouse=True)
def repeatable():
    """Weights are the same in every run."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def linears(count, width=WIDTH):
    return nn.Sequential(*(nn.Linear(width, width) for _ in range(count)))


def rows(count=4, width=WIDTH):
    return (torch.randn(count, width),)


class Block(nn.Module):
    """A residual block: children of its own, which no container holds."""

    def __init__(self, width=WIDTH):
        super().__init__()
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        return x + self.down(self.up(x).relu())


class Model(nn.Module):
    """A stem, a body of the test's choice and a head."""

    def __init__(self, body, width=WIDTH):
        super().__init__()
        self.stem, self.body, self.head = nn.Linear(width, width), body, nn.Linear(width, width)

    def forward(self, x):
        return self.head(self.body(self.stem(x)))


# By structure


def test_units_are_the_containers_children(containers):
    """The children of a ModuleDict are units, whatever they are made of inside."""
    units = find_units(containers.NetDict())
    assert list(units)[:2] == ["net1.block11", "net1.downsample11"]
    assert len(units) == 15


def test_modules_outside_containers_are_units_too():
    """A stem and a head beside the containers are placed whole; nested containers are opened."""
    body = nn.ModuleDict({"a": nn.ModuleList([nn.Linear(4, 4)]), "b": nn.Sequential(nn.ReLU(), nn.Tanh())})
    assert list(find_units(Model(body))) == ["stem", "body.a.0", "body.b.0", "body.b.1", "head"]


def test_a_module_with_two_names_is_one_unit():
    """A module that is reached by several paths is a unit under the first."""
    shared = nn.Linear(WIDTH, WIDTH)
    assert list(find_units(nn.Sequential(shared, nn.ReLU(), shared))) == ["0", "1"]


def test_a_module_without_children_is_the_only_unit():
    """A leaf has nothing to split: it is its own unit, under the empty path."""
    linear = nn.Linear(1, 1)
    assert find_units(linear) == choose_units(linear, rows(width=1)) == {"": linear}


# By work


def test_a_sequential_of_sequentials_is_opened():
    """Containers with enough work in them are opened all the way down."""
    units = choose_units(nn.Sequential(linears(2), nn.Sequential(linears(2), nn.Linear(WIDTH, WIDTH))), rows())
    assert list(units) == ["0.0", "0.1", "1.0.0", "1.0.1", "1.1"]


def test_a_child_that_holds_most_of_the_work_is_opened():
    """A block that is too large for an even split is opened; one of many equal blocks is not."""
    assert list(choose_units(Model(Block(256), 256), rows(width=256))) == ["stem", "body.up", "body.down", "head"]
    blocks = nn.Sequential(*(Block() for _ in range(16)))
    assert list(choose_units(blocks, rows())) == [str(index) for index in range(16)]


def test_more_devices_need_finer_units():
    """What is small enough for two devices may be too large for eight."""
    blocks = nn.Sequential(*(Block(64) for _ in range(12)))
    counts = [len(choose_units(blocks, rows(width=64), devices=devices)) for devices in (2, 8)]
    assert counts == [12, 24]


def test_a_thousand_tiny_layers_stay_together():
    """A container that does next to nothing is one unit, however much it holds."""
    tiny = nn.Sequential(*(nn.Identity() for _ in range(1000)), nn.Linear(1, 1))

    class Large(nn.Module):
        def __init__(self):
            super().__init__()
            self.large, self.tiny = nn.Sequential(nn.Linear(512, 512), nn.Linear(512, 512)), tiny

        def forward(self, x):
            return self.large(x) + self.tiny(x[:, :1])

    assert list(choose_units(Large(), rows(64, 512))) == ["large.0", "large.1", "tiny"]


@pytest.mark.parametrize(
    "whole",
    [
        nn.MultiheadAttention(WIDTH, 2, batch_first=True),
        nn.LSTM(WIDTH, WIDTH, 4),
        nn.GRUCell(WIDTH, WIDTH),
        nn.Linear(WIDTH, WIDTH),
    ],
    ids=lambda module: type(module).__name__,
)
def test_what_computes_with_its_own_parameters_is_never_opened(whole):
    """Attention, recurrent layers and leaf modules are units, however much they do and however deep is asked for."""

    class Runs(nn.Module):
        def __init__(self):
            super().__init__()
            self.whole, self.small = whole, nn.Tanh()

        def forward(self, x):
            result = self.whole(x, x, x) if isinstance(self.whole, nn.MultiheadAttention) else self.whole(x)
            return self.small(result[0] if isinstance(result, tuple) else result)

    assert list(choose_units(Runs(), rows(), devices=64)) == ["whole", "small"]
    assert list(choose_units(Runs(), rows(), depth=5)) == ["whole", "small"]


def test_containers_that_are_never_called_are_opened():
    """Nothing is known of a list's work, as it is not called: its children are units, called or not."""

    class Lists(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(WIDTH, WIDTH), nn.ModuleList([Block()]), linears(2)])

        def forward(self, x):
            return self.layers[0](x)

    assert list(choose_units(Lists(), rows())) == ["layers.0", "layers.1.0", "layers.2.0", "layers.2.1"]


def test_compiled_code_is_never_opened():
    """What is inside a scripted module is not called as Python, so it stays whole."""
    with warnings.catch_warnings(action="ignore"):
        model = Model(torch.jit.script(Block(64)), 64)
    units = choose_units(model, rows(width=64))
    assert list(units) == ["stem", "body", "head"]
    capture = checked_trace(model, rows(width=64), units=units)
    assert [step.name for step in capture.steps if step.kind == "unit"] == ["stem", "body", "head"]


def test_chosen_units_can_be_captured():
    """Whatever the grain, the units are steps of a capture, and every parameter is in one of them."""
    model = Model(nn.Sequential(Block(32), Block(32), nn.Identity()), 32)
    for devices in (1, 2, 16):
        units = choose_units(model, rows(width=32), devices=devices)
        steps = {step.unit for step in trace(model, rows(width=32), units=units).steps if step.kind == "unit"}
        assert steps == set(units)
        held = {id(parameter) for unit in units.values() for parameter in unit.parameters()}
        assert held == {id(parameter) for parameter in model.parameters()}


# As asked


def test_units_by_depth():
    """Depth 1 are the model's children, depth 2 theirs; a leaf on the way is a unit, and lists are always opened."""
    model = Model(nn.Sequential(Block(), linears(2)))
    model.extra = nn.ModuleList([Block()])
    assert list(choose_units(model, depth=1)) == ["stem", "body", "head", "extra.0"]
    assert list(choose_units(model, depth=2)) == ["stem", "body.0", "body.1", "head", "extra.0"]
    assert list(choose_units(model, depth=3)) == [
        *("stem", "body.0.up", "body.0.down", "body.1.0", "body.1.1", "head", "extra.0.up", "extra.0.down")
    ]


def test_patterns_override_the_work():
    """What a pattern names is a unit, whatever it holds, and what leads to it is opened."""
    model = Model(nn.Sequential(Block(256), Block(256), linears(2, 256)), 256)
    assert "body.0" not in choose_units(model, rows(width=256), devices=8)
    units = choose_units(model, rows(width=256), devices=8, patterns=["body.?"])
    assert list(units) == ["stem", "body.0", "body.1", "body.2", "head"]
    assert list(choose_units(model, rows(width=256), patterns=["body"])) == ["stem", "body", "head"]
    fine = choose_units(model, rows(width=256), devices=1, patterns=["body.2.1", "*.up"])
    assert {"body.2.0", "body.2.1", "body.0.up", "body.0.down", "body.1.up"} <= set(fine)


def test_patterns_go_with_a_depth():
    """A pattern below the depth opens what leads to it, and only that."""
    model = Model(nn.Sequential(Block(), Block()))
    units = choose_units(model, depth=1, patterns=["body.1.up"])
    assert list(units) == ["stem", "body.0", "body.1.up", "body.1.down", "head"]


@pytest.mark.parametrize("pattern", ["bdy.*", "body.9", "", "Linear"])
def test_an_unknown_pattern_is_an_error(pattern):
    """A pattern that matches no module is refused by name, before anything runs."""
    with pytest.raises(ShardwrightError, match=r"--unit .*: no module of Model matches") as caught:
        choose_units(Model(linears(2)), ("no inputs",), patterns=["stem", pattern])
    assert f"--unit {pattern}:" in str(caught.value)


@pytest.mark.parametrize("make", [lambda: nn.MultiheadAttention(WIDTH, 2), lambda: nn.GRUCell(WIDTH, WIDTH)])
def test_a_pattern_inside_a_whole_module_is_an_error(make):
    """A pattern that names only what is inside a module that is never opened cannot be obeyed, and says so."""
    attention = make()
    attention.inner = nn.Linear(WIDTH, WIDTH)
    with pytest.raises(ShardwrightError, match=r"--unit body.inner: body \(\w+\) is never opened"):
        choose_units(Model(attention), depth=1, patterns=["body.inner"])


# Work

trees = st.recursive(st.integers(1, 6), lambda inner: st.lists(inner, min_size=1, max_size=3), max_leaves=8).filter(
    lambda tree: isinstance(tree, list)
)


def grown(tree):
    """Sequentials of Sequentials; a number is a bottleneck of that width."""
    if isinstance(tree, int):
        return nn.Sequential(nn.Linear(4, tree), nn.Tanh(), nn.Linear(tree, 4))
    return nn.Sequential(*map(grown, tree))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(tree=trees)
def test_work_adds_up(tree):
    """A Sequential does what its children do, no more, and the empty path is the whole model."""
    model = grown(tree)
    work = module_work(model, rows(width=4), {})
    assert set(work) == {path for path, _ in model.named_modules()}
    for path, module in model.named_modules():
        children = [work[f"{path}.{name}".removeprefix(".")] for name, _ in module.named_children()]
        assert not children or work[path] == pytest.approx(sum(children))
    leaves = [work[path] for path, module in model.named_modules() if isinstance(module, (nn.Linear, nn.Tanh))]
    assert work[""] == pytest.approx(sum(leaves))


def test_a_parent_does_more_than_its_children():
    """Glue is the parent's own work, and what is inside a child counts for all around it."""
    work = module_work(Model(nn.Sequential(Block())), rows(), {})
    assert work["body.0"] > work["body.0.up"] + work["body.0.down"]
    assert work["body"] == work["body.0"]
    assert work[""] == pytest.approx(work["stem"] + work["body"] + work["head"])


def test_work_is_arithmetic_and_bytes():
    """A linear layer moves its input, weight, bias and output and multiplies; a view does nothing."""

    class Views(nn.Module):
        def forward(self, x):
            return x.view(-1).view_as(x).transpose(0, 1).T

    work = module_work(nn.Sequential(nn.Linear(8, 16), Views()), rows(4, 8), {})
    moved = 4 * (4 * 8 + 8 * 16 + 16 + 4 * 16)
    assert work["0"] == moved + 2 * 4 * 8 * 16 / 10
    assert work["1"] == 0


def test_work_is_the_same_every_time_and_for_all_weights():
    """It is counted, not timed: two runs agree exactly, and so do other weights and other numbers in the input."""
    model = Model(nn.Sequential(Block(), nn.Sequential(nn.BatchNorm1d(WIDTH), nn.GELU()))).eval()
    first = module_work(model, rows(), {})
    assert module_work(model, rows(), {}) == first
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    assert module_work(model, (torch.zeros(4, WIDTH),), {}) == first
    assert module_work(model, rows(8), {})[""] > first[""]


def test_work_of_what_is_called_again():
    """A module that is called twice does twice the work; one that is never called has none, not even zero."""

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(linears(3))

        def forward(self, x):
            return self.layers[1](self.layers[0](self.layers[0](x)))

    work = module_work(Twice(), rows(), {})
    assert work["layers.0"] == 2 * work["layers.1"]
    assert "layers.2" not in work
    assert "layers" not in work


def test_work_is_counted_without_a_trace():
    """No hook stays and no gradient is kept, even where the forward fails."""
    model = Model(linears(2))
    module_work(model, rows(), {})
    with pytest.raises(RuntimeError):
        module_work(model, rows(width=3), {})
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


# The digest

CHANGES = {
    "a renamed module": lambda m: setattr(m, "tail", m._modules.pop("head")),
    "another shape": lambda m: setattr(m, "head", nn.Linear(WIDTH, WIDTH + 1)),
    "another class": lambda m: m.body.__setitem__(1, nn.ReLU()),
    "another dtype": lambda m: m.stem.double(),
    "a buffer": lambda m: m.register_buffer("mask", torch.ones(1)),
    "a parameter less": lambda m: m.head.register_parameter("bias", None),
    "another order": lambda m: m._modules.update(stem=m._modules.pop("stem")),
}


def digest_model():
    return Model(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()))


@pytest.mark.parametrize("change", list(CHANGES))
def test_the_digest_tells_structures_apart(change):
    """What changes a module's name or class, or a tensor's name, shape or dtype, changes the digest."""
    model = digest_model()
    before = structure_digest(model)
    CHANGES[change](model)
    assert structure_digest(model) != before


def test_the_digest_is_blind_to_weights():
    """Other weights, a copy, a saved state, another mode, frozen parameters and caches leave the digest alone."""
    model = digest_model()
    before = structure_digest(model)
    other = copy.deepcopy(model).eval().requires_grad_(False)
    for parameter in other.parameters():
        parameter.zero_()
    assert structure_digest(other) == before
    other.load_state_dict(model.state_dict())
    other.register_buffer("cache", torch.ones(3), persistent=False)
    other(*rows())
    assert structure_digest(other) == structure_digest(digest_model()) == before
    assert len(before) == 16
