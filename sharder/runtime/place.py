"""Placing: each unit onto its device, in place, with hooks only where tensors really cross.

The model's class, forward, parameter names and ``state_dict`` stay as they are. What is added are hooks, all of the
classes in this file, so that :func:`unplace` finds and removes every one of them, also in a copy of the model.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from shardwright.errors import ShardwrightError
from shardwright.profiler.trace import call_site, function_name
from shardwright.sharder.planning.plan import Plan
from shardwright.sharder.runtime.check import check_model
from shardwright.sharder.runtime.sim import parameters_may_move

__all__ = ["AlignGlue", "Enter", "Leave", "MoveInputs", "hooks_of", "move_own", "place", "unplace"]


def place(model: nn.Module, plan: Plan, *, devices: Mapping[str, str | torch.device] | None = None) -> nn.Module:
    """Move every unit of ``model`` to its device in ``plan``, in place, and make the tensors that cross follow.

    The model is then called, trained, saved and loaded as before; inputs may be on any device, and outputs come back
    on the device of the inputs. :func:`unplace` undoes it. A model that was placed already is placed anew.

    Args:
        devices: plan device -> torch device, for those that differ; CPU workers are ``cpu`` by default, since in one
            process they share it.

    Raises:
        ShardwrightError: the plan is for another model, or a device is not here.
    """
    check_model(plan, model)
    homes = _resolve(plan, devices or {})
    unplace(model)
    moves = _located(plan, homes)
    home = homes[plan.stages[0].device]
    units = {node.unit: homes[node.device] for node in plan.nodes if node.kind == "unit"}
    origins = {name: tensor.device for name, tensor in _tensors(model)}
    for path, module in model.named_modules():
        unit = next((u for u in _prefixes(path) if u in units), None)
        move_own(module, units[unit] if unit is not None else home)
    _move_direct_parameters(model, plan, homes)

    if len(set(homes.values())) == 1 and home.type == "cpu":
        return model  # one torch device: nothing can cross
    for unit, device in moves.units.items():
        model.get_submodule(unit).register_forward_pre_hook(MoveInputs(device), with_kwargs=True)
    model.register_forward_pre_hook(Enter(homes, moves.glue, origins), with_kwargs=True, prepend=True)
    model.register_forward_hook(Leave(), with_kwargs=True, always_call=True)
    return model


def unplace(model: nn.Module) -> nn.Module:
    """Remove everything that :func:`place` added, and move the model back to where it came from."""
    origins: dict[str, torch.device] = {}
    for module, hooks, key in list(hooks_of(model)):
        hook = hooks.pop(key)
        if isinstance(hook, Enter):
            origins = hook.origins
        own_flags = (module._forward_hooks_with_kwargs, module._forward_hooks_always_called)
        for flags in own_flags if hooks is module._forward_hooks else (module._forward_pre_hooks_with_kwargs,):
            flags.pop(key, None)
    for path, module in model.named_modules():
        own = [f"{path}.{name}" if path else name for name, _ in _tensors(module, recurse=False)]
        targets = {origins[name] for name in own if name in origins}
        if targets:
            move_own(module, targets.pop())
    return model


def hooks_of(model: nn.Module) -> Iterator[tuple[nn.Module, dict[int, Any], int]]:
    """Every hook of ours in ``model``: its module, the dictionary that holds it, and its key there."""
    for module in model.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key, hook in list(hooks.items()):
                if isinstance(hook, (MoveInputs, Enter, Leave)):
                    yield module, hooks, key


def move_own(module: nn.Module, device: torch.device) -> None:
    """Move the parameters and buffers that ``module`` holds itself, its children's left alone."""
    if all(tensor.device == device for _, tensor in _tensors(module, recurse=False)):
        return
    types = {device.type, *(t.device.type for _, t in _tensors(module, recurse=False))}
    with parameters_may_move() if "sim" in types else nullcontext():
        module._apply(lambda tensor: tensor.to(device), recurse=False)


def _tensors(module: nn.Module, *, recurse: bool = True) -> list[tuple[str, Tensor]]:
    return [*module.named_parameters(recurse=recurse), *module.named_buffers(recurse=recurse)]


def _prefixes(path: str) -> Iterator[str]:
    """The path and those above it: ``a.b.c``, ``a.b``, ``a``."""
    while path:
        yield path
        path = path.rpartition(".")[0]


def _resolve(plan: Plan, devices: Mapping[str, str | torch.device]) -> dict[str, torch.device]:
    """Plan device -> torch device."""
    for name in devices:
        if name not in plan.devices:
            raise ShardwrightError(f"the plan does not use {name}; it uses {', '.join(plan.devices)}")
    homes = {}
    for name in plan.devices:
        device = torch.device(devices.get(name, "cpu" if name.startswith("cpu") else name))
        if device.type == "cuda" and (
            not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()
        ):
            count = torch.cuda.device_count() if torch.cuda.is_available() else 0
            raise ShardwrightError(
                f"the plan uses {name}, and this machine has {count} CUDA devices; "
                f'pass devices={{"{name}": ...}} to place it elsewhere, or check the plan with verify'
            )
        homes[name] = device
    return homes


class _Moves(NamedTuple):
    """What has to be done at run time."""

    units: dict[str, torch.device]
    """Units whose inputs may lie elsewhere."""
    glue: frozenset[tuple[str, str]]
    """Function and call site of the glue whose operands may lie apart."""


def _located(plan: Plan, homes: Mapping[str, torch.device]) -> _Moves:
    """Follow the tensors through the forward: glue runs where its operands are.

    Inputs and outputs count as lying on the first stage's device: the model's own hooks move them. Of glue that reads
    no tensor, such as ``torch.arange(n, device=x.device)``, and of what follows from it, the place is not known.
    """
    units: dict[str, torch.device] = {}
    apart: set[tuple[str, str]] = set()
    located: dict[str, torch.device | None] = {}
    for node in plan.nodes:
        operands = {located[name] for name in node.inputs}
        located[node.node] = homes[node.device]
        if node.kind == "input":
            located[node.node] = homes[plan.stages[0].device]
        elif node.kind == "unit" and operands - {homes[node.device]}:
            units[node.unit] = homes[node.device]
        elif node.kind == "glue":
            located[node.node] = operands.pop() if len(operands) == 1 else None
            if operands:
                apart.add((node.type, node.site))
    return _Moves(units, frozenset(apart))


def _move_direct_parameters(model: nn.Module, plan: Plan, homes: Mapping[str, torch.device]) -> None:
    """Parameters and buffers that the forward uses outside any unit go where the plan uses them."""
    for node in plan.nodes:
        if node.kind == "parameter" and node.unit:
            holder, _, name = node.unit.rpartition(".")
            _move_tensor(model.get_submodule(holder), name, homes[node.device])


def _move_tensor(module: nn.Module, name: str, device: torch.device) -> None:
    """Move one parameter or buffer of ``module``; a parameter stays the same object where torch can keep it."""
    tensor = getattr(module, name)
    if tensor.device == device:
        return
    if not isinstance(tensor, nn.Parameter):
        module._buffers[name] = tensor.to(device)
    elif "sim" in (device.type, tensor.device.type):
        module._parameters[name] = nn.Parameter(tensor.detach().to(device), tensor.requires_grad)
    else:
        tensor.data = tensor.data.to(device)


def _moved(value: Any, device: torch.device) -> Any:
    """``value`` with its tensors on ``device``."""
    return pytree.tree_map_only(Tensor, lambda tensor: tensor.to(device), value)


class MoveInputs:
    """Forward pre-hook of a unit: fetch what lies on other devices."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def __call__(self, _module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """Move the arguments."""
        return _moved(args, self.device), _moved(kwargs, self.device)


class _Calls(threading.local):
    """The forwards of placed models that run in this thread, innermost last."""

    def __init__(self) -> None:
        self.stack: list[tuple[torch.device | None, AlignGlue | None]] = []


_calls = _Calls()


class Enter:
    """Forward pre-hook of the model: inputs come to the first device, and glue is aligned until the forward ends."""

    def __init__(
        self,
        homes: dict[str, torch.device],
        glue: frozenset[tuple[str, str]],
        origins: dict[str, torch.device],
    ) -> None:
        self.homes = homes
        self.glue = glue
        self.origins = origins

    def __call__(self, _module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """Move the arguments, and begin to align."""
        tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        order = list(self.homes.values())
        mode = AlignGlue(self.glue, order) if self.glue else None
        if mode is not None:
            mode.__enter__()  # type: ignore[no-untyped-call]  # ended by Leave, in another call
        # Noted before anything can fail, since Leave is called after an error too.
        _calls.stack.append((tensors[0].device if tensors else None, mode))
        return _moved(args, order[0]), _moved(kwargs, order[0])


class Leave:
    """Forward hook of the model, called after an error too: alignment ends, outputs return to the inputs' device."""

    def __call__(self, _module: nn.Module, _args: Any, _kwargs: Any, output: Any) -> Any:
        """End what :class:`Enter` began, and move the output."""
        came_from, mode = _calls.stack.pop()
        if mode is not None:
            mode.__exit__(None, None, None)  # type: ignore[no-untyped-call]
        return output if came_from is None else _moved(output, came_from)


class AlignGlue(TorchFunctionMode):
    """Brings the operands of glue together, on the latest stage among them: later ones need what earlier ones made.

    Only the glue that the capture found is touched; another operation that mixes devices stays the error it is.
    """

    MEANS_TO_MIX = frozenset({"to", "copy_", "type_as", "set_", "cuda", "cpu", "__get__", "__set__", "is_set_to"})

    def __init__(self, sites: frozenset[tuple[str, str]], order: list[torch.device]) -> None:
        super().__init__()
        self.sites = sites
        self.order = order

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in self.MEANS_TO_MIX:
            return func(*args, **kwargs)
        tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        homes = [t.device for t in tensors if t.dim() or t.device.type != "cpu"]
        if len(set(homes)) < 2 or (function_name(func), call_site(sys._getframe())) not in self.sites:
            return func(*args, **kwargs)
        device = homes[0] if _in_place(name, kwargs) else max(homes, key=self._stage)
        return func(*_moved(args, device), **_moved(kwargs, device))

    def _stage(self, device: torch.device) -> int:
        return self.order.index(device) if device in self.order else -1


def _in_place(name: str, kwargs: Mapping[str, Any]) -> bool:
    """Whether the function writes its first operand, which therefore cannot be replaced by a copy."""
    in_name = name.startswith("__i") or (name.endswith("_") and not name.endswith("__"))
    return name == "__setitem__" or in_name or "out" in kwargs
