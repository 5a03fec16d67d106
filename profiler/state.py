"""A model's state while it is tried out: everything that a forward may change is put back.

Buffers, parameters and modes are put back after each run, so that all runs begin alike; what modules keep besides, such
as caches and counters, once all runs are done, so that one run shows what an earlier one has left.
"""

from __future__ import annotations

import enum
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from shardwright.profiler.equality import same_values
from shardwright.profiler.structure import PLAIN, nbytes

__all__ = ["attributes_kept", "state_kept"]

SMALL_BYTES = 2**31
"""Of parameters so large together no copy is kept while the model is captured, nor of plain tensors and arrays."""
DEPTH = 1
"""Objects on a module are looked into so deep: deeper ones, such as a trainer's data, cost more than they tell."""
MANY = 10_000
"""A container of more is put back, but what lies in it is not looked into."""

_CONTAINERS: tuple[Any, ...] = (OrderedDict, dict, list, set, deque)
"""Python's own changeable containers; a subclass comes before its base."""


@contextmanager
def attributes_kept(model: nn.Module) -> Iterator[None]:
    """Give every module its attributes back: parameters, buffers, hooks, and what a forward left on it (a cache).

    So too the containers, plain tensors and NumPy arrays among them, at any depth of containers, and those in objects
    that hang on a module or lie in such containers; not those in objects of objects.
    Not a copy of the model: a function that a module holds may refer to the model itself, and would to the original.
    """
    kept = _Kept(model)
    try:
        yield
    finally:
        for put_back in reversed(kept.undo):
            put_back()


class _Kept:
    """How to put back what hangs on the modules of a model."""

    def __init__(self, model: nn.Module) -> None:
        self.undo: list[Callable[[], None]] = []
        self.bytes_left = SMALL_BYTES
        # By identity: what is known is noted once, and the state that is put back after each run not here.
        self.seen = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
        self.alive: list[Any] = []  # an address stays its own as long as the thing lives
        for module in model.modules():
            self._note(vars(module), DEPTH)

    def _note(self, value: Any, depth: int) -> None:
        """Note ``value`` and all that it holds, objects as deep as ``depth``."""
        waiting = [(value, depth)]
        while waiting:
            value, depth = waiting.pop()
            if id(value) in self.seen:
                continue
            self.seen.add(id(value))
            self.alive.append(value)
            if isinstance(value, Tensor):
                self._note_tensor(value)
            elif isinstance(value, np.ndarray):
                self._note_array(value)
            elif isinstance(value, _CONTAINERS):
                inner = self._note_container(value)
                waiting += [(item, depth) for item in inner] if len(inner) <= MANY else []
            elif isinstance(value, tuple):
                waiting += [(item, depth) for item in value] if len(value) <= MANY else []
            if depth and not isinstance(value, (Tensor, enum.Enum, *PLAIN)):
                waiting += [(attributes, depth - 1) for attributes in self._note_attributes(value)]

    def _note_container(self, container: Any) -> list[Any]:
        """Note what ``container`` holds; its values."""
        kind = next(kind for kind in _CONTAINERS if isinstance(container, kind))
        keyed = issubclass(kind, dict)

        def content() -> list[Any]:
            return list(kind.items(container)) if keyed else list(kind.__iter__(container))

        before = content()

        def put_back() -> None:
            now = content()
            if len(now) == len(before) and all(map(_same_pair if keyed else _same, now, before)):
                return
            kind.clear(container)
            kind.extend(container, before) if hasattr(kind, "extend") else kind.update(container, before)

        self.undo.append(put_back)
        return [value for _, value in before] if keyed else before

    def _note_attributes(self, value: Any) -> list[dict[str, Any]]:
        """Note the attributes in slots of an object; the dictionary of its others, to be noted as a container is."""
        names = [
            name
            for kind in type(value).__mro__
            for name in _names(kind.__dict__.get("__slots__", ()))
            if not name.startswith("__") and hasattr(value, name)
        ]
        before = {name: getattr(value, name) for name in names}

        def put_back() -> None:
            for name, attribute in before.items():
                if getattr(value, name, None) is not attribute:
                    object.__setattr__(value, name, attribute)  # a frozen dataclass refuses its own way

        if before:
            self.undo.append(put_back)
        try:
            attributes = object.__getattribute__(value, "__dict__")
        except AttributeError:
            attributes = None
        return [dict(before), *([attributes] if type(attributes) is dict else [])]

    def _note_tensor(self, tensor: Tensor) -> None:
        if tensor.is_meta or isinstance(tensor, FakeTensor) or tensor.is_nested or not self._fits(nbytes(tensor)):
            return
        before = tensor.detach().clone()

        def put_back() -> None:
            now = tensor.detach()
            if now.shape == before.shape and now.device == before.device and not same_values(now, before):
                with torch.no_grad():
                    tensor.data.copy_(before)

        self.undo.append(put_back)

    def _note_array(self, array: np.ndarray[Any, Any]) -> None:
        if not array.flags.writeable or not self._fits(array.nbytes):
            return
        before = array.copy()

        def put_back() -> None:
            if array.shape == before.shape:
                array[...] = before

        self.undo.append(put_back)

    def _fits(self, size: int) -> bool:
        fits = size <= self.bytes_left
        self.bytes_left -= size if fits else 0
        return fits


def _same(one: Any, other: Any) -> bool:
    return one is other


def _same_pair(one: tuple[Any, Any], other: tuple[Any, Any]) -> bool:
    return one[0] is other[0] and one[1] is other[1]


def _names(slots: Any) -> list[str]:
    return [slots] if isinstance(slots, str) else list(slots)


@contextmanager
def state_kept(model: nn.Module) -> Iterator[None]:
    """Put back what a forward may change: buffers (batch statistics), also replaced ones, and training flags.

    Parameters too, which some forwards write (codebooks), unless a copy of them would be large.
    """
    held = {name: (buffer, buffer.detach().clone()) for name, buffer in model.named_buffers()}
    parameters = list(model.parameters())
    small = sum(nbytes(p) for p in parameters) <= SMALL_BYTES
    kept = [(p, p.detach().clone()) for p in parameters if small]
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
        with torch.no_grad():
            for parameter, values in kept:
                if not parameter.is_meta and not same_values(parameter, values):
                    parameter.data.copy_(values)
            for name, (buffer, before) in held.items():
                if buffer.shape == before.shape and not same_values(buffer, before):
                    buffer.copy_(before)
                holder, _, own = name.rpartition(".")
                model.get_submodule(holder)._buffers[own] = buffer
