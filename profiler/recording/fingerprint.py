"""Fingerprints: whether a model and its forward are what they were, told by their content and not by running them.

Everything that can be reached from the modules goes into a digest: their attributes, the code of their classes and of
the functions that these refer to by name, what such functions find in their closures and among their globals. Python's
own library and installed packages stand for themselves, by version and file. Values of floating tensors do not go in,
unless they look like a mask, since they differ with every initialisation; their scales are told apart from the digest.
What cannot be told by its content, such as a lock, an open file or a generator of random numbers, leaves a model
without a fingerprint.
"""

from __future__ import annotations

import dis
import enum
import functools
import hashlib
import logging
import math
import os
import platform
import re
import sys
import sysconfig
import types
from collections import OrderedDict, defaultdict, deque
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from shardwright.profiler.recording.inputs import is_mask

__all__ = ["Fingerprint", "Scale", "fingerprint_of", "raw_bytes"]

MOST = 1_000_000
"""Of more things than that no fingerprint is taken."""
ALIKE = 4.0
"""By such a factor may the largest values of two draws differ."""
ALIKE_ZEROS = 0.01
"""By so much may their shares of zeros differ."""
_HOMES = tuple(
    {*map(sysconfig.get_path, ("stdlib", "platstdlib", "purelib", "platlib")), str(Path(torch.__file__).parents[1])}
)
"""Where installed packages lie, whose code is told by a version."""
_ATOMS = (
    *(str, bytes, int, float, complex, bool, type(None), type(Ellipsis), type(NotImplemented), range, re.Pattern),
    *(torch.dtype, torch.device, torch.layout, torch.memory_format, np.generic, np.dtype),
)
_COMMON = frozenset([str, int, float, bool, type(None)])
_SEQUENCES = (list, tuple, torch.Size, deque)
_MAPPINGS = (dict, OrderedDict, defaultdict, types.MappingProxyType)
_CONTAINERS = frozenset([list, tuple, dict, OrderedDict, set, frozenset])
_BUILTIN = (
    *(types.BuiltinFunctionType, types.MethodDescriptorType, types.WrapperDescriptorType, types.MethodWrapperType),
    *(types.GetSetDescriptorType, types.MemberDescriptorType, types.ClassMethodDescriptorType, np.ufunc),
    *(torch._ops.OpOverload, torch._ops.OpOverloadPacket),
)
_REACHING = frozenset(["globals", "locals", "modules", "import_module", "__import__", "open", "eval", "exec"])
"""Names with which code reaches what cannot be followed from it."""
_ASIDE = frozenset(["__dict__", "__weakref__", "__doc__", "__annotations__", "__firstlineno__", "_abc_impl"])
"""Attributes of classes that no forward depends on."""


class Scale(NamedTuple):
    """What is known of the values of a floating tensor."""

    least: float
    most: float
    zeros: float
    """Their share."""

    def like(self, other: Scale) -> bool:
        """Whether values of this scale could be another draw of the same: a constant is only like itself."""
        if self.least == self.most or other.least == other.most:
            return self == other
        if abs(self.zeros - other.zeros) > ALIKE_ZEROS:
            return False
        one, two = (max(abs(scale.least), abs(scale.most)) for scale in (self, other))
        return one <= ALIKE * two and two <= ALIKE * one


class Fingerprint(NamedTuple):
    """What a forward depends on."""

    digest: str
    scales: tuple[Scale, ...]
    """Of the floating tensors, in the order in which they were met."""


def fingerprint_of(model: nn.Module, inputs: Any) -> Fingerprint | None:
    """The fingerprint of a model and of what it is called with; None where something cannot be told by its content."""
    teller = _Teller(id(tensor) for tensor in _tensors(inputs))
    try:
        teller.tell((platform.python_version(), torch.__version__, np.__version__, _switches()))
        teller.tell((model, inputs))
    except (_UntoldError, RecursionError):
        return None
    return Fingerprint(teller.digest.hexdigest()[:32], tuple(teller.scales))


def _tensors(inputs: Any) -> list[Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(inputs) if isinstance(leaf, Tensor)]


def _switches() -> tuple[Any, ...]:
    """What is set for all of PyTorch and steers which operators run."""
    watching = [hooks for name, hooks in vars(nn.modules.module).items() if name.startswith("_global_") and hooks]
    if watching or torch._C._len_torch_function_stack() or torch._C._len_torch_dispatch_stack():
        raise _UntoldError
    sdp = (torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.mem_efficient_sdp_enabled())
    return (
        *(torch.get_default_dtype(), str(torch.get_default_device()), torch.are_deterministic_algorithms_enabled()),
        *(torch.backends.mha.get_fastpath_enabled(), torch.backends.mkldnn.enabled, torch.backends.cudnn.enabled),
        *(*sdp, torch.backends.cuda.math_sdp_enabled(), torch.is_inference_mode_enabled(), torch.is_grad_enabled()),
        *(torch.is_autocast_enabled("cpu"), torch.is_autocast_enabled("cuda"), torch.get_float32_matmul_precision()),
        *(torch.get_autocast_dtype("cpu"), torch.get_autocast_dtype("cuda")),
    )


def raw_bytes(tensor: Tensor) -> bytes:
    """The numbers of a dense tensor, as they lie in memory."""
    return tensor.detach().cpu().flatten().view(torch.uint8).numpy().tobytes()


def _scale(values: Tensor) -> Scale | None:
    """The scale of floating values; None where some are infinite or no numbers, as in masks that are added."""
    least, most = map(float, torch.aminmax(values))
    if not (math.isfinite(least) and math.isfinite(most)):
        return None
    return Scale(least, most, 1 - int(values.count_nonzero()) / values.numel())


class _UntoldError(Exception):
    """Something that has a content which cannot be seen."""


class _Teller:
    """Writes all that can be reached from a value into a digest.

    Args:
        inputs: tensors, by identity, of which whole numbers are told by their range.
    """

    def __init__(self, inputs: Iterable[int]) -> None:
        self.digest = hashlib.sha256()
        self.scales: list[Scale] = []
        self.inputs = frozenset(inputs)
        self.number: dict[int, int] = {}
        self.alive: list[Any] = []  # an address stays its own as long as the thing lives

    def tell(self, value: Any) -> None:
        """Write ``value``: in full when it is met first, as the number of that meeting later."""
        kind = type(value)
        if kind in _COMMON or (kind not in _CONTAINERS and _is_atom(value)):
            self._write(f"{type(value).__name__} {value!r}")
            return
        if id(value) in self.number:
            self._write(f"#{self.number[id(value)]}")
            return
        if len(self.number) > MOST:
            raise _UntoldError
        self.number[id(value)] = len(self.number)
        self.alive.append(value)
        if kind in _CONTAINERS:
            self._tell_all(kind.__name__, _items(value) or ())
        else:
            self._tell_new(value)

    def _write(self, text: str) -> None:
        self.digest.update(f"{len(text)} {text}\n".encode(errors="backslashreplace"))

    def _tell_new(self, value: Any) -> None:
        if isinstance(value, Tensor):
            self._tell_tensor(value)
        elif isinstance(value, enum.Enum):
            self._write(f"enum {type(value).__qualname__} {value.name} {value.value!r}")
        elif isinstance(value, np.ndarray):
            self._tell_array(value)
        elif isinstance(value, type):
            self._tell_class(value)
        elif isinstance(value, types.ModuleType):
            self._tell_module(value)
        elif isinstance(value, types.FunctionType):
            self._tell_function(value)
        elif isinstance(value, logging.Logger):
            self._write(f"logger {value.name}")
        elif isinstance(value, _BUILTIN):
            self._tell_builtin(value)
        elif parts := _parts(value):
            self._tell_all(type(value).__name__, parts)
        else:
            self._tell_object(value)

    def _tell_all(self, what: str, parts: Iterable[Any]) -> None:
        parts = list(parts)
        self._write(f"{what} of {len(parts)}")
        for part in parts:
            self.tell(part)

    def _tell_tensor(self, tensor: Tensor) -> None:
        odd = tensor.is_nested or tensor.is_quantized or tensor.is_complex()
        if odd or tensor.layout != torch.strided or tensor._backward_hooks:
            raise _UntoldError
        form = (tuple(tensor.shape), tuple(tensor.stride()), tensor.dtype, tensor.requires_grad, tensor.device.type)
        self._write(f"{type(tensor).__qualname__} {form} {tensor.is_leaf}")
        if vars(tensor):
            self.tell(vars(tensor))
        if tensor.is_meta or not tensor.numel():
            return
        values, given = tensor.detach(), id(tensor) in self.inputs
        scale = _scale(values) if values.is_floating_point() and not is_mask(values) else None
        if scale is not None:
            self.scales.append(scale)
        elif given and values.dtype not in (torch.bool, torch.uint8) and not values.is_floating_point():
            self._write(f"{int(values.min())}..{int(values.max())}")  # indices and labels, as signatures tell them
        else:
            self.digest.update(raw_bytes(values))

    def _tell_array(self, array: np.ndarray[Any, Any]) -> None:
        if array.dtype.hasobject:
            raise _UntoldError
        self._write(f"array {array.shape} {array.strides} {array.dtype}")
        self.digest.update(array.tobytes())

    def _tell_class(self, class_: type) -> None:
        """A class by its content; one of the libraries by its name and by what others have put into it."""
        self._write(f"class {class_.__module__}.{class_.__qualname__}")
        if not _is_explained(class_):
            self._tell_all("bases", class_.__bases__)
            self._tell_all("content", (x for item in vars(class_).items() if item[0] not in _ASIDE for x in item))
            return
        self._write(_edition(class_.__module__))
        for base in class_.__mro__:
            for name, value in list(vars(base).items()):
                if isinstance(value, types.FunctionType) and not _is_explained(value):
                    self._tell_all(name, [value])

    def _tell_function(self, function: types.FunctionType) -> None:
        self._write(f"function {function.__module__}.{function.__qualname__}")
        if _is_explained(function):
            self._write(_edition(_home(function)))
            if not function.__closure__:
                return
        cells = [_content(cell) for cell in function.__closure__ or ()]
        self._tell_all("function", (function.__defaults__, function.__kwdefaults__, vars(function), *cells))
        if not _is_explained(function):
            self._tell_code(function.__code__)
            self._tell_globals(function)

    def _tell_module(self, module: types.ModuleType) -> None:
        """A module by its name and version; one of the user's by its file, and by all that it holds."""
        self._write(f"module {module.__name__} {getattr(module, '__version__', '')}")
        if _is_explained(module):
            return
        file = _file(module.__name__)
        if not file or not os.path.exists(file):
            raise _UntoldError
        self.digest.update(Path(file).read_bytes())
        held = {name: value for name, value in vars(module).items() if not name.startswith("__")}
        self._tell_all("held", (part for item in sorted(held.items(), key=lambda item: item[0]) for part in item))

    def _tell_imports(self, code: types.CodeType) -> None:
        """The modules that code imports when it runs."""
        for instruction in dis.get_instructions(code):
            if instruction.opname == "IMPORT_NAME":
                module = sys.modules.get(instruction.argval)
                if module is None:
                    raise _UntoldError
                self.tell(module)

    def _tell_code(self, code: types.CodeType) -> None:
        names = (code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars)
        counts = (code.co_flags, code.co_argcount, code.co_kwonlyargcount, code.co_posonlyargcount)
        if not _REACHING.isdisjoint(code.co_names):
            raise _UntoldError
        self._write(f"{code.co_code!r} {names} {counts}")
        self._tell_imports(code)
        for constant in code.co_consts:
            if isinstance(constant, types.CodeType):
                self._tell_code(constant)
            else:
                self.tell(constant)

    def _tell_globals(self, function: types.FunctionType) -> None:
        """What the function refers to by name: globals, and of modules among them the attributes."""
        names = sorted(_names(function.__code__))
        found = {name: function.__globals__[name] for name in names if name in function.__globals__}
        for name, value in found.items():
            self._tell_all(name, [value])
        if not {"environ", "getenv"}.isdisjoint(names):
            self.tell(dict(os.environ))

    def _tell_builtin(self, value: Any) -> None:
        owner = getattr(value, "__objclass__", None) or getattr(value, "__self__", None)
        self._write(f"builtin {getattr(owner, '__qualname__', '')} {getattr(value, '__qualname__', str(value))}")
        if owner is not None and not isinstance(owner, (type, types.ModuleType)):
            self.tell(owner)

    def _tell_object(self, value: Any) -> None:
        """Any other object: its class, its attributes, and its items if it is a container of Python's own kind."""
        class_ = type(value)
        content = _items(value)
        attributes = getattr(value, "__dict__", None)
        slots = [(name, getattr(value, name)) for name in _slots(class_) if hasattr(value, name)]
        shown = attributes is not None or slots or content is not None or class_ is object
        if not shown or _hides(class_) or isinstance(value, torch.jit.ScriptModule):
            raise _UntoldError
        self.tell(class_)
        self._tell_all("items", content or ())
        self._tell_all("attributes", (x for item in [*slots, *(attributes or {}).items()] for x in item))


_MADE_IN_PYTHON = 1 << 9
"""``Py_TPFLAGS_HEAPTYPE`` of a class."""


def _hides(class_: type) -> bool:
    """Whether a class written in C, of which only the attributes can be seen, is among the bases."""
    shown = (object, types.SimpleNamespace, *_SEQUENCES, *_MAPPINGS, set, frozenset)
    return any(not base.__flags__ & _MADE_IN_PYTHON and base not in shown for base in class_.__mro__)


def _is_atom(value: Any) -> bool:
    return isinstance(value, _ATOMS) and not isinstance(value, enum.Enum)


def _is_explained(value: Any) -> bool:
    """Whether the code of a class, function or module belongs to a library that a version tells.

    A function belongs where it was written: decorators give it the name of what it wraps.
    """
    return _is_library(_home(value))


def _home(value: Any) -> str:
    """The name of the module in which a class or function was written; of a module, its own."""
    if isinstance(value, types.FunctionType):
        return str(value.__globals__.get("__name__"))
    return value.__name__ if isinstance(value, types.ModuleType) else str(getattr(value, "__module__", ""))


@functools.cache
def _is_library(module: str) -> bool:
    """Whether ``module`` is installed, and no file of the user."""
    package = module.partition(".")[0]
    if package in ("shardwright", "__main__"):
        return package == "shardwright"
    file = _file(module) or _file(package)
    return file.startswith(_HOMES) if file else package in sys.stdlib_module_names


@functools.cache
def _edition(module: str) -> str:
    """The version of an installed package, and when the file of one of its modules was written."""
    file = _file(module)
    written = os.stat(file).st_mtime_ns if file and os.path.exists(file) else ""
    return f"{getattr(sys.modules.get(module.partition('.')[0]), '__version__', '')} {written}"


def _file(module: str) -> str:
    return getattr(sys.modules.get(module), "__file__", None) or ""


def _parts(value: Any) -> list[Any]:
    """What a wrapper of a function consists of; nothing for another object."""
    if isinstance(value, types.MethodType):
        return [value.__func__, value.__self__]
    if isinstance(value, functools.partial):
        return [value.func, value.args, value.keywords]
    if isinstance(value, (staticmethod, classmethod)):
        return [value.__func__]
    if isinstance(value, property):
        return [value.fget, value.fset, value.fdel]
    return [value.__wrapped__] if isinstance(value, functools._lru_cache_wrapper) else []


def _items(value: Any) -> list[Any] | None:
    """What a container of Python's own kind holds, in its order; None for another object."""
    if isinstance(value, _MAPPINGS):
        default = getattr(value, "default_factory", None)
        return [default, *(x for item in value.items() for x in item)]
    if isinstance(value, _SEQUENCES):
        return [getattr(value, "maxlen", None), *value]
    if isinstance(value, (set, frozenset)):
        if not all(isinstance(item, _ATOMS) for item in value):
            raise _UntoldError  # it has no order that another process would share
        return sorted(value, key=repr)
    return None


def _slots(class_: type) -> list[str]:
    slots = [base.__dict__.get("__slots__", ()) for base in class_.__mro__]
    return [n for names in slots for n in ([names] if isinstance(names, str) else names) if not n.startswith("__")]


def _names(code: types.CodeType) -> set[str]:
    """The names that a function and those in it use."""
    return set(code.co_names).union(*(_names(c) for c in code.co_consts if isinstance(c, types.CodeType)))


def _content(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:
        return None  # not yet filled
