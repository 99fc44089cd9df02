"""MiLoRA: ΔW = alpha / rank · (B A − B₀ A₀), from the minor part of W: A₀ = √S Vᵀ, B₀ = U √S of its
r smallest singular values, so that what W knows well is left alone. Wang et al. 2024,
arXiv:2406.09044. alpha defaults to 16: scale 1 at the default rank.

The start costs a full SVD of each weight: seconds at 2,048, and the cube of it beyond.
"""

from __future__ import annotations

from torch import Tensor

from veneer.variants._base import InitContext, register
from veneer.variants._parts import minor, split, with_start
from veneer.variants.pissa import PISSA


def init(start: InitContext) -> dict[str, Tensor]:
    return with_start(*split(*minor(start.base(), start.rank)))


register(PISSA, name="milora", paper="Wang et al. 2024, arXiv:2406.09044", init=init)
