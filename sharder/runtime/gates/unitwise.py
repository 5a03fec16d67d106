"""The gate unit by unit: the unsharded model is computed a unit at a time, beside what a pipeline's stages gave.

So a model is compared that has room nowhere as a whole. And where a pipeline differs, its stages are observed, in
further steps, a part of the forward at a time, until the first unit that differs is found: in the order of the forward,
then in that of the backward.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import Tensor, nn

from shardwright.errors import ShardwrightError
from shardwright.profiler.recording.equality import largest_value
from shardwright.profiler.recording.inputs import outputs_of
from shardwright.profiler.recording.unitgraph import UnitGraph
from shardwright.sharder.runtime.gates.comparing import DifferenceError, compare, differing
from shardwright.sharder.runtime.gates.streaming import (
    begin_stream,
    end_stream,
    references,
    stream_backward,
    stream_forward,
    stream_glue,
    stream_gradients,
    stream_outputs,
)
from shardwright.sharder.runtime.pipeline import Comparison
from shardwright.sharder.runtime.piping.cut import Instruction, whole_program
from shardwright.sharder.runtime.piping.engine import names_by_tensor
from shardwright.sharder.runtime.record import Equality
from shardwright.sharder.runtime.session import COPIES, Session, Split

__all__ = ["UnitByUnit"]

OBSERVED_BYTES = 1 << 30
"""So much of what the stages make is looked at in one step, or one unit's."""


class _Segment(NamedTuple):
    """Instructions up to a call of modules, or to the end."""

    start: int
    end: int
    modules: tuple[str, ...]
    """What the last instruction calls."""


DRAWS = ", which draws random numbers, and they are others in each run: give them to the model as an input"
Observed = dict[tuple[str, int], dict[int, dict[int, Tensor]]]
"""By step and micro-batch: of each stage, by which of the tensors it is."""


class UnitByUnit:
    """One comparison of ``split``, whose stages ``found`` outputs and gradients, with the unsharded model.

    Args:
        other_kernels: whether some of them were computed on another kind of device than the model is here.
    """

    def __init__(self, session: Session, split: Split, found: list[Comparison], *, other_kernels: bool) -> None:
        assert split.capture is not None
        self.session, self.split, self.found, self.other_kernels = session, split, found, other_kernels
        self.capture: UnitGraph = split.capture
        program = whole_program(self.capture)
        self.modules = {name: it for name, it in program.attributes.items() if isinstance(it, nn.Module)}
        self.glue = {name: it for name, it in program.attributes.items() if name not in self.modules}
        self.program = program.calling(self.glue)
        self.segments = list(self._segmented())
        self.inputs = {shape.name for shape in program.inputs}
        self.names = names_by_tensor(session.model)
        self.largest_gradient = max((largest_value(t) for each in found for t in each.gradients.values()), default=0.0)
        self.places = _Places(split)
        self.tallies: list[Equality] = []
        self.drawing: set[str] = set()
        """Steps that were seen to draw random numbers."""
        # Parameter -> of how many calls, and of the glue, a gradient is still to come; and the sum of those that came.
        self.awaited = Counter(id(it) for it in self.glue.values() if isinstance(it, nn.Parameter))
        for segment in self.segments:
            self.awaited.update({id(p) for name in segment.modules for p in self.modules[name].parameters()})
        self.sums: dict[int, Tensor] = {}

    def _segmented(self) -> Iterator[_Segment]:
        start = 0
        attributes = {i.name: str(i.target) for i in self.program.instructions if i.op == "get_attr"}
        held = {name: target for name, target in attributes.items() if target in self.modules}
        for position, instruction in enumerate(self.program.instructions):
            called = tuple(held[name] for name in references(instruction) if name in held)
            if instruction.op == "call_module":
                called = tuple(dict.fromkeys((str(instruction.target), *called)))
            if called and instruction.op != "output":
                yield _Segment(start, position + 1, called)
                start = position + 1
        yield _Segment(start, len(self.program.instructions), ())

    def check_room(self, free: int) -> None:
        """Refuse where not even one unit has room, with what passes between units.

        Raises:
            ShardwrightError: so it is; both numbers are named.
        """
        train = self.split.plan.train
        largest = max(
            sum(sum(t.nbytes for t in (*self.modules[n].parameters(), *self.modules[n].buffers())) for n in s.modules)
            for s in self.segments
        )
        between = sum(value.held_bytes for value in self.capture.values.values()) * self.split.plan.microbatches
        needed = COPIES * ((1 + train) * largest + between)
        if needed > free:
            raise ShardwrightError(
                "nothing has room for the whole model, and to compare with it a unit at a time in the host's memory "
                f"takes {needed:,} bytes, of which {free:,} are free: run where there is more, or use pipeline(), "
                "which compares nothing"
            )

    def compared(self, call: Callable[..., Any], *, observing: bool) -> Equality:
        """Compute the model by ``call``, which calls a function in a worker, and compare.

        Args:
            observing: whether the stages take further steps, in which all that their steps make is compared too.

        Raises:
            DifferenceError: something differs; when ``observing``, the first unit or step that does.
        """
        plan = self.split.plan
        inputs = tuple(outputs_of((self.session.args, self.session.kwargs)))
        call(begin_stream, self.program, inputs, plan.microbatches, plan.train, observing)
        self._forward(call, observing=observing)
        self._tally(Comparison(call(stream_outputs), {}), [Comparison(each.outputs, {}) for each in self.found])
        if plan.train:
            self._backward(call, observing=observing)
        call(end_stream)
        tallies = self.tallies
        return Equality(
            outputs=max(each.outputs for each in tallies),
            gradients=max(each.gradients for each in tallies),
            tolerance=max(each.tolerance for each in tallies),
            tensors=sum(each.tensors for each in tallies),
            how="unit by unit",
        )

    def _tally(self, reference: Comparison, found: list[Comparison]) -> None:
        options: dict[str, Any] = {"other_kernels": self.other_kernels, "largest_gradient": self.largest_gradient}
        self.tallies.append(compare(reference, found, **options))

    def _forward(self, call: Callable[..., Any], *, observing: bool) -> None:
        for group in self._grouped(self.segments) if observing else [self.segments]:
            names = frozenset(self._names(*group)) if observing else frozenset[str]()
            seen = self._observed(names, gradients=False) if observing else {}
            for segment in group:
                wanted = names & frozenset(self._names(segment))
                made = call(stream_forward, segment.start, segment.end, self._called(segment), wanted)
                for name in self._names(segment) if observing else ():
                    self._check_made(name, made, seen)

    def _backward(self, call: Callable[..., Any], *, observing: bool) -> None:
        for group in self._grouped(self.segments[::-1]) if observing else [self.segments[::-1]]:
            seen = self._observed(frozenset(self._names(*group)), gradients=True) if observing else {}
            for segment in group:
                names = self._names(segment)[::-1]
                called = [names.pop(0)] if segment.modules else []
                if observing:
                    self._check_gradients(called, call, seen)
                if called:
                    found = call(stream_backward, segment.end - 1, self._called(segment))
                    with self._blamed(f"{self.places.of(called[0])} in the backward", observing):
                        self._gather(segment, found)
                if observing:
                    self._check_gradients(names, call, seen)
        for name, gradient in call(stream_glue).items():
            self._add(id(self.glue[name]), gradient)
        with self._blamed("a step between units in the backward", observing):
            for parameter in [id(it) for it in self.glue.values() if isinstance(it, nn.Parameter)]:
                self._finish(parameter)

    # Gradients of parameters

    def _gather(self, segment: _Segment, found: dict[tuple[str, str], Tensor]) -> None:
        """Add up the gradients of the parameters that ``segment`` calls, and compare those to which no more comes."""
        own = {(path, name): id(p) for path in segment.modules for name, p in self.modules[path].named_parameters()}
        for key, gradient in found.items():
            self._add(own[key], gradient)
        for parameter in dict.fromkeys(own.values()):
            self._finish(parameter)

    def _add(self, parameter: int, gradient: Tensor) -> None:
        self.sums[parameter] = self.sums[parameter] + gradient if parameter in self.sums else gradient

    def _finish(self, parameter: int) -> None:
        """One of those that bring gradients of ``parameter`` is done; after the last the sum is compared."""
        self.awaited[parameter] -= 1
        expected = self.sums.get(parameter)
        if self.awaited[parameter] or expected is None:
            return
        del self.sums[parameter]
        names = sorted(self.names[parameter])
        given = [
            Comparison([], {name: each.gradients[name] for name in names if name in each.gradients})
            for each in self.found
        ]
        self._tally(Comparison([], dict.fromkeys(names, expected)), given)

    # What the stages' steps make

    def _names(self, *segments: _Segment) -> list[str]:
        """Of the steps, in order; attributes and the output are none."""
        instructions = (i for each in segments for i in self.program.instructions[each.start : each.end])
        return [i.name for i in instructions if i.op not in ("get_attr", "output")]

    def _called(self, segment: _Segment) -> dict[str, nn.Module]:
        return {name: self.modules[name] for name in segment.modules}

    def _grouped(self, segments: Sequence[_Segment]) -> Iterator[list[_Segment]]:
        """As many at a time as there is room for."""
        sizes: Counter[str] = Counter()
        for value in self.capture.values.values():
            sizes[value.node.name] += value.bytes * self.split.plan.microbatches
        group: list[_Segment] = []
        taken = 0
        for segment in segments:
            size = sum(sizes[name] for name in self._names(segment))
            if group and taken + size > OBSERVED_BYTES:
                yield group
                group, taken = [], 0
            group.append(segment)
            taken += size
        yield group

    def _observed(self, names: frozenset[str], *, gradients: bool) -> Observed:
        """What the stages make in one more step, with the micro-batches counted over all replicas."""
        plan = self.split.plan
        replica_of = {device: number for number, devices in enumerate(plan.pipelines) for device in devices}
        found: Observed = {}
        for device, (seen, drawing) in zip(
            plan.devices, self.session.observe(self.split, names, gradients=gradients), strict=True
        ):
            self.drawing |= drawing
            for key, tensors in seen.items():
                number = replica_of[device] * plan.pipeline_microbatches + key.microbatch
                found.setdefault((key.step, number), {})[key.stage] = tensors
        return found

    def _check_made(self, name: str, made: dict[tuple[str, int], list[Tensor]], seen: Observed) -> None:
        """Hold what a step made, and what stages received of that, against the model's."""
        for number in range(self.split.plan.microbatches):
            expected = dict(enumerate(made.get((name, number), [])))
            for stage, tensors in sorted(seen.get((name, number), {}).items()):
                if self.places.makes(stage, name):
                    who, what = self.places.of(name, number), "its output"
                else:  # the first stage receives the model's inputs
                    who = f"what {self.places.stage(stage, number)} receives"
                    what = self.places.step(name) if name in self.inputs else f"the output of {self.places.step(name)}"
                for index in sorted(tensors.keys() & expected.keys()):
                    chance = DRAWS if name in self.drawing else ""
                    with self._blamed(f"{who} in the forward{chance}"):
                        self._differing(f"{what} for micro-batch {number}", expected[index], tensors[index])

    def _check_gradients(self, names: Sequence[str], call: Callable[..., Any], seen: Observed) -> None:
        """Hold the gradients that come to what steps made against the model's, at both ends of a link between."""
        expected = call(stream_gradients, frozenset(names))
        for name, number in itertools.product(names, range(self.split.plan.microbatches)):
            known = expected.get((name, number), {})
            for stage, tensors in sorted(seen.get((name, number), {}).items(), reverse=True):
                who = self._who_brings(name, stage, number)
                what = f"the gradient that comes to {self.places.of(name, number)} for micro-batch {number}"
                for index in sorted(tensors.keys() & known.keys()) if who else ():
                    with self._blamed(f"{who} in the backward"):
                        self._differing(what, known[index], tensors[index], other_order=True)

    def _who_brings(self, name: str, stage: int, number: int) -> str:
        """Who brings the gradient that ``stage`` has of what ``name`` made: those that read it, where that is all of
        it, or the link over which all of it comes; nobody, where it is but a part."""
        readers = [i.name for i in self.program.instructions if name in references(i)]
        there = [self.places.made_in.get(reader, self.places.last) for reader in readers]
        maker = self.places.made_in.get(name, 0)
        if stage == maker and readers and min(there) > maker:
            return f"what {self.places.stage(stage, number)} receives"
        if stage > maker + 1 or (stage == maker + 1 and min(there, default=stage) == maker):
            return ""
        return " or ".join(self.places.of(reader, number) for reader in readers)

    def _differing(self, what: str, expected: Tensor, found: Tensor, *, other_order: bool = False) -> None:
        differing(what, expected, found, other_kernels=self.other_kernels, other_order=other_order)

    @contextmanager
    def _blamed(self, who: str, observing: bool = True) -> Iterator[None]:
        try:
            yield
        except DifferenceError as error:
            if not observing:
                raise
            raise DifferenceError(f"the first to differ is {who}: {error}") from error


class _Places:
    """Where the steps of a pipeline are, in words."""

    def __init__(self, split: Split) -> None:
        assert split.capture is not None
        self.plan = split.plan
        self.steps = {node.name: step for node, step in split.capture.step_of().items()}
        self.last = split.programs[-1].index
        self.made_in = {i.name: p.index for p in split.programs for i in p.instructions if _makes(i)}

    def makes(self, stage: int, name: str) -> bool:
        """Whether ``stage`` makes what ``name`` says, and does not receive it."""
        return self.made_in.get(name) == stage

    def step(self, name: str) -> str:
        """A unit by its path, a step between units by its function and where it is called."""
        step = self.steps.get(name)
        if step is None:
            return "the loss" if name == "output" else name
        return step.name if step.kind in ("unit", "input") or not step.site else f"{step.type} at {step.site}"

    def stage(self, stage: int, number: int = 0) -> str:
        """A stage with its device, that of the replica which has the micro-batch."""
        pipeline = self.plan.pipelines[number // self.plan.pipeline_microbatches]
        return f"stage {stage} on {pipeline[stage % len(pipeline)]}"

    def of(self, name: str, number: int = 0) -> str:
        """A step with its stage."""
        stage = self.made_in.get(name)
        return self.step(name) if stage is None else f"{self.step(name)} ({self.stage(stage, number)})"


def _makes(instruction: Instruction) -> bool:
    return instruction.op not in ("placeholder", "get_attr", "output")
