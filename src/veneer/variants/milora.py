"""MiLoRA: ΔW = alpha / rank · (B A − B₀ A₀). The initial values A₀ = √S Vᵀ and B₀ = U √S consist of
the r smallest singular values of W and their vectors, so that training changes mainly these, and
hardly the largest ones, which hold most of what the model knows. Wang et al. 2024,
arXiv:2406.09044.

alpha defaults to 16, which is scale 1 at the default rank of 16. The initialisation computes a full
SVD of each weight. It takes seconds for a shorter side of 2,048, and 8 times as long for twice that
side.
"""

from __future__ import annotations

from torch import Tensor

from veneer.variants._base import InitContext, register
from veneer.variants._parts import factors_from_triplets, minor_triplets, with_frozen_start
from veneer.variants.pissa import PISSA


def init(context: InitContext) -> dict[str, Tensor]:
    return with_frozen_start(*factors_from_triplets(*minor_triplets(context.base(), context.rank)))


register(PISSA, name="milora", paper="Wang et al. 2024, arXiv:2406.09044", init=init)
