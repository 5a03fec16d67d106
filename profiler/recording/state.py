"""A model's state while it is tried out: everything that a forward may change is put back.

Buffers, parameters and modes are put back after each run, so that all runs begin alike; what modules keep besides, such
as caches and counters, once all runs are done, so that one run shows what an earlier one has left.
"""

from __future__ import annotations

import enum
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from operator import is_
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from shardwright.profiler.recording.equality import same_values
from shardwright.profiler.recording.structure import PLAIN, nbytes

__all__ = ["Snapshot", "Versions", "attributes_kept"]

SMALL_BYTES = 2**31
"""Of parameters so large together no copy is kept while the model is captured, nor of plain tensors and arrays."""
DEPTH = 1
"""Objects on a module are looked into so deep: deeper ones, such as a trainer's data, cost more than they tell."""
MANY = 10_000
"""A container of more is put back, but what lies in it is not looked into."""

_CONTAINERS: tuple[Any, ...] = (OrderedDict, dict, list, set, deque)
"""Python's own changeable containers; a subclass comes before its base."""


class Snapshot:
    """A model as it was found, to be put back as often as it was run: its state is looked through and copied once.

    What is noted is noted when it is first needed, so between the blocks of the two methods the model has to be as it
    was found.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._attributes: _Attributes | None = None
        self._state: _State | None = None

    @contextmanager
    def attributes_kept(self) -> Iterator[None]:
        """Give every module its attributes back: parameters, buffers, hooks, and what a forward left on it (a cache).

        So too the containers, plain tensors and NumPy arrays among them, at any depth of containers, and those in
        objects that hang on a module or lie in such containers; not those in objects of objects.
        Not a copy of the model: a function that a module holds may refer to the model, and would to the original.
        """
        self._attributes = self._attributes or _Attributes(self.model)
        try:
            yield
        finally:
            self._attributes.put_back()

    @contextmanager
    def state_kept(self) -> Iterator[None]:
        """Put back what a forward may change: buffers (batch statistics), also replaced ones, and training flags.

        Parameters too, which some forwards write (codebooks), unless a copy of them would be large.
        """
        self._state = self._state or _State(self.model)
        try:
            yield
        finally:
            self._state.put_back()


@contextmanager
def attributes_kept(model: nn.Module) -> Iterator[None]:
    """Give every module of ``model`` its attributes back; see :meth:`Snapshot.attributes_kept`."""
    with Snapshot(model).attributes_kept():
        yield


class Versions:
    """Tensors of a model as they are before a forward, to be asked which of them it has changed.

    Asked are PyTorch's own counts of changes: writes past autograd (``.data``) are none, nor those of running
    statistics by batch normalisations, of which the counters are left out, too.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        counters = {id(m.num_batches_tracked) for m in model.modules() if isinstance(m, nn.modules.batchnorm._NormBase)}
        self.before = {
            name: (tensor, None if tensor.is_inference() else tensor._version)
            for name, tensor in (self._registered() | self._hanging()).items()
            if id(tensor) not in counters
        }

    def _registered(self) -> dict[str, Tensor]:
        return dict((*self.model.named_parameters(), *self.model.named_buffers()))

    def _hanging(self) -> dict[str, Tensor]:
        """Tensors that are attributes of modules and no more."""
        return {
            f"{path}.{name}".removeprefix("."): value
            for path, module in self.model.named_modules()
            for name, value in vars(module).items()
            if isinstance(value, Tensor)
        }

    def changed(self) -> tuple[str, ...]:
        """The names of those that have been written, and of parameters and buffers in whose place others are; a mere
        attribute is often a cache, which may be made anew."""
        registered = self._registered()
        return tuple(
            name
            for name, (tensor, version) in self.before.items()
            if registered.get(name, tensor) is not tensor or (version is not None and tensor._version != version)
        )


class _Attributes:
    """How to put back what hangs on the modules of a model."""

    def __init__(self, model: nn.Module) -> None:
        self.undo: list[Callable[[], None]] = []
        self.empty: list[Any] = []  # most of the containers on a module: of hooks that nobody has registered
        self.bytes_left = SMALL_BYTES
        # By identity: what is known is noted once, and the state that is put back after each run not here.
        self.seen = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
        self.alive: list[Any] = []  # an address stays its own as long as the thing lives
        self.kinds: dict[type, _Kind] = {}
        for module in model.modules():
            self._note(vars(module), DEPTH)

    def put_back(self) -> None:
        """Give everything that was noted the content back that it had."""
        for container in self.empty:
            if container:
                container.clear()
        for put_back in reversed(self.undo):
            put_back()

    def _note(self, value: Any, depth: int) -> None:
        """Note ``value`` and all that it holds, objects as deep as ``depth``."""
        waiting = [(value, depth)]
        while waiting:
            value, depth = waiting.pop()
            kind = self.kinds.get(type(value)) or self._kind(value)
            if kind.is_plain or id(value) in self.seen:
                continue
            self.seen.add(id(value))
            self.alive.append(value)
            if kind.container is not None:
                waiting += [(item, depth) for item in self._note_container(value, kind)]
            elif kind.note is not None:
                kind.note(self, value)
            elif kind.is_tuple:
                waiting += [(item, depth) for item in value] if len(value) <= MANY else []
            if depth and kind.has_attributes:
                waiting += [(attributes, depth - 1) for attributes in self._note_attributes(value, kind)]

    def _kind(self, value: Any) -> _Kind:
        """What there is to note of values of this type; looked up once, for there are many values and few types."""
        type_ = type(value)
        is_tensor, is_array = isinstance(value, Tensor), isinstance(value, np.ndarray)
        container = next((kind for kind in _CONTAINERS if isinstance(value, kind)), None)
        self.kinds[type_] = kind = _Kind(
            is_plain=isinstance(value, (enum.Enum, *PLAIN)) and not isinstance(value, tuple) and container is None,
            container=None if is_tensor or is_array else container,
            is_tuple=isinstance(value, tuple),
            note=_Attributes._note_tensor if is_tensor else _Attributes._note_array if is_array else None,
            has_attributes=not isinstance(value, (Tensor, enum.Enum, *PLAIN)) and type_ not in (dict, list, set, tuple),
            slots=tuple(
                name
                for base in type_.__mro__
                for name in _names(base.__dict__.get("__slots__", ()))
                if not name.startswith("__")
            ),
        )
        return kind

    def _note_container(self, container: Any, kind: _Kind) -> Iterable[Any]:
        """Note what ``container`` holds; those of its values that are to be looked into."""
        if not container and type(container) is kind.container:
            self.empty.append(container)
            return ()
        content = _mapping_content if issubclass(kind.container, dict) else _sequence_content
        before = content(kind.container, container)
        self.undo.append(partial(_put_content_back, kind.container, container, content, before))
        return before[-1] if len(before[-1]) <= MANY else ()

    def _note_attributes(self, value: Any, kind: _Kind) -> list[dict[str, Any]]:
        """Note the attributes in slots of an object; the dictionary of its others, to be noted as a container is."""
        before = {name: getattr(value, name) for name in kind.slots if hasattr(value, name)}

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
        return [*([dict(before)] if before else []), *([attributes] if type(attributes) is dict else [])]

    def _note_tensor(self, tensor: Tensor) -> None:
        if _is_empty(tensor) or tensor.is_nested or not self._fits(nbytes(tensor)):
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


class _Kind(NamedTuple):
    """What there is to note of the values of a type."""

    is_plain: bool
    container: Any
    """Python's own kind of container that it is; None = it is none."""
    is_tuple: bool
    note: Callable[[_Attributes, Any], None] | None
    """Notes a value that holds numbers."""
    has_attributes: bool
    slots: tuple[str, ...]


def _mapping_content(kind: Any, container: Any) -> tuple[list[Any], ...]:
    return list(kind.keys(container)), list(kind.values(container))


def _sequence_content(kind: Any, container: Any) -> tuple[list[Any], ...]:
    return (list(kind.__iter__(container)),)


def _put_content_back(
    kind: Any, container: Any, content: Callable[[Any, Any], tuple[list[Any], ...]], before: tuple[list[Any], ...]
) -> None:
    """Give ``container`` the very things back that it held, past what its class makes of it."""
    if kind.__len__(container) == len(before[0]) and all(
        all(map(is_, now, then)) for now, then in zip(content(kind, container), before, strict=True)
    ):
        return
    kind.clear(container)
    if issubclass(kind, dict):
        kind.update(container, zip(*before, strict=True))
    else:
        (kind.extend if hasattr(kind, "extend") else kind.update)(container, *before)


def _holds(parameter: nn.Parameter, values: Tensor) -> bool:
    """Whether a parameter has the values that it had; of all of a model this is asked after each run.

    NumPy compares floats in less than half the time of ``torch.equal``: 32 and 73 ms for 210 MB each, by one thread.
    """
    plain = type(parameter) is nn.Parameter and parameter.layout == torch.strided and not parameter.is_neg()
    here = parameter.device.type == values.device.type == "cpu" and parameter.numel() <= _MOST_COMPARED
    if plain and here and parameter.dtype == values.dtype and parameter.dtype in (torch.float32, torch.float64):
        return np.array_equal(parameter.detach().numpy(), values.numpy())
    return same_values(parameter, values)


_MOST_COMPARED = 1 << 24
"""Numbers at once: NumPy makes as many bytes on the way."""


def _is_empty(tensor: Tensor) -> bool:
    """Whether there are no values to put back."""
    return tensor.is_meta or isinstance(tensor, FakeTensor)


def _names(slots: Any) -> list[str]:
    return [slots] if isinstance(slots, str) else list(slots)


class _State:
    """How to put back the state of a model: buffers, parameters unless they are large, and modes."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.buffers = {name: (buffer, buffer.detach().clone()) for name, buffer in model.named_buffers()}
        parameters = list(model.parameters())
        small = sum(nbytes(p) for p in parameters) <= SMALL_BYTES
        self.parameters = [(p, p.detach().clone()) for p in parameters if small and not _is_empty(p)]
        self.modes = [(module, module.training) for module in model.modules()]

    def put_back(self) -> None:
        """Give each tensor its values back, and the model its buffers and modes."""
        for module, training in self.modes:
            module.training = training
        with torch.no_grad():
            for parameter, values in self.parameters:
                if not _holds(parameter, values):
                    parameter.data.copy_(values)
            for name, (buffer, before) in self.buffers.items():
                if buffer.shape == before.shape and not same_values(buffer, before):
                    buffer.copy_(before)
                holder, _, own = name.rpartition(".")
                self.model.get_submodule(holder)._buffers[own] = buffer
