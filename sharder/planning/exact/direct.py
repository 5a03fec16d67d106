"""The exact search under direct transfers: branch and bound, since a stage's load depends on all that is behind it.

A sender pays for each stage that reads its tensor, over the link to that stage's device. So the loads of the stages so
far are known only in part: what they exchanged with each other exactly, and of a tensor that is still to be read that
it will be sent once more at least, over the best link of its device. Staged transfers over such links (transfers.py,
``as_staged``) are a relaxation of the whole, whose exact search (stagewise.py) gives the ends to try, remembers from
where nothing is below the ceiling even so, and settles most branches. What is left may take exponential time: when that
is up the best split so far stands, with the bound of the ceilings that failed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from shardwright.sharder.planning.exact.search import Done, Lattice, OutOfTimeError, Stages
from shardwright.sharder.planning.exact.stagewise import Stagewise
from shardwright.sharder.planning.exact.transfers import Traffic, as_staged, load_s, seconds_of
from shardwright.sharder.planning.problem import Crossing, Problem

__all__ = ["Direct"]


class _Stage(NamedTuple):
    """A stage that was chosen, with what it exchanged with the stages up to the last."""

    device: int
    members: int
    compute_s: float
    traffic: Traffic


class Direct:
    """The question whether some split has every load below a ceiling; the arguments are those of Stagewise."""

    def __init__(
        self,
        problem: Problem,
        lattice: Lattice,
        sums: Mapping[int, Done],
        classes: Sequence[Sequence[int]],
        out_of_time: Callable[[], bool],
    ) -> None:
        self.problem = problem
        self.relaxed = Stagewise(as_staged(problem), lattice, sums, classes, out_of_time)
        self.out_of_time = out_of_time
        self.ceiling_s = 0.0

    def below(self, ceiling_s: float) -> Stages | None:
        """A split with every load below ``ceiling_s``, or None when this search has none."""
        self.ceiling_s = ceiling_s
        self.relaxed.begin(ceiling_s)
        every = (1 << len(self.problem.devices)) - 1
        for after in reversed(range(self.problem.most_stages)):
            for device in self.relaxed.candidates(every):
                found = self.extend(0, [], device, every & ~(1 << device), after)
                if found is not None:
                    return found
        return None

    def extend(self, start: int, stages: list[_Stage], device: int, free: int, after: int) -> Stages | None:
        """``stages`` and more from ``start`` on, the first on ``device`` and ``after`` behind it, or None."""
        if self.out_of_time():
            raise OutOfTimeError
        relaxed = self.relaxed
        if relaxed.extend(start, -1, device, free, after) is None:
            return None
        ends = relaxed.ends(start, -1, device, free, after)
        for end, compute_s in zip(ends.at.tolist(), ends.compute_s.tolist(), strict=True):
            more_s = relaxed.more_s(start, end, device, after)  # infinite where the stage does not fit
            grown = self.with_stage(stages, start, end, _Stage(device, 0, compute_s + more_s, Traffic()))
            if grown is None:
                continue
            if after == 0:
                return tuple((stage.device, stage.members) for stage in grown)
            for following in relaxed.candidates(free):
                found = self.extend(end, grown, following, free & ~(1 << following), after - 1)
                if found is not None:
                    return found
        return None

    def with_stage(self, stages: list[_Stage], start: int, end: int, last: _Stage) -> list[_Stage] | None:
        """``stages`` and ``last``, with what they exchange; None when a load is not below the ceiling any more."""
        closed = self.relaxed.closed
        members = closed[end] & ~closed[start]
        traffic = [list(stage.traffic) for stage in stages] + [[0.0] * 4]
        for tensor in self.problem.received(closed[start], members):
            sender = next(s for s, stage in enumerate(stages) if stage.members >> tensor.producer & 1)
            forward_s, backward_s = self.problem.transfer_s([tensor], stages[sender].device, last.device)
            traffic[sender][0] += forward_s
            traffic[sender][3] += backward_s
            traffic[-1][1] += forward_s
            traffic[-1][2] += backward_s
        grown = [
            stage._replace(traffic=Traffic(*seconds))
            for stage, seconds in zip([*stages, last._replace(members=members)], traffic, strict=True)
        ]
        return grown if all(self._is_low(stage, closed[end]) for stage in grown) else None

    def _is_low(self, stage: _Stage, closed: int) -> bool:
        """Whether the load of ``stage`` is below the ceiling, with what it has yet to send at best."""
        there, back = self.relaxed.problem.ways[stage.device]
        forward_s, backward_s = stage.traffic.forward_out_s, stage.traffic.backward_in_s
        for tensor in self._unread(stage.members, closed):
            forward_s += seconds_of(tensor.forward_bytes, there)
            if tensor.backward_bytes:
                backward_s += seconds_of(tensor.backward_bytes, back)
        traffic = stage.traffic._replace(forward_out_s=forward_s, backward_in_s=backward_s)
        return load_s(self.problem, stage.compute_s, traffic) < self.ceiling_s

    def _unread(self, members: int, closed: int) -> list[Crossing]:
        """The tensors made in ``members`` that blocks outside of ``closed`` read."""
        return [tensor for tensor in self.problem.crossing(closed) if members >> tensor.producer & 1]
