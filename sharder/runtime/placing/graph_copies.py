"""Copies of placed graph modules (``fx.GraphModule``): they keep what placing added, as those of other modules do.

``GraphModule.__deepcopy__`` builds the copy from its graph, so that a forward and hooks of the instance are lost, and
calls what is in ``_deepcopy_hooks`` with the copy. A pickle is built from the graph too and calls nothing: it would be
a model whose weights are apart and do not meet.
"""

from __future__ import annotations

import copy
import weakref
from typing import Any, NoReturn, SupportsIndex

from torch import fx, nn

from shardwright.errors import ShardwrightError
from shardwright.profiler.recording.placed import FORWARDS, PlacementHook, placement_hooks

__all__ = ["forget_copies", "keep_in_copies"]

_HOOKS = ("_forward_pre_hooks", "_forward_hooks")
_FLAGS = ("_forward_pre_hooks_with_kwargs", "_forward_hooks_with_kwargs", "_forward_hooks_always_called")


class _Placement:
    """Among the ``_deepcopy_hooks`` of ``module``: gives a copy of it what placing has added by then."""

    def __init__(self, module: fx.GraphModule) -> None:
        self._module: weakref.ref[fx.GraphModule] = weakref.ref(module)
        self._added: dict[str, dict[Any, Any]] = {}
        """Of a copy that is being made: what belongs to it."""

    def __deepcopy__(self, memo: dict[int, Any]) -> _Placement:
        """That of the copy of the module, with the copies of what is added to this one."""
        module = self._module()
        assert module is not None  # it is being copied
        twin = _Placement(memo[id(module)])
        memo[id(self)] = twin
        twin._added = copy.deepcopy(_added(module), memo)
        return twin

    def __reduce_ex__(self, _protocol: SupportsIndex) -> NoReturn:
        raise ShardwrightError(
            "a placed fx.GraphModule cannot be pickled: a pickle keeps its graph only, not what moves its tensors: "
            "save its state_dict(), or shardwright.unplace(model) first and place what is loaded"
        )

    def __call__(self, made: fx.GraphModule) -> None:
        """Called with each copy, when all of it is there."""
        for twin in made._deepcopy_hooks:
            if isinstance(twin, _Placement):
                twin._put(made)

    def _put(self, module: fx.GraphModule) -> None:
        for name, entries in self._added.items():
            vars(module).setdefault(name, {}).update(entries)
        marks = vars(module).get(FORWARDS)
        if marks:
            vars(module)["forward"] = next(reversed(marks.values()))
        self._added = {}


def _added(module: fx.GraphModule) -> dict[str, dict[Any, Any]]:
    """What placing added to the module itself: by attribute, what it holds there."""
    found: dict[str, dict[Any, Any]] = {
        name: {key: hook for key, hook in vars(module).get(name, {}).items() if isinstance(hook, PlacementHook)}
        for name in (*_HOOKS, FORWARDS)
    }
    keys = {key for name in _HOOKS for key in found[name]}
    found |= {name: {key: True for key in vars(module)[name] if key in keys} for name in _FLAGS}
    return {name: entries for name, entries in found.items() if entries}


def keep_in_copies(model: nn.Module) -> None:
    """Have deep copies of ``model``, which is placed, be placed too where parts of it are graph modules."""
    for module in {id(module): module for module, _, _ in placement_hooks(model)}.values():
        if isinstance(module, fx.GraphModule):
            module._deepcopy_hooks.append(_Placement(module))


def forget_copies(model: nn.Module) -> None:
    """Undo :func:`keep_in_copies`."""
    for module in model.modules():
        if isinstance(module, fx.GraphModule):
            module._deepcopy_hooks[:] = [hook for hook in module._deepcopy_hooks if not isinstance(hook, _Placement)]
