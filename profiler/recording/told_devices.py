"""Devices that a forward names: those that its tensors told it, and those that it means by themselves.

``torch.zeros(n, device=x.device)`` follows ``x``, and so do the stages of a pipeline wherever they are: a device in a
captured call becomes that of its stage. ``lengths.to(torch.device("cpu"))`` means the CPU, as ``lengths.cpu()`` does.
In a model that is captured on the CPU the two are equal, but every ``x.device`` is an object of its own.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

__all__ = ["ToldDevices"]


class ToldDevices:
    """The devices that the tensors of one forward have told it, by identity."""

    def __init__(self) -> None:
        self._told: dict[int, torch.device] = {}

    def note(self, function: Any, args: tuple[Any, ...], result: Any) -> None:
        """Remember the device that a torch function has returned, such as a tensor's, or one made of it."""
        if isinstance(result, torch.device) and (function is not torch.device or any(map(self._is_told, args))):
            self._told[id(result)] = result

    def _is_told(self, value: Any) -> bool:
        return id(value) in self._told

    def meant(
        self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any], tensors: Iterable[Tensor]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of a call; the CPU by name where it moves a tensor there and no tensor told that device.

        What makes new tensors on a device that is meant is left as it is: beside its stage they are as good.

        Args:
            tensors: those that the forward has; what fake ones tell is the object that they hold, and no function tells
                it.
        """
        if getattr(function, "__name__", "") != "to":
            return args, kwargs
        held: set[int] | None = None

        def named(value: Any) -> Any:
            nonlocal held
            if not isinstance(value, torch.device) or value.type != "cpu" or self._is_told(value):
                return value
            if held is None:
                held = {id(tensor.fake_device) for tensor in tensors if isinstance(tensor, FakeTensor)}
            return value if id(value) in held else "cpu"

        return tuple(map(named, args)), {key: named(value) for key, value in kwargs.items()}
