"""What a GPU runs in place of what a CPU was seen to run, as far as a roofline has to know.

Operators are recorded as a CPU runs them. A CPU makes the mask of a dropout by two operators of its own, a GPU in the
one that applies it. And a convolution takes longer on a GPU beside its arithmetic and bytes than other operators do, as
if it were several: 3, and its backward 10, come nearest to the times of the units of ten models on an H100 (2026-11-28,
docs/accuracy.md), and 3 to 5 and 8 to 18 about as near. Which kernels these are was not looked into.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from shardwright.profiler.recording.operations import Operation

__all__ = ["LAUNCHES", "as_on_gpu"]

LAUNCHES = {"aten.convolution.default": 3, "aten.convolution_backward.default": 10}
"""As many operators' time beside arithmetic and bytes each of these takes."""
MASK = ("aten.bernoulli_.float", "aten.div_.Scalar")
"""A dropout's mask, and its scale."""


def as_on_gpu(operations: Iterable[Operation]) -> Iterator[Operation]:
    """The operators that a GPU runs for ``operations``, which a CPU ran; further launches as ones that do nothing."""
    before = ""
    for operation in operations:
        is_mask = operation.name == MASK[0] or (operation.name, before) == (MASK[1], MASK[0])
        before = operation.name
        if is_mask:
            continue
        yield operation
        for _ in range(LAUNCHES.get(operation.name, 1) - 1):
            yield operation._replace(flops=0, bytes=0)
