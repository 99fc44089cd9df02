"""The truth that every faster kernel must equal.

    y + scale · (x Aᵀ) Bᵀ        x: [*, in]   A: [r, in]   B: [out, r]   y: [*, out]

The product with B and the sum are one ``addmm``, which reads y once; ``y + (h @ Bᵀ) · scale``
writes two more tensors of y's size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

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
    # Under autocast h may be of another dtype than y, as y may come from a layer that autocast
    # leaves alone.
    if torch.compiler.is_compiling():
        # `alpha` is a constant of a compiled graph, which each adapter would compile anew
        h, scale = (
            h * scale,
            1,
        )
    h = h.reshape(-1, h.shape[-1]).to(y.dtype)
    return torch.addmm(y.reshape(-1, y.shape[-1]), h, B.mT.to(y.dtype), alpha=scale).view(y.shape)


def gradients_of(
    function: Callable[..., Sequence[Tensor]],
    values: Sequence[Tensor | None],
    needs: Sequence[bool],
    gradients: Sequence[Tensor | None],
    dropout: float,
) -> list[Tensor | None]:
    """The gradients of ``values`` from those of the outputs of ``function(*values)``, as functions
    that have gradients themselves. It runs on aliases: x may itself depend on the bias, if a layer
    is called twice, and that is not this call's part of its gradient."""
    if dropout:
        raise NotImplementedError(
            "a gradient of a gradient through dropout: call eval(), or set dropout to 0"
        )
    aliases = [None if tensor is None else tensor.view_as(tensor) for tensor in values]
    pairs = [
        pair for pair in zip(function(*aliases), gradients, strict=True) if pair[1] is not None
    ]
    outputs, output_gradients = zip(*pairs, strict=True)
    wanted: Any = [value for value, need in zip(aliases, needs, strict=True) if need]
    computed = iter(
        torch.autograd.grad(outputs, wanted, output_gradients, create_graph=True, allow_unused=True)
    )
    return [next(computed) if need else None for need in needs]


def round_once(values: Float[Tensor, "*shape"], dtype: torch.dtype) -> Float[Tensor, "*shape"]:
    """float64 values, correctly rounded (to nearest, ties to even) to ``dtype``.

    torch casts float64 to a 16-bit type through float32, which rounds twice: a value just above a
    tie of the 16-bit grid first lands on the tie, then goes to the even side. Rounding to float32
    "to odd" keeps the information that decides: an inexact result takes the neighbour whose last
    bit is 1, so that it never looks like a tie (Boldo and Melquiond 2008, "Emulation of FMA and
    correctly rounded sums: proved algorithms using rounding to odd").
    """
    if dtype not in (torch.bfloat16, torch.float16):
        return values.to(dtype)
    nearest = values.float()
    moves = (nearest.view(torch.int32) & 1) == 0
    moves &= values != nearest
    moves &= nearest.isfinite()
    toward = torch.where(values > nearest, torch.inf, -torch.inf).float()
    return torch.where(moves, torch.nextafter(nearest, toward), nearest).to(dtype)
