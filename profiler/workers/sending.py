"""What is sent to a worker: pickled by value where the worker cannot import it, with what its class tells a process.

A model of transformers whose outputs are recorded while it runs (hidden states, attentions) needs its class to be known
to the process: its constructor enters it into a table, and one that arrives by pickle was constructed elsewhere. So the
worker constructs one of the class, without storage, before the first arrives. Hooks that it has by then record to a
context variable of its module, which is that of the worker's module there.

A module with parametrizations (weight norm, spectral norm) refuses to be pickled: its class was made for it alone. So
the worker gives one of the class beneath a class of its own.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import io
import random
import sys
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import cloudpickle
import numpy as np
import torch
from torch import nn
from torch.nn.utils import parametrize

__all__ = ["dumps"]

TELLS = "_can_record_outputs"
"""An attribute of the classes that are entered."""


class _Pickler(cloudpickle.Pickler):  # type: ignore[misc]  # untyped
    """Has the worker construct one of a class that is to be entered before it makes what arrives of it."""

    def reducer_override(self, obj: Any) -> Any:
        """How ``obj`` is pickled."""
        if isinstance(obj, nn.Module) and getattr(type(obj), TELLS, None) and hasattr(obj, "config"):
            reduced = obj.__reduce_ex__(4)
            if isinstance(reduced, tuple):
                made, args, *rest = reduced
                return (_made_known, (type(obj), obj.config, made, args), *rest)
        if isinstance(obj, nn.Module) and _is_parametrized(obj):
            return _bare, (type(obj).__bases__[0],), obj.__dict__, None, None, _parametrize
        name = _name_of(obj) if _has_context_variable(obj) else None
        if name is not None:
            return _global, (type(obj).__module__, name)
        return super().reducer_override(obj)


def _is_parametrized(module: nn.Module) -> bool:
    return "parametrizations" in module.__dict__.get("_modules", ()) and parametrize.is_parametrized(module)


def _has_context_variable(obj: Any) -> bool:
    try:
        own = obj.__dict__
    except Exception:  # there is none, or it is made up by code that fails
        return False
    return isinstance(own, dict) and any(type(it) is ContextVar for it in own.values())


def _name_of(obj: Any) -> str | None:
    """What the module of its class calls ``obj``, if a worker imports that module."""
    module = type(obj).__module__
    if module == "__main__" or module in cloudpickle.list_registry_pickle_by_value():
        return None
    if module not in sys.modules:
        return None
    return next((name for name, it in vars(sys.modules[module]).items() if it is obj), None)


def dumps(call: Any) -> bytes:
    """``call`` in bytes for ``pickle.loads``."""
    buffer = io.BytesIO()
    _Pickler(buffer).dump(call)
    return buffer.getvalue()


def _global(module: str, name: str) -> Any:
    """What ``module`` calls so in this process."""
    return getattr(importlib.import_module(module), name)


def _bare(kind: type[nn.Module]) -> nn.Module:
    """A module without anything in it."""
    return kind.__new__(kind)


def _parametrize(module: nn.Module, state: dict[str, Any]) -> None:
    """Make ``module`` what it was, parametrizations and all, as ``register_parametrization`` does at the first one."""
    module.__dict__.update(state)
    parametrize._inject_new_class(module)
    for name in module.parametrizations:  # type: ignore[union-attr]  # a ModuleDict
        parametrize._inject_property(module, name)


_KNOWN: set[type[nn.Module]] = set()
"""The classes of which this process has constructed one for that."""


def _made_known(kind: type[nn.Module], config: Any, made: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    """An instance of ``kind`` as pickle makes it, in a process that knows the class."""
    if kind not in _KNOWN:
        before = random.getstate(), np.random.get_state()
        # One that cannot be constructed so was made in another way, and its class is as unknown as it would be.
        with contextlib.suppress(Exception), torch.random.fork_rng(devices=[]), torch.device("meta"):
            kind(copy.deepcopy(config))
            _KNOWN.add(kind)
        random.setstate(before[0])
        np.random.set_state(before[1])
    return made(*args)
