"""Records of a profile: captured steps and their tensors in bytes, and what was found of them in seconds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from shardwright.errors import ShardwrightError
from shardwright.profiler.cache import Cache
from shardwright.profiler.measuring.optimizers import OptimizerMemory
from shardwright.profiler.measuring.signature import step_key
from shardwright.profiler.memory import StepMemory, count_step
from shardwright.profiler.profile import Clocked, Measurement, Node, Tie
from shardwright.profiler.profile import Tensor as TensorRecord
from shardwright.profiler.recording.state import Snapshot
from shardwright.profiler.recording.staying import BACKWARDS
from shardwright.profiler.recording.structure import nbytes, tensors_in
from shardwright.profiler.recording.unitgraph import Call, Step, UnitGraph
from shardwright.profiler.trace import as_found

__all__ = ["count_steps", "measurements_of", "nodes_of", "tensors_of", "ties_of"]


def count_steps(
    capture: UnitGraph,
    *,
    train: bool,
    parted: bool = False,
    cache: Cache | None = None,
    found: Snapshot | None = None,
) -> dict[str, StepMemory]:
    """What each step of ``capture`` takes when it runs alone, by name; the model is left as it was.

    Equal work is counted once, and what ``cache`` knows is not counted again.

    Args:
        parted: whether the backward is counted in two parts, too.
        found: the model as it is now, where that is known from earlier.

    Raises:
        ShardwrightError: a step fails.
    """
    counted: dict[str, StepMemory] = {}
    known = cache if cache is not None else Cache(None)
    last = {step.unit: step for step in capture.steps if step.kind == "unit"}
    model = found or Snapshot(capture.model)
    with model.attributes_kept(), as_found(model, train=train):
        for step in capture.steps:
            if step.call is None or not (train or step.kind != "output"):
                continue
            again = step.kind == "unit" and last[step.unit] is not step
            work = step_key(step, train=train, optimizer=None, accumulate=again, parted=parted)
            key = f"memory {work} {_is_fake(step.call)}"
            before = known.get(key, StepMemory)
            if before is not None:
                counted[step.name] = before
                continue
            try:
                counted[step.name] = count_step(step.call, train=train, called_again=again, parted=parted)
            except ShardwrightError:
                raise
            except Exception as error:
                if step.call.function in BACKWARDS:
                    raise ShardwrightError(
                        f"{step.site} takes gradients of what units have computed ({step.type}), so that none of them "
                        "runs by itself: have one module do both, and name it with --unit"
                    ) from error
                raise ShardwrightError(
                    f"{step.name} failed when it ran alone for its memory to be counted: "
                    f"{type(error).__name__}: {' '.join(str(error).split())}"
                ) from error
            known.put(key, counted[step.name])
    return counted


def _is_fake(call: Call) -> bool:
    """Whether a call is of tensors without values: some operators go about them in another way."""
    return any(isinstance(tensor, FakeTensor) for _, tensor in tensors_in((call.args, call.kwargs)))


def nodes_of(
    captures: Mapping[int, UnitGraph],
    optimizer: OptimizerMemory | None,
    counted: Mapping[int, Mapping[str, StepMemory]] | None = None,
) -> tuple[Node, ...]:
    """The records of the captured steps, with their bytes at each number of micro-batches.

    Args:
        optimizer: counts what it takes; None for inference.
        counted: by number of micro-batches and step, what :func:`count_steps` found.
    """
    steps = {count: {step.name: step for step in capture.steps} for count, capture in captures.items()}
    weights = _Weights(captures[1], optimizer)

    def peaks(name: str, what: str) -> dict[int, int]:
        known = {count: getattr(found[name], what) for count, found in (counted or {}).items() if name in found}
        return {count: size for count, size in known.items() if size is not None}

    return tuple(
        Node(
            name=step.name,
            kind=step.kind,
            type=step.type,
            unit=step.unit,
            site=step.site,
            inputs=step.reads,
            checkpointed=any(steps[count][step.name].checkpointed for count in captures),
            **weights.of(step),
            output_bytes={count: steps[count][step.name].output_bytes for count in captures},
            saved_bytes={count: steps[count][step.name].saved_bytes if optimizer else 0 for count in captures},
            forward_peak_bytes=peaks(step.name, "forward_peak_bytes"),
            backward_peak_bytes=peaks(step.name, "backward_peak_bytes") if optimizer else {},
            input_gradient_bytes=peaks(step.name, "gradient_bytes") if optimizer else {},
            deferred_bytes=peaks(step.name, "deferred_bytes") if optimizer else {},
        )
        for step in captures[1].steps
    )


def ties_of(capture: UnitGraph, optimizer: OptimizerMemory | None) -> tuple[Tie, ...]:
    """The records of the parameters that several steps use; ``optimizer`` counts their state, None for inference."""
    parameters = dict(capture.model.named_parameters())
    made = []
    for name, steps in capture.ties:
        parameter = parameters[name]
        trained = [parameter] if optimizer and parameter.requires_grad else []
        gradient_bytes = sum(map(nbytes, trained))
        state_bytes = optimizer.of(trained).state if optimizer else 0
        made.append(
            Tie(
                name=name,
                nodes=steps,
                copy_bytes=nbytes(parameter) + gradient_bytes + state_bytes,
                gradient_bytes=gradient_bytes,
            )
        )
    return tuple(made)


def tensors_of(captures: Mapping[int, UnitGraph]) -> tuple[TensorRecord, ...]:
    """The records of the tensors between steps."""
    return tuple(
        TensorRecord(
            name=value.name,
            producer=value.producer,
            requires_grad=value.requires_grad,
            bytes=(sizes := {count: capture.values[value.name].bytes for count, capture in captures.items()}),
            storage=value.storage,
            held_bytes={} if (held := _held(value.name, captures)) == sizes else held,
            saved_by=captures[1].saved_by.get(value.name, ""),
        )
        for value in captures[1].values.values()
    )


def _held(name: str, captures: Mapping[int, UnitGraph]) -> dict[int, int]:
    return {count: capture.values[name].held_bytes for count, capture in captures.items()}


def measurements_of(names: Sequence[str], timings: Mapping[tuple[str, int, str], Clocked]) -> tuple[Measurement, ...]:
    """The records of ``timings`` (by device, number of micro-batches and step), in the order of ``names``.

    The update, timed with the whole batch, is given at each number of micro-batches. Where work is enqueued, host and
    device work at the same time, step after step, and the slower of both sets the pace of all.
    """
    order = {name: position for position, name in enumerate(names)}
    devices = list(dict.fromkeys(device for device, _, _ in timings))
    keys = sorted(timings, key=lambda key: (order[key[2]], key[1], devices.index(key[0])))
    bound = {case: _host_bound(timings, *case) for case in dict.fromkeys((device, count) for device, count, _ in keys)}
    made = []
    for device, count, step in keys:
        own = timings[device, count, step]
        whole = timings.get((device, 1, step))
        times = own.model_dump(exclude={"host", "pace_s"})
        if bound[device, count] and own.host is not None:
            times |= own.host.model_dump(exclude={"peak_bytes", "source"})
            whole_update_s = whole.host.update_s if whole is not None and whole.host is not None else 0.0
        else:
            whole_update_s = whole.update_s if whole is not None else 0.0
        times |= {"update_s": whole_update_s, "host_bound": bound[device, count]}
        made.append(Measurement(node=step, device=device, microbatches=count, **times))
    return tuple(made)


def _host_bound(timings: Mapping[tuple[str, int, str], Clocked], device: str, count: int) -> bool:
    """Whether the host takes longer to enqueue a step of so many micro-batches than the device to do it."""
    device_s = host_s = 0.0
    for (where, microbatches, step), timing in timings.items():
        if (where, microbatches) != (device, count):
            continue
        whole = timings.get((device, 1, step), timing)
        if timing.host is None or whole.host is None:
            return False
        device_s += count * (timing.forward_s + timing.backward_s) + whole.update_s
        host_s += count * (timing.host.forward_s + timing.host.backward_s) + whole.host.update_s
    return host_s > device_s


class _Weights:
    """Bytes of parameters, buffers, gradients and optimizer state by step; a shared tensor counts at its first user."""

    def __init__(self, capture: UnitGraph, optimizer: OptimizerMemory | None) -> None:
        self.capture = capture
        self.optimizer = optimizer
        self.counted: set[int] = set()

    def of(self, step: Step) -> dict[str, Any]:
        parameters, buffers = self._held(step)
        if self.optimizer is None:
            return {"param_bytes": sum(map(nbytes, parameters)), "buffer_bytes": sum(map(nbytes, buffers))}
        taken = self.optimizer.of(parameters)
        return {
            "param_bytes": sum(map(nbytes, parameters)),
            "buffer_bytes": sum(map(nbytes, buffers)),
            "grad_bytes": sum(nbytes(p) for p in parameters if p.requires_grad),
            "optimizer_bytes": taken.state,
            "update_peak_bytes": {"cpu": taken.update, "cuda": taken.update_together},
            "update_left_bytes": taken.update_left,
        }

    def _held(self, step: Step) -> tuple[list[nn.Parameter], list[Tensor]]:
        """The parameters and buffers that ``step`` is the first to use."""
        tensors: list[Tensor] = []
        if step.kind == "unit":
            unit = self.capture.units[step.unit]
            tensors = [*unit.parameters(), *unit.buffers()]
        elif step.kind == "parameter" and step.unit:
            holder, _, name = step.unit.rpartition(".")
            tensors = [getattr(self.capture.model.get_submodule(holder), name)]
        new = [t for t in tensors if id(t) not in self.counted]
        self.counted |= {id(t) for t in new}
        return [t for t in new if isinstance(t, nn.Parameter)], [t for t in new if not isinstance(t, nn.Parameter)]
