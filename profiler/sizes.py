"""Sizes as a person writes them."""

from __future__ import annotations

from shardwright.errors import ShardwrightError

__all__ = ["parse_bytes"]

_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
_UNITS |= {"k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40, "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}


def parse_bytes(text: str | int) -> int:
    """``"10GiB"``, ``"500 MB"`` or a plain number of bytes as an integer.

    Raises:
        ShardwrightError: the text is not a positive size.
    """
    compact = str(text).lower().replace(" ", "")
    digits = compact.rstrip("abcdefghijklmnopqrstuvwxyz")
    try:
        number = int(digits) if digits.isdecimal() else float(digits)
        exact = number * _UNITS[unit := compact[len(digits) :]]
        size = int(exact) if unit or exact == int(exact) else 0  # 1.5 was meant in some unit
    except (KeyError, ValueError, OverflowError):
        size = 0
    if size <= 0:
        raise ShardwrightError(f"{text!r} is not a size in bytes; write for example 10GiB, 800MiB or 2000000")
    return size
