"""The recorder: a mode and hooks that write the graph of a forward while it runs, and note what it cannot hold.

What happens inside a unit is not looked at. Outside, a tensor is recognised by its identity, and with each goes what
its numbers follow from: the inputs, the parameters, or chance. A number that is read back to Python is harmless when it
follows from shapes alone, as most masks do; else the graph, which holds one path, would be wrong for other inputs.
"""

from __future__ import annotations

import copy
import itertools
import sys
from collections.abc import Callable, Container
from contextlib import ExitStack, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import CheckpointFunction

from shardwright.errors import ShardwrightError
from shardwright.profiler.recording.callsites import applied_name, call_site, error_site, functions_applied
from shardwright.profiler.recording.equality import same_values
from shardwright.profiler.recording.inside import READS_BACK, follows, tensors_of_modules
from shardwright.profiler.recording.operations import Operation, OperationRecorder, decides_by_values
from shardwright.profiler.recording.regions import not_reentrant, reentrant_modes
from shardwright.profiler.recording.saved import SavedWatcher
from shardwright.profiler.recording.state import Versions
from shardwright.profiler.recording.structure import tensors_in, tensors_of
from shardwright.profiler.recording.told_devices import ToldDevices
from shardwright.profiler.recording.unitgraph import (
    ApplyFunction,
    Call,
    Context,
    Step,
    UnitGraph,
    function_name,
    held_to,
    mean_square_loss,
    set_item,
)
from shardwright.profiler.recording.writer import Sources

__all__ = ["Recorder", "SavedTensorsUncountedError"]

DATA_SHAPED = frozenset(["nonzero", "argwhere", "unique", "unique_consecutive", "bincount"])
"""Functions whose result has a shape that follows from their argument's numbers."""
SHAPED_BY = {"masked_select": "mask", "_pack_padded_sequence": "lengths", "repeat_interleave": "repeats"}
"""Functions whose result has a shape that follows from the numbers of their second argument."""
GRADIENT_HOOKS = frozenset(["register_hook", "register_post_accumulate_grad_hook"])
"""Tensor functions that change what happens in the backward pass, without a result that a graph would hold."""
DRAWS = 64
"""So often a branch on chance alone is tried; one that never turns out otherwise is none."""


class SavedTensorsUncountedError(Exception):
    """The forward uses a transform of ``torch.func`` that does not go with the counting of saved tensors."""


class Recorder(SavedWatcher, TorchFunctionMode):
    """Records one forward.

    Args:
        model: runs once, in :meth:`record`.
        units: the modules that are steps, by path.
        train: whether the forward is for training; the modes of steps are noted where they differ from it.
        earlier: the recorder of a call before this one, to tell state that is kept between calls.
        counts_saved: whether the tensors that autograd saves are counted.
        counts_operations: whether the operators that run are noted: not where the graph alone is asked for.
        echoes: whether operators of one form are computed once, where numbers do not matter; only with those noted.
        plain: steps that are not computed anew though they are called in a region of checkpointing.
    """

    def __init__(
        self,
        model: nn.Module,
        units: dict[str, nn.Module],
        *,
        train: bool,
        earlier: Recorder | None = None,
        counts_saved: bool = True,
        counts_operations: bool = True,
        echoes: bool = False,
        plain: Container[str] = (),
    ) -> None:
        super().__init__(model, units, train=train, counts_saved=counts_saved, plain=plain)
        self.earlier = earlier
        self.counts_operations = counts_operations
        self.echoes = echoes
        self.guards: list[tuple[str, str, str]] = []
        self.observed: Step | None = None  # the step whose own operators run
        self.calls: dict[str, int] = {}
        # Modules that the step which runs may call: a unit those that it holds or was handed; None = any.
        self.at_hand: set[int] | None = None
        if earlier is not None:
            # Buffers that the earlier call has made are not the model's own: they go when it is put back as it was.
            made = {name: key for key, name in earlier.buffers.items()}
            self.buffers = {key: name for key, name in self.buffers.items() if made.get(name) == key}
        # The parameters of each unit, by identity: others in their place mean a functional call.
        self.held = {path: _held(unit) for path, unit in units.items()}
        self.versions: list[tuple[Tensor, int | Tensor]] = []
        self.devices = ToldDevices()

    # Running

    def record(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[UnitGraph, Any]:
        """Run the model on the inputs; the graph, and what the model returned.

        Raises:
            ShardwrightError: the forward fails, or returns no tensor.
        """
        input_names = tuple(self._input(path, tensor) for path, tensor in tensors_in((args, kwargs)))
        for tensor in [*tensors_of_modules(self.model.modules()), *self.tensors.values()]:
            self.storage_counted(tensor)
        hooks = ExitStack()
        for path, unit in self.units.items():
            # As nn.Module's own methods, for a scripted module hides them.
            before = nn.Module.register_forward_pre_hook(unit, self._before(path), with_kwargs=True, prepend=True)
            after = nn.Module.register_forward_hook(unit, self._after, with_kwargs=True)
            self.hook_ids |= {before.id, after.id}
            hooks.callback(before.remove)
            hooks.callback(after.remove)
        versions = Versions(self.model)
        operating = OperationRecorder(self._operation, echoes=self.echoes) if self.counts_operations else nullcontext()
        with hooks, self.watching_saved(), functions_applied(self._apply), self, operating:
            try:
                output = self.model(*args, **kwargs)
            except ShardwrightError:
                raise
            except (Exception, SystemExit) as error:
                if self.counts_saved and "saved tensor hooks" in str(error):
                    raise SavedTensorsUncountedError from error
                inside = f" in unit {self.current.name}" if self.current is not None and self.depth else ""
                site = error_site(error)
                raise ShardwrightError(
                    f"the forward of {type(self.model).__name__} failed{inside} on the sample inputs"
                    f"{site and f', at {site}'}: {type(error).__name__}: {' '.join(str(error).split())}"
                ) from error
        if self.depth and self.current is not None:
            raise ShardwrightError(
                f"unit {self.current.name} of {type(self.model).__name__} failed and the forward caught its error, "
                "which a capture cannot follow; call it in a way that succeeds"
            )
        capture = self._finish(input_names, output)
        capture.changes = versions.changed()
        return capture, output

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.depth:
            result = func(*args, **kwargs)
            self.devices.note(func, args, result)
            self._called_inside(func, args, kwargs, result)
            return result
        if torch._C._functorch.peek_interpreter_stack() is not None:
            self._obstacle(f"{call_site(sys._getframe())} runs inside a transform of torch.func, such as vmap")
            return func(*args, **kwargs)
        return self._glue(func, args, kwargs)

    def _glue(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], type_: str = "") -> Any:
        read = tensors_of((args, kwargs))
        versions = [self._version(tensor) for tensor in read]
        step = Step(name="", kind="glue", type=type_ or function_name(func), node=None)  # type: ignore[arg-type]  # made below
        self.current = step
        self.at_hand = set() if isinstance(func, ApplyFunction) else None
        self.depth += 1
        self.observed = step
        try:
            result = func(*args, **kwargs)
        finally:
            self.observed = None
            self.depth -= 1
        changed = [t for t, version in zip(read, versions, strict=True) if _has_changed(t, version)]
        self.changing = {id(t) for t in changed}
        if not _is_in_place(func, kwargs):
            result = _made_apart(result, {id(t) for t in read} - self.changing)
        made = tensors_of(result)
        target, made_by = _expression(func, args)
        if not made and not (changed and result is None):
            if getattr(func, "__name__", "") in GRADIENT_HOOKS:
                self._obstacle(f"{call_site(sys._getframe())} changes a gradient by a hook ({function_name(func)})")
            if getattr(func, "__name__", "") in READS_BACK:
                self.reads_numbers = True
                self._read_back(func, args, kwargs, read, result)
            self.devices.note(func, args, result)
            return result  # a query: a size, a dtype, a number
        here = itertools.chain(self.model.parameters(), self.model.buffers(), self.tensors.values())
        made_by, kwargs = self.devices.meant(func, made_by, kwargs, here)
        context = self._context()
        step.call = Call(target, self._snapshot(made_by), self._snapshot(kwargs), context)
        step.node = self._node(target, made_by, kwargs, step, context)
        step.name = step.node.name
        step.site = call_site(sys._getframe())
        self._note_shape(func, args, kwargs, step)
        self.note_overwritten(changed)
        self._add(step, result if made else args[0], changed, self._follows(func, step))
        return result

    def _version(self, tensor: Tensor) -> int | Tensor:
        """What tells later whether ``tensor`` was changed in place: a count, or a copy where changes are not counted.

        So it is in inference mode, and with the statistics that ``F.batch_norm`` is given: buffers, most often.
        """
        if tensor.is_inference():
            return tensor.clone()
        if tensor.requires_grad or tensor.is_meta or isinstance(tensor, FakeTensor) or id(tensor) in self.parameters:
            return tensor._version
        name = self.name_of.get(id(tensor))
        kept = name is None or id(tensor) in self.buffers or self.values[name].producer in self.attribute_ids
        return tensor.detach().clone() if kept else tensor._version

    def _before(self, path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self.depth += 1
            with torch._C.DisableTorchFunction():  # the recorder's own queries are not the model's
                if self.depth == 1:
                    enter(module, args, kwargs)
                elif self.current is not None and self.at_hand is not None and id(module) not in self.at_hand:
                    self.astray = True
                    where, around = call_site(sys._getframe()), self.current.name or self.current.type
                    self._obstacle(f"{where} calls {path} inside {around}, which does not hold it")

        def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            count = self.calls[path] = self.calls.get(path, 0) + 1
            name = path if count == 1 else f"{path}#{count}"
            context = self._context(checkpointed=self.is_made_anew(name))
            step = Step(
                name=name,
                kind="unit",
                type=type(module).__name__,
                node=None,  # type: ignore[arg-type]  # made below
                unit=path,
                call=Call(module, self._snapshot(args), self._snapshot(kwargs), context),
            )
            step.site = call_site(sys._getframe())
            if _held(module) != self.held[path]:
                self._obstacle(f"{step.site} calls {path} with other parameters than its own (a functional call)")
            step.node = self._node(path, args, kwargs, step, context)
            arguments = tensors_of((args, kwargs))
            handed = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, nn.Module)]
            for tensor in (t for holder in handed for t in (*holder.parameters(), *holder.buffers())):
                self._read(tensor, step)
            inner = [each for holder in (module, *handed) for each in holder.modules()]
            self._enter_unit(step, arguments, inner)
            self.at_hand = set(map(id, inner))
            self.versions = [(t, self._version(t)) for t in arguments]
            self.observed = step
            if context is not None and context.checkpointed:
                self.keep_given(step, arguments)

        return hook

    def _after(self, _module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        handed_back = None
        if self.depth == 1 and self.current is not None:
            self.observed = None
            with torch._C.DisableTorchFunction():
                # A unit such as nn.Identity: what it returns gets an identity of its own.
                output = handed_back = _made_apart(output, set(map(id, tensors_of((args, kwargs)))))
                changed = [t for t, version in self.versions if _has_changed(t, version)]
                own: Sources = frozenset({"parameters"} if self.held[self.current.unit] else ())
                self.note_overwritten(changed)
                self._add(self.current, output, changed, self._follows(None, self.current) | own)
        self.depth -= 1
        return handed_back

    def _apply(
        self, function: type[torch.autograd.Function], call: Callable[..., Any], args: Any, kwargs: dict[str, Any]
    ) -> Any:
        """A custom autograd function becomes a step as a whole: its backward is its own."""
        if torch._C._len_torch_function_stack() == 0:
            return call(*args, **kwargs)
        if self.depth:
            result = not_reentrant(function, call, args, kwargs)  # a region of the other kind, which is told
            with torch._C.DisableTorchFunction():
                self._called_inside(function, args, kwargs, result)
            return result
        if function is CheckpointFunction:
            with self.in_region(args[0]), reentrant_modes(args[2:]):
                return args[0](*args[2:])
        with torch._C.DisableTorchFunction():
            return self._glue(ApplyFunction(function), args, kwargs, type_=applied_name(function))

    def _context(self, *, checkpointed: bool = False) -> Context | None:
        """The modes of this moment, where they differ from those that the forward began with."""
        grad = torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
        autocast = next(
            (torch.get_autocast_dtype(kind) for kind in ("cpu", "cuda") if torch.is_autocast_enabled(kind)), None
        )
        checkpointed = checkpointed and grad
        return None if grad == self.train and not (autocast or checkpointed) else Context(grad, autocast, checkpointed)

    def _operation(self, operation: Operation) -> None:
        if self.observed is not None:
            self.observed.operations.append(operation)
            if decides_by_values(operation.name):
                self.reads_numbers = True

    # What a graph cannot hold

    def _follows(self, func: Any, step: Step) -> Sources:
        """What the numbers that ``step`` makes follow from."""
        return follows(func, (self.sources[read] for read in step.reads))

    def _guard(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        """A step that makes sure, in every call, that what was read is what this forward read.

        So it is with masks, which many models look at to skip what a mask without holes does not need.
        """
        site = call_site(sys._getframe())
        target = partial(held_to, site, function_name(func), result, func)
        step = Step(name="", kind="glue", type="guard", node=None, site=site)  # type: ignore[arg-type]  # made below
        step.call = Call(target, self._snapshot(args), self._snapshot(kwargs))
        step.node = self._node(target, args, kwargs, step, None)
        step.name = step.node.name
        self.guards.append((site, function_name(func), repr(result)))
        self._add(step, (), [], frozenset())

    def _read_back(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], read: list[Tensor], result: Any
    ) -> None:
        """Note a number that goes back to Python, unless it follows from shapes alone."""
        names = [self.name_of.get(id(t)) or self._attribute(t) for t in read]
        sources: Sources = frozenset().union(*(self.sources[name] for name in names))
        told = f"{call_site(sys._getframe())} reads a number back ({function_name(func)})"
        if "inputs" in sources or ("indices" in sources and not _comparable(result)):
            self._obstacle(f"{told} that depends on the inputs' values")
        elif "parameters" in sources:
            self._obstacle(f"{told} that depends on parameters")
        elif "chance" in sources and not self._settled(func, names, args, kwargs):
            self._obstacle(f"{told} that depends on chance")
        elif "indices" in sources:
            self._guard(func, args, kwargs, result)

    def _settled(self, func: Any, names: list[str], args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether what ``func`` reads is the same however chance falls: tried again and again."""
        first = func(*args, **kwargs)
        if not isinstance(first, (bool, int)):
            return False
        fixed = {v.node: self.tensors[name] for name, v in self.values.items() if "chance" not in self.sources[name]}

        def evaluate(node: fx.Node, done: dict[fx.Node, Any]) -> Any:
            if node.op == "get_attr" and node not in done:
                return self.constants[str(node.target)]
            if node not in done and node.op != "call_function":
                raise LookupError(node.name)  # a unit takes part, which is not called again
            if node not in done:
                mapped = fx.node.map_arg((node.args, node.kwargs), lambda inner: evaluate(inner, done))
                done[node] = node.target(*mapped[0], **mapped[1])  # type: ignore[operator]
            return done[node]

        with torch.random.fork_rng(devices=[]):
            for _ in range(DRAWS):
                done: dict[fx.Node, Any] = dict(fixed)
                try:
                    drawn = {id(self.tensors[name]): evaluate(self.values[name].node, done) for name in names}
                except LookupError:
                    return False
                again = pytree.tree_map_only(Tensor, partial(_replaced, drawn), (args, kwargs))
                if func(*again[0], **again[1]) != first:
                    return False
        return True

    def _note_shape(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], step: Step) -> None:
        """Note a tensor whose shape follows from numbers."""
        deciding = _deciding_shape(getattr(func, "__name__", ""), args, kwargs)
        sources: Sources = frozenset().union(*(self.sources[self.name_of[id(t)]] for t in deciding)) - {"buffers"}
        if sources:
            cause = "the inputs' values" if sources & {"inputs", "indices"} else " and ".join(sorted(sources))
            self._obstacle(f"{step.site} makes a tensor ({step.type}) whose shape depends on {cause}")

    def _check_constant(self, tensor: Tensor) -> None:
        """Note a tensor that came neither with the model nor from a step."""
        where = call_site(sys._getframe())
        if tensor in self.inside or tensor.grad_fn is not None:
            self._obstacle(f"{where} takes a tensor that a unit made and handed on otherwise than by returning it")
        elif self.earlier is not None and self.earlier.made_from_inputs(tensor):
            self._obstacle(f"{where} takes a tensor kept from an earlier call")

    def made_from_inputs(self, tensor: Tensor) -> bool:
        """Whether this recorder saw ``tensor`` being made, from more than shapes."""
        return bool(self._sources_of(tensor) - {"parameters", "buffers"})

    # Finishing

    def _finish(self, input_names: tuple[str, ...], output: Any) -> UnitGraph:
        name = "output"
        while name in self.units or name in self.values:
            name += "_"
        step = Step(name=name, kind="output", type="output", node=None)  # type: ignore[arg-type]  # made below
        found = tensors_of(output)
        places = [i for i, t in enumerate(found) if id(t) in self.name_of or not self._only_inside(t)]
        tensors = [found[place] for place in places]
        if not tensors:
            raise ShardwrightError(f"the forward of {type(self.model).__name__} returns no tensor")
        step.node = self.graph.output(tuple(self._read(t, step) for t in tensors))
        step.call = Call(mean_square_loss, (self._snapshot(tuple(tensors)),), {})
        self.steps.append(step)
        return UnitGraph(
            model=self.model,
            units=self.units,
            graph=self.graph,
            steps=self.steps,
            values=self.values,
            input_names=input_names,
            outputs=tuple(self.name_of[id(t)] for t in tensors),
            output_places=tuple(places),
            constants=self.constants,
            colocate=self._colocate(),
            ties=self._ties(),
            saved_by={self.storages[key]: step.name for key, step in self.savers.items() if self.storages.get(key)},
            reads_numbers=self.reads_numbers,
            checkpointed_modules=frozenset(path for path, m in self.model.named_modules() if m in self.region_modules),
            obstacles=self._obstacles(),
            guards=[f"{function} at {site} gives {value}" for site, function, value in dict.fromkeys(self.guards)],
        )

    def _obstacles(self) -> list[str]:
        """Those found, buffers that were replaced, and reads that came out otherwise in the earlier call."""
        for path, buffer in self.model.named_buffers():
            name = self.name_of.get(id(buffer))
            if id(buffer) not in self.buffers and name is not None and self._is_state(path, buffer, self.sources[name]):
                maker = next(step for step in self.steps if step.name == self.values[name].producer)
                self._obstacle(f"{maker.site} makes another tensor of the buffer {path}, which later calls take")
        if self.earlier is not None and self.earlier.guards != self.guards:
            nothing = ("", "", "")
            for now, before in itertools.zip_longest(self.guards, self.earlier.guards, fillvalue=nothing):
                if now != before:
                    site, function, _ = before if now is nothing else now
                    self._obstacle(f"{site} reads a number back ({function}) that depends on the inputs' values")
                    break
        if self.earlier is not None and not self.obstacles:
            self._compare_shapes(self.earlier)
        return list(self.obstacles)

    def _compare_shapes(self, earlier: Recorder) -> None:
        """Note a tensor that had another shape in the earlier call, which took the same steps from the same shapes."""
        if [(s.name, s.type) for s in self.steps] != [(s.name, s.type) for s in earlier.steps]:
            return
        for name, value in self.values.items():
            before = earlier.values.get(name)
            if before is not None and before.producer == value.producer and before.shape != value.shape:
                step = next(s for s in self.steps if s.name == value.producer)
                self._obstacle(f"{step.site} makes a tensor ({step.type}) whose shape depends on values or on chance")
                return

    def _is_state(self, path: str, buffer: Tensor, sources: Sources) -> bool:
        """Whether a tensor that has taken the place of a buffer tells the next call something."""
        if sources & {"inputs", "indices", "chance"}:
            return True
        before = next((t for t in self.alive if self.buffers.get(id(t)) == path), None)
        if "buffers" not in sources or before is None or before.shape != buffer.shape:
            return False  # a table that has grown, say
        return not same_values(before, buffer.to(before.dtype))

    def _only_inside(self, tensor: Tensor) -> bool:
        """Whether a unit made ``tensor`` and did not return it, as the entries of a cache."""
        return tensor in self.inside or (tensor.grad_fn is not None and id(tensor) not in self.parameters)


def _deciding_shape(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """The tensors whose numbers decide which shape the function's result has."""
    decide: Any = ()
    if name in DATA_SHAPED or (name == "where" and len(args) + len(kwargs) == 1):
        decide = (args, kwargs)
    elif name in SHAPED_BY and not kwargs.get("output_size"):
        decide = kwargs.get(SHAPED_BY[name], (args or ((),))[:2][-1])  # alone, repeat_interleave's repeats come first
    elif name == "one_hot" and not any(isinstance(n, int) and n >= 0 for n in (*args, *kwargs.values())):
        decide = (args, kwargs)
    elif name == "__getitem__":
        decide = [t for t in tensors_of(args[1]) if t.dtype in (torch.bool, torch.uint8) and t.dim()]
    return tensors_of(decide)


def _has_changed(tensor: Tensor, version: int | Tensor) -> bool:
    return not same_values(tensor, version) if isinstance(version, Tensor) else tensor._version != version


def _is_in_place(func: Any, kwargs: dict[str, Any]) -> bool:
    """Whether ``func`` by its name returns the very tensor that it was given: ``add_``, ``detach_``, ``out=``."""
    name = getattr(func, "__name__", "")
    return "out" in kwargs or (name.endswith("_") and not name.endswith("__"))


def _made_apart(result: Any, operands: set[int]) -> Any:
    """``result``, with an identity of its own for each tensor that is one of the ``operands``.

    So ``x.to(x.dtype)``, which is ``x``, and ``x`` stay two values: on several devices they may be two tensors.
    """
    if operands.isdisjoint(map(id, tensors_of(result))):
        return result

    def apart(tensor: Tensor) -> Tensor:
        if id(tensor) not in operands or tensor.layout != torch.strided or tensor.is_nested:
            return tensor
        with torch.enable_grad():  # a view made without it would carry no gradient
            return tensor.view_as(tensor)

    return pytree.tree_map_only(Tensor, apart, result)


def _replaced(replacements: dict[int, Any], tensor: Tensor) -> Any:
    return replacements.get(id(tensor), tensor)


def _comparable(value: Any) -> bool:
    """Whether a guard can hold a value that was read back to this one: whole numbers, and lists of them."""
    return isinstance(value, int) or (isinstance(value, list) and all(map(_comparable, value)))


def _held(unit: nn.Module) -> tuple[int, ...]:
    held = (module._parameters.values() for module in unit.modules())
    return tuple(id(parameter) for parameters in held for parameter in parameters if parameter is not None)


def _expression(func: Any, args: tuple[Any, ...]) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """A function and arguments that return what ``func`` returns or changes, and that can be written in source."""
    name = getattr(func, "__name__", "")
    if func is Tensor.__setitem__:
        return set_item, args
    if func is Tensor.__deepcopy__:  # its memo holds the copy by now, and would hand that one out ever after
        return copy.deepcopy, args[:1]
    if name == "__get__":  # a property such as x.T; its descriptor's name is in the bound getset
        return getattr, (args[0], func.__self__.__name__)
    return func, args
