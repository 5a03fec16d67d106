"""What a capture has built in of a model beside its units: the numbers, switches and modules that its forward goes by.

A pipelined model does not run its own forward, so that an attribute which is changed later, a coefficient or a switch,
changes nothing until the model is captured anew. So each call asks whether all that is as it was: the attributes of the
modules that hold units, what switches the units have, and which modules they are. Units run as they are, and parameters
and buffers are looked up for each call: their values do not count. Nor do attributes of classes, and of objects that
are no configurations, such as a trainer.
"""

from __future__ import annotations

import argparse
import dataclasses
import weakref
from collections import deque
from collections.abc import Collection, Hashable, Iterable, Mapping
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
_SWITCHES = (bool, str)
"""What a unit has of these the module that holds it may go by; others are its own, such as counters and caches."""
_DEEP = 8
"""Containers inside each other are looked through so far."""
_MANY = 4_000
"""So many things are looked at for one call, which takes some milliseconds; what is left is known by what it is."""


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
    teller = _Teller()
    facts: list[tuple[str, Hashable]] = []
    left: list[tuple[str, nn.Module | None, Tree]] = [("", model, units)]
    while left:
        path, module, inner = left.pop()
        facts.append((path, _Itself(module)))
        if module is None:
            continue
        held = vars(module)
        own = [(name, held[name]) for name in sorted(held.keys() - _OWN)]
        if not inner:  # a unit, or a module beside them
            facts += [
                (f"{path}.{name}", value) for name, value in own if isinstance(value, _SWITCHES) and name[0] != "_"
            ]
            continue
        facts += [(f"{path}.{name}", teller.told(value, _DEEP)) for name, value in own]
        facts += _forms(path, module)
        for name, child in module._modules.items():
            left.append((f"{path}.{name}", child, inner.get(name, {})))
            if name not in inner and child is not None:  # such as a list of parameters
                facts += _forms(f"{path}.{name}", child)
    return tuple(facts)


def _forms(path: str, module: nn.Module) -> list[tuple[str, Hashable]]:
    """Which parameters and buffers a module has itself; their values are looked up for each call."""
    held = (*module._parameters.items(), *module._buffers.items())
    return [(f"{path}.{name}", None if tensor is None else tensor.requires_grad) for name, tensor in held]


def changed_name(before: tuple[tuple[str, Hashable], ...], now: tuple[tuple[str, Hashable], ...]) -> str:
    """The first attribute in which two differ."""
    known = dict(before)
    return next((name for name, fact in now if known.get(name) != fact), "an attribute").removeprefix(".")


class _Teller:
    """Tells values of attributes, for one call."""

    def __init__(self) -> None:
        self.left = _MANY

    def told(self, value: Any, depth: int) -> Hashable:
        """A value by what it holds, where that can be told."""
        self.left -= 1
        if isinstance(value, float):
            return repr(value)  # nan is itself then
        if isinstance(value, _PLAIN):
            return type(value).__name__, value
        inside = None if isinstance(value, (Tensor, nn.Module, type)) else _inside(value)
        if inside is None or not depth or len(inside) > self.left:
            return _Itself(value)
        parts = [(key, self.told(part, depth - 1)) for key, part in inside]
        return type(value).__name__, frozenset(parts) if isinstance(value, (set, frozenset)) else tuple(parts)


def _inside(value: Any) -> Collection[tuple[Hashable, Any]] | None:
    """What a container or a configuration holds, with keys where it has some; None where it is neither."""
    if isinstance(value, (list, tuple, deque, set, frozenset)):
        return [(None, part) for part in value] if len(value) <= _MANY else None
    settings = value if isinstance(value, Mapping) else _settings(value)
    return None if settings is None else settings.items()


def _settings(value: Any) -> Mapping[Any, Any] | None:
    """What a configuration holds; None where it is none."""
    if dataclasses.is_dataclass(value):
        return {field.name: getattr(value, field.name, None) for field in dataclasses.fields(value)}
    if isinstance(value, (SimpleNamespace, argparse.Namespace)) or hasattr(type(value), "to_dict"):
        found: Mapping[Any, Any] | None = getattr(value, "__dict__", None)
        return found
    return None
