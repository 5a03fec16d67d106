r"""Graphs with too many closed sets: blocks of a good split moved to the next stage or the one before, one at a time.

A split is a stage s(v) for each block with s(u) <= s(v) for each u before v. A block may move by one stage where that
stays so. Such a move changes the loads of two stages only, and by little that has to be looked at: the work of the
block, and the transfers, over the one cut between the stages, of what it makes and reads.

The largest load alone says nothing of most moves, so what is made small is the sum of powers of all loads,

    E = sum over stages of load(s) ** k + (bytes(s) / cap(s)) ** 100      the latter where memory is short

by simulated annealing (Kirkpatrick, Gelatt and Vecchi, "Optimization by simulated annealing", Science 1983): a move
that makes E larger by a factor f is taken with the probability f ** (-1 / (k * t)). The root of E is near the largest
load, and t says how much of it is risked in a move: it falls. Meanwhile k rises. Of many blocks one is a few per cent
of a stage and what it sends a few per mille, so that with a large k the loads would be evened out by whatever moves do
it, and nothing else be looked at; with a small one the unevenness of loads counts little, and transfers become few
first.

How hot a run has to begin depends on the graph: of 300 blocks at a tenth of what is best for 50, of 3,000 at a
hundredth. So the first runs begin at heats all over the range, and most of the later ones near those that ended best.
Where memory is short all of them begin anywhere: then it counts more to come to another split than to end well.

For loads that are sums of work and of what is relayed. Ties are left out, and memory is that of the engine's buffers
and of all that comes with a block, by the share of it that the stages have at first: who takes a split has to look.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence

from shardwright.sharder.planning.exact.search import Stages, most_held
from shardwright.sharder.planning.exact.transfers import by_block
from shardwright.sharder.planning.problem import Problem, bits, in_flight

__all__ = ["Annealing", "Shifts", "can_shift", "shifted"]

PATIENCE = 24
"""Runs in succession without an improvement, after which there are no more; a longer one counts as several."""
LONGER, LONGEST = 6, 4
"""After so many of them a run is twice as long, and again, up to so many times."""
MOVES_A_BLOCK = 2_000
MOST_MOVES = 400_000
"""So many moves are tried in a run, at some two microseconds each."""
FIRST_POWERS, FIRST_IF_TIGHT = (1.2, 6.0), (4.0, 12.0)
LAST_POWER = 80.0
HOT, LEAST_HOT_IF_TIGHT = (5e-6, 1e-2), 5e-5
"""A run begins with a heat t between these: a little mends a good split, much of it finds another. Where memory is
short there is less that a little can do."""
HOT_FOR_A_BLOCK = 0.4
"""Where blocks are few the heat may be so much of a block's even share of a stage: with less none would ever move."""
NEAR = 3e-3
"""A run begins where the one before ended if that is so little above the best, else with the best."""
MENDED, MEND_HEAT, MEND_LENGTH = 4, 3e-5, 0.25
"""A good split that is a little too large is made to fit in so many short runs at most, at this heat."""
ALL_OVER = 5
"""So many runs begin at heats all over the range before others are near the best, and then every third one."""
NEAR_BEST, AROUND = 3, 0.5
"""Near one of so many that ended best: its logarithm is drawn with so much deviation."""
SAME = 1e-9
"""Loads that differ by less are the same, summed up in another order."""
GOLDEN = (5**0.5 - 1) / 2
"""Its multiples lie evenly between whole numbers, however many there are."""
COLD = 1 / 20
FULL, OVERFULL = 100.0, 1000.0
"""The power for memory, and the share of a cap above which all are the same to it: greater powers are no numbers."""
TOO_MUCH = 2.0
"""No load becomes so many times the largest: it would never be taken, and has powers that are no numbers."""
SMALL_BATCH = 1024
"""After so many moves the time is looked at, and rounding is made good."""


class Shifts:
    """A split in which blocks move to a neighbouring stage: its loads in seconds of a step, and its bytes.

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
        self.maker, self.readers, self.made, self.read = by_block(problem)
        self.cut_s = [
            [problem.microbatches * sum(problem.transfer_s([tensor], a, b)) for a, b in pairs]
            for tensor in problem.crossings
        ]
        self.count = [self.stage.count(s) for s in range(len(stages))]
        self.loads = self.summed(self.work_s, self.cut_s, self.cut_s)
        self.caps = [max(problem.caps[d], 1) for d in self.devices]
        self._weigh(problem, stages)

    def _weigh(self, problem: Problem, stages: Stages) -> None:
        """How many bytes each block and tensor adds to a stage, such that each stage has its exact peak now.

        A stage that keeps nothing for the backward has what stays, the engine's buffers, and what is beside these now.
        """
        count, coming = problem.microbatches, problem.ledger.coming()
        self.sent = [[float(count * tensor.backward_bytes)] * len(stages) for tensor in problem.crossings]
        self.received = [[float(count * tensor.forward_bytes)] * len(stages) for tensor in problem.crossings]
        static = [[float(block.static_bytes)] * len(stages) for block in problem.blocks]
        at_first = self.summed(static, self.sent, self.received)
        held = [in_flight(problem.schedule, count, len(stages) - 1 - s) for s in range(len(stages))]
        self.beside: list[float] = [0.0] * len(stages)
        """By stage: bytes that no block adds."""
        comes, closed = [0.0] * len(stages), 0
        for s, (device, members) in enumerate(stages):
            anew = problem.recompute != "never"
            peak = problem.memory_bytes(closed, closed | members, device, len(stages) - 1 - s, recomputed=anew)
            closed |= members
            whole = held[s] * sum(coming.get(v, 0) for v in bits(members))
            if whole:
                comes[s] = held[s] * (peak - at_first[s]) / whole
            else:
                self.beside[s] = peak - at_first[s]
        self.own_bytes = [
            [block.static_bytes + share * coming.get(v, 0) for share in comes] for v, block in enumerate(problem.blocks)
        ]
        self.bytes = self._summed_bytes()
        self.tight = _most_bytes(problem) > min(problem.caps)

    def summed(
        self, own: Sequence[Sequence[float]], closing: Sequence[Sequence[float]], opening: Sequence[Sequence[float]]
    ) -> list[float]:
        """By stage: what its blocks add up to, with what their tensors add on either side of each cut."""
        sums = [0.0] * len(self.devices)
        for v, s in enumerate(self.stage):
            sums[s] += own[v][s]
        for t, maker in enumerate(self.maker):
            for s in range(self.stage[maker], max(self.stage[v] for v in self.readers[t])):
                sums[s] += closing[t][s]
                sums[s + 1] += opening[t][s]
        return sums

    def sum_anew(self) -> None:
        """Loads and bytes without what rounding did to them."""
        self.loads = self.summed(self.work_s, self.cut_s, self.cut_s)
        if self.tight:
            self.bytes = self._summed_bytes()

    def _summed_bytes(self) -> list[float]:
        sums = self.summed(self.own_bytes, self.sent, self.received)
        return [own + beside for own, beside in zip(sums, self.beside, strict=True)]

    @property
    def fits(self) -> bool:
        """Whether each stage fits, as far as is known here."""
        return not self.tight or all(map(float.__le__, self.bytes, map(float, self.caps)))

    def may(self, block: int, to: int) -> bool:
        """Whether ``block`` may move to the neighbouring stage ``to``.

        It may not where there is none, before what it reads or behind what reads it, where pins forbid it, or if it
        leaves no block behind.
        """
        own, stage = self.stage[block], self.stage
        if not 0 <= to < len(self.devices) or self.count[own] == 1 or not self.allowed[block][to]:
            return False
        if to > own:
            for v in self.behind[block]:
                if stage[v] < to:
                    return False
        else:
            for u in self.before[block]:
                if stage[u] > to:
                    return False
        return True

    def crossing(self, block: int, to: int) -> list[int]:
        """The tensors that cross the cut for this block alone if it is on its far side: those that only it reads."""
        cut, stage, found = min(self.stage[block], to), self.stage, []
        for t in self.read[block]:
            for v in self.readers[t]:
                if stage[v] > cut and v != block:
                    break
            else:
                found.append(t)
        return found

    def change(self, block: int, to: int) -> tuple[float, float]:
        """What moving ``block`` to the neighbouring stage ``to`` adds to the loads of its own and of that one."""
        own = self.stage[block]
        cut, moved_s = min(own, to), 0.0
        for t in self.crossing(block, to):
            moved_s += self.cut_s[t][cut]
        for t in self.made[block]:  # it has readers, all of them behind the cut
            moved_s -= self.cut_s[t][cut]
        if to < own:
            moved_s = -moved_s
        return moved_s - self.work_s[block][own], moved_s + self.work_s[block][to]

    def change_of_bytes(self, block: int, to: int) -> tuple[float, float]:
        """The same for the bytes."""
        own, crossing = self.stage[block], self.crossing(block, to)
        cut, sign = min(own, to), 1 if to > own else -1
        before = sum(self.sent[t][cut] for t in crossing) - sum(self.sent[t][cut] for t in self.made[block])
        behind = sum(self.received[t][cut] for t in crossing) - sum(self.received[t][cut] for t in self.made[block])
        here, there = (before, behind) if to > own else (behind, before)
        return sign * here - self.own_bytes[block][own], sign * there + self.own_bytes[block][to]

    def move(self, block: int, to: int, change: tuple[float, float], of_bytes: tuple[float, float] = (0, 0)) -> None:
        """Move ``block``, whose changes are known."""
        own = self.stage[block]
        self.loads[own] += change[0]
        self.loads[to] += change[1]
        self.bytes[own] += of_bytes[0]
        self.bytes[to] += of_bytes[1]
        self.count[own] -= 1
        self.count[to] += 1
        self.stage[block] = to

    def stages(self, stage: Sequence[int]) -> Stages:
        """Device and bit mask of each stage, ``stage`` being that of each block."""
        members = [0] * len(self.devices)
        for v, s in enumerate(stage):
            members[s] |= 1 << v
        return tuple(zip(self.devices, members, strict=True))


def _most_bytes(problem: Problem) -> int:
    """What no stage takes more than."""
    crossing = sum(tensor.forward_bytes + tensor.backward_bytes for tensor in problem.crossings)
    held = most_held(problem, len(problem.devices)) * sum(problem.ledger.coming().values())
    static = sum(block.static_bytes for block in problem.blocks)
    return static + problem.microbatches * crossing + held + problem.ledger.most_at_once()


def _fullness(size: float, cap: int) -> float:
    """What bytes on a device add to E."""
    return min(size / cap, OVERFULL) ** FULL  # type: ignore[no-any-return]


def can_shift(problem: Problem) -> bool:
    """Whether loads are sums of work and of what is relayed."""
    return problem.transfers == "relayed" and not problem.overlap


def shifted(
    problem: Problem,
    best: Callable[[], tuple[Stages, float]],
    bound_s: float,
    out_of_time: Callable[[], bool],
    start: Stages = (),
    annealing: Annealing | None = None,
) -> Iterator[Stages]:
    """Splits, each with a smaller largest load than the ``best`` so far, were there no ties and memory as said above.

    There are none where transfers are not relayed, or overlap with compute.

    Args:
        problem: blocks, devices and links.
        best: the stages of the best split that was taken, and its largest load; no stages and infinite at first.
        bound_s: a largest load that no split is below.
        out_of_time: asked now and then.
        start: where moves begin while there is no best split; it need not fit.
        annealing: what earlier runs have taught, if there were any.
    """
    if not can_shift(problem) or len(best()[0] or start) < 2:
        return
    failures = 0
    near: Stages = ()
    annealing = annealing or Annealing(random.Random(0))
    while failures < PATIENCE and best()[1] > bound_s and not out_of_time():
        stages, value_s = best()
        length = min(2 ** (failures // LONGER), LONGEST)
        failures += length
        shifts = Shifts(problem, near or stages or start)
        yield from annealing.run(shifts, value_s, out_of_time, length)
        for _ in range(MENDED * shifts.tight):
            shifts = Shifts(problem, shifts.stages(shifts.stage))  # which knows what the stages as they are now take
            if shifts.fits or max(shifts.loads) >= best()[1] or out_of_time():
                break
            yield from annealing.mend(shifts, best()[1], out_of_time)
        if best()[1] < value_s * (1 - 1e-5):
            failures = 0
        near = shifts.stages(shifts.stage) if max(shifts.loads) <= best()[1] * (1 + NEAR) and shifts.fits else ()


class Annealing:
    """Runs of moves that learn from each other how hot to begin.

    Args:
        random_: what all is drawn with.
    """

    def __init__(self, random_: random.Random) -> None:
        self.random_ = random_
        self.runs = 0
        self.ended: list[tuple[float, float]] = []
        """The largest load at the end of a few runs, and the heat at their begin; the best first."""

    def run(self, shifts: Shifts, below_s: float, out_of_time: Callable[[], bool], length: int = 1) -> Iterator[Stages]:
        """At the end of each batch of moves the best split in it, where it is better than all before.

        Args:
            shifts: a split; it is changed.
            below_s: a largest load that splits are to be below.
            out_of_time: asked between batches.
            length: how many times as many moves as usual.
        """
        first_power = self.random_.uniform(*(FIRST_IF_TIGHT if shifts.tight else FIRST_POWERS))
        hottest = max(HOT[1], HOT_FOR_A_BLOCK * len(shifts.devices) / len(shifts.stage))
        hot = self._anywhere(hottest) if shifts.tight else self._learned(hottest)
        begun_s = max(shifts.loads)
        yield from self._cooled(shifts, below_s, out_of_time, first_power, hot, length)
        if shifts.fits and abs(max(shifts.loads) - begun_s) > SAME * begun_s:  # else it was too cold to change anything
            self.ended = sorted([*self.ended, (max(shifts.loads), hot)])[:NEAR_BEST]

    def mend(self, shifts: Shifts, below_s: float, out_of_time: Callable[[], bool]) -> Iterator[Stages]:
        """A short run without much heat, for a split that does not quite fit."""
        return self._cooled(shifts, below_s, out_of_time, FIRST_POWERS[1], MEND_HEAT, MEND_LENGTH)

    def _cooled(
        self,
        shifts: Shifts,
        below_s: float,
        out_of_time: Callable[[], bool],
        first_power: float,
        hot: float,
        length: float,
    ) -> Iterator[Stages]:
        """A run from that power and heat on."""
        moves = int(length * min(MOVES_A_BLOCK * len(shifts.stage), MOST_MOVES))
        least = below_s * (1 - SAME)
        for first in range(0, moves, SMALL_BATCH):
            if out_of_time():
                return
            shifts.sum_anew()
            power = first_power * (LAST_POWER / first_power) ** (first / moves)
            heat = power * hot * COLD ** (first / moves)
            *_, last = [None, *_moves(shifts, self.random_, power, heat, least)]
            if last is not None:
                stage, least = last[0], last[1] * (1 - SAME)
                yield shifts.stages(stage)

    def _anywhere(self, hottest: float) -> float:
        """A heat that is enough where memory is short."""
        hot: float = LEAST_HOT_IF_TIGHT * (hottest / LEAST_HOT_IF_TIGHT) ** self.random_.random()
        return hot

    def _learned(self, hottest: float) -> float:
        """A heat near those that have ended best, or none of them."""
        self.runs += 1
        if self.runs <= ALL_OVER or not self.runs % 3 or not self.ended:
            hot: float = HOT[0] * (hottest / HOT[0]) ** (GOLDEN * self.runs % 1)
            return hot
        _, known = self.random_.choice(self.ended)
        return min(known * math.exp(self.random_.gauss(0.0, AROUND)), hottest)


def _moves(
    shifts: Shifts, random_: random.Random, power: float, heat: float, least: float
) -> Iterator[tuple[list[int], float]]:
    """Try a batch of moves; the stage of each block, and the largest load, whenever that is less than ever before."""
    scale = max(shifts.loads) or 1.0  # without times memory is all there is
    tight, caps = shifts.tight, shifts.caps
    powers = [(load / scale) ** power for load in shifts.loads]
    if tight:
        powers = [p + _fullness(size, cap) for p, size, cap in zip(powers, shifts.bytes, caps, strict=True)]
    whole, blocks = sum(powers), len(shifts.stage)
    of_bytes = (0.0, 0.0)
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
        # Of a stage without work rounding may leave less than nothing, which has no real power.
        here, there = (max(here_s, 0.0) / scale) ** power, (max(there_s, 0.0) / scale) ** power
        if tight:
            of_bytes = shifts.change_of_bytes(block, to)
            here += _fullness(shifts.bytes[own] + of_bytes[0], caps[own])
            there += _fullness(shifts.bytes[to] + of_bytes[1], caps[to])
        after = whole - powers[own] - powers[to] + here + there
        if after > whole and random_.random() >= (whole / after) ** (1 / heat):
            continue
        shifts.move(block, to, change, of_bytes)
        powers[own], powers[to] = here, there
        whole = sum(powers)  # the difference has lost what is small beside a power that is gone
        if here_s < least and there_s < least and max(shifts.loads) < least and shifts.fits:
            least = max(shifts.loads)
            yield list(shifts.stage), least
