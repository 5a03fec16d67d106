"""The splits that one would make without a planner, run beside the plan."""

import itertools
import os
import signal
import weakref
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import shardwright as sw
from shardwright.profiler.workers import worker
from shardwright.profiler.workers.pool import WorkerError
from shardwright.sharder.runtime import run as run_module
from shardwright.sharder.runtime.gates import gate
from shardwright.sharder.runtime.naive import NAIVE_LIMIT_S, as_plan, naive_plans
from shardwright.sharder.runtime.pipeline import Job, hold_whole, step_whole
from shardwright.sharder.runtime.run import _lacks_room
from shardwright.sharder.runtime.session import Session, Split

REVERSED = {"layers.0": "cpu:1", "layers.5": "cpu:0"}
"""Pins, of which the naive splits take no notice."""


class Tied(nn.Module):
    """Layers of which the last is the largest, with a weight that the first and the last use."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(6, 6, bias=False) for _ in range(5)])
        self.layers.append(nn.Linear(6, 200, bias=False))
        self.head = nn.Linear(6, 6, bias=False)
        self.head.weight = self.layers[0].weight

    def forward(self, x):
        for layer in self.layers[:5]:
            x = x + layer(x)
        return self.layers[5](x), self.head(x)


def planned(captured_profile, model=None, **options):
    """A plan over two devices in the other order, in four micro-batches."""
    profile = captured_profile(model or Tied(), (torch.randn(8, 6),), microbatches=(1, 4), **options)
    return sw.plan(profile, microbatches=4, pins=REVERSED)


def test_naive_splits_are_run_beside_the_plan(captured_profile):
    """Their devices are in another order, each has its ties and its own number of micro-batches; all pass the gate."""
    model = Tied()
    plan = planned(captured_profile, model)
    assert plan.devices == ("cpu:1", "cpu:0")
    count, parameters, parallel, *_ = plan.alternatives
    fewer = parameters.model_copy(update={"microbatches": 2})
    run = sw.run(
        model, plan.model_copy(update={"alternatives": (count, fewer, parallel)}), (torch.randn(8, 6),), steps=2
    )
    assert run.equality.gradients <= 1e-5
    assert [naive.name for naive in run.naive] == ["equal count", "by parameters"]
    for naive, alternative in zip(run.naive, (count, fewer), strict=True):
        assert (naive.why, naive.steps) == ("", 2)
        assert naive.devices == ("cpu:0", "cpu:1")
        assert naive.microbatches == alternative.microbatches
        assert naive.timed.predicted_s == alternative.step_s
        assert run.gain_over(naive) == naive.timed.measured_s / run.sharded.measured_s
        assert run.predicted_gain_over(naive) == alternative.step_s / plan.predicted.step_s


def test_naive_splits_are_run_beside_interleaved_stages(captured_profile):
    """Of the plan each device has two stages, in the other order of devices; of a naive split one."""
    model = Tied()
    profile = captured_profile(model, (torch.randn(8, 6),), microbatches=(1, 4))
    plan = sw.plan(profile, microbatches=4, schedule="interleaved", pins={"layers.2": "cpu:1", "layers.3": "cpu:0"})
    assert len(plan.stages) == 4
    run = sw.run(model, plan, (torch.randn(8, 6),), steps=1)
    assert run.equality.gradients <= 1e-5
    assert [weighed.device for weighed in run.memory] == list(plan.devices)
    assert any(naive.timed for naive in run.naive)
    assert all(naive.timed or "the plan's own" in naive.why or "the split of" in naive.why for naive in run.naive)


def test_a_naive_split_is_a_whole_plan(captured_profile):
    """Every node has the stage that the alternative says, stages follow each other, and its ties are split."""
    plan = planned(captured_profile)
    for alternative in plan.alternatives[:2]:
        made = as_plan(plan, alternative)
        stage_of = {node.node: node.stage for node in made.nodes}
        assert {n for stage in alternative.stages for n in stage.nodes} == set(stage_of)
        assert all(stage_of[read] <= node.stage for node in made.nodes for read in node.inputs if read in stage_of)
        assert made.placement() == {unit: stage.device for stage in made.stages for unit in stage.units}
        assert [tie.stages for tie in made.ties] == [(0, 1)]
        assert made.predicted.step_s == alternative.step_s


def test_what_is_the_plans_own_is_not_run_again(captured_profile):
    """Of a chain of equal layers the equal splits are the plan, and of two that are the same one is run."""
    model, x = nn.Sequential(*[nn.Linear(6, 6) for _ in range(6)]), torch.randn(8, 6)
    profile = captured_profile(model, (x,), microbatches=(1, 4))
    found, refused = naive_plans(sw.plan(profile, microbatches=4))
    assert not found
    assert [naive.why for naive in refused] == ["it is the plan's own split"] * 2
    found, refused = naive_plans(sw.plan(profile, microbatches=4, pins={"0": "cpu:1", "5": "cpu:0"}))
    assert list(found) == ["equal count"]
    assert [(naive.name, naive.why) for naive in refused] == [("by parameters", "it is the split of equal count")]


def test_what_cannot_be_measured_says_why(captured_profile):
    """A step that would take too long; a split that is not possible; a plan of before the stages were kept."""
    plan = planned(captured_profile)
    count, parameters, *_ = plan.alternatives
    long = count.model_copy(update={"step_s": NAIVE_LIMIT_S / 3})
    without = parameters.model_copy(update={"step_s": None, "why": "none fits", "stages": ()})
    found, refused = naive_plans(plan.model_copy(update={"alternatives": (long, without)}))
    assert not found
    assert {naive.name: naive.why for naive in refused} == {
        "equal count": "a step is predicted to take 20 s, and measuring it may take 60 s",
        "by parameters": "none fits",
    }
    older = count.model_copy(update={"stages": ()})
    _, refused = naive_plans(plan.model_copy(update={"alternatives": (older,)}))
    assert "plan again" in refused[0].why


def test_a_split_that_does_not_fit_beside_the_others_is_left_out(captured_profile):
    """CPU workers share the memory of the host; both numbers are named."""
    plan = planned(captured_profile)
    split = Split("equal count", as_plan(plan, plan.alternatives[0]), (), ())
    sizes = [stage.memory_bytes for stage in split.plan.stages]
    assert _lacks_room(split, dict.fromkeys(plan.devices, sum(sizes))) == ""
    why = _lacks_room(split, dict.fromkeys(plan.devices, sum(sizes) - 1))
    assert why.startswith(f"it needs {sum(sizes):,} bytes on cpu:0 beside the plan")
    assert why.endswith(f"{sum(sizes) - 1:,} are free")


class Touchy(nn.Module):
    """In other processes it minds micro-batches of a size."""

    def __init__(self, size, kind):
        super().__init__()
        self.linear = nn.Linear(6, 6)
        self.size, self.kind, self.home = size, kind, os.getpid()

    def forward(self, x):
        if os.getpid() != self.home and x.shape[0] == self.size:
            if self.kind == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            raise RuntimeError("not that size")
        return self.linear(x)


def touchy_plan(captured_profile, kind):
    """A model that minds micro-batches of 4 samples, a plan with others, two splits, the first with them."""
    model = nn.Sequential(*[nn.Linear(6, 6) for _ in range(5)], Touchy(4, kind))
    profile = captured_profile(model, (torch.randn(8, 6),), microbatches=(1, 4))
    plan = sw.plan(profile, microbatches=4, pins={"0": "cpu:1", "5": "cpu:0"})
    count = plan.alternatives[0]
    mine, other = count.model_copy(update={"microbatches": 2}), count.model_copy(update={"name": "by parameters"})
    return model, plan.model_copy(update={"alternatives": (mine, other)})


def told(monkeypatch):
    """What the workers of pipelines are told from now on, in order: (function, split)."""
    calls, ask = [], Session._all

    def noted(self, split, function, *args, **options):
        calls.append((function.__name__, split.name))
        return ask(self, split, function, *args, **options)

    monkeypatch.setattr(Session, "_all", noted)
    return calls


def test_a_split_that_raises_does_not_keep_the_plan_from_being_run(captured_profile, monkeypatch):
    """It is left out with its own error. What was known of the plan is not found out again by the new workers."""
    model, plan = touchy_plan(captured_profile, "raise")
    calls = told(monkeypatch)
    run = sw.run(model, plan, (torch.randn(8, 6),), steps=1)
    assert [calls.count((what, "plan")) for what in ("check_stage", "weigh_stage")] == [1, 1]
    assert calls.count(("check_stage", "by parameters")) == 1
    assert run.sharded.measured_s > 0
    assert run.naive[0].timed is None
    assert "RuntimeError: " in run.naive[0].why
    assert "not that size" in run.naive[0].why
    assert run.naive[1].timed is not None


def test_a_split_that_is_refused_is_not_held(captured_profile, monkeypatch):
    """One that gives other gradients is let go of before anything is timed, and the reason is the gate's, whole."""
    calls = told(monkeypatch)
    monkeypatch.setattr(gate, "compare", other_than(gate.compare, at=1))
    plan = planned(captured_profile)
    run = sw.run(Tied(), plan, (torch.randn(8, 6),), steps=1)
    refused, timed = run.naive
    assert refused.why == "output 0 differs"
    assert timed.timed is not None
    assert calls.count(("release_stages", refused.name)) == 1
    assert max(i for i, call in enumerate(calls) if call[1] == refused.name) < calls.index(("note_stage", "plan"))
    monkeypatch.setattr(gate, "compare", other_than(gate.compare, at=0))
    with pytest.raises(
        sw.ShardwrightError, match=r"^output 0 differs; in further .*nothing differs: .*; nothing was t"
    ):
        sw.run(Tied(), plan, (torch.randn(8, 6),), steps=1)


def nothing(*_):
    """Of a session that does what it is told and finds nothing."""


def test_a_split_for_whose_comparison_there_is_no_room_is_left_out(captured_profile):
    """Beside the plan, which was compared before it was held, there may be none; a worker's error is another."""
    plan = planned(captured_profile)
    split = Split("equal count", as_plan(plan, plan.alternatives[0]), (), ())
    released = []
    session = SimpleNamespace(hold=nothing, check=lambda _: [], step=nothing, release=released.append)
    session.room = lambda: dict.fromkeys(plan.devices, 1 << 40)
    for error in (sw.ShardwrightError("nothing has room"), WorkerError("cpu:0", "died")):

        def compared(*_, error=error):
            raise error

        kept = run_module._Kept()
        dies = isinstance(error, WorkerError)
        with pytest.raises(WorkerError) if dies else nullcontext():
            run_module._admit(session, SimpleNamespace(compared=compared), split, kept)
        assert kept.refused == ({} if dies else {"equal count": "nothing has room"})
        assert released == [split]


def test_a_model_without_room_alone_is_not_run_anew_with_new_workers(captured_profile):
    """What the plan was compared with on the host is not needed again when a split has failed."""
    plan = planned(captured_profile)
    session = SimpleNamespace(hold=nothing, step=nothing, weigh=lambda _: [1, 1])
    session.room = lambda: dict.fromkeys(plan.devices, 10)
    known = run_module.Equality(outputs=0.0, gradients=0.0, tolerance=1e-5, tensors=1)
    found = gate.Gate(session, plan, "cpu:0", stays=True)
    assert run_module._pass(session, found, Split("plan", plan, (), ()), run_module._Kept(equality=known)) == known
    assert (found.device, found.stays, found.references) == (None, False, {})


def other_than(compare, at):
    """The gate's comparison, of which the one numbered ``at`` finds a difference."""
    numbers = itertools.count()

    def compared(*args, **options):
        if next(numbers) == at:
            raise gate.DifferenceError("output 0 differs")
        return compare(*args, **options)

    return compared


def test_what_is_let_go_of_is_free_at_once(monkeypatch):
    """The model, not only the name that it is held under: another may need its memory."""
    monkeypatch.setitem(worker.resident, "device", torch.device("cpu"))
    model = nn.Linear(2, 2)
    seen = weakref.ref(model)
    job = Job("", 1, 1, 2, True, "adam", (0,))
    hold_whole(job, model, (torch.randn(2, 2),), {})
    step_whole()
    del model
    hold_whole(job, nn.Linear(2, 2), (torch.randn(2, 2),), {})
    assert seen() is None
    del worker.resident["whole"]


def test_a_worker_that_dies_in_a_naive_split_ends_the_run(captured_profile, monkeypatch):
    """The error names the worker, the split, and how to do without."""
    monkeypatch.setattr(run_module, "STEP_LIMIT_S", 8.0)
    model, plan = touchy_plan(captured_profile, "kill")
    with pytest.raises(sw.ShardwrightError, match=r"worker cpu:\d was killed .*split equal count, which --no-naive"):
        sw.run(model, plan, (torch.randn(8, 6),), steps=1)
    run = sw.run(model, plan, (torch.randn(8, 6),), steps=1, naive=False)
    assert run.naive == ()
