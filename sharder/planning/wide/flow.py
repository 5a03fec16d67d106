"""The largest flow through a network, and so its least cut, by shortest augmenting paths of one length at a time.

Dinic, "Algorithm for solution of a problem of maximum flow in networks with power estimation", Soviet Mathematics
Doklady 1970. Every flow is a lower bound on every cut: once the time has passed, what flows by then is still a bound.
"""

from __future__ import annotations

from collections.abc import Callable

__all__ = ["Network"]

LOOK_EVERY = 64
"""After so many paths the time is looked at."""


class Network:
    """Nodes from 0 on, and edges with whole capacities."""

    def __init__(self, nodes: int) -> None:
        self.behind: list[list[int]] = [[] for _ in range(nodes)]
        """By node: the edges that leave it. Edge e ^ 1 is edge e turned round."""
        self.target: list[int] = []
        self.room: list[int] = []

    def join(self, source: int, target: int, capacity: int) -> None:
        """Add an edge."""
        for node, other, room in ((source, target, capacity), (target, source, 0)):
            self.behind[node].append(len(self.target))
            self.target.append(other)
            self.room.append(room)

    def largest_flow(self, source: int, sink: int, out_of_time: Callable[[], bool] = lambda: False) -> int:
        """What flows from ``source`` to ``sink``; the network keeps the flow.

        Once it is ``out_of_time`` that may be less than could.
        """
        flow = paths = 0
        while not out_of_time():
            far = self._far(sink)
            if far[source] < 0:
                return flow
            left = [len(edges) for edges in self.behind]
            while found := self._path(source, sink, far, left):
                pushed = min(self.room[edge] for edge in found)
                for edge in found:
                    self.room[edge] -= pushed
                    self.room[edge ^ 1] += pushed
                flow += pushed
                paths += 1
                if paths % LOOK_EVERY == 0 and out_of_time():
                    return flow
        return flow

    def reached_from(self, source: int) -> list[bool]:
        """By node: whether more could flow to it from ``source``. After the largest flow these are a least cut's."""
        reached = [False] * len(self.behind)
        reached[source] = True
        waiting = [source]
        while waiting:
            for edge in self.behind[waiting.pop()]:
                other = self.target[edge]
                if self.room[edge] and not reached[other]:
                    reached[other] = True
                    waiting.append(other)
        return reached

    def _far(self, sink: int) -> list[int]:
        """By node: how many edges with room lead to the sink at least; -1 where none do."""
        far = [-1] * len(self.behind)
        far[sink] = 0
        reached = [sink]
        for node in reached:  # grows while it is read
            for edge in self.behind[node]:
                other = self.target[edge]
                if far[other] < 0 and self.room[edge ^ 1]:
                    far[other] = far[node] + 1
                    reached.append(other)
        return far

    def _path(self, source: int, sink: int, far: list[int], left: list[int]) -> list[int]:
        """The edges of a shortest path with room; of each node so many edges are ``left`` to be tried."""
        path: list[int] = []
        node = source
        while node != sink:
            while left[node]:
                edge = self.behind[node][left[node] - 1]
                if self.room[edge] and far[self.target[edge]] == far[node] - 1:
                    path.append(edge)
                    node = self.target[edge]
                    break
                left[node] -= 1
            else:
                if not path:
                    return []
                node = self.target[path.pop() ^ 1]
                left[node] -= 1
        return path
