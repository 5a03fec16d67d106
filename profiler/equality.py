"""When two tensors count as equal: by the largest difference that another order of summation explains."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["relative_difference", "tolerance"]

TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}
"""By dtype, relative to the tensor's largest value; others must be equal exactly."""


def tolerance(dtype: torch.dtype) -> float:
    """The largest relative difference that counts as equal."""
    return TOLERANCES.get(dtype, 0.0)


def relative_difference(expected: Tensor, found: Tensor) -> float:
    """Largest difference over the largest value of ``expected``; infinite when shapes differ or one has NaN alone."""
    if expected.shape != found.shape:
        return float("inf")
    if expected.numel() == 0 or torch.equal(expected, found):
        return 0.0
    wide = torch.complex128 if expected.is_complex() else torch.float64
    one, other = expected.to(wide), found.to(wide)
    nans = one.isnan()
    if not torch.equal(nans, other.isnan()):
        return float("inf")
    same = nans | (one == other)  # infinities that agree have no difference
    difference = float((one - other).masked_fill(same, 0).abs().max())
    scale = float(one.masked_fill(~one.isfinite(), 0).abs().max())  # an infinity would hide every difference
    return difference / max(scale, torch.finfo(torch.float32).tiny)
