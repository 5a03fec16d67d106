"""What a GPU runs in place of what a CPU was seen to run, as far as a roofline has to know.

Operators are recorded as a CPU runs them. A CPU makes the mask of a dropout by two operators of its own, a GPU in the
one that applies it. And of their peak rates convolutions (in tf32) and fused attention reach about a quarter of what
products of matrices do: fitted to 608 forwards and backwards of the units of ten models on an H100, products 0.62,
convolutions 0.16 to 0.18, attention 0.17 (2026-11-28, docs/accuracy.md). They are counted as four times the arithmetic.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from shardwright.profiler.recording.operations import Operation

__all__ = ["SLOWER", "as_on_gpu"]

SLOWER = 4
"""So many times the arithmetic of a product of matrices takes as long as that of a convolution or of attention."""
MASK = ("aten.bernoulli_.float", "aten.div_.Scalar")
"""A dropout's mask, and its scale."""


def as_on_gpu(operations: Iterable[Operation]) -> Iterator[Operation]:
    """The operators that a GPU runs for ``operations``, which a CPU ran."""
    before = ""
    for operation in operations:
        if operation.name == MASK[0] or (operation.name, before) == (MASK[1], MASK[0]):
            before = operation.name
            continue
        before = operation.name
        slower = "convolution" in operation.name or "attention" in operation.name
        yield operation._replace(flops=SLOWER * operation.flops) if slower else operation
