"""Measurement where work is enqueued: the device's clock and the host's, in turns, on a simulated queue."""

from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_measure import subject
from test_stopwatch import Queue
from torch import nn

from shardwright.profiler.measure import Goal, Pass, Readings, measure
from shardwright.profiler.measuring.enqueuing import enqueue_backwards, shares
from shardwright.profiler.measuring.stopwatch import Enqueued
from shardwright.profiler.measuring.timing import Series, summarise
from shardwright.profiler.profile import Clocked, Timing
from shardwright.profiler.records import measurements_of


class Launches(nn.Module):
    """A unit that launches one kernel in its forward and one in its backward, on a simulated device."""

    def __init__(self, queue, launch_s, run_s):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))
        self.work = queue.kernels([(launch_s, run_s, False)])

    def forward(self, x):
        self.work()
        y = x * self.weight
        if y.requires_grad:
            y.register_hook(lambda _: self.work())
        return y


def test_work_that_is_enqueued_is_timed_on_both_clocks():
    """The device in a full queue, not charged for launches, and the host with an empty one.

    The slower clock decides when a step is settled.
    """
    queue = Queue(behind=1.25)
    x = torch.ones(3, requires_grad=True)
    subjects = {
        "large": subject(Launches(queue, 1 / 1024, 4 / 1024), x),
        "small": subject(Launches(queue, 2 / 1024, 1 / 1024), x),
    }
    settled = {}
    measure([Pass(subjects)], queue, Goal(repeats=6), on_settled=settled.__setitem__, pace=lambda: 1.0)
    assert settled["large"].pace_s == []
    assert settled["large"].host.pace_s == [1.0] * 6
    for name, launch_s, run_s in (("large", 1 / 1024, 4 / 1024), ("small", 2 / 1024, 1 / 1024)):
        timing = summarise(settled[name])
        assert (timing.forward_s, timing.backward_s) == pytest.approx((run_s, run_s))
        assert (timing.host.forward_s, timing.host.backward_s) == pytest.approx((launch_s, launch_s))
    assert settled["large"].slower is settled["large"]
    assert settled["small"].slower is settled["small"].host


class Interrupted(Queue):
    """Its host takes 8 ms more for the first launch after it waited or made an event."""

    cold = False

    def _mark(self):
        self.cold = True
        return super()._mark()

    def finish(self):
        self.cold = True
        super().finish()

    def _enqueue(self, seconds):
        self.now += 8 / 1024 if self.cold else 0.0
        self.cold = False
        super()._enqueue(seconds)


def test_the_host_is_timed_as_in_a_loop():
    """A host that is slowed down by each other thing it does is so once in all forwards, and once in all backwards.

    These are one call of the engine, divided as what each takes when it is called by itself.
    """
    queue, x = Interrupted(), torch.ones(3, requires_grad=True)
    launches = {"a": 1, "b": 2, "c": 5}
    subjects = {name: subject(Launches(queue, ms / 1024, 1 / 1024), x) for name, ms in launches.items()}
    settled = {}
    measure([Pass(subjects)], queue, Goal(repeats=6), on_settled=settled.__setitem__)
    for name, ms in launches.items():
        host = summarise(settled[name]).host
        assert host.forward_s == host.recompute_s == pytest.approx((ms + 8 * (name == "a")) / 1024)
        assert host.backward_s == pytest.approx((1 + 2 + 5 + 8) * (ms + 8) / (1 + 2 + 5 + 3 * 8) / 1024)


@given(st.integers(0, 99), st.lists(st.integers(0, 9), min_size=1, max_size=5), st.integers(0, 3))
def test_shares_make_the_whole(total, alone, empty):
    """In proportion to what each takes beyond an empty call; alike where that is nothing."""
    found = shares(float(total), dict(enumerate(map(float, alone))), float(empty))
    seconds = [found[number].host_s for number in range(len(alone))]
    beyond = [max(each - empty, 0) for each in alone]
    assert sum(seconds) == pytest.approx(total)
    assert seconds == pytest.approx(
        [total * each / sum(beyond) if any(beyond) else total / len(alone) for each in beyond]
    )


@pytest.mark.parametrize("left", [0, 4])
def test_steps_that_do_not_go_in_a_row_are_called_by_themselves(monkeypatch, left):
    """What fails only together costs no measurement, and what was read in a row before is not mixed with the rest."""
    queue, x = Interrupted(), torch.ones(3, requires_grad=True)
    enqueue, calls = enqueue_backwards, iter(range(100))
    subjects = {name: subject(Launches(queue, 1 / 1024, 1 / 1024), x) for name in "ab"}

    def fails(*args):
        if next(calls) >= left:
            raise RuntimeError("not together")
        return enqueue(*args)

    monkeypatch.setattr("shardwright.profiler.measure.enqueue_backwards", fails)
    settled, steps = {}, Pass(subjects)
    measure([steps], queue, Goal(repeats=12), on_settled=settled.__setitem__)
    assert not steps.in_a_row
    for name in "ab":
        host = settled[name].host
        assert host.backwards() == pytest.approx([9 / 1024] * host.repeats)
        assert host.forwards() == pytest.approx([9 / 1024] * host.repeats)


SIDES = st.tuples(st.integers(0, 9), st.integers(0, 9))


@given(st.lists(st.tuples(SIDES, SIDES, SIDES), min_size=1, max_size=5), st.sampled_from([1, 4]))
def test_the_slower_of_host_and_device_sets_the_pace_of_all(steps, count):
    """Forward, backward and update of each step, on the device and on the host: one side's times for all of them."""

    def timing(side):
        return {
            "repeats": 6,
            "forward_s": side[0],
            "forward_spread_s": 0,
            "backward_s": side[1],
            "backward_spread_s": 0,
            "update_s": side[2],
        }

    sides = [[[phase[side] for phase in step] for step in steps] for side in (0, 1)]
    timings = {
        ("cuda:0", microbatches, f"s{number}"): Clocked(**timing(device), host=Timing(**timing(host)))
        for number, (device, host) in enumerate(zip(*sides, strict=True))
        for microbatches in {1, count}
    }
    names = [f"s{number}" for number in range(len(steps))]
    found = [m for m in measurements_of(names, timings) if m.microbatches == count]
    totals = [sum(count * (f + b) + u for f, b, u in side) for side in sides]
    assert sum(count * (m.forward_s + m.backward_s) + m.update_s for m in found) == max(totals)
    assert {m.host_bound for m in found} == {totals[1] > totals[0]}


def test_the_host_has_the_pace_of_its_own_turn():
    """Between the turns a pace is taken, too."""
    queue, paces = Queue(), iter([9.0, 1.0, 3.0] * 8)
    settled = {}
    subjects = {"a": subject(Launches(queue, 1 / 1024, 1 / 1024), torch.ones(3))}
    measure([Pass(subjects)], queue, Goal(repeats=6), on_settled=settled.__setitem__, pace=lambda: next(paces))
    assert settled["a"].host.pace_s == [2.0] * 6


def enqueued(device_s, host_s):
    return Enqueued(lambda: device_s, host_s)


def test_each_clock_is_read_in_its_turn_and_has_its_own_excess():
    """But for the first call, which is in the turn of the device on both."""
    steps, series = Pass({"a": subject(nn.Linear(3, 3), torch.ones(3))}), {"a": Series()}
    for times in (10.0, 1.0):
        phases = {"forward": 4.0, "backward": 9.0, "update": 5.0}
        on_device = {phase: enqueued(times * seconds, 90.0 * times) for phase, seconds in phases.items()}
        phases = {"forward": 2.0, "backward": 7.0, "update": 6.0}
        on_host = {phase: enqueued(80.0 * times, times * seconds) for phase, seconds in phases.items()}
        steps.readings = {
            "device": Readings({"a": on_device}, {"backward": enqueued(times, 90.0)}, enqueued(3.0 * times, 90.0)),
            "host": Readings({"a": on_host}, {"backward": enqueued(80.0, 2.0 * times)}, enqueued(80.0, 2.0 * times)),
        }
        steps.note(series, first=times == 10.0)
    device, host = series["a"], series["a"].host
    assert (device.forwards(), device.backwards(), device.updates()) == ([4.0], [8.0], [3.0])
    assert (host.forwards(), host.backwards(), host.updates()) == ([2.0], [5.0], [2.0])
    assert (device.first_call_s, host.first_call_s) == (130.0, 1800.0)


class RunsOut(Launches):
    """A unit that there is no memory for from its n-th forward on."""

    def __init__(self, queue, at):
        super().__init__(queue, 1 / 1024, 1 / 1024)
        self.left = at

    def forward(self, x):
        self.left -= 1
        if self.left <= 0:
            raise torch.OutOfMemoryError("out of memory")
        return super().forward(x)


@pytest.mark.parametrize("at", range(1, 9))
def test_what_runs_out_of_memory_is_left_out_in_either_turn(at):
    """With what is like it, and the others are measured on both clocks as often as without it."""
    queue, settled, refused = Queue(), {}, {}
    x = torch.ones(3, requires_grad=True)
    unit = partial(Launches, queue, 1 / 1024, 1 / 1024)
    subjects = {"a": subject(unit(), x), "b": subject(RunsOut(queue, at), x), "c": subject(unit(), x)}
    steps = Pass(subjects, alike={"c": "b"})
    measure([steps], queue, Goal(repeats=6), on_settled=settled.__setitem__, on_refused=refused.__setitem__)
    assert (list(settled), list(refused)) == (["a"], ["b"])
    assert settled["a"].repeats == settled["a"].host.repeats == 6


@pytest.mark.parametrize("asked", range(5))
def test_what_is_broken_off_holds_and_updates_nothing(asked):
    """At whatever step before the updates."""
    queue, x = Queue(), torch.ones(3, requires_grad=True)
    steps = Pass({name: subject(Launches(queue, 1 / 1024, 1 / 1024), x) for name in "ab"})
    steps.run(queue)
    answers = iter([False] * asked)
    steps.run(queue, broken_off=lambda: next(answers, True))
    assert all(not held.outputs for held in steps.subjects.values())
    assert len(steps.readings) == 2
    assert all(readings.whole_update is None for readings in steps.readings.values())
