"""Comparing: whether what a pipeline's stages give is what the unsharded model gives, by what its dtype explains."""

from __future__ import annotations

from torch import Tensor

from shardwright.errors import ShardwrightError
from shardwright.profiler.recording.equality import largest_value, relative_difference, tolerance
from shardwright.sharder.runtime.pipeline import Comparison
from shardwright.sharder.runtime.record import Equality

__all__ = ["OF_LARGEST", "DifferenceError", "compare", "differing"]

OF_LARGEST = 1e-2
"""The part of the largest gradient by which others are measured too, where kernels differ."""


class DifferenceError(ShardwrightError):
    """A pipeline gives other outputs or gradients than the unsharded model."""


def differing(
    what: str,
    expected: Tensor,
    found: Tensor,
    *,
    other_kernels: bool,
    other_order: bool = False,
    beside: float = 0.0,
) -> tuple[float, float]:
    """The relative difference of ``found`` from what the unsharded model gives, and the one that is allowed.

    Args:
        other_order: whether gradients of several readers were added up in another order all along the backward: the
            roundings, one upon another, are then as large as those of other kernels.
        beside: is added to the largest value of ``expected``.

    Raises:
        DifferenceError: it is larger; ``what`` it is comes with both numbers.
    """
    error = relative_difference(expected, found, beside=beside)
    allowed = tolerance(expected.dtype, other_kernels=other_kernels or other_order)
    if not error <= allowed:
        raise DifferenceError(
            f"{what} differs from the unsharded model's by {error:.2g} of its largest value; "
            f"{allowed:.2g} is allowed for {expected.dtype}"
        )
    return error, allowed


def compare(
    reference: Comparison,
    stages: list[Comparison],
    *,
    other_kernels: bool = False,
    largest_gradient: float | None = None,
) -> Equality:
    """Hold the stages' outputs and gradients against the whole model's.

    Args:
        other_kernels: whether some of them were computed on another kind of device. A gradient that is nothing but
            rounding, as of a bias before a normalisation, is then measured by the largest of all beside its own.
        largest_gradient: the largest value of all that there are, where ``reference`` has a part of them, added up in
            another order: they are then measured likewise.

    Raises:
        DifferenceError: one differs by more than its dtype explains, or is missing; the worst is named.
    """
    outputs = [t for stage in stages for t in stage.outputs]
    gradients = {name for stage in stages for name in stage.gradients}
    if len(outputs) != len(reference.outputs):
        raise DifferenceError(f"the pipeline gave {len(outputs)} outputs, the model {len(reference.outputs)}")
    # A parameter that the loss does not reach has no gradient, or zeros, depending on who asks.
    given = {id(t) for name, t in reference.gradients.items() if name in gradients}  # maybe by another of its names
    absent = [n for n, t in reference.gradients.items() if id(t) not in given and bool(t.count_nonzero())]
    if absent:
        raise DifferenceError(f"the pipeline gave no gradient for {absent[0]}, the model did")
    pairs = [(f"output {i}", a, b) for i, (a, b) in enumerate(zip(reference.outputs, outputs, strict=True))]
    count = len(pairs)
    # Every copy, those of replicas and of ties.
    pairs += [
        (f"the gradient of {name}", reference.gradients[name], t)
        for stage in stages
        for name, t in stage.gradients.items()
        if name in reference.gradients
    ]
    errors, largest, beside = [], 0.0, 0.0
    if largest_gradient is not None:
        beside = OF_LARGEST * largest_gradient
    elif other_kernels:
        beside = OF_LARGEST * max(map(largest_value, reference.gradients.values()), default=0.0)
    for number, (name, expected, found) in enumerate(pairs):
        by_order = largest_gradient is not None and number >= count
        more = beside if number >= count else 0.0
        error, allowed = differing(
            name, expected, found, other_kernels=other_kernels, other_order=by_order, beside=more
        )
        errors.append(error)
        largest = max(largest, allowed)
    return Equality(
        outputs=max(errors[:count], default=0.0),
        gradients=max(errors[count:], default=0.0),
        tolerance=largest,
        tensors=len(pairs),
    )
