"""Dropout for a small probability: draw the dropped entries instead of a random number for each
entry.

With λ = -ln(1 - p) per entry, a Poisson number of draws with replacement hits each entry a
Poisson(λ) number of times, independently of the others. An entry is missed with probability exp(-λ)
= 1 - p (Kingman 1993, "Poisson Processes", section 5.1). This is exactly the distribution of a mask
of independent entries, and takes only about p · count random numbers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_C: Any = torch._C

#: above this probability a mask is cheaper than indices
SPARSE = 0.3


def seed() -> int:
    """A seed for ``draw_entries``, from torch's default generator."""
    return int(torch.randint(2**62, (), device="cpu"))


def draw_entries(count: int, p: float, seed: int, device: torch.device) -> Tensor:
    """Indices (int64) of the dropped entries among ``count``: each is dropped with probability p,
    independently. Unordered, with duplicates."""
    generator = torch.Generator(device).manual_seed(seed)
    if p > SPARSE:
        return (torch.rand(count, generator=generator, device=device) < p).nonzero()[:, 0]
    mean = torch.tensor(-math.log1p(-p) * count, dtype=torch.float64, device=device)
    draws = int(torch.poisson(mean, generator=generator))
    return torch.randint(max(count, 1), (draws,), generator=generator, device=device)


def mask(shape: Sequence[int], p: float, seed: int, device: torch.device) -> Tensor:
    """A mask that is True with probability 1 - p, to multiply by."""
    keep = torch.empty(shape, dtype=torch.bool, device=device)
    if keep.is_meta:  # a meta tensor holds no random numbers, and there is no generator for it
        return keep
    return keep.bernoulli_(1 - p, generator=torch.Generator(device).manual_seed(seed))


def entries(count: int, p: float, seed: int, device: torch.device) -> Tensor:
    """The dropped entries of ``count`` numbers, for ``zero_entries``. On a device, a mask of the
    kept ones, because reading the number of dropped entries would wait for the device."""
    if device.type != "cpu":
        return mask((count,), p, seed, device)
    return draw_entries(count, p, seed, device)


def zero_entries(x: Tensor, entries: Tensor) -> Tensor:
    """A copy of x with zeros in these entries, or where this mask is False; differentiable."""
    if entries.dtype is torch.bool:
        return x * entries.view(x.shape)
    return x.reshape(-1).index_fill(0, entries, 0).view(x.shape)


def dropout(x: Tensor, p: float) -> Tensor:
    """``F.dropout(x, p)`` by drawn entries. Falls back to ``F.dropout`` in compiled graphs, where
    the number of entries cannot vary, under ``torch.func``, which has rules for random numbers, and
    on a device."""
    if (
        not x.is_cpu
        or torch.compiler.is_compiling()
        or _C._functorch.peek_interpreter_stack() is not None
    ):
        return F.dropout(x, p)
    return zero_entries(x, draw_entries(x.numel(), p, seed(), x.device)) / (1 - p)
