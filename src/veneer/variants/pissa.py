"""PiSSA: ΔW = alpha / rank · (B A − B₀ A₀), from the principal part of W: A₀ = √S Vᵀ, B₀ = U √S of its r largest
singular values. Meng et al. 2024, arXiv:2404.02948.

The paper trains B A on top of the residual W − B₀ A₀, which is the same weight; here W itself stays as it is. It uses
alpha = rank: alpha defaults to 16, which gives scale 1 at the default rank of 16. At another scale s the trained part
is s · B A, and s multiplies the step that training takes, as for ``lora``.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from veneer.lowrank import LowRank
from veneer.variants._base import Base, InitContext, Variant, register
from veneer.variants._parts import balanced, since_start, with_start


def init(start: InitContext) -> dict[str, Tensor]:
    """A [g, r, in], B [g, out, r] and their frozen copies. All of A and B has a gradient from the first step."""
    return with_start(*balanced(start.base(), start.rank))


def resolve(parameters: Mapping[str, Tensor], scale: float, base: Base) -> tuple[LowRank, Tensor | None]:
    return since_start(parameters, scale), None


PISSA = register(
    Variant(
        name="pissa",
        paper="Meng et al. 2024, arXiv:2404.02948",
        default_alpha=16,
        scale=lambda alpha, rank: alpha / rank,
        init=init,
        resolve=resolve,
        frozen=frozenset({"A0", "B0"}),
    )
)
