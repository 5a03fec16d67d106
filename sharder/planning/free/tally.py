"""The loads of an assignment that changes block by block; the statement is in assignment.py."""

from __future__ import annotations

import math
from collections.abc import Sequence

from shardwright.sharder.planning.exact.transfers import Traffic, load_s
from shardwright.sharder.planning.free.assignment import NOWHERE, costs_of
from shardwright.sharder.planning.problem import Crossing, Problem, Tie, bits

__all__ = ["Tally"]


class Tally:
    """The loads of an assignment that changes block by block, each change at the cost of the tensors that it
    touches."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.of = [NOWHERE] * len(problem.blocks)
        self.compute_s = [0.0] * len(problem.devices)
        self.traffic = [[0.0] * 4 for _ in problem.devices]
        self.barred = 0
        """How many transfers go over links that are not to be used."""
        self._tensors: list[list[Crossing]] = [[] for _ in problem.blocks]
        for tensor in problem.crossings:
            for v in {tensor.producer, *bits(tensor.readers)}:
                self._tensors[v].append(tensor)
        self._ties: list[list[Tie]] = [[] for _ in problem.blocks]
        for tie in problem.ties:
            for v in bits(tie.users):
                self._ties[v].append(tie)

    def move(self, block: int, device: int) -> None:
        """Put ``block`` on ``device``, or nowhere."""
        self._touch(block, -1)
        self.of[block] = device
        self._touch(block, 1)

    def loads_s(self) -> list[float]:
        """By device; of blocks that are nowhere nothing counts, so that more blocks never make a load smaller."""
        rows = zip(self.compute_s, self.traffic, strict=True)
        return [load_s(self.problem, compute_s, Traffic(*traffic)) for compute_s, traffic in rows]

    def _touch(self, block: int, sign: int) -> None:
        device = self.of[block]
        if device != NOWHERE:
            self.compute_s[device] += sign * self.problem.work_s(block, device)
        for tensor in self._tensors[block]:
            for at, *seconds in costs_of(self.problem, tensor, self.of):
                self._add(self.traffic[at], seconds, sign)
        for tie in self._ties[block]:
            holders = {self.of[user] for user in bits(tie.users)} - {NOWHERE}
            first = self.of[tie.first]
            for holder in holders - {first} if tie.update_s and first != NOWHERE else ():
                self.compute_s[holder] += sign * tie.update_s[holder]
            for holder in holders if len(holders) > 1 else ():
                row = [self.compute_s[holder]]
                self._add(row, [self.problem.sum_s(tie, holder)], sign)
                self.compute_s[holder] = row[0]

    def _add(self, row: list[float], seconds: Sequence[float], sign: int) -> None:
        if all(map(math.isfinite, seconds)):
            for kind, value in enumerate(seconds):
                row[kind] += sign * value
        else:
            self.barred += sign
