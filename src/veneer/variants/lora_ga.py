"""LoRA-GA: ΔW = alpha / √rank · (B A − B₀ A₀). The initial values A₀ and B₀ are computed from the
gradient G = U S Vᵀ of the loss with respect to W, so that the first training step of A and B
changes W + ΔW nearly as a step of full fine-tuning changes W. Wang et al. 2024, arXiv:2407.05000,
algorithm 1.

    A₀ = ⁴√out / √γ · V[:, :r]ᵀ        B₀ = ⁴√out / √γ · U[:, r:2r]        γ = 16

alpha defaults to 16, as in the paper. If W has fewer than 2r singular values, B₀ takes the last r
of them. PEFT differs from the paper: it scales only B₀, and multiplies it by S too.
"""

from __future__ import annotations

import math

from torch import Tensor

from veneer.variants._base import InitContext, register
from veneer.variants._parts import principal_triplets, with_frozen_start
from veneer.variants.pissa import PISSA

#: γ, by which the paper sets the size of A₀ and B₀: they are proportional to 1 / √γ
GAMMA = 16


def init(context: InitContext) -> dict[str, Tensor]:
    U, _, Vh = principal_triplets(context.gradient(), 2 * context.rank)
    start_scale = context.out**0.25 / math.sqrt(GAMMA)
    return with_frozen_start(
        start_scale * Vh[:, : context.rank], start_scale * U[..., -context.rank :]
    )


register(
    PISSA,
    name="lora_ga",
    paper="Wang et al. 2024, arXiv:2407.05000",
    default_alpha=16,
    scale=lambda alpha, rank: alpha / math.sqrt(rank),
    init=init,
    needs=frozenset({"gradient"}),
)
