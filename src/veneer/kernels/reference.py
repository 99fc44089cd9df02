"""The low-rank update of a layer's output by plain torch operations: the definition that every
faster kernel must equal.

    y + scale · (x Aᵀ) Bᵀ        x: [*, in]   A: [r, in]   B: [out, r]   y: [*, out]

One ``addmm`` computes both the product with B and the sum, so y is read once, and of the tensors of
its size only the result is written. ``y + (h @ Bᵀ) · scale``, with h = x Aᵀ, would write two more.
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
    """``y + scale · (x Aᵀ) Bᵀ``, or ``scale · (x Aᵀ) Bᵀ`` if y is None. Differentiable in all
    tensors."""
    h = F.linear(x, A)  # [*, r]
    if y is None:
        return F.linear(h, B * scale)
    # Under autocast, h and y may have different dtypes, because some layers that compute y ignore
    # autocast; so h and B are cast to the dtype of y below.
    if torch.compiler.is_compiling():
        # `alpha` is a constant of a compiled graph, so each new scale would compile a new graph. h
        # is scaled instead.
        h, scale = h * scale, 1
    h = h.reshape(-1, h.shape[-1]).to(y.dtype)
    return torch.addmm(y.reshape(-1, y.shape[-1]), h, B.mT.to(y.dtype), alpha=scale).view(y.shape)


def gradients_of(
    function: Callable[..., Sequence[Tensor]],
    inputs: Sequence[Tensor | None],
    needs_gradient: Sequence[bool],
    output_gradients: Sequence[Tensor | None],
    drop_probability: float,
) -> list[Tensor | None]:
    """The gradients of ``inputs`` through ``function(*inputs)``, computed with a graph, so that
    they can be differentiated again.

    Args:
        needs_gradient: for each input, whether to compute its gradient; if not, the result is None.
        output_gradients: the gradient of each output of ``function``; None counts as zero.
        drop_probability: the dropout probability of the layer, which must be 0.

    Raises:
        NotImplementedError: if ``drop_probability`` is not 0.
    """
    if drop_probability:
        raise NotImplementedError(
            "a gradient of a gradient through dropout: call eval(), or set dropout to 0"
        )
    # The function gets aliases of the inputs, so that only its own use of them is differentiated.
    # An x that an earlier call of the same layer computed depends on the bias too, for example.
    aliases = [None if tensor is None else tensor.view_as(tensor) for tensor in inputs]
    outputs_with_gradients = [
        pair
        for pair in zip(function(*aliases), output_gradients, strict=True)
        if pair[1] is not None
    ]
    outputs, known_gradients = zip(*outputs_with_gradients, strict=True)
    differentiated: Any = [
        alias for alias, need in zip(aliases, needs_gradient, strict=True) if need
    ]
    input_gradients = iter(
        torch.autograd.grad(
            outputs, differentiated, known_gradients, create_graph=True, allow_unused=True
        )
    )
    return [next(input_gradients) if need else None for need in needs_gradient]


def round_once(values: Float[Tensor, "*shape"], dtype: torch.dtype) -> Float[Tensor, "*shape"]:
    """``values`` (float64) in ``dtype``, rounded to nearest, ties to even.

    torch casts float64 to a 16-bit type through float32, which rounds twice: a value just above the
    middle of two 16-bit numbers is first rounded to the middle, then to the even number. The code
    therefore rounds to float32 "to odd" first: an inexact result becomes the float32 neighbour
    whose last bit is 1, which is never the middle of two 16-bit numbers (Boldo and Melquiond 2008,
    "Emulation of FMA and correctly rounded sums: proved algorithms using rounding to odd").
    """
    if dtype not in (torch.bfloat16, torch.float16):
        return values.to(dtype)
    nearest = values.float()
    needs_odd = (nearest.view(torch.int32) & 1) == 0
    needs_odd &= values != nearest
    needs_odd &= nearest.isfinite()
    direction = torch.where(values > nearest, torch.inf, -torch.inf).float()
    return torch.where(needs_odd, torch.nextafter(nearest, direction), nearest).to(dtype)
