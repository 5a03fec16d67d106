"""A backward in two parts, as zero-bubble schedules take it: the gradients of the inputs, later those of the weights.

The graph of autograd is divided as torch.distributed.pipelining does it (stage_backward_input, stage_backward_weight;
Qi et al., "Zero Bubble Pipeline Parallelism", ICLR 2024). Nodes from which an input is reached are on the way. A
parameter's own nodes begin where they leave the way, at its *meets*: for a linear layer that is the layer's own node,
which makes the gradient of its input, of its weight, or of both, whatever is asked for.

    first part    the gradients of the inputs; what comes in at each meet is kept
    second part   from the meets, with what came in there, to the parameters; nothing else is computed again

Three things are done otherwise than there:

- A parameter that an output reaches without meeting the way begins at that output. There it gets no gradient.
- A parameter with meets of which one comes behind another, such as a weight that is used twice in a row, has its
  gradient made in the first part: in the second the way between its meets would be computed once more. There it is.
- Parameters with the same meets are one call of autograd's engine, and those with some in common are several. There
  the latter fail in some orders of the parameters, as outputs do that are views.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

__all__ = ["WeightsLeft", "edges_of", "inputs_first"]

_Users = Mapping[Node, Sequence[Node]]


@dataclass
class WeightsLeft:
    """What a backward has left to do for the parameters; it holds the graph until it is let go."""

    roots: tuple[GradientEdge, ...] = ()
    """Where the outputs are; they keep the graph."""
    groups: dict[frozenset[Node], list[nn.Parameter]] = field(default_factory=dict)
    """By their meets, the parameters that begin there."""
    came_in: dict[Node, dict[int, Tensor]] = field(default_factory=dict)
    """What came in at each meet, by number of the node's outputs."""
    counts: dict[Node, int] = field(default_factory=dict)
    """Of each meet on the way, how many outputs it has."""

    @property
    def held(self) -> list[Tensor]:
        """The gradients that came in, which are held until the second part."""
        return [gradient for came_in in self.came_in.values() for gradient in came_in.values()]

    def finish(self) -> None:
        """Add the gradients of the parameters to those that they have."""
        for meets, parameters in self.groups.items():
            here = [(GradientEdge(meet, number), t) for meet in meets for number, t in self.came_in[meet].items()]
            if not here:
                continue
            edges, gradients = zip(*here, strict=True)
            handles = [meet.register_prehook(partial(self._again, meet)) for meet in meets if meet in self.counts]
            try:
                # Groups may share nodes, whose tensors the first of them must not free.
                torch.autograd.backward(edges, gradients, retain_graph=True, inputs=parameters)
            finally:
                for handle in handles:
                    handle.remove()

    def _keep(self, meet: Node, gradients: Sequence[Tensor | None]) -> None:
        self.counts[meet] = len(gradients)
        self.came_in[meet] = {number: t for number, t in enumerate(gradients) if t is not None}

    def _again(self, meet: Node, _gradients: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
        """What came in, which the tensors' own hooks have changed already: they come before this."""
        return tuple(self.came_in[meet].get(number) for number in range(self.counts[meet]))

    def _begin_at(self, edge: GradientEdge, gradient: Tensor) -> None:
        """Take what is given for an output that is not on the way."""
        if edge.node in self.came_in:
            known = self.came_in[edge.node]
            before = known.get(edge.output_nr)
            known[edge.output_nr] = gradient if before is None else before + gradient


def edges_of(tensors: Iterable[Any]) -> list[GradientEdge]:
    """Where the gradients of those ``tensors`` arrive that have one."""
    return [get_gradient_edge(t) for t in tensors if isinstance(t, Tensor) and t.requires_grad]


def inputs_first(
    outputs: Sequence[Tensor],
    gradients: Sequence[Tensor | None] | None,
    inputs: Sequence[GradientEdge],
    parameters: Iterable[nn.Parameter],
) -> tuple[tuple[Tensor | None, ...], WeightsLeft]:
    """The gradients of ``inputs``, and what is left to do for ``parameters``.

    Args:
        outputs: those that have a gradient.
        gradients: of each of them; by default of ones, as of a loss. What has none counts as not used.
        inputs: where their gradients arrive; nothing is added to any that are there.

    Returns:
        None for an input that the outputs do not depend on. The graph is kept until what is left is let go.
    """
    ends = [
        (get_gradient_edge(output), torch.ones_like(output) if gradients is None else gradient)
        for output, gradient in zip(outputs, gradients or outputs, strict=True)
        if gradient is not None
    ]
    roots, given = [edge for edge, _ in ends], [gradient for _, gradient in ends if gradient is not None]
    users = _users(edge.node for edge in roots)
    way = _way([edge.node for edge in inputs], users)
    left, at_once = WeightsLeft(tuple(roots)), list[nn.Parameter]()
    starts = {edge.node for edge in roots}
    for parameter in parameters:
        end = get_gradient_edge(parameter).node if parameter.requires_grad else None
        if end is None or end not in users:
            continue
        meets = _meets(end, users, way, starts)
        if _in_a_row(meets, way):
            at_once.append(parameter)
        else:
            left.groups.setdefault(meets, []).append(parameter)
    left.came_in = {meet: {} for meets in left.groups for meet in meets}
    for edge, gradient in zip(roots, given, strict=True):
        if edge.node not in way:
            left._begin_at(edge, gradient)
    wanted = [*inputs, *map(get_gradient_edge, at_once)]
    handles = [meet.register_prehook(partial(left._keep, meet)) for meet in left.came_in if meet in way]
    try:
        found = (
            torch.autograd.grad(roots, wanted, given, retain_graph=True, allow_unused=True)
            if wanted and roots
            else (None,) * len(wanted)
        )
    finally:
        for handle in handles:
            handle.remove()
    for parameter, made in zip(at_once, found[len(inputs) :], strict=True):
        if made is not None:
            _accumulate(parameter, made)
    return tuple(found[: len(inputs)]), left


def _accumulate(parameter: Tensor, gradient: Tensor) -> None:
    """Add a gradient that the parameter's own hooks have changed already."""
    handle = get_gradient_edge(parameter).node.register_prehook(lambda _: (gradient,))
    try:
        torch.autograd.backward(parameter, gradient)
    finally:
        handle.remove()


def _users(roots: Iterable[Node]) -> _Users:
    """Every node that a backward from ``roots`` comes to -> the nodes that it comes from."""
    users: dict[Node, list[Node]] = {root: [] for root in roots}
    waiting = list(users)
    while waiting:
        node = waiting.pop()
        for behind, _ in node.next_functions:
            if behind is None:
                continue
            if behind not in users:
                users[behind] = []
                waiting.append(behind)
            users[behind].append(node)
    return users


def _way(ends: Iterable[Node], users: _Users) -> set[Node]:
    """The nodes from which one of ``ends`` is reached, themselves among them."""
    way = {end for end in ends if end in users}
    waiting = list(way)
    while waiting:
        for user in users[waiting.pop()]:
            if user not in way:
                way.add(user)
                waiting.append(user)
    return way


def _meets(end: Node, users: _Users, way: Collection[Node], starts: Collection[Node]) -> frozenset[Node]:
    """The first nodes above ``end`` that are on the way, and those of ``starts`` that are met before."""
    meets, seen, waiting = set[Node](), {end}, [end]
    while waiting:
        node = waiting.pop()
        if node in starts:
            meets.add(node)
        for user in users[node]:
            if user in way:
                meets.add(user)
            elif user not in seen:
                seen.add(user)
                waiting.append(user)
    return frozenset(meets)


def _in_a_row(meets: Collection[Node], way: Collection[Node]) -> bool:
    """Whether the way leads from one of ``meets`` to another."""
    waiting = [meet for meet in meets if meet in way]
    if len(waiting) < 2:
        return False
    seen = set[Node]()
    while waiting:
        for behind, _ in waiting.pop().next_functions:
            if behind in meets and behind in way:
                return True
            if behind is not None and behind in way and behind not in seen:
                seen.add(behind)
                waiting.append(behind)
    return False
