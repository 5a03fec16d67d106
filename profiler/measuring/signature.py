"""Signatures: what the time of a step depends on, as text, so that equal work is measured once.

Two steps with one signature run the same operators on tensors of the same shapes, dtypes and strides, in the same
modes, with inputs whose whole numbers have the same range; so the layers of a decoder share one. The operators are
those that the capture saw, so that attributes which change nothing, such as a layer's own number, do not count.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree

from shardwright.profiler.profile import Device
from shardwright.profiler.recording.inputs import is_mask
from shardwright.profiler.recording.structure import tensors_in
from shardwright.profiler.recording.unitgraph import Call, Step

__all__ = ["board_key", "device_key", "step_key"]

METHOD = 9
"""How steps are measured; counted up when figures of an earlier release would not compare."""


def step_key(step: Step, *, train: bool, optimizer: str | None, accumulate: bool, parted: bool = False) -> str:
    """The digest of everything about ``step`` and how it is run that its time depends on.

    Args:
        step: a step that calls something.
        train: whether a backward is run.
        optimizer: what updates the parameters, if that is timed.
        accumulate: whether gradients are added to what is there.
        parted: whether the backward is run in two parts, too.
    """
    assert step.call is not None  # see timed.py
    digest = hashlib.sha256()
    for line in _lines(step.call):
        digest.update(f"{line}\n".encode())
    for operation in step.operations:
        digest.update(f"{operation.text}\n".encode())
    kind = type(step.call.function).__qualname__ if step.kind == "unit" else step.type
    how = (METHOD, step.kind, kind, train, optimizer, accumulate, torch.__version__, _dropouts(step.call.function))
    further = (*["parted"] * parted, *step.regions)
    digest.update(repr((*how, *further)).encode())
    return digest.hexdigest()[:32]


def _dropouts(function: Any) -> list[float]:
    """The shares that a unit drops: which its operators need not tell, where attention was captured without dropout."""
    modules = function.modules() if isinstance(function, nn.Module) else ()
    return [
        float(value)
        for module in modules
        for name, value in sorted(vars(module).items())
        if (name == "p" and isinstance(module, nn.modules.dropout._DropoutNd)) or "drop" in name
        if isinstance(value, (int, float))
    ]


def device_key(device: Device, beside: int) -> str:
    """What the times on ``device`` hold for: its model, its cores, and how many other CPU workers are at work."""
    threads = f", cores {','.join(map(str, device.cores))}, beside {beside} workers" if device.kind == "cpu" else ""
    driver = f", CUDA {torch.version.cuda}" if device.kind == "cuda" else ""
    return f"{device.description}{threads}{driver}"


def board_key(device: Device, beside: int) -> str:
    """What its links hold for: of a GPU the board itself, whose place in the machine they depend on, and whether NCCL
    was told to leave out the straight way between two."""
    key = device_key(device, beside)
    if device.kind != "cuda":
        return key
    board = getattr(torch.cuda.get_device_properties(torch.device(device.name)), "uuid", "")
    return f"{key}, board {board}, NCCL_P2P_DISABLE={os.environ.get('NCCL_P2P_DISABLE', '0')}"


def _lines(call: Call) -> Iterator[str]:
    """What ``call`` computes with: modes, plain arguments, tensors, parameters."""
    yield repr(call.context)
    leaves, structure = pytree.tree_flatten((call.args, call.kwargs))
    yield _without_addresses(structure)
    for leaf in leaves:
        if isinstance(leaf, Tensor):
            yield _tensor_line(leaf)
        elif leaf is None or isinstance(leaf, (bool, int, float, complex, str, torch.dtype, torch.layout)):
            yield repr(leaf)
        else:
            yield type(leaf).__qualname__
            yield from (_tensor_line(tensor) for _, tensor in tensors_in(leaf))
    if isinstance(call.function, nn.Module):
        for name, tensor in [*call.function.named_parameters(), *call.function.named_buffers()]:
            yield f"{name} {_tensor_line(tensor, values=False)}"


def _tensor_line(tensor: Tensor, *, values: bool = True) -> str:
    strides = tuple(tensor.stride()) if tensor.layout == torch.strided else tensor.layout
    return f"{tensor.dtype} {tuple(tensor.shape)} {strides} {tensor.requires_grad} {_range(tensor) if values else ''}"


def _range(tensor: Tensor) -> str:
    """What numbers may do to the time: the range of whole ones, and how much of a mask is which."""
    if isinstance(tensor, FakeTensor) or tensor.is_meta or not tensor.numel() or tensor.layout != torch.strided:
        return ""
    if tensor.dtype == torch.bool or is_mask(tensor):
        values, counts = tensor.unique(return_counts=True)
        return f"{values.tolist()} {counts.tolist()}"
    return "" if tensor.is_floating_point() or tensor.is_complex() else f"{int(tensor.min())}..{int(tensor.max())}"


def _without_addresses(structure: Any) -> str:
    text = str(structure)
    return " ".join(word for word in text.split() if "0x" not in word)
