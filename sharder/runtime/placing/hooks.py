"""What makes tensors follow where they cross between the units of a placed model, and does nothing elsewhere.

All that :func:`~shardwright.sharder.runtime.place.place` adds is a
:class:`~shardwright.profiler.recording.placed.PlacementHook`, so that ``unplace`` finds and removes it, also in a copy
of the model.
"""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from shardwright.profiler.recording.placed import PlacementHook
from shardwright.sharder.runtime.placing.calls import OPEN, Begun, begin, end, has_begun
from shardwright.sharder.runtime.placing.forwards import InstanceForward, left_to_python
from shardwright.sharder.runtime.placing.moving import (
    Mover,
    containers_in,
    fetched,
    is_accelerated,
    may_hold,
    write_back,
)

__all__ = ["MoveInputs", "PutBack", "UnitForward", "has_hooks", "is_one_tensor"]


def is_one_tensor(args: tuple[Any, ...]) -> bool:
    """Whether these are the arguments of nearly all calls."""
    return len(args) == 1 and isinstance(args[0], Tensor)


def has_hooks(module: nn.Module) -> bool:
    """Whether the call of ``module`` calls hooks of its own."""
    return bool(
        module._forward_pre_hooks or module._forward_hooks or module._backward_hooks or module._backward_pre_hooks
    )


class UnitForward(InstanceForward):
    """In the place of a unit's forward: fetch what lies on other devices; a device among the arguments becomes its own.

    It costs less than :class:`MoveInputs`, but hooks on the unit see the arguments before it. So it is for units that
    have no hooks, and becomes that hook where the model is called and finds that the user has added some.

    Args:
        lengths_stay: lengths of sequences that are on the CPU, beside tensors that are not, stay there.
    """

    _changing = threading.Lock()

    def __init__(self, unit: nn.Module, device: torch.device, *, lengths_stay: bool = False) -> None:
        super().__init__(unit)
        self.device = device
        self.lengths_stay = lengths_stay

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the unit's own forward with the arguments beside it."""
        # Nearly always; written out, for a call of is_one_tensor would cost as much as the rest.
        if not kwargs and len(args) == 1 and isinstance(args[0], Tensor) and not self.passes:
            if torch.compiler.is_compiling():  # which knows no versions
                return self.plain(args[0].to(self.device))
            there = fetched(args[0], self.device)
            if there is args[0]:
                return self.plain(there)
            version = there._version  # not 0 of some copies
            output = self.plain(there)
            if there._version != version:
                write_back(args[0], there)
            return output
        return self._fetched(args, kwargs)

    @left_to_python
    def _fetched(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.passes:
            return self.plain(*args, **kwargs)
        mover = _mover(self, args, kwargs)
        output = None
        try:
            args, kwargs = tuple([mover(arg) for arg in args]), {key: mover(arg) for key, arg in kwargs.items()}
            output = self.plain(*args, **kwargs)
            mover.write_back()
        finally:
            if mover.written:
                mover.put_back(kept=containers_in(output))
        return output

    def become_hook(self) -> None:
        """Leave the moves to a hook, which is called before all that the unit has by now."""
        with self._changing:
            if self.passes:
                return
            move = MoveInputs(self.device, lengths_stay=self.lengths_stay)
            move.number = -1  # the unit had none before
            nn.Module.register_forward_pre_hook(self.module, move, with_kwargs=True, prepend=True)
            self.remove()  # at last: another thread may be calling the unit, and that both move does no harm


def _mover(hook: UnitForward | MoveInputs, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Mover:
    """What brings the arguments to the unit."""
    stay = hook.lengths_stay and any(map(is_accelerated, (*args, *kwargs.values())))
    return Mover(hook.device, renamed=True, lengths_stay=stay)


class _Moved(Begun):
    """Arguments that were moved for a call."""

    def __init__(self, hook: MoveInputs, mover: Mover) -> None:
        super().__init__(hook)
        self.mover = mover

    def undo(self) -> None:
        """Give the caller's containers their tensors back."""
        self.mover.put_back()


class MoveInputs(PlacementHook):
    """Forward pre-hook of a unit: does as :class:`UnitForward` does, before the unit's own hooks."""

    def __init__(self, device: torch.device, *, lengths_stay: bool = False) -> None:
        self.device = device
        self.lengths_stay = lengths_stay
        self.put_back: PutBack | None = None
        self.number = RemovableHandle.next_id
        """That of this hook: what hooks the unit had before have lower ones."""

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """Move the arguments."""
        if not kwargs and len(args) == 1 and isinstance(args[0], Tensor) and args[0].device == self.device:
            return args, kwargs
        return self._fetched(module, args, kwargs)

    @left_to_python
    def _fetched(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        mover = _mover(self, args, kwargs)
        if any(may_hold(arg) or isinstance(arg, Tensor) for arg in (*args, *kwargs.values())):
            if self.put_back is None:
                self._will_put_back(module)
            begin(_Moved(self, mover))
        return tuple([mover(arg) for arg in args]), {key: mover(arg) for key, arg in kwargs.items()}

    def _will_put_back(self, module: nn.Module) -> None:
        """Add the hook for after the calls, from this one on, where it would be had it come with this one.

        Where a unit gets what is there already, a hook costs the same whether it has anything to do or not.
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

    What the unit wrote stays, and so do containers that it returns: as its outputs they lie on its device. What it
    changed of a tensor in place is changed in the caller's.
    """

    def __init__(self, move: MoveInputs) -> None:
        self.move = move

    def __call__(self, _module: nn.Module, _args: Any, output: Any) -> None:
        """Put back what :class:`MoveInputs` replaced in this call."""
        if OPEN:
            self._put_back(output)

    @left_to_python
    def _put_back(self, output: Any) -> None:
        call = end(self.move) if has_begun(self.move) else None
        if isinstance(call, _Moved):
            call.mover.write_back()
            if call.mover.written:
                call.mover.put_back(kept=containers_in(output))
