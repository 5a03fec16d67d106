"""Alignment: in the forward of a placed model, operands of glue that lie on two devices are brought together."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor
from torch._C import _len_torch_function_stack
from torch.overrides import TorchFunctionMode, _pop_mode, _push_mode
from torch.utils import _pytree as pytree

from shardwright.profiler.recording.callsites import applied_name, call_site, functions_applied
from shardwright.profiler.recording.unitgraph import function_name
from shardwright.sharder.runtime.placing.moving import Mover, moved, rewrite

__all__ = ["AlignGlue", "changes_operand"]


class AlignGlue(TorchFunctionMode):
    """Brings the operands of glue together, on the latest stage among them: later ones need what earlier ones made.

    Only the glue that the capture found is touched, by function and call site; another operation that mixes devices
    stays the error it is. Where the capture may not know all paths, ``sites`` is None and all glue is touched.
    """

    MEANS_TO_MIX = frozenset({"to", "copy_", "type_as", "set_", "cuda", "cpu", "__get__", "__set__", "is_set_to"}) | {
        "grad",
        "backward",
    }
    """Functions that take tensors on two devices."""
    MEANS_TO_MIX |= {"_pack_padded_sequence", "_pad_packed_sequence"}  # the sizes stay on the CPU
    CHANGES_STATISTICS = frozenset({"batch_norm", "instance_norm"})
    """Functions that write running statistics, which are not their first operands."""

    def __init__(
        self, sites: frozenset[tuple[str, str]] | None, order: list[torch.device], task: int | None = None
    ) -> None:
        super().__init__()
        self.sites = sites
        self.order = order
        self.task = task
        self.applied: ExitStack | None = None

    def begin(self) -> None:
        """Take effect below all other modes, so that those of the model itself end as if this one were not there."""
        if self.sites is None or any(function.endswith(".apply") for function, _ in self.sites):
            self.applied = ExitStack()
            self.applied.enter_context(functions_applied(self._apply))
        if not _len_torch_function_stack():  # nearly always
            _push_mode(self)
            return
        above = [_pop_mode() for _ in range(_len_torch_function_stack())]
        if above and above[-1] is getattr(torch._GLOBAL_DEVICE_CONTEXT, "device_context", None):
            _push_mode(above.pop())  # that of torch.set_default_device, which wants to be the lowest
        for mode in (self, *reversed(above)):
            _push_mode(mode)

    def end(self) -> None:
        """Have no more effect."""
        if self.applied is not None:
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
        if len(tensors) < 2:
            return func(*args, **kwargs)
        homes = [t.device for t in tensors if t.dim() or t.device.type != "cpu"]
        if len(set(homes)) < 2 or (self.sites is not None and (function, call_site(sys._getframe())) not in self.sites):
            return func(*args, **kwargs)
        if name.startswith("_foreach_") and changes_operand(name):
            return func(*_beside_each(args), **kwargs)
        written = pytree.tree_leaves(kwargs["out"]) if kwargs.get("out") is not None else []
        writes_first = not written and changes_operand(name)
        device = (written or tensors)[0].device if written or writes_first else max(homes, key=self._stage)
        if name in self.CHANGES_STATISTICS:
            return _with_statistics(func, args, kwargs, device)
        return func(*moved(args, device), **moved(kwargs, device))

    def _stage(self, device: torch.device) -> int:
        return self.order.index(device) if device in self.order else -1


def _beside_each(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The operands of a function that changes each tensor of its first: those of the others beside it."""
    devices = [tensor.device for tensor in args[0]]

    def aligned(operand: Any) -> Any:
        if isinstance(operand, (list, tuple)) and len(operand) == len(devices):
            return [moved(item, device) for item, device in zip(operand, devices, strict=True)]
        return operand

    return args[0], *map(aligned, args[1:])


def _with_statistics(func: Callable[..., Any], args: Any, kwargs: dict[str, Any], device: torch.device) -> Any:
    """Call a normalisation on ``device``; statistics that it changed there are brought back to where they lie.

    PyTorch does not count these changes in the tensors' versions, so that values are compared.
    """
    there = Mover(device, writes=())
    result = func(*there(args), **there(kwargs))
    for tensor in pytree.tree_leaves((args, kwargs)):
        if isinstance(tensor, Tensor) and tensor.device != device and not tensor.requires_grad:
            rewrite(tensor, there(tensor), counted=False)
    return result


def changes_operand(name: str) -> bool:
    """Whether the function of this name writes its first operand, which therefore cannot be replaced by a copy."""
    name = name.rpartition(".")[2]
    return name == "__setitem__" or name.startswith("__i") or (name.endswith("_") and not name.endswith("__"))
