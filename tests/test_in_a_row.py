"""Steps in a row: forwards one after another, backwards in one call of the engine, each with its own time."""

import gc
import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_measure import Clock, Greedy, GreedyBack, Takes, subject
from torch import nn

from shardwright.profiler.measure import Goal, Pass, measure
from shardwright.profiler.measuring.in_a_row import Backwards, forwards
from shardwright.profiler.measuring.stopwatch import HostStopwatch
from shardwright.profiler.measuring.subject import Subject
from shardwright.profiler.recording.unitgraph import Call

X = torch.ones(3, requires_grad=True)


class Web(nn.Module):
    """A unit of operations that each take their seconds back, each on any two values before it, with many outputs."""

    def __init__(self, clock, seconds, uses, outputs):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))
        self.clock, self.seconds, self.uses, self.outputs = clock, seconds, uses, outputs

    def forward(self, x):
        values = [x * self.weight]
        for seconds, (left, right) in zip(self.seconds, self.uses, strict=True):
            made = values[left % len(values)] + values[right % len(values)]
            if made.requires_grad:
                made.register_hook(lambda _, seconds=seconds: self.advance(seconds))
            values.append(made)
        return {"of": [values[number % len(values)] for number in self.outputs], "none": None, "last": (values[-1],)}

    def advance(self, seconds):
        self.clock.now += seconds


NUMBERS = st.integers(0, 9)
OPERATION = st.tuples(st.sampled_from([1.0, 2.0, 4.0, 8.0]), st.tuples(NUMBERS, NUMBERS))
WEB = st.tuples(st.lists(OPERATION, min_size=1, max_size=5), st.lists(NUMBERS, max_size=3))


@given(st.lists(WEB, min_size=1, max_size=4), st.booleans())
def test_each_backward_has_its_own_time_whatever_is_in_it(webs, accumulate):
    """What one step's operations take back is that step's, and all of it: branches, several outputs, one used twice."""
    clock = Clock()
    units = {}
    for number, (operations, outputs) in enumerate(webs):
        units[number] = Web(clock, [seconds for seconds, _ in operations], [uses for _, uses in operations], outputs)
    subjects = {number: subject(unit, X, accumulate=accumulate) for number, unit in units.items()}
    alone = {}
    for number, each in subjects.items():
        each.forward(HostStopwatch(clock))
        alone[number] = each.backward(HostStopwatch(clock))()
    steps = Pass(subjects)
    steps.run(HostStopwatch(clock))
    together = {number: read["backward"]() for number, read in steps.readings["device"].of_steps.items()}
    assert together == alone
    assert steps.readings["device"].empty["backward"]() == 0.0


def test_what_a_look_at_the_clock_takes_is_taken_off():
    """Once for each output, as the backward of nothing tells it."""

    class Ticking(Clock):
        def __call__(self):
            self.now += 1.0
            return self.now

    clock = Ticking()
    subjects = {
        "two": subject(Web(clock, [4.0, 8.0], [(0, 0), (1, 1)], [1]), X),
        "one": subject(Takes(clock, 1.0, 2.0), X),
    }
    settled = {}
    measure([Pass(subjects)], HostStopwatch(clock), Goal(repeats=2), on_settled=settled.__setitem__)
    assert {name: series.backwards() for name, series in settled.items()} == {"two": [12.0] * 2, "one": [2.0] * 2}


class Gives(nn.Module):
    """A unit that hands on its input and its parameter, and changes the gradient that it is given."""

    def __init__(self, given):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))
        self.given = given

    def forward(self, x):
        class Doubles(torch.autograd.Function):
            @staticmethod
            def forward(_ctx, x):
                return x.clone()

            @staticmethod
            def backward(_ctx, gradient):
                self.given.append(gradient.clone())
                return gradient.mul_(2.0)

        return x, self.weight, Doubles.apply(x)


def test_each_backward_of_a_row_is_given_gradients_of_its_own():
    """Just written; what a backward does to them is not there the next time, and parameters get theirs."""
    given, others = [], {"before": subject(nn.Linear(3, 3), X), "behind": subject(nn.Linear(3, 3), X)}
    step = subject(Gives(given), X)
    steps = Pass({"before": others["before"], "step": step, "behind": others["behind"]})
    for _ in range(3):
        steps.run(HostStopwatch())
        assert torch.equal(step.parameters[0].grad, step.grads[1])
    assert not step.parameters[0]._backward_hooks  # none is left there for the next round
    assert len(given) == 3
    assert all(torch.equal(each, given[0]) for each in given)
    assert all(other.parameters[0].grad is not None for other in others.values())


def test_nothing_is_kept_of_a_round():
    """Neither what looks at the clock nor what was computed, though the engine's nodes hold hooks."""
    step = subject(Gives([]), X)
    steps, clock = Pass({"step": step}), HostStopwatch(Clock())
    alive = []
    for _ in range(3):
        steps.run(clock)
        gc.collect()
        alive.append(sum(type(each) is Backwards for each in gc.get_objects()))
    assert alive == [0, 0, 0]


def test_nested_tensors_go_back_in_a_row_too():
    """The engine takes none from a hook."""

    class Nests(nn.Module):
        def forward(self, x):
            return torch.nested.as_nested_tensor([x * 2, x[:1] * 3])

    steps = Pass({"a": subject(nn.Linear(3, 3), X), "nests": subject(Nests(), X)})
    for _ in range(2):
        steps.run(HostStopwatch())
        assert set(steps.readings["device"].of_steps["nests"]) >= {"forward", "backward"}


def test_gradients_of_a_row_are_those_of_each_alone():
    """Fresh for the whole batch, added for micro-batches."""
    for accumulate in (False, True):
        torch.manual_seed(0)
        subjects = {name: subject(nn.Linear(3, 3), X, accumulate=accumulate) for name in "abc"}
        steps = Pass(subjects)
        for _ in range(3):
            steps.run(HostStopwatch())
        for each in subjects.values():
            assert torch.allclose(each.parameters[1].grad, each.grads[0] * (3 if accumulate else 1))


@pytest.mark.parametrize("failing", [Greedy, GreedyBack])
@pytest.mark.parametrize("place", range(3))
def test_what_there_is_no_memory_for_leaves_the_others_whole(failing, place):
    """Wherever it is: what is like it is not tried, and the others are timed as often, and as ever."""
    clock, settled, refused = Clock(), {}, {}
    names = ["a", "b"]
    units = [Takes(clock, 1.0, 2.0), Takes(clock, 4.0, 8.0)]
    names.insert(place, "none")
    units.insert(place, failing())
    subjects = {name: subject(unit, X) for name, unit in zip(names, units, strict=True)} | {
        "like": subject(failing(), X)
    }
    steps = Pass(subjects, alike={"like": "none"})
    measure(
        [steps], HostStopwatch(clock), Goal(repeats=2), on_settled=settled.__setitem__, on_refused=refused.__setitem__
    )
    assert [*refused] == ["none"]
    assert {name: (series.forward_s, series.backward_s) for name, series in settled.items()} == {
        "a": ([1.0] * 2, [2.0] * 2),
        "b": ([4.0] * 2, [8.0] * 2),
    }


def test_what_fails_in_a_backward_of_a_row_is_named():
    """Not the step that happens to be first."""

    class Fails(nn.Module):
        def forward(self, x):
            y = x * 2
            y.register_hook(lambda _: 1 / 0)
            return y

    subjects = {"a": subject(nn.Linear(3, 3), X), "b": subject(Fails(), X), "c": subject(nn.Linear(3, 3), X)}
    with pytest.raises(RuntimeError, match=r"^b: division by zero"):
        Pass(subjects).run(HostStopwatch())


@pytest.mark.parametrize("asked", range(14))
def test_what_is_broken_off_on_a_cpu_holds_and_updates_nothing(asked):
    """Before whatever step, in forwards, backwards or updates; all asked, it runs as ever."""
    subjects = {name: subject(nn.Linear(3, 3), X, accumulate=True) for name in "ab"}
    steps = Pass(subjects)
    steps.run(HostStopwatch())
    weights = {name: each.parameters[0].detach().clone() for name, each in subjects.items()}
    answers = itertools.chain([False] * asked, itertools.repeat(True))
    steps.run(HostStopwatch(), broken_off=lambda: next(answers))
    assert all(not each.outputs for each in subjects.values())
    same = all(torch.equal(weights[name], each.parameters[0]) for name, each in subjects.items())
    assert same == (asked < 7)  # two forwards, two empty ones and two backwards are asked for before


class Nested(nn.Module):
    """A unit that is given values in lists, dictionaries, and by keyword."""

    def forward(self, first, pair, *, scale, rest=None, flag=True):
        assert flag
        return first + pair[0] * pair[1]["deep"] * scale + (0 if rest is None else rest)


ARGUMENTS = [
    ((X, [X, {"deep": X}]), {"scale": 2}, 3.0),
    ((X, (X, {"deep": X})), {"rest": X, "scale": X, "flag": True}, 3.0),
]


@pytest.mark.parametrize(("args", "kwargs", "value"), ARGUMENTS)
def test_values_within_others_arrive_where_they_were(args, kwargs, value):
    """With copies of the tensors."""
    held = Subject(Call(Nested(), args, kwargs), torch.device("cpu"), train=True, optimizer=None, accumulate=False)
    assert held.prepared(keeping=True)()[0].item() == value
    given = {}
    plain = nn.Identity()
    plain.forward = lambda *args, **kwargs: given.update(args=args, kwargs=kwargs)
    call = Call(plain, (X, 2), {"b": X, "a": None})
    Subject(call, torch.device("cpu"), train=True, optimizer=None, accumulate=False).prepared(keeping=True)()
    assert given["args"][1] == 2
    assert [*given["kwargs"]] == ["b", "a"]
    assert torch.equal(given["args"][0], X)
    assert given["args"][0] is not X


def test_forwards_and_backwards_are_of_any_steps():
    """Some of which have no backward."""
    clock = Clock()
    subjects = {"a": subject(Takes(clock, 1.0, 2.0), X), "b": subject(nn.Identity(), X.detach())}
    backwards = Backwards(clock)
    assert forwards(subjects, clock, keeping=True) == {"a": 1.0, "b": 0.0}
    assert {name: reading() for name, reading in backwards.run(subjects).items()} == {"a": 2.0}
