"""What a capture has built in of a model beside its units: the numbers, switches and modules that its forward goes by.

A pipelined model does not run its own forward, so that an attribute which is changed later, a coefficient or a switch,
changes nothing until the model is captured anew. So each call asks whether all that is as it was: the attributes of the
modules that hold units, and which modules the units are. Units run as they are, and parameters and buffers are looked
up for each call: none of these counts. Nor do attributes of objects that are no configurations, such as a trainer.
"""

from __future__ import annotations

import argparse
import dataclasses
import weakref
from collections import deque
from collections.abc import Hashable, Iterable, Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Tree", "baked", "changed_name", "tree_of"]

Tree = dict[str, "Tree"]
"""By name, the children of a module that are units or hold some; of a unit there is nothing."""

_OWN = frozenset(vars(nn.Module()))
"""What PyTorch keeps in a module."""
_PLAIN = (str, bytes, int, complex, bool, type(None), torch.dtype, torch.device, torch.Size)
_DEEP = 3
"""Containers inside each other are looked through so far."""
_MANY = 256
"""Longer ones are known by what they are, not by what they hold."""


class _Itself:
    """Equal to what is the same object, as long as that lives; it is not kept alive where it can be told so."""

    __slots__ = ("number", "of")

    def __init__(self, of: Any) -> None:
        self.number = id(of)
        try:
            self.of: Any = weakref.ref(of)
        except TypeError:
            self.of = lambda: of

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Itself) and (mine := self.of()) is not None and other.of() is mine

    def __hash__(self) -> int:
        return self.number


def tree_of(paths: Iterable[str]) -> Tree:
    """The modules at ``paths``, and those that hold them."""
    tree: Tree = {}
    for path in paths:
        inner = tree
        for name in path.split("."):
            inner = inner.setdefault(name, {})
    return tree


def baked(model: nn.Module, units: Tree) -> tuple[tuple[str, Hashable], ...]:
    """What each attribute of ``model`` and of the modules that hold ``units`` is, and which modules they are; equal
    for equal ones."""
    facts: list[tuple[str, Hashable]] = []
    left: list[tuple[str, nn.Module | None, Tree]] = [("", model, units)]
    while left:
        path, module, inner = left.pop()
        facts.append((path, _Itself(module)))
        if module is None or not inner:
            continue
        own = vars(module).items()
        facts += [(f"{path}.{name}", _told(value, _DEEP)) for name, value in own if name not in _OWN]
        left += [(f"{path}.{name}", module._modules.get(name), deeper) for name, deeper in inner.items()]
    return tuple(facts)


def changed_name(before: tuple[tuple[str, Hashable], ...], now: tuple[tuple[str, Hashable], ...]) -> str:
    """The first attribute in which two differ."""
    known = dict(before)
    return next((name for name, fact in now if known.get(name) != fact), "an attribute").removeprefix(".")


def _told(value: Any, depth: int) -> Hashable:
    """A value of an attribute, by what it holds where that can be told."""
    if isinstance(value, float):
        return repr(value)  # nan is itself then
    if isinstance(value, _PLAIN):
        return type(value).__name__, value
    if depth and isinstance(value, (set, frozenset)) and len(value) <= _MANY:
        return type(value).__name__, frozenset([_told(part, depth - 1) for part in value])
    parts = _parts(value) if depth and not isinstance(value, (Tensor, nn.Module, type)) else None
    if parts is not None and len(parts) <= _MANY:
        return type(value).__name__, tuple([(key, _told(part, depth - 1)) for key, part in parts.items()])
    return _Itself(value)


def _parts(value: Any) -> Mapping[Any, Any] | None:
    """What a container or a configuration holds; None where it is neither, or long."""
    if isinstance(value, Mapping):
        return value
    if isinstance(value, (list, tuple, deque)):
        return dict(enumerate(value)) if len(value) <= _MANY else None
    settings = SimpleNamespace, argparse.Namespace
    if isinstance(value, settings) or dataclasses.is_dataclass(value) or hasattr(type(value), "to_dict"):
        found: Mapping[Any, Any] | None = getattr(value, "__dict__", None)
        return found
    return None
