"""Steps in a row, as in a training step: their forwards one after another, their backwards in one call of the engine.

A step that is called by itself finds the processor's caches without what it needs: between two of them inputs are made
and outputs are taken care of, and each backward enters PyTorch's engine. Small layers took up to a third longer in that
way (docs/accuracy.md). So between two forwards there is a look at the clock, the next one's inputs are written, as the
layer before would have done, and nothing else.

In one call the engine takes first what was made last, so that of steps whose forwards came one after another the last
goes back first, and each is done before the next begins; an output that is a parameter goes before all others. Hooks
of the outputs look at the clock there.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from shardwright.profiler.measuring.stopwatch import Reading
from shardwright.profiler.measuring.subject import Subject, as_input

__all__ = ["Backwards", "BrokenOffError", "forwards"]

Key = TypeVar("Key")


class BrokenOffError(Exception):
    """The rest is not wanted."""


def forwards(
    subjects: dict[Key, Subject],
    clock: Callable[[], float],
    *,
    keeping: bool,
    ahead: bool = False,
    before: Callable[[int], None] = lambda _: None,
    on_failed: Callable[[Key, Exception], None] | None = None,
) -> dict[Key, float]:
    """Seconds of each forward, in their order; with ``keeping`` the outputs are held for a backward.

    Args:
        ahead: whether inputs are made before all forwards, and not before each, just written as by a layer before.
        before: called with the number of the step before each forward.
        on_failed: told a step and its error, which is raised without it; takes out of ``subjects`` what is not to be
            called any more, the step at least.
    """
    ready: dict[Key, Callable[[], Any]] = {}
    outputs: dict[Key, Any] = {}
    seconds: dict[Key, float] = {}

    def call(key: Key) -> None:
        function = ready.pop(key) if ahead else subjects[key].prepared(keeping=keeping)
        begin = clock()
        output = function()
        seconds[key] = clock() - begin
        if keeping:
            outputs[key] = output

    with torch.set_grad_enabled(keeping):
        if ahead:
            ready |= {key: subject.prepared(keeping=keeping) for key, subject in subjects.items()}
        for position, key in enumerate([*subjects]):
            before(position)
            if key not in subjects:
                continue
            try:
                call(key)  # its inputs are let go of with it
            except Exception as error:
                if on_failed is None:
                    raise
                on_failed(key, error)
    for key in outputs.keys() & subjects.keys():
        subjects[key].hold(outputs[key])
    return {key: each for key, each in seconds.items() if key in subjects}


class Backwards(Generic[Key]):
    """One backward of all steps whose forwards were just run, in order.

    Args:
        clock: gives seconds.
        broken_off: asked before each backward; :class:`BrokenOffError` is raised if it says so.

    Only for devices on which the engine computes in the thread that calls it, as CPUs are: nothing is waited for.
    """

    def __init__(self, clock: Callable[[], float], broken_off: Callable[[], bool] = lambda: False) -> None:
        self.clock = clock
        self.broken_off = broken_off
        self.current: Key | None = None
        """The step that goes back, or the one that failed."""
        self.empty: Reading | None = None
        """Of a step that hands on what it gets: so much of each is the looking at the clock."""
        self._first, self._amid = self._nothing(), self._nothing()
        self._marks: list[tuple[Key | None, float, float]] = []
        """At each output: of which step, when what came before it ended, and when it began."""
        self._handles: list[RemovableHandle] = []

    def amid(self) -> None:
        """Have the backward of nothing come here, between the forward before and the next one."""
        self._amid = self._nothing()

    def run(self, subjects: Mapping[Key, Subject]) -> dict[Key, Reading]:
        """Go back through all, and let them go; what each took."""
        if not any(subject.outputs for subject in subjects.values()):
            return {}
        outputs, gradients = [self._first, self._amid], [torch.ones(1), torch.ones(1)]
        try:
            for output in outputs:  # the first goes back last, since leaving the engine is no step's
                self._mark_at(output, None)
            for key, subject in subjects.items():
                if subject.outputs:
                    for output in subject.outputs:
                        self._mark_at(output, key)
                    subject.let_go_gradients()
                    outputs += subject.outputs
                    gradients += [g.clone() if _is_nested(g) else g for g in subject.begin_backward()]
            torch.autograd.backward(outputs, gradients)
        finally:
            for handle in self._handles:  # an output may be a parameter, which stays
                handle.remove()
        return self._readings()

    def _readings(self) -> dict[Key, Reading]:
        seconds: dict[Key | None, float] = {}
        for (key, _, begin), (_, end, _) in itertools.pairwise(self._marks):
            seconds[key] = seconds.get(key, 0.0) + end - begin
        empty_s = seconds.pop(None, 0.0)
        self.empty = partial(float, empty_s)
        marks = Counter(key for key, *_ in self._marks)
        found: dict[Key, Reading] = {}
        for key, each in seconds.items():
            assert key is not None
            found[key] = partial(float, max(0.0, each - (marks[key] - 1) * empty_s))
        return found

    def _mark_at(self, output: Tensor, key: Key | None) -> None:
        """Look at the clock before anything else is done with the gradient of ``output``."""
        hooks: Any = output
        others = [*(hooks._backward_hooks or {}).items()]
        for number, _ in others:
            del hooks._backward_hooks[number]
        self._handles.append(output.register_hook(partial(self._mark, key)))
        hooks._backward_hooks.update(others)

    def _mark(self, key: Key | None, gradient: Tensor) -> Tensor | None:
        end = self.clock()
        self.current = key
        if self.broken_off():
            raise BrokenOffError
        # Written just now, as what comes from the step behind is; the engine takes no nested one from a hook.
        written = None if _is_nested(gradient) else gradient.clone()
        self._marks.append((key, end, self.clock()))
        return written

    @staticmethod
    def _nothing() -> Tensor:
        return as_input(torch.zeros(1, requires_grad=True))


def _is_nested(tensor: Tensor) -> bool:
    return tensor.is_nested and tensor.layout == torch.strided
