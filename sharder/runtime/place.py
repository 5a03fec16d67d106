"""Placing: each unit onto its device, in place, with hooks only where tensors really cross.

The model's class, forward, parameter names and ``state_dict`` stay as they are. What is added are hooks, all of the
classes in this file, so that :func:`unplace` finds and removes every one of them, also in a copy of the model.
"""

from __future__ import annotations

import dataclasses
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, _get_current_function_mode
from torch.utils import _pytree as pytree

from shardwright.errors import ShardwrightError
from shardwright.profiler.recorder import applied_name, call_site, functions_applied
from shardwright.profiler.structure import map_tensors, tensors_in
from shardwright.profiler.unitgraph import function_name
from shardwright.sharder.planning.plan import Plan
from shardwright.sharder.runtime.check import check_model
from shardwright.sharder.runtime.sim import parameters_may_move

__all__ = ["AlignGlue", "Enter", "Leave", "MoveInputs", "hooks_of", "place", "relocate", "unplace"]


def place(model: nn.Module, plan: Plan, *, devices: Mapping[str, str | torch.device] | None = None) -> nn.Module:
    """Move every unit of ``model`` to its device in ``plan``, in place, and make the tensors that cross follow.

    The model is then called, trained, saved and loaded as before; inputs may be on any device, and outputs come back
    on the device of the inputs. A parameter that units on several devices share stays one tensor, on the device of the
    first of them, and is brought to the others for their calls. :func:`unplace` undoes it all. A model that was placed
    already is placed anew.

    Args:
        devices: plan device -> torch device, for those that differ; CPU workers are ``cpu`` by default, since in one
            process they share it.

    Raises:
        ShardwrightError: the plan is for another model, or a device is not here.
    """
    check_model(plan, model)
    homes = _resolve(plan, devices or {})
    unplace(model)
    origins = {name: tensor.device for name, tensor in _tensors(model)}
    home_of = _tensor_homes(model, plan, homes)
    relocate(model, home_of)

    if len(set(homes.values())) == 1 and homes[plan.stages[0].device].type == "cpu":
        return model  # one torch device: nothing can cross
    tensors = dict(_tensors(model))
    moves = _located(plan, homes, {name: tensor.device for name, tensor in tensors.items()})
    borrowed = _borrowed(model, plan, homes)
    for path, device in _unit_homes(plan, homes).items():
        unit = model.get_submodule(path)
        if path in borrowed:
            borrow = Borrow(model, device, borrowed[path])
            unit.register_forward_pre_hook(borrow)
            unit.register_forward_hook(Return(borrow), always_call=True)
        if path in moves.units:
            unit.register_forward_pre_hook(MoveInputs(device), with_kwargs=True)
        if path in moves.close_before:
            unit.register_forward_pre_hook(Window(opens=False), prepend=True)
        if path in moves.open_after:
            unit.register_forward_hook(Window(opens=True))
    enter = Enter(homes, moves.glue, origins, open_first="" in moves.open_after)
    model.register_forward_pre_hook(enter, with_kwargs=True, prepend=True)
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
    relocate(model, {id(tensor): origins[name] for name, tensor in _tensors(model) if name in origins})
    return model


def hooks_of(model: nn.Module) -> Iterator[tuple[nn.Module, dict[int, Any], int]]:
    """Every hook of ours in ``model``: its module, the dictionary that holds it, and its key there."""
    for module in model.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key, hook in list(hooks.items()):
                if isinstance(hook, (MoveInputs, Enter, Leave, Borrow, Return, Window)):
                    yield module, hooks, key


def relocate(model: nn.Module, home_of: Mapping[int, torch.device]) -> None:
    """Move parameters and buffers, by the ``id`` of the tensor, each with its gradient; shared ones stay one tensor."""
    shared: dict[int, list[tuple[dict[str, Any], str]]] = {}
    for module in model.modules():
        for own in (module._parameters, module._buffers):
            for name, tensor in own.items():
                if tensor is not None:
                    shared.setdefault(id(tensor), []).append((own, name))
    alike = [places for places in shared.values() if len(places) > 1]
    homes = dict(home_of)
    for _, tensor in _tensors(model):
        if tensor.grad is not None and id(tensor) in homes:
            homes[id(tensor.grad)] = homes[id(tensor)]
    kept = [(tensor, tensor.grad) for _, tensor in _tensors(model)]  # no id is given anew while they are in use
    for module in model.modules():
        own_tensors = [t for _, t in _tensors(module, recurse=False)]
        if all(t.device == homes.get(id(t), t.device) for t in own_tensors):
            continue
        types = {t.device.type for t in own_tensors} | {homes[id(t)].type for t in own_tensors if id(t) in homes}
        with parameters_may_move() if "sim" in types else nullcontext():
            module._apply(lambda tensor: tensor.to(homes.get(id(tensor), tensor.device)), recurse=False)
    for places in alike:
        for own, name in places[1:]:
            own[name] = places[0][0][places[0][1]]
    del kept


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


def _unit_homes(plan: Plan, homes: Mapping[str, torch.device]) -> dict[str, torch.device]:
    return {node.unit: homes[node.device] for node in plan.nodes if node.kind == "unit"}


def _tensor_homes(model: nn.Module, plan: Plan, homes: Mapping[str, torch.device]) -> dict[int, torch.device]:
    """Where each parameter and buffer goes, by its ``id``: to the first step of the forward that uses it."""
    first: dict[str, tuple[int, torch.device]] = {}
    for order, node in enumerate(plan.nodes):
        if node.kind in ("unit", "parameter") and node.unit:
            first.setdefault(node.unit, (order, homes[node.device]))
    unused = (len(plan.nodes), homes[plan.stages[0].device])
    found: dict[int, tuple[int, torch.device]] = {}
    for name, tensor in [
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ]:
        users = [first[path] for path in _prefixes(name) if path in first] or [unused]
        candidates = [*users, *([found[id(tensor)]] if id(tensor) in found else [])]
        found[id(tensor)] = min(candidates, key=lambda user: user[0])
    return {key: device for key, (_, device) in found.items()}


def _borrowed(model: nn.Module, plan: Plan, homes: Mapping[str, torch.device]) -> dict[str, list[str]]:
    """By unit: names of the parameters and buffers that it uses and another device holds.

    They are its own, shared with another unit, or those of a module that it gets as an argument.
    """
    tensors = dict([*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)])
    attributes = {node.node: node.unit for node in plan.nodes if node.kind == "parameter" and node.unit}
    given: dict[str, list[str]] = {}
    for node in plan.nodes:
        if node.kind == "unit":
            given.setdefault(node.unit, []).extend(attributes[name] for name in node.inputs if name in attributes)
    found: dict[str, list[str]] = {}
    for path, device in _unit_homes(plan, homes).items():
        own = [name for name in tensors if name.startswith(f"{path}.")]
        names = [name for name in dict.fromkeys([*own, *given[path]]) if tensors[name].device != device]
        if names:
            found[path] = names
    return found


class _Moves(NamedTuple):
    """What has to be done at run time."""

    units: set[str]
    """Units whose inputs may lie elsewhere."""
    glue: frozenset[tuple[str, str]] | None
    """Function and call site of the glue whose operands may lie apart; None = any."""
    open_after: set[str]
    """Units after which such glue may come; "" = the beginning of the forward."""
    close_before: set[str]
    """Units before which no more comes."""


def _located(plan: Plan, homes: Mapping[str, torch.device], held: Mapping[str, torch.device]) -> _Moves:
    """Follow the tensors through the forward: glue runs where its operands are.

    Inputs and outputs count as lying on the first stage's device: the model's own hooks move them. Of constants, of
    glue that reads no tensor, such as ``torch.arange(n, device=x.device)``, and of what follows from it, the place is
    not known. A parameter is where ``held`` says. Where the forward may take another path than the captured one, every
    glue may need to be aligned.
    """
    moves = _Moves(set(), frozenset(), set(), set())
    apart: set[tuple[str, str]] = set()
    located: dict[str, torch.device | None] = {}
    unit, is_open = "", False
    for node in plan.nodes:
        operands = {located[name] for name in node.inputs}
        located[node.node] = homes[node.device]
        if node.kind == "input":
            located[node.node] = homes[plan.stages[0].device]
        elif node.kind == "parameter":
            located[node.node] = held.get(node.unit)  # a constant is wherever the model made it
        elif node.kind == "unit":
            if operands - {homes[node.device]} or plan.obstacles:
                moves.units.add(node.unit)
            if is_open or plan.obstacles:
                moves.close_before.add(node.unit)
            unit, is_open = node.unit, False
        elif node.kind == "glue":
            located[node.node] = next(iter(operands)) if len(operands) == 1 else None
            if len(operands) > 1 or (None in operands and len(node.inputs) > 1):
                apart.add((node.type, node.site))
                moves.open_after.add(unit)
                is_open = True
    if plan.obstacles:
        return moves._replace(glue=None, open_after={"", *_unit_homes(plan, homes)})
    return moves._replace(glue=frozenset(apart))


def _moved(value: Any, device: torch.device) -> Any:
    """``value`` with its tensors on ``device``; dataclasses are looked into, other objects are left as they are."""
    if isinstance(value, Tensor):
        return value.to(device)

    def mapped(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return leaf.to(device)
        if dataclasses.is_dataclass(leaf) and not isinstance(leaf, type) and tensors_in(leaf):
            return map_tensors(lambda tensor: tensor.to(device), leaf)
        return leaf

    return pytree.tree_map(mapped, value)


class MoveInputs:
    """Forward pre-hook of a unit: fetch what lies on other devices; a device among the arguments becomes the unit's."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def __call__(self, _module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """Move the arguments."""
        device = self.device
        return (
            tuple([device if isinstance(arg, torch.device) else _moved(arg, device) for arg in args]),
            {key: device if isinstance(arg, torch.device) else _moved(arg, device) for key, arg in kwargs.items()},
        )


class Borrow:
    """Forward pre-hook of a unit: bring the parameters that it shares with a unit on another device, for this call."""

    def __init__(self, model: nn.Module, device: torch.device, names: list[str]) -> None:
        self.model = model
        self.device = device
        self.names = names
        self.lenders: list[tuple[dict[str, Any], str, Tensor]] = []

    def __call__(self, _module: nn.Module, _args: Any) -> None:
        """Put copies in the places of the parameters; gradients flow back through them."""
        for name in self.names:
            holder, _, own = name.rpartition(".")
            owner = self.model.get_submodule(holder)
            held = owner._parameters if own in owner._parameters else owner._buffers
            tensor = held[own]
            if tensor is not None:
                self.lenders.append((held, own, tensor))
                held[own] = tensor.to(self.device)  # type: ignore[assignment]  # a copy is no Parameter


class Return:
    """Forward hook of a unit, called after an error too: put back what :class:`Borrow` replaced."""

    def __init__(self, borrow: Borrow) -> None:
        self.borrow = borrow

    def __call__(self, _module: nn.Module, _args: Any, _output: Any) -> None:
        """Put the parameters back."""
        while self.borrow.lenders:
            held, own, tensor = self.borrow.lenders.pop()
            held[own] = tensor


class _Call:
    """A running forward of a placed model: where its inputs came from, and its aligner, if it has one."""

    def __init__(self, came_from: torch.device | None, mode: AlignGlue | None) -> None:
        self.came_from = came_from
        self.mode = mode
        self.open = False

    def align(self, *, opens: bool) -> None:
        """Begin to align glue, or stop. A mode that is not the innermost cannot be stopped, and stays."""
        if self.mode is None or opens == self.open:
            return
        if opens:
            self.mode.__enter__()  # ended by another hook
        elif _get_current_function_mode() is not self.mode:
            return
        else:
            self.mode.__exit__(None, None, None)
        self.open = opens


class _Calls(threading.local):
    """The forwards of placed models that run in this thread, innermost last."""

    def __init__(self) -> None:
        self.stack: list[_Call] = []


_calls = _Calls()


class Window:
    """Hook before or after a unit: glue that needs aligning comes only between certain units."""

    def __init__(self, *, opens: bool) -> None:
        self.opens = opens

    def __call__(self, *_: Any) -> None:
        """Begin to align, or stop."""
        if _calls.stack:
            _calls.stack[-1].align(opens=self.opens)


class Enter:
    """Forward pre-hook of the model: inputs come to the first device, and glue can be aligned until the forward ends.

    Args:
        homes: plan device -> torch device, in the order of the stages.
        glue: see :class:`AlignGlue`.
        origins: where each parameter and buffer was before, by name.
        open_first: whether glue before the first unit needs aligning.
    """

    def __init__(
        self,
        homes: dict[str, torch.device],
        glue: frozenset[tuple[str, str]] | None,
        origins: dict[str, torch.device],
        *,
        open_first: bool,
    ) -> None:
        self.homes = homes
        self.glue = glue
        self.origins = origins
        self.open_first = open_first

    def __call__(self, _module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """Move the arguments, and begin to align."""
        order = list(self.homes.values())
        first = next((leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)), None)
        mode = AlignGlue(self.glue, order) if self.glue is None or self.glue else None
        call = _Call(None if first is None else first.device, mode)
        # Noted before anything can fail, since Leave is called after an error too.
        _calls.stack.append(call)
        moved = tuple([_moved(arg, order[0]) for arg in args]), {k: _moved(v, order[0]) for k, v in kwargs.items()}
        call.align(opens=self.open_first)
        return moved


class Leave:
    """Forward hook of the model, called after an error too: alignment ends, outputs return to the inputs' device."""

    def __call__(self, _module: nn.Module, _args: Any, _kwargs: Any, output: Any) -> Any:
        """End what :class:`Enter` began, and move the output."""
        call = _calls.stack.pop()
        call.align(opens=False)
        return output if call.came_from is None else _moved(output, call.came_from)


class AlignGlue(TorchFunctionMode):
    """Brings the operands of glue together, on the latest stage among them: later ones need what earlier ones made.

    Only the glue that the capture found is touched, by function and call site; another operation that mixes devices
    stays the error it is. Where the capture may not know all paths, ``sites`` is None and all glue is touched.
    """

    MEANS_TO_MIX = frozenset({"to", "copy_", "type_as", "set_", "cuda", "cpu", "__get__", "__set__", "is_set_to"})

    def __init__(self, sites: frozenset[tuple[str, str]] | None, order: list[torch.device]) -> None:
        super().__init__()
        self.sites = sites
        self.order = order
        self.applied = ExitStack()

    def __enter__(self) -> Any:
        if self.sites is None or any(function.endswith(".apply") for function, _ in self.sites):
            self.applied.enter_context(functions_applied(self._apply))
        return super().__enter__()  # type: ignore[no-untyped-call]

    def __exit__(self, *error: Any) -> None:
        self.applied.close()
        super().__exit__(*error)  # type: ignore[no-untyped-call]

    def _apply(
        self, function: type[torch.autograd.Function], call: Callable[..., Any], args: Any, kwargs: dict[str, Any]
    ) -> Any:
        return self._aligned(call, applied_name(function), "", args, kwargs)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in self.MEANS_TO_MIX:
            return func(*args, **kwargs)
        return self._aligned(func, function_name(func), name, args, kwargs)

    def _aligned(
        self, func: Callable[..., Any], function: str, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        homes = [t.device for t in tensors if t.dim() or t.device.type != "cpu"]
        if len(set(homes)) < 2 or (self.sites is not None and (function, call_site(sys._getframe())) not in self.sites):
            return func(*args, **kwargs)
        device = homes[0] if _in_place(name, kwargs) else max(homes, key=self._stage)
        return func(*_moved(args, device), **_moved(kwargs, device))

    def _stage(self, device: torch.device) -> int:
        return self.order.index(device) if device in self.order else -1


def _in_place(name: str, kwargs: Mapping[str, Any]) -> bool:
    """Whether the function writes its first operand, which therefore cannot be replaced by a copy."""
    in_name = name.startswith("__i") or (name.endswith("_") and not name.endswith("__"))
    return name == "__setitem__" or in_name or "out" in kwargs
