"""The gate before the timing: a pipeline has to give the outputs and every gradient of the unsharded model."""

from __future__ import annotations

from shardwright.errors import ShardwrightError
from shardwright.profiler.equality import largest_value, relative_difference, tolerance
from shardwright.sharder.planning.plan import Plan
from shardwright.sharder.runtime.pipeline import Comparison
from shardwright.sharder.runtime.record import Equality
from shardwright.sharder.runtime.session import Session, Split

__all__ = ["DifferenceError", "Gate", "compare"]

OF_LARGEST = 1e-2
"""The part of the largest gradient by which others are measured too, where kernels differ."""


class DifferenceError(ShardwrightError):
    """A pipeline gives other outputs or gradients than the unsharded model."""


class Gate:
    """Compares pipelines with the whole model, which is run once for each number of micro-batches.

    Args:
        device: that holds it; None: the host's memory does, where its processors compute.
        stays: whether the model will be timed beside others that are let in by the room that is left.
    """

    def __init__(self, session: Session, plan: Plan, device: str | None, *, stays: bool) -> None:
        self.session, self.plan, self.device, self.stays = session, plan, device, stays and device is not None
        self.references: dict[int, Comparison] = {}

    def compared(self, split: Split, found: list[Comparison]) -> Equality:
        """Hold what the stages of ``split`` ``found`` against the sum over the same micro-batches."""
        self.prepare(split)
        kind = (self.device or "cpu").partition(":")[0]
        other_kernels = any(not device.startswith(kind) for device in split.plan.devices)
        return compare(self.references[split.plan.microbatches], found, other_kernels=other_kernels)

    def prepare(self, split: Split) -> None:
        """Have the model held and run as ``split`` is divided, unless it was."""
        count = split.plan.microbatches
        if count in self.references:
            return
        if self.device is None:
            self.references[count] = self.session.check_on_host(count, split.output_places, self.plan)
            return
        self.session.hold_whole(self.device, count, split.output_places, self.plan)
        self.references[count] = self.session.check_whole(self.device)
        if self.stays:
            self.session.step_whole(self.device)  # the optimizer's state takes its room before others are let in


def compare(reference: Comparison, stages: list[Comparison], *, other_kernels: bool = False) -> Equality:
    """Hold the stages' outputs and gradients against the whole model's.

    Args:
        other_kernels: whether some of them were computed on another kind of device. A gradient that is nothing but
            rounding, as of a bias before a normalisation, is then measured by the largest of all beside its own.

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
    errors, largest = [], 0.0
    beside = OF_LARGEST * max(map(largest_value, reference.gradients.values()), default=0.0) if other_kernels else 0.0
    for number, (name, expected, found) in enumerate(pairs):
        error = relative_difference(expected, found, beside=beside if number >= count else 0.0)
        allowed = tolerance(expected.dtype, other_kernels=other_kernels)
        if not error <= allowed:
            raise DifferenceError(
                f"{name} differs from the unsharded model's by {error:.2g} of its largest value; "
                f"{allowed:.2g} is allowed for {expected.dtype}"
            )
        errors.append(error)
        largest = max(largest, allowed)
    return Equality(
        outputs=max(errors[:count], default=0.0),
        gradients=max(errors[count:], default=0.0),
        tolerance=largest,
        tensors=len(pairs),
    )
