"""Moving: the tensors inside whatever is passed around come to one device, and what was written can be put back.

A container that a callee may write is handed on itself: its tensors are replaced for the time of the call, and
:meth:`Mover.put_back` gives it back those that are still there. So what the callee wrote stays, as without a placement.
"""

from __future__ import annotations

import copy
import dataclasses
import operator
from collections import UserDict, deque
from collections.abc import Callable, Container, Iterable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils import _pytree as pytree

from shardwright.profiler.recording.structure import tensors_of

__all__ = ["Mover", "containers_in", "fetched", "is_accelerated", "may_hold", "moved", "rewrite", "write_back"]

_WITHOUT_INSIDE = (str, bytes, int, float, complex, type(None), torch.Size, torch.dtype, nn.Module, type)


def moved(value: Any, device: torch.device) -> Any:
    """``value`` with its tensors on ``device``: itself where they are there already, else a copy of what holds them."""
    if isinstance(value, Tensor):
        return value if value.device == device else value.to(device)
    return Mover(device, writes=())(value)


def fetched(tensor: Tensor, device: torch.device) -> Tensor:
    """``tensor`` on ``device``: itself, or a copy that counts its changes, in inference mode too."""
    if not torch.is_inference_mode_enabled():
        return tensor.to(device)
    with torch.inference_mode(mode=False), torch.no_grad():
        return tensor.to(device)


def write_back(tensor: Tensor, there: Tensor) -> None:
    """Give ``tensor`` what its copy ``there`` was changed to in place, with the gradient of that.

    Not another shape: a copy that was made one (``unsqueeze_``) has left its values as they were.
    """
    if there.shape == tensor.shape:
        tensor.copy_(there)


@torch.no_grad()
def rewrite(tensor: Tensor, changed: Tensor, *, counted: bool) -> None:
    """Write the values of ``changed``, which may lie elsewhere, into ``tensor``, if they are others.

    Args:
        counted: as a change in place that PyTorch counts; it does not count those of running statistics, and finds them
            in a backward pass that would refuse a tensor that was changed.
    """
    values = changed.to(tensor.device)
    if torch.equal(values, tensor):
        return
    version = None if counted or tensor.is_inference() else tensor._version
    tensor.copy_(values)
    if version is not None:
        torch._C._autograd._unsafe_set_version_counter((tensor,), (version,))


class Mover:
    """Brings the tensors in values to one device, each tensor once.

    Lists, dictionaries, namespaces and dataclasses are written in place; tuples and whatever else is registered with
    ``torch.utils._pytree`` are made anew around what moved; of objects that know how to move (``to``), such as batches
    of graphs, copies are moved. Others, such as caches, are left as they are.

    Args:
        device: where to.
        renamed: a ``torch.device`` among the values becomes that device too.
        lengths_stay: what may be lengths of sequences stays on the CPU, where PyTorch wants them to pack sequences.
        writes: by ``id``, the containers that are written in place; of others copies are made. None: all are.
    """

    def __init__(
        self,
        device: torch.device,
        *,
        renamed: bool = False,
        lengths_stay: bool = False,
        writes: Container[int] | None = None,
    ) -> None:
        self.device = device
        self.renamed = renamed
        self.lengths_stay = lengths_stay
        self.writes = writes
        self.written: dict[int, Any] = {}
        """The containers met that a callee may write, by ``id``."""
        self.held: list[Tensor] = []
        """The tensors met in them."""
        self._versions: dict[int, int] = {}
        """By ``id`` of a tensor, the version of its copy when that was made."""
        self._known: dict[int, tuple[Any, Any]] = {}
        """What each value became, by ``id``; the values are kept, so that no ``id`` is given anew."""

    def __call__(self, value: Any) -> Any:
        """``value`` with its tensors there."""
        if isinstance(value, _WITHOUT_INSIDE):
            return value
        if isinstance(value, torch.device):
            return self.device if self.renamed else value
        if isinstance(value, Tensor) and (value.device == self.device or self._stays(value)):
            return value
        known = self._known.get(id(value))
        if known is None:
            self._known[id(value)] = value, value  # where a container holds itself
            known = self._known[id(value)] = value, self._there(value)
        return known[1]

    def leave(self, tensors: Iterable[Tensor]) -> None:
        """Leave these where they are."""
        self._known.update({id(tensor): (tensor, tensor) for tensor in tensors})

    def _stays(self, tensor: Tensor) -> bool:
        return self.lengths_stay and tensor.dim() == 1 and tensor.dtype == torch.int64 and tensor.device.type == "cpu"

    def _there(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            tensor = fetched(value, self.device)
            self._versions[id(value)] = tensor._version
            return tensor
        if isinstance(value, PackedSequence):  # the sizes of a packed sequence stay on the CPU
            return value.to(self.device)  # type: ignore[arg-type]  # torch's stub knows the dtype only
        slots = _slots(value)
        if slots is not None:
            return self._rewritten(value, *slots)
        kind = _registered(value)
        if kind is None:
            return self._by_itself(value) if callable(getattr(value, "to", None)) else value
        parts, context = kind.flatten_fn(value)
        there = [self(part) for part in parts]
        return value if all(map(operator.is_, there, parts)) else kind.unflatten_fn(there, context)

    def _by_itself(self, value: Any) -> Any:
        """A copy of an object that was asked to move, if it holds tensors elsewhere: such a ``to`` may be in place."""
        away = [tensor for tensor in tensors_of(value) if tensor.device != self.device and not self._stays(tensor)]
        return copy.copy(value).to(self.device) if away else value

    def _rewritten(self, container: Any, slots: list[tuple[Any, Any]], write: Callable[[Any, Any, Any], None]) -> Any:
        in_place = not _is_frozen(container) and (self.writes is None or id(container) in self.writes)
        if in_place:
            self.written[id(container)] = container
            self.held += [item for _, item in slots if isinstance(item, Tensor)]
        target = container
        for key, item in slots:
            there = self(item)
            if there is not item:
                target = container if in_place else copy.copy(container) if target is container else target
                write(target, key, there)
        return target

    def write_back(self) -> None:
        """Change tensors in place as their copies were."""
        for key, version in self._versions.items():
            value, there = self._known[key]
            if there is not value and there._version != version:
                write_back(value, there)

    def put_back(self, kept: Container[int] = ()) -> None:
        """Give containers back what was replaced in them and is still there, except those in ``kept``, by ``id``."""
        originals = {id(there): value for value, there in self._known.values() if there is not value}
        for container in self.written.values():
            slots, write = _slots(container) or ([], setattr)
            for key, item in slots if id(container) not in kept else ():
                if id(item) in originals:
                    write(container, key, originals[id(item)])


def containers_in(value: Any) -> frozenset[int]:
    """The ``id`` of each container in ``value`` that can be written."""
    met: dict[int, Any] = {}
    left = [value]
    while left:
        inner = left.pop()
        if isinstance(inner, (Tensor, *_WITHOUT_INSIDE)) or id(inner) in met:
            continue
        slots = _slots(inner)
        if slots is not None:
            met[id(inner)] = inner
            left += [item for _, item in slots[0]]
        elif (kind := _registered(inner)) is not None:
            left += kind.flatten_fn(inner)[0]
    return frozenset(met)


def may_hold(value: Any) -> bool:
    """Whether there may be containers in ``value``."""
    return not isinstance(value, (Tensor, torch.device, *_WITHOUT_INSIDE))


def is_accelerated(value: Any) -> bool:
    """Whether ``value`` is a tensor that is not on the CPU."""
    return isinstance(value, Tensor) and value.device.type != "cpu"


def _slots(value: Any) -> tuple[list[tuple[Any, Any]], Callable[[Any, Any, Any], None]] | None:
    """What a container that can be written holds, by key, and how it is written; None if ``value`` is none."""
    if isinstance(value, (list, deque)):
        return list(enumerate(value)), operator.setitem
    if isinstance(value, (dict, UserDict)):
        return list(value.items()), operator.setitem
    if isinstance(value, SimpleNamespace):
        return list(vars(value).items()), setattr
    if dataclasses.is_dataclass(value):
        fields = [(field.name, getattr(value, field.name, None)) for field in dataclasses.fields(value)]
        return fields, object.__setattr__ if _is_frozen(value) else setattr
    return None


def _registered(value: Any) -> pytree.NodeDef | None:
    """How ``value`` is taken apart, one level, and put together, if PyTorch knows.

    Not ``tree_flatten``: it leaves a cycle, so that tensors would live on until the garbage is collected.
    """
    return pytree.SUPPORTED_NODES.get(pytree._get_node_type(value))


def _is_frozen(value: Any) -> bool:
    parameters = getattr(value, "__dataclass_params__", None)
    return parameters is not None and parameters.frozen
