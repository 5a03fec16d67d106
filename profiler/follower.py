"""Followers: modes that tell whether a run calls operators that are known to be alike on real and on fake tensors."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from shardwright.profiler.operations import Operation, is_view, operation_of

__all__ = ["BackwardFollower", "ForwardFollower", "OtherOperationError"]

GIVES_ALL = frozenset(
    {
        "aten._scaled_dot_product_flash_attention_for_cpu_backward.default",
        "aten._prelu_kernel_backward.default",
        "aten._weight_norm_interface_backward.default",
    }
)
"""Operators of backwards that give several tensors, each as large as what it is the gradient of."""

_STRIDES = re.compile(r"(\w\[[\d, ]*\])\[[\d, ]*\]")
"""Of a tensor in the text of a call."""


class OtherOperationError(Exception):
    """An operator is not the one that was expected, or none that is known to be alike without values."""


class _Ran(NamedTuple):
    """A call of an operator, and what it gave."""

    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    result: Any


class _Follower(TorchDispatchMode):
    """Lets operators run as long as they are alike. Views are not looked at: what they lead to is."""

    supports_higher_order_operators = True  # they are no operators of ATen, which is told when they have run

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.has_strayed = False

    def end(self) -> None:
        """Make sure that all went as expected, also where the model has caught an error.

        Raises:
            OtherOperationError: it did not.
        """
        if self.has_strayed:
            raise OtherOperationError

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operator, then hold it against what was expected.

        Raises:
            OtherOperationError: it is another.
        """
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if getattr(func, "namespace", "") == "prim" or is_view(str(func)):
            return result
        with torch._C.DisableTorchFunction():
            found = operation_of(*_as_recorded(func, args), kwargs, result)
            if found is None or self._is_alike(found, _Ran(func, args, kwargs, result)):
                return result
        self.has_strayed = True
        raise OtherOperationError(found.text)

    def _is_alike(self, found: Operation, ran: _Ran) -> bool:
        raise NotImplementedError


class ForwardFollower(_Follower):
    """Lets the operators run that were recorded, in their order, with results that take as many bytes.

    Args:
        expected: what an :class:`~shardwright.profiler.operations.OperationRecorder` has recorded.
        strides: whether those of the arguments have to be the same too.
    """

    def __init__(self, expected: Sequence[Operation], *, strides: bool = True) -> None:
        super().__init__()
        self._left = (operation for operation in expected if not is_view(operation.name))
        self._strides = strides

    def end(self) -> None:
        """Make sure that all went as expected and to the end.

        Raises:
            OtherOperationError: it did not, or operators are missing.
        """
        super().end()
        if next(self._left, None) is not None:
            raise OtherOperationError

    def _is_alike(self, found: Operation, _ran: _Ran) -> bool:
        expected = next(self._left, None)
        if expected is None or (expected.name, expected.result_bytes) != (found.name, found.result_bytes):
            return False
        return expected.text == found.text or (
            not self._strides and _STRIDES.sub(r"\1", expected.text) == _STRIDES.sub(r"\1", found.text)
        )


class BackwardFollower(_Follower):
    """Lets those of ATen's operators run of which a backward tells what they give, with dense tensors.

    That is one tensor, whose shape autograd or the next operator wants; or several, all of which are asked for. Fake
    kernels may give more than that. What the forward has called before may be called again, as checkpoints do.

    Args:
        before: the operators of the forward.
    """

    def __init__(self, before: Iterable[Operation] = ()) -> None:
        super().__init__()
        self._before = {(operation.text, operation.result_bytes) for operation in before}

    def _is_alike(self, found: Operation, ran: _Ran) -> bool:
        if (found.text, found.result_bytes) in self._before:
            return True
        if not found.name.startswith("aten.") or not _is_dense((ran.args, ran.kwargs, ran.result)):
            return False
        return not isinstance(ran.result, (tuple, list)) or found.name in GIVES_ALL or _gives_what_is_asked(ran)


def _gives_what_is_asked(ran: _Ran) -> bool:
    """Whether an operator has a mask of the results that it is to give, and gives no other."""
    names = [argument.name for argument in ran.func._schema.arguments]
    if "output_mask" not in names:
        return False
    place = names.index("output_mask")
    mask = ran.args[place] if place < len(ran.args) else ran.kwargs.get("output_mask", ())
    return len(mask) == len(ran.result) and all(
        asked or not isinstance(given, Tensor) for asked, given in zip(mask, ran.result, strict=True)
    )


def _as_recorded(func: Any, args: tuple[Any, ...]) -> tuple[Any, tuple[Any, ...]]:
    """The operator that a recorder sees, with its arguments: it takes apart what PyTorch's own kernels run as a whole.

    Other such functions are taken apart above any mode, if gradients are recorded.
    """
    if func is not torch.ops.aten.native_batch_norm.default:
        return func, args
    x, weight, bias, mean, variance, trains, momentum, epsilon = args
    if mean is None and variance is None:
        return torch.ops.aten._native_batch_norm_legit.no_stats, (x, weight, bias, trains, momentum, epsilon)
    if trains:
        return torch.ops.aten._native_batch_norm_legit.default, args
    return (
        torch.ops.aten._native_batch_norm_legit_no_training.default,
        (x, weight, bias, mean, variance, momentum, epsilon),
    )


def _is_dense(value: Any) -> bool:
    tensors = [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]
    return all(tensor.layout is torch.strided and not tensor.is_nested for tensor in tensors)
