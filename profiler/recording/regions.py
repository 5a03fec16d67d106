"""Regions of activation checkpointing (``torch.utils.checkpoint``), as a recorder sees them.

What a forward computes in such a region is computed anew in its backward, and keeps nothing meanwhile but what it was
given. A graph of units has no regions: while it is recorded they are computed as if they were none, and each unit that
is called in one is noted, to be computed anew by itself wherever the graph is replayed. Regions inside of units stay
what they are.

However a model has come by ``checkpoint``, PyTorch looks up what begins a region when it is called. For the reentrant
kind that is a custom autograd function, for the other a generator in its module, which is not public.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.utils.checkpoint as checkpointing
from torch import Tensor, nn

__all__ = ["Region", "module_of", "not_reentrant", "reentrant_modes", "regions_told"]

_GENERATOR = "_checkpoint_without_reentrant_generator"


class Region(NamedTuple):
    """What becomes of a region that begins."""

    dissolves: bool
    """It is computed as if it was none."""
    around: AbstractContextManager[None] = nullcontext()
    """Entered for as long as it goes on."""


Listener = Callable[[Any, tuple[Any, ...]], Region]
"""Asked where a region begins, with the function that it calls and what this is handed."""


class _Listeners(threading.local):
    """Who is told of the regions of this thread, innermost last."""

    def __init__(self) -> None:
        self.stack: list[Listener] = []


_listeners = _Listeners()
_patching = threading.Lock()
_patched: list[Any] = []
"""PyTorch's own generator, once for each block of any thread that is open."""


@contextmanager
def regions_told(listener: Listener) -> Iterator[None]:
    """Inside, ``listener`` is asked about each region of the kind that is not reentrant."""
    if not hasattr(checkpointing, _GENERATOR):  # a version of PyTorch whose regions stay what they are
        yield
        return
    with _patching:
        _patched.append(_patched[0] if _patched else getattr(checkpointing, _GENERATOR))
        setattr(checkpointing, _GENERATOR, _generator)
    _listeners.stack.append(listener)
    try:
        yield
    finally:
        _listeners.stack.pop()
        with _patching:
            original = _patched.pop()
            if not _patched:
                setattr(checkpointing, _GENERATOR, original)


def _generator(function: Any, *rest: Any, **kwargs: Any) -> Iterator[None]:
    """In the place of PyTorch's: what is before ``yield`` comes before the call of ``function``, the rest after it."""
    original = _patched[0] if _patched else getattr(checkpointing, _GENERATOR)
    region = Region(dissolves=False)
    if _listeners.stack:
        of_partial = (function.args, function.keywords) if isinstance(function, partial) else ()
        region = _listeners.stack[-1](function, (rest, kwargs, of_partial))
    with region.around:
        if region.dissolves:
            yield
        else:
            yield from original(function, *rest, **kwargs)


def reentrant_modes(given: Any) -> AbstractContextManager[Any]:
    """The modes that a region of the reentrant kind computes in: none is trained if nothing given wants a gradient."""
    wanted = any(isinstance(each, Tensor) and each.requires_grad for each in given)
    return nullcontext() if wanted else torch.no_grad()


def not_reentrant(function: type[torch.autograd.Function], call: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """Apply a custom autograd function; a region of the reentrant kind as one of the other, which gives the same.

    PyTorch refuses ``torch.autograd.grad`` through the former. It is a handler for
    :func:`~shardwright.profiler.recording.callsites.functions_applied`.
    """
    if function is not checkpointing.CheckpointFunction:
        return call(*args, **kwargs)
    run, preserves, *given = args
    with reentrant_modes(given):
        return checkpointing.checkpoint(run, *given, use_reentrant=False, preserve_rng_state=preserves)


def module_of(function: Any) -> nn.Module | None:
    """The module that a region is a call of, if it is that of one module, or of one's forward."""
    first = None
    while isinstance(function, partial):
        first = function.args[0] if function.args else first
        function = function.func
    candidates = (function, getattr(function, "__self__", None), first)
    return next((found for found in candidates if isinstance(found, nn.Module)), None)
