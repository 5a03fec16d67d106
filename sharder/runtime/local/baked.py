"""What a capture has built in of a model beside its units: the numbers, switches and modules that its forward goes by.

A pipelined model does not run its own forward, so that an attribute which is changed later, a coefficient or a switch,
changes nothing until the model is captured anew. So each call asks whether all that is as it was. Units run as they
are, and parameters and buffers are looked up for each call: none of these counts.
"""

from __future__ import annotations

from collections.abc import Container, Hashable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["baked"]

_OWN = frozenset(vars(nn.Module()))
"""What PyTorch keeps in a module; of it only ``_modules`` counts here."""
_PLAIN = (str, bytes, int, complex, bool, type(None), torch.dtype, torch.device, torch.Size)
_DEEP = 3
"""Lists, dictionaries and plain objects inside each other are looked through so far."""
_MANY = 256
"""Longer ones are known by what they are, not by what they hold."""


class _Itself:
    """Equal to what is the same object, which stays while it is remembered: its ``id`` is given to no other."""

    __slots__ = ("of",)

    def __init__(self, of: Any) -> None:
        self.of = of

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Itself) and other.of is self.of

    def __hash__(self) -> int:
        return id(self.of)


def baked(model: nn.Module, units: Container[int]) -> Hashable:
    """Equal for equal attributes of ``model`` and of its modules outside of ``units``, which are given by ``id``."""
    facts: list[Hashable] = []
    seen: set[int] = set()
    left = [model]
    while left:
        module = left.pop()
        facts.append(_Itself(module))
        if id(module) in units or id(module) in seen:
            continue
        seen.add(id(module))
        facts += [(name, _told(value, _DEEP, seen)) for name, value in vars(module).items() if name not in _OWN]
        left += [child for child in module._modules.values() if child is not None]
    return tuple(facts)


def _told(value: Any, depth: int, seen: set[int]) -> Hashable:
    """A value of an attribute, by what it holds where that can be told."""
    if isinstance(value, float):
        return repr(value)  # nan is itself then
    if isinstance(value, _PLAIN):
        return type(value).__name__, value
    if depth and not isinstance(value, (Tensor, nn.Module, type)) and id(value) not in seen:
        parts = list(_parts(value))
        if 0 < len(parts) <= _MANY:
            return type(value).__name__, tuple([(key, _told(part, depth - 1, seen)) for key, part in parts])
    return _Itself(value)


def _parts(value: Any) -> Iterator[tuple[Hashable, Any]]:
    """What a container or a plain object holds; nothing where it is neither."""
    if isinstance(value, Mapping):
        yield from value.items()
    elif isinstance(value, (list, tuple)):
        yield from enumerate(value)
    elif not callable(value):
        yield from getattr(value, "__dict__", {}).items()
