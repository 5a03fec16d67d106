"""A captured graph as a module over what it calls.

``fx.GraphModule`` has attributes of its own, such as ``graph`` and ``code``, which hide children of the model that are
named so. Here nothing beside what every ``nn.Module`` has.
"""

from __future__ import annotations

import itertools
import linecache
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, fx, nn

__all__ = ["Replayed", "graph_of"]

_GRAPH, _RUN = "shardwright.graph", "shardwright.run"
"""Where these are among a module's attributes: no child has a dot in its name."""
_numbers = itertools.count()


class Replayed(nn.Module):
    """Takes the tensors of the placeholders of ``graph`` in their order, and returns its output.

    It can be copied, not pickled: what is sent elsewhere is made anew there.

    Args:
        attributes: modules, tensors and constants that the graph may refer to, by target. Those that it does refer to
            are held under these names; they are not copied.
        graph: its code is generated now.
    """

    def __init__(self, attributes: Mapping[str, Any], graph: fx.Graph) -> None:
        super().__init__()
        # In the graph's order, for it is that of the parameters; but what is around others comes first.
        targets = dict.fromkeys(str(node.target) for node in graph.nodes if node.op in ("call_module", "get_attr"))
        for target in sorted(targets, key=lambda target: target.count(".")):
            _hold(self, target, attributes[target])
        self.__dict__[_GRAPH], self.__dict__[_RUN] = graph, _function(graph)

    def forward(self, *args: Any) -> Any:
        """Run the graph."""
        return self.__dict__[_RUN](self, *args)


def graph_of(module: Replayed) -> fx.Graph:
    """The graph that is run."""
    graph: fx.Graph = module.__dict__[_GRAPH]
    return graph


def _hold(module: nn.Module, target: str, value: Any) -> None:
    """Have ``value`` at ``target`` below ``module``, in modules without anything else where there are none."""
    *path, name = target.split(".")
    for part in path:
        if part not in module._modules:
            module.add_module(part, nn.Module())
        module = module.get_submodule(part)
    if hasattr(module, name) and getattr(module, name) is value:
        return
    if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
        module.register_buffer(name, value)
    elif isinstance(value, nn.Module):
        module.add_module(name, value)
    else:
        setattr(module, name, value)


def _function(graph: fx.Graph) -> Callable[..., Any]:
    """The graph's code, which tracebacks can show."""
    code = graph.python_code("self")
    file = f"<replayed graph {next(_numbers)}>"
    linecache.cache[file] = len(code.src), None, code.src.splitlines(keepends=True), file
    names: dict[str, Any] = dict(code.globals)
    exec(compile(code.src, file, "exec"), names)  # generated from a graph of our own
    function: Callable[..., Any] = names["forward"]
    return function
