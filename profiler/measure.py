"""Measurement: the time of each step's forward, its backward and its parameters' update, on one device.

Steps are measured in rounds, and a round goes like a training step at each number of micro-batches: the forwards of all
steps in their order, then the backwards in reverse, then the updates. So a step finds the caches as it does in the real
run, with its inputs just written, its weights cold and the code that calls it warm, and a slow second of the machine
falls on all steps alike instead of spoiling one of them. On a GPU a pass has two turns, one for each clock; in the
host's the steps follow one another as in a loop (:mod:`shardwright.profiler.measuring.enqueuing`). Rounds go
on until every step's median is known well enough, or the time for it is used up; a number of micro-batches at which all
steps are known takes part no longer.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Generic, TypeVar

import torch
from torch import nn

from shardwright.profiler.measuring.enqueuing import enqueue_backwards, enqueue_forwards, shares
from shardwright.profiler.measuring.in_a_row import Backwards, BrokenOffError, forwards
from shardwright.profiler.measuring.optimizers import make_optimizer
from shardwright.profiler.measuring.stopwatch import (
    Clock,
    CudaStopwatch,
    Enqueued,
    HostStopwatch,
    QueueFiller,
    Reading,
    Stopwatch,
)
from shardwright.profiler.measuring.subject import Subject, as_input
from shardwright.profiler.measuring.timing import LEAST_REPEATS, Series
from shardwright.profiler.workers.worker import resident

__all__ = ["Goal", "Pass", "Readings", "excess_s", "is_out_of_memory", "measure", "prepare", "round_totals"]

Key = TypeVar("Key")
PHASES = ("forward", "backward_input", "backward_weight", "backward", "update", "recompute")
PARTS = ("backward_input", "backward_weight")
"""Of a backward: they leave its graph for the whole of it."""
UNPARTED = tuple(phase for phase in PHASES if phase not in PARTS)


def excess_s(parts: Sequence[float], together: float) -> float:
    """What each of ``parts`` takes too long by itself: less this, and at least 0, they add up to ``together``, in s.

    It is 0 where they add up to less already.
    """
    ordered = sorted(parts, reverse=True)
    above = sum(ordered)
    for count in range(len(ordered), 0, -1):
        excess = (above - together) / count
        if excess <= ordered[count - 1]:
            return max(0.0, excess)
        above -= ordered[count - 1]  # this part is less than what is taken off
    return 0.0


@dataclass
class Readings(Generic[Key]):
    """What a run of a pass read for one clock."""

    of_steps: dict[Key, dict[str, Reading]]
    """By step and phase."""
    empty: dict[str, Reading] = field(default_factory=dict)
    """By phase, of a backward of nothing that is timed as the steps' are."""
    whole_update: Reading | None = None


class Pass(Generic[Key]):
    """Steps that go forward and back together, as in a training step: those at one number of micro-batches.

    Args:
        subjects: the steps in the order of the forward.
        alike: step -> an earlier one that does the same work; what both take is averaged, as the earlier one's.
        weights: what a step counts in that average; 1 where nothing is said.
        repeated: whether its forwards come one pass after another, as those of micro-batches do in inference. On a CPU
            they are run once before they are timed then, so that code and memory are as the pass before leaves them.

    On a CPU all backwards are one call of PyTorch's engine (:mod:`shardwright.profiler.measuring.in_a_row`). Elsewhere,
    and in its parts, a step that goes back by itself enters the engine once more than it does as a part of a model, and
    its parameters' update calls the optimizer once more. Amid the steps an empty backward is timed, as cold as they
    are, and before their updates one of all parameters at once; what the steps take longer by that is taken off, the
    same for each. Where work is enqueued, all is run once for the device's clock and once for the host's, in which the
    steps follow one another as in a loop and only the updates are called one by one.
    """

    def __init__(
        self,
        subjects: Mapping[Key, Subject],
        *,
        alike: Mapping[Key, Key] | None = None,
        weights: Mapping[Key, float] | None = None,
        repeated: bool = False,
    ) -> None:
        self.subjects = dict(subjects)
        self.repeated = repeated
        self.device = next((subject.device for subject in self.subjects.values()), torch.device("cpu"))
        self.named = {key: (alike or {}).get(key, key) for key in self.subjects}
        self.weights = {key: (weights or {}).get(key, 1.0) for key in self.subjects}
        parted = any(subject.parted for subject in self.subjects.values())
        self.phases = PHASES if parted else UNPARTED
        self.optimizer: torch.optim.Optimizer | None = None
        self.readings: dict[Clock, Readings[Key]] = {}
        """Of the last run."""
        self.excess: dict[Clock, dict[str, list[float]]] = {}
        """By clock and phase."""
        self.pace_s: float | None = None
        """The pace during the last run, where it is taken: the host's in its own turn, where work is enqueued."""
        self.fillers = {"backward": QueueFiller(), "update": QueueFiller()}
        self.in_a_row = not parted
        """Whether steps follow one another in the host's turn."""
        self._anew = False
        """Whether the host's readings begin anew, since they are taken in another way from the last run on."""

    def run(
        self,
        stopwatch: Stopwatch,
        *,
        before: Callable[[Iterable[Subject]], None] = lambda _: None,
        on_refused: Callable[[Key, Exception], None] | None = None,
        pace: Callable[[], float] | None = None,
        broken_off: Callable[[], bool] = lambda: False,
    ) -> None:
        """Time every step once on each clock; see :func:`measure`.

        ``broken_off`` is asked before each step, and in the host's turn before each row of them.
        """
        self.readings = {}
        if self.repeated and isinstance(stopwatch, HostStopwatch):
            unread = Readings[Key]({key: {} for key in self.subjects})
            self._run(("forward",), unread, stopwatch, before, on_refused, broken_off)
        paces = [pace()] if pace is not None else []
        for clock in stopwatch.clocks():
            while True:
                self.readings[clock] = readings = Readings({key: {} for key in self.subjects})
                phases = self.phases
                if clock == "host" and self._enqueue(readings, stopwatch, before, broken_off):
                    phases = ("update",)
                if self._run(phases, readings, stopwatch, before, on_refused, broken_off):
                    break
            if pace is not None:
                paces.append(pace())
        self.pace_s = statistics.fmean(paces[-2:]) if paces else None

    def _enqueue(
        self,
        readings: Readings[Key],
        stopwatch: Stopwatch,
        before: Callable[[Iterable[Subject]], None],
        broken_off: Callable[[], bool],
    ) -> bool:
        """Time on the host's clock all forwards and backwards as in a loop; whether this was done, or broken off.

        It is not with the parts of backwards, nor once it has failed, as for want of memory: which step it is shows
        when each is called by itself.
        """
        if not self.in_a_row or not isinstance(stopwatch, CudaStopwatch):
            return False
        of_steps, alone = readings.of_steps, self.readings["device"]
        train = any(subject.train for subject in self.subjects.values())
        try:
            before(self.subjects.values())
            if not broken_off():
                for key, reading in enqueue_forwards(self.subjects, stopwatch, keeping=train).items():
                    of_steps[key]["forward"] = reading
            before(self.subjects.values())
            if train and not broken_off():
                total_s = enqueue_backwards(self.subjects, stopwatch)
                backwards = {key: found["backward"] for key, found in alone.of_steps.items() if "backward" in found}
                alone_s = {key: _seconds(reading, "host") for key, reading in backwards.items()}
                empty_s = _seconds(alone.empty["backward"], "host") if "backward" in alone.empty else 0.0
                for key, reading in shares(total_s, alone_s, empty_s).items():
                    of_steps[key]["backward"] = reading
            again = {key: subject for key, subject in self.subjects.items() if subject.is_recomputed}
            if again and not broken_off():
                for key, reading in enqueue_forwards(again, stopwatch, keeping=False).items():
                    of_steps[key]["recompute"] = reading
        except Exception:
            self.in_a_row, self._anew = False, True
            of_steps.update({key: {} for key in of_steps})
            for subject in self.subjects.values():
                subject.release()
            return False
        return True

    def _run(
        self,
        phases: Sequence[str],
        readings: Readings[Key],
        stopwatch: Stopwatch,
        before: Callable[[Iterable[Subject]], None],
        on_refused: Callable[[Key, Exception], None] | None,
        broken_off: Callable[[], bool],
    ) -> bool:
        """Time the phases of every step; False if a step was dropped and the others have to begin anew."""
        backwards = Backwards[Key](stopwatch.clock, broken_off) if isinstance(stopwatch, HostStopwatch) else None
        for phase in phases:
            if phase == "update" and not broken_off():
                readings.whole_update = self._update_all(stopwatch)
            if phase in ("forward", "backward", *PARTS):
                before(self.subjects.values())
            if backwards is not None and phase in ("forward", "recompute"):
                self._go_forward(phase, backwards, readings, on_refused)
            elif backwards is not None and phase == "backward":
                if not self._go_back(backwards, readings, on_refused):
                    return False
            else:
                self._call_each(phase, readings, stopwatch, on_refused, broken_off)
        if self.optimizer is None:
            self.optimizer = self._optimizer()
        for subject in self.subjects.values():
            subject.release()
        return True

    def _call_each(
        self,
        phase: str,
        readings: Readings[Key],
        stopwatch: Stopwatch,
        on_refused: Callable[[Key, Exception], None] | None,
        broken_off: Callable[[], bool],
    ) -> None:
        """Time a phase of every step by itself."""
        keys = [*self.subjects] if phase not in ("backward", *PARTS) else [*reversed(self.subjects)]
        for position, key in enumerate(keys):
            if broken_off():
                break
            if phase in ("backward", "backward_input") and position == len(keys) // 2:
                readings.empty[phase] = self._empty_backward(stopwatch)
            if key not in self.subjects:
                continue
            try:
                reading = getattr(self.subjects[key], phase)(stopwatch)
            except Exception as error:
                self._refuse(key, error, on_refused)
                continue
            if reading is not None:
                readings.of_steps[key][phase] = reading

    def _go_forward(
        self,
        phase: str,
        backwards: Backwards[Key],
        readings: Readings[Key],
        on_refused: Callable[[Key, Exception], None] | None,
    ) -> None:
        """Time all forwards in a row, for a backward if there is one, or as they are computed anew."""
        again = phase == "recompute"
        subjects = {key: each for key, each in self.subjects.items() if each.is_recomputed or not again}
        count, keeping = len(subjects), any(subject.train for subject in subjects.values()) and not again

        def before(position: int) -> None:
            if not again and position == count // 2:
                backwards.amid()
            if backwards.broken_off():
                raise BrokenOffError

        def failed(key: Key, error: Exception) -> None:
            self._refuse(key, error, on_refused)
            for gone in subjects.keys() - self.subjects.keys():
                del subjects[gone]

        with contextlib.suppress(BrokenOffError):
            found = forwards(subjects, backwards.clock, keeping=keeping, before=before, on_failed=failed)
            for key, seconds in found.items():
                readings.of_steps[key][phase] = partial(float, seconds)

    def _go_back(
        self, backwards: Backwards[Key], readings: Readings[Key], on_refused: Callable[[Key, Exception], None] | None
    ) -> bool:
        """Time all backwards; False if there was no memory for one, which ends those behind it too."""
        try:
            for key, reading in backwards.run(self.subjects).items():
                readings.of_steps[key]["backward"] = reading
        except BrokenOffError:
            return True
        except Exception as error:
            if backwards.current is None:
                raise
            self._refuse(backwards.current, error, on_refused)
            for subject in self.subjects.values():
                subject.release()
            return False
        if backwards.empty is not None:
            readings.empty["backward"] = backwards.empty
        return True

    def _refuse(self, key: Key, error: Exception, on_refused: Callable[[Key, Exception], None] | None) -> None:
        """Leave out a step that there is no memory for; any other error is raised with its name."""
        if on_refused is None or not is_out_of_memory(error):
            raise RuntimeError(f"{key}: {error}") from error
        self._drop(key)
        on_refused(self.named[key], error)

    def _optimizer(self) -> torch.optim.Optimizer | None:
        """An optimizer of the parameters of all steps, with the state of their own."""
        updated = [subject for subject in self.subjects.values() if subject.optimizer is not None]
        name = next((subject.optimizer_name for subject in updated), None)
        made = make_optimizer(name, [p for subject in updated for p in subject.parameters]) if name else None
        for subject in updated:
            if made is not None and subject.optimizer is not None:
                made.state.update(subject.optimizer.state)
        return made

    def _update_all(self, stopwatch: Stopwatch) -> Reading | None:
        """Time the update of all at once, before one by one: so parameters are as cold as after a backward."""
        if self.optimizer is None:
            return None
        try:
            return self.fillers["update"].time(stopwatch, self.optimizer.step)[1]
        except Exception as error:
            if not is_out_of_memory(error):  # one by one they may fit
                raise
            return None

    def _drop(self, key: Key) -> None:
        """Leave out a step, and those that do the same work."""
        for other in [other for other in self.subjects if self.named[other] == self.named[key]]:
            self.subjects.pop(other).release()
            for readings in self.readings.values():
                del readings.of_steps[other]
        for readings in self.readings.values():
            readings.whole_update = None  # of more than are left
        self.optimizer = None

    def note(self, series: Mapping[Key, Series], *, first: bool) -> None:
        """Add what the last run read, once the stopwatch has finished; of the ``first`` run, its first call."""
        if self._anew:
            self._anew = False
            self.excess.pop("host", None)
            for name in set(self.named.values()) & series.keys():
                series[name].host = None
        for clock, readings in self.readings.items():
            on_clock: Mapping[Key, Series] = series
            if clock == "host":
                on_clock = {}
                for key in readings.of_steps:
                    own = series[self.named[key]]
                    on_clock[self.named[key]] = own.host = own.host or Series()
            # What is made and tuned once is made in the turn of the device, which comes first.
            self._note(clock, self.readings["device"] if first else readings, on_clock, first=first)
        for key, subject in self.subjects.items():
            series[self.named[key]].peak_bytes = subject.peak.bytes

    def _note(self, clock: Clock, readings: Readings[Key], series: Mapping[Key, Series], *, first: bool) -> None:
        """Add what was read on one clock."""
        found: dict[Key, dict[str, list[tuple[float, float]]]] = {}
        for key, read in readings.of_steps.items():
            for phase, reading in read.items():
                taken = self.weights[key], _seconds(reading, clock)
                found.setdefault(self.named[key], {}).setdefault(phase, []).append(taken)
        excess = self.excess.setdefault(clock, {"backward": [], "backward_input": [], "update": []})
        if not first:
            for phase, empty in readings.empty.items():
                excess[phase].append(_seconds(empty, clock))
            if readings.whole_update is not None:
                updates = [seconds for phases in found.values() for _, seconds in phases.get("update", ())]
                excess["update"].append(excess_s(updates, _seconds(readings.whole_update, clock)))
        paced: Clock = "host" if "host" in self.readings else "device"
        for key, phases in found.items():
            means = {f"{phase}_s": _mean(each) for phase, each in phases.items()}
            series[key].add(**means, pace_s=self.pace_s if clock == paced else None, first=first)
            for phase, each in excess.items():
                series[key].excess_s[phase] = statistics.median(each) if each else 0.0

    def _empty_backward(self, stopwatch: Stopwatch) -> Reading:
        """Time the backward of a step that hands on what it gets: one number."""
        leaf = torch.zeros(1, device=self.device, requires_grad=True)
        backward = partial(torch.autograd.backward, [as_input(leaf)], [torch.ones_like(leaf)])
        return self.fillers["backward"].time(stopwatch, backward)[1]


def _mean(taken: Sequence[tuple[float, float]]) -> float:
    """Of (weight, seconds)."""
    return sum(weight * seconds for weight, seconds in taken) / sum(weight for weight, _ in taken)


def _seconds(reading: Reading, clock: Clock) -> float:
    """What was read on ``clock``."""
    if clock == "device":
        return reading()
    assert isinstance(reading, Enqueued)  # a stopwatch that has the host's clock reads all in this way
    return reading.host_s


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device, or the host, had no memory left."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and ("out of memory" in text or "can't allocate memory" in text)


@dataclass(frozen=True)
class Goal:
    """When there has been enough measuring."""

    precision: float = 0.02
    """The half width of the median's 95% confidence interval, relative, at which a step is settled."""
    negligible: float = 0.001
    """A step is settled too when that half width is this part of the time of all steps."""
    repeats: int = 31
    """A step is not timed more often than this."""
    budget_s: float = 45.0
    """Past so many seconds no further round begins, once there are as many as a median needs."""


def measure(
    passes: Sequence[Pass[Key]],
    stopwatch: Stopwatch,
    goal: Goal,
    *,
    on_settled: Callable[[Key, Series], None],
    on_refused: Callable[[Key, Exception], None] | None = None,
    on_round: Callable[[int], None] = lambda _: None,
    before: Callable[[Iterable[Subject]], None] = lambda _: None,
    pace: Callable[[], float] | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> list[float]:
    """Time the steps of all passes in turn until each is settled, after one round to warm up.

    What is settled goes on running as long as another step of its pass is not, which so finds the caches and the
    machine as before. A pass whose steps are all settled is left out: a training step has one number of micro-batches.

    Args:
        on_settled: told each step's series as soon as it needs no more.
        on_refused: told the steps that there is no memory for, and the error, which is raised without it.
        on_round: told the number of each round that is done, 0 for the warm-up.
        before: called with the steps before all their forwards and before all their backwards, its time not counted.
        pace: gives the pace that times go by (:mod:`shardwright.profiler.measuring.pace`), before a pass and after each
            turn.

    Returns:
        The seconds of each round over all steps, the warm-up apart; see :func:`round_totals`.
    """
    series = {key: Series() for steps in passes for key in steps.named.values()}
    open_ = dict.fromkeys(series)

    def refuse(key: Key, error: Exception) -> None:
        assert on_refused is not None  # else the error was raised
        del series[key]
        open_.pop(key, None)
        on_refused(key, error)

    start = clock()
    for round_ in range(max(1, goal.repeats) + 1):
        running = [steps for steps in passes if not open_.keys().isdisjoint(steps.named.values())]
        for steps in running:
            steps.run(stopwatch, before=before, on_refused=refuse if on_refused is not None else None, pace=pace)
        stopwatch.finish()
        for steps in running:
            steps.note(series, first=round_ == 0)
        on_round(round_)
        whole = sum(s.slower.median_s() for s in series.values())
        ended = round_ >= min(goal.repeats, LEAST_REPEATS) and clock() - start > goal.budget_s
        for key in list(open_):
            enough = series[key].slower.is_settled(goal.precision, goal.negligible * whole)
            if round_ and (enough or ended or round_ >= goal.repeats):
                del open_[key]
                on_settled(key, series[key])
        if not open_:
            break
    return round_totals([each.slower for each in series.values()])


def round_totals(series: Sequence[Series]) -> list[float]:
    """The seconds that each round takes over all steps, of which some were left out of the later rounds.

    For those the round's other steps speak: they take as many times their medians as what did run took of its own.
    """
    totals = [each.observed() for each in series]
    medians = [statistics.median(each) if each else 0.0 for each in totals]
    found = []
    for round_ in range(max(map(len, totals), default=0)):
        ran = [number for number, each in enumerate(totals) if len(each) > round_]
        share = sum(medians[number] for number in ran)
        seconds = sum(totals[number][round_] for number in ran)
        found.append(seconds * (sum(medians) / share) if share else seconds)
    return found


def prepare(device: str, threads: int) -> None:
    """Make this process ready to measure on ``device``: what a worker does first.

    A GPU's libraries take their workspaces then, which are no model's; how many bytes is ``resident``.
    """
    torch.manual_seed(0)
    if device.startswith("cuda"):
        torch.cuda.set_device(torch.device(device))
        nn.Linear(64, 64, device=device)(torch.randn(64, 64, device=device)).sum().backward()
        resident["workspace_bytes"] = torch.cuda.memory_allocated(device)
    else:
        torch.set_num_threads(threads)
    resident["device"] = torch.device(device if device.startswith("cuda") else "cpu")
