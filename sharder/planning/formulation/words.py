"""Parts of a planning problem in words, for certificates and errors."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from shardwright.profiler.formats.given_devices import AMPLE_BYTES
from shardwright.sharder.planning.problem import Block, Problem

__all__ = [
    "count_of",
    "links_in_words",
    "mib_of",
    "name_of",
    "size_of",
    "together_in_words",
    "units_in_words",
    "used_of",
]

MOST_NAMED = 3
"""Of more units than these the first two are named, and the others counted."""


def name_of(block: Block) -> str:
    """A block in words: its first unit, how many nodes stay with it, and why if modules are called again."""
    first = block.units[0] if block.units else block.nodes[0]
    others = len(block.nodes) - 1
    if not others:
        return first
    return f"{first} and {others} node{'s that stay' if others > 1 else ' that stays'} with it{_why_of(block)}"


def _why_of(block: Block) -> str:
    """Why nodes of a block stay together, as far as that is told by the block itself."""
    again = next((unit for unit, calls in Counter(block.units).items() if calls > 1), None)
    return f" (all calls of {again} share a device)" if again else ""


def size_of(count: int) -> str:
    """Bytes in words; a cap of which nothing is said is none."""
    if count >= AMPLE_BYTES:
        return "no cap"
    unit, name = next(((u, n) for u, n in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")) if count >= u), (1, "B"))
    return f"{count / unit:.4g} {name}"


def used_of(used: int, cap: int) -> str:
    """Bytes of a cap in words."""
    return f"{size_of(used)}{', ' if cap >= AMPLE_BYTES else ' of '}{size_of(cap)}"


def count_of(number: int, noun: str) -> str:
    """``1 micro-batch``, ``2 micro-batches``."""
    return f"{number} {noun}{'es' * (number != 1)}"


def together_in_words(block: Block) -> str:
    """A block as what needs: ``a needs``; ``a and b, which have to share a device, need``.

    Several units of a block are what ``colocate`` or ``--together`` names, what shares a parameter, and what lies
    between.
    """
    units = [*dict.fromkeys(block.units)]
    if len(units) < 2:
        return f"{name_of(block)} needs"
    return f"{units_in_words(units)}, which have to share a device{_why_of(block)}, need"


def mib_of(size: int) -> int:
    """Bytes in whole MiB, rounded up, as ``--memory`` takes them."""
    return -(-size // 2**20)


def lack_of(size: int) -> str:
    """Bytes that are missing, in words: in whole MiB, as caps are given, from one on."""
    return f"{mib_of(size)} MiB" if size >= 2**20 else size_of(size)


def units_in_words(units: Sequence[str]) -> str:
    """``a``, ``a and b``, ``a, b and 5 more units``."""
    if len(units) > MOST_NAMED:
        return f"{units[0]}, {units[1]} and {len(units) - 2} more units"
    return " and ".join([*([", ".join(units[:-1])] if len(units) > 1 else []), units[-1]])


def links_in_words(problem: Problem) -> str:
    """The links that nothing may be sent over."""
    return ", ".join(f"{source} -> {target}" for source, target in problem.unusable)
