"""Measurement with a clock of our own, so that what is timed can be stated exactly."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from shardwright.profiler.measure import Goal, Pass, excess_s, measure, round_totals
from shardwright.profiler.measuring.stopwatch import HostStopwatch
from shardwright.profiler.measuring.subject import Subject, as_input
from shardwright.profiler.measuring.timing import LEAST_REPEATS, Series, at_pace, summarise
from shardwright.profiler.recording.unitgraph import Call

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


class TakesInParts(Takes):
    """A unit whose backward takes 2 s on the way to its input, and 3 s on the way to its weight alone."""

    def __init__(self, clock):
        super().__init__(clock, 1.0, 0.0)

    def forward(self, x):
        self.clock.now += self.forward_s
        x, weight = x * 1, self.weight * 1
        if x.requires_grad:
            x.register_hook(lambda _: self.advance_by(2.0))
        if weight.requires_grad:
            weight.register_hook(lambda _: self.advance_by(3.0))
        return x * weight

    def advance_by(self, seconds):
        self.clock.now += seconds


def subject(unit, *args, train=True, optimizer="adam", accumulate=False, **options):
    return Subject(Call(unit, args, {}), CPU, train=train, optimizer=optimizer, accumulate=accumulate, **options)


def timed(subjects, clock, **goal):
    """The series of each subject, under the clock's time."""
    settled = {}
    measure([Pass(subjects)], HostStopwatch(clock), Goal(**goal), on_settled=settled.__setitem__, clock=clock)
    return settled


def test_forward_and_backward_are_timed_apart():
    """Each repeat gives the unit's own forward and backward, and what is computed anew; the first call is apart."""
    clock = Clock()
    rounds = []
    x = torch.ones(3, requires_grad=True)
    subjects = {"a": subject(Takes(clock, 2.0, 5.0), x), "b": subject(Takes(clock, 1.0, 3.0), x)}
    settled = {}
    goal = Goal(repeats=3)
    totals = measure(
        [Pass(subjects)], HostStopwatch(clock), goal, on_settled=settled.__setitem__, on_round=rounds.append
    )
    assert settled["a"].forward_s == [2.0] * 3
    assert settled["a"].backward_s == [5.0] * 3
    assert settled["a"].recompute_s == [2.0] * 3
    assert settled["a"].first_call_s == 7.0
    assert settled["b"].forward_s == [1.0] * 3
    assert rounds == [0, 1, 2, 3]
    assert totals == [11.0] * 3


def test_the_parts_of_a_backward_are_timed_beside_it():
    """Each of them on the graph of one forward, and the whole backward as ever; an input without one takes none."""
    clock = Clock()
    whole, first = TakesInParts(clock), TakesInParts(clock)
    x = torch.ones(3, requires_grad=True)
    subjects = {"whole": subject(whole, x, parted=True), "first": subject(first, x.detach(), parted=True)}
    settled = timed(subjects, clock, repeats=6)
    assert settled["whole"].backward_input_s == [2.0] * 6
    assert settled["whole"].backward_weight_s == [3.0] * 6
    assert settled["whole"].backward_s == [5.0] * 6
    assert (settled["first"].backward_input_s, settled["first"].backward_weight_s) == ([0.0] * 6, [3.0] * 6)
    figures = summarise(settled["whole"])
    assert (figures.backward_input_s, figures.backward_weight_s) == (2.0, 3.0)
    assert at_pace(figures.model_copy(update={"pace_s": 1.0}), 2.0).backward_weight_s == 6.0
    assert summarise(timed({"a": subject(whole, x)}, clock)["a"]).backward_input_s is None
    step, watch, gradients = subjects["whole"], HostStopwatch(clock), []
    step.forward(watch)
    for phases in ([step.backward_input, step.backward_weight], [step.backward]):
        for phase in phases:
            phase(watch)
        gradients.append(whole.weight.grad)
    assert torch.equal(*gradients)


def test_a_steady_unit_is_settled_as_soon_as_its_median_is_known():
    """Six equal times are enough; more are taken only where they differ."""
    clock = Clock()
    steady = Takes(clock, 4.0, 6.0)
    assert timed({"a": subject(steady, torch.ones(3, requires_grad=True))}, clock)["a"].repeats == LEAST_REPEATS
    shaky = Takes(clock, itertools.cycle([1.0, 2.0, 4.0]), 0.0)
    assert timed({"a": subject(shaky, torch.ones(3), train=False)}, clock, repeats=40)["a"].repeats > LEAST_REPEATS


def test_a_pass_that_is_known_is_left_out():
    """A number of micro-batches whose steps are settled runs no further rounds; others go on, and are timed alike."""
    clock, calls = Clock(), []
    steady = Takes(clock, 4.0, 6.0)
    steady.register_forward_hook(lambda *_: calls.append("steady"))
    shaky = Takes(clock, itertools.cycle([1.0, 2.0, 4.0]), 0.0)
    settled = {}
    first = Pass({"steady": subject(steady, torch.ones(3), train=False)})
    second = Pass({"shaky": subject(shaky, torch.ones(3), train=False)})
    goal = Goal(repeats=20, budget_s=1e9)
    totals = measure([first, second], HostStopwatch(clock), goal, on_settled=settled.__setitem__, clock=clock)
    assert (settled["steady"].repeats, settled["shaky"].repeats) == (LEAST_REPEATS, 20)
    assert len(calls) == LEAST_REPEATS + 1  # one to warm up
    assert len(totals) == 20


def test_a_steady_step_beside_a_shaky_one_goes_on():
    """Within a pass all steps run as long as one is not settled."""
    clock, calls = Clock(), []
    steady = Takes(clock, 4.0, 6.0)
    steady.register_forward_hook(lambda *_: calls.append("steady"))
    shaky = Takes(clock, itertools.cycle([10.0, 20.0, 40.0]), 0.0)
    subjects = {"a": subject(steady, torch.ones(3), train=False), "b": subject(shaky, torch.ones(3), train=False)}
    settled = {}
    steps, goal = Pass(subjects), Goal(repeats=20, budget_s=1e9)
    measure([steps], HostStopwatch(clock), goal, on_settled=lambda key, series: settled.update({key: series.repeats}))
    assert settled == {"a": LEAST_REPEATS, "b": 20}
    assert len(calls) == 21


def series_of(*seconds):
    series = Series()
    for each in seconds:
        series.add(forward_s=each)
    return series


def test_a_round_without_some_steps_counts_them_as_the_others_ran():
    """Where a step is left out, it counts with its median, times how the others ran beside their own."""
    assert round_totals([series_of(4.0, 6.0, 5.0), series_of(1.0, 3.0, 2.0, 4.0, 1.0)]) == [5.0, 9.0, 7.0, 14.0, 3.5]
    assert round_totals([]) == []


@given(st.lists(st.floats(0.5, 2.0), min_size=1, max_size=9), st.lists(st.integers(1, 9), min_size=1, max_size=4))
def test_rounds_are_as_unsteady_as_the_machine_whatever_ran(speeds, lengths):
    """If a slow machine is slow for all, the rounds' totals tell how slow, though steps were left out of some."""
    whole = series_of(*speeds)
    parts = [whole, *(series_of(*(k * s for s in speeds[:length])) for k, length in enumerate(lengths, start=2))]
    full = [len(part.forward_s) for part in parts[1:]]
    totals = round_totals(parts)
    assert len(totals) == len(speeds)
    if all(length == len(speeds) for length in full):
        scale = 1 + sum(range(2, 2 + len(full)))
        assert totals == pytest.approx([scale * s for s in speeds])
    complete = min([len(speeds), *full])
    weights = [part.median_s() for part in parts]
    alone = [sum(weights) * s / whole.median_s() for s in speeds[max(full, default=0) :]]
    assert totals[max([0, *full]) :] == pytest.approx(alone)
    assert totals[:complete] == pytest.approx([sum(part.totals()[r] for part in parts) for r in range(complete)])


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
        [Pass(subjects)],
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
        ready.forward(HostStopwatch())
        ready.backward(HostStopwatch())
    assert ready.leaves[0].tolist() == [-1.0, 2.0]


def test_each_backward_is_given_gradients_of_its_own():
    """Just written, as those from the unit behind are; and what a backward does to them is not there the next time."""
    given = []

    class Doubles(torch.autograd.Function):
        @staticmethod
        def forward(_ctx, x):
            return x.clone()

        @staticmethod
        def backward(_ctx, gradient):
            given.append(gradient.clone())
            return gradient.mul_(2.0)

    class Unit(nn.Module):
        def forward(self, x):
            return Doubles.apply(x)

    one = subject(Unit(), torch.ones(3, requires_grad=True))
    for _ in range(3):
        one.forward(HostStopwatch())
        one.backward(HostStopwatch())
    assert len(given) == 3
    assert all(torch.equal(each, given[0]) for each in given)


def test_gradients_are_fresh_or_added_to():
    """The whole batch starts from no gradient; micro-batches add to what is there."""
    fresh, added = nn.Linear(2, 2), nn.Linear(2, 2)
    for unit, accumulate in ((fresh, False), (added, True)):
        ready = subject(unit, torch.ones(1, 2), optimizer="sgd", accumulate=accumulate)
        for _ in range(3):
            ready.forward(HostStopwatch())
            ready.backward(HostStopwatch())
        once = ready.grads[0].sum(0)
        assert torch.allclose(unit.bias.grad, once * (3 if accumulate else 1))


def test_a_failing_unit_is_named():
    """The error of a unit that fails while it is measured begins with its name."""
    with pytest.raises(RuntimeError, match="head: "):
        timed({"head": subject(nn.Linear(3, 2), torch.ones(1, 2))}, Clock())


class Ordered:
    """A stopwatch that notes which phase of which unit it times; every update takes 3 s and 2 s a parameter."""

    EMPTY_BACKWARD_S = 1.5

    def __init__(self, clock):
        self.host = HostStopwatch(clock)
        self.updates = []

    def clocks(self):
        yield "device"

    def time(self, function):
        before = self.host.clock.now
        result, reading = self.host.time(function)
        owner = getattr(function, "__self__", None)
        if isinstance(owner, torch.optim.Optimizer):
            count = sum(len(group["params"]) for group in owner.param_groups)
            self.updates.append(count)
            return result, lambda: 3.0 + 2.0 * count
        is_empty = getattr(function, "func", None) is torch.autograd.backward and self.host.clock.now == before
        return result, (lambda: self.EMPTY_BACKWARD_S) if is_empty else reading

    def finish(self):
        pass


def test_what_only_a_single_step_costs_is_taken_off():
    """The engine is entered once a step and so is the optimizer: with n steps, n - 1 of their calls are too many."""
    clock = Clock()
    settled = {}
    x = torch.ones(3, requires_grad=True)
    subjects = {"a": subject(Takes(clock, 2.0, 5.0), x), "b": subject(Takes(clock, 2.0, 1.0), x)}
    stopwatch = Ordered(clock)
    measure([Pass(subjects)], stopwatch, Goal(repeats=1), on_settled=settled.__setitem__)
    assert settled["a"].backwards() == [3.5]
    assert settled["b"].backwards() == [0.0]  # nothing becomes negative
    assert stopwatch.updates == [1, 1, 2, 1, 1]  # of all first, once each has its state
    assert settled["a"].updates() == settled["b"].updates() == [3.5]  # 3 + 2 * 2, once


def test_the_gradient_of_an_input_is_let_go():
    """It is computed, and no layout that the input happens to have is forced on it."""
    noted = []
    x = torch.randn(3, 2).T.requires_grad_()
    ready = subject(nn.Linear(3, 3), x)
    ready.leaves[0].register_hook(noted.append)
    ready.forward(HostStopwatch())
    ready.backward(HostStopwatch())
    assert ready.leaves[0].grad is None
    assert ready.parameters[0].grad is not None
    assert noted == [None]


class Noted(nn.Module):
    """A unit that notes its forward and its backward."""

    def __init__(self, name, notes):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))
        self.name, self.notes = name, notes

    def forward(self, x):
        y = x * self.weight
        if y.requires_grad:
            self.notes.append(f"forward {self.name}")
            y.register_hook(lambda _: self.notes.append(f"backward {self.name}"))
        return y


def test_a_pass_goes_like_a_training_step():
    """All forwards in order, then all backwards in reverse: so code and caches are as in the real run."""
    notes = []
    subjects = {name: subject(Noted(name, notes), torch.ones(3)) for name in "abc"}
    Pass(subjects).run(HostStopwatch())
    forward, backward = ([f"{phase} {name}" for name in "abc"] for phase in ("forward", "backward"))
    assert notes == forward + backward[::-1]


class Warming(nn.Module):
    """Takes a second when it comes after its like, and nine in the first of two passes."""

    def __init__(self, clock):
        super().__init__()
        self.clock, self.calls = clock, 0

    def forward(self, x):
        self.clock.now += 9.0 if self.calls % 2 == 0 else 1.0
        self.calls += 1
        return x * 2.0


def test_a_repeated_pass_is_timed_after_one_like_it():
    """Micro-batches in inference come one after another: each finds the caches as the one before left them."""
    for repeated, seconds in ((True, [1.0, 1.0]), (False, [1.0, 9.0])):
        clock, settled = Clock(), {}
        steps = Pass({"a": subject(Warming(clock), torch.ones(3), train=False)}, repeated=repeated)
        measure([steps], HostStopwatch(clock), Goal(repeats=2), on_settled=settled.__setitem__)
        assert settled["a"].forward_s == seconds


def test_what_does_not_fit_in_the_pass_before_is_refused_once():
    """The rest is timed."""
    refused = {}
    subjects = {"a": subject(nn.ReLU(), torch.ones(3)), "b": subject(Greedy(), torch.ones(3))}
    steps = Pass(subjects, repeated=True)
    steps.run(HostStopwatch(), on_refused=refused.__setitem__)
    assert (list(refused), list(steps.subjects)) == (["b"], ["a"])
    assert "forward" in steps.readings["device"].of_steps["a"]


def test_steps_that_do_the_same_are_averaged():
    """Their times are those of the first in each round: what comes after its like finds its code warm."""
    clock = Clock()
    settled = {}
    x = torch.ones(3, requires_grad=True)
    subjects = {"a": subject(Takes(clock, 2.0, 5.0), x), "b": subject(Takes(clock, 4.0, 9.0), x)}
    steps = Pass(subjects, alike={"b": "a"})
    measure([steps], HostStopwatch(clock), Goal(repeats=2), on_settled=settled.__setitem__)
    assert list(settled) == ["a"]
    assert (settled["a"].forward_s, settled["a"].backward_s) == ([3.0] * 2, [7.0] * 2)


def test_an_average_is_weighted():
    """Where a step stands for several that are not there."""
    clock = Clock()
    settled = {}
    x = torch.ones(3, requires_grad=True)
    subjects = {"a": subject(Takes(clock, 2.0, 5.0), x), "b": subject(Takes(clock, 4.0, 9.0), x)}
    steps = Pass(subjects, alike={"b": "a"}, weights={"b": 3})
    measure([steps], HostStopwatch(clock), Goal(repeats=2), on_settled=settled.__setitem__)
    assert (settled["a"].forward_s, settled["a"].backward_s) == ([3.5] * 2, [8.0] * 2)


def test_like_steps_are_refused_together():
    """What there is no memory for once is not tried under another name."""
    refused = {}
    subjects = {"a": subject(nn.ReLU(), torch.ones(3)), "b": subject(Greedy(), torch.ones(3))}
    steps = Pass(subjects, alike={"b": "a"})
    steps.run(HostStopwatch(), on_refused=refused.__setitem__)
    assert list(refused) == ["a"]
    assert not steps.subjects


@given(st.lists(st.integers(0, 1000), max_size=12), st.integers(0, 8000))
def test_parts_less_their_excess_make_the_whole(parts, together):
    """Each less the same, and none below 0; parts that make less than the whole are left alone."""
    excess = excess_s(parts, together)
    left = sum(max(0.0, part - excess) for part in parts)
    assert left == pytest.approx(min(sum(parts), together))


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "sgd(momentum=0.9)"])
def test_timing_the_update_of_all_leaves_each_its_state(optimizer):
    """The optimizer of all parameters works on the state of the steps' own, and takes no memory for another."""
    subjects = {name: subject(nn.Linear(2, 2), torch.ones(1, 2), optimizer=optimizer) for name in "ab"}
    steps = Pass(subjects)
    steps.run(HostStopwatch())
    for ready in subjects.values():
        for parameter in ready.parameters:
            assert steps.optimizer.state[parameter] is ready.optimizer.state[parameter]


class GreedyBack(nn.Module):
    """A unit that there is no memory for in its backward."""

    def forward(self, x):
        y = x * 2
        y.register_hook(self.fail)
        return y

    def fail(self, _grad):
        raise torch.OutOfMemoryError("CUDA out of memory")


def test_what_fails_first_in_the_backward_is_left_out_too():
    """The last step of the forward is the first of the backward; the others are measured, empty calls with them."""
    x = torch.ones(3, requires_grad=True)
    subjects = {name: subject(nn.Linear(3, 3), x) for name in "ab"} | {"c": subject(GreedyBack(), x)}
    settled, refused = {}, {}
    steps = Pass(subjects)
    measure([steps], HostStopwatch(), Goal(repeats=2), on_settled=settled.__setitem__, on_refused=refused.__setitem__)
    assert (list(settled), list(refused)) == (["a", "b"], ["c"])


class Needs(torch.optim.SGD):
    """An optimizer with a setting of its own that has no default, and that is in no group."""

    def __init__(self, params, base):
        super().__init__(params, lr=base)
        self.base = base

    def step(self):
        assert self.base == 0.5
        return super().step()


def test_an_optimizer_of_all_is_made_as_each_is(monkeypatch):
    """With its settings, whatever they are and wherever it keeps them."""
    monkeypatch.setattr(torch.optim, "Needs", Needs, raising=False)
    subjects = {name: subject(nn.Linear(3, 3), torch.ones(3), optimizer="torch.optim.Needs(base=0.5)") for name in "ab"}
    steps = Pass(subjects)
    for _ in range(2):
        steps.run(HostStopwatch())
    assert steps.optimizer.base == 0.5
    assert steps.readings["device"].whole_update is not None


class Marked(torch.Tensor):
    """A tensor of a class of its own."""


def test_an_input_keeps_its_class():
    """A unit may go by it."""
    marked = torch.ones(3).as_subclass(Marked).requires_grad_()
    assert type(as_input(marked)) is Marked
