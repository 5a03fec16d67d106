"""How pins and groups name units."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from fnmatch import fnmatchcase

__all__ = ["Pinned", "matching"]

Pinned = Sequence[tuple[str, Collection[str]]]
"""Of each pin its device, and the units that it names."""


def matching(names: Collection[str], pattern: str) -> set[str]:
    """The units among ``names`` that a shell pattern is of; where there are none, those inside modules that it is of.

    A unit may be inside another, as a layer that a forward calls past the module around it. The path of that is its
    own alone.
    """
    return {n for n in names if fnmatchcase(n, pattern)} or {n for n in names if fnmatchcase(n, f"{pattern}.*")}
