"""Targets: ``file.py:Name`` or ``package.module:Name`` becomes a model with its sample inputs."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import re
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, NamedTuple

import torch
from torch import nn

from shardwright.errors import ShardwrightError, kind_of

__all__ = ["Sample", "load_model", "load_target", "parse_input"]

SEED = 0
"""Weights and sample inputs are made from this seed, so that a plan's run sees the model that was profiled."""


class Sample(NamedTuple):
    """The arguments of one forward call."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def load_target(
    spec: str,
    *,
    settings: Mapping[str, Any] | None = None,
    inputs: str | None = None,
    input_specs: Sequence[str] = (),
) -> tuple[nn.Module, Sample]:
    """Build the model that ``spec`` names, and its sample inputs.

    Args:
        spec: ``file.py:Name`` or ``package.module:Name``; Name is a class, a factory or an instance.
        settings: keyword arguments for the class or factory.
        inputs: ``file.py:function``, called without arguments, that returns args, or (args, kwargs).
        input_specs: inputs spelled out, see :func:`parse_input`.

    Without ``inputs`` and ``input_specs`` the class's (or factory's) own ``sample_inputs()`` is called.

    Raises:
        ShardwrightError: it cannot be imported, is no model, or has no sample inputs.
    """
    torch.manual_seed(SEED)
    maker = _resolve(spec)
    torch.manual_seed(SEED)  # importing the file may have drawn numbers, but does so once only
    model = load_model(maker, spec, settings or {})
    torch.manual_seed(SEED)
    if inputs and input_specs:
        raise ShardwrightError("give the inputs either by --inputs or by --input, not both")
    if input_specs:
        return model, _spelled_out(input_specs)
    if inputs:
        return model, _as_sample(_call(_resolve(inputs, wanted="function"), inputs, {}), inputs)
    make_inputs = getattr(maker, "sample_inputs", None) or getattr(model, "sample_inputs", None)
    if make_inputs is None:
        raise ShardwrightError(
            f"{spec} has no sample inputs: give them as --input 8x3x224x224, as --inputs file.py:make_inputs, "
            "or define sample_inputs() on the class"
        )
    return model, _as_sample(_call(make_inputs, f"{spec}.sample_inputs", {}), f"{spec}.sample_inputs")


def load_model(maker: Any, spec: str, settings: Mapping[str, Any]) -> nn.Module:
    """The model that ``maker`` (a class, a factory or an instance) gives."""
    if isinstance(maker, nn.Module):
        if settings:
            raise ShardwrightError(
                f"{spec} is an instance; keyword arguments ({', '.join(settings)}) need a class or factory"
            )
        return maker
    if not callable(maker):
        raise ShardwrightError(
            f"{spec} is {kind_of(maker)}, not a model: name an nn.Module class, a factory or an instance"
        )
    model = _call(maker, spec, settings)
    if not isinstance(model, nn.Module):
        raise ShardwrightError(
            f"{spec} returned {kind_of(model)}, not an nn.Module: let it return the model alone, and have its "
            "inputs from another function (--inputs FILE:FUNCTION)"
        )
    return model


def _resolve(spec: str, wanted: Literal["Name", "function"] = "Name") -> Any:
    """The object that ``spec`` names: a model or what makes it, or a ``function`` that makes inputs."""
    place, colon, name = spec.rpartition(":")
    if not colon or not place or not name:
        raise ShardwrightError(f"{spec!r} is not a target: write file.py:{wanted} or package.module:{wanted}")
    module = _import_file(Path(place)) if place.endswith(".py") else _import_module(place)
    found: Any = module
    for part in name.split("."):
        if not hasattr(found, part):
            fits = inspect.isfunction if wanted == "function" else _is_model
            here = [k for k, v in vars(module).items() if fits(v) and v.__module__ == module.__name__]
            hint = f"; its {'functions' if wanted == 'function' else 'models'} are {', '.join(here)}" if here else ""
            raise ShardwrightError(f"{place} has no {name}{hint}")
        found = getattr(found, part)
    return found


def _is_model(value: Any) -> bool:
    return isinstance(value, type) and issubclass(value, nn.Module)


def _import_file(path: Path) -> ModuleType:
    """Import ``path`` as Python does a script: its own folder comes first on the import path."""
    if not path.is_file():
        raise ShardwrightError(f"there is no file {path}; a target is file.py:Name")
    path = path.resolve()
    folder = str(path.parent)
    if folder not in sys.path:
        sys.path.insert(0, folder)
    name = path.stem
    loaded = sys.modules.get(name)
    if loaded is not None and getattr(loaded, "__file__", None) == str(path):
        return loaded
    if loaded is not None or name in sys.stdlib_module_names:
        # The plain name is taken: another one, whose classes travel to the workers by value.
        name = f"{name}_{abs(hash(str(path))):x}"
    module_spec = importlib.util.spec_from_file_location(name, path)
    if module_spec is None or module_spec.loader is None:
        raise ShardwrightError(f"{path} cannot be imported as Python")
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[name] = module
    try:
        module_spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise ShardwrightError(f"{path.name} cannot be imported: {_describe(error, path)}") from error
    if name != path.stem:
        import cloudpickle

        cloudpickle.register_pickle_by_value(module)
    return module


def _import_module(name: str) -> ModuleType:
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        return importlib.import_module(name)
    except (Exception, SystemExit) as error:
        raise ShardwrightError(f"{name} cannot be imported: {_describe(error)}") from error


def _call(function: Callable[..., Any], name: str, settings: Mapping[str, Any]) -> Any:
    try:
        return function(**settings)
    except ShardwrightError:
        raise
    except (Exception, SystemExit) as error:
        given = ", ".join(f"{k}={v!r}" for k, v in settings.items())
        remedy = (
            "; make it a @staticmethod" if isinstance(error, TypeError) and "argument: 'self'" in str(error) else ""
        )
        raise ShardwrightError(f"{name}({given}) failed: {_describe(error)}{remedy}") from error


def _describe(error: BaseException, preferred: Path | None = None) -> str:
    """The error on one line, with the file and line of the user's code where it arose."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if preferred is not None and Path(f.filename) == preferred]
    own = own or [f for f in frames if f.filename != __file__]
    where = f" ({Path(own[-1].filename).name}:{own[-1].lineno})" if own else ""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}{where}"


def _as_sample(made: Any, name: str) -> Sample:
    """Accept a tensor, args, or (args, kwargs)."""
    if isinstance(made, torch.Tensor):
        return Sample((made,), {})
    if isinstance(made, Mapping):
        return Sample((), dict(made))
    if (
        isinstance(made, tuple)
        and len(made) == 2
        and isinstance(made[0], (tuple, list))
        and isinstance(made[1], Mapping)
    ):
        return Sample(tuple(made[0]), dict(made[1]))
    if isinstance(made, (tuple, list)):
        return Sample(tuple(made), {})
    raise ShardwrightError(
        f"{name} returned {kind_of(made)}; it must return a tensor, a tuple of args, or (args, kwargs)"
    )


_INPUT = re.compile(
    r"^(?:(?P<name>[A-Za-z_]\w*)=)?(?:(?P<dtype>[a-z]+\d*)(?:\[(?P<low>-?\d+),(?P<high>-?\d+)\])?:)?(?P<shape>\d+(?:x\d+)*)$"
)


def parse_input(text: str) -> tuple[str | None, torch.Tensor]:
    """Make the tensor that ``text`` spells out: ``8x3x224x224``, ``mask=bool:8x16``, ``ids=int64[0,32000]:4x512``.

    Floats are standard normal; integers are uniform in [low, high), [0, 2) without bounds.
    """
    match = _INPUT.match(text.replace(" ", ""))
    if match is None:
        raise ShardwrightError(f"cannot read input {text!r}: write 8x3x224x224 or ids=int64[0,32000]:4x512")
    shape = tuple(int(n) for n in match["shape"].split("x"))
    if 0 in shape:
        raise ShardwrightError(f"cannot read input {text!r}: a dimension of 0 holds nothing to measure")
    dtype = getattr(torch, match["dtype"] or "float32", None)
    if not isinstance(dtype, torch.dtype):
        raise ShardwrightError(f"cannot read input {text!r}: {match['dtype']} is no torch dtype")
    if dtype.is_floating_point or dtype.is_complex:
        return match["name"], torch.randn(shape).to(dtype)
    low, high = int(match["low"] or 0), int(match["high"] or 2)
    if low >= high:
        raise ShardwrightError(f"cannot read input {text!r}: no whole number lies in [{low}, {high})")
    return match["name"], torch.randint(low, high, shape).to(dtype)


def _spelled_out(specs: Sequence[str]) -> Sample:
    parsed = [parse_input(text) for text in specs]
    return Sample(tuple(t for name, t in parsed if name is None), {name: t for name, t in parsed if name is not None})
