"""Memory, counted exactly: a mode that follows every storage from its making to its death, and what one step takes.

What a kernel takes and gives back inside one operation of ATen is not seen. On the CPU nothing else is missing: the
tests hold the counter against the allocator's own events.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Container, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass

from shardwright.files import Record
from shardwright.profiler.measuring.parted import edges_of, inputs_first
from shardwright.profiler.recording.compiler import compiler_spared
from shardwright.profiler.recording.structure import dense_parts, map_tensors, nbytes, tensors_in
from shardwright.profiler.recording.unitgraph import Call

__all__ = ["CUDA_BLOCK_BYTES", "MemoryCounter", "StepMemory", "count_step", "storages_of", "total_bytes"]

CUDA_BLOCK_BYTES = 512
"""PyTorch's CUDA allocator rounds each request up to a multiple of it (``kMinBlockSize``, CUDACachingAllocator)."""


_LIFTS = (torch.ops.aten.lift_fresh.default, torch.ops.aten.lift.default)
"""What they give is what ``torch.tensor`` and ``torch.from_numpy`` have made, first seen there; or a fake of it."""


def storages_of(tensor: Tensor) -> list[torch.UntypedStorage]:
    """The storages that hold ``tensor``'s numbers: one, those of its parts if it is sparse or a wrapper, or none."""
    if type(tensor) not in (Tensor, nn.Parameter) and is_traceable_wrapper_subclass(tensor):
        names, _ = tensor.__tensor_flatten__()
        return [storage for name in names for storage in storages_of(getattr(tensor, name))]
    try:
        return [part.untyped_storage() for part in dense_parts(tensor)]
    except (NotImplementedError, RuntimeError):  # an opaque layout
        return []


def total_bytes(tensors: Iterable[Tensor], *, granularity: int = 1) -> int:
    """Bytes of the storages of ``tensors``, each counted once and rounded up to ``granularity``."""
    found = {storage._cdata: storage for tensor in tensors for storage in storages_of(tensor)}
    return sum(_rounded(storage.nbytes(), granularity) for storage in found.values())


def _rounded(size: int, granularity: int) -> int:
    return -(-size // granularity) * granularity


@compiler_spared
class MemoryCounter(TorchDispatchMode):
    """Counts the bytes of live storages: those that operations make while the mode is on, until they die.

    Views cost nothing, changes in place neither; a storage that is resized counts with its new size. It works on real,
    fake and meta tensors alike, and in a backward on the CPU, which runs in the calling thread.

    Args:
        count_existing: count storages that were made before, from when an operation first takes them.
        granularity: bytes that each storage is rounded up to, as an allocator does.
    """

    supports_higher_order_operators = True

    def __init__(self, *, count_existing: bool = False, granularity: int = 1) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live_bytes = 0
        self.peak_bytes = 0
        self._count_existing = count_existing
        self._granularity = granularity
        # By the storage's address, which is its own as long as it lives.
        self._sizes: dict[int, int | None] = {}
        self._deaths: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def bytes_of(self, tensors: Iterable[Tensor], *, apart_from: Container[int] = ()) -> int:
        """What the storages of ``tensors`` count here, each once; ``apart_from`` are addresses to leave out."""
        keys = {storage._cdata for tensor in tensors for storage in storages_of(tensor)}
        return sum(self._sizes.get(key) or 0 for key in keys if key not in apart_from)

    def mark(self) -> None:
        """Begin anew: ``peak_bytes`` is the most from now on."""
        self.peak_bytes = self.live_bytes

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        taken = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if func in _LIFTS:
            taken = []
        for tensor in taken:
            self._see(tensor, counts=self._count_existing)
        result = func(*args, **kwargs)
        for tensor in (*taken, *(leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor))):
            self._see(tensor, counts=True)
        return result

    def _see(self, tensor: Tensor, *, counts: bool) -> None:
        for storage in storages_of(tensor):
            key = storage._cdata
            if key not in self._sizes:
                self._sizes[key] = 0 if counts else None
                self._deaths[key] = weakref.ref(storage, partial(self._died, key))
            known = self._sizes[key]
            if known is not None:  # else it was there before
                size = _rounded(storage.nbytes(), self._granularity)
                self._sizes[key] = size
                self._grow(size - known)

    def _died(self, key: int, _storage: weakref.ref[torch.UntypedStorage]) -> None:
        del self._deaths[key]
        self._grow(-(self._sizes.pop(key) or 0))

    def _grow(self, size: int) -> None:
        self.live_bytes += size
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)


class StepMemory(Record):
    """Bytes that one call of a step takes beside its inputs, its parameters and their gradients."""

    output_bytes: int
    """Storages that its outputs have and its inputs have not."""
    saved_bytes: int
    """What the backward holds when inputs, outputs and parameters are left out."""
    forward_peak_bytes: int
    """The most that the forward takes at once beyond what it leaves: outputs and saved tensors."""
    backward_peak_bytes: int = 0
    """The most that the backward takes at once beyond what it begins with: saved tensors and the outputs' gradients."""
    gradient_bytes: int = 0
    """Storages of the gradients that the backward leaves for the inputs; some of them may be those of the outputs."""
    deferred_bytes: int | None = None
    """Of a backward in two parts, storages of the gradients that are held between them; those of the outputs count."""


def count_step(call: Call, *, train: bool, called_again: bool = False, parted: bool = False) -> StepMemory:
    """Run a step once, forward and backward, and count what it takes.

    It runs where its tensors are, on fake tensors too. Gradients of the parameters are there from before, as they are
    from the second micro-batch on; they are put back afterwards, while what a forward writes into buffers is not.

    Args:
        call: the step.
        train: whether it runs backward too.
        called_again: whether a later call uses the same parameters, so that autograd adds up two gradients of each.
        parted: whether to run forward and backward once more, in two parts
            (:mod:`shardwright.profiler.measuring.parted`).
    """
    leaves, spec = pytree.tree_flatten((call.args, call.kwargs))
    gradients: list[Tensor] = []
    parameters = _trained(call.function) if train else []
    adding = _adding(parameters) if called_again else nullcontext()
    with _modes_of(call, leaves), _gradients_present(parameters), adding, torch.set_grad_enabled(train):
        given = [map_tensors(lambda t: _Given.apply(t, gradients.append), leaf) for leaf in leaves]  # type: ignore[no-untyped-call]
        counter = MemoryCounter()
        with counter:
            output = _run(call, *pytree.tree_unflatten(given, spec))
        forward_peak = counter.peak_bytes - counter.live_bytes
        apart = {storage._cdata for _, tensor in tensors_in(given) for storage in storages_of(tensor)}
        output_bytes = counter.bytes_of((t for _, t in tensors_in(output)), apart_from=apart)
        ends = [tensor for _, tensor in tensors_in(output) if tensor.requires_grad] if train else []
        end = _Ends.apply(*ends) if ends else None  # type: ignore[no-untyped-call]
        output_gradients = sum(nbytes(tensor) for tensor in ends)
        del output, ends, given
        if end is None:
            saved = counter.live_bytes if train else 0
            return StepMemory(output_bytes=output_bytes, saved_bytes=saved, forward_peak_bytes=forward_peak)
        saved = counter.live_bytes
        counter.mark()
        gradient = torch.ones_like(end)
        with counter:
            torch.autograd.backward(end, gradient)
        deferred = _deferred_bytes(call, leaves, spec, parameters) if parted else None
    return StepMemory(
        output_bytes=output_bytes,
        saved_bytes=saved,
        forward_peak_bytes=forward_peak,
        backward_peak_bytes=max(0, counter.peak_bytes - saved - output_gradients),
        gradient_bytes=total_bytes(gradients),
        deferred_bytes=deferred,
    )


def _deferred_bytes(call: Call, leaves: list[Any], spec: pytree.TreeSpec, parameters: list[nn.Parameter]) -> int:
    """Storages of what is held between the two parts of a backward."""
    given = [map_tensors(lambda t: _Given.apply(t, lambda _: None), leaf) for leaf in leaves]  # type: ignore[no-untyped-call]
    edges = edges_of(tensor for _, tensor in tensors_in(given))
    output = _run(call, *pytree.tree_unflatten(given, spec))
    ends = [tensor for _, tensor in tensors_in(output) if tensor.requires_grad]
    return total_bytes(inputs_first(ends, [torch.ones_like(t) for t in ends], edges, parameters)[1].held)


def _run(call: Call, args: Any, kwargs: Any) -> Any:
    if call.context is not None:
        return call.context.run(call.function, args, kwargs)
    return call.function(*args, **kwargs)


class _Given(torch.autograd.Function):
    """An input of a step: a copy, as a producer would have written it, that hands on its gradient."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, receive: Callable[[Tensor], None]) -> Tensor:
        ctx.receive = receive
        return tensor.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, None]:
        ctx.receive(gradients[0])
        return None, None


class _Ends(torch.autograd.Function):
    """The readers of a step's outputs: they hold nothing, and make the gradients when the backward begins.

    So nobody but autograd holds these, and it lets go of each as soon as it was used.
    """

    @staticmethod
    def forward(ctx: Any, *outputs: Tensor) -> Tensor:
        ctx.layouts = [(t.shape, t.stride() if _is_dense(t) else None, t.dtype, t.device) for t in outputs]
        return outputs[0].new_zeros(())

    @staticmethod
    def backward(ctx: Any, *_gradients: Tensor) -> tuple[Tensor, ...]:
        return tuple(
            torch.ones(shape, dtype=dtype, device=device)
            if stride is None
            else torch.empty_strided(shape, stride, dtype=dtype, device=device).fill_(1)
            for shape, stride, dtype, device in ctx.layouts
        )


def _is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill their span, in whatever order, so that a gradient is laid out alike."""
    span = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return span == tensor.numel()


def _modes_of(call: Call, leaves: list[Any]) -> AbstractContextManager[Any]:
    """The mode of the fake tensors that take part, or none."""
    tensors = [tensor for _, tensor in tensors_in(leaves)]
    if isinstance(call.function, nn.Module):
        tensors += call.function.parameters()
    return next((tensor.fake_mode for tensor in tensors if isinstance(tensor, FakeTensor)), nullcontext())


def _trained(function: Callable[..., Any]) -> list[nn.Parameter]:
    return [p for p in function.parameters() if p.requires_grad] if isinstance(function, nn.Module) else []


@contextmanager
def _adding(parameters: list[nn.Parameter]) -> Iterator[None]:
    """Each new gradient is copied before it is taken, which is what a sum with another would take."""
    hooks = [parameter.register_hook(Tensor.clone) for parameter in parameters]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _gradients_present(parameters: list[nn.Parameter]) -> Iterator[None]:
    """Parameters with a gradient, of zeros; their own are put back."""
    before = [(parameter, parameter.grad) for parameter in parameters]
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    try:
        yield
    finally:
        for parameter, gradient in before:
            parameter.grad = gradient
