"""Weights that come late: modules built without values, which are read straight onto their devices.

A model too large for the machine is built under :func:`empty_weights`, where parameters have shapes and no values, and
gets its values by :func:`fill`. Everything is checked against the files' headers before the first tensor is replaced.
"""

from __future__ import annotations

import threading
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.nn.parameter import is_lazy
from torch.utils.weak import WeakTensorKeyDictionary

from shardwright.errors import ShardwrightError
from shardwright.sharder.runtime.placing.checkpoint import Checkpoint

__all__ = ["check_devices", "check_fill", "empty_weights", "fill"]


class _Building(threading.local):
    """How many :func:`empty_weights` blocks this thread is in."""

    depth = 0


_building = _Building()


@contextmanager
def empty_weights() -> Iterator[None]:
    """Build modules whose parameters have shapes and no values (device ``meta``), and whose buffers are real.

    Initialisation costs nothing; the class, attributes and ``requires_grad`` of each parameter are kept, and tied
    parameters stay tied. It applies to this thread, may be nested, and ends with the block, after an error too. It is
    PyTorch's hook on the registration of parameters: nothing is patched.
    """
    thread = threading.get_ident()
    emptied = WeakTensorKeyDictionary()  # a parameter made once and given to several modules stays one

    def empty(_module: nn.Module, _name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        if parameter is None or parameter.is_meta or is_lazy(parameter) or threading.get_ident() != thread:
            return None
        if parameter not in emptied:
            emptied[parameter] = _parameter_like(parameter, parameter.detach().to("meta"))
        made: nn.Parameter = emptied[parameter]
        return made

    handle = register_module_parameter_registration_hook(empty)  # type: ignore[arg-type]  # torch's says None, and takes a parameter
    _building.depth += 1
    try:
        yield
    finally:
        _building.depth -= 1
        handle.remove()


def fill(
    model: nn.Module,
    checkpoint: Checkpoint,
    device_of: Callable[[str], torch.device],
    *,
    mapped: Container[str] = frozenset(),
) -> None:
    """Give every parameter and persistent buffer of ``model`` its values, in place, each on ``device_of(its name)``.

    Tensors are read one at a time, shard by shard, and converted to the model's dtype. A parameter on ``meta`` is
    replaced by a new one of its class, attributes and ``requires_grad``, at all its names; a real one stays the same
    object where torch can keep it, and loses its gradient. Tied tensors stay one, on the device of their first name.
    Non-persistent buffers keep their values and move. Tensors whose name is ``mapped`` stay in their file, which is
    read when they are used, unless they have to be converted.

    A name is looked up as it is, then by the tensor's other names. If some are still missing, and one prefix added or
    removed finds all of those, it is used, with a warning; what the checkpoint has too much is told by a warning.

    Raises:
        ShardwrightError: the checkpoint lacks a tensor, or has another shape or kind of number; a buffer that no
            checkpoint holds has no value; a device is not here; a file is damaged. Up to here the model is as it was.
            Or a device ran out of memory, or a file failed, on the way: the model is then filled in part.
    """
    slots, rule, sources = _checked(model, checkpoint)
    homes = {slot.names[0]: torch.device(device_of(slot.names[0])) for slot in slots}
    check_devices(homes.values())
    for message in _remarks(slots, rule, sources, checkpoint):
        warnings.warn(message, stacklevel=2)

    for slot in slots:
        if not slot.persistent:
            _put(slot, slot.tensor.to(homes[slot.names[0]]))
    shards: dict[Path, list[tuple[_Slot, str]]] = {}
    for slot, source in sources:
        shards.setdefault(checkpoint._file_of[source], []).append((slot, source))
    for file, held in shards.items():
        for slot, source in held:
            value = checkpoint.mapped(source) if slot.names[0] in mapped else None
            if value is None or value.dtype != slot.tensor.dtype:
                value = checkpoint.load(source, homes[slot.names[0]], slot.tensor.dtype)
            _put(slot, value)
        checkpoint._close(file)  # what was read of a mapped file counts as this process's memory until then


def check_fill(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Raise what :func:`fill` would raise of ``model`` and ``checkpoint`` before it changes anything."""
    _checked(model, checkpoint)


def _checked(model: nn.Module, checkpoint: Checkpoint) -> tuple[list[_Slot], _Rule, list[tuple[_Slot, str]]]:
    """The model's tensors, and where the checkpoint has those that it must have."""
    if _building.depth:
        raise ShardwrightError("fill the model after the `with empty_weights()` block: inside it, values are dropped")
    slots = _slots(model)
    rule, sources = _matched([slot for slot in slots if slot.persistent], checkpoint)
    for slot, source in sources:
        _check(slot, source, checkpoint)
    _check_valueless([slot for slot in slots if not slot.persistent])
    return slots, rule, sources


@dataclass
class _Slot:
    """One tensor of the model, with every name and place that it has."""

    tensor: Tensor
    names: list[str] = field(default_factory=list)
    places: list[tuple[nn.Module, str]] = field(default_factory=list)
    persistent: bool = False


class _Rule(NamedTuple):
    """How a name in the model becomes one in the checkpoint."""

    removed: str = ""
    added: str = ""

    def __call__(self, name: str) -> str | None:
        return self.added + name.removeprefix(self.removed) if name.startswith(self.removed) else None


def _slots(model: nn.Module) -> list[_Slot]:
    """Parameters and buffers in the model's order, tied ones once."""
    slots: dict[int, _Slot] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for key, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if tensor is not None:
                slot = slots.setdefault(id(tensor), _Slot(tensor))
                slot.names.append(f"{path}.{key}" if path else key)
                slot.places.append((module, key))
                slot.persistent |= key not in module._non_persistent_buffers_set
    return list(slots.values())


def _matched(slots: Sequence[_Slot], checkpoint: Checkpoint) -> tuple[_Rule, list[tuple[_Slot, str]]]:
    """Each tensor with its name in the checkpoint, and the prefix rule, which does nothing where none was needed."""
    found = {slot.names[0]: checkpoint.find(slot.names[0], slot.names[1:]) for slot in slots}
    missing = [slot for slot in slots if found[slot.names[0]] is None]
    rule = _Rule()
    if missing:
        free = checkpoint.names - set(found.values())
        serves = _rules(missing, free)
        best = max(serves.values(), default=0)
        rules = sorted(rule for rule, count in serves.items() if count == best)
        if best < len(missing):
            lacking = [slot.names[0] for slot in missing if not rules or not _by(rules[0], slot, free)]
            raise ShardwrightError(
                f"{checkpoint.path} lacks {_first(lacking)} (the model has {len(slots)}), also under another prefix: "
                "give a checkpoint of this model's state_dict, or fill the part of the model that is there"
            )
        if len(rules) > 1:
            raise ShardwrightError(
                f"{missing[0].names[0]} could be {' or '.join(str(_by(rule, missing[0], free)) for rule in rules[:2])} "
                f"in {checkpoint.path}, and so could all {len(missing)} that are missing: rename the checkpoint's"
            )
        rule = rules[0]
        found |= {slot.names[0]: _by(rule, slot, free) for slot in missing}
    return rule, [(slot, source) for slot in slots if (source := found[slot.names[0]]) is not None]


def _rules(slots: Sequence[_Slot], stored: frozenset[str]) -> Counter[_Rule]:
    """For each prefix added or removed, how many of ``slots`` it takes to a stored name."""
    prefixes = defaultdict(list)
    for name in stored:
        for prefix, rest in _splits(name):
            prefixes[rest].append(prefix)
    serves: Counter[_Rule] = Counter()
    for slot in slots:
        added = {_Rule(added=prefix) for name in slot.names for prefix in prefixes.get(name, ())}
        removed = {_Rule(removed=prefix) for name in slot.names for prefix, rest in _splits(name) if rest in stored}
        serves.update(added | removed)
    return serves


def _splits(name: str) -> Iterator[tuple[str, str]]:
    """The ways to divide a name into a prefix and a rest: ``a.`` and ``b.c``, ``a.b.`` and ``c``."""
    for at, letter in enumerate(name):
        if letter == ".":
            yield name[: at + 1], name[at + 1 :]


def _by(rule: _Rule, slot: _Slot, stored: Container[str | None]) -> str | None:
    """Where the rule takes the slot, if it does."""
    return next((source for name in slot.names if (source := rule(name)) in stored), None)


def _check(slot: _Slot, source: str, checkpoint: Checkpoint) -> None:
    """The tensor in the checkpoint has the shape and the kind of number that the model's has."""
    name, tensor = slot.names[0], slot.tensor
    if is_lazy(tensor):
        raise ShardwrightError(f"{name} has no shape yet: call the model once, then fill it")
    here, there = tuple(tensor.shape), checkpoint.shape(source)
    if here != there:
        raise ShardwrightError(f"{name} has shape {here} in the model and {there} in {checkpoint.path}")
    code = checkpoint.dtype(source)
    kind = "real" if code.startswith(("F", "BF")) else "complex" if code.startswith("C") else "integer"
    if kind != ("real" if tensor.is_floating_point() else "complex" if tensor.is_complex() else "integer"):
        raise ShardwrightError(
            f"{name} is {str(tensor.dtype).removeprefix('torch.')} in the model and {code} in {checkpoint.path}: "
            "the checkpoint is quantised, or of another model"
        )


def _check_valueless(slots: Sequence[_Slot]) -> None:
    """Buffers that no checkpoint holds have values."""
    names = [slot.names[0] for slot in slots if slot.tensor.is_meta]
    if names:
        raise ShardwrightError(
            f"{_first(names)} {_are(names)} on meta, not persistent, and so in no checkpoint: "
            "build the model under sw.empty_weights(), which leaves buffers real"
        )


def check_devices(devices: Iterable[torch.device]) -> None:
    """Refuse a device that torch does not find here."""
    for device in dict.fromkeys(devices):
        try:
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as error:
            raise ShardwrightError(f"cannot use {device}: {_line(error)}") from error


def _remarks(
    slots: Sequence[_Slot], rule: _Rule, sources: Sequence[tuple[_Slot, str]], checkpoint: Checkpoint
) -> Iterator[str]:
    """What the user should know although it is no error."""
    if rule.added or rule.removed:
        prefix, how = (rule.added, "added") if rule.added else (rule.removed, "left out")
        yield f"names of the model are looked up in {checkpoint.path} with the prefix {prefix!r} {how}"
    known = {source for _, source in sources}
    known |= {form for slot in slots if slot.persistent for name in slot.names for form in (name, rule(name)) if form}
    unused = sorted(checkpoint.names - known)
    if unused:
        yield f"{checkpoint.path} has {_first(unused)} that the model has no use for"


def _put(slot: _Slot, value: Tensor) -> None:
    """Replace the slot's tensor by ``value``, everywhere."""
    old = slot.tensor
    if isinstance(old, nn.Parameter):
        if torch._has_compatible_shallow_copy_type(old, value):
            old.grad = None
            old.data = value
            return
        value = _parameter_like(old, value)
    for module, key in slot.places:
        setattr(module, key, value)  # not module._parameters[key]: a recurrent network keeps a list of its own too


def _parameter_like(old: nn.Parameter, value: Tensor) -> nn.Parameter:
    """A parameter of the class, attributes and ``requires_grad`` of ``old`` that holds ``value``."""
    if not issubclass(type(old), nn.Parameter):  # a custom tensor marked as a parameter: its attributes are its data
        return nn.Parameter(value, old.requires_grad)
    if type(value) is not Tensor:
        made = nn.Parameter(value, old.requires_grad)
    else:
        made = Tensor._make_subclass(type(old), value, old.requires_grad)
    vars(made).update(vars(old))
    return made


def _first(names: Sequence[str]) -> str:
    """The first of ``names``, and how many more there are."""
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def _are(names: Sequence[str]) -> str:
    return "is" if len(names) == 1 else "are"


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())
