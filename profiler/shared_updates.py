"""Updates of parameters that several nodes use: timed with each of these nodes, done once on each device.

A module that is called twelve times is twelve nodes on one device, each of which was timed with the update of its
parameters: only the first one's counts. The update of what a node shares with a node of another module before it is no
work of its own either, but of the copy that there is if the two are on different devices.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

__all__ = ["Shared", "Updates", "once_each", "shared_of"]

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


def shared_of(
    ties: Iterable[tuple[str, Sequence[str], int]], nodes: Iterable[str], holders: Mapping[str, str]
) -> list[Shared]:
    """The parameters of ``ties``: name, users, bytes of gradients.

    Args:
        nodes: in the order of the forward.
        holders: parameter -> its node, if that was timed with the update, since no unit holds it; it goes with the
            first user.
    """
    position = {name: number for number, name in enumerate(nodes)}
    return [
        Shared([*([holders[name]] if name in holders else []), *sorted(users, key=position.__getitem__)], size)
        for name, users, size in ties
    ]


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
    calls: dict[str, list[str]] = {}
    for node in update_s:
        calls.setdefault(unit_of.get(node, node), []).append(node)
    again: set[str] = set()
    for nodes in calls.values():
        bare = [node for node in nodes if not gradient_bytes.get(node)]
        again.update(bare if len(bare) < len(nodes) else bare[1:])
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
        updated = [(user, part) for user, part in zip(each.users, parts, strict=True) if any(part.values())]
        copies.append(updated[-1][1] if updated else {})
        for user, part in updated:
            if user != each.users[0]:
                for device, seconds in part.items():
                    own[user][device] = max(0.0, own[user][device] - seconds)
        if updated and updated[0][0] != each.users[0]:  # glue, say: the update is where the bytes are counted
            first = own.setdefault(each.users[0], {})
            for device, seconds in updated[0][1].items():
                first[device] = first.get(device, 0.0) + seconds
    return Updates(own, copies)
