"""Structures: the tensors inside whatever a forward passes around, and copies with other tensors in their place.

Tuples, lists, dicts and what is registered with ``torch.utils._pytree`` are looked into; so are the attributes of other
objects, such as dataclasses and caches.
"""

from __future__ import annotations

import copy
import dataclasses
import enum
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

__all__ = [
    "PLAIN",
    "Hole",
    "copied",
    "dense_parts",
    "filled",
    "has_state",
    "map_tensors",
    "nbytes",
    "tensor_at",
    "tensors_in",
    "tensors_of",
]

DEPTH = 6
"""Objects inside objects are looked into so deep."""
PLAIN = (
    *(str, bytes, int, float, complex, bool, type(None), range, type, enum.Enum, torch.dtype, torch.device),
    *(torch.layout, torch.memory_format, torch.Generator, nn.Module, types.ModuleType),
    *(types.FunctionType, types.BuiltinFunctionType, types.MethodType),
)
"""Types of which nothing is looked into."""
_LEAVES = frozenset([str, bytes, int, float, complex, bool, type(None), torch.dtype, torch.device])
_CONTAINERS = frozenset([tuple, list, dict])
"""Types themselves, told at once: the many classes of :data:`PLAIN` take long to try."""


def tensors_in(value: Any) -> list[tuple[str, Tensor]]:
    """Every tensor in ``value`` with the path to it, as it would be written: ``[0]``, ``['mask']``, ``.hidden``."""
    found: list[tuple[str, Tensor]] = []
    _walk(value, "", DEPTH, set(), found)
    return found


def tensors_of(value: Any) -> list[Tensor]:
    """The tensors that :func:`tensors_in` finds, without their paths: in half the time."""
    found: list[Tensor] = []
    _gather(value, set(), found)
    return found


def tensor_at(value: Any, index: int) -> Tensor:
    """The tensor at ``index`` of :func:`tensors_in`."""
    return tensors_in(value)[index][1]


def dense_parts(tensor: Tensor) -> tuple[Tensor, ...]:
    """The dense tensors that a sparse or jagged one is made of, indices first; a dense one is its own."""
    if tensor.layout == torch.strided:
        return (tensor,)
    if tensor.layout == torch.jagged:
        return tensor.offsets(), tensor.values()  # type: ignore[attr-defined]  # it is a NestedTensor
    if tensor.layout == torch.sparse_coo:
        return tensor._indices(), tensor._values()
    compressed = tensor.layout in (torch.sparse_csr, torch.sparse_bsr)
    first, second = (
        (tensor.crow_indices, tensor.col_indices) if compressed else (tensor.ccol_indices, tensor.row_indices)
    )
    return first(), second(), tensor.values()


def nbytes(tensor: Tensor) -> int:
    """Bytes of the tensor's elements; of a sparse one, of those that it holds and their indices."""
    return sum(part.element_size() * part.numel() for part in dense_parts(tensor))


def _walk(value: Any, path: str, depth: int, open_: set[int], found: list[tuple[str, Tensor]]) -> None:
    if isinstance(value, Tensor):
        found.append((path, value))
        return
    if _is_plain(value) or not depth or id(value) in open_:
        return
    open_.add(id(value))
    for key, inner in _children(value):
        if type(inner) not in _LEAVES:
            _walk(inner, path + key, depth - 1 if key.startswith(".") else depth, open_, found)
    open_.discard(id(value))


def _gather(value: Any, open_: set[int], found: list[Tensor]) -> None:
    kind = type(value)
    if kind is Tensor or kind is nn.Parameter:
        found.append(value)
    elif kind is tuple:
        for inner in value:
            _gather(inner, open_, found)
    elif kind is list or kind is dict:
        if id(value) not in open_:
            open_.add(id(value))
            for inner in value if kind is list else value.values():
                _gather(inner, open_, found)
            open_.discard(id(value))
    elif kind not in _LEAVES:
        pairs: list[tuple[str, Tensor]] = []
        _walk(value, "", DEPTH, open_, pairs)
        found += [tensor for _, tensor in pairs]


def _is_plain(value: Any) -> bool:
    kind = type(value)
    return kind in _LEAVES or (kind not in _CONTAINERS and isinstance(value, PLAIN))


def _children(value: Any) -> list[tuple[str, Any]]:
    """What ``value`` holds, by how it is written."""
    if isinstance(value, Mapping):
        return [(f"[{key!r}]", inner) for key, inner in value.items()]
    if isinstance(value, (tuple, list)):
        return [(f"[{index}]", inner) for index, inner in enumerate(value)]
    if isinstance(value, (set, frozenset)):
        return []
    if isinstance(value, slice):
        return [(".start", value.start), (".stop", value.stop), (".step", value.step)]
    return [(f".{name}", inner) for name, inner in _attributes(value).items()]


def _attributes(value: Any) -> dict[str, Any]:
    if dataclasses.is_dataclass(value):
        return {field.name: getattr(value, field.name, None) for field in dataclasses.fields(value)}
    attributes = dict(getattr(value, "__dict__", {}))
    for class_ in type(value).__mro__:
        slots = class_.__dict__.get("__slots__", ())
        for name in [slots] if isinstance(slots, str) else slots:
            if hasattr(value, name) and not name.startswith("__"):
                attributes[name] = getattr(value, name)
    return attributes


def has_state(value: Any) -> bool:
    """Whether ``value`` is an object that a call could change, so that each call needs a copy of its own."""
    if isinstance(value, Tensor) or _is_plain(value):
        return False
    return isinstance(value, (list, dict, set, Mapping)) or bool(_attributes(value))


@dataclasses.dataclass(frozen=True)
class Hole:
    """Where a tensor was; ``index`` says which."""

    index: int

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return memo.get(self.index, self)


def copied(value: Any, replace: Callable[[Tensor], Any]) -> Any:
    """A deep copy of ``value`` with ``replace(tensor)`` for each tensor; what cannot be copied is shared."""
    found = tensors_in(value)
    # The originals are kept beside their copies, for an address must stay theirs as long as the memo lives.
    return _deep_copy(value, {id(tensor): replace(tensor) for _, tensor in found})


def filled(template: Any, tensors: tuple[Tensor, ...] | list[Tensor]) -> Any:
    """A deep copy of ``template`` with ``tensors`` in its :class:`Hole` places; what cannot be copied is shared."""
    return _deep_copy(template, dict(enumerate(tensors)))


def _deep_copy(value: Any, memo: dict[int, Any]) -> Any:
    try:
        return copy.deepcopy(value, dict(memo))
    except Exception:  # locks, generators, open files: shared, as they would be in the model
        # What has no inside goes first: in a cycle, whatever leads to it would seem to refuse as well.
        for part in sorted(_parts(value, set()), key=_has_inside):
            try:
                copy.deepcopy(part, dict(memo))
            except Exception:
                memo[id(part)] = part
        return copy.deepcopy(value, memo)


def _parts(value: Any, seen: set[int]) -> Iterator[Any]:
    """Everything in ``value``, the inner before the outer."""
    if id(value) in seen:
        return
    seen.add(id(value))
    for _, inner in _children(value) if _has_inside(value) else ():
        yield from _parts(inner, seen)
    yield value


def _has_inside(value: Any) -> bool:
    return not isinstance(value, Tensor) and not _is_plain(value) and bool(_children(value))


def map_tensors(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """``value`` with ``function`` applied to its tensors; objects that hold some are copied."""

    def mapped(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return function(leaf)
        return copied(leaf, function) if has_state(leaf) else leaf

    return pytree.tree_map(mapped, value)
