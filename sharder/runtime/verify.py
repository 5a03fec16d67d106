"""Verifying: the placed model is replayed on simulated devices, so that a missing transfer shows without a GPU."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from shardwright.errors import ShardwrightError
from shardwright.profiler.devices import find_devices
from shardwright.profiler.recording.callsites import error_site
from shardwright.profiler.recording.chance import chance_kept
from shardwright.profiler.recording.equality import relative_difference, tolerance
from shardwright.profiler.recording.inputs import is_batched, outputs_of
from shardwright.profiler.recording.placed import placement_hooks
from shardwright.profiler.recording.state import Snapshot
from shardwright.profiler.recording.structure import map_tensors, tensors_in
from shardwright.profiler.trace import attributes_kept, evaluating
from shardwright.profiler.workers.pool import Pool
from shardwright.sharder.planning.plan import Plan
from shardwright.sharder.runtime.check import check_inputs, check_model, check_values, units_of
from shardwright.sharder.runtime.place import place, unplace
from shardwright.sharder.runtime.placing.calls import settle
from shardwright.sharder.runtime.placing.hooks import MoveInputs, UnitForward
from shardwright.sharder.runtime.placing.lending import Borrow
from shardwright.sharder.runtime.placing.moving import rewrite
from shardwright.sharder.runtime.placing.relocate import relocate
from shardwright.sharder.runtime.placing.sim import (
    DeviceMismatchError,
    SimTensor,
    Simulated,
    crossings_watched,
    parameters_may_move,
    sim_device,
)
from shardwright.sharder.runtime.placing.whole import WholeForward

__all__ = ["Check", "Mismatch", "verify"]

REPLAY_LIMIT_S = 600.0
INSIDE_TORCH = "inside torch"


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
            return (
                "the placed model's outputs differ from the model's: something in it depends on the device, or changes "
                "in place what was brought from another one, through a view, .data or a unit's result"
            )
        return f"verified: {self.transfers} tensors ({self.transfer_bytes} bytes) cross, outputs equal"


def verify(model: nn.Module, plan: Plan, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None) -> Check:
    """Replay ``model``, placed by ``plan``, on simulated devices, and compare with the model on the CPU.

    A model that is not placed is placed for the replay; one that :func:`place` has placed is replayed with the hooks it
    has now. Either way the model is put back as it was afterwards. The replay is of inference; no GPU is needed. Of a
    plan with replicas the first is replayed with its part of the batch, which the others equal.

    Raises:
        ShardwrightError: the plan is for another model or other inputs, or the forward itself fails.
    """
    kwargs = dict(kwargs or {})
    check_model(plan, model)
    check_inputs(plan, args, kwargs)
    check_values(model)
    _check_dense(model, args, kwargs)
    replay = _verified_apart if torch.cuda.is_available() else _verified
    return replay(model, plan.first_replica, *_first_part(plan, args, kwargs))


def _first_part(plan: Plan, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The inputs of the first replica, as views: its samples, and all that is not divided."""
    if plan.replicas == 1:
        return args, kwargs
    rows = plan.first_replica.batch
    part: tuple[Any, dict[str, Any]] = map_tensors(
        lambda tensor: tensor[:rows] if is_batched(tensor, plan.batch) else tensor, (args, kwargs)
    )
    return part


def _check_dense(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    held = [*model.named_parameters(), *model.named_buffers()]
    given = [("input " + path.partition("]")[2], tensor) for path, tensor in tensors_in((args, kwargs))]
    for name, tensor in [*held, *given]:
        if tensor.layout != torch.strided:
            raise ShardwrightError(
                f"{name} is sparse ({tensor.layout}), which simulated devices cannot hold: this placement can only be "
                "tried on its own devices, with place(model, plan)"
            )


def _verified_apart(model: nn.Module, plan: Plan, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Check:
    """Replay in a process of its own: autograd would not work on CUDA any more in one that has simulated devices.

    The model goes there as it is without its placement, and is placed anew.
    """
    (worker,) = find_devices(["cpu:0"])
    with Pool([worker]) as pool:
        with _put_back(model), parameters_may_move():
            pool.workers[worker.name].submit(_verified, unplace(model).cpu(), plan, *_copied((args, kwargs)))
        return pool.results([worker.name], limit_s=REPLAY_LIMIT_S)[worker.name]  # type: ignore[no-any-return]


def _verified(model: nn.Module, plan: Plan, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Check:
    watch = _Watch(plan)
    with evaluating(model), torch.no_grad(), Simulated(), parameters_may_move():
        # A forward may write parameters, and draw numbers anywhere: both runs begin alike.
        with chance_kept(), _put_back(model), Snapshot(unplace(model).cpu()).state_kept():
            own_args, own_kwargs = _copied((args, kwargs))
            expected = _plain_tensors(model(*own_args, **own_kwargs))
        try:
            with _put_back(model), watch.over(_on_simulated_devices(model, plan)):
                own_args, own_kwargs = _copied((args, kwargs))
                found = _plain_tensors(model(*own_args, **own_kwargs))
        except DeviceMismatchError as error:
            devices = tuple(map(_planned_name(plan), error.devices))
            mismatch = Mismatch(error.operation, watch.unit or "glue", error_site(error) or INSIDE_TORCH, devices)
            return Check(mismatch, outputs_equal=False, transfers=watch.transfers, transfer_bytes=watch.transfer_bytes)
        except Exception as error:
            inside = f" in unit {watch.unit}" if watch.unit else ""
            if "device.index()" in str(error) and "INTERNAL ASSERT" in str(error):  # the engine of autograd says so
                raise ShardwrightError(
                    f"the forward takes gradients itself{inside} ({error_site(error) or INSIDE_TORCH}), which "
                    "simulated devices cannot: this placement can only be tried on its own devices, with "
                    "place(model, plan)"
                ) from error
            raise ShardwrightError(
                f"the replay failed{inside} ({error_site(error) or INSIDE_TORCH}): "
                f"{type(error).__name__}: {' '.join(str(error).split())}"
            ) from error
    pairs = list(zip(expected, found, strict=True))
    equal = all(relative_difference(a, b) <= tolerance(a.dtype) for a, b in pairs)
    return Check(None, equal, watch.transfers, watch.transfer_bytes)


def _copied(inputs: Any) -> Any:
    """The inputs on the CPU, for one forward: it may write them."""
    return map_tensors(lambda tensor: tensor.detach().cpu().clone(), inputs)


@contextmanager
def _put_back(model: nn.Module) -> Iterator[None]:
    """Give every module its attributes back, buffers their values, and our hooks theirs."""
    settle()
    values = [(buffer, buffer.clone()) for buffer in model.buffers()]
    hooks = [hooks[key] for _, hooks, key in placement_hooks(model)]
    layouts = [hook.layout for hook in hooks if isinstance(hook, WholeForward)]
    kept = [(vars(one), dict(vars(one))) for one in (*hooks, *layouts)]
    with attributes_kept(model):
        try:
            yield
        finally:
            for attributes, values_before in kept:
                attributes.update(values_before)
            for buffer, value in values:
                rewrite(buffer, value, counted=False)


def _on_simulated_devices(model: nn.Module, plan: Plan) -> nn.Module:
    """``model`` on sim:0, sim:1, …, one for each device: by its own hooks if it is placed, else by the plan."""
    simulated = {device: sim_device(index) for index, device in enumerate(plan.devices)}
    hooks = [hooks[key] for _, hooks, key in placement_hooks(model)]
    layout = next((hook.layout for hook in hooks if isinstance(hook, WholeForward)), None)
    if layout is None:
        return place(model, plan, devices=simulated)
    homes = layout.homes
    if len(set(homes.values())) < len(homes):
        return place(unplace(model).cpu(), plan, devices=simulated)  # several plan devices share a torch device
    as_simulated = {homes[name]: simulated[name] for name in plan.devices}
    for hook in hooks:
        if isinstance(hook, (UnitForward, MoveInputs, Borrow)):
            hook.device = as_simulated[hook.device]
    layout.move_to(dict(simulated))
    held = [*model.parameters(), *model.buffers()]
    relocate(model, {id(tensor): as_simulated.get(tensor.device, tensor.device) for tensor in held})
    return model


class _Watch:
    """Which unit is being called while a model runs, and what crosses between simulated devices."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.unit: str | None = None
        self.transfers = 0
        self.transfer_bytes = 0

    @contextmanager
    def over(self, model: nn.Module) -> Iterator[None]:
        """Watch ``model``."""
        for path, unit in units_of(self.plan, model).items():
            nn.Module.register_forward_pre_hook(unit, self._enter(path), prepend=True)
            nn.Module.register_forward_hook(unit, self._leave)
        with crossings_watched(self._crossed):
            yield

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


def _plain_tensors(value: Any) -> list[Tensor]:
    return [t.host if isinstance(t, SimTensor) else t for t in outputs_of(value)]
