"""Dropout for a small probability: draw the entries that are dropped, not a random number for each.

A Poisson number of draws with replacement, with λ = -ln(1 - p) an entry, hits each entry a
Poisson(λ) number of times, independently of the others: it is missed with probability exp(-λ) = 1 -
p (Kingman 1993, "Poisson Processes", section
5.1). That is exactly the distribution of a mask of independent entries, from about p · count random
numbers.
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
    """Indices (int64) of the numbers that are dropped of ``count``: each with probability p,
    independently; in no order, some of them twice."""
    generator = torch.Generator(device).manual_seed(seed)
    if p > SPARSE:
        return (torch.rand(count, generator=generator, device=device) < p).nonzero()[:, 0]
    mean = torch.tensor(-math.log1p(-p) * count, dtype=torch.float64, device=device)
    draws = int(torch.poisson(mean, generator=generator))
    return torch.randint(max(count, 1), (draws,), generator=generator, device=device)


def mask(shape: Sequence[int], p: float, seed: int, device: torch.device) -> Tensor:
    """True where a number of this shape is kept, with probability 1 - p; to be multiplied by."""
    keep = torch.empty(shape, dtype=torch.bool, device=device)
    if keep.is_meta:  # which draws nothing, and has no generator
        return keep
    return keep.bernoulli_(1 - p, generator=torch.Generator(device).manual_seed(seed))


def entries(count: int, p: float, seed: int, device: torch.device) -> Tensor:
    """The dropped entries of ``count`` numbers, for ``zero_entries``; on a device a mask of
    the others. There the number of entries could not be read without waiting for all that runs."""
    if device.type != "cpu":
        return mask((count,), p, seed, device)
    return draw_entries(count, p, seed, device)


def zero_entries(x: Tensor, entries: Tensor) -> Tensor:
    """A copy of x, of any shape, with zeros in these entries, or where this mask is False;
    differentiable."""
    if entries.dtype is torch.bool:
        return x * entries.view(x.shape)
    return x.reshape(-1).index_fill(0, entries, 0).view(x.shape)


def dropout(x: Tensor, p: float) -> Tensor:
    """``F.dropout(x, p)``, and that itself where a number of draws cannot vary (a compiled graph)
    or random numbers are under rules of their own (``torch.func``), and on a device."""
    if (
        not x.is_cpu
        or torch.compiler.is_compiling()
        or _C._functorch.peek_interpreter_stack() is not None
    ):
        return F.dropout(x, p)
    return zero_entries(x, draw_entries(x.numel(), p, seed(), x.device)) / (1 - p)
