"""The dtype and the device of exact arithmetic: float64 on the device of the tensors, or on the CPU
if that device has no float64 (MPS)."""

from __future__ import annotations

import torch
from torch import Tensor

_CPU = torch.device("cpu")


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which to sum over numbers of ``dtype``: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def has_float64(device: torch.device) -> bool:
    """Whether ``device`` supports float64. The function tries to create a float64 tensor there,
    because torch also runs on devices that Veneer does not know."""
    if device.type in ("cpu", "meta"):
        return True
    try:
        torch.empty((), dtype=torch.float64, device=device)
    except TypeError:
        return False
    return True


def compute_device(device: torch.device, dtype: torch.dtype = torch.float64) -> torch.device:
    """The device on which to compute in ``dtype`` with tensors of ``device``: ``device`` itself, or
    the CPU for a dtype that it does not support."""
    return _CPU if dtype is torch.float64 and not has_float64(device) else device


def cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """``tensor`` in ``dtype``, moved to the CPU if its device has no such dtype. Differentiable."""
    target_device = compute_device(tensor.device, dtype)
    return (tensor if target_device == tensor.device else tensor.to(target_device)).to(dtype)


def double(tensor: Tensor) -> Tensor:
    """``tensor`` in float64. Like ``cast``, it may move the tensor to the CPU."""
    return cast(tensor, torch.float64)


def equal_values(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of equal shape hold equal numbers. Their dtypes may differ."""
    common_dtype = torch.promote_types(a.dtype, b.dtype)
    return a is b or torch.equal(a.to(common_dtype), b.to(common_dtype))


def multiplies_in_float32() -> bool:
    """Whether torch's settings make it compute float32 matrix products on a CPU in float32, not in
    bfloat16 or TF32. Before torch 2.9, there is one setting for all devices."""
    matmul_settings = getattr(torch.backends.mkldnn, "matmul", None)
    if matmul_settings is None:
        return torch.get_float32_matmul_precision() == "highest"
    return matmul_settings.fp32_precision in ("none", "ieee")
