"""Devices that count the same, and orders of them that are worth trying."""

from __future__ import annotations

import math

from shardwright.sharder.planning.problem import Problem

__all__ = ["alike_devices", "as_roomy_devices", "orders_to_try"]


def as_roomy_devices(problem: Problem) -> list[list[int]]:
    """Devices in classes that hold the same: same cap, optimizer and pins; where some ways are unusable, alike."""
    if problem.unusable or any(math.isinf(latency_s) for ways in problem.ways for latency_s, _ in ways):
        return alike_devices(problem)
    classes: dict[tuple[object, ...], list[int]] = {}
    for device, cap in enumerate(problem.caps):
        rate = problem.fetching.rates[device] if problem.fetching else None
        same = cap, rate, problem.updates_together[device : device + 1], *(b.allowed[device] for b in problem.blocks)
        classes.setdefault(same, []).append(device)
    return list(classes.values())


def alike_devices(problem: Problem) -> list[list[int]]:
    """Devices in classes that cannot be told apart: same times, parts of backwards, cap, optimizer, pins and links.

    Of devices with the same links to all others the slowest is the same too, so ties cost them the same.
    """

    times = (b.forward_s + b.backward_s + b.update_s + (b.recompute_s or b.forward_s) for b in problem.blocks)
    own = [*zip(*times, strict=True)]
    parts = [*zip(*(b.parts_s for b in problem.blocks if b.parts_s), strict=True)]
    copies = [*zip(*(tie.update_s for tie in problem.ties if tie.update_s), strict=True)]
    count = len(problem.devices)
    rates = problem.fetching.rates if problem.fetching else ()
    pins = [*zip(*(block.allowed for block in problem.blocks), strict=True)]

    def alike(a: int, b: int) -> bool:
        return (
            problem.caps[a] == problem.caps[b]
            and rates[a : a + 1] == rates[b : b + 1]
            and problem.updates_together[a : a + 1] == problem.updates_together[b : b + 1]
            and problem.links[a][b] == problem.links[b][a]
            and all(
                problem.links[a][o] == problem.links[b][o] and problem.links[o][a] == problem.links[o][b]
                for o in range(count)
                if o not in (a, b)
            )
            and pins[a] == pins[b]
            and (problem.transfers != "staged" or problem.ways[a] == problem.ways[b])
            and all(own[a + i * count] == own[b + i * count] for i in range(4))
            and parts[a : a + 1] == parts[b : b + 1]
            and copies[a : a + 1] == copies[b : b + 1]
        )

    classes: list[list[int]] = []
    for device in range(count):
        class_ = next((class_ for class_ in classes if alike(class_[0], device)), None)
        if class_ is None:
            classes.append([device])
        else:
            class_.append(device)
    return classes


def orders_to_try(problem: Problem) -> list[list[int]]:
    """Orders of the devices worth trying by themselves: as given, fastest first, roomiest first."""
    devices = range(len(problem.devices))
    orders = [
        list(devices),
        sorted(devices, key=problem.total_s.__getitem__),
        sorted(devices, key=problem.caps.__getitem__, reverse=True),
    ]
    return [order for i, order in enumerate(orders) if order not in orders[:i]]
