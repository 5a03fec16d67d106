"""What a stage holds at which moment of a step: the parts of its peak, as a plan records them."""

from __future__ import annotations

from pydantic import NonNegativeInt

from shardwright.files import Record

__all__ = ["StageMemory"]


class StageMemory(Record):
    """Bytes of one stage; how they add up over a step is in schedules/footprint.py.

    What is said of an operation is all that the stage takes while that runs, its own micro-batch included, beside what
    it holds of the other micro-batches and all through the step.
    """

    static_bytes: NonNegativeInt = 0
    """All through the step: weights, their gradients, optimizer state, copies of what stages share, buffers."""
    gradient_bytes: NonNegativeInt = 0
    """Of these, what is not there before the stage's first backward of a step: the gradients of the weights."""
    held_bytes: NonNegativeInt = 0
    """Of each micro-batch from its forward until its backward, or its W, is done."""
    deferred_bytes: NonNegativeInt = 0
    """Beside it, from B to W under zero-bubble."""
    sent_bytes: NonNegativeInt = 0
    """Of each micro-batch that is done: outputs that wait for the end of the step."""
    sent_gradient_bytes: NonNegativeInt = 0
    """Likewise gradients that were sent, from B on."""
    waiting_bytes: NonNegativeInt = 0
    """From the first backward on, once: the gradients of one micro-batch, as 1F1B has them."""
    forward_bytes: NonNegativeInt = 0
    """While a forward runs, before the first backward is done; under every schedule but 1F1B behind it, too."""
    later_forward_bytes: NonNegativeInt = 0
    """While one runs behind that; with ``waiting_bytes``."""
    input_backward_bytes: NonNegativeInt = 0
    """While the first part of a backward runs, under zero-bubble."""
    first_backward_bytes: NonNegativeInt = 0
    """While the first backward runs, or the first W, less ``gradient_bytes`` that it makes."""
    backward_bytes: NonNegativeInt = 0
    """While another backward runs, or another W; with ``waiting_bytes``."""
    update_bytes: NonNegativeInt = 0
    """While the optimizer works, or gradients are summed: of the whole device, at its first stage."""
