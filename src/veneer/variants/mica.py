"""MiCA: ΔW = alpha / rank · B @ A. B is frozen and consists of the left singular vectors of the r
smallest singular values of W; only A is trained. Rüdiger and Raschka 2026, arXiv:2604.01694; PEFT's
``init_lora_weights="mica"``.

A starts at zero, so that ΔW is zero before training. A learns from zero too, because its gradient
is Bᵀ G, with the gradient G of W. The initialisation computes a full SVD of each weight.
"""

from __future__ import annotations

from torch import Tensor

from veneer.variants._base import InitContext, register
from veneer.variants._parts import copy_float32, minor_triplets
from veneer.variants.lora import LORA


def init(context: InitContext) -> dict[str, Tensor]:
    """A [g, r, in] of zeros, and B [g, out, r] with orthonormal columns, which is frozen."""
    U, _, _ = minor_triplets(context.base(), context.rank)
    B = copy_float32(U)
    return {"A": B.new_zeros(context.groups, context.rank, context.in_), "B": B}


register(
    LORA,
    name="mica",
    paper="Rüdiger and Raschka 2026, arXiv:2604.01694",
    init=init,
    frozen=frozenset({"B"}),
)
