"""Optimizers: by name, class or ``functools.partial``, and the bytes that the real class takes, without its numbers.

State is counted by stepping the optimizer on stand-ins: parameters of the right shape and dtype on the meta device,
which have no numbers and take no memory. So a state that depends on the shape, as Adafactor's does, is exact.
"""

from __future__ import annotations

import ast
import importlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from shardwright.errors import ShardwrightError
from shardwright.profiler.memory import MemoryCounter, total_bytes
from shardwright.profiler.recording.structure import nbytes, tensors_in

__all__ = [
    "OPTIMIZERS",
    "OptimizerBytes",
    "OptimizerLike",
    "OptimizerMemory",
    "make_optimizer",
    "optimizer_name",
    "optimizer_state_bytes",
]

OptimizerLike = str | type[torch.optim.Optimizer] | Callable[..., torch.optim.Optimizer]

UNSUITED = frozenset({"lbfgs", "sparseadam"})
"""LBFGS calls the model again in its step, SparseAdam takes sparse gradients only."""
SMALL_LR = 1e-5
"""Steps that are timed shall not carry the parameters away."""

_CLASSES: dict[str, Any] = {
    name.lower(): found
    for name, found in sorted(vars(torch.optim).items())
    if isinstance(found, type)
    and issubclass(found, torch.optim.Optimizer)
    and found is not torch.optim.Optimizer
    and name.lower() not in UNSUITED
}

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "momentum": partial(torch.optim.SGD, lr=SMALL_LR, momentum=0.9),
    **{name: partial(found, lr=SMALL_LR) for name, found in _CLASSES.items()},
}
"""Those of ``torch.optim`` by the names of their classes, so that a worker can make them."""


def optimizer_name(optimizer: OptimizerLike) -> str:
    """``optimizer`` as text that :func:`make_optimizer` understands: ``adam``, ``sgd(momentum=0.9)``, ``lion.Lion``.

    Raises:
        ShardwrightError: it is no optimizer, or cannot be written so.
    """
    if isinstance(optimizer, str):
        _parsed(optimizer)
        return optimizer
    settings: dict[str, Any] = {}
    while isinstance(optimizer, partial):
        if optimizer.args:
            raise ShardwrightError(f"optimizer {optimizer!r} has positional settings; give them by name")
        settings = {**optimizer.keywords, **settings}
        optimizer = optimizer.func
    if not (isinstance(optimizer, type) and issubclass(optimizer, torch.optim.Optimizer)):
        raise ShardwrightError(
            f"optimizer {optimizer!r} is neither a name nor a class of optimizers nor a functools.partial of one"
        )
    if optimizer.__module__ == "__main__" or "<locals>" in optimizer.__qualname__:
        raise ShardwrightError(
            f"optimizer {optimizer.__qualname__} is defined where a worker cannot import it; move it to the top "
            "of a module"
        )
    known = _CLASSES.get(optimizer.__name__.lower()) is optimizer
    name = optimizer.__name__.lower() if known else f"{optimizer.__module__}.{optimizer.__qualname__}"
    text = name + (f"({', '.join(f'{key}={value!r}' for key, value in settings.items())})" if settings else "")
    _parsed(text)
    return text


def make_optimizer(name: str, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer | None:
    """The named optimizer over the trainable ``parameters``; None when there is nothing to train.

    Raises:
        ShardwrightError: the name is not known, or the optimizer refuses its settings or the parameters.
    """
    make = _parsed(name)
    trainable = [p for p in parameters if p.requires_grad]
    if not trainable:
        return None
    try:
        return make(trainable)
    except (TypeError, ValueError) as error:
        raise ShardwrightError(f"optimizer {name} cannot be made: {error}") from error


def _parsed(text: str) -> Callable[..., torch.optim.Optimizer]:
    """What makes the optimizer that ``text`` names, given its parameters."""
    try:
        expression = ast.parse(text, mode="eval").body
        call = expression if isinstance(expression, ast.Call) else ast.Call(expression, [], [])
        if call.args:
            raise ValueError("settings need their names")
        path = ast.unparse(call.func)
        settings = {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in call.keywords}
    except (SyntaxError, ValueError) as error:
        raise ShardwrightError(
            f"optimizer {text!r} cannot be read: write a name, or settings too as in sgd(momentum=0.9, lr=0.1)"
        ) from error
    make = OPTIMIZERS.get(path.lower()) or _imported(path)
    if make is None:
        raise ShardwrightError(
            f"optimizer {path!r} is not known; choose one of {', '.join(sorted(OPTIMIZERS))}, or name a class as "
            "package.module.Class"
        )
    return partial(make, **settings)


def _imported(path: str) -> Callable[..., torch.optim.Optimizer] | None:
    module, _, name = path.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name) if module else None
    except (ImportError, AttributeError):
        return None
    return found if isinstance(found, type) and issubclass(found, torch.optim.Optimizer) else None


@dataclass(frozen=True)
class OptimizerBytes:
    """What an optimizer takes for some parameters."""

    state: int
    """Kept between steps, the master copy included."""
    update: int
    """The most that a step takes beside it, one parameter after another."""
    update_left: int
    """What that still holds when the next parameter's turn begins."""
    update_together: int
    """The same where all parameters are worked on together (``foreach``), as is the default on CUDA."""


class OptimizerMemory:
    """Counts what an optimizer takes, once for each shape and dtype.

    Args:
        name: as :func:`make_optimizer` takes it.
        master_weights: parameters of lower precision have a copy in fp32, 4 bytes an element, which is what the
            optimizer works on (Micikevicius et al., "Mixed precision training", ICLR 2018, section 3.1).
    """

    def __init__(self, name: str, *, master_weights: bool = False) -> None:
        self.name = name
        self.master_weights = master_weights
        self._known: dict[tuple[torch.Size, torch.dtype], OptimizerBytes] = {}

    def of(self, parameters: Iterable[nn.Parameter]) -> OptimizerBytes:
        """What the trainable ``parameters`` take: states and joint updates add up, single updates follow each other."""
        state = update = left = together = 0
        for one in (self._one(parameter) for parameter in parameters if parameter.requires_grad):
            state += one.state
            update = max(update, left + one.update)
            left = one.update_left
            together += one.update_together
        return OptimizerBytes(state, update, left, together)

    def _one(self, parameter: nn.Parameter) -> OptimizerBytes:
        key = parameter.shape, parameter.dtype
        if key not in self._known:
            self._known[key] = self._counted(*key)
        return self._known[key]

    def _counted(self, shape: torch.Size, dtype: torch.dtype) -> OptimizerBytes:
        copied = self.master_weights and dtype.is_floating_point and dtype.itemsize < torch.float32.itemsize
        alike = torch.empty(shape, dtype=torch.float32 if copied else dtype, device="meta")
        state, update = _stepped(self.name, [alike])
        _, update_of_two = _stepped(self.name, [alike, alike])
        _, together = _stepped(self.name, [alike], foreach=True)
        return OptimizerBytes(state + (nbytes(alike) if copied else 0), update, update_of_two - update, together)


def _stepped(name: str, alike: list[Tensor], *, foreach: bool | None = None) -> tuple[int, int]:
    """Bytes of the state after a step over parameters like these, and the peak of the next step beyond it."""
    parameters = [nn.Parameter(tensor.clone()) for tensor in alike]
    for parameter in parameters:
        parameter.grad = torch.empty_like(parameter)
    optimizer = make_optimizer(name, parameters)
    assert optimizer is not None  # the stand-ins are trainable
    for group in optimizer.param_groups:
        if "foreach" in group and group["foreach"] is None and not group.get("fused"):
            group["foreach"] = foreach
    with _NumbersOfMeta():  # type: ignore[no-untyped-call]
        try:
            optimizer.step()
        except Exception as error:
            raise ShardwrightError(
                f"optimizer {name} cannot update a parameter of shape {tuple(alike[0].shape)}: "
                f"{' '.join(str(error).split())}"
            ) from error
        counter = MemoryCounter()
        with counter:
            optimizer.step()
    return total_bytes(t for _, t in tensors_in(list(optimizer.state.values()))), counter.peak_bytes


class _NumbersOfMeta(TorchDispatchMode):
    """Tensors without numbers read back as one: some optimizers look at the norm of a parameter."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and isinstance(args[0], Tensor) and args[0].is_meta:
            return torch.ones((), dtype=args[0].dtype).item()
        return func(*args, **(kwargs or {}))


def optimizer_state_bytes(name: str, parameters: Iterable[nn.Parameter], *, master_weights: bool = False) -> int:
    """Bytes of state that the named optimizer keeps for the trainable ``parameters``."""
    return OptimizerMemory(name, master_weights=master_weights).of(parameters).state
