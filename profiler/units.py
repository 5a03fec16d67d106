"""Units: which modules are placed whole, and how large a unit should be.

The children of containers are units to begin with. How much work a module does is counted, not timed, so that the same
model is divided alike on every day: a pass over the forward adds up the arithmetic and the bytes that each module's
operators take. A unit too large for the devices to share the work evenly is opened, as long as it has an inside; a
module too small to matter stays closed, whatever it holds.
"""

from __future__ import annotations

import fnmatch
import hashlib
from collections.abc import Callable, Container, Mapping, Sequence
from contextlib import ExitStack
from functools import cache
from typing import Any

import torch
from torch import nn

from shardwright.errors import ShardwrightError
from shardwright.profiler.recording.operations import Operation, OperationRecorder

__all__ = ["choose_units", "find_units", "module_work", "structure_digest"]

CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
WHOLE = (nn.MultiheadAttention, nn.RNNBase, nn.RNNCellBase, nn.Embedding, nn.modules.batchnorm._NormBase)
"""Modules that compute with their parameters themselves, whatever they hold."""
OPERATIONS_PER_BYTE = 10.0
"""So much arithmetic takes as long as moving a byte: between a CPU core's ratio and a GPU's."""
LARGE = 4
"""A unit is opened when it does more than this part of an even share of a device: 1 / 4."""
LARGE_CHECKPOINTED = 2
"""Likewise, of a module that the forward checkpoints as a whole: opened, its units each keep what they are given."""
SMALL = 64
"""A module stays closed when it does less than this part of an even share of a device: 1 / 64."""


def find_units(model: nn.Module) -> dict[str, nn.Module]:
    """The units of ``model`` by their path in ``named_modules()``, by its structure alone.

    A child of a container is a unit, unless it is a container itself, whose children are then the units. On the way
    down to the containers, a module without any inside is a unit; the forward of one with containers inside is glue.
    A module that is reached by several paths has one unit, under the first.
    """

    def opened(_path: str, module: nn.Module, *, in_container: bool) -> bool:
        return isinstance(module, CONTAINERS) or (not in_container and _holds_container(module))

    return _collected(model, opened)


def choose_units(
    model: nn.Module,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    devices: int = 2,
    depth: int | None = None,
    patterns: Sequence[str] = (),
    checkpointed: Container[str] = (),
    returned: Callable[[Any], None] | None = None,
) -> dict[str, nn.Module]:
    """The units of ``model`` at the grain that an even split over ``devices`` devices needs.

    Args:
        args: inputs that the model runs on, once, in the mode that it is in.
        kwargs: likewise.
        devices: how many the work is to be shared by.
        depth: units lie so deep in the model, 1 = its own children, instead.
        patterns: paths of modules, such as ``decoder.layers.*``, that are units, whatever they hold.
        checkpointed: paths of modules that the forward checkpoints as a whole.
        returned: is called with the model's result, if it is run: not where ``depth`` or ``patterns`` settle all.

    Raises:
        ShardwrightError: a pattern matches no module that could be a unit.
    """
    chosen = {path for pattern in patterns for path in _matching(model, pattern)}

    @cache  # what depth and patterns settle needs no run
    def work_of() -> dict[str, float]:
        return module_work(model, args, dict(kwargs or {}), returned)

    def opened(path: str, module: nn.Module, *, in_container: bool) -> bool:
        if path in chosen or isinstance(module, WHOLE) or not any(True for _ in module.children()):
            return False
        if any(other.startswith(f"{path}.") for other in chosen):
            return True
        if depth is not None:
            return path.count(".") + 1 < depth or (isinstance(module, CONTAINERS) and not _is_called(module))
        work, share = work_of(), work_of()[""] / devices
        if path not in work:  # never called: its children may be, one by one
            return isinstance(module, CONTAINERS) or (not in_container and _holds_container(module))
        holds = isinstance(module, CONTAINERS) or (not in_container and _holds_container(module))
        if holds and path not in checkpointed:
            return work[path] > share / SMALL
        return work[path] > share / (LARGE_CHECKPOINTED if path in checkpointed else LARGE) and not _is_compiled(module)

    return _collected(model, opened)


def _matching(model: nn.Module, pattern: str) -> list[str]:
    """The paths of the modules that ``pattern`` asks for, which are not all inside of what is never opened."""
    modules = {path: module for path, module in model.named_modules() if path}
    matching = [path for path in modules if fnmatch.fnmatchcase(path, pattern)]
    if not matching:
        raise ShardwrightError(f"--unit {pattern}: no module of {type(model).__name__} matches; `profile` lists them")
    whole = [path for path, module in modules.items() if isinstance(module, WHOLE)]
    around = [next((path for path in whole if match.startswith(f"{path}.")), "") for match in matching]
    if all(around):
        raise ShardwrightError(
            f"--unit {pattern}: {around[0]} ({type(modules[around[0]]).__name__}) is never opened, for it computes "
            "with its parameters itself"
        )
    return matching


def _collected(model: nn.Module, opened: Callable[..., bool]) -> dict[str, nn.Module]:
    """The modules at which going down through the ``opened`` ones ends."""
    units: dict[str, nn.Module] = {}
    seen: set[nn.Module] = set()

    def collect(module: nn.Module, path: str) -> None:
        for name, child in module.named_children():
            if child in seen:
                continue
            seen.add(child)
            child_path = f"{path}.{name}" if path else name
            if opened(child_path, child, in_container=isinstance(module, CONTAINERS)):
                collect(child, child_path)
            else:
                units[child_path] = child

    collect(model, "")
    return units or {"": model}


def _holds_container(module: nn.Module) -> bool:
    return any(isinstance(inner, CONTAINERS) for inner in module.modules())


def _is_called(module: nn.Module) -> bool:
    """Whether a container has a forward: lists and dictionaries have none."""
    return type(module).forward is not nn.Module.forward


def _is_compiled(module: nn.Module) -> bool:
    """Whether what is inside is no longer called as Python."""
    return isinstance(module, torch.jit.ScriptModule) or hasattr(module, "_orig_mod")


def module_work(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], returned: Callable[[Any], None] | None = None
) -> dict[str, float]:
    """How much each module that is called does in one forward, what it calls included; ``""`` is the model itself.

    In bytes that would take as long to move; what a module's name costs is what its first name costs.

    Args:
        returned: is called with the model's result.
    """
    work: dict[str, float] = {"": 0.0}
    running: list[str] = []

    def add(operation: Operation) -> None:
        amount = operation.bytes + operation.flops / OPERATIONS_PER_BYTE
        for path in {"", *running}:
            work[path] = work.get(path, 0.0) + amount

    with ExitStack() as hooks, torch.no_grad():
        for path, module in model.named_modules():
            if path:
                # As nn.Module's own methods, for a scripted module hides them.
                entered = nn.Module.register_forward_pre_hook(module, lambda *_, p=path: running.append(p))
                left = nn.Module.register_forward_hook(module, lambda *_: _pop(running), always_call=True)
                hooks.callback(entered.remove)
                hooks.callback(left.remove)
        with OperationRecorder(add):
            result = model(*args, **kwargs)
    if returned is not None:
        returned(result)
    return work


def _pop(running: list[str]) -> None:
    running.pop()


def structure_digest(model: nn.Module) -> str:
    """Digest of all modules' names and classes, and of the state's names, shapes, dtypes and ties.

    Buffers that are not saved are left out: some are made by the first forward.
    """
    digest = hashlib.sha256()
    number: dict[int, int] = {}
    for path, module in model.named_modules():
        digest.update(f"{path}:{type(module).__qualname__}\n".encode())
        kept = [(n, b) for n, b in module._buffers.items() if n not in module._non_persistent_buffers_set]
        for name, tensor in [*module._parameters.items(), *kept]:
            if tensor is not None:
                which = number.setdefault(id(tensor), len(number))
                digest.update(f".{name}:{tuple(tensor.shape)}:{tensor.dtype}:{which}\n".encode())
    return digest.hexdigest()[:16]
