"""shardwright: profile a PyTorch model on your devices, split it by proof instead of by guess, and run the split."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from shardwright.errors import ShardwrightError
    from shardwright.profiler.collect import profile
    from shardwright.profiler.formats.costs import Costs
    from shardwright.profiler.profile import Profile
    from shardwright.sharder.planning.plan import Plan
    from shardwright.sharder.planning.planner import plan
    from shardwright.sharder.runtime.place import place, unplace
    from shardwright.sharder.runtime.placing.weights import empty_weights
    from shardwright.sharder.runtime.record import Run
    from shardwright.sharder.runtime.run import run
    from shardwright.sharder.runtime.training import Pipe, pipeline
    from shardwright.sharder.runtime.verify import Check, verify

__version__ = "0.1.0"

__all__ = [
    "Check",
    "Costs",
    "Pipe",
    "Plan",
    "Profile",
    "Run",
    "ShardwrightError",
    "empty_weights",
    "pipeline",
    "place",
    "plan",
    "profile",
    "run",
    "unplace",
    "verify",
]

# Resolved on first use, so that planning from a file does not pay for importing torch.
_HOMES = {
    "Check": "sharder.runtime.verify",
    "Costs": "profiler.formats.costs",
    "Pipe": "sharder.runtime.training",
    "Plan": "sharder.planning.plan",
    "Profile": "profiler.profile",
    "Run": "sharder.runtime.record",
    "ShardwrightError": "errors",
    "empty_weights": "sharder.runtime.placing.weights",
    "pipeline": "sharder.runtime.training",
    "place": "sharder.runtime.place",
    "plan": "sharder.planning.planner",
    "profile": "profiler.collect",
    "run": "sharder.runtime.run",
    "unplace": "sharder.runtime.place",
    "verify": "sharder.runtime.verify",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'shardwright' has no attribute {name!r}")
    value = getattr(import_module(f"shardwright.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
