"""Parts of a planning problem in words, for certificates and errors."""

from __future__ import annotations

from shardwright.sharder.planning.problem import Block, Problem

__all__ = ["links_in_words", "name_of", "size_of"]


def name_of(block: Block) -> str:
    """A block in words: its first unit, and how many nodes stay with it."""
    first = block.units[0] if block.units else block.nodes[0]
    others = len(block.nodes) - 1
    return f"{first} and {others} node{'s that stay' if others > 1 else ' that stays'} with it" if others else first


def size_of(count: int) -> str:
    """Bytes in words."""
    unit, name = next(((u, n) for u, n in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")) if count >= u), (1, "B"))
    return f"{count / unit:.4g} {name}"


def links_in_words(problem: Problem) -> str:
    """The links that nothing may be sent over."""
    return ", ".join(f"{source} -> {target}" for source, target in problem.unusable)
