r"""Replicas: R equal pipelines of S devices each, of which every one takes M / R of a batch's M micro-batches.

Each of S joint devices stands for R real ones, its members, of which replica r has the r-th. So the problem of the mesh
is one of S devices and M / R micro-batches, which the planner knows how to solve, with

    time of a block         the slowest member's
    memory cap              the smallest, with the optimizer's workspace of the greediest; gradients that are summed
                            take COPIED bytes more, at most, which only small models notice
    link between two        the slowest of the R links between their members of one replica
    update of a block       + 2 (R - 1) / R * its gradient bytes / bandwidth of the slowest link between the members

the last being its part of a ring that sums the gradients over the members after the last backward (Patarasuk and Yuan,
"Bandwidth optimal all-reduce algorithms for clusters of workstations", JPDC 2009). Of the ring's 2 (R - 1) latencies
(all gradients of a device go at once), and of the copies of tied parameters, which are summed with their own members as
well, nothing is in a load, for they do not add up over blocks; they are in the step.

So a load is no less than that of any member, and more where one is slower at some blocks and another at others; the
step is that of the slowest replica, by the sums over its own devices.

With R = 1 that is a pipeline over all devices, with S = 1 data parallel. A certificate holds for its mesh: these joint
devices, and any split over them. Stages of unequal replication, which PipeDream plans (Narayanan et al., SOSP 2019),
are no mesh: the pipeline engine sends from one device to one other.

Members should be alike. Devices of a kind, within TOLERANCE, are taken together first, in two ways: far, so that
pipelines are among neighbours in the order of the devices, and near, so that sums are.
"""

from __future__ import annotations

import dataclasses
import math
import operator
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from shardwright.errors import ShardwrightError
from shardwright.profiler.profile import Profile
from shardwright.sharder.planning.plan import Objective
from shardwright.sharder.planning.problem import Block, Link, Problem, Replica, bits
from shardwright.sharder.planning.schedules.draws import drawn
from shardwright.sharder.planning.schedules.simulate import StageCost, steps_at
from shardwright.sharder.planning.schedules.stage_costs import Stages, shares_of

__all__ = [
    "ALONE",
    "COPIED",
    "Mesh",
    "Replicas",
    "expected_step_of_replicas_s",
    "joined",
    "meshes",
    "on_mesh_of",
    "on_meshes",
    "own_factors",
    "possible_replicas",
    "replicas_asked",
    "slowest_steps",
]

T = TypeVar("T")

Replicas = int | Literal["auto"]

Mesh = tuple[tuple[int, ...], ...]
"""By joint device: its members, in the order of the replicas."""

TOLERANCE = 0.1
"""Devices are of a kind if neither the model's time nor the memory differs by more."""
COPIED = 2**22
"""So many bytes of gradients are copied together at once, at most, to be summed."""
ALONE = 2**21
"""A gradient of so many bytes is not copied, but summed where it is."""


def possible_replicas(devices: int) -> list[int]:
    """Numbers of replicas of equally many devices, beside one."""
    return [count for count in range(2, devices + 1) if devices % count == 0]


def replicas_asked(asked: Replicas, objective: Objective, *, contiguous: bool) -> Replicas:
    """How many replicas are to be weighed: one, so many, or any number.

    Raises:
        ShardwrightError: it is no such number, or what else is asked for knows one only.
    """
    if asked != "auto" and (not isinstance(asked, int) or isinstance(asked, bool) or asked < 1):
        raise ShardwrightError(f"replicas {asked!r} is no number of pipelines; it is 1 or more, or auto")
    fits = objective == "throughput" and contiguous
    if not fits and asked not in (1, "auto"):
        what = f"the objective {objective}" if objective != "throughput" else "a free assignment"
        raise ShardwrightError(
            f"{asked} replicas are planned for the objective throughput, of a chain of stages, and not for {what}: "
            "leave them out"
        )
    return asked if fits else 1


def on_meshes(problems: Iterable[Problem], profile: Profile, replicas: int) -> list[Problem]:
    """The problems of ``replicas`` pipelines, at each number of micro-batches that they can share, on each mesh."""
    found: list[Problem] = []
    for problem in problems:
        if problem.microbatches % replicas or len(problem.devices) % replicas:
            continue
        sizes = _sizes(problem, profile)
        unlike: list[Problem] = []
        for mesh in meshes(problem, replicas):
            made = joined(problem, mesh, sizes)
            barred = any(sizes.gradients) and any(math.isinf(latency_s) for latency_s, _ in made.sums)
            if not barred and not any(_same(made, other) for other in unlike):
                unlike.append(made)
        found += unlike
    return found


def meshes(problem: Problem, replicas: int) -> list[Mesh]:
    """Ways to take all devices together by ``replicas``, which divides their number; see the head of this module."""
    far: list[tuple[int, ...]] = []
    near: list[tuple[int, ...]] = []
    left: list[int] = []
    for alike in _kinds(problem):
        count = len(alike) // replicas
        far += [tuple(alike[i : count * replicas : count]) for i in range(count)]
        near += [tuple(alike[i * replicas : (i + 1) * replicas]) for i in range(count)]
        left += alike[count * replicas :]
    rest = [tuple(left[i : i + replicas]) for i in range(0, len(left), replicas)]
    return [*dict.fromkeys(((*far, *rest), (*near, *rest)))]


def _kinds(problem: Problem) -> list[list[int]]:
    """The devices by kind, the fastest first."""
    kinds: list[list[int]] = []

    def alike(a: int, b: int) -> bool:
        pairs = [(problem.total_s[a], problem.total_s[b]), (problem.caps[a], problem.caps[b])]
        together = {problem.updates_together[d : d + 1] for d in (a, b)}
        return len(together) == 1 and all(math.isclose(*pair, rel_tol=TOLERANCE) for pair in pairs)

    for device in range(len(problem.devices)):
        kind = next((kind for kind in kinds if alike(kind[0], device)), None)
        if kind is None:
            kinds.append([device])
        else:
            kind.append(device)
    return sorted(kinds, key=lambda kind: problem.total_s[kind[0]])


class _Sizes(NamedTuple):
    """Bytes by block."""

    gradients: list[int]
    inputs: list[int]
    """Of the batch, which the replicas share."""


def _sizes(problem: Problem, profile: Profile) -> _Sizes:
    gradients = {node.name: node.grad_bytes for node in profile.nodes if profile.train}
    inputs = dict.fromkeys((node.name for node in profile.nodes if node.kind == "input"), 0)
    for tensor in profile.tensors:
        whole, part = tensor.bytes.get(1, 0), tensor.bytes.get(problem.microbatches, 0)
        if tensor.producer in inputs and part * problem.microbatches <= whole:  # else it goes to each micro-batch whole
            inputs[tensor.producer] += whole
    return _Sizes(*([sum(of.get(node, 0) for node in b.nodes) for b in problem.blocks] for of in (gradients, inputs)))


def joined(problem: Problem, mesh: Mesh, sizes: _Sizes) -> Problem:
    """The problem of the joint devices of ``mesh``; ``problem`` is of all devices and the whole batch."""
    replicas = len(mesh[0])
    sums = tuple(_sum_of(problem, members) for members in mesh)
    of_replica = [[members[r] for members in mesh] for r in range(replicas)]
    part = dataclasses.replace(problem, microbatches=problem.microbatches // replicas, recompute="never")
    together = problem.updates_together
    ways = [[problem.ways[d] for d in members] for members in mesh]
    return dataclasses.replace(
        problem,
        blocks=tuple(
            _block_of(b, of_replica, sums, gradient, inputs - inputs // replicas)
            for b, gradient, inputs in zip(problem.blocks, *sizes, strict=True)
        ),
        ties=tuple(
            dataclasses.replace(tie, update_s=tuple(max(tie.update_s[d] for d in members) for members in mesh))
            if tie.update_s
            else tie
            for tie in problem.ties
        ),
        devices=tuple(problem.devices[d] for d in of_replica[0]),
        caps=tuple(min(problem.caps[d] for d in members) for members in mesh),
        links=tuple(tuple(_matched(problem, a, b) for b in mesh) for a in mesh),
        microbatches=part.microbatches,
        updates_together=tuple(any(together[d] for d in members) for members in mesh) if together else (),
        hosts=tuple((_slowest([out for out, _ in each]), _slowest([in_ for _, in_ in each])) for each in ways)
        if problem.transfers == "staged"
        else (),
        engine_s=tuple(max(problem.engine_s[d] for d in members) for members in mesh) if problem.engine_s else (),
        ledger=dataclasses.replace(problem.ledger, copied=COPIED if any(sizes.gradients) else 0),
        replicas=tuple(
            Replica(
                devices=tuple(problem.devices[d] for d in devices),
                seconds=tuple(tuple(row[d] for d in devices) for row in part.seconds),
            )
            for devices in of_replica
        ),
        sums=sums,
    )


def on_mesh_of(problem: Problem, like: Problem, profile: Profile) -> Problem:
    """``problem`` of all devices on the mesh of ``like``; itself where that has one pipeline."""
    if not like.replicas:
        return problem
    by_replica = [[problem.devices.index(name) for name in replica.devices] for replica in like.replicas]
    return joined(problem, tuple(zip(*by_replica, strict=True)), _sizes(problem, profile))


def _matched(problem: Problem, source: Sequence[int], target: Sequence[int]) -> Link:
    """The slowest of the links between two joint devices."""
    return _slowest([problem.links[a][b] for a, b in zip(source, target, strict=True)])


def _sum_of(problem: Problem, members: Sequence[int]) -> Link:
    """What a ring over ``members`` takes at once, and its bytes/s."""
    links = [problem.links[a][b] for a in members for b in members if a != b]
    rounds = 2 * (len(members) - 1)
    latency_s, rate = _slowest(links)
    return rounds * latency_s, rate * len(members) / rounds


def _slowest(links: Sequence[Link]) -> Link:
    """The largest latency with the smallest bandwidth; not to be used where one of them is not."""
    return max(s for s, _ in links), min(rate for _, rate in links)


def _block_of(
    block: Block, of_replica: Sequence[Sequence[int]], sums: Sequence[Link], gradient_bytes: int, elsewhere: int
) -> Block:
    """What the slowest member takes; ``elsewhere``: bytes of the inputs that other replicas hold."""

    def by_replica(values: Sequence[T]) -> list[list[T]]:
        return [[values[d] for d in devices] for devices in of_replica]

    def slowest(seconds: Sequence[float]) -> tuple[float, ...]:
        return tuple(map(max, *by_replica(seconds)))

    sum_s = tuple(gradient_bytes / rate for _, rate in sums)
    unfit = tuple(map(any, zip(*by_replica(block.unfit), strict=True))) if any(block.unfit) else (False,) * len(sums)
    pinned = map(any, zip(*by_replica(block.allowed), strict=True))
    return dataclasses.replace(
        block,
        forward_s=slowest(block.forward_s),
        backward_s=slowest(block.backward_s),
        update_s=tuple(map(operator.add, slowest(block.update_s), sum_s)),
        recompute_s=slowest(block.recompute_s) if block.recompute_s else (),
        static_bytes=block.static_bytes - elsewhere,
        allowed=tuple(here and not lacks for here, lacks in zip(pinned, unfit, strict=True)),
        unfit=unfit,
        sum_s=sum_s,
    )


def _same(one: Problem, other: Problem) -> bool:
    """Whether two meshes differ in nothing but the names of their devices."""
    return one == dataclasses.replace(other, devices=one.devices, replicas=one.replicas)


def own_factors(problem: Problem, shares: Stages) -> list[list[float]]:
    """By replica and share: compute on the replica's own device, over that of the slowest member block by block."""
    slowest = [[max(r.seconds[v][d] for r in problem.replicas) for d, _ in shares] for v in range(len(problem.blocks))]
    whole = [sum(slowest[v][at] for v in bits(members)) for at, (_, members) in enumerate(shares)]
    return [
        [
            sum(replica.seconds[v][device] for v in bits(members)) / whole[at] if whole[at] else 1.0
            for at, (device, members) in enumerate(shares)
        ]
        for replica in problem.replicas
    ]


def slowest_steps(problem: Problem, costs: Sequence[StageCost], factors: npt.ArrayLike, **rules: Any) -> list[float]:
    """By draw: the step of the slowest replica, for which all wait; ``factors`` of shape (replicas, draws, devices)."""
    steps = [steps_at(costs, own, problem.microbatches, **rules) for own in np.asarray(factors, float)]
    return [max(draw) for draw in zip(*steps, strict=True)]


def expected_step_of_replicas_s(
    problem: Problem, stages: Stages, costs: Sequence[StageCost], varied: Mapping[str, Sequence[float]], **rules: Any
) -> tuple[float, float]:
    """As :func:`~shardwright.sharder.planning.schedules.simulate.expected_step_s`, each device's speed for itself.

    Args:
        varied: device -> relative times to draw from.
    """
    shares = shares_of(stages, problem.stages_per_device)
    own = own_factors(problem, shares)
    relative = [[varied.get(replica.devices[device], ()) for device, _ in shares] for replica in problem.replicas]
    draws = np.split(drawn([times for of_replica in relative for times in of_replica]), len(own), axis=1)
    factors = [np.array(each) * of_replica for each, of_replica in zip(own, draws, strict=True)]
    steps = slowest_steps(problem, costs, factors, **rules)
    if len(steps) == 1:
        return steps[0], 0.0
    low, median, high = statistics.quantiles(steps, n=4)
    return median, high - low
