"""Forwards of single modules: what stands in the place of one module's forward, not of its class's, and calls that.

A hook would be simpler, but any hook sends the call of its module down PyTorch's slower way: 25 us or more, once for a
model and once for each unit that has one. The compiler, copies and pickles respect a forward of the instance as they
do hooks.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable
from types import FunctionType, MethodType
from typing import Any, TypeVar, cast

import torch
from torch import nn

from shardwright.errors import ShardwrightError
from shardwright.profiler.recording.placed import FORWARDS, PlacementHook

__all__ = ["InstanceForward", "left_to_python"]

Function = TypeVar("Function", bound=Callable[..., Any])


def left_to_python(function: Function) -> Function:
    """Have compiled models call ``function`` as it is: what it changes for a while would be compiled in."""
    return cast(Function, torch.compiler.disable(function, recursive=False))


class InstanceForward(PlacementHook):
    """What is called in the place of the forward of ``module``, from :meth:`put` to :meth:`remove`.

    The module's own forward is what the instance has already, from another tool or another placement, else its class's.
    Whoever wraps this one later finds it without effect once it was removed. It does not keep the module alive, so that
    a model that is dropped is free at once. A shallow copy of the module, as ``copy.copy`` makes, calls the original's
    forward with the original's weights; ``copy.deepcopy`` makes a placed model of its own.
    """

    __name__ = "forward"

    def __init__(self, module: nn.Module) -> None:
        self._module: weakref.ref[nn.Module] = weakref.ref(module)
        self.had_own = "forward" in vars(module)
        self.own: Any = vars(module).get("forward")
        if self.own is None and not isinstance(inspect.getattr_static(type(module), "forward", None), FunctionType):
            self.own = module.forward  # found by other means than binding: a ScriptModule's, for example
        self.passes = False
        """Whether it does nothing but call the module's own forward."""

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_module": self._module()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._module = weakref.ref(state["_module"])

    @property
    def __signature__(self) -> inspect.Signature:
        """The module's own, by which trainers choose what they pass."""
        return inspect.signature(self.own or MethodType(type(self.module).forward, self.module))

    @property
    def module(self) -> nn.Module:
        """The module whose forward this is."""
        module = self._module()
        if module is None:
            raise ShardwrightError(
                "the placed model that this forward is of is gone; a shallow copy does not keep it: use copy.deepcopy"
            )
        return module

    def plain(self, *args: Any, **kwargs: Any) -> Any:
        """Call the module's own forward.

        There is no bound method of the class's on the way: where the compiler leaves its code to Python in between, it
        would take ``module.forward`` for it, which is this.
        """
        if self.own is not None:
            return self.own(*args, **kwargs)
        module = self.module
        return type(module).forward(module, *args, **kwargs)

    def put(self) -> None:
        """Take the place of the forward."""
        held = vars(self.module)  # a ScriptModule refuses to have attributes set
        held["forward"] = self
        marks = held.setdefault(FORWARDS, {})
        marks[max(marks, default=-1) + 1] = self

    def remove(self) -> None:
        """Give the module its own forward back, or to what has wrapped this one since."""
        self.passes = True
        held = vars(self.module)
        marks = {key: forward for key, forward in held.pop(FORWARDS, {}).items() if forward is not self}
        if marks:
            held[FORWARDS] = marks
        outer = held.get("forward")
        if outer is self:
            del held["forward"]
            if self.had_own:
                held["forward"] = self.own
        while isinstance(outer, InstanceForward):
            if outer.own is self:
                outer.own, outer.had_own = self.own, self.had_own
            outer = outer.own
