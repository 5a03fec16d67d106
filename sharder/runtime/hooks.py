"""Hooks of a placed model: they make tensors follow where they cross devices, and do nothing elsewhere.

Every hook that :func:`~shardwright.sharder.runtime.place.place` adds is a
:class:`~shardwright.profiler.placed.PlacementHook`, so that ``unplace`` finds and removes them, also in a copy of the
model.
"""

from __future__ import annotations

import dataclasses
import sys
import threading
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch._C import _len_torch_function_stack
from torch.nn.utils.rnn import PackedSequence
from torch.overrides import TorchFunctionMode, _pop_mode, _push_mode
from torch.utils import _pytree as pytree

from shardwright.profiler.callsites import applied_name, call_site, functions_applied
from shardwright.profiler.placed import PlacementHook
from shardwright.profiler.structure import map_tensors, tensors_in
from shardwright.profiler.unitgraph import function_name

__all__ = ["AlignGlue", "Borrow", "Enter", "Leave", "MoveInputs", "Return", "Window", "changes_operand"]


Function = TypeVar("Function", bound=Callable[..., Any])


def _left_to_python(function: Function) -> Function:
    """Have compiled models call ``function`` as it is: what it changes for a while would be compiled in."""
    return cast(Function, torch.compiler.disable(function))


NO_TASK = -1
"""What PyTorch numbers the backward pass with where none runs."""


def _moved(value: Any, device: torch.device) -> Any:
    """``value`` with its tensors on ``device``; dataclasses are looked into, other objects are left as they are."""
    if isinstance(value, Tensor):
        return value if value.device == device else value.to(device)
    if isinstance(value, (str, int, float, type(None))) or all(t.device == device for _, t in tensors_in(value)):
        return value  # itself, for the callee may write what it is given

    def mapped(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return leaf.to(device)
        if isinstance(leaf, PackedSequence):  # its sizes stay on the CPU
            return leaf.to(device)  # type: ignore[arg-type]  # torch's stub knows the dtype only
        if dataclasses.is_dataclass(leaf) and not isinstance(leaf, type) and tensors_in(leaf):
            return map_tensors(lambda tensor: tensor.to(device), leaf)
        return leaf

    return pytree.tree_map(mapped, value, is_leaf=lambda leaf: isinstance(leaf, PackedSequence))


class MoveInputs(PlacementHook):
    """Forward pre-hook of a unit: fetch what lies on other devices; a device among the arguments becomes the unit's."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def __call__(self, _module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """Move the arguments."""
        return tuple([self._fetched(arg) for arg in args]), {key: self._fetched(arg) for key, arg in kwargs.items()}

    def _fetched(self, value: Any) -> Any:
        if isinstance(value, torch.device):
            return self.device
        if type(value) is list:  # the container itself, for the unit may write it
            value[:] = [self._fetched(item) for item in value]
            return value
        if type(value) is dict:
            value.update({key: self._fetched(item) for key, item in value.items()})
            return value
        return _moved(value, self.device)


class Borrow(PlacementHook):
    """Forward pre-hook of a unit: bring the parameters that it shares with a unit on another device, for this call."""

    def __init__(self, device: torch.device, held: list[tuple[nn.Module, str]]) -> None:
        self.device = device
        self.held = held
        """The parameters and buffers: the module that has each, and its name there."""

    @_left_to_python
    def __call__(self, _module: nn.Module, _args: Any) -> None:
        """Put copies in the places of the parameters; gradients flow back through them."""
        _lending.acquire()  # released by Return: in another thread's call a copy would be taken for the parameter
        lent: list[tuple[dict[str, Any], str, Tensor]] = []
        _loans.stack.append((self, lent))
        for owner, name in self.held:
            own = owner._parameters if name in owner._parameters else owner._buffers
            tensor = own[name]
            if tensor is not None:
                copied = tensor.to(self.device)
                lent.append((own, name, tensor))
                own[name] = copied  # type: ignore[assignment]  # a copy is no Parameter


class Return(PlacementHook):
    """Forward hook of a unit, called after an error too: put back what :class:`Borrow` replaced in this call."""

    def __init__(self, borrow: Borrow) -> None:
        self.borrow = borrow

    @_left_to_python
    def __call__(self, _module: nn.Module, _args: Any, _output: Any) -> None:
        """Put the parameters back."""
        if not _loans.stack or _loans.stack[-1][0] is not self.borrow:
            return  # the call failed before anything was borrowed
        _, lent = _loans.stack.pop()
        for held, own, tensor in reversed(lent):
            held[own] = tensor
        _lending.release()


class _Loans(threading.local):
    """What the running calls of this thread have borrowed, innermost last."""

    def __init__(self) -> None:
        self.stack: list[tuple[Borrow, list[tuple[dict[str, Any], str, Tensor]]]] = []


_loans = _Loans()
_lending = threading.RLock()
"""Units that borrow run one at a time: they change what all threads see."""


class _Call:
    """A running forward of a placed model: where its inputs came from, and its aligner while it is on."""

    __slots__ = ("came_from", "enter", "mode")

    def __init__(self, came_from: torch.device | None, enter: Enter) -> None:
        self.came_from = came_from
        self.enter = enter
        self.mode: AlignGlue | None = None

    def align(self, *, opens: bool) -> None:
        """Begin to align glue, or stop."""
        if opens and self.mode is None:
            self.mode = self.enter.aligner()
            self.mode.begin()
        elif not opens and self.mode is not None:
            self.mode.end()
            self.mode = None


class _Calls(threading.local):
    """The forwards of placed models that run in this thread, innermost last, and what a backward pass computes anew."""

    def __init__(self) -> None:
        self.stack: list[_Call] = []
        self.recomputed: AlignGlue | None = None


_calls = _Calls()


def _end_recomputed() -> None:
    """End what aligns in a backward pass of this thread."""
    if _calls.recomputed is not None:
        _calls.recomputed.end()
        _calls.recomputed = None


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
        if _calls.stack:
            _calls.stack[-1].align(opens=self.opens)
            return
        _end_recomputed()
        task = torch._C._current_graph_task_id()
        if self.opens and task != NO_TASK:
            _calls.recomputed = self.enter.aligner(task)
            _calls.recomputed.begin()
            # The backward pass may end in another thread than this; then the aligner stays, without effect, until the
            # next unit is computed anew here.
            torch.autograd.Variable._execution_engine.queue_callback(_end_recomputed)


class Enter(PlacementHook):
    """Forward pre-hook of the model: inputs come to the first device, and glue can be aligned until the forward ends.

    Args:
        homes: plan device -> torch device, in the order of the stages.
        glue: see :class:`AlignGlue`.
        origins: where each parameter and buffer was before, by name.
        open_first: whether glue before the first unit needs aligning.
    """

    def __init__(
        self,
        homes: dict[str, torch.device],
        glue: frozenset[tuple[str, str]] | None,
        origins: dict[str, torch.device],
        *,
        open_first: bool,
    ) -> None:
        self.homes = homes
        self.glue = glue
        self.origins = origins
        self.open_first = open_first

    def aligner(self, task: int | None = None) -> AlignGlue:
        """What aligns the glue of this placement; ``task``: see :class:`AlignGlue`."""
        return AlignGlue(self.glue, list(self.homes.values()), task)

    @_left_to_python
    def __call__(self, _module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """Move the arguments, and begin to align."""
        home = next(iter(self.homes.values()))
        first = args[0] if args else None
        if not isinstance(first, Tensor):
            first = next((leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)), None)
        call = _Call(None if first is None else first.device, self)
        # Noted before anything can fail, since Leave is called after an error too.
        _calls.stack.append(call)
        moved = tuple([_moved(arg, home) for arg in args]), {key: _moved(arg, home) for key, arg in kwargs.items()}
        if self.open_first:
            call.align(opens=True)
        return moved


class Leave(PlacementHook):
    """Forward hook of the model, called after an error too: alignment ends, outputs return to the inputs' device."""

    @_left_to_python
    def __call__(self, _module: nn.Module, _args: Any, _kwargs: Any, output: Any) -> Any:
        """End what :class:`Enter` began, and move the output."""
        call = _calls.stack.pop()
        if call.mode is not None:
            call.align(opens=False)
        return output if call.came_from is None else _moved(output, call.came_from)


class AlignGlue(TorchFunctionMode):
    """Brings the operands of glue together, on the latest stage among them: later ones need what earlier ones made.

    Only the glue that the capture found is touched, by function and call site; another operation that mixes devices
    stays the error it is. Where the capture may not know all paths, ``sites`` is None and all glue is touched.
    """

    MEANS_TO_MIX = frozenset({"to", "copy_", "type_as", "set_", "cuda", "cpu", "__get__", "__set__", "is_set_to"}) | {
        "grad",
        "backward",
    }

    def __init__(
        self, sites: frozenset[tuple[str, str]] | None, order: list[torch.device], task: int | None = None
    ) -> None:
        super().__init__()
        self.sites = sites
        self.order = order
        self.task = task
        self.applied = ExitStack()

    def begin(self) -> None:
        """Take effect below all other modes, so that those of the model itself end as if this one were not there."""
        if self.sites is None or any(function.endswith(".apply") for function, _ in self.sites):
            self.applied.enter_context(functions_applied(self._apply))
        above = [_pop_mode() for _ in range(_len_torch_function_stack())]
        if above and above[-1] is getattr(torch._GLOBAL_DEVICE_CONTEXT, "device_context", None):
            _push_mode(above.pop())  # that of torch.set_default_device, which wants to be the lowest
        for mode in (self, *reversed(above)):
            _push_mode(mode)

    def end(self) -> None:
        """Have no more effect."""
        self.applied.close()
        modes = [_pop_mode() for _ in range(_len_torch_function_stack())]
        for mode in reversed(modes):
            if mode is not self:
                _push_mode(mode)

    def _apply(
        self, function: type[torch.autograd.Function], call: Callable[..., Any], args: Any, kwargs: dict[str, Any]
    ) -> Any:
        return self._aligned(call, applied_name(function), "", args, kwargs)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        over = self.task is not None and torch._C._current_graph_task_id() != self.task
        if over or name in self.MEANS_TO_MIX:
            return func(*args, **kwargs)
        return self._aligned(func, function_name(func), name, args, kwargs)

    def _aligned(
        self, func: Callable[..., Any], function: str, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        plain = not kwargs and all(isinstance(arg, (Tensor, int, float)) for arg in args)
        tensors = [leaf for leaf in (args if plain else pytree.tree_leaves((args, kwargs))) if isinstance(leaf, Tensor)]
        homes = [t.device for t in tensors if t.dim() or t.device.type != "cpu"]
        if len(set(homes)) < 2 or (self.sites is not None and (function, call_site(sys._getframe())) not in self.sites):
            return func(*args, **kwargs)
        device = homes[0] if changes_operand(name) or "out" in kwargs else max(homes, key=self._stage)
        return func(*_moved(args, device), **_moved(kwargs, device))

    def _stage(self, device: torch.device) -> int:
        return self.order.index(device) if device in self.order else -1


def changes_operand(name: str) -> bool:
    """Whether the function of this name writes its first operand, which therefore cannot be replaced by a copy."""
    name = name.rpartition(".")[2]
    return name == "__setitem__" or name.startswith("__i") or (name.endswith("_") and not name.endswith("__"))
