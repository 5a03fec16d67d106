"""What marks a placed model: hooks and forwards of one class, by which whoever wants the model itself can tell."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from shardwright.errors import ShardwrightError

__all__ = ["FORWARDS", "PlacementHook", "placement_hooks", "refuse_placed"]

FORWARDS = "_placement_forwards"
"""Attribute of a module: a dictionary of what placing has put in the place of its forward, by number.

Another tool may wrap that forward; here it is still found.
"""


class PlacementHook:
    """A hook that placing a model has added, or what it has put in the place of a module's forward."""


def placement_hooks(model: nn.Module) -> Iterator[tuple[nn.Module, dict[int, Any], int]]:
    """Every such hook in ``model``: its module, the dictionary that holds it, and its key there."""
    for module in model.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks, vars(module).get(FORWARDS, {})):
            for key, hook in list(hooks.items()):
                if isinstance(hook, PlacementHook):
                    yield module, hooks, key


def refuse_placed(model: nn.Module, whole: str) -> None:
    """Refuse a placed model where what moves its tensors would become part of the ``whole``: a profile, a pipeline.

    Raises:
        ShardwrightError: it is placed.
    """
    if any(True for _ in placement_hooks(model)):
        raise ShardwrightError(
            f"the model is placed, and what moves its tensors would become part of the {whole}: "
            "shardwright.unplace(model) first"
        )
