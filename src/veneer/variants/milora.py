"""MiLoRA: ΔW = alpha / rank · (B A − B₀ A₀). The start A₀ = √S Vᵀ, B₀ = U √S consists of the r
smallest singular values of W. Training leaves the largest ones unchanged, which hold most of what W
knows. Wang et al. 2024, arXiv:2406.09044. alpha defaults to 16: scale 1 at the default rank.

The initialisation takes a full SVD of each weight: seconds for a shorter side of 2,048, and 8 times
as long for twice that side.
"""

from __future__ import annotations

from torch import Tensor

from veneer.variants._base import InitContext, register
from veneer.variants._parts import factors_from_triplets, minor_triplets, with_frozen_start
from veneer.variants.pissa import PISSA


def init(context: InitContext) -> dict[str, Tensor]:
    return with_frozen_start(*factors_from_triplets(*minor_triplets(context.base(), context.rank)))


register(PISSA, name="milora", paper="Wang et al. 2024, arXiv:2406.09044", init=init)
