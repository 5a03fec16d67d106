"""Costs that are each of one number of micro-batches, together as one profile of them all."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

from shardwright.errors import ShardwrightError
from shardwright.profiler.profile import Node, Profile, Tensor

__all__ = ["profile_of_counts"]

_OF_NODES = (
    *("output_bytes", "saved_bytes", "forward_peak_bytes", "backward_peak_bytes"),
    *("input_gradient_bytes", "deferred_bytes"),
)
_OF_TENSORS = ("bytes", "held_bytes")
"""What a node and a tensor have by number of micro-batches; all else is the same at each of them."""

Part = TypeVar("Part", Node, Tensor)


def profile_of_counts(profiles: Sequence[Profile]) -> Profile:
    """One profile of the times and bytes in ``profiles``, which have no model, at all of their micro-batches.

    Raises:
        ShardwrightError: one is of a model, two are of the same number of micro-batches, or two differ in what does not
            depend on it; what, where, and both values are named.
    """
    first, *others = profiles
    at: dict[int, Profile] = {}
    for one in profiles:
        if one.of_model:
            raise ShardwrightError(
                f"{one.model} was profiled, and several profiles are put together of costs only: profile it with "
                "--microbatches and all numbers; what was measured is not measured again"
            )
        for count in one.microbatches:
            if count in at:
                raise ShardwrightError(f"two of the costs are of {count} micro-batches; give one of each number")
            at[count] = one
    facts = dict(_facts(first))
    for other in others:
        for (what, one), two in zip(facts.items(), dict(_facts(other)).values(), strict=False):
            if one != two:
                raise ShardwrightError(
                    f"{what}: {_told(one)} at {first.microbatches[0]} micro-batches and {_told(two)} at "
                    f"{other.microbatches[0]}; only times and bytes of a micro-batch may differ"
                )
    return first.model_copy(
        update={
            "microbatches": tuple(sorted(at)),
            # As many samples as all of these divide.
            "batch": math.lcm(*(one.batch for one in profiles)),
            "nodes": tuple(_merged(nodes, _OF_NODES) for nodes in zip(*(p.nodes for p in profiles), strict=True)),
            "tensors": tuple(
                _merged(tensors, _OF_TENSORS) for tensors in zip(*(p.tensors for p in profiles), strict=True)
            ),
            "measurements": tuple(m for one in profiles for m in one.measurements),
            "misfits": tuple(m for one in profiles for m in one.misfits),
        }
    )


def _merged(parts: Sequence[Part], by_count: Sequence[str]) -> Part:
    """One part with what all have by number of micro-batches."""
    found = {name: {k: v for part in parts for k, v in getattr(part, name).items()} for name in by_count}
    return parts[0].model_copy(update=found)


def _facts(profile: Profile) -> Iterator[tuple[str, Any]]:
    """What does not change with the number of micro-batches, with its name; who is there comes before what they have.

    So of two profiles the first that differs has one name in both.
    """
    links = {f"link {link.source} -> {link.target}": link for link in profile.links}
    yield "train", profile.train
    yield "devices", tuple(device.name for device in profile.devices)
    yield "units", tuple(node.name for node in profile.nodes)
    yield "tensors", tuple(tensor.name for tensor in profile.tensors)
    yield "links", tuple(links)
    for name, part, apart in (
        *((f"device {device.name}", device, ()) for device in profile.devices),
        *((name, link, ()) for name, link in links.items()),
        *((f"unit {node.name}", node, _OF_NODES) for node in profile.nodes),
        *((f"tensor {tensor.name}", tensor, _OF_TENSORS) for tensor in profile.tensors),
    ):
        for field in type(part).model_fields:
            if field not in apart:
                yield f"{name}: {field}", getattr(part, field)
    for field in ("colocate", "ties", "obstacles", "host_bytes", "disk_bytes_per_s", "variations"):
        yield field, getattr(profile, field)


def _told(value: Any) -> str:
    return (", ".join(map(str, value)) or "none") if isinstance(value, tuple) else str(value)
