"""How pins and groups name units."""

from __future__ import annotations

from fnmatch import fnmatchcase

__all__ = ["matches"]


def matches(unit: str, pattern: str) -> bool:
    """Whether the path of a unit is the shell pattern's, or is inside a module whose path is."""
    return fnmatchcase(unit, pattern) or fnmatchcase(unit, f"{pattern}.*")
