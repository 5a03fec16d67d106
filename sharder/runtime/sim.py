"""Simulated devices ``sim:0``, ``sim:1``, …: real numbers, computed on the CPU; devices do not mix, as on CUDA.

They check a placement on a machine without GPUs. A tensor on ``sim:k`` is a wrapper around a CPU tensor; operations on
it run on the CPU tensors, after a check that all operands are on one device. PyTorch's Python backend interface, which
this rests on, is experimental: nothing outside this file touches it. Backward works with ``cpu`` and ``sim:0`` only,
since autograd's engine knows one device of such a backend, and only if the first simulated device was made before the
process's first backward, when the engine counts the devices.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import return_and_correct_aliasing

__all__ = ["DeviceMismatchError", "SimTensor", "crossings_watched", "on_host", "parameters_may_move", "sim_device"]

NAME = "sim"
_COPIES = {"aten::_to_copy", "aten::copy_", "aten::_copy_from", "aten::_copy_from_and_resize", "aten::set_"}
"""Operations whose point is to read one device and write another."""


class DeviceMismatchError(RuntimeError):
    """An operation met tensors on different devices; ``operation`` names it."""

    def __init__(self, operation: str, devices: list[str]) -> None:
        super().__init__(
            f"Expected all tensors to be on the same device, but {operation} found at least two devices, "
            f"{devices[0]} and {devices[1]}!"
        )
        self.operation = operation
        self.devices = devices


@cache
def _backend() -> torch.library.Library:
    """Register the backend, once a process; the library must live as long."""
    from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

    _setup_privateuseone_for_python_backend(NAME)
    library = torch.library.Library("_", "IMPL")
    library.fallback(_compute, "PrivateUse1")
    return library


def sim_device(index: int) -> torch.device:
    """The simulated device ``sim:index``."""
    _backend()
    return torch.device(NAME, index)


_watchers: list[Callable[[Tensor], None]] = []


@contextmanager
def crossings_watched(tell: Callable[[Tensor], None]) -> Iterator[None]:
    """Call ``tell`` with each tensor that is copied from one simulated device to another."""
    _watchers.append(tell)
    try:
        yield
    finally:
        _watchers.remove(tell)


class SimTensor(Tensor):
    """A tensor on ``sim:k``; ``host`` holds its numbers."""

    host: Tensor

    @staticmethod
    def __new__(cls: type[SimTensor], host: Tensor, device: torch.device) -> SimTensor:  # noqa: D102
        made: SimTensor = Tensor._make_wrapper_subclass(
            cls,
            host.size(),
            strides=host.stride(),
            storage_offset=host.storage_offset(),
            dtype=host.dtype,
            device=device,
        )
        made.host = host
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        return _compute(func, *args, **(kwargs or {}))

    def __repr__(self) -> str:  # type: ignore[override]  # torch's takes contents that we have no use for
        return f"SimTensor({self.host!r}, device={str(self.device)!r})"

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        copied = SimTensor(self.host.clone(), self.device).requires_grad_(self.requires_grad)
        made = torch.nn.Parameter(copied, self.requires_grad) if isinstance(self, torch.nn.Parameter) else copied
        memo[id(self)] = made
        return made


def on_host(value: Any) -> Any:
    """``value`` with the tensors on simulated devices replaced by ordinary ones, outside autograd."""
    return pytree.tree_map_only(SimTensor, lambda t: t.host.detach(), value)


def _compute(func: Any, *args: Any, **kwargs: Any) -> Any:
    """Run one operator: check the devices, compute on the host's tensors, put the results on the device."""
    name = func._schema.name
    tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    # As on CUDA, a CPU tensor without dimensions goes with any device.
    homes = list(dict.fromkeys(t.device for t in tensors if t.dim() or t.device.type != "cpu"))
    if len(homes) > 1 and name not in _COPIES:
        raise DeviceMismatchError(name.replace("::", "."), [str(device) for device in homes])
    asked = kwargs.get("device")
    device = torch.device(asked) if asked is not None else (homes or [torch.device("cpu")])[0]
    if name == "aten::copy_":
        device = args[0].device
    if name in _COPIES and device.type == NAME and homes[-1].type == NAME and homes[-1] != device:
        for tell in _watchers:
            tell(tensors[-1])
    if asked is not None:
        kwargs = kwargs | {"device": torch.device("cpu")}
    host_args, host_kwargs = pytree.tree_map_only(SimTensor, lambda t: t.host, (args, kwargs))
    result = func(*host_args, **host_kwargs)
    if device.type == NAME:
        if device.index is None:
            device = sim_device(0)
        result = pytree.tree_map_only(Tensor, lambda t: SimTensor(t, device), result)
    return (
        return_and_correct_aliasing(func, args, kwargs, result)
        if _has_sim(tensors) and _has_sim_result(result)
        else result
    )


def _has_sim(tensors: list[Tensor]) -> bool:
    return any(isinstance(t, SimTensor) for t in tensors)


def _has_sim_result(result: Any) -> bool:
    return any(isinstance(t, SimTensor) for t in pytree.tree_leaves(result))


@contextmanager
def parameters_may_move() -> Iterator[None]:
    """Let ``Module.to`` replace parameters: one on a simulated device cannot take over another's storage."""
    before = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        yield
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(before)
