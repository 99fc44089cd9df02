"""Dropout for a small probability: draw the entries that are dropped, not a random number for each.

A Poisson number of draws with replacement, with λ = -ln(1 - p) an entry, hits each entry a Poisson(λ) number of times,
independently of the others: it is missed with probability exp(-λ) = 1 - p (the colouring theorem of Poisson processes;
Kingman 1993, "Poisson Processes", section 5.1). That is exactly the distribution of a mask of independent entries, from
about p · count random numbers instead of count, and the indices are all that backward has to know.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_C: Any = torch._C

#: above this probability a mask is cheaper than indices
SPARSE = 0.3


def seed() -> int:
    """A seed for ``indices``, from torch's default generator."""
    return int(torch.randint(2**62, ()))


def indices(count: int, p: float, seed: int, device: torch.device) -> Tensor:
    """The entries that are dropped of ``count``: each with probability p, independently; in no order, some twice."""
    generator = torch.Generator(device).manual_seed(seed)
    if p > SPARSE:
        return (torch.rand(count, generator=generator, device=device) < p).nonzero().squeeze(1)
    mean = torch.tensor(-math.log1p(-p) * count, dtype=torch.float64, device=device)
    draws = int(torch.poisson(mean, generator=generator))
    return torch.randint(count, (draws,), generator=generator, device=device)


def zeroed(x: Tensor, p: float, seed: int) -> Tensor:
    """A copy of x, of any shape, with zeros in the entries that are dropped; not rescaled; differentiable."""
    return without(x, indices(x.numel(), p, seed, x.device))


def without(x: Tensor, dropped: Tensor) -> Tensor:
    """A copy of x, of any shape, with zeros in these entries; differentiable."""
    return x.reshape(-1).index_fill(0, dropped, 0).view(x.shape)


def dropout(x: Tensor, p: float) -> Tensor:
    """``F.dropout(x, p)``: zeros with probability p, the rest divided by 1 - p. Differentiable.

    A compiled graph cannot hold a number of draws that varies, and ``torch.func`` has its own rules for random numbers:
    there it is torch's own dropout.
    """
    if torch.compiler.is_compiling() or _C._functorch.peek_interpreter_stack() is not None:
        return F.dropout(x, p)
    return zeroed(x, p, seed()) / (1 - p)
