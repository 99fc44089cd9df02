"""LoRA-XS: ΔW = alpha / rank · B R A, with frozen A = Vᵀ and B = U S from the r largest singular
values of W. Only the r × r matrix R is trained. Bałazy et al. 2024, arXiv:2405.17604.

R starts at zero, so that ΔW is zero before training; in the paper, R starts normal with standard
deviation 1e-5. R learns from zero too, because its gradient is Bᵀ G Aᵀ, with the gradient G of W.
alpha defaults to 16, which is scale 1 at the default rank.
"""

from __future__ import annotations

from torch import Tensor

from veneer.lowrank import LowRank
from veneer.variants._base import Base, InitContext, Parameters, Resolved, register
from veneer.variants._parts import copy_float32, principal_triplets
from veneer.variants.lora import LORA


def init(context: InitContext) -> dict[str, Tensor]:
    """A [g, r, in] and B [g, out, r], which are frozen, and R [g, r, r] of zeros, which is
    trained."""
    U, S, Vh = principal_triplets(context.base(), context.rank)
    A, B = copy_float32(Vh), copy_float32(U * S[..., None, :])
    return {"A": A, "B": B, "R": A.new_zeros(context.groups, context.rank, context.rank)}


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
