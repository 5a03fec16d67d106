"""Problems that differ from a given one in one thing: what it costs, or what would do without it."""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Iterable, Sequence

from shardwright.profiler.formats.given_devices import AMPLE_BYTES
from shardwright.sharder.planning.formulation.memory import Step, Storage
from shardwright.sharder.planning.problem import Block, Link, Problem

__all__ = [
    "all_usable",
    "checkpointed",
    "in_shares",
    "timeless",
    "unpinned",
    "with_another",
    "with_caps_times",
    "with_links_times",
    "with_smaller_microbatches",
    "without_caps",
    "without_sums",
]


def unpinned(problem: Problem) -> Problem:
    """Every block allowed wherever it fits; ``problem`` itself, with all that it knows by now, if nothing is pinned."""
    anywhere = (True,) * len(problem.devices)
    fits = [tuple(map(operator.not_, b.unfit)) or anywhere for b in problem.blocks]
    if all(b.allowed == allowed for b, allowed in zip(problem.blocks, fits, strict=True)):
        return problem
    blocks = (
        dataclasses.replace(b, allowed=allowed, pinned=False) for b, allowed in zip(problem.blocks, fits, strict=True)
    )
    return dataclasses.replace(problem, blocks=tuple(blocks))


def all_usable(problem: Problem) -> Problem:
    """Corrupt links that cost nothing but their bandwidth: no worse than if they were mended."""
    links = tuple(tuple((0.0 if math.isinf(s) else s, rate) for s, rate in row) for row in problem.links)
    return dataclasses.replace(problem, links=links)


def with_links_times(problem: Problem, factor: float) -> Problem:
    """Links so many times as fast, latency and bandwidth."""

    def faster(link: Link) -> Link:
        return link[0] / factor, link[1] * factor

    def sooner(block: Block) -> Block:
        sums = tuple(s / factor for s in block.sum_s)
        updates = zip(block.update_s, block.sum_s, sums, strict=True)
        return dataclasses.replace(block, sum_s=sums, update_s=tuple(s - own + now for s, own, now in updates))

    return dataclasses.replace(
        problem,
        blocks=tuple(map(sooner, problem.blocks)) if problem.replicas else problem.blocks,
        sums=tuple(map(faster, problem.sums)),
        links=tuple(tuple(map(faster, row)) for row in problem.links),
        hosts=tuple((faster(out), faster(in_)) for out, in_ in problem.hosts),
    )


def without_sums(problem: Problem) -> Problem:
    """Gradients that nobody sums over replicas."""
    blocks = (
        dataclasses.replace(b, update_s=tuple(map(operator.sub, b.update_s, b.sum_s)), sum_s=(0.0,) * len(b.sum_s))
        for b in problem.blocks
    )
    return dataclasses.replace(problem, blocks=tuple(blocks))


def with_caps_times(problem: Problem, factor: float) -> Problem:
    """Memory caps so many times as large."""
    return dataclasses.replace(problem, caps=tuple(math.ceil(cap * factor) for cap in problem.caps))


def without_caps(problem: Problem, devices: Sequence[int]) -> Problem:
    """Memory on ``devices`` without end."""
    caps = tuple(AMPLE_BYTES if d in devices else cap for d, cap in enumerate(problem.caps))
    return dataclasses.replace(problem, caps=caps)


def timeless(problem: Problem) -> Problem:
    """The same without times: any split that fits is the best."""
    none = (0.0,) * len(problem.devices)
    blocks = (
        dataclasses.replace(b, forward_s=none, backward_s=none, update_s=none, recompute_s=()) for b in problem.blocks
    )
    links = tuple(tuple((s if math.isinf(s) else 0.0, math.inf) for s, _ in row) for row in problem.links)
    hosts = tuple(tuple((s if math.isinf(s) else 0.0, math.inf) for s, _ in pair) for pair in problem.hosts)
    ties = tuple(dataclasses.replace(tie, update_s=()) for tie in problem.ties)
    return dataclasses.replace(problem, blocks=tuple(blocks), ties=ties, links=links, hosts=hosts)  # type: ignore[arg-type]


def with_another(problem: Problem, device: int) -> Problem:
    """One more device like ``device``, over links like its own; between the two lies the slowest of these.

    What is pinned stays where it is pinned: to be on a copy of a device is not to be on the device.
    """
    others = [o for o in range(len(problem.devices)) if o != device]
    row, column = problem.links[device], [links[device] for links in problem.links]
    between = _slowest([*(row[o] for o in others), *(column[o] for o in others)])
    links = [[*row] for row in problem.links]
    for other in range(len(links)):
        links[other].append(between if other == device else column[other])
    links.append([*(between if other == device else row[other] for other in range(len(row))), row[device]])
    together = problem.updates_together
    blocks = (
        dataclasses.replace(
            b,
            forward_s=(*b.forward_s, b.forward_s[device]),
            backward_s=(*b.backward_s, b.backward_s[device]),
            update_s=(*b.update_s, b.update_s[device]),
            allowed=(*b.allowed, b.allowed[device] and not b.pinned),
            unfit=(*b.unfit, b.unfit[device]) if b.unfit else (),
            recompute_s=(*b.recompute_s, b.recompute_s[device]) if b.recompute_s else (),
            parts_s=(*b.parts_s, b.parts_s[device]) if b.parts_s else (),
        )
        for b in problem.blocks
    )
    ties = (
        dataclasses.replace(t, update_s=(*t.update_s, t.update_s[device]) if t.update_s else ()) for t in problem.ties
    )
    return dataclasses.replace(
        problem,
        blocks=tuple(blocks),
        ties=tuple(ties),
        devices=(*problem.devices, f"another {problem.devices[device]}"),
        caps=(*problem.caps, problem.caps[device]),
        links=tuple(map(tuple, links)),
        updates_together=(*together, together[device]) if together else (),
        hosts=(*problem.hosts, problem.hosts[device]) if problem.hosts else (),
        engine_s=(*problem.engine_s, problem.engine_s[device]) if problem.engine_s else (),
    )


def _slowest(links: Iterable[tuple[float, float]]) -> tuple[float, float]:
    """The largest latency with the smallest bandwidth; free where there is no link."""
    latencies, rates = zip(*links, strict=True) if (links := list(links)) else ((0.0,), (math.inf,))
    return max(latencies), min(rates)


def with_smaller_microbatches(problem: Problem, factor: int) -> Problem:
    """So many times as many micro-batches, each as much smaller: times and bytes are taken as in proportion."""
    blocks = (
        dataclasses.replace(
            b,
            forward_s=tuple(s / factor for s in b.forward_s),
            backward_s=tuple(s / factor for s in b.backward_s),
            recompute_s=tuple(s / factor for s in b.recompute_s),
            parts_s=tuple((inputs / factor, weights / factor) for inputs, weights in b.parts_s),
        )
        for b in problem.blocks
    )
    crossings = (
        dataclasses.replace(
            c, forward_bytes=-(-c.forward_bytes // factor), backward_bytes=-(-c.backward_bytes // factor)
        )
        for c in problem.crossings
    )

    def part(size: int) -> int:
        return -(-size // factor)

    ledger = problem.ledger
    steps = (s._replace(saved=part(s.saved), forward=part(s.forward), backward=part(s.backward)) for s in ledger.steps)
    return dataclasses.replace(
        problem,
        blocks=tuple(blocks),
        crossings=tuple(crossings),
        microbatches=problem.microbatches * factor,
        ledger=dataclasses.replace(
            ledger,
            steps=tuple(steps),
            storages=tuple(s._replace(size=part(s.size)) for s in ledger.storages),
            # The gradient of weights is as large for a part of the batch.
            gradients=tuple(
                g if g.maker is None else g._replace(size=part(g.size), added=part(g.added)) for g in ledger.gradients
            ),
        ),
    )


def checkpointed(problem: Problem) -> Problem:
    """Each node, not each stage, keeps what it reads and computes the rest anew in the backward: a second forward.

    The peaks are upper bounds: what a node saved is taken as there in its backward beside all that it reads.
    """
    ledger = problem.ledger
    savers = {number: min(s.readers) for number, s in enumerate(ledger.storages) if s.readers}
    kept: dict[int, int] = {}
    for number, saver in savers.items():
        kept[saver] = kept.get(saver, 0) + ledger.storages[number].size

    def of_step(position: int, step: Step) -> Step:
        return step._replace(saved=kept.get(position, 0), backward=step.backward + step.saved)

    def of_storage(number: int, storage: Storage) -> Storage:
        return storage._replace(saver=savers.get(number))

    blocks = (
        dataclasses.replace(b, backward_s=tuple(f + s for f, s in zip(b.forward_s, b.backward_s, strict=True)))
        for b in problem.blocks
    )
    return dataclasses.replace(
        problem,
        recompute="never",
        blocks=tuple(blocks),
        ledger=dataclasses.replace(
            ledger,
            steps=tuple(of_step(i, s) for i, s in enumerate(ledger.steps)),
            storages=tuple(of_storage(i, s) for i, s in enumerate(ledger.storages)),
        ),
    )


def in_shares(problem: Problem, share: Sequence[float]) -> Problem:
    """Devices alike, with these seconds of a step as the work of each block."""
    none = (0.0,) * len(problem.devices)
    blocks = (
        dataclasses.replace(block, forward_s=none, backward_s=none, update_s=(s,) * len(none), recompute_s=(), unfit=())
        for block, s in zip(problem.blocks, share, strict=True)
    )
    return dataclasses.replace(problem, blocks=tuple(blocks), ties=())
