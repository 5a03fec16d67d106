"""The model's inputs: their shapes, which have the batch in their first dimension, and how it is divided."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from shardwright.errors import ShardwrightError, kind_of
from shardwright.profiler.profile import TensorSpec
from shardwright.profiler.recording.equality import same_values
from shardwright.profiler.recording.structure import map_tensors, tensors_in

__all__ = [
    "all_microbatches",
    "batch_size",
    "check_args",
    "copied_inputs",
    "default_counts",
    "input_specs",
    "is_batched",
    "is_mask",
    "microbatch",
    "other_values",
    "outputs_of",
]

FEW_VALUES = 3
"""A floating tensor of so few different values is a mask."""
SOME = 64
"""So many numbers at the beginning of a tensor tell most that are no masks."""


def check_args(args: Any) -> None:
    """Refuse what is no row of arguments: a tensor alone would be taken for its rows.

    Raises:
        ShardwrightError: it is something else.
    """
    if not isinstance(args, (tuple, list)):
        raise ShardwrightError(f"args is {kind_of(args)}; give the inputs of a batch as a tuple, such as args=(x,)")


def input_specs(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[TensorSpec, ...]:
    """Shape and dtype of every tensor among the inputs."""
    return tuple(
        TensorSpec(
            name=path.partition("]")[2], dtype=str(tensor.dtype).removeprefix("torch."), shape=tuple(tensor.shape)
        )
        for path, tensor in tensors_in((args, dict(kwargs)))
    )


def batch_size(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
    """The first dimension of the first tensor among the inputs.

    Raises:
        ShardwrightError: there is no tensor with a dimension, or a nested one.
    """
    for path, tensor in tensors_in((args, dict(kwargs))):
        if tensor.is_nested:
            raise ShardwrightError(
                f"input {path.partition(']')[2]} is a nested tensor, which has no shape to plan with; pad it, as "
                "torch.nested.to_padded_tensor does, and pass the lengths or a mask beside it"
            )
        if tensor.dim():
            return tensor.shape[0]
    raise ShardwrightError(
        "the sample inputs hold no tensor with a batch dimension; give them with --inputs or --input"
    )


def copied_inputs(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The inputs, copied for a forward that may change them: the caller's tensors, lists and dicts stay as they are."""

    def copy(tensor: Tensor) -> Tensor:
        return tensor.detach().clone().requires_grad_(tensor.requires_grad)

    return map_tensors(copy, (args, dict(kwargs)))  # type: ignore[no-any-return]  # it keeps the structure


def is_batched(leaf: Any, batch: int) -> bool:
    """Whether ``leaf`` is divided among the micro-batches; other tensors, and sparse ones, go to each whole."""
    return isinstance(leaf, Tensor) and leaf.dim() > 0 and leaf.shape[0] == batch and leaf.layout == torch.strided


def microbatch(args: tuple[Any, ...], kwargs: Mapping[str, Any], count: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The first of ``count`` equal micro-batches of the inputs.

    Raises:
        ShardwrightError: the batch cannot be divided evenly.
    """
    batch = batch_size(args, kwargs)
    if count < 1:
        raise ShardwrightError(f"{count} micro-batches hold nothing; use 1 or more")
    if batch % count:
        divisors = [n for n in range(1, batch + 1) if batch % n == 0]
        raise ShardwrightError(
            f"a batch of {batch} cannot be divided into {count} equal micro-batches; "
            f"use one of {', '.join(map(str, divisors))}, or another batch"
        )
    if count == 1:
        return args, dict(kwargs)
    # A copy of its own: a view would drag the whole batch along to the workers.
    return map_tensors(  # type: ignore[no-any-return]  # it keeps the structure
        lambda t: t[: batch // count].clone() if is_batched(t, batch) else t, (args, dict(kwargs))
    )


def all_microbatches(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], count: int
) -> Iterator[tuple[tuple[Any, ...], dict[str, Any]]]:
    """The ``count`` equal micro-batches of the inputs, as views."""
    batch = batch_size(args, kwargs)
    size = batch // count
    for start in range(0, batch, size):

        def piece(tensor: Tensor, at: int = start) -> Tensor:
            return tensor[at : at + size] if is_batched(tensor, batch) else tensor

        yield map_tensors(piece, (args, dict(kwargs)))


def outputs_of(result: Any) -> list[Tensor]:
    """The tensors among what a forward takes or returns, in order."""
    return [tensor for _, tensor in tensors_in(result)]


def other_values(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[tuple[tuple[Any, ...], dict[str, Any]]]:
    """The inputs with other numbers, the boldest change first; a model may refuse some.

    Whole numbers are indices, lengths and labels: they are moved about, within a row or from sample to sample, and stay
    in their range. Floating numbers are moved about and stretched, unless they are masks of a few values; those are
    stretched where nothing else could be changed, as in a sample of ones.
    """

    def bold(tensor: Tensor) -> Tensor:
        if tensor.layout != torch.strided:
            return tensor.clone()  # its pattern is not ours to move
        return _stretched(tensor.flip(tuple(range(tensor.dim()))))

    def by_sample(tensor: Tensor) -> Tensor:
        return _stretched(tensor.roll(1, 0)) if tensor.dim() and tensor.layout == torch.strided else tensor.clone()

    def floating_only(tensor: Tensor) -> Tensor:
        return _stretched(tensor.clone())

    for change in (bold, by_sample, floating_only):

        def changed(tensor: Tensor, change: Callable[[Tensor], Tensor] = change) -> Tensor:
            return change(tensor.detach()).requires_grad_(tensor.requires_grad)

        other = map_tensors(changed, (args, dict(kwargs)))
        if all(map(same_values, outputs_of(other), outputs_of((args, dict(kwargs))))):
            other = map_tensors(_shifted, other)
        yield other


def _stretched(tensor: Tensor) -> Tensor:
    return tensor.clone() if not tensor.is_floating_point() or is_mask(tensor) else _shifted(tensor)


def is_mask(tensor: Tensor) -> bool:
    """Whether a floating tensor of some size has a few different values only, as masks have."""
    if (
        tensor.numel() <= FEW_VALUES
        or isinstance(tensor, FakeTensor)
        or tensor.is_meta
        or tensor.layout != torch.strided
        or tensor.is_complex()
        or (tensor.is_floating_point() and tensor.element_size() == 1)  # PyTorch does not sort them
    ):
        return False
    return all(len(part.unique()) <= FEW_VALUES for part in (tensor.detach().flatten()[:SOME], tensor))


def _shifted(tensor: Tensor) -> Tensor:
    """``tensor`` with other numbers, in the same range, if they are floating."""
    if not tensor.is_floating_point():
        return tensor
    smaller = tensor.detach() * 0.75
    other = smaller + 0.05 if tensor.layout == torch.strided else smaller
    return other.requires_grad_(tensor.requires_grad)


def default_counts(batch: int) -> tuple[int, ...]:
    """The numbers of micro-batches that are profiled by default: powers of two that divide the batch, up to 8."""
    return tuple(count for count in (1, 2, 4, 8) if batch % count == 0)
