"""What ``sw.plan`` is asked for, held against what it takes: a wrong type is one line, not a traceback."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from numbers import Integral, Real
from typing import Any

from shardwright.errors import ShardwrightError

__all__ = ["check_arguments", "check_words"]


def check_words(objective: str, transfers: str, recompute: str) -> None:
    """Refuse a word that the planner does not know."""
    if objective not in ("throughput", "latency", "memory"):
        raise ShardwrightError(f"objective {objective!r} is not known; the planner has: throughput, latency, memory")
    if transfers not in ("relayed", "staged", "direct"):
        raise ShardwrightError(f"transfers {transfers!r} is not known; the planner has: relayed, staged, direct")
    if recompute not in ("auto", "never", "always"):
        raise ShardwrightError(f"recompute {recompute!r} is not known; the planner has: auto, never, always")


def check_arguments(
    *,
    memory: Any,
    pins: Any,
    devices: Any,
    together: Any,
    stages_per_device: Any,
    time_limit_s: Any,
    replans: Any,
) -> None:
    """Refuse what is of the wrong type, or below what it may be."""
    _check_mapping("memory", memory, '{"cuda:0": "10GiB"}')
    _check_mapping("pins", pins, '{"head": "cuda:1"}')
    if devices is not None:
        _check_names("devices", devices, '["cuda:0", "cuda:1"]')
    if not isinstance(together, str):
        _check_names("together", together, '["encoder", ["embedding", "head"]]', groups=True)
    if stages_per_device is not None and not _is_whole(stages_per_device):
        raise ShardwrightError(f"stages_per_device is {stages_per_device!r}; give a whole number, or None")
    if not isinstance(time_limit_s, Real) or isinstance(time_limit_s, bool) or not float(time_limit_s) >= 0:
        raise ShardwrightError(f"time_limit_s is {time_limit_s!r}; give seconds, 0 or more")
    if not _is_whole(replans) or replans < 0:
        raise ShardwrightError(f"replans is {replans!r}; give a whole number, 0 or more")


def _is_whole(number: Any) -> bool:
    return isinstance(number, Integral) and not isinstance(number, bool)


def _check_mapping(name: str, given: Any, example: str) -> None:
    if given is not None and not (isinstance(given, Mapping) and all(isinstance(key, str) for key in given)):
        raise ShardwrightError(f"{name} is {given!r}; give a mapping, such as {name}={example}")


def _check_names(name: str, given: Any, example: str, *, groups: bool = False) -> None:
    """Refuse what is no row of names, or, if ``groups``, of rows of names; one name alone would be letters."""
    kinds = (str, Iterable) if groups else str
    # What can be gone through only once is left to the planner.
    unlike = isinstance(given, str) or not isinstance(given, Iterable)
    if unlike or (isinstance(given, (list, tuple, set)) and not all(isinstance(one, kinds) for one in given)):
        raise ShardwrightError(f"{name} is {given!r}; give names, such as {name}={example}")
