"""Cutting: stages that read only what their neighbour sends compute what the model computes."""

import cloudpickle
import pytest
import torch
from torch import nn

import shardwright as sw
from shardwright.errors import ShardwrightError
from shardwright.profiler.recording.shapes import shapes_only
from shardwright.profiler.trace import trace
from shardwright.sharder.runtime.piping.cut import cut
from shardwright.sharder.runtime.piping.stages import Recipe
from shardwright.sharder.runtime.placing.sim import Simulated, on_host, parameters_may_move, sim_device
from shardwright.sharder.runtime.run import _Captures


class Skips(nn.Module):
    """Skips over several stages, an integer tensor and a parameter outside units."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(6, 6) for _ in range(8)])
        self.gain = nn.Parameter(torch.rand(6))

    def forward(self, x, index):
        kept = []
        for layer in self.layers[:4]:
            x = layer(x).relu()
            kept.append(x)
        for layer in self.layers[4:]:
            x = layer(x + kept.pop())
        rows = torch.gather(x * self.gain, 1, index)
        return x.T, rows


def through(programs, inputs):
    values = inputs
    for program in programs:
        assert len(values) == len(program.inputs)
        for value, shape in zip(values, program.inputs, strict=True):
            assert (tuple(value.shape), value.dtype) == (shape.shape, shape.dtype)
        values = program.module()(*values)
    return values


@pytest.mark.parametrize("stages", [1, 2, 3, 4])
def test_stages_in_a_row_are_the_model(captured_profile, stages):
    """Skips are relayed; outputs and every gradient are the model's."""
    model = Skips()
    x, index = torch.randn(4, 6), torch.randint(0, 6, (4, 2))
    devices = [f"cpu:{i}" for i in range(stages)]
    plan = sw.plan(captured_profile(model, (x, index), devices=devices), microbatches=4)
    assert len(plan.stages) == stages
    capture = trace(model, (x, index))
    programs = cloudpickle.loads(cloudpickle.dumps(cut(capture, plan)))
    other = torch.randn(4, 6)
    expected, found = model(other, index), through(programs, (other, index))
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    names = [name for program in programs for name, _ in program.module().named_parameters()]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())


def test_a_stage_sends_only_what_is_needed_later(captured_profile):
    """What nobody behind the cut reads does not cross it."""
    model = nn.Sequential(*[nn.Linear(4, 4) for _ in range(6)])
    x = torch.randn(4, 4)
    plan = sw.plan(captured_profile(model, (x,), devices=("cpu:0", "cpu:1", "cpu:2")), microbatches=4)
    programs = cut(trace(model, (x,)), plan)
    assert [len(program.outputs) for program in programs] == [1, 1, 1]


def test_a_strided_tensor_is_sent_dense(captured_profile):
    """A transposed activation is made dense before it crosses, and the shapes given to the engine say so."""

    class Transposed(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(4, 4), nn.Linear(3, 3)])

        def forward(self, x):
            return self.layers[1](self.layers[0](x).transpose(1, 2))

    model, x = Transposed(), torch.randn(4, 3, 4)
    plan = sw.plan(captured_profile(model, (x,)), microbatches=4)
    first, second = cut(trace(model, (x,)), plan)
    assert all(value.is_contiguous() for value in first.module()(x))
    assert torch.equal(through([first, second], (x,))[0], model(x))


class Named(nn.Module):
    """Lengths that have to be on the CPU, in every way to say it, and tensors that are to be beside others."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    @property
    def device(self):
        return next(self.parameters()).device

    def forward(self, x):
        x = self.layer(x)
        cpu = torch.device("cpu")
        meant = [x.to(cpu), x.to(device=torch.device("cpu", 0), dtype=torch.float64), x.to("cpu"), x.cpu()]
        beside = [
            (x + 1).to(x.device),
            x.to(device=self.device),
            x.to(torch.device(x.device)),
            torch.arange(4, device=x.device) + x,
            torch.zeros(4, device=cpu) + x,
        ]
        return meant, beside


@pytest.mark.parametrize("on_shapes", [False, True])
def test_a_cpu_that_is_meant_stays_the_cpu(captured_profile, on_shapes):
    """A stage on another device moves there what the forward moves there; what its tensors told is its own device."""
    model, x = Named(), torch.randn(4, 4)
    plan = sw.plan(captured_profile(model, (x,)), microbatches=1)
    if on_shapes:
        with shapes_only(model, (x,), {}) as (args, kwargs):
            capture = trace(model, args, kwargs)
        (program,) = cut(capture, plan)
        program = program.calling({"layer": model.layer})
    else:
        (program,) = cut(trace(model, (x,)), plan)
    expected = [t for made in model(x) for t in made]
    with Simulated(), parameters_may_move(), torch.no_grad():
        device = sim_device(0)
        found = program.module(device).to(device)(x.to(device))
        assert [t.device.type for t in found] == ["cpu"] * 4 + ["sim"] * 5
        assert all(torch.equal(on_host(a), b) for a, b in zip(found, expected, strict=True))


class Repeated(nn.Module):
    """A layer called so many times."""

    def __init__(self, times):
        super().__init__()
        self.times = times
        self.first, self.layer = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        x = self.first(x)
        for _ in range(self.times):
            x = self.layer(x)
        return x


def test_a_run_refuses_a_forward_with_fewer_calls_than_were_planned(captured_profile):
    """A loop that got shorter changes no module; with the calls that were planned it is cut."""
    args = (torch.randn(4, 4),)
    plan = sw.plan(captured_profile(Repeated(5), args), microbatches=2)
    assert _Captures(Repeated(5), args, {}).split("plan", plan).plan == plan
    with pytest.raises(ShardwrightError, match=r"the plan has layer#4, which .* no longer calls \(2 such of 6 calls\)"):
        _Captures(Repeated(3), args, {}).split("plan", plan)


def test_so_does_a_pipeline_of_a_training(captured_profile):
    """``sw.pipeline`` looks at the forward in the plan's mode; in evaluation it may do less."""
    args = (torch.randn(4, 4),)
    plan = sw.plan(captured_profile(Repeated(5), args), microbatches=2)
    cpu = torch.device("cpu")
    with pytest.raises(ShardwrightError, match=r"the plan has layer#4, which .* no longer calls"):
        Recipe(Repeated(3), plan, 0, cpu, args, {})
    model = Repeated(5)
    model.register_forward_pre_hook(lambda module, _: setattr(module, "times", 5 if module.training else 3))
    assert not Recipe(model, plan, 0, cpu, args, {}).why_not


def test_a_capture_with_other_steps_is_refused(captured_profile):
    """A forward that has changed since it was planned is named by its first new step."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    plan = sw.plan(captured_profile(model, (torch.randn(4, 4),)), microbatches=2)
    model.append(nn.Linear(4, 4))
    with pytest.raises(ShardwrightError, match="a step 2 that the plan does not know"):
        cut(trace(model, (torch.randn(4, 4),)), plan)
