"""The definition that every faster kernel must equal.

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
    """``y + scale · (x Aᵀ) Bᵀ``, differentiable in everything; only the second term if y is
    None."""
    h = F.linear(x, A)  # [*, r]
    if y is None:
        return F.linear(h, B * scale)
    # Under autocast, h and y may have different dtypes, because y may come from a layer that
    # autocast does not change.
    if torch.compiler.is_compiling():
        # `alpha` is a constant of a compiled graph, which would be compiled again for each adapter
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
    """The gradients of ``values`` from those of the outputs of ``function(*values)``, themselves
    differentiable. The function runs on aliases: x may depend on the bias if a layer is called
    twice, and that dependence is no part of this call's gradient."""
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
    """Round float64 values correctly (to nearest, ties to even) to ``dtype``.

    torch casts float64 to a 16-bit type through float32, which rounds twice: a value just above a
    tie of the 16-bit grid is first rounded to the tie, then to the even side. Rounding to float32
    "to odd" avoids this: an inexact result becomes the neighbour whose last bit is 1, which is
    never a tie (Boldo and Melquiond 2008, "Emulation of FMA and correctly rounded sums: proved
    algorithms using rounding to odd").
    """
    if dtype not in (torch.bfloat16, torch.float16):
        return values.to(dtype)
    nearest = values.float()
    moves = (nearest.view(torch.int32) & 1) == 0
    moves &= values != nearest
    moves &= nearest.isfinite()
    toward = torch.where(values > nearest, torch.inf, -torch.inf).float()
    return torch.where(moves, torch.nextafter(nearest, toward), nearest).to(dtype)
