"""LoRA-GA: ΔW = alpha / √rank · (B A − B₀ A₀), from the gradient G = U S Vᵀ of the loss by W, so
that the first step of A and B moves W as a step of full fine-tuning would. Wang et al. 2024,
arXiv:2407.05000, algorithm 1.

    A₀ = ⁴√out / √γ · V[:, :r]ᵀ        B₀ = ⁴√out / √γ · U[:, r:2r]        γ = 16

alpha defaults to 16, the paper's. Where W has fewer than 2r singular values, B₀ takes the last r of
those there are. PEFT differs from the paper: it scales B₀ alone, and by S too.
"""

from __future__ import annotations

import math

from torch import Tensor

from veneer.variants._base import InitContext, register
from veneer.variants._parts import principal, with_start
from veneer.variants.pissa import PISSA

#: γ of the stable scale: the smaller it is, the larger the start
GAMMA = 16


def init(start: InitContext) -> dict[str, Tensor]:
    U, _, Vh = principal(start.gradient(), 2 * start.rank)
    size = start.out**0.25 / math.sqrt(GAMMA)
    return with_start(size * Vh[:, : start.rank], size * U[..., -start.rank :])


register(
    PISSA,
    name="lora_ga",
    paper="Wang et al. 2024, arXiv:2407.05000",
    default_alpha=16,
    scale=lambda alpha, rank: alpha / math.sqrt(rank),
    init=init,
    needs=frozenset({"gradient"}),
)
