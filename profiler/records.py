"""Records of a profile: captured steps and their tensors in bytes, and what was found of them in seconds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from shardwright.profiler.measure import optimizer_state_bytes
from shardwright.profiler.profile import Measurement, Node, Tie, Timing
from shardwright.profiler.profile import Tensor as TensorRecord
from shardwright.profiler.structure import nbytes
from shardwright.profiler.unitgraph import Step, UnitGraph

__all__ = ["measurements_of", "nodes_of", "tensors_of", "ties_of"]


def nodes_of(captures: Mapping[int, UnitGraph], *, train: bool, optimizer: str) -> tuple[Node, ...]:
    """The records of the captured steps, with their bytes at each number of micro-batches."""
    steps = {count: {step.name: step for step in capture.steps} for count, capture in captures.items()}
    weights = _Weights(captures[1], train=train, optimizer=optimizer)
    return tuple(
        Node(
            name=step.name,
            kind=step.kind,
            type=step.type,
            unit=step.unit,
            site=step.site,
            inputs=step.reads,
            **weights.of(step),
            output_bytes={count: steps[count][step.name].output_bytes for count in captures},
            saved_bytes={count: steps[count][step.name].saved_bytes if train else 0 for count in captures},
        )
        for step in captures[1].steps
    )


def ties_of(capture: UnitGraph, *, train: bool, optimizer: str) -> tuple[Tie, ...]:
    """The records of the parameters that several steps use."""
    parameters = dict(capture.model.named_parameters())
    made = []
    for name, steps in capture.ties:
        parameter = parameters[name]
        trained = [parameter] if train and parameter.requires_grad else []
        gradient_bytes = sum(map(nbytes, trained))
        state_bytes = optimizer_state_bytes(optimizer, trained) if trained else 0
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
            bytes={count: capture.values[value.name].bytes for count, capture in captures.items()},
        )
        for value in captures[1].values.values()
    )


def measurements_of(names: Sequence[str], timings: Mapping[tuple[str, int, str], Timing]) -> tuple[Measurement, ...]:
    """The records of ``timings`` (by device, number of micro-batches and step), in the order of ``names``.

    The update, timed with the whole batch, is given at each number of micro-batches.
    """
    order = {name: position for position, name in enumerate(names)}
    devices = list(dict.fromkeys(device for device, _, _ in timings))
    keys = sorted(timings, key=lambda key: (order[key[2]], key[1], devices.index(key[0])))
    made = []
    for device, count, step in keys:
        whole = timings.get((device, 1, step))
        times = timings[device, count, step].model_dump() | {"update_s": whole.update_s if whole is not None else 0.0}
        made.append(Measurement(node=step, device=device, microbatches=count, **times))
    return tuple(made)


class _Weights:
    """Bytes of parameters, buffers, gradients and optimizer state by step; a shared tensor counts at its first user."""

    def __init__(self, capture: UnitGraph, *, train: bool, optimizer: str) -> None:
        self.capture = capture
        self.train = train
        self.optimizer = optimizer
        self.counted: set[int] = set()

    def of(self, step: Step) -> dict[str, int]:
        parameters, buffers = self._held(step)
        trained = [p for p in parameters if p.requires_grad] if self.train else []
        return {
            "param_bytes": sum(nbytes(p) for p in parameters),
            "buffer_bytes": sum(nbytes(b) for b in buffers),
            "grad_bytes": sum(nbytes(p) for p in trained),
            "optimizer_bytes": optimizer_state_bytes(self.optimizer, trained) if trained else 0,
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
