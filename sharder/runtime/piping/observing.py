"""Observing a stage: what each of its steps makes in one step of the pipeline, and the gradients of that.

While a stage is observed its graph is interpreted node by node; what computes is the same modules and functions.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor, fx, nn
from torch.distributed.pipelining import PipelineStage

from shardwright.profiler.recording.inputs import outputs_of
from shardwright.profiler.recording.replayed import Replayed, graph_of
from shardwright.sharder.runtime.piping.randomness import RandomState

__all__ = ["Drawing", "Key", "Seen", "direct", "hands_on", "observed"]


class Key(NamedTuple):
    """Whose tensors: what a stage makes in a step, or receives of that step, in one micro-batch."""

    stage: int
    step: str
    microbatch: int
    """Of its replica."""


Seen = dict[Key, dict[int, Tensor]]
"""By which of the tensors it is, on the CPU."""

Drawing = set[str]
"""Steps that drew random numbers."""


Given = list[tuple[Tensor, int]]
"""The tensors that a step is given, with their versions before it."""


def direct(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Given:
    """Those that are arguments themselves."""
    return [(it, it._version) for it in (*args, *kwargs.values()) if isinstance(it, Tensor)]


def hands_on(tensor: Tensor, given: Given) -> bool:
    """Whether a step's result is what it was given, unchanged, as that of an identity or of dropout at rest is.

    The gradients of its other readers come to that tensor too, so they are those of the step which made it.
    """
    return any(tensor is it and it._version == version for it, version in given)


class _Observer(fx.Interpreter):
    """Runs a stage's graph and shows what each node makes."""

    def __init__(self, module: Replayed, watch: _Watch) -> None:
        super().__init__(module, graph=graph_of(module))
        self.watch = watch

    def run_node(self, n: fx.Node) -> Any:
        """Run one node."""
        given = direct(*self.fetch_args_kwargs_from_env(n))
        before = RandomState.of(self.watch.device)
        result = super().run_node(n)
        if not before.is_current():
            self.watch.drawing.add(n.name)
        if n.op not in ("get_attr", "output"):
            self.watch.saw(n.name, result, given)
        return result


class _Watch:
    """The tensors of the ``wanted`` steps of one stage, or their gradients."""

    def __init__(
        self, stage: PipelineStage, wanted: frozenset[str], seen: Seen, drawing: Drawing, *, gradients: bool
    ) -> None:
        self.stage, self.device = stage.stage_index, stage.device
        self.wanted, self.seen, self.drawing, self.gradients = wanted, seen, drawing, gradients
        self.number, self.open = -1, False

    def enter(self, *_: Any) -> None:
        """Begin the next micro-batch: the engine has them in order."""
        self.number, self.open = self.number + 1, True

    def leave(self, *_: Any) -> None:
        """End it: what is computed anew in the backward is not looked at."""
        self.open = False

    def saw(self, name: str, result: Any, given: Given) -> None:
        """Take what a step made of what it was given, or wait for its gradients."""
        if not self.open or name not in self.wanted:
            return
        key = Key(self.stage, name, self.number)
        for index, tensor in enumerate(outputs_of(result)):
            if not self.gradients:
                self.keep(key, index, tensor)
            elif tensor.requires_grad and not hands_on(tensor, given):
                tensor.register_hook(partial(self.keep, key, index))

    def keep(self, key: Key, index: int, tensor: Tensor) -> None:
        """Copy it, for it may be changed in place."""
        self.seen.setdefault(key, {})[index] = tensor.detach().cpu().clone()


@contextmanager
def observed(
    stage: PipelineStage, wanted: frozenset[str], seen: Seen, drawing: Drawing, *, gradients: bool
) -> Iterator[None]:
    """Have ``seen`` filled in this block with what the ``wanted`` steps of ``stage`` make, or with its gradients, and
    ``drawing`` with those that draw random numbers."""
    module: nn.Module = stage.submod
    graph = next(inner for inner in module.modules() if isinstance(inner, Replayed))
    watch = _Watch(stage, wanted, seen, drawing, gradients=gradients)
    hooks = [module.register_forward_pre_hook(watch.enter), module.register_forward_hook(watch.leave)]
    # Of this one module, not of its class.
    graph.forward = lambda *received: _Observer(graph, watch).run(*received)  # type: ignore[method-assign]
    try:
        yield
    finally:
        del graph.forward
        for hook in hooks:
            hook.remove()
