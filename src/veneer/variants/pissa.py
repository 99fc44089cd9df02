"""PiSSA: ΔW = alpha / rank · (B A − B₀ A₀). The initial values A₀ = √S Vᵀ and B₀ = U √S consist of
the r largest singular values of W and their vectors. Meng et al. 2024, arXiv:2404.02948. alpha
defaults to 16, which gives the paper's scale of 1 at the default rank of 16.

    ΔW = scale · [B − B₀, B₀] @ [A ; A − A₀]        rank 2r, A₀ and B₀ frozen

The paper subtracts B₀ A₀ from the base weight. Here the base weight is never changed, so A₀ and B₀
are kept, and B₀ A₀ is subtracted in ΔW. [B, −B₀] @ [A ; A₀] would also give ΔW, but as a difference
of two large products, whose rounding error in 16 bits is as large as a small ΔW. In the form above,
ΔW is exactly zero before training.
"""

from __future__ import annotations

import torch
from torch import Tensor

from veneer.lowrank import LowRank
from veneer.variants._base import Base, InitContext, Parameters, Resolved, register
from veneer.variants._parts import balanced_factors, with_frozen_start
from veneer.variants.lora import LORA


def init(context: InitContext) -> dict[str, Tensor]:
    return with_frozen_start(*balanced_factors(context.base(), context.rank))


def resolve(parameters: Parameters, scale: float, base: Base) -> Resolved:
    A, B, A0, B0 = (parameters[name] for name in ("A", "B", "A0", "B0"))
    return LowRank(torch.cat([A, A - A0], dim=1), torch.cat([B - B0, B0], dim=2), scale), None


PISSA = register(
    LORA,
    name="pissa",
    paper="Meng et al. 2024, arXiv:2404.02948",
    default_alpha=16,
    init=init,
    resolve=resolve,
    frozen=frozenset({"A0", "B0"}),
)
