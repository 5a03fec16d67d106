"""Measurement with a clock of our own, so that what is timed can be stated exactly."""

import itertools

import pytest
import torch
from torch import nn

from shardwright.profiler.measure import (
    Blank,
    Goal,
    HostStopwatch,
    Subject,
    blank,
    measure,
)
from shardwright.profiler.timing import LEAST_REPEATS
from shardwright.profiler.unitgraph import Call

CPU = torch.device("cpu")


class Clock:
    """A clock that advances only when it is told to."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


class Takes(nn.Module):
    """A unit whose forward and backward advance the clock by stated seconds; an iterator gives those of each call."""

    def __init__(self, clock, forward_s, backward_s):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))
        self.clock, self.forward_s, self.backward_s = clock, forward_s, backward_s

    def forward(self, x):
        self.clock.now += self.forward_s if isinstance(self.forward_s, float) else next(self.forward_s)
        y = x * self.weight
        if y.requires_grad:
            y.register_hook(self.advance)
        return y

    def advance(self, _grad):
        self.clock.now += self.backward_s


def subject(unit, *args, train=True, optimizer="adam", accumulate=False):
    return Subject(Call(unit, args, {}), CPU, train=train, optimizer=optimizer, accumulate=accumulate)


def timed(subjects, clock, **goal):
    """The series of each subject, under the clock's time."""
    settled = {}
    measure(subjects, HostStopwatch(clock), Goal(**goal), on_settled=settled.__setitem__, clock=clock)
    return settled


def test_forward_and_backward_are_timed_apart():
    """Each repeat gives the unit's own forward and backward, and what is computed anew; the first call is apart."""
    clock = Clock()
    rounds = []
    x = torch.ones(3, requires_grad=True)
    subjects = {"a": subject(Takes(clock, 2.0, 5.0), x), "b": subject(Takes(clock, 1.0, 3.0), x)}
    settled = {}
    goal = Goal(repeats=3)
    totals = measure(subjects, HostStopwatch(clock), goal, on_settled=settled.__setitem__, on_round=rounds.append)
    assert settled["a"].forward_s == [2.0] * 3
    assert settled["a"].backward_s == [5.0] * 3
    assert settled["a"].recompute_s == [2.0] * 3
    assert settled["a"].first_call_s == 7.0
    assert settled["b"].forward_s == [1.0] * 3
    assert rounds == [0, 1, 2, 3]
    assert totals == [11.0] * 3


def test_a_steady_unit_is_settled_as_soon_as_its_median_is_known():
    """Six equal times are enough; more are taken only where they differ."""
    clock = Clock()
    steady = Takes(clock, 4.0, 6.0)
    assert timed({"a": subject(steady, torch.ones(3, requires_grad=True))}, clock)["a"].repeats == LEAST_REPEATS
    shaky = Takes(clock, itertools.cycle([1.0, 2.0, 4.0]), 0.0)
    assert timed({"a": subject(shaky, torch.ones(3), train=False)}, clock, repeats=40)["a"].repeats > LEAST_REPEATS


def test_what_hardly_counts_need_not_be_known_well():
    """A shaky step that makes a thousandth of the whole is settled with the others."""
    clock = Clock()
    subjects = {
        "large": subject(Takes(clock, 1000.0, 0.0), torch.ones(3), train=False),
        "small": subject(Takes(clock, itertools.cycle([0.01, 0.02, 0.04]), 0.0), torch.ones(3), train=False),
    }
    assert timed(subjects, clock)["small"].repeats == LEAST_REPEATS


@pytest.mark.parametrize(("repeats", "budget_s", "count"), [(9, 1e9, 9), (9, 0.0, 6), (2, 0.0, 2), (20, 80.0, 8)])
def test_rounds_end_with_the_budget(repeats, budget_s, count):
    """A slow and shaky model is timed as often as its median needs, and no longer than the budget allows."""
    clock = Clock()
    subjects = {"a": subject(Takes(clock, itertools.cycle([5.0, 15.0]), 0.0), torch.ones(3), train=False)}
    assert timed(subjects, clock, repeats=repeats, budget_s=budget_s)["a"].repeats == count


def test_inference_times_the_forward_only():
    """Without training there is no backward, no update and nothing to compute again."""
    clock = Clock()
    series = timed({"a": subject(Takes(clock, 2.0, 5.0), torch.ones(3), train=False)}, clock, repeats=2)["a"]
    assert (series.forward_s, series.backward_s, series.update_s) == ([2.0] * 2, [0.0] * 2, [0.0] * 2)
    assert series.recompute_s == []


class Greedy(nn.Module):
    """A unit that there is never memory for."""

    def forward(self, _x):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")


def test_what_there_is_no_memory_for_is_left_out():
    """It is told, with the error, and the others are measured."""
    clock = Clock()
    subjects = {
        "greedy": subject(Greedy(), torch.ones(3), train=False),
        "a": subject(Takes(clock, 2.0, 5.0), torch.ones(3), train=False),
    }
    settled, refused = {}, {}
    measure(
        subjects,
        HostStopwatch(clock),
        Goal(repeats=2),
        on_settled=settled.__setitem__,
        on_refused=refused.__setitem__,
    )
    assert list(settled) == ["a"]
    assert "20.00 GiB" in str(refused["greedy"])


def test_a_unit_that_changes_its_input_can_be_repeated():
    """An in-place unit gets a fresh copy of its input every time."""
    x = torch.tensor([-1.0, 2.0], requires_grad=True)
    ready = subject(nn.ReLU(inplace=True), x)
    for _ in range(2):
        ready.run(HostStopwatch())
    assert ready.leaves[0].tolist() == [-1.0, 2.0]


def test_gradients_are_fresh_or_added_to():
    """The whole batch starts from no gradient; micro-batches add to what is there."""
    fresh, added = nn.Linear(2, 2), nn.Linear(2, 2)
    for unit, accumulate in ((fresh, False), (added, True)):
        ready = subject(unit, torch.ones(1, 2), optimizer="sgd", accumulate=accumulate)
        for _ in range(3):
            ready.run(HostStopwatch())
        once = ready.grads[0].sum(0)
        assert torch.allclose(unit.bias.grad, once * (3 if accumulate else 1))


def test_a_failing_unit_is_named():
    """The error of a unit that fails while it is measured begins with its name."""
    with pytest.raises(RuntimeError, match="head: "):
        timed({"head": subject(nn.Linear(3, 2), torch.ones(1, 2))}, Clock())


def test_an_empty_call_is_taken_off():
    """What a backward and an update cost with nothing to do is no unit's, and nothing becomes negative."""
    clock = Clock()
    settled = {}
    measure(
        {"a": subject(Takes(clock, 2.0, 5.0), torch.ones(3, requires_grad=True))},
        HostStopwatch(clock),
        Goal(repeats=1),
        on_settled=settled.__setitem__,
        empty=Blank(backward_s=1.5, update_s=1.0),
    )
    assert settled["a"].backward_s == [3.5]
    assert settled["a"].update_s == [0.0]


def test_an_empty_update_is_that_of_no_parameter():
    """On the line through the updates of one and of nine parameters."""

    class Linear:
        """A stopwatch on which an update takes 3 s and 2 s a parameter, and all else 1 s."""

        def time(self, function):
            result = function()
            owner = getattr(function, "__self__", None)
            many = sum(len(group["params"]) for group in owner.param_groups) if owner is not None else None
            return result, lambda: 1.0 if many is None else 3.0 + 2.0 * many

        def finish(self):
            pass

    assert blank(Linear(), "sgd") == Blank(1.0, pytest.approx(3.0))
