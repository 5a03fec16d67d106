"""Simulated devices ``sim:0``, ``sim:1``, …: real numbers, computed on the CPU; devices do not mix, as on CUDA.

They check a placement on a machine without GPUs. A tensor on ``sim:k`` is a wrapper around a CPU tensor; operations on
it run on the CPU tensors, after a check that all operands are on one device. PyTorch's Python backend interface, which
this rests on, is experimental: nothing outside this file touches it. Backward works with ``cpu`` and ``sim:0`` only,
since autograd's engine knows one device of such a backend, and only if the first simulated device was made before the
process's first backward, when the engine counts the devices.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import return_and_correct_aliasing

__all__ = [
    "DeviceMismatchError",
    "SimTensor",
    "Simulated",
    "crossings_watched",
    "on_host",
    "parameters_may_move",
    "sim_device",
]

NAME = "sim"
_INDEXING = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"}
_INDEXING |= {"aten::_pack_padded_sequence", "aten::_pack_padded_sequence_backward", "aten::_pad_packed_sequence"}
"""Operations whose further operands may lie on the CPU."""
_COPIES = {"aten::_to_copy", "aten::copy_", "aten::_copy_from", "aten::_copy_from_and_resize", "aten::set_"}
"""Operations whose point is to read one device and write another."""


class DeviceMismatchError(RuntimeError):
    """An operation met tensors on different devices; ``operation`` names it."""

    def __init__(self, operation: str, devices: list[str]) -> None:
        super().__init__(
            f"Expected all tensors to be on the same device, but {operation} found at least two devices, "
            f"{devices[0]} and {devices[1]}!"
        )
        self.operation = operation
        self.devices = devices


_LOWERED = (
    *("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d.input", "conv_transpose3d.input", "linear"),
    *("matmul", "mm", "bmm", "baddbmm", "addmm", "addbmm", "scaled_dot_product_attention"),
)
"""What autocast computes in its lower precision on a CPU."""


def _operator(name: str) -> Any:
    packet, _, overload = name.partition(".")
    return getattr(getattr(torch.ops.aten, packet), overload or "default")


def _lowered(operator: Any, *args: Any, **kwargs: Any) -> Any:
    """An operator under autocast: floating operands in its precision."""
    dtype = torch.get_autocast_dtype(NAME)

    def lowered(tensor: Tensor) -> Tensor:
        return tensor.to(dtype) if tensor.is_floating_point() and tensor.dtype != torch.float64 else tensor

    with torch.autocast(NAME, enabled=False):
        args, kwargs = pytree.tree_map_only(Tensor, lowered, (args, kwargs))
        return operator(*args, **kwargs)


@cache
def _backend() -> tuple[torch.library.Library, ...]:
    """Register the backend, once a process; the libraries must live as long."""
    from torch.utils import backend_registration

    class Backend(backend_registration._DummyBackendModule):
        """What autocast asks of a device."""

        def get_amp_supported_dtype(self) -> list[torch.dtype]:
            return [torch.bfloat16, torch.float16]

    backend_registration._setup_privateuseone_for_python_backend(NAME, backend_module=Backend())
    library = torch.library.Library("_", "IMPL")
    library.fallback(_compute, "PrivateUse1")
    library.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    cast = torch.library.Library("aten", "IMPL", "AutocastPrivateUse1")
    for name in _LOWERED:
        cast.impl(name, partial(_lowered, _operator(name)))
    return (library, cast)


def sim_device(index: int) -> torch.device:
    """The simulated device ``sim:index``."""
    _backend()
    return torch.device(NAME, index)


_watchers: list[Callable[[Tensor], None]] = []


@contextmanager
def crossings_watched(tell: Callable[[Tensor], None]) -> Iterator[None]:
    """Call ``tell`` with each tensor that is copied from one simulated device to another."""
    _watchers.append(tell)
    try:
        yield
    finally:
        _watchers.remove(tell)


class SimTensor(Tensor):
    """A tensor on ``sim:k``; ``host`` holds its numbers."""

    host: Tensor

    @staticmethod
    def __new__(cls: type[SimTensor], host: Tensor, device: torch.device) -> SimTensor:  # noqa: D102
        made: SimTensor = Tensor._make_wrapper_subclass(
            cls,
            host.size(),
            strides=host.stride(),
            storage_offset=host.storage_offset(),
            dtype=host.dtype,
            device=device,
        )
        made.host = host
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        return _compute(func, *args, **(kwargs or {}))

    def __repr__(self) -> str:  # type: ignore[override]  # torch's takes contents that we have no use for
        return f"SimTensor({self.host!r}, device={str(self.device)!r})"

    def __format__(self, spec: str) -> str:
        return format(self.host, spec)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        copied = SimTensor(self.host.clone(), self.device).requires_grad_(self.requires_grad)
        made = torch.nn.Parameter(copied, self.requires_grad) if isinstance(self, torch.nn.Parameter) else copied
        memo[id(self)] = made
        return made


def on_host(value: Any) -> Any:
    """``value`` with the tensors on simulated devices replaced by ordinary ones, outside autograd."""
    return pytree.tree_map_only(SimTensor, lambda t: t.host.detach(), value)


def _compute(func: Any, *args: Any, **kwargs: Any) -> Any:
    """Run one operator: check the devices, compute on the host's tensors, put the results on the device."""
    name = func._schema.name
    tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    # As on CUDA, a CPU tensor without dimensions goes with any device, and so do indices on the CPU.
    bound = [t for t in tensors if t.dim() or t.device.type != "cpu"]
    if name in _INDEXING and args[0].device.type != "cpu":
        bound = [t for t in bound if t.device.type != "cpu"]
    homes = list(dict.fromkeys(t.device for t in bound))
    if len(homes) > 1 and name.startswith("aten::_foreach_") and len(args[0]) > 1:
        return _one_by_one(func, args, kwargs)
    if len(homes) > 1 and name not in _COPIES:
        raise DeviceMismatchError(name.replace("::", "."), [str(device) for device in homes])
    asked = kwargs.get("device")
    device = torch.device(asked) if asked is not None else (homes or [torch.device("cpu")])[0]
    if name == "aten::copy_":
        device = args[0].device
    if name in _COPIES and device.type == NAME and homes[-1].type == NAME and homes[-1] != device:
        for tell in _watchers:
            tell(tensors[-1])
    if asked is not None:
        kwargs = kwargs | {"device": torch.device("cpu")}
    host_args, host_kwargs = pytree.tree_map_only(SimTensor, lambda t: t.host, (args, kwargs))
    result = _FUSED.get(name, func)(*host_args, **host_kwargs)
    if device.type == NAME:
        if device.index is None:
            device = sim_device(0)
        if name == "aten::_pack_padded_sequence":  # the sizes of the batches stay on the CPU
            return SimTensor(result[0], device), result[1]
        result = pytree.tree_map_only(Tensor, lambda t: SimTensor(t, device), result)
    return (
        return_and_correct_aliasing(func, args, kwargs, result)
        if _has_sim(tensors) and _has_sim_result(result)
        else result
    )


def _one_by_one(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor] | None:
    """An operator on lists of tensors, which may lie on several devices if those of one position lie together."""
    made: list[Tensor] = []
    for position in range(len(args[0])):
        one = [[arg[position]] if isinstance(arg, (list, tuple)) else arg for arg in args]
        made += _compute(func, *one, **kwargs) or []
    return made or None


def _fused_lstm_cell(
    gates: Tensor, hidden: Tensor, cell: Tensor, bias: Tensor | None = None, hidden_bias: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The cell of an LSTM as PyTorch's accelerators compute it: new hidden state, new cell state, the gates."""
    total = gates + hidden + (0 if bias is None else bias) + (0 if hidden_bias is None else hidden_bias)
    in_, forget, new, out = total.chunk(4, 1)
    in_, forget, new, out = in_.sigmoid(), forget.sigmoid(), new.tanh(), out.sigmoid()
    after = forget * cell + in_ * new
    return out * after.tanh(), after, torch.cat([in_, forget, new, out], 1)


def _fused_lstm_cell_backward(
    grad_hidden: Tensor | None, grad_after: Tensor | None, cell: Tensor, after: Tensor, gates: Tensor, has_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Its gradients by the gates' sums, the cell state and the bias."""
    in_, forget, new, out = gates.chunk(4, 1)
    tanh = after.tanh()
    grad_hidden = torch.zeros_like(cell) if grad_hidden is None else grad_hidden
    through = grad_hidden * out * (1 - tanh * tanh) + (0 if grad_after is None else grad_after)
    grads = (
        through * new * in_ * (1 - in_),
        through * cell * forget * (1 - forget),
        through * in_ * (1 - new * new),
        grad_hidden * tanh * out * (1 - out),
    )
    by_gates = torch.cat(grads, 1)
    return by_gates, through * forget, by_gates.sum(0) if has_bias else by_gates.new_empty(0)


def _fused_gru_cell(
    gates: Tensor, hidden: Tensor, state: Tensor, bias: Tensor | None = None, hidden_bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The cell of a GRU: new state, and what its backward needs."""
    ours = (gates + (0 if bias is None else bias)).chunk(3, 1)
    theirs = (hidden + (0 if hidden_bias is None else hidden_bias)).chunk(3, 1)
    reset, update = (ours[0] + theirs[0]).sigmoid(), (ours[1] + theirs[1]).sigmoid()
    new = (ours[2] + reset * theirs[2]).tanh()
    return (state - new) * update + new, torch.cat([reset, update, new, state, theirs[2]], 1)


def _fused_gru_cell_backward(grad: Tensor, workspace: Tensor, has_bias: bool) -> tuple[Tensor, ...]:
    """Its gradients by the gates' sums on both sides, the state and the biases."""
    reset, update, new, state, hidden = workspace.chunk(5, 1)
    by_update = grad * (state - new) * update * (1 - update)
    by_new = grad * (1 - update) * (1 - new * new)
    by_reset = by_new * hidden * reset * (1 - reset)
    ours, theirs = torch.cat([by_reset, by_update, by_new], 1), torch.cat([by_reset, by_update, by_new * reset], 1)
    biases = (ours.sum(0), theirs.sum(0)) if has_bias else (ours.new_empty(0), ours.new_empty(0))
    return ours, theirs, grad * update, *biases


def _histogram(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """A histogram of whole numbers too."""
    return torch.histc(tensor.double(), *args, **kwargs).to(tensor.dtype)


_FUSED: dict[str, Callable[..., Any]] = {
    "aten::histc": _histogram,
    "aten::_conj": torch.conj_physical,  # the wrapper does not show that its numbers are to be conjugated, or negated
    "aten::_neg_view": torch.neg,
    "aten::_thnn_fused_lstm_cell": _fused_lstm_cell,
    "aten::_thnn_fused_lstm_cell_backward_impl": _fused_lstm_cell_backward,
    "aten::_thnn_fused_gru_cell": _fused_gru_cell,
    "aten::_thnn_fused_gru_cell_backward": _fused_gru_cell_backward,
}
"""Operators that PyTorch uses on accelerators only, so that the CPU has no kernel for them, and lazy ones."""


_FROM_DATA = {torch.tensor, torch.as_tensor, torch.asarray}


class Simulated(TorchFunctionMode):
    """While it is on, functions that make tensors may be asked for a simulated device.

    PyTorch fills in the numbers of ``torch.tensor`` and the sizes of ``torch.arange`` below the level at which a Python
    backend is asked: they are made on the CPU, and copied.
    """

    def __enter__(self) -> Any:
        self.fast_path = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)  # its results for padded positions differ, and need nesting
        self.flash = torch.backends.cuda.flash_sdp_enabled()
        torch.backends.cuda.enable_flash_sdp(False)  # the CPU's kernel too, which rounds as no simulated device does
        return super().__enter__()  # type: ignore[no-untyped-call]

    def __exit__(self, *error: Any) -> None:
        torch.backends.mha.set_fastpath_enabled(self.fast_path)
        torch.backends.cuda.enable_flash_sdp(self.flash)
        super().__exit__(*error)  # type: ignore[no-untyped-call]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name == "new_tensor" and args[0].device.type == NAME:
            func, kwargs = torch.tensor, {"dtype": args[0].dtype, "device": args[0].device} | kwargs
            args = args[1:]
        if name in ("__getitem__", "__setitem__") and isinstance(args[0], SimTensor):
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            listed = tuple(torch.tensor(part) if isinstance(part, list) else part for part in index)
            return func(args[0], listed, *args[2:])
        if name in ("tolist", "numpy", "__array__") and isinstance(args[0], SimTensor):
            return func(args[0].host.detach(), *args[1:], **kwargs)
        if func in _FROM_DATA and isinstance(args[0], (list, tuple)):  # of numbers, some of them tensors
            args = (on_host(args[0]), *args[1:])
        device = kwargs.get("device")
        if device is None or name in ("to", "device") or torch.device(device).type != NAME:
            return func(*args, **kwargs)
        if any(isinstance(leaf, SimTensor) for leaf in pytree.tree_leaves((args, kwargs))):
            return func(*args, **kwargs)
        device = torch.device(device)
        made = func(*args, **(kwargs | {"device": "cpu"}))
        grad = isinstance(made, Tensor) and made.requires_grad
        return made.detach().to(device if device.index is not None else sim_device(0)).requires_grad_(grad)


def _has_sim(tensors: list[Tensor]) -> bool:
    return any(isinstance(t, SimTensor) for t in tensors)


def _has_sim_result(result: Any) -> bool:
    return any(isinstance(t, SimTensor) for t in pytree.tree_leaves(result))


@contextmanager
def parameters_may_move() -> Iterator[None]:
    """Let ``Module.to`` replace parameters: one on a simulated device cannot take over another's storage."""
    before = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        yield
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(before)
