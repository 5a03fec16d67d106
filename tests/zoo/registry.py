"""The models by name, and how a maker enters its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

Make = Callable[[], tuple[nn.Module, tuple[Any, ...], dict[str, Any]]]


@dataclass(frozen=True)
class Entry:
    """One architecture; ``make`` returns the model and the positional and keyword arguments of one forward."""

    name: str
    make: Make
    library: str
    trains: bool = True
    slow: bool = False
    """Whether a relative that is quicker stands for it, unless one asks for the slow tests."""


ZOO: dict[str, Entry] = {}


def entry(library: str, *, trains: bool = True, slow: bool = False) -> Callable[[Make], Make]:
    """Register a maker under its function's name."""

    def register(make: Make) -> Make:
        name = make.__name__
        if name in ZOO:
            raise ValueError(f"two entries are named {name}")
        ZOO[name] = Entry(name, make, library, trains, slow)
        return make

    return register
