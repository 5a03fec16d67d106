"""Placing: each unit onto its device, in place, with something added only where tensors really cross.

The model's class, parameter names and ``state_dict`` stay as they are. What is added are hooks, and what stands in the
place of the forward of the model itself and of units without hooks, not of their classes; :func:`unplace` removes it.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from shardwright.errors import ShardwrightError
from shardwright.profiler.recording.placed import placement_hooks
from shardwright.sharder.planning.plan import Placement, Plan
from shardwright.sharder.runtime.check import check_model
from shardwright.sharder.runtime.local.inprocess import check_threads, pipe
from shardwright.sharder.runtime.placing.align import changes_operand
from shardwright.sharder.runtime.placing.calls import settle
from shardwright.sharder.runtime.placing.checkpoint import Checkpoint
from shardwright.sharder.runtime.placing.forwards import InstanceForward
from shardwright.sharder.runtime.placing.graph_copies import forget_copies, keep_in_copies
from shardwright.sharder.runtime.placing.hooks import MoveInputs, UnitForward, has_hooks
from shardwright.sharder.runtime.placing.lending import Borrow, Return
from shardwright.sharder.runtime.placing.relocate import relocate, tensors_of
from shardwright.sharder.runtime.placing.weights import check_devices, check_fill, fill
from shardwright.sharder.runtime.placing.whole import Layout, WholeForward, Window

__all__ = ["place", "unplace"]


def place(
    model: nn.Module,
    plan: Plan,
    *,
    devices: Mapping[str, str | torch.device] | None = None,
    checkpoint: str | Path | None = None,
    microbatches: int | None = None,
) -> nn.Module:
    """Move every unit of ``model`` to its device in ``plan``, in place, and make the tensors that cross follow.

    The model is then called, trained, saved and loaded as before; inputs may be on any device, and outputs come back
    on the device of the inputs. Beside inputs on an accelerator, whole numbers in one dimension stay on the CPU, where
    PyTorch wants the lengths of sequences. A parameter that units on several devices share stays one tensor, on the
    device of the first of them, and is brought to the others for their calls. :func:`unplace` undoes it all. A model
    that was placed already is placed anew. Deep copies and pickles are placed too, but an ``fx.GraphModule`` cannot be
    pickled while it is placed.

    Hooks on the model see the tensors that the caller gives and gets. Hooks on a unit see its arguments beside its
    parameters, also hooks that are added later: from the next call of the model on, or of the part that was placed.
    A tool that puts another forward in the place of the model's has to call the one that was there, as they do.

    Args:
        devices: plan device -> torch device, for those that differ; CPU workers are ``cpu`` by default, since in one
            process they share it.
        checkpoint: a safetensors file, or a folder of them, from which each parameter and buffer is read straight onto
            its device, one at a time. The model itself may be without values: see
            :func:`~shardwright.sharder.runtime.placing.weights.empty_weights`.
        microbatches: into how many pieces a batch is divided, so that the devices work at the same time, in training
            too: see :mod:`~shardwright.sharder.runtime.local.inprocess`. By default one device after the other works.

    Raises:
        ShardwrightError: the plan is for another model or has replicas, a device is not here, the checkpoint is not
            this model's, or with ``microbatches`` the model cannot be piped.
    """
    check_model(plan, model)
    if plan.replicas > 1:
        raise ShardwrightError(
            f"the plan has {plan.replicas} replicas of the model, each with a part of the batch, and a model is placed "
            "once: use pipeline(model, plan, ...) or `shard --run`, or plan with 1 replica"
        )
    homes = _resolve(plan, devices or {})
    if microbatches is not None:
        check_threads(plan, homes, microbatches)
    origins = _come_home(model, plan, homes, checkpoint)
    if microbatches is not None:  # within what brings inputs to the first device and outputs back
        pipe(model, plan, homes, origins, microbatches)
    cpu = torch.device("cpu")
    elsewhere = any(origin != homes[plan.stages[0].device] for origin in origins.values())
    if set(homes.values()) != {cpu} or plan.offloaded or elsewhere:  # else one torch device: nothing can cross
        _hook(model, plan, homes, origins)
    keep_in_copies(model)
    return model


def _come_home(
    model: nn.Module, plan: Plan, homes: Mapping[str, torch.device], checkpoint: str | Path | None
) -> dict[str, torch.device]:
    """Bring each parameter and buffer to its device, with values from ``checkpoint`` if there is one.

    What is wrong with the checkpoint is found before anything is changed, also in a model that is placed already.

    Returns:
        Where they were without any placement, by name.
    """
    if checkpoint is None:
        disk = next((name for name, tier in plan.offloaded.items() if tier == "disk"), None)
        if disk is not None:
            raise ShardwrightError(
                f"by the plan the weights of {disk} stay on disk: "
                "say where they are, place(model, plan, checkpoint=folder)"
            )
        empty = next((name for name, tensor in tensors_of(model) if tensor.is_meta), None)
        if empty is not None:
            raise ShardwrightError(f"{empty} has no values: give them with place(model, plan, checkpoint=folder)")
    home_of = _tensor_homes(model, plan, homes)
    by_name = {name: home_of[id(tensor)] for name, tensor in _every_name(model)}
    with Checkpoint(checkpoint) if checkpoint is not None else nullcontext() as stored:
        if stored is not None:
            check_fill(model, stored)
        unplace(model)
        cpu = torch.device("cpu")
        origins = {name: cpu if tensor.is_meta else tensor.device for name, tensor in tensors_of(model)}
        if stored is not None:
            fill(model, stored, by_name.__getitem__, mapped=_on_disk(plan, by_name))
    relocate(model, _tensor_homes(model, plan, homes))
    return origins


def _hook(model: nn.Module, plan: Plan, homes: dict[str, torch.device], origins: dict[str, torch.device]) -> None:
    """Add what makes tensors follow."""
    moves = _located(plan, homes, {name: tensor.device for name, tensor in tensors_of(model)})
    borrowed = _borrowed(model, plan, homes)
    # Of nn.Module itself: a ScriptModule refuses hooks by its own methods, and calls those that it has.
    before, after = nn.Module.register_forward_pre_hook, nn.Module.register_forward_hook
    no_cpu = all(device.type != "cpu" for device in homes.values())
    layout = Layout(homes, moves.glue, open_first="" in moves.open_after)
    standing = []
    for path, device in _unit_homes(plan, homes).items():
        unit = model.get_submodule(path)
        with_hooks = has_hooks(unit) or path in moves.close_before | moves.open_after or path in borrowed
        # Before hooks that the unit has already, which see it where it is; so the last added is called first.
        if path in moves.units and with_hooks and unit is not model:
            before(unit, MoveInputs(device, lengths_stay=no_cpu), with_kwargs=True, prepend=True)
        elif path in moves.units:
            standing.append((unit, UnitForward(unit, device, lengths_stay=no_cpu)))
            standing[-1][1].put()
        if path in borrowed:
            borrow = Borrow(device, [_holder(model, name) for name in borrowed[path]])
            before(unit, borrow, prepend=True)
            after(unit, Return(borrow), always_call=True)
        if path in moves.close_before:
            before(unit, Window(layout, opens=False), prepend=True)
        if path in moves.open_after:
            after(unit, Window(layout, opens=True))
    WholeForward(model, layout, origins, [pair for pair in standing if pair[0] is not model]).put()


def unplace(model: nn.Module) -> nn.Module:
    """Remove everything that :func:`place` added, and move the model back to where it came from."""
    settle()  # a call that was broken off may still hold copies of parameters
    forget_copies(model)
    origins: dict[int, torch.device] = {}
    for module, hooks, key in list(placement_hooks(model)):
        hook = hooks.pop(key)
        if isinstance(hook, InstanceForward):
            hook.remove()
        if isinstance(hook, WholeForward):  # a module before those inside it, which were placed later
            for name, tensor in tensors_of(module):
                if name in hook.origins:
                    origins.setdefault(id(tensor), hook.origins[name])
        own_flags = (module._forward_hooks_with_kwargs, module._forward_hooks_always_called)
        for flags in own_flags if hooks is module._forward_hooks else (module._forward_pre_hooks_with_kwargs,):
            flags.pop(key, None)
    relocate(model, origins)
    return model


def _on_disk(plan: Plan, names: Iterable[str]) -> frozenset[str]:
    """Names of the tensors that stay in the checkpoint's files."""
    units = {unit for unit, tier in plan.offloaded.items() if tier == "disk"}
    return frozenset(name for name in names if units.intersection(_prefixes(name)))


def _every_name(model: nn.Module) -> list[tuple[str, Tensor]]:
    """Parameters and buffers under all their names."""
    return [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]


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
        asked = devices.get(name, "cpu" if name.startswith("cpu") else name)
        try:
            device = torch.device(asked)
        except RuntimeError:
            raise ShardwrightError(f'{asked!r} is no device; write for example {{"{name}": "cuda:0"}}') from None
        if device.type == "cuda" and (
            not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()
        ):
            count = torch.cuda.device_count() if torch.cuda.is_available() else 0
            raise ShardwrightError(
                f"the plan uses {name}, and this machine has {count} CUDA devices; "
                f'pass devices={{"{name}": ...}} to place it elsewhere, or check the plan with verify'
            )
        homes[name] = device
    check_devices(homes.values())
    return homes


def _unit_homes(plan: Plan, homes: Mapping[str, torch.device]) -> dict[str, torch.device]:
    return {node.unit: homes[node.device] for node in plan.nodes if node.kind == "unit"}


def _tensor_homes(model: nn.Module, plan: Plan, homes: Mapping[str, torch.device]) -> dict[int, torch.device]:
    """Where each parameter and buffer goes, by its ``id``: to the first step of the forward that uses it."""
    first: dict[str, tuple[int, torch.device]] = {}
    for order, node in enumerate(plan.nodes):
        if node.kind in ("unit", "parameter") and node.unit:
            home = homes[node.device] if node.weights == "device" else torch.device("cpu")
            first.setdefault(node.unit, (order, home))
    unused = (len(plan.nodes), homes[plan.stages[0].device])
    found: dict[int, tuple[int, torch.device]] = {}
    for name, tensor in _every_name(model):
        users = [first[path] for path in _prefixes(name) if path in first] or [unused]
        candidates = [*users, *([found[id(tensor)]] if id(tensor) in found else [])]
        found[id(tensor)] = min(candidates, key=lambda user: user[0])
    return {key: device for key, (_, device) in found.items()}


def _borrowed(model: nn.Module, plan: Plan, homes: Mapping[str, torch.device]) -> dict[str, list[str]]:
    """By unit: names of the parameters and buffers that it uses and another device holds.

    They are its own, shared with another unit, or those of a module that it gets as an argument.
    """
    tensors = dict(_every_name(model))
    attributes = {node.node: node.unit for node in plan.nodes if node.kind == "parameter" and node.unit}
    given: dict[str, list[str]] = {}
    for node in plan.nodes:
        if node.kind == "unit":
            given.setdefault(node.unit, []).extend(attributes[name] for name in node.inputs if name in attributes)
    found: dict[str, list[str]] = {}
    for path, device in _unit_homes(plan, homes).items():
        own = [name for name in tensors if name.startswith(f"{path}.")]
        beside = _buffers_beside(model, given[path], known={*attributes.values()})
        names = [
            n for n in dict.fromkeys([*own, *given[path], *beside]) if n in tensors and tensors[n].device != device
        ]
        if names:  # a buffer that is still None may be made by the first call, wherever that is
            found[path] = [*names, *(name for name in beside if name not in tensors)]
    return found


def _buffers_beside(model: nn.Module, names: Iterable[str], *, known: Container[str]) -> list[str]:
    """Buffers of the modules that hold ``names`` which the capture took for constants, such as what they keep ready."""
    holders = dict.fromkeys(name.rpartition(".")[0] for name in names)
    beside = [f"{path}.{own}" for path in holders if path for own in model.get_submodule(path)._buffers]
    return [name for name in beside if name not in known]


def _holder(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module that has the parameter or buffer ``name``, and its name there."""
    path, _, own = name.rpartition(".")
    return model.get_submodule(path), own


def _result_home(
    node: Placement, operands: list[torch.device | None], order: list[torch.device], numbers: set[str]
) -> torch.device | None:
    """Where glue leaves its result: as :class:`~shardwright.sharder.runtime.placing.align.AlignGlue` does, at the
    latest stage.

    Glue that changes its first operand in place stays there. An operand on the CPU does not count if it is without
    dimensions: where all that are there may be (``numbers``), the place is not known.
    """
    if not operands or None in operands or node.type in ("to", "cuda", "cpu"):  # these may be told a device
        return None
    if node.type.startswith("_foreach_"):  # results lie where the tensors of each position do
        return operands[0] if len(set(operands)) == 1 else None
    if changes_operand(node.type):
        return operands[0]
    if node.type == "type_as":
        return operands[-1]
    latest = max((device for device in operands if device is not None), key=order.index)
    if latest.type != "cpu" or len(set(operands)) == 1:
        return latest
    there = [name for name, device in zip(node.inputs, operands, strict=True) if device == latest]
    return None if numbers.issuperset(there) else latest


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
    attributes = {node.node for node in plan.nodes if node.kind == "parameter"}
    numbers = {node.node for node in plan.nodes if node.numbers}
    scattered = {node.node for node in plan.nodes if node.type.startswith("_foreach_")}  # several results each
    unit, is_open = "", False
    for node in plan.nodes:
        operands = {located[name] for name in node.inputs}
        located[node.node] = homes[node.device]
        if node.kind == "input":
            located[node.node] = homes[plan.stages[0].device]
        elif node.kind == "parameter":
            located[node.node] = held.get(node.unit)  # a constant is wherever the model made it
        elif node.kind == "unit":
            # One that reads no tensor, or a parameter, may be told a device.
            if operands - {homes[node.device]} or not operands or attributes & {*node.inputs} or plan.obstacles:
                moves.units.add(node.unit)
            if is_open or plan.obstacles:
                moves.close_before.add(node.unit)
            unit, is_open = node.unit, False
        elif node.kind == "glue":
            located[node.node] = _result_home(
                node, [located[name] for name in node.inputs], list(homes.values()), numbers
            )
            several = len(node.inputs) > 1 or scattered.intersection(node.inputs)
            if len(operands) > 1 or (None in operands and several):
                apart.add((node.type, node.site))
                moves.open_after.add(unit)
                is_open = True
    if plan.obstacles:
        return moves._replace(glue=None, open_after={"", *_unit_homes(plan, homes)})
    return moves._replace(glue=frozenset(apart))
