"""Values that somebody gave, checked: each error says where the value stands, what it is and what is expected."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping, Sequence
from numbers import Real
from typing import Any

from shardwright.errors import ShardwrightError

__all__ = ["rate", "refuse_misspelt", "seconds", "share", "texts", "whole"]


def refuse_misspelt(where: str, data: Mapping[str, Any], known: Sequence[str], *, strict: bool = False) -> None:
    """Refuse an attribute that reads like one of ours; unless ``strict``, others such as labels and colours stay."""
    for name in data:
        near = [] if name in known else difflib.get_close_matches(str(name), known, n=1, cutoff=0.8)
        ours = str(name).endswith(("_s", "_bytes")) or strict
        if name not in known and (near or ours):
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"
            raise ShardwrightError(f"{where} has {name}, which costs do not have; {hint}")


def texts(key: str, value: Any) -> Iterable[str]:
    """Several texts: graph attribute ``key``."""
    if isinstance(value, str) or not isinstance(value, Iterable):
        raise ShardwrightError(f"graph attribute {key} is {value!r}; give a sequence of texts")
    return map(str, value)


def _number(where: str, value: Any, what: str) -> float:
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value) or value < 0:
        raise ShardwrightError(f"{where} is {value!r}; give {what}")
    return float(value)


def seconds(where: str, value: Any) -> float:
    """A time."""
    return _number(where, value, "a finite number of seconds, 0 or more")


def share(where: str, value: Any) -> float:
    """A part of something."""
    return _number(where, value, "a part, such as 0.05 for 5%")


def rate(where: str, value: Any) -> float:
    """A number above 0."""
    what = "a finite number above 0"
    if not (number := _number(where, value, what)):
        raise ShardwrightError(f"{where} is {value!r}; give {what}")
    return number


def whole(where: str, value: Any) -> int:
    """A whole number, written as an integer or as 8e10."""
    what = "a whole number, 0 or more"
    if _number(where, value, what) % 1:
        raise ShardwrightError(f"{where} is {value!r}; give {what}")
    return int(value)
