"""Units: which modules are placed whole."""

from __future__ import annotations

import hashlib

from torch import nn

__all__ = ["find_units", "structure_digest"]

CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def find_units(model: nn.Module) -> dict[str, nn.Module]:
    """The units of ``model`` by their path in ``named_modules()``.

    A child of a container is a unit, unless it is a container itself, whose children are then the units. On the way
    down to the containers, a module without any inside is a unit; the forward of one with containers inside is glue.
    A module that is reached by several paths has one unit, under the first.
    """
    units: dict[str, nn.Module] = {}
    _collect(model, "", units, seen=set())
    return units or {"": model}


def _collect(module: nn.Module, path: str, units: dict[str, nn.Module], seen: set[nn.Module]) -> None:
    in_container = isinstance(module, CONTAINERS)
    for name, child in module.named_children():
        if child in seen:
            continue
        seen.add(child)
        child_path = f"{path}.{name}" if path else name
        if isinstance(child, CONTAINERS) or (not in_container and _holds_container(child)):
            _collect(child, child_path, units, seen)
        else:
            units[child_path] = child


def _holds_container(module: nn.Module) -> bool:
    return any(isinstance(inner, CONTAINERS) for inner in module.modules())


def structure_digest(model: nn.Module, units: dict[str, nn.Module]) -> str:
    """Digest of the units' names and classes and of all parameters' and buffers' names, shapes and dtypes."""
    digest = hashlib.sha256()
    for path, unit in units.items():
        digest.update(f"{path}:{type(unit).__qualname__}\n".encode())
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        digest.update(f"{name}:{tuple(tensor.shape)}:{tensor.dtype}\n".encode())
    return digest.hexdigest()[:16]
