"""The definition that every faster kernel must equal.

    y + scale · (x Aᵀ) Bᵀ        x: [*, in]   A: [r, in]   B: [out, r]   y: [*, out]

One ``addmm`` computes the product with B and the sum, and reads y once. ``y + (h @ Bᵀ) · scale``,
with h = x Aᵀ, would write two more tensors of the size of y.
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
    """``y + scale · (x Aᵀ) Bᵀ``, or only the second term if y is None. Differentiable in all
    tensors."""
    h = F.linear(x, A)  # [*, r]
    if y is None:
        return F.linear(h, B * scale)
    # Under autocast, h and y may have different dtypes, because some layers that compute y ignore
    # autocast.
    if torch.compiler.is_compiling():
        # `alpha` is a constant of a compiled graph, so another scale would compile another graph
        h, scale = h * scale, 1
    h = h.reshape(-1, h.shape[-1]).to(y.dtype)
    return torch.addmm(y.reshape(-1, y.shape[-1]), h, B.mT.to(y.dtype), alpha=scale).view(y.shape)


def gradients_of(
    function: Callable[..., Sequence[Tensor]],
    inputs: Sequence[Tensor | None],
    needs: Sequence[bool],
    gradients: Sequence[Tensor | None],
    dropout: float,
) -> list[Tensor | None]:
    """The gradients of ``inputs``, themselves differentiable, from the ``gradients`` of the outputs
    of ``function(*inputs)``. None for an input that needs no gradient.

    The function is called on aliases of the inputs. If a layer is called twice, its x may depend on
    its bias; that dependence is no part of this call's gradient."""
    if dropout:
        raise NotImplementedError(
            "a gradient of a gradient through dropout: call eval(), or set dropout to 0"
        )
    aliases = [None if tensor is None else tensor.view_as(tensor) for tensor in inputs]
    pairs = [
        pair for pair in zip(function(*aliases), gradients, strict=True) if pair[1] is not None
    ]
    outputs, output_gradients = zip(*pairs, strict=True)
    differentiated: Any = [alias for alias, need in zip(aliases, needs, strict=True) if need]
    input_gradients = iter(
        torch.autograd.grad(
            outputs, differentiated, output_gradients, create_graph=True, allow_unused=True
        )
    )
    return [next(input_gradients) if need else None for need in needs]


def round_once(values: Float[Tensor, "*shape"], dtype: torch.dtype) -> Float[Tensor, "*shape"]:
    """Round float64 values correctly (to nearest, ties to even) to ``dtype``.

    torch casts float64 to a 16-bit type through float32, which rounds twice: a value just above the
    middle of two 16-bit numbers is first rounded to the middle, then to the even number. Rounding
    to float32 "to odd" avoids this: an inexact result becomes the float32 neighbour whose last bit
    is 1, which is never such a middle (Boldo and Melquiond 2008, "Emulation of FMA and correctly
    rounded sums: proved algorithms using rounding to odd").
    """
    if dtype not in (torch.bfloat16, torch.float16):
        return values.to(dtype)
    nearest = values.float()
    needs_odd = (nearest.view(torch.int32) & 1) == 0
    needs_odd &= values != nearest
    needs_odd &= nearest.isfinite()
    direction = torch.where(values > nearest, torch.inf, -torch.inf).float()
    return torch.where(needs_odd, torch.nextafter(nearest, direction), nearest).to(dtype)
