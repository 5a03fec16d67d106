"""The one exception that users see."""

from __future__ import annotations

__all__ = ["ShardwrightError"]


class ShardwrightError(Exception):
    """A mistake or a limit that the user can act on; its text is one line that says what, where, and the remedy."""
