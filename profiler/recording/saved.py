"""What autograd keeps of a forward: counted step by step, and what regions of checkpointing let go.

A unit that is called in a region (see :mod:`shardwright.profiler.recording.regions`) is noted, to be computed anew by
itself: it keeps what it is given. One that has a region inside keeps what it hands to that, beside the rest. A unit
whose arguments are changed in place, then or later, cannot be made anew: the region would have begun with what these
were made of. A recorder finds that out and has to record once more, with such steps left plain.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Container, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from shardwright.profiler.memory import storages_of
from shardwright.profiler.recording.inside import UnitWatcher
from shardwright.profiler.recording.regions import Region, module_of, regions_told
from shardwright.profiler.recording.structure import tensors_of
from shardwright.profiler.recording.unitgraph import Step

__all__ = ["SavedWatcher"]


class SavedWatcher(UnitWatcher):
    """A graph in the making that knows what autograd keeps."""

    def __init__(
        self, model: nn.Module, units: dict[str, nn.Module], *, train: bool, counts_saved: bool, plain: Container[str]
    ) -> None:
        super().__init__(model, units, train=train)
        self.counts_saved = counts_saved
        self.plain = plain
        self.depth = 0
        """Of calls inside a step; 0 is outside of all."""
        self.overwritten: set[str] = set()
        """Steps in regions whose arguments were changed in place."""
        self.region_modules: list[nn.Module | None] = []
        """That were called as regions outside of steps."""
        self.savers: dict[int, Step] = {}
        self._saved_storages: dict[int, torch.UntypedStorage] = {}
        self._regions = 0
        self._given: dict[int, list[str]] = {}
        """Storages of what steps in regions were given, by address, with the steps."""

    @contextmanager
    def watching_saved(self) -> Iterator[None]:
        """Around the forward."""
        # Autograd holds its hooks as long as what was saved, and the recorder holds tensors: a strong reference to the
        # recorder would close a ring through C++ that Python's collector cannot see.
        counting = weakref.WeakMethod(self._saved)

        def saved(tensor: Tensor) -> Tensor:
            count = counting()
            return _detached(tensor) if count is None else count(tensor)

        with ExitStack() as watching:
            if self.counts_saved:
                watching.enter_context(torch.autograd.graph.saved_tensors_hooks(saved, lambda kept: kept))
            watching.enter_context(regions_told(self._begins))
            yield

    def is_made_anew(self, name: str) -> bool:
        """Whether the step of that name, which begins now, is to be computed anew in its backward."""
        return self._regions > 0 and name not in self.plain

    def keep_given(self, step: Step, arguments: Iterable[Tensor]) -> None:
        """``step`` is computed anew, and keeps its ``arguments``."""
        step.checkpointed = True
        for tensor in arguments:
            self._count(tensor, step)
            for storage in storages_of(tensor):
                self._given.setdefault(storage._cdata, []).append(step.name)

    def note_overwritten(self, changed: Iterable[Tensor]) -> None:
        """These tensors were changed in place."""
        for storage in itertools.chain.from_iterable(map(storages_of, changed)):
            self.overwritten.update(self._given.get(storage._cdata, ()))

    @contextmanager
    def in_region(self, function: Any) -> Iterator[None]:
        """A region outside of steps goes on, a call of ``function``."""
        self.region_modules.append(module_of(function))
        self._regions += 1
        try:
            yield
        finally:
            self._regions -= 1

    def _begins(self, function: Any, handed: tuple[Any, ...]) -> Region:
        """Of the kind that is not reentrant: outside of steps it dissolves."""
        if not self.depth:
            return Region(dissolves=True, around=self.in_region(function))
        if self.counts_saved:
            for tensor in tensors_of(handed):
                self._saved(tensor)
        return Region(dissolves=False, around=self._inside())

    @contextmanager
    def _inside(self) -> Iterator[None]:
        """A region inside of a step goes on."""
        step = self.current
        begin = len(step.operations) if step is not None else 0
        yield
        if step is not None and torch.is_grad_enabled():
            step.checkpointed = True
            step.regions.append((begin, len(step.operations)))

    def _saved(self, tensor: Tensor) -> Tensor:
        """Count a tensor that autograd keeps, once by storage."""
        step = self.current
        context = step.call.context if step is not None and step.call is not None else None
        if step is not None and not (context is not None and context.checkpointed):
            self._count(tensor, step)
        return _detached(tensor)

    def _count(self, tensor: Tensor, step: Step) -> None:
        if size := self.storage_counted(tensor):
            step.saved_bytes += size
            self.savers[tensor.untyped_storage()._cdata] = step

    def storage_counted(self, tensor: Tensor) -> int:
        """The storage's bytes when first seen, else 0; it is kept, so that its address stays its own."""
        counted = 0
        for storage in storages_of(tensor):
            if storage._cdata not in self._saved_storages:
                self._saved_storages[storage._cdata] = storage
                counted += storage.nbytes()
        return counted


def _detached(tensor: Tensor) -> Tensor:
    """``tensor`` outside autograd; that is no operator of the model, and modes need not see it."""
    if type(tensor) in (Tensor, nn.Parameter):
        with torch._C._DisableTorchDispatch():
            return tensor.detach()
    return tensor.detach()
