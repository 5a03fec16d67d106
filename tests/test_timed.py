"""Parameters that a forward uses outside of units: their gradients arrive, and their update is timed."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import shardwright as sw
from shardwright.profiler.estimates.workload import Mode, Workloads
from shardwright.profiler.measuring.stopwatch import HostStopwatch
from shardwright.profiler.measuring.subject import Subject
from shardwright.profiler.measuring.timed import timed_steps
from shardwright.profiler.recording.unitgraph import Call
from shardwright.profiler.trace import trace
from shardwright.sharder.planning.formulation.blocks import problem_from_graph


class Experts(nn.Module):
    """One parameter of all experts, one that is frozen, one that a unit holds too, and a buffer."""

    def __init__(self, width=4):
        super().__init__()
        self.head = nn.Linear(width, width)
        self.experts = nn.Parameter(torch.randn(3, width, width))
        self.frozen = nn.Parameter(torch.randn(width), requires_grad=False)
        self.register_buffer("shift", torch.randn(width))

    def forward(self, x):
        x = torch.einsum("bi,eij->bj", x, self.experts)
        return self.head(x * self.frozen + self.shift + self.head.bias)


def steps_of(model, *, train=True, accumulate=False):
    capture = trace(model, (torch.randn(2, 4),), train=train)
    return {step.name: step for step in timed_steps(capture, train=train, accumulate=accumulate)}


def lent(model, **how):
    return [step for step in steps_of(model, **how).values() if step.kind == "parameter"]


class Listed(nn.Module):
    """Parameters in containers and in a layer that is never called."""

    def __init__(self):
        super().__init__()
        self.head, self.table = nn.Linear(4, 4), nn.Linear(4, 4, bias=False)
        self.scales = nn.ParameterList([nn.Parameter(torch.randn(4)) for _ in range(2)])
        self.shifts = nn.ParameterDict({"one": nn.Parameter(torch.randn(4))})

    def forward(self, x):
        x = self.head(x * self.scales[0] + self.shifts["one"]) * self.scales[1]
        return nn.functional.linear(x, self.table.weight)


def test_what_no_called_unit_holds_takes_time():
    """A container of parameters is called by nobody, nor is a layer whose weight alone is used."""
    assert {step.unit for step in lent(Listed())} == {"scales.0", "scales.1", "shifts.one", "table.weight"}


def test_only_what_is_trained_and_in_no_unit_takes_time():
    """Buffers and frozen parameters are not updated, and those of units are updated there."""
    assert [step.unit for step in lent(Experts())] == ["experts"]
    assert not lent(Experts(), train=False)
    assert "head" in steps_of(Experts(), train=False)


@pytest.mark.parametrize("accumulate", [False, True])
def test_the_update_is_that_of_the_parameter(accumulate):
    """With one micro-batch the gradient is taken as it comes; with more each is added to those before."""
    model = Experts()
    (step,) = lent(model, accumulate=accumulate)
    before = model.experts.detach().clone()
    optimizer = None if accumulate else "sgd"
    subject = Subject(step.call, torch.device("cpu"), train=True, optimizer=optimizer, accumulate=accumulate)
    stopwatch = HostStopwatch()
    for _ in range(3):
        subject.forward(stopwatch)
        assert (subject.backward(stopwatch) is None) == (not accumulate)
        assert (subject.update(stopwatch) is None) == accumulate
    assert torch.equal(model.experts, before) == accumulate
    assert model.experts.grad is not None


def workload_of_update(parameter):
    """Adam's operators on one parameter of a module that is called."""

    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.parameter = parameter

        def forward(self):
            return self.parameter * 2

    return Workloads().of(Call(Scaled(), (), {}), Mode(train=True, optimizer="adam", foreach=True)).update


def test_its_operators_are_estimated():
    """Adam's on the parameter alone, and for later micro-batches the addition of gradients."""
    (step,) = lent(Experts())
    alone = Workloads().of(step.call, Mode(train=True, optimizer="adam", foreach=True))
    assert not alone.forward
    assert not alone.backward
    assert alone.update == workload_of_update(nn.Parameter(torch.randn(3, 4, 4)))
    (step,) = lent(Experts(), accumulate=True)
    added = Workloads().of(step.call, Mode(train=True, accumulate=True))
    assert [operation.name for operation in added.backward] == ["aten.add_.Tensor"]


def test_a_declared_device_has_the_update(tmp_path):
    """At each number of micro-batches, as a unit's."""
    cluster = tmp_path / "cluster.toml"
    cluster.write_text('[[devices]]\nname = "cuda:0"\nmodel = "H100 SXM"\n')
    with torch.device("meta"):
        model, x = Experts(), torch.randn(2, 4)
    profile = sw.profile(model, (x,), cluster=cluster, microbatches=[2])
    (node,) = (node.name for node in profile.nodes if node.unit == "experts")
    for count in (1, 2):
        assert profile.measurement(node, "cuda:0", count).update_s > 0


def test_a_profile_has_the_update_and_a_plan_counts_it():
    """In the block of the glue that reads the parameter, on each device; forward and backward hardly take any time."""
    model = Experts(width=128)
    profile = sw.profile(model, (torch.randn(4, 128),), devices=["cpu:0"], microbatches=[2], rounds=6)
    (node,) = (node.name for node in profile.nodes if node.unit == "experts")
    own = profile.measurement(node, "cpu:0", 2)
    assert own.update_s > 0
    assert own.backward_s > 0
    problem = problem_from_graph(profile.graph(2))
    assert sum(block.update_s[0] for block in problem.blocks) == pytest.approx(
        sum(m.update_s for m in profile.measurements if m.microbatches == 2)
    )
    assert profile.step_s("cpu:0", 2) == pytest.approx(sum(problem.work_s(v, 0) for v in range(len(problem.blocks))))
