"""When two tensors count as equal: by the largest difference that another order of summation explains."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from shardwright.profiler.recording.structure import dense_parts

__all__ = ["largest_value", "relative_difference", "same_values", "tolerance"]

TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}
"""By dtype, relative to the tensor's largest value; others must be equal exactly."""
OTHER_KERNELS = {torch.float64: 1e-8, torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""The same where the two were computed by kernels of different devices, a deep network's roundings one upon another."""


def tolerance(dtype: torch.dtype, *, other_kernels: bool = False) -> float:
    """The largest relative difference that counts as equal.

    Args:
        other_kernels: whether a CPU computed one of the two, and a GPU the other.
    """
    return (OTHER_KERNELS if other_kernels else TOLERANCES).get(dtype, 0.0)


def same_values(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors, dense or sparse, are of one shape and hold the same numbers.

    Tensors without values, fake or meta, are not known to.
    """
    if isinstance(one, FakeTensor) or one.is_meta or isinstance(other, FakeTensor) or other.is_meta:
        return False
    if one.shape != other.shape or one.layout != other.layout:
        return False
    if one.layout == torch.strided:
        return torch.equal(one, other)
    return all(map(torch.equal, dense_parts(_canonical(one)), dense_parts(_canonical(other))))


def _canonical(tensor: Tensor) -> Tensor:
    return tensor.coalesce() if tensor.layout == torch.sparse_coo else tensor


def largest_value(tensor: Tensor) -> float:
    """The largest finite magnitude in a tensor, dense or sparse: an infinity would hide every difference."""
    values = tensor if tensor.layout == torch.strided else dense_parts(_canonical(tensor))[-1]
    return float(values.masked_fill(~values.isfinite(), 0).abs().max()) if values.numel() else 0.0


def relative_difference(expected: Tensor, found: Tensor, *, beside: float = 0.0) -> float:
    """Largest difference over the largest value of ``expected``; infinite when shapes differ or one has NaN alone.

    Args:
        beside: is added to that value, for tensors that may be nothing but the rounding of larger ones.
    """
    if expected.shape != found.shape or expected.layout != found.layout:
        return float("inf")
    if expected.layout != torch.strided:
        *indices, values = dense_parts(_canonical(expected))
        *found_indices, found_values = dense_parts(_canonical(found))
        alike = all(map(torch.equal, indices, found_indices))
        return relative_difference(values, found_values, beside=beside) if alike else float("inf")
    if expected.numel() == 0 or torch.equal(expected, found):
        return 0.0
    wide = torch.complex128 if expected.is_complex() else torch.float64
    one, other = expected.to(wide), found.to(wide)
    nans = one.isnan()
    if not torch.equal(nans, other.isnan()):
        return float("inf")
    same = nans | (one == other)  # infinities that agree have no difference
    difference = float((one - other).masked_fill(same, 0).abs().max())
    return difference / max(largest_value(one) + beside, torch.finfo(torch.float32).tiny)
