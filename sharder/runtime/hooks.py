"""Hooks of a placed model: they make tensors follow where they cross devices, and do nothing elsewhere.

Every hook that :func:`~shardwright.sharder.runtime.place.place` adds is a
:class:`~shardwright.profiler.placed.PlacementHook`, so that ``unplace`` finds and removes them, also in a copy of the
model.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.hooks import RemovableHandle

from shardwright.profiler.placed import PlacementHook
from shardwright.sharder.runtime.align import AlignGlue
from shardwright.sharder.runtime.calls import OPEN, Begun, begin, end, has_begun, open_calls, settle
from shardwright.sharder.runtime.moving import Mover, containers_in, is_accelerated, may_hold, moved, rewrite

__all__ = ["Borrow", "Enter", "Leave", "MoveInputs", "PutBack", "Return", "Window"]


Function = TypeVar("Function", bound=Callable[..., Any])


def _left_to_python(function: Function) -> Function:
    """Have compiled models call ``function`` as it is: what it changes for a while would be compiled in."""
    return cast(Function, torch.compiler.disable(function, recursive=False))


def _is_one_tensor(args: tuple[Any, ...]) -> bool:
    """Whether these are the arguments of nearly all calls."""
    return len(args) == 1 and isinstance(args[0], Tensor)


NO_TASK = -1
"""What PyTorch numbers the backward pass with where none runs."""


class _Moved(Begun):
    """Arguments that were moved for a call."""

    def __init__(self, hook: MoveInputs, mover: Mover) -> None:
        super().__init__(hook)
        self.mover = mover

    def undo(self) -> None:
        """Give the caller's containers their tensors back."""
        self.mover.put_back()


class MoveInputs(PlacementHook):
    """Forward pre-hook of a unit: fetch what lies on other devices; a device among the arguments becomes the unit's.

    Args:
        lengths_stay: lengths of sequences that are on the CPU, beside tensors that are not, stay there.
    """

    def __init__(self, device: torch.device, *, lengths_stay: bool = False) -> None:
        self.device = device
        self.lengths_stay = lengths_stay
        self.put_back: PutBack | None = None
        self.number = RemovableHandle.next_id
        """That of this hook: what hooks the unit had before have lower ones."""

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """Move the arguments."""
        if not kwargs and len(args) == 1 and isinstance(args[0], Tensor):  # nearly always
            return (args[0].to(self.device),), kwargs
        return self._fetched(module, args, kwargs)

    @_left_to_python
    def _fetched(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        values = (*args, *kwargs.values())
        mover = Mover(self.device, renamed=True, lengths_stay=self.lengths_stay and any(map(is_accelerated, values)))
        if any(map(may_hold, values)):
            if self.put_back is None:
                self._will_put_back(module)
            begin(_Moved(self, mover))
        return tuple([mover(arg) for arg in args]), {key: mover(arg) for key, arg in kwargs.items()}

    def _will_put_back(self, module: nn.Module) -> None:
        """Add the hook for after the calls, from this one on, where it would be had it come with this one.

        Most units never get a container, and a hook costs the same whether it has anything to do or not.
        """
        self.put_back = PutBack(self)
        taken = [*module._forward_hooks, *module._forward_pre_hooks]  # of a loaded model, by another process
        RemovableHandle.next_id = max(RemovableHandle.next_id, *(key + 1 for key in taken))
        nn.Module.register_forward_hook(module, self.put_back, always_call=True)
        for key, hook in list(module._forward_hooks.items()):
            if key > self.number and hook is not self.put_back:
                module._forward_hooks.move_to_end(key)  # type: ignore[attr-defined]  # an OrderedDict, torch says dict


class PutBack(PlacementHook):
    """Forward hook of a unit, called after an error too: its caller's lists and dictionaries get their tensors back.

    What the unit wrote stays, and so do containers that it returns: as its outputs they lie on its device.
    """

    def __init__(self, move: MoveInputs) -> None:
        self.move = move

    def __call__(self, _module: nn.Module, _args: Any, output: Any) -> None:
        """Put back what :class:`MoveInputs` replaced in this call."""
        if OPEN:
            self._put_back(output)

    @_left_to_python
    def _put_back(self, output: Any) -> None:
        call = end(self.move) if has_begun(self.move) else None
        if isinstance(call, _Moved) and call.mover.written:
            call.mover.put_back(kept=containers_in(output))


class Borrow(PlacementHook):
    """Forward pre-hook of a unit: bring the parameters that it shares with a unit on another device, for this call."""

    def __init__(self, device: torch.device, held: list[tuple[nn.Module, str]]) -> None:
        self.device = device
        self.held = held
        """The parameters and buffers: the module that has each, and its name there."""

    @_left_to_python
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

    @_left_to_python
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


class _Call(Begun):
    """A running forward of a placed model: where its inputs came from, and its aligner while it is on."""

    hook: Enter
    came_from: torch.device | None = None
    mover: Mover | None = None
    mode: AlignGlue | None = None

    def brought(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        """The inputs on the first device."""
        home = self.hook.first
        if not kwargs and _is_one_tensor(args):
            self.came_from = args[0].device
            return (args[0].to(home),), kwargs
        self.came_from = _device_of_inputs(args, kwargs)
        accelerated = self.came_from is not None and self.came_from.type != "cpu"
        mover = self.mover = Mover(home, lengths_stay=accelerated)
        return tuple([mover(arg) for arg in args]), {key: mover(arg) for key, arg in kwargs.items()}

    def returned(self, output: Any) -> Any:
        """The output, and what was written into the caller's containers, on the inputs' device."""
        if self.came_from is None:
            return output
        if self.mover is None:
            return moved(output, self.came_from)
        written = self.mover.written
        back = Mover(self.came_from, writes=written)
        back.leave(self.mover.held)  # what the caller had put there
        for container in list(written.values()):
            back(container)
        return back(output)

    def align(self, *, opens: bool) -> None:
        """Begin to align glue, or stop."""
        if opens and self.mode is None:
            self.mode = self.hook.aligner()
            self.mode.begin()
        elif not opens and self.mode is not None:
            self.mode.end()
            self.mode = None

    def undo(self) -> None:
        """Stop to align, and give the caller's containers their tensors back."""
        if self.mode is not None:
            self.align(opens=False)
        if self.mover is not None:
            self.mover.put_back()


class _Recomputed(threading.local):
    """What aligns glue in this thread's backward pass."""

    def __init__(self) -> None:
        self.aligner: AlignGlue | None = None


_recomputed = _Recomputed()


def _end_recomputed() -> None:
    """End what aligns in a backward pass of this thread."""
    if _recomputed.aligner is not None:
        _recomputed.aligner.end()
        _recomputed.aligner = None


class Window(PlacementHook):
    """Hook before or after a unit: glue that needs aligning comes only between certain units.

    A unit that is called in a backward pass is one that activation checkpointing computes anew, and so is the glue
    behind it.
    """

    def __init__(self, enter: Enter, *, opens: bool) -> None:
        self.enter = enter
        self.opens = opens

    @_left_to_python
    def __call__(self, *_: Any) -> None:
        """Begin to align, or stop."""
        for call in reversed(open_calls()):
            if isinstance(call, _Call):
                call.align(opens=self.opens)
                return
        _end_recomputed()
        task = torch._C._current_graph_task_id()
        if self.opens and task != NO_TASK:
            _recomputed.aligner = self.enter.aligner(task)
            _recomputed.aligner.begin()
            # The backward pass may end in another thread than this; then the aligner stays, without effect, until the
            # next unit is computed anew here.
            torch.autograd.Variable._execution_engine.queue_callback(_end_recomputed)


class Enter(PlacementHook):
    """Forward pre-hook of the model: inputs come to the first device, and glue can be aligned until the forward ends.

    Args:
        homes: plan device -> torch device, in the order of the stages.
        glue: see :class:`~shardwright.sharder.runtime.align.AlignGlue`.
        origins: where each parameter and buffer was before, by name.
        open_first: whether glue before the first unit needs aligning.

    Nothing is noted of a call with one tensor that is on the first device already, where no glue is ever aligned: there
    is nothing to end after it, and :class:`Leave` brings the output of a call that it finds no note of to that device.
    """

    def __init__(
        self,
        homes: dict[str, torch.device],
        glue: frozenset[tuple[str, str]] | None,
        origins: dict[str, torch.device],
        *,
        open_first: bool,
    ) -> None:
        self.move_to(homes)
        self.glue = glue
        self.origins = origins
        self.open_first = open_first
        self.aligns = glue is None or bool(glue)
        """Whether there is glue to align."""

    def move_to(self, homes: dict[str, torch.device]) -> None:
        """Take these devices for those of the plan."""
        self.homes = homes
        self.first = next(iter(homes.values()))
        """The device of the first stage, to which inputs come."""

    def aligner(self, task: int | None = None) -> AlignGlue:
        """What aligns the glue of this placement; ``task``: see there."""
        return AlignGlue(self.glue, list(self.homes.values()), task)

    def __call__(self, _module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        """Move the arguments, and begin to align."""
        if self.aligns or kwargs or OPEN or not _is_one_tensor(args) or args[0].device != self.first:
            return self._begun(args, kwargs)
        return None

    @_left_to_python
    def _begun(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        if open_calls():
            settle()
        call = _Call(self)
        begin(call)
        there = call.brought(args, kwargs)
        if self.open_first:
            call.align(opens=True)
        return there


def _device_of_inputs(args: Any, kwargs: Any) -> torch.device | None:
    """That of the first tensor among the inputs which is not on the CPU; else the CPU, if there is any tensor."""
    values = (*args, *kwargs.values())
    leaves = pytree.tree_leaves(values) if any(map(may_hold, values)) else values
    found = [leaf.device for leaf in leaves if isinstance(leaf, Tensor)]
    return next((device for device in found if device.type != "cpu"), found[0] if found else None)


class Leave(PlacementHook):
    """Forward hook of the model, called after an error too: alignment ends, outputs return to the inputs' device.

    So does what the forward wrote into the lists and dictionaries of its caller.
    """

    def __init__(self, enter: Enter) -> None:
        self.enter = enter

    def __call__(self, _module: nn.Module, _args: Any, output: Any) -> Any:
        """End what :class:`Enter` began, and move the output."""
        if OPEN:
            return self._ended(output)
        first = self.enter.first
        if isinstance(output, Tensor):  # nearly always
            return None if output.device == first else output.to(first)
        return moved(output, first)

    @_left_to_python
    def _ended(self, output: Any) -> Any:
        call = end(self.enter)
        if not isinstance(call, _Call):
            return moved(output, self.enter.first)
        call.undo()
        return call.returned(output)
