"""Operations: what PyTorch really does while a model runs, operator by operator, and how much each of them takes.

The operators are those of ATen, below autograd: views, autocast and composite functions are resolved. How much one
takes is a matter of its arguments' shapes, so that fake tensors, which have no values, give the same as real ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache, reduce
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from shardwright.profiler.recording.compiler import compiler_spared
from shardwright.profiler.recording.flops import Formula, formula_of
from shardwright.profiler.recording.structure import nbytes

__all__ = ["Operation", "OperationRecorder", "decides_by_values", "tensor_bytes"]

FREE = frozenset(
    {
        *("_unsafe_view", "_reshape_alias", "alias", "detach_", "lift", "lift_fresh", "resize_", "set_"),
        *("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "unsafe_chunk"),
        *("unsafe_split", "unsafe_split_with_sizes", "squeeze_", "unsqueeze_", "t_", "transpose_"),
    }
)
"""Operators that move nothing, beside those whose schema says that they are views."""
QUERIES = frozenset(
    {
        *("size", "sym_size", "stride", "sym_stride", "storage_offset", "sym_storage_offset", "numel", "sym_numel"),
        *("dim", "is_contiguous", "sym_is_contiguous", "is_strides_like_format", "is_non_overlapping_and_dense"),
    }
)
"""Questions about a tensor's form, which some tensors ask through the dispatcher."""
OVERWRITING = frozenset({"copy_", "fill_", "zero_", "normal_", "uniform_", "bernoulli_", "random_", "exponential_"})
"""In-place operators that do not read what they replace."""
PARTIAL = frozenset(
    {
        *("embedding", "index", "index_select", "gather", "take", "index_put_", "_index_put_impl_", "index_copy_"),
        *("index_add_", "scatter_", "scatter_add_", "slice_scatter", "select_scatter", "masked_select"),
    }
)
"""Operators that touch of their first tensor only as much as the others hold: rows of a table, places in a cache."""


class Operation(NamedTuple):
    """One operator with its arguments."""

    name: str
    """Operator and overload, such as ``aten.addmm.default``."""
    flops: int
    """Arithmetic of matrix products, convolutions, attention and recurrent layers; 0 for what only moves bytes."""
    bytes: int
    """Read and written, each tensor once for either; 0 for views."""
    dtype: torch.dtype | None
    """What the arithmetic's rate depends on: of the first floating tensor argument, else of the first tensor."""
    text: str
    """The call in one line: tensors as dtype, shape and strides, other arguments as they are; no address, no values."""


@compiler_spared
class OperationRecorder(TorchDispatchMode):
    """Calls ``add`` with each :class:`Operation` that runs in its scope, backward included.

    It changes nothing but, with ``echoes``, numbers.

    Args:
        echoes: where numbers do not matter: arithmetic with what is trained is done once for operators of one form;
            the others of that form give a copy of its result. So a stack of layers takes hardly longer than one layer.

    What ``torch.compile`` compiles stays compiled and is not seen, except under its stance ``"force_eager"``.
    Works on real, fake, meta and sparse tensors. In inference mode composite functions are taken apart as autograd
    would have done. Outside of the scope of a ``FakeTensorMode`` it would see how that mode works instead of the model:
    enter it inside.
    """

    supports_higher_order_operators = True  # otherwise those would raise

    def __init__(self, add: Callable[[Operation], None], *, echoes: bool = False) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.add = add
        self.echoes = _Echoes() if echoes else None

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Leave compiled functions compiled."""
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operator, then hand on what it was."""
        kwargs = kwargs or {}
        operator = _operator(func)
        with torch._C.DisableTorchFunction():  # without this mode, function modes would not see operators
            if operator.is_composite and all(kind in _PLAIN for kind in types):
                with self:
                    result = func.decompose(*args, **kwargs)
                if result is not NotImplemented:
                    return result
            if self.echoes is not None and operator.formula is not None and not operator.written:
                result = self.echoes.result_of(operator, func, args, kwargs)
            else:
                result = func(*args, **kwargs)
        if not operator.is_query:
            self.add(_operation(operator, args, kwargs, result))
        return result


_PLAIN = (Tensor, torch.nn.Parameter, FakeTensor)
"""Other tensors may answer composite functions themselves."""


class _Echoes:
    """The results of arithmetic, by the form of the call."""

    def __init__(self) -> None:
        self.known: dict[tuple[Any, ...], tuple[Any, tuple[int, ...]]] = {}
        """With how often each tensor had been changed in place when it was made."""

    def result_of(self, operator: _Operator, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """What the operator gives, or a copy of what it gave for arguments of the same form."""
        tensors = [*_tensors(args), *_tensors(kwargs.values())]
        # Of what is not trained, such as tables, a model may keep results for later calls: those have to be right.
        trained = any(tensor.requires_grad for tensor in tensors)
        if not trained or not operator.name.startswith("aten.") or not all(map(_is_echoed, tensors)):
            return func(*args, **kwargs)
        form = (_call_form(operator, args, kwargs), *(t.device for t in tensors))
        if form in self.known:
            result, versions = self.known[form]
            if versions == tuple(t._version for t in _tensors((result,))):
                return pytree.tree_map_only(Tensor, Tensor.clone, result)  # which keeps the strides of what is dense
        result = func(*args, **kwargs)
        made = list(_tensors((result,)))
        if all(_is_echoed(t) and torch.empty_like(t).stride() == t.stride() for t in made):
            self.known[form] = result, tuple(t._version for t in made)
        return result


def _is_echoed(tensor: Tensor) -> bool:
    """Whether the text of a call tells the form of ``tensor``, all of it."""
    return (
        type(tensor) in (Tensor, torch.nn.Parameter)
        and _is_told(tensor)
        and not (tensor.is_inference() or tensor.is_conj() or tensor.is_neg())
    )


class _Operator(NamedTuple):
    """What is known of an operator before it is called."""

    name: str
    short_name: str
    is_composite: bool
    is_query: bool
    is_free: bool
    formula: Formula | None
    written: tuple[tuple[int, str, bool], ...]
    """Position, name, and whether it is an ``out=``, of each argument that the schema says is written."""


@cache
def _operator(func: Any) -> _Operator:
    """Look an operator up; its schema tells a view, and what is written."""
    if not isinstance(func, OpOverload):  # of higher order, such as flexible attention
        return _Operator(str(func), str(func), False, False, False, formula_of(func), ())
    short_name = func._overloadpacket.__name__
    is_query = func.namespace in ("prim", "profiler") or short_name in QUERIES
    arguments = enumerate(func._schema.arguments)
    return _Operator(
        name=str(func),
        short_name=short_name,
        is_composite=not is_query and func._can_decompose() and not _has_kernel(func),
        is_query=is_query,
        is_free=func.is_view or short_name in FREE,
        formula=formula_of(func),
        written=tuple(
            (i, a.name, a.is_out) for i, a in arguments if a.alias_info is not None and a.alias_info.is_write
        ),
    )


def _has_kernel(func: OpOverload[Any, Any]) -> bool:
    """Whether an operator that could be taken apart is one on a CPU all the same, as the backward of SiLU."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), torch._C.DispatchKey.CPU)


@cache
def decides_by_values(name: str) -> bool:
    """Whether the operator ``name`` makes a number of Python or a shape of values, as ones that are not ATen's may."""
    space, *path = name.split(".")
    found = reduce(lambda holder, part: getattr(holder, part, None), path, getattr(torch.ops, space))
    tags = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)
    return space != "aten" or not isinstance(found, OpOverload) or any(tag in found.tags for tag in tags)


def _operation(operator: _Operator, args: Sequence[Any], kwargs: Mapping[str, Any], result: Any) -> Operation:
    """The record of one call, which gave ``result``: made once for calls of one form, if that tells all about them."""
    tensors = [*_tensors(args), *_tensors(kwargs.values())]
    results = list(_tensors((result,)))
    form = _form(operator, args, kwargs, tensors, results)
    known = _known.get(form) if form is not None else None
    if known is not None:
        return known
    made = Operation(
        name=operator.name,
        flops=_flops(operator, args, kwargs, result),
        bytes=0 if operator.is_free else _moved(operator, args, kwargs, tensors, results),
        dtype=_deciding([*tensors, *results]),
        text=_text_of(operator, args, kwargs),
    )
    if form is not None:
        if len(_known) >= MOST_KNOWN:
            _known.clear()
        _known[form] = made
    return made


MOST_KNOWN = 10_000
_known: dict[tuple[Any, ...], Operation] = {}
"""Operations by the form of a call and of its results: equal layers make the same calls."""


def _form(
    operator: _Operator,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    tensors: Sequence[Tensor],
    results: Sequence[Tensor],
) -> tuple[Any, ...] | None:
    """What the record of a call follows from; None where more than that matters.

    So it is where a tensor takes part twice, and with operators that are not ATen's, which may take what no text tells.
    """
    every = (*tensors, *results)
    if (
        not operator.name.startswith("aten.")
        or len({id(t) for t in every}) < len(every)
        or not all(map(_is_told, every))
    ):
        return None
    return (_call_form(operator, args, kwargs), *map(_argument_form, results))


def _call_form(operator: _Operator, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Any, ...]:
    """What tells apart calls whose texts differ, and is made in a part of the time."""
    named = ((name, _argument_form(value)) for name, value in kwargs.items())
    return (operator.name, *map(_argument_form, args), *named)


def _argument_form(value: Any) -> Any:
    kind = type(value)
    if kind is int:
        return value
    if isinstance(value, Tensor):
        return (value.dtype, value.shape, value.stride())
    if isinstance(value, (list, tuple)):
        return (list, *map(_argument_form, value))
    if isinstance(value, (torch.dtype, torch.device, torch.layout, torch.memory_format)):
        return value
    return (kind, repr(value) if value is None or isinstance(value, (bool, int, float, complex, str)) else "")


def _text_of(operator: _Operator, args: Sequence[Any], kwargs: Mapping[str, Any]) -> str:
    arguments = [*map(_text, args), *(f"{key}={_text(value)}" for key, value in kwargs.items())]
    return f"{operator.name}({', '.join(arguments)})"


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    """The tensors among arguments; operators take and return lists at most two deep."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)


def _deciding(tensors: Sequence[Tensor]) -> torch.dtype | None:
    floating = (t.dtype for t in tensors if t.is_floating_point() or t.is_complex())
    return next(floating, tensors[0].dtype if tensors else None)


# Bytes


def tensor_bytes(tensor: Tensor) -> int:
    """Bytes of the elements that ``tensor`` really has: an expanded one has fewer than its shape says."""
    if tensor.is_nested:
        return tensor.numel() * tensor.element_size()
    if tensor.layout is not torch.strided:
        try:
            return nbytes(tensor)
        except (RuntimeError, NotImplementedError):  # such as a fake one
            return 0
    sizes = zip(tensor.shape, tensor.stride(), strict=True)
    return prod(size if stride or not size else 1 for size, stride in sizes) * tensor.element_size()


def _moved(
    operator: _Operator,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    tensors: Sequence[Tensor],
    results: Sequence[Tensor],
) -> int:
    """Bytes that the operator reads and writes."""
    out, changed = _changed(operator, args, kwargs)
    unread = out | changed if operator.short_name in OVERWRITING else out
    read = {id(t): tensor_bytes(t) for t in tensors if id(t) not in unread}
    written = {id(t): tensor_bytes(t) for t in [*results, *(t for t in tensors if id(t) in out | changed)]}
    if operator.short_name in PARTIAL and tensors:
        table = id(tensors[0])
        most = max((size for sizes in (read, written) for key, size in sizes.items() if key != table), default=0)
        for sizes in (read, written):
            if table in sizes:
                sizes[table] = min(sizes[table], most)
    return sum(read.values()) + sum(written.values())


def _changed(operator: _Operator, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[set[int], set[int]]:
    """The tensors given as ``out=``, and the others that the operator changes, by ``id``."""
    out: set[int] = set()
    changed: set[int] = set()
    for position, name, is_out in operator.written:
        value = args[position] if position < len(args) else kwargs.get(name)
        (out if is_out else changed).update(id(t) for t in _tensors((value,)))
    return out, changed


def _flops(operator: _Operator, args: Sequence[Any], kwargs: Mapping[str, Any], result: Any) -> int:
    """What the operator's formula gives."""
    if operator.formula is None:
        return 0
    try:
        return int(operator.formula(result, *args, **kwargs))
    except (AssertionError, AttributeError, TypeError, ValueError, RuntimeError):
        return 0  # an unusual form of the operator, such as a nested tensor, that the formula does not know


def _is_told(tensor: Tensor) -> bool:
    """Whether the text of a call tells the form of ``tensor``."""
    return tensor.layout is torch.strided and not tensor.is_nested


# Text


def _text(value: Any) -> str:
    """An argument as text that is the same in every process and for every tensor of that form."""
    if isinstance(value, Tensor):
        return _tensor_text(value)
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_text, value))}]"
    if value is None or isinstance(value, (bool, int, float, complex, str)):
        return repr(value)
    if isinstance(value, (torch.dtype, torch.device, torch.layout, torch.memory_format)):
        return str(value)
    return type(value).__qualname__


def _tensor_text(tensor: Tensor) -> str:
    dtype = str(tensor.dtype).removeprefix("torch.")
    if not _is_told(tensor):
        return f"{dtype} {tensor.layout} {tensor.dim()} {tensor_bytes(tensor)}"
    return f"{dtype}{list(tensor.shape)}{list(tensor.stride())}"
