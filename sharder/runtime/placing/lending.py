"""Lending: a parameter that units on several devices share is brought to each of them for its calls."""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor, nn

from shardwright.profiler.recording.placed import PlacementHook
from shardwright.sharder.runtime.placing.calls import Begun, begin, end, settle
from shardwright.sharder.runtime.placing.forwards import left_to_python
from shardwright.sharder.runtime.placing.moving import rewrite

__all__ = ["Borrow", "Return"]


class Borrow(PlacementHook):
    """Forward pre-hook of a unit: bring the parameters that it shares with a unit on another device, for this call."""

    def __init__(self, device: torch.device, held: list[tuple[nn.Module, str]]) -> None:
        self.device = device
        self.held = held
        """The parameters and buffers: the module that has each, and its name there."""

    @left_to_python
    def __call__(self, module: nn.Module, _args: Any) -> None:
        """Put copies in the places of the parameters; gradients flow back through them."""
        settle()
        loan = _Loan(self, training=module.training)
        begin(loan)
        loan.take_turn()
        for owner, name in self.held:
            loan.lend(owner._parameters if name in owner._parameters else owner._buffers, name, self.device)


class Return(PlacementHook):
    """Forward hook of a unit, called after an error too: put back what :class:`Borrow` replaced in this call."""

    def __init__(self, borrow: Borrow) -> None:
        self.borrow = borrow

    @left_to_python
    def __call__(self, _module: nn.Module, _args: Any, _output: Any) -> None:
        """Put the parameters back."""
        loan = end(self.borrow)
        if loan is not None:
            loan.undo()


class _Loan(Begun):
    """What one call of a unit has borrowed.

    Units that borrow run one at a time, since they change what all threads see: those out are of one thread.
    """

    out: list[_Loan] = []  # noqa: RUF012  # of all loans
    turn = threading.Condition()
    LOOK_AGAIN_S = 0.1
    """How long a thread waits for its turn before it looks whether the other's call was broken off."""

    def __init__(self, hook: Borrow, *, training: bool) -> None:
        super().__init__(hook)
        self.training = training
        self.lent: list[tuple[dict[str, Any], str, Tensor, Tensor, int]] = []

    def take_turn(self) -> None:
        """Wait until no other thread borrows."""
        with self.turn:
            while self.out and self.out[-1].thread != self.thread:
                if not self.turn.wait(self.LOOK_AGAIN_S) and self.out and self.out[-1].is_over():
                    self.out[-1].undo()
            self.out.append(self)

    def lend(self, held: dict[str, Any], name: str, device: torch.device) -> None:
        """Put a copy in the place of a tensor."""
        tensor = held.get(name)
        if tensor is not None:
            copied = tensor.to(device)
            self.lent.append((held, name, tensor, copied, _version(copied)))
            held[name] = copied

    def undo(self) -> None:
        """Put the tensors back; those that the unit changed are changed too."""
        with self.turn:
            while self.lent:
                held, name, tensor, copied, version = self.lent.pop()
                if held.get(name) is copied:
                    held[name] = tensor
                    self._bring_back(copied, tensor, version)
                elif isinstance(held.get(name), Tensor) and not isinstance(tensor, nn.Parameter):
                    held[name] = held[name].to(tensor.device)  # a buffer that the unit made anew
            if self in self.out:
                self.out.remove(self)
            self.turn.notify_all()

    def _bring_back(self, copied: Tensor, tensor: Tensor, version: int) -> None:
        """Copy what the unit changed in place; of running statistics, which change in training, it is not counted."""
        counted = _version(copied) != version
        if counted or (self.training and not isinstance(tensor, nn.Parameter)):
            rewrite(tensor, copied, counted=counted)


def _version(tensor: Tensor) -> int:
    """How often the tensor was changed in place; of those made in inference mode PyTorch does not count it."""
    return 0 if tensor.is_inference() else tensor._version
