"""The memory of a step counted without computing: on fake tensors, where they take what real ones take.

Fake kernels may keep other tensors than real ones, as those of recurrent layers do, and what they cannot tell, such as
a shape that follows from numbers, may steer the model. So the forward has to call the operators that the capture has
seen on real tensors, one after another, on tensors of the same forms, with results whose storages are as large. The
backward, which no capture runs, may call operators of ATen only, whose results its own rules tell.
A step of which anything else is known, or too little, is counted on real tensors.
"""

from __future__ import annotations

import copy
import pickle
import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

from shardwright.profiler.follower import BackwardFollower, ForwardFollower
from shardwright.profiler.memory import StepMemory, count_step
from shardwright.profiler.operations import Operation
from shardwright.profiler.shapes import fake_like, unlogged
from shardwright.profiler.structure import map_tensors, tensors_in
from shardwright.profiler.unitgraph import Call, Step

__all__ = ["count_shapes", "is_worth_it"]

FLOPS_A_BYTE = 15
"""So much arithmetic takes about as long as moving a byte."""
BYTES_AN_OPERATOR = 8_000_000
"""Fake tensors take about 3 ms of a core for each operator, with its backward; real ones of this size as long."""
OPERATORS_A_STEP = 5
"""A copy of the step without values takes as long as so many operators."""


def is_worth_it(operations: Iterable[Operation]) -> bool:
    """Whether fake tensors are quicker than real ones, for a step that calls these operators."""
    amounts = [operation.bytes + operation.flops // FLOPS_A_BYTE for operation in operations]
    return sum(amounts) > BYTES_AN_OPERATOR * (len(amounts) + OPERATORS_A_STEP)


def count_shapes(
    step: Step, *, train: bool, called_again: bool = False, around: Iterable[nn.Module] = ()
) -> StepMemory | None:
    """What :func:`~shardwright.profiler.memory.count_step` gives for the captured call of ``step``, or None.

    Nothing is computed and no large memory taken; neither the step's module nor any tensor is changed.

    Args:
        step: as captured, with its operators.
        train: as the capture was.
        around: modules that the step's own may refer to, such as all of the model's.
    """
    call = step.call
    if call is None or not step.operations or not _is_plain(call):
        return None
    followed = ForwardFollower(step.operations, strides=_are_kept(call)), BackwardFollower(step.operations)
    try:
        with _undrawn(), unlogged(), FakeTensorMode() as mode:
            fake = _without_values(call, around, lambda tensor: _fake(tensor, mode))
            found = count_step(fake, train=train, called_again=called_again, followed=followed)
        for follower in followed:
            follower.end()
    except Exception:  # whatever fake tensors cannot do, real ones tell
        return None
    return found


class _DrawnError(Exception):
    """The step draws random numbers of Python or NumPy, which may decide anything."""


@contextmanager
def _undrawn() -> Iterator[None]:
    """Nobody draws random numbers of Python or NumPy; if somebody does, they are put back and it is an error."""
    before = random.getstate(), np.random.get_state(legacy=False)
    told = pickle.dumps(before)
    try:
        yield
    finally:
        if pickle.dumps((random.getstate(), np.random.get_state(legacy=False))) != told:
            random.setstate(before[0])
            np.random.set_state(before[1])
            raise _DrawnError


def _is_plain(call: Call) -> bool:
    """Whether the tensors and modules of ``call`` hold nothing that a fake one of their form would lack."""
    leaves = pytree.tree_leaves((call.args, call.kwargs))
    if any(isinstance(leaf, nn.Module) for leaf in leaves):  # its parameters would be real
        return False
    tensors = [tensor for _, tensor in tensors_in(leaves)]
    if isinstance(call.function, nn.Module):
        modules = list(call.function.modules())
        if _watched(modules) or any(isinstance(module, torch.jit.ScriptModule) for module in modules):
            return False
        tensors += _tensors_of(modules)
    return all(map(_is_dense, tensors))


def _are_kept(call: Call) -> bool:
    """Whether copies of what ``call`` is given have the same strides: not what was expanded, or is a part."""
    tensors = [tensor for _, tensor in tensors_in((call.args, call.kwargs))]
    return all(torch.empty_like(t, device="meta").stride() == t.stride() for t in tensors)


def _watched(modules: Iterable[nn.Module]) -> bool:
    """Whether somebody's hooks run with the modules: they may keep what they see."""
    every = [vars(nn.modules.module), *map(vars, modules)]
    return any(
        hooks and isinstance(hooks, dict)
        for names in every
        for name, hooks in names.items()
        if name.endswith("_hooks") and "state_dict" not in name
    )


def _tensors_of(modules: Iterable[nn.Module]) -> list[Tensor]:
    """All tensors that hang on ``modules``."""
    own = ({name: value for name, value in vars(module).items() if name != "_modules"} for module in modules)
    return [tensor for names in own for _, tensor in tensors_in(names)]


def _is_dense(tensor: Tensor) -> bool:
    return (
        type(tensor) in (Tensor, nn.Parameter)
        and tensor.layout is torch.strided
        and tensor.device.type == "cpu"
        and tensor.is_leaf
        and not (tensor.is_nested or tensor.is_quantized or tensor.is_inference())
        and not (tensor.is_conj() or tensor.is_neg())
        and not (tensor._backward_hooks or getattr(tensor, "_post_accumulate_grad_hooks", None))
    )


def _fake(tensor: Tensor, mode: FakeTensorMode) -> Tensor:
    """A fake tensor of the same form, with what Python has noted on it."""
    with mode:
        made = fake_like(tensor)
    vars(made).update(vars(tensor))
    return made


def _without_values(call: Call, around: Iterable[nn.Module], replace: Callable[[Tensor], Tensor]) -> Call:
    """The call with ``replace(tensor)`` for every tensor, in a copy of its module too."""
    function = call.function
    if isinstance(function, nn.Module):
        modules = list(function.modules())
        memo: dict[int, Any] = {id(module): module for module in around}
        for module in modules:
            memo.pop(id(module), None)
        for tensor in _tensors_of(modules):
            if id(tensor) not in memo:
                memo[id(tensor)] = replace(tensor)
        function = copy.deepcopy(function, memo)
    args, kwargs = map_tensors(replace, (call.args, call.kwargs))
    return Call(function, args, kwargs, call.context)
