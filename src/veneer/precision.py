"""The dtypes of exact arithmetic, and the device on which float64 runs: the tensors' own device, or
the processor if that device has no float64 (MPS)."""

from __future__ import annotations

import torch
from torch import Tensor

_CPU = torch.device("cpu")


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, else float32: the dtype in which sums of narrower numbers are formed."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def has_float64(device: torch.device) -> bool:
    """Whether tensors of this device may be float64. A tensor is made to find out, as there are
    more kinds of devices than this file knows."""
    if device.type in ("cpu", "meta"):
        return True
    try:
        torch.empty((), dtype=torch.float64, device=device)
    except TypeError:
        return False
    return True


def place(device: torch.device, dtype: torch.dtype = torch.float64) -> torch.device:
    """The device for arithmetic in ``dtype`` on tensors of ``device``."""
    return _CPU if dtype is torch.float64 and not has_float64(device) else device


def cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """``tensor`` in ``dtype``, where its device has that, else on the processor. Differentiable."""
    device = place(tensor.device, dtype)
    return (tensor if device == tensor.device else tensor.to(device)).to(dtype)


def double(tensor: Tensor) -> Tensor:
    """``tensor`` in float64. See ``cast``."""
    return cast(tensor, torch.float64)


def equal_values(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one shape hold the same numbers; their dtypes may differ."""
    common = torch.promote_types(a.dtype, b.dtype)
    return a is b or torch.equal(a.to(common), b.to(common))
