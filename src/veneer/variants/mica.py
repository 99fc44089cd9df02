"""MiCA: ΔW = alpha / rank · B @ A with frozen B, the left singular vectors of the r smallest
singular values of W; only A is trained. Rüdiger and Raschka 2026, arXiv:2604.01694; PEFT's
``init_lora_weights="mica"``.

A starts at zero, so that the attached model equals its base; its gradient Bᵀ G is not zero there.
The start costs a full SVD of each weight.
"""

from __future__ import annotations

from torch import Tensor

from veneer.variants._base import InitContext, register
from veneer.variants._parts import minor, own_float32
from veneer.variants.lora import LORA


def init(start: InitContext) -> dict[str, Tensor]:
    """A [g, r, in] zero, frozen B [g, out, r] with orthonormal columns."""
    U, _, _ = minor(start.base(), start.rank)
    B = own_float32(U)
    return {"A": B.new_zeros(start.groups, start.rank, start.in_), "B": B}


register(
    LORA,
    name="mica",
    paper="Rüdiger and Raschka 2026, arXiv:2604.01694",
    init=init,
    frozen=frozenset({"B"}),
)
