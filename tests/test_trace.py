"""Capture: the straight-line graph of unit calls and glue, and what is noted beside it."""

import gc
import random
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from shardwright.errors import ShardwrightError
from shardwright.profiler.recording.callsites import functions_applied
from shardwright.profiler.trace import trace


def replay(capture, *inputs):
    return capture.module()(*inputs)


@pytest.mark.parametrize("name", ["Net", "NetList", "NetDict"])
def test_a_capture_replays_on_other_values(containers, name):
    """Replaying on a second batch gives the model's own outputs, bit for bit."""
    model = getattr(containers, name)()
    (batch,) = type(model).sample_inputs()
    capture = trace(model, (batch[:2],))
    other = torch.randn_like(batch[:2])
    assert torch.equal(replay(capture, other)[0], model(other))


class Glue(nn.Module):
    """Most of what a forward may do between units."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 4) for _ in range(3)])
        self.scale = nn.Parameter(torch.tensor([2.0, 1.0, 3.0, 1.0]))
        self.register_buffer("offset", torch.ones(4))

    def forward(self, x, *, pairs, flip=False):
        a = self.layers[0](x) * self.scale + self.offset
        first, second = a.chunk(2, dim=-1)
        a = torch.cat([second, first], -1) if not flip else a
        a[:, 0] = 0.5
        a += pairs["left"]
        b = self.layers[1](a.transpose(0, 1).T)
        return {"sum": self.layers[2](b) + self.layers[0](b), "parts": (b.max(dim=-1).values, first)}


def glue_inputs(seed):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(6, 4, generator=generator),), {"pairs": {"left": torch.randn(6, 4, generator=generator)}}


def test_glue_replays():
    """Chunks, in-place writes, keyword dicts, parameters, buffers and nested outputs come out as the model's."""
    model = Glue()
    capture = trace(model, *glue_inputs(0))
    args, kwargs = glue_inputs(1)
    expected = model(*args, **kwargs)
    found = replay(capture, args[0], kwargs["pairs"]["left"])
    for one, other in zip(found, [expected["sum"], *expected["parts"]], strict=True):
        assert torch.equal(one, other)


def test_a_unit_called_twice_is_two_steps_that_stay_together():
    """The second call has a name of its own, and both are colocated."""
    capture = trace(Glue(), *glue_inputs(0))
    names = [step.name for step in capture.steps if step.kind == "unit"]
    assert names == ["layers.0", "layers.1", "layers.2", "layers.0#2"]
    assert ("layers.0", "layers.0#2") in capture.colocate


def test_in_place_changes_stay_with_all_who_saw_the_tensor():
    """A tensor's maker and earlier readers share a device with the operation that changes it."""
    capture = trace(Glue(), *glue_inputs(0))
    writes = [step.name for step in capture.steps if step.type == "__setitem__"]
    assert writes
    assert any(writes[0] in group for group in capture.colocate)


def test_tied_parameters_are_noted_with_their_users():
    """Two units that share a weight need not share a device: their tie is noted."""
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    capture = trace(model, (torch.randn(2, 4),))
    assert capture.ties == [("0.weight", ("0", "2"))]
    assert not capture.colocate


def test_capture_leaves_the_model_as_it_was():
    """Batch statistics, training flags, hooks and the random state are untouched."""
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5)).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    trace(model, (torch.randn(8, 4, generator=torch.Generator().manual_seed(0)),), train=True)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not any(module.training for module in model.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert torch.equal(state, torch.get_rng_state())


def test_saved_bytes_count_each_storage_once():
    """A linear layer keeps its input and a tanh its output; the tensor between them is counted once."""
    capture = trace(nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2)), (torch.randn(16, 4),))
    saved = {step.name: step.saved_bytes for step in capture.steps if step.kind == "unit"}
    assert saved == {"0": 0, "1": 16 * 8 * 4, "2": 0}


def test_nothing_is_saved_in_inference():
    """Without gradients nothing is kept, and outputs need none."""
    capture = trace(nn.Sequential(nn.Linear(4, 8), nn.Tanh()), (torch.randn(16, 4),), train=False)
    assert sum(step.saved_bytes for step in capture.steps) == 0
    assert not any(value.requires_grad for value in capture.values.values())


def test_glue_knows_its_call_site(containers):
    """Glue is shown with the file and line of the call in the user's forward."""
    (batch,) = containers.NetList.sample_inputs()
    capture = trace(containers.NetList(), (batch[:1],))
    (cat,) = [step for step in capture.steps if step.kind == "glue"]
    source = Path(containers.__file__).read_text(encoding="utf-8").splitlines()
    file, line, column = cat.site.split(":")
    assert (file, cat.type) == ("containers.py", "torch.cat")
    assert source[int(line) - 1][int(column) - 1 :].startswith("torch.cat(")


def test_a_failing_forward_names_the_unit():
    """The unit in which the forward failed is named, on one line."""
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(4, 2))
    with pytest.raises(ShardwrightError, match=r"the forward of Sequential failed in unit 1 .*RuntimeError") as caught:
        trace(model, (torch.randn(2, 4),))
    assert "\n" not in str(caught.value)
    assert not any(module._forward_hooks for module in model.modules())


class Choosing(nn.Module):
    """Fails inside the standard library."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 2)

    def forward(self, x):
        return self.layer(x) * random.choice([])  # here


def test_a_failing_forward_names_the_users_line():
    """Not that of a library in which it failed."""
    source = Path(__file__).read_text(encoding="utf-8").splitlines()
    line = next(number for number, text in enumerate(source, 1) if text.endswith("# here"))
    with pytest.raises(ShardwrightError, match=rf"failed on the sample inputs, at test_trace\.py:{line}: IndexError"):
        trace(Choosing(), (torch.randn(2, 4),))


def test_a_model_without_children_cannot_be_split():
    """One module alone is no container."""
    with pytest.raises(ShardwrightError, match="Linear has no child modules"):
        trace(nn.Linear(2, 2), (torch.randn(1, 2),))


def test_a_forward_without_tensors_is_refused():
    """A forward must return a tensor."""

    class Silent(nn.Sequential):
        def forward(self, x):
            self[0](x)
            return "done"

    with pytest.raises(ShardwrightError, match="returns no tensor"):
        trace(Silent(nn.Linear(2, 2)), (torch.randn(1, 2),))


class RandomWiring(nn.Module):
    """Units wired by a list of (unit, operand, operand, operation)."""

    def __init__(self, wiring):
        super().__init__()
        self.units = nn.ModuleList([nn.Linear(3, 3) for _ in range(4)])
        self.wiring = wiring

    def forward(self, x):
        values = [x]
        for unit, left, right, operation in self.wiring:
            a, b = values[left % len(values)], values[right % len(values)]
            joined = {"add": a + b, "mul": a * b, "cat": torch.cat([a, b], 1)[:, 1:4], "left": a}[operation]
            values.append(self.units[unit](joined) if unit < 4 else joined)
        return values[-1], values[len(values) // 2]


wirings = st.lists(
    st.tuples(st.integers(0, 5), st.integers(0, 9), st.integers(0, 9), st.sampled_from(["add", "mul", "cat", "left"])),
    min_size=1,
    max_size=8,
)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(wiring=wirings)
def test_any_wiring_replays(wiring):
    """Whatever the wiring of units and glue, the capture computes what the model computes, on other values too."""
    model = RandomWiring(wiring)
    if not any(unit < 4 for unit, *_ in wiring):
        return
    capture = trace(model, (torch.randn(2, 3),))
    other = torch.randn(2, 3)
    for one, two in zip(replay(capture, other), model(other), strict=True):
        assert torch.equal(one, two)
    names = [step.name for step in capture.steps]
    assert len(set(names)) == len(names)
    for position, step in enumerate(capture.steps):
        for name in step.reads:
            assert names.index(capture.values[name].producer) < position


def test_a_buffer_changed_in_place_is_captured():
    """A counter that the forward advances stays with what reads it; the model's own is put back."""

    class Counts(nn.Sequential):
        def __init__(self):
            super().__init__(nn.Linear(2, 2), nn.Linear(2, 2))
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x):
            self.calls += 1
            return super().forward(x) * self.calls

    model = Counts()
    capture = trace(model, (torch.randn(2, 2),))
    assert model.calls.item() == 0
    assert any("calls" in group for group in capture.colocate)


def test_a_change_through_a_view_stays_with_all_views():
    """Writing into a slice changes the whole: its maker, the write and its readers share a device."""

    class Canvas(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])

        def forward(self, x):
            canvas = torch.zeros(x.shape[0], 8)
            canvas[:, :4].copy_(self.layers[0](x)[:, :4])
            return self.layers[1](canvas)

    groups = trace(Canvas(), (torch.randn(2, 8),)).colocate
    assert any({"zeros", "copy_", "layers.1"} <= set(group) for group in groups)


def test_lazy_parameters_are_refused():
    """A model without shapes has to be run once first."""
    with pytest.raises(ShardwrightError, match="run one forward of the model"):
        trace(nn.Sequential(nn.LazyLinear(2), nn.ReLU()), (torch.randn(2, 3),))


def test_a_capture_lets_go_of_the_model():
    """Nothing that autograd saved keeps the model and its activations alive."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    gone = weakref.ref(model[0])
    trace(model, (torch.randn(2, 4),))
    del model
    gc.collect()
    assert gone() is None


def test_custom_functions_are_as_before_after_captures_in_threads():
    """Captures that overlap leave torch.autograd.Function.apply as it was."""
    before = torch.autograd.Function.__dict__["apply"]
    first, second = functions_applied(lambda *_: None), functions_applied(lambda *_: None)
    with ThreadPoolExecutor(1) as a, ThreadPoolExecutor(1) as b:
        for step in ((a, first.__enter__), (b, second.__enter__)):
            step[0].submit(step[1]).result()
        for step in ((a, first.__exit__), (b, second.__exit__)):
            step[0].submit(step[1], None, None, None).result()
    assert torch.autograd.Function.__dict__["apply"] is before


def test_what_a_forward_leaves_on_the_model_is_taken_away():
    """An attribute that the forward sets is not there after a capture; an expanded buffer does no harm."""

    class Keeps(nn.Sequential):
        def __init__(self):
            super().__init__(nn.Linear(4, 4), nn.Linear(4, 4))
            self.register_buffer("ones", torch.ones(1, 4).expand(4, 4))

        def forward(self, x):
            self.last = super().forward(x) * self.ones[0]
            return self.last

    model = Keeps()
    trace(model, (torch.randn(2, 4),))
    assert not hasattr(model, "last")


def test_chance_that_passes_through_a_unit_is_an_obstacle():
    """A branch on what a unit makes of a random number is named."""

    class Chancy(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([nn.ReLU(), nn.Linear(4, 4)])

        def forward(self, x):
            return self.layers[1](x) if self.layers[0](torch.rand(3)).sum() > -1 else x

    assert "depends on chance" in trace(Chancy(), (torch.randn(2, 4),)).obstacles[0]


def test_a_model_without_a_mode_to_train_in_is_refused():
    """As what torch.export gives: the error says what to profile instead."""
    exported = torch.export.export(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), (torch.randn(2, 4),)).module()
    with pytest.raises(ShardwrightError, match=r"cannot be put into training .* profile the model"):
        trace(exported, (torch.randn(2, 4),))
