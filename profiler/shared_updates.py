"""Updates of parameters that several nodes use: timed with each of these nodes, done once on each device.

A module that is called twelve times is twelve nodes on one device, each of which was timed with the update of its
parameters: only the first one's counts. The update of what a node shares with a node of another module before it is no
work of its own either, but of the copy that there is if the two are on different devices.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

__all__ = ["Shared", "Updates", "once_each"]

ByDevice = Mapping[str, float]


class Shared(NamedTuple):
    """A parameter with several users."""

    users: Sequence[str]
    """Nodes, in the order of the forward; the bytes of the parameter are the first one's."""
    gradient_bytes: int


class Updates(NamedTuple):
    """Seconds of a step's updates, by device."""

    own: dict[str, dict[str, float]]
    """Of each node, wherever the others are."""
    copies: list[dict[str, float]]
    """Of each shared parameter, of a copy on a device that has not its first user."""


def once_each(
    update_s: Mapping[str, ByDevice],
    gradient_bytes: Mapping[str, int],
    shared: Sequence[Shared],
    unit_of: Mapping[str, str],
) -> Updates:
    """Take apart what each node's update takes; of a parameter as much as of its gradients' bytes.

    Args:
        update_s: by node, in the order of the forward, and device.
        gradient_bytes: by node, of the parameters that no node before it has.
        shared: parameters of several nodes.
        unit_of: the module that a node calls; a later call of it, that has no bytes, updates nothing.
    """
    first: dict[str, str] = {}
    later = {node for node in update_s if node in unit_of and first.setdefault(unit_of[node], node) != node}
    again = {node for node in later if not gradient_bytes.get(node)}
    shared = [each._replace(users=[user for user in each.users if user not in again]) for each in shared]
    borrowed: dict[str, int] = {}
    for each in shared:
        for user in each.users[1:]:
            borrowed[user] = borrowed.get(user, 0) + each.gradient_bytes

    def part_s(user: str, size: int) -> dict[str, float]:
        whole = max(gradient_bytes.get(user, 0) + borrowed.get(user, 0), size)
        return {device: seconds * size / whole for device, seconds in update_s.get(user, {}).items() if whole}

    own = {node: {d: 0.0 if node in again else s for d, s in seconds.items()} for node, seconds in update_s.items()}
    copies: list[dict[str, float]] = []
    for each in shared:
        parts = [part_s(user, each.gradient_bytes) for user in each.users]
        updated = [part for part in parts if any(part.values())]
        if not updated or updated[0] is not parts[0]:  # it is not known with the node that counts its bytes
            copies.append({})
            continue
        copies.append(updated[-1])
        for user, part in zip(each.users[1:], parts[1:], strict=True):
            for device, seconds in part.items():
                own[user][device] = max(0.0, own[user][device] - seconds)
    return Updates(own, copies)
