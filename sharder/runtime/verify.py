"""Verifying: the placed model is replayed on simulated devices, so that a missing transfer shows without a GPU."""

from __future__ import annotations

import copy
import traceback
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from shardwright.errors import ShardwrightError
from shardwright.profiler.equality import relative_difference, tolerance
from shardwright.profiler.units import find_units
from shardwright.sharder.planning.plan import Plan
from shardwright.sharder.runtime.check import check_inputs, check_model
from shardwright.sharder.runtime.place import Enter, MoveInputs, hooks_of, move_own, place, unplace
from shardwright.sharder.runtime.sim import DeviceMismatchError, SimTensor, crossings_watched, sim_device

__all__ = ["Check", "Mismatch", "verify"]


@dataclass(frozen=True)
class Mismatch:
    """An operation that met tensors on two devices."""

    operation: str
    unit: str
    """The unit in whose call it happened, or ``"glue"``."""
    site: str
    """File and line in the user's code."""
    devices: tuple[str, ...]

    def __str__(self) -> str:
        inside = f"in unit {self.unit}" if self.unit != "glue" else "in glue, outside every unit"
        return f"{self.operation} {inside} ({self.site}) met tensors on {' and '.join(self.devices)}"


@dataclass(frozen=True)
class Check:
    """The outcome of a replay; true when the placement holds."""

    mismatch: Mismatch | None
    outputs_equal: bool
    """Every output equals the unplaced model's, within what another order of summation explains."""
    transfers: int
    """Tensors that crossed between devices in the forward, inputs and outputs of the model not counted."""
    transfer_bytes: int

    @property
    def ok(self) -> bool:
        """No device mismatch, and equal outputs."""
        return self.mismatch is None and self.outputs_equal

    def __bool__(self) -> bool:
        return self.ok

    def __str__(self) -> str:
        if self.mismatch is not None:
            return f"device mismatch: {self.mismatch}"
        if not self.outputs_equal:
            return "the placed model's outputs differ from the model's: something in it depends on the device"
        return f"verified: {self.transfers} tensors ({self.transfer_bytes} bytes) cross, outputs equal"


def verify(model: nn.Module, plan: Plan, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None) -> Check:
    """Replay ``model``, placed by ``plan``, on simulated devices, and compare with the model on the CPU.

    A model that is not placed is placed for the replay; one that :func:`place` has placed is replayed with the hooks it
    has now. Either way it is a copy: the model itself is not changed. The replay is of inference; no GPU is needed.

    Raises:
        ShardwrightError: the plan is for another model or other inputs, or the forward itself fails.
    """
    kwargs = dict(kwargs or {})
    check_model(plan, model)
    check_inputs(plan, args, kwargs)
    host = pytree.tree_map_only(Tensor, lambda t: t.detach().cpu(), (args, kwargs))
    plain = unplace(_copy(model)).cpu().eval()
    replayed = _on_simulated_devices(_copy(model), plan).eval()
    watch = _Watch(replayed)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        state = torch.get_rng_state()
        expected = plain(*host[0], **host[1])
        torch.set_rng_state(state)
        try:
            with watch:
                found = replayed(*host[0], **host[1])
        except DeviceMismatchError as error:
            mismatch = Mismatch(
                error.operation, watch.unit or "glue", _site(error), tuple(map(_planned_name(plan), error.devices))
            )
            return Check(mismatch, outputs_equal=False, transfers=watch.transfers, transfer_bytes=watch.transfer_bytes)
        except Exception as error:
            inside = f" in unit {watch.unit}" if watch.unit else ""
            raise ShardwrightError(
                f"the replay failed{inside} ({_site(error)}): {type(error).__name__}: {error}"
            ) from error
    pairs = zip(_plain_tensors(expected), _plain_tensors(found), strict=True)
    equal = all(relative_difference(a, b) <= tolerance(a.dtype) for a, b in pairs)
    return Check(None, equal, watch.transfers, watch.transfer_bytes)


def _copy(model: nn.Module) -> nn.Module:
    try:
        return copy.deepcopy(model)
    except Exception as error:
        raise ShardwrightError(
            f"{type(model).__name__} cannot be copied for the replay: {' '.join(str(error).split())}; "
            "does it keep a tensor of an earlier forward?"
        ) from error


def _on_simulated_devices(model: nn.Module, plan: Plan) -> nn.Module:
    """``model`` on sim:0, sim:1, …, one for each stage: by its own hooks if it is placed, else by the plan."""
    simulated = {device: sim_device(index) for index, device in enumerate(plan.devices)}
    hooks = [hooks[key] for _, hooks, key in hooks_of(model)]
    entered = next((hook for hook in hooks if isinstance(hook, Enter)), None)
    if entered is None:
        return place(model, plan, devices=simulated)
    homes = entered.homes
    if len(set(homes.values())) < len(homes):
        return place(unplace(model).cpu(), plan, devices=simulated)  # several plan devices share a torch device
    as_simulated = {homes[name]: simulated[name] for name in plan.devices}
    for hook in hooks:
        if isinstance(hook, MoveInputs):
            hook.device = as_simulated[hook.device]
    entered.homes = dict(simulated)
    for module in model.modules():
        own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        if own:
            move_own(module, as_simulated.get(own[0].device, own[0].device))
    return model


class _Watch(ExitStack):
    """While a model runs: which unit is being called, and what crosses between simulated devices."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.unit: str | None = None
        self.transfers = 0
        self.transfer_bytes = 0
        for path, unit in find_units(model).items():
            self.callback(unit.register_forward_pre_hook(self._enter(path), prepend=True).remove)
            self.callback(unit.register_forward_hook(self._leave).remove)

    def __enter__(self) -> _Watch:
        super().__enter__()
        self.enter_context(crossings_watched(self._crossed))
        return self

    def _crossed(self, tensor: Tensor) -> None:
        self.transfers += 1
        self.transfer_bytes += tensor.element_size() * tensor.numel()

    def _enter(self, path: str) -> Any:
        def hook(_module: nn.Module, _args: Any) -> None:
            self.unit = path

        return hook

    def _leave(self, _module: nn.Module, _args: Any, _output: Any) -> None:
        self.unit = None


def _planned_name(plan: Plan) -> Any:
    names = {str(sim_device(index)): device for index, device in enumerate(plan.devices)}
    return lambda name: names.get(name, name)


def _site(error: BaseException) -> str:
    """The user's file and line nearest to the error."""
    ours = Path(__file__).parents[2]
    torch_home = Path(torch.__file__).parent
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        path = Path(frame.filename)
        inside = ours in path.parents and "examples" not in path.parts and "tests" not in path.parts
        if torch_home not in path.parents and not inside:
            return f"{path.name}:{frame.lineno}"
    return "inside torch"


def _plain_tensors(value: Any) -> list[Tensor]:
    return [t.host if isinstance(t, SimTensor) else t for t in pytree.tree_leaves(value) if isinstance(t, Tensor)]
