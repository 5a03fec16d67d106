"""Function modes that stay on in a backward.

PyTorch shows a backward to function modes as one call, and runs it without them. What it computes anew
(``torch.utils.checkpoint``) would then go another way than the first time. A backward from edges of the graph instead
of tensors is not shown.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.overrides import TorchFunctionMode

__all__ = ["BACKWARDS", "StayingMode"]


class StayingMode(TorchFunctionMode):
    """A mode of which :meth:`call` is asked for every function but those that begin a backward."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in BACKWARDS:
            return self.call(func, args, kwargs)
        try:
            run = _BY_EDGES[func](*args, **kwargs)
        except RuntimeError:  # a tensor without a graph: PyTorch has its own words for that
            return func(*args, **kwargs)
        with self:
            return run()

    def call(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call ``func``, or what is to be done in its place."""
        raise NotImplementedError


def _backward_of(
    tensor: Tensor,
    gradient: Any = None,
    retain_graph: bool | None = None,
    create_graph: bool = False,
    inputs: Any = None,
) -> Callable[[], Any]:
    """``Tensor.backward``."""
    return _backward([tensor], [gradient], retain_graph, create_graph, inputs=inputs)


def _backward(
    tensors: Any,
    grad_tensors: Any = None,
    retain_graph: bool | None = None,
    create_graph: bool = False,
    grad_variables: Any = None,
    inputs: Any = None,
) -> Callable[[], Any]:
    """``torch.autograd.backward``; ``grad_variables`` is an old name of its second argument."""
    roots, gradients = _from(tensors, grad_variables if grad_tensors is None else grad_tensors)
    ends = None if inputs is None else _edges(inputs)
    return lambda: torch.autograd.backward(roots, gradients, retain_graph, create_graph, inputs=ends)


def _grad(
    outputs: Any, inputs: Any, grad_outputs: Any = None, *args: Any, materialize_grads: bool = False, **kwargs: Any
) -> Callable[[], Any]:
    """``torch.autograd.grad``."""
    roots, gradients = _from(outputs, grad_outputs)
    if not materialize_grads:
        return partial(torch.autograd.grad, roots, _edges(inputs), gradients, *args, **kwargs)
    run = partial(torch.autograd.grad, roots, _edges(inputs), gradients, *args, **kwargs | {"allow_unused": True})
    return lambda: tuple(
        torch.zeros_like(end) if gradient is None else gradient
        for end, gradient in zip(_several(inputs), run(), strict=True)
    )


_BY_EDGES: dict[Any, Callable[..., Callable[[], Any]]] = {
    Tensor.backward: _backward_of,
    torch.autograd.backward: _backward,
    torch.autograd.grad: _grad,
}
"""Functions that begin a backward, as one from edges that is about to run."""
BACKWARDS = frozenset(_BY_EDGES)
"""Functions that begin a backward."""


def _from(outputs: Any, gradients: Any) -> tuple[list[GradientEdge], list[Tensor | None]]:
    """Where a backward begins, and with what: that of a single number with one."""
    roots = _several(outputs)
    given = [None] * len(roots) if gradients is None else _several(gradients)
    return _edges(roots), [
        torch.ones_like(root) if gradient is None and _is_one_number(root) else gradient
        for root, gradient in zip(roots, given, strict=True)
    ]


def _is_one_number(root: Any) -> bool:
    return isinstance(root, Tensor) and root.numel() == 1 and not root.is_complex()


def _edges(tensors: Any) -> list[GradientEdge]:
    return [get_gradient_edge(t) if isinstance(t, Tensor) else t for t in _several(tensors)]


def _several(one_or_more: Any) -> Sequence[Any]:
    several = isinstance(one_or_more, (list, tuple)) and not isinstance(one_or_more, GradientEdge)
    return [*one_or_more] if several else [one_or_more]
