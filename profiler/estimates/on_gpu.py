"""What a roofline has to know of the operators that a GPU runs, beside their arithmetic and bytes.

A convolution takes longer on a GPU beside these two than other operators do, as if it were several: 3, and its backward
10, come nearest to the times of the units of ten models on an H100 (2026-11-28, docs/accuracy.md), and 3 to 5 and 8 to
18 about as near. Which kernels these are was not looked into.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from shardwright.profiler.recording.operations import Operation

__all__ = ["LAUNCHES", "as_on_gpu"]

LAUNCHES = {"aten.convolution.default": 3, "aten.convolution_backward.default": 10}
"""As many operators' time beside arithmetic and bytes each of these takes."""


def as_on_gpu(operations: Iterable[Operation]) -> Iterator[Operation]:
    """``operations`` with the further launches that a GPU makes for them, as ones that do nothing."""
    for operation in operations:
        yield operation
        for _ in range(LAUNCHES.get(operation.name, 1) - 1):
            yield operation._replace(flops=0, bytes=0)
