"""The model's inputs: their shapes, which have the batch in their first dimension, and how it is divided."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

from shardwright.errors import ShardwrightError
from shardwright.profiler.profile import TensorSpec

__all__ = [
    "all_microbatches",
    "batch_size",
    "default_counts",
    "input_specs",
    "is_batched",
    "microbatch",
    "outputs_of",
]


def input_specs(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[TensorSpec, ...]:
    """Shape and dtype of every tensor among the inputs."""
    leaves, _ = pytree.tree_flatten_with_path((args, dict(kwargs)))
    return tuple(
        TensorSpec(name=pytree.keystr(path[1:]), dtype=str(leaf.dtype).removeprefix("torch."), shape=tuple(leaf.shape))
        for path, leaf in leaves
        if isinstance(leaf, Tensor)
    )


def batch_size(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
    """The first dimension of the first tensor among the inputs.

    Raises:
        ShardwrightError: there is no tensor with a dimension.
    """
    for leaf in pytree.tree_leaves((args, dict(kwargs))):
        if isinstance(leaf, Tensor) and leaf.dim():
            return leaf.shape[0]
    raise ShardwrightError(
        "the sample inputs hold no tensor with a batch dimension; give them with --inputs or --input"
    )


def is_batched(leaf: Any, batch: int) -> bool:
    """Whether ``leaf`` is divided among the micro-batches; other tensors go to each whole."""
    return isinstance(leaf, Tensor) and leaf.dim() > 0 and leaf.shape[0] == batch


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
    return pytree.tree_map(  # type: ignore[no-any-return]  # tree_map keeps the structure
        lambda leaf: leaf[: batch // count].clone() if is_batched(leaf, batch) else leaf, (args, dict(kwargs))
    )


def all_microbatches(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], count: int
) -> Iterator[tuple[tuple[Any, ...], dict[str, Any]]]:
    """The ``count`` equal micro-batches of the inputs, as views."""
    batch = batch_size(args, kwargs)
    size = batch // count
    for start in range(0, batch, size):
        yield pytree.tree_map(
            lambda leaf, at=start: leaf[at : at + size] if is_batched(leaf, batch) else leaf, (args, dict(kwargs))
        )


def outputs_of(result: Any) -> list[Tensor]:
    """The tensors among what a forward returned, in order."""
    return [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)]


def default_counts(batch: int) -> tuple[int, ...]:
    """The numbers of micro-batches that are profiled by default: powers of two that divide the batch, up to 8."""
    return tuple(count for count in (1, 2, 4, 8) if batch % count == 0)
