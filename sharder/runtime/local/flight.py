"""A batch's flight through the stages of a pipeline in this process, and the way of its gradients back.

Each stage's graph ends at its borders: what it receives are tensors without a history, and in the backward pass their
gradients go to the stage before. Parameters' gradients are summed by each stage over its micro-batches, then over the
stages, and handed to the caller's backward pass once, so that it accumulates them, and calls the hooks on them, as
without a pipeline. The order is GPipe's (Huang et al., NeurIPS 2019): all forwards, then all backwards.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from shardwright.errors import ShardwrightError
from shardwright.profiler.recording.inputs import is_batched
from shardwright.sharder.runtime.local.pieces import Border, Gradients, Stage
from shardwright.sharder.runtime.local.threads import StageThreads

__all__ = ["Flight", "through"]


class _Done(NamedTuple):
    """A micro-batch that a stage has computed and that waits for its backward."""

    received: tuple[Tensor, ...]
    made: tuple[Tensor, ...]


class Flight:
    """One batch on its way through the stages, and its gradients on their way back.

    Args:
        inputs: the model's input tensors, the whole batch.
        batch: its samples.
        count: the micro-batches.
    """

    def __init__(
        self, stages: Sequence[Stage], threads: StageThreads, inputs: Sequence[Tensor], batch: int, count: int
    ) -> None:
        self.stages, self.threads, self.batch, self.count = stages, threads, batch, count
        self.size = batch // count
        self.batched = [is_batched(t, batch) for t in inputs]
        self.learns = torch.is_grad_enabled()
        self.infers = torch.is_inference_mode_enabled()
        self.inputs = len(inputs)
        self.trained = [stage.trained() if self.learns else [] for stage in stages]
        self.done: dict[tuple[int, int], _Done] = {}
        self.results: list[list[Tensor]] = [[] for _ in range(count)]
        self.given: dict[int, Tensor] = {}
        """The outputs' gradients, by place."""

    def forward(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """The model's outputs, put together, without a history."""

        def step(index: int, number: int, received: Border | None) -> Border:
            stage = self.stages[index]
            values = self._piece(inputs, number) if received is None else cast(tuple[Tensor, ...], received.tensors)
            with torch.inference_mode(self.infers), torch.set_grad_enabled(self.learns), self._told(index, number):
                brought = stage.bring(Border(values, received.ready if received is not None else None))
                there = cast(tuple[Tensor, ...], brought)
                if self.learns:
                    there = tuple(
                        [t.detach().requires_grad_(v.requires_grad) for t, v in zip(there, values, strict=True)]
                    )
                made = stage([_Arrive.apply(t) if t.requires_grad else t for t in there])  # type: ignore[no-untyped-call]
            if self.learns:
                self.done[index, number] = _Done(there, made)
            if index == len(self.stages) - 1:
                self.results[number] = [t.detach() for t in made]
            return stage.send(made)

        with self._in_step():
            self.threads.run(step, range(self.count))
        results, self.results = self.results, []
        return [self._joined(pieces) for pieces in zip(*results, strict=True)]

    def _piece(self, inputs: Sequence[Tensor], number: int) -> tuple[Tensor, ...]:
        """The inputs of a micro-batch. Changes in place are counted for each apart, since they change no other."""
        at = slice(number * self.size, (number + 1) * self.size)
        pieces = [t.data[at] if batched else t.data for t, batched in zip(inputs, self.batched, strict=True)]
        return tuple([p.requires_grad_() if t.requires_grad else p for p, t in zip(pieces, inputs, strict=True)])

    def _joined(self, pieces: Sequence[Tensor]) -> Tensor:
        for piece in pieces:
            if piece.device.type == "cuda":
                piece.record_stream(torch.cuda.current_stream(piece.device))
        return torch.cat(list(pieces)) if len(pieces) > 1 else pieces[0]

    def has_history(self) -> list[bool]:
        """By output, whether a gradient can be given to it."""
        last = [self.done[len(self.stages) - 1, number].made for number in range(self.count)] if self.learns else []
        return [any(t.requires_grad for t in pieces) for pieces in zip(*last, strict=True)]

    def backward(self, wanted: Sequence[bool], *, keep: bool) -> tuple[list[Tensor | None], dict[int, Tensor]]:
        """The gradients of the inputs, in order, and of :meth:`parameters`, by ``id``.

        Args:
            wanted: whether one is, for the inputs and then :meth:`parameters`.
            keep: whether there may be another backward pass.
        """
        if len(self.done) < len(self.stages) * self.count:
            raise ShardwrightError(
                "a second backward through a pipelined forward, which keeps nothing after the first: call the first "
                "with retain_graph=True"
            )
        asked = {id(p) for p, want in zip(self.parameters(), wanted[self.inputs :], strict=True) if want}
        of_inputs: list[Gradients] = [()] * self.count
        sums = [_Sums() for _ in self.stages]

        def step(index: int, number: int, received: Border | None) -> Border:
            stage = self.stages[index]
            done = self.done[index, number] if keep else self.done.pop((index, number))
            with self._told(index, number):
                arriving = Border(self._given(number, len(done.made)), None) if received is None else received
                trained = [t for t in self.trained[index] if id(t) in asked]
                brought = stage.bring(arriving)
                with stage.going_back():
                    back, own = _backward(done, brought, trained, keep=keep)
            for parameter, gradient in zip(trained, own, strict=True):
                sums[index].add(id(parameter), gradient)
            if index == 0:
                of_inputs[number] = back
            return stage.send(back)

        with _quiet([t for trained in self.trained for t in trained]), self._in_step():
            self.threads.run(step, reversed(range(self.count)), backward=True)
        total = _Sums()
        for own in sums:
            for key, gradient in own.held.items():
                total.add(key, gradient)
        return [self._of_input(place, pieces) for place, pieces in enumerate(zip(*of_inputs, strict=True))], total.held

    def parameters(self) -> list[Tensor]:
        """Of all stages, each once."""
        return list({id(t): t for trained in self.trained for t in trained}.values())

    def _given(self, number: int, outputs: int) -> Gradients:
        """The gradients of a micro-batch's outputs."""
        at = slice(number * self.size, (number + 1) * self.size)
        return tuple([self.given[place][at] if place in self.given else None for place in range(outputs)])

    def _of_input(self, place: int, pieces: Gradients) -> Tensor | None:
        found = [piece for piece in pieces if piece is not None]
        if not found:
            return None
        if not self.batched[place]:
            return torch.stack(found).sum(0)
        return torch.cat([torch.zeros_like(found[0]) if piece is None else piece for piece in pieces])

    @contextmanager
    def _told(self, index: int, number: int) -> Iterator[None]:
        """An error says where it was."""
        try:
            yield
        except Exception as error:
            error.add_note(
                f"in stage {index} of {len(self.stages)} on {self.stages[index].device}, "
                f"micro-batch {number} of {self.count}"
            )
            raise

    @contextmanager
    def _in_step(self) -> Iterator[None]:
        """The stages' GPUs, which work on their default streams, begin after the caller's streams and end before."""
        gpus = {stage.device for stage in self.stages if stage.device.type == "cuda"}
        for gpu in gpus:
            torch.cuda.default_stream(gpu).wait_stream(torch.cuda.current_stream(gpu))
        yield
        for gpu in gpus:
            torch.cuda.current_stream(gpu).wait_stream(torch.cuda.default_stream(gpu))


def _backward(
    done: _Done, gradients: Gradients, trained: list[Tensor], *, keep: bool
) -> tuple[Gradients, Sequence[Tensor | None]]:
    """Gradients of what the stage received, in order, and of what it trains."""
    pairs = [(t, g) for t, g in zip(done.made, gradients, strict=True) if t.requires_grad and g is not None]
    leaves = [t for t in done.received if t.requires_grad]
    if not pairs or not (leaves or trained):
        return (None,) * len(done.received), [None] * len(trained)
    found = torch.autograd.grad(
        [t for t, _ in pairs], [*leaves, *trained], [g for _, g in pairs], retain_graph=keep, allow_unused=True
    )
    back = iter(found[: len(leaves)])
    return tuple([next(back) if t.requires_grad else None for t in done.received]), found[len(leaves) :]


class _Sums:
    """Gradients summed, by ``id`` of the parameter."""

    def __init__(self) -> None:
        self.held: dict[int, Tensor] = {}
        self._own: set[int] = set()
        """The sums that are tensors of our own, and are added to in place; a first gradient may be shared."""

    def add(self, key: int, gradient: Tensor | None) -> None:
        """Add one gradient, where there is one."""
        if gradient is None:
            return
        earlier = self.held.get(key)
        if earlier is None:
            self.held[key] = gradient
        elif key in self._own and gradient.layout == torch.strided:
            earlier.add_(gradient.to(earlier.device))
        else:
            # A sparse tensor cannot be added to by a dense one.
            swapped = earlier.layout != torch.strided and gradient.layout == torch.strided
            there = gradient.to(earlier.device)
            self.held[key] = there + earlier if swapped else earlier + there
            if self.held[key].layout == torch.strided:
                self._own.add(key)


@contextmanager
def _quiet(trained: Sequence[Tensor]) -> Iterator[None]:
    """The hooks on parameters rest: the caller's backward calls them, once, with the whole gradient."""
    hooks = {id(t): t._backward_hooks for t in trained if t._backward_hooks}
    kept = [(held, dict(held)) for held in hooks.values()]
    for held in hooks.values():
        held.clear()
    try:
        yield
    finally:
        for held, content in kept:
            held.update(content)


class _Arrive(torch.autograd.Function):
    """What a stage has received, as no leaf of its graph, which would refuse to be changed in place."""

    @staticmethod
    def forward(_ctx: Any, received: Tensor) -> Tensor:
        return received.detach()

    @staticmethod
    def backward(_ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


class _Through(torch.autograd.Function):
    """Stands in the caller's graph for the whole pipeline, between inputs and parameters and a token on the CPU.

    The token lets PyTorch run this backward in the thread that asked for it. In that of a GPU, which the stages'
    backwards need, it would wait for itself.
    """

    @staticmethod
    def forward(ctx: Any, flight: Flight, *_tensors: Tensor) -> Tensor:
        ctx.flight = flight
        ctx.set_materialize_grads(False)
        return torch.empty(0)

    @staticmethod
    def backward(ctx: Any, _token: Tensor | None) -> Any:
        flight: Flight = ctx.flight
        if torch.is_grad_enabled():
            raise ShardwrightError(
                "gradients of gradients (create_graph=True) do not go through a pipelined forward: place the model "
                "without microbatches"
            )
        keep = torch._C._autograd._get_current_graph_task_keep_graph()
        wanted = ctx.needs_input_grad[1:]
        try:
            of_inputs, sums = flight.backward(wanted, keep=keep)
        finally:
            flight.given = {}
        return (None, *of_inputs, *(sums.pop(id(p), None) for p in flight.parameters()))


class _Deliver(torch.autograd.Function):
    """Hands an output to the caller; its gradient is kept for :class:`_Through`, which follows in the backward."""

    @staticmethod
    def forward(ctx: Any, _token: Tensor, flight: Flight, place: int, outputs: list[Tensor | None]) -> Tensor:
        ctx.flight, ctx.place = flight, place
        ctx.set_materialize_grads(False)
        output, outputs[place] = outputs[place], None  # a reference would close a ring through the graph
        assert output is not None
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None) -> Any:
        if gradient is not None:
            ctx.flight.given[ctx.place] = gradient
            if gradient.device.type == "cuda":
                torch.cuda.default_stream(gradient.device).wait_stream(torch.cuda.current_stream(gradient.device))
        return None, None, None, None


def through(flight: Flight, inputs: Sequence[Tensor]) -> list[Tensor]:
    """The outputs of ``inputs``, with a history if gradients are enabled and anything wants one."""
    outputs: list[Tensor | None] = list(flight.forward(inputs))
    differentiable = flight.has_history()
    if any(differentiable):
        token = _Through.apply(flight, *inputs, *flight.parameters())  # type: ignore[no-untyped-call]
        for place in [place for place, it in enumerate(differentiable) if it]:
            outputs[place] = _Deliver.apply(token, flight, place, outputs)  # type: ignore[no-untyped-call]
    return outputs  # type: ignore[return-value]  # each is there again
