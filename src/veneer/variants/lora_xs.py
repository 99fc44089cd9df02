"""LoRA-XS: ΔW = alpha / rank · B R A with frozen A = Vᵀ and B = U S of the r largest singular
values of W; only the r × r matrix R is trained. Bałazy et al. 2024, arXiv:2405.17604.

R starts at zero (the paper: normal with deviation 1e-5), so that the attached model equals its
base; its gradient Bᵀ G Aᵀ is not zero there. alpha defaults to 16: scale 1 at the default rank.
"""

from __future__ import annotations

from torch import Tensor

from veneer.lowrank import LowRank
from veneer.variants._base import Base, InitContext, Parameters, Resolved, register
from veneer.variants._parts import own_float32, principal
from veneer.variants.lora import LORA


def init(start: InitContext) -> dict[str, Tensor]:
    """Frozen A [g, r, in] and B [g, out, r], and R [g, r, r], which has a gradient from the first
    step."""
    U, S, Vh = principal(start.base(), start.rank)
    A, B = own_float32(Vh), own_float32(U * S[..., None, :])
    return {"A": A, "B": B, "R": A.new_zeros(start.groups, start.rank, start.rank)}


def resolve(parameters: Parameters, scale: float, base: Base) -> Resolved:
    return LowRank(parameters["A"], parameters["B"] @ parameters["R"], scale), None


register(
    LORA,
    name="lora_xs",
    paper="Bałazy et al. 2024, arXiv:2405.17604",
    default_alpha=16,
    init=init,
    resolve=resolve,
    frozen=frozenset({"A", "B"}),
)
