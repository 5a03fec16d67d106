"""The whole of a placed model: its inputs, its outputs, and the glue between its units while its forward runs."""

from __future__ import annotations

import sys
import threading
from typing import Any

import torch
from torch import Tensor, nn

from shardwright.profiler.recording.placed import PlacementHook
from shardwright.profiler.recording.structure import tensors_of
from shardwright.sharder.runtime.placing.align import AlignGlue
from shardwright.sharder.runtime.placing.calls import OPEN, Begun, begin, finish, open_calls, settle
from shardwright.sharder.runtime.placing.forwards import InstanceForward, left_to_python
from shardwright.sharder.runtime.placing.hooks import UnitForward, has_hooks, is_one_tensor
from shardwright.sharder.runtime.placing.moving import Mover, may_hold, moved

__all__ = ["Layout", "WholeForward", "Window"]

NO_TASK = -1
"""What PyTorch numbers the backward pass with where none runs."""


class Layout:
    """Where the parts of a placed model are, and what glue between them needs aligning.

    Args:
        homes: plan device -> torch device, in the order of the stages.
        glue: see :class:`~shardwright.sharder.runtime.placing.align.AlignGlue`.
        open_first: whether glue before the first unit needs aligning.
    """

    def __init__(
        self, homes: dict[str, torch.device], glue: frozenset[tuple[str, str]] | None, *, open_first: bool
    ) -> None:
        self.move_to(homes)
        self.glue = glue
        self.open_first = open_first
        self.aligns = glue is None or bool(glue)
        """Whether there is glue to align."""

    def move_to(self, homes: dict[str, torch.device]) -> None:
        """Take these devices for those of the plan."""
        self.homes = homes
        self.first = next(iter(homes.values()))
        """The device of the first stage, to which inputs come."""

    def aligner(self, task: int | None = None) -> AlignGlue:
        """What aligns the glue of this placement; ``task``: see there."""
        return AlignGlue(self.glue, list(self.homes.values()), task)


class _Call(Begun):
    """A running forward of a placed model: where its inputs came from, and its aligner while it is on."""

    hook: Layout
    came_from: torch.device | None = None
    mover: Mover | None = None
    mode: AlignGlue | None = None

    def brought(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        """The inputs on the first device."""
        home = self.hook.first
        if not kwargs and is_one_tensor(args):
            self.came_from = args[0].device
            return (args[0].to(home),), kwargs
        self.came_from = _device_of_inputs(args, kwargs)
        accelerated = self.came_from is not None and self.came_from.type != "cpu"
        mover = self.mover = Mover(home, lengths_stay=accelerated)
        return tuple([mover(arg) for arg in args]), {key: mover(arg) for key, arg in kwargs.items()}

    def returned(self, output: Any) -> Any:
        """The output, and what was written into the caller's containers, on the inputs' device."""
        if self.came_from is None:
            return output
        if self.mover is None:
            return moved(output, self.came_from)
        written = self.mover.written
        back = Mover(self.came_from, writes=written)
        back.leave(self.mover.held)  # what the caller had put there
        for container in list(written.values()):
            back(container)
        return back(output)

    def align(self, *, opens: bool) -> None:
        """Begin to align glue, or stop."""
        if opens and self.mode is None:
            self.mode = self.hook.aligner()
            self.mode.begin()
        elif not opens and self.mode is not None:
            self.mode.end()
            self.mode = None

    def undo(self) -> None:
        """Stop to align, and give the caller's containers their tensors back."""
        if self.mode is not None:
            self.align(opens=False)
        if self.mover is not None:
            self.mover.put_back()


def _device_of_inputs(args: Any, kwargs: Any) -> torch.device | None:
    """That of the first tensor among the inputs which is not on the CPU; else the CPU, if there is any tensor."""
    values = (*args, *kwargs.values())
    tensors = tensors_of(values) if any(map(may_hold, values)) else [t for t in values if isinstance(t, Tensor)]
    found = [tensor.device for tensor in tensors]
    return next((device for device in found if device.type != "cpu"), found[0] if found else None)


class WholeForward(InstanceForward):
    """In the place of a placed model's forward: inputs come to the first device, outputs return to the inputs' device.

    So does what the forward wrote into the lists and dictionaries of its caller; and glue can be aligned until the
    forward ends. Hooks of the user's on the model see what the caller gave, and what it gets.

    Args:
        origins: where each parameter and buffer was before, by name.
        standing: units that have a :class:`~shardwright.sharder.runtime.placing.hooks.UnitForward`; see there.

    Nothing is noted of a call with one tensor that is on the first device already, where no glue is ever aligned: there
    is nothing to end after it.
    """

    def __init__(
        self,
        model: nn.Module,
        layout: Layout,
        origins: dict[str, torch.device],
        standing: list[tuple[nn.Module, UnitForward]],
    ) -> None:
        super().__init__(model)
        self.layout = layout
        self.origins = origins
        self.standing = standing

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model's own forward between the moves."""
        if not self.passes:  # else the hooks may be a recorder's
            for unit, _ in self.standing:  # a few
                if has_hooks(unit):
                    self._give_way()
                    break
        layout = self.layout
        first = layout.first
        if layout.aligns or self.passes or kwargs or OPEN or not is_one_tensor(args) or args[0].device != first:
            return self._noted(args, kwargs)
        output = self.plain(*args)
        if isinstance(output, Tensor):  # nearly always
            return output if output.device == first else output.to(first)
        return moved(output, first)

    @left_to_python
    def _give_way(self) -> None:
        """Have units move their inputs by hooks where the user has added hooks, which are to see what was moved."""
        for unit, forward in self.standing:
            if has_hooks(unit):
                forward.become_hook()
        self.standing = [(unit, forward) for unit, forward in self.standing if not forward.passes]

    @left_to_python
    def _noted(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.passes:
            return self.plain(*args, **kwargs)
        if open_calls():
            settle()
        call = _Call(self.layout, sys._getframe())
        output = None
        try:
            begin(call)
            args, kwargs = call.brought(args, kwargs)
            if self.layout.open_first:
                call.align(opens=True)
            output = self.plain(*args, **kwargs)
        finally:
            finish(call)
            output = call.returned(output)  # after an error too: the caller may look into its containers
        return output


class _Recomputed(threading.local):
    """What aligns glue in this thread's backward pass."""

    def __init__(self) -> None:
        self.aligner: AlignGlue | None = None


_recomputed = _Recomputed()


def _end_recomputed() -> None:
    """End what aligns in a backward pass of this thread."""
    if _recomputed.aligner is not None:
        _recomputed.aligner.end()
        _recomputed.aligner = None


class Window(PlacementHook):
    """Hook before or after a unit: glue that needs aligning comes only between certain units.

    A unit that is called in a backward pass is one that activation checkpointing computes anew, and so is the glue
    behind it.
    """

    def __init__(self, layout: Layout, *, opens: bool) -> None:
        self.layout = layout
        self.opens = opens

    @left_to_python
    def __call__(self, *_: Any) -> None:
        """Begin to align, or stop."""
        for call in reversed(open_calls()):
            if isinstance(call, _Call):
                call.align(opens=self.opens)
                return
        _end_recomputed()
        task = torch._C._current_graph_task_id()
        if self.opens and task != NO_TASK:
            _recomputed.aligner = self.layout.aligner(task)
            _recomputed.aligner.begin()
            # The backward pass may end in another thread than this; then the aligner stays, without effect, until the
            # next unit is computed anew here.
            torch.autograd.Variable._execution_engine.queue_callback(_end_recomputed)
