"""LoRA-XS: ΔW = alpha / rank · B R A with frozen A = Vᵀ and B = U S of the r largest singular values of W; only the
r × r matrix R is trained. Bałazy et al. 2024, arXiv:2405.17604.

R starts at zero (the paper: normal with deviation 1e-5), so that the attached model equals its base; its gradient
Bᵀ G Aᵀ is not zero there. alpha defaults to 16, which gives scale 1 at the default rank of 16.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from veneer.lowrank import LowRank
from veneer.variants._base import Base, InitContext, Variant, register
from veneer.variants._parts import own, principal


def init(start: InitContext) -> dict[str, Tensor]:
    """Frozen A [g, r, in] and B [g, out, r], and R [g, r, r], which has a gradient from the first step."""
    U, S, Vh = principal(start.base(), start.rank)
    A, B = own(Vh), own(U * S[..., None, :])
    return {"A": A, "B": B, "R": A.new_zeros(start.groups, start.rank, start.rank)}


def resolve(parameters: Mapping[str, Tensor], scale: float, base: Base) -> tuple[LowRank, Tensor | None]:
    return LowRank(parameters["A"], parameters["B"] @ parameters["R"], scale), None


LORA_XS = register(
    Variant(
        name="lora_xs",
        paper="Bałazy et al. 2024, arXiv:2405.17604",
        default_alpha=16,
        scale=lambda alpha, rank: alpha / rank,
        init=init,
        resolve=resolve,
        frozen=frozenset({"A", "B"}),
    )
)
