"""Measurement with a clock of our own, so that what is timed can be stated exactly."""

import pytest
import torch
from torch import nn

from shardwright.profiler.measure import (
    Subject,
    host_timer,
    measure,
    summary,
)
from shardwright.profiler.unitgraph import Call

CPU = torch.device("cpu")


class Clock:
    """A clock that advances only when it is told to."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


class Takes(nn.Module):
    """A unit whose forward and backward advance the clock by stated seconds."""

    def __init__(self, clock, forward_s, backward_s):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))
        self.clock, self.forward_s, self.backward_s = clock, forward_s, backward_s

    def forward(self, x):
        self.clock.now += self.forward_s
        y = x * self.weight
        if y.requires_grad:
            y.register_hook(self.advance)
        return y

    def advance(self, _grad):
        self.clock.now += self.backward_s


def subject(unit, *args, train=True, optimizer="adam", accumulate=False):
    return Subject(Call(unit, args, {}), CPU, train=train, optimizer=optimizer, accumulate=accumulate)


def test_forward_and_backward_are_timed_apart():
    """Each repeat gives the unit's own forward and backward, the warm-up round apart."""
    clock = Clock()
    rounds = []
    x = torch.ones(3, requires_grad=True)
    subjects = {"a": subject(Takes(clock, 2.0, 5.0), x), "b": subject(Takes(clock, 1.0, 3.0), x)}
    samples = measure(subjects, host_timer(clock), rounds=3, on_round=rounds.append)
    assert samples["a"].forward_s == [2.0] * 3
    assert samples["a"].backward_s == [5.0] * 3
    assert samples["b"].forward_s == [1.0] * 3
    assert rounds == [0, 1, 2, 3]


@pytest.mark.parametrize(("rounds", "budget_s", "timed"), [(9, 1e9, 9), (9, 0.0, 3), (2, 0.0, 2), (9, 50.0, 5)])
def test_rounds_end_with_the_budget(rounds, budget_s, timed):
    """A slow model is timed at least three times, and no longer than the budget allows."""
    clock = Clock()
    subjects = {"a": subject(Takes(clock, 4.0, 6.0), torch.ones(3, requires_grad=True))}
    samples = measure(subjects, host_timer(clock), rounds=rounds, on_round=id, budget_s=budget_s, clock=clock)
    assert len(samples["a"].forward_s) == timed


def test_inference_times_the_forward_only():
    """Without training there is no backward and no update."""
    clock = Clock()
    samples = measure(
        {"a": subject(Takes(clock, 2.0, 5.0), torch.ones(3), train=False)}, host_timer(clock), rounds=2, on_round=id
    )
    assert (samples["a"].forward_s, samples["a"].backward_s, samples["a"].update_s) == ([2.0] * 2, [0.0] * 2, [0.0] * 2)


def test_a_unit_that_changes_its_input_can_be_repeated():
    """An in-place unit gets a fresh copy of its input every time."""
    x = torch.tensor([-1.0, 2.0], requires_grad=True)
    ready = subject(nn.ReLU(inplace=True), x)
    for _ in range(2):
        ready.run(host_timer())
    assert ready.leaves[0].tolist() == [-1.0, 2.0]


def test_gradients_are_fresh_or_added_to():
    """The whole batch starts from no gradient; micro-batches add to what is there."""
    fresh, added = nn.Linear(2, 2), nn.Linear(2, 2)
    for unit, accumulate in ((fresh, False), (added, True)):
        ready = subject(unit, torch.ones(1, 2), optimizer="sgd", accumulate=accumulate)
        for _ in range(3):
            ready.run(host_timer())
        once = ready.grads[0].sum(0)
        assert torch.allclose(unit.bias.grad, once * (3 if accumulate else 1))


def test_a_failing_unit_is_named():
    """The error of a unit that fails while it is measured begins with its name."""
    with pytest.raises(RuntimeError, match="head: "):
        measure({"head": subject(nn.Linear(3, 2), torch.ones(1, 2))}, host_timer(), rounds=1, on_round=id)


def test_median_and_spread():
    """The summary is the median and the interquartile range."""
    assert summary([1.0, 2.0, 3.0, 4.0, 100.0]) == (3.0, 2.0)
