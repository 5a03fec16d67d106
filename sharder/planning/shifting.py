r"""Graphs with too many closed sets: blocks of a good split moved to the next stage or the one before, one at a time.

A split is a stage s(v) for each block with s(u) <= s(v) for each u before v. A block may move by one stage where that
stays so. Such a move changes the loads of two stages only, and by little that has to be looked at: the work of the
block, and the transfers, over the one cut between the stages, of what it makes and reads.

The largest load alone says nothing of most moves, so what is made small is the sum of powers of all loads,

    E = sum over stages of load(s) ** k           with k from some thirty up: the largest load, and a little of the next

by simulated annealing (Kirkpatrick, Gelatt and Vecchi, "Optimization by simulated annealing", Science 1983): a move
that makes E larger by a factor f is taken with the probability f ** (-1 / t), and t falls. A run starts from the best
split so far; how hot is drawn anew, since little heat mends a good split and much of it finds another. Blocks that one
order of all of them (orders.py) keeps apart change places here.

For loads that are sums of work and of what is relayed. Memory and ties are left out: who takes a split has to look.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence

from shardwright.sharder.planning.problem import Problem, bits
from shardwright.sharder.planning.search import Stages

__all__ = ["Shifts", "shifted"]

PATIENCE = 20
"""Runs in succession without an improvement, after which there are no more."""
MOVES_A_BLOCK = 600
MOST_MOVES = 100_000
"""So many moves are tried in a run, at some five microseconds each."""
POWERS = (30, 60, 100)
HOTTEST = 4.0
COLDEST = 0.02
TOO_MUCH = 2.0
"""No load becomes so many times the largest: it would never be taken, and has powers that are no numbers."""
SMALL_BATCH = 1024
"""After so many moves the time is looked at, and rounding is made good."""


class Shifts:
    """A split in which blocks move to a neighbouring stage, and its loads in seconds of a step.

    Args:
        problem: transfers relayed and not overlapped.
        stages: of a split; each has a block.
    """

    def __init__(self, problem: Problem, stages: Stages) -> None:
        self.devices = [device for device, _ in stages]
        self.stage = [0] * len(problem.blocks)
        for s, (_, members) in enumerate(stages):
            for v in bits(members):
                self.stage[v] = s
        self.before = [list(bits(before)) for before in problem.predecessors]
        self.behind: list[list[int]] = [[] for _ in problem.blocks]
        for v, before in enumerate(self.before):
            for u in before:
                self.behind[u].append(v)
        self.allowed = [[block.allowed[d] for d in self.devices] for block in problem.blocks]
        self.work_s = [[problem.work_s(v, d) for d in self.devices] for v in range(len(problem.blocks))]
        pairs = list(zip(self.devices, self.devices[1:], strict=False))
        self.maker = [tensor.producer for tensor in problem.crossings]
        self.readers = [list(bits(tensor.readers)) for tensor in problem.crossings]
        self.cut_s = [
            [problem.microbatches * sum(problem.transfer_s([tensor], a, b)) for a, b in pairs]
            for tensor in problem.crossings
        ]
        self.made: list[list[int]] = [[] for _ in problem.blocks]
        self.read: list[list[int]] = [[] for _ in problem.blocks]
        for t, maker in enumerate(self.maker):
            self.made[maker].append(t)
            for v in self.readers[t]:
                self.read[v].append(t)
        self.count = [self.stage.count(s) for s in range(len(stages))]
        self.loads = self.summed()

    def summed(self) -> list[float]:
        """The load of each stage, summed up anew."""
        loads = [0.0] * len(self.devices)
        for v, s in enumerate(self.stage):
            loads[s] += self.work_s[v][s]
        for t, maker in enumerate(self.maker):
            for s in range(self.stage[maker], max(self.stage[v] for v in self.readers[t])):
                loads[s] += self.cut_s[t][s]
                loads[s + 1] += self.cut_s[t][s]
        return loads

    def may(self, block: int, to: int) -> bool:
        """Whether ``block`` may move to the neighbouring stage ``to``.

        It may not where there is none, before what it reads or behind what reads it, where pins forbid it, or if it
        leaves no block behind.
        """
        own, stage = self.stage[block], self.stage
        if not 0 <= to < len(self.devices) or self.count[own] == 1 or not self.allowed[block][to]:
            return False
        if to > own:
            return all(stage[v] >= to for v in self.behind[block])
        return all(stage[u] <= to for u in self.before[block])

    def change(self, block: int, to: int) -> tuple[float, float]:
        """What moving ``block`` to the neighbouring stage ``to`` adds to the loads of its own and of that one."""
        own, stage = self.stage[block], self.stage
        cut, moved_s = min(own, to), 0.0
        for t in self.made[block]:  # it has readers, all of them behind the cut
            moved_s += self.cut_s[t][cut] if to < own else -self.cut_s[t][cut]
        for t in self.read[block]:
            if all(stage[v] <= cut or v == block for v in self.readers[t]):  # it crosses the cut for this block alone
                moved_s += self.cut_s[t][cut] if to > own else -self.cut_s[t][cut]
        return moved_s - self.work_s[block][own], moved_s + self.work_s[block][to]

    def move(self, block: int, to: int, change: tuple[float, float]) -> None:
        """Move ``block``, whose ``change`` is known."""
        own = self.stage[block]
        self.loads[own] += change[0]
        self.loads[to] += change[1]
        self.count[own] -= 1
        self.count[to] += 1
        self.stage[block] = to

    def stages(self, stage: Sequence[int]) -> Stages:
        """Device and bit mask of each stage, ``stage`` being that of each block."""
        members = [0] * len(self.devices)
        for v, s in enumerate(stage):
            members[s] |= 1 << v
        return tuple(zip(self.devices, members, strict=True))


def shifted(
    problem: Problem, best: Callable[[], tuple[Stages, float]], bound_s: float, out_of_time: Callable[[], bool]
) -> Iterator[Stages]:
    """Splits, each with a smaller largest load than the ``best`` so far, were there no memory and no ties.

    There are none where transfers are not relayed, or overlap with compute.

    Args:
        problem: blocks, devices and links.
        best: the stages of the best split that was taken, and its largest load.
        bound_s: a largest load that no split is below.
        out_of_time: asked now and then.
    """
    random_ = random.Random(0)
    failures = 0
    if problem.transfers != "relayed" or problem.overlap or len(best()[0]) < 2:
        return
    while failures < PATIENCE and best()[1] > bound_s and not out_of_time():
        stages, value_s = best()
        failures += 1
        found = _anneal(Shifts(problem, stages), random_, out_of_time)
        if found is not None:
            yield found
            if best()[1] < value_s * (1 - 1e-5):
                failures = 0


def _anneal(shifts: Shifts, random_: random.Random, out_of_time: Callable[[], bool]) -> Stages | None:
    """One run; None if it found nothing better than what it began with."""
    power = random_.choice(POWERS)
    hot = COLDEST * (HOTTEST / COLDEST) ** random_.random()
    moves = min(MOVES_A_BLOCK * len(shifts.stage), MOST_MOVES)
    least, kept = max(shifts.loads) * (1 - 1e-9), None
    for first in range(0, moves, SMALL_BATCH):
        if out_of_time():
            break
        shifts.loads = shifts.summed()
        heat = hot * (COLDEST / hot) ** (first / moves)
        for better in _moves(shifts, random_, power, heat, least):
            least, kept = max(shifts.loads), better
    return None if kept is None else shifts.stages(kept)


def _moves(shifts: Shifts, random_: random.Random, power: int, heat: float, least: float) -> Iterator[list[int]]:
    """Try a batch of moves; the stage of each block whenever the largest load is less than ever before."""
    scale = max(shifts.loads)
    powers = [(load / scale) ** power for load in shifts.loads]
    whole, blocks = sum(powers), len(shifts.stage)
    for _ in range(SMALL_BATCH):
        block = int(random_.random() * blocks)
        own = shifts.stage[block]
        to = own + (1 if random_.random() < 0.5 else -1)
        if not shifts.may(block, to):
            continue
        change = shifts.change(block, to)
        here_s, there_s = shifts.loads[own] + change[0], shifts.loads[to] + change[1]
        if not (here_s <= TOO_MUCH * scale and there_s <= TOO_MUCH * scale):  # over an unusable link not even a number
            continue
        here, there = (here_s / scale) ** power, (there_s / scale) ** power
        after = whole - powers[own] - powers[to] + here + there
        if after > whole and random_.random() >= (whole / after) ** (1 / heat):
            continue
        shifts.move(block, to, change)
        powers[own], powers[to], whole = here, there, after
        if max(shifts.loads) < least:
            least = max(shifts.loads)
            yield list(shifts.stage)
