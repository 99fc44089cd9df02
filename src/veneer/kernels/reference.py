"""The truth that every faster kernel must equal.

    y + scale · (x Aᵀ) Bᵀ        x: [*, in]   A: [r, in]   B: [out, r]   y: [*, out]

The product with B and the sum are one ``addmm``, which reads y once; ``y + (h @ Bᵀ) · scale`` writes two more tensors
of y's size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def matmul_update(
    x: Float[Tensor, "*tokens in_"],
    A: Float[Tensor, "r in_"],
    B: Float[Tensor, "out r"],
    scale: float,
    y: Float[Tensor, "*tokens out"] | None = None,
) -> Float[Tensor, "*tokens out"]:
    """``y + scale · (x Aᵀ) Bᵀ``, differentiable in everything; without y the second term alone."""
    h = F.linear(x, A)  # [*, r]
    if y is None:
        return F.linear(h, B * scale)
    # Under autocast h may be of another dtype than y, as y may come from a layer that autocast leaves alone.
    if torch.compiler.is_compiling():
        h, scale = h * scale, 1  # `alpha` is a constant of a compiled graph, which each adapter would compile anew
    flat = torch.addmm(
        y.reshape(-1, y.shape[-1]), h.reshape(-1, h.shape[-1]).to(y.dtype), B.mT.to(y.dtype), alpha=scale
    )
    return flat.view(y.shape)


def round_once(values: Float[Tensor, "*shape"], dtype: torch.dtype) -> Float[Tensor, "*shape"]:
    """float64 values, correctly rounded (to nearest, ties to even) to ``dtype``.

    torch casts float64 to a 16-bit type through float32, which rounds twice: a value just above a tie of the 16-bit
    grid first lands on the tie, then goes to the even side. Rounding to float32 "to odd" keeps the information that
    decides: an inexact result takes the neighbour whose last bit is 1, so that it never looks like a tie (Boldo and
    Melquiond 2008, "Emulation of FMA and correctly rounded sums: proved algorithms using rounding to odd").
    """
    if dtype not in (torch.bfloat16, torch.float16):
        return values.to(dtype)
    nearest = values.float()
    error = values - nearest.double()
    even = (nearest.view(torch.int32) & 1) == 0
    toward = torch.where(error > 0, torch.inf, -torch.inf).float()
    odd = torch.where((error != 0) & even & nearest.isfinite(), torch.nextafter(nearest, toward), nearest)
    return odd.to(dtype)
