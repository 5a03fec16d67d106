"""What users see where something is wrong: the one exception, and what a thing is called in it."""

from __future__ import annotations

__all__ = ["ShardwrightError", "kind_of"]


class ShardwrightError(Exception):
    """A mistake or a limit that the user can act on; its text is one line that says what, where, and the remedy."""


def kind_of(value: object) -> str:
    """What ``value`` is, in words: ``None``, ``an int``, ``a list``."""
    name = type(value).__name__
    return "None" if value is None else f"{'an' if name[0] in 'aeiouAEIOU' else 'a'} {name}"
