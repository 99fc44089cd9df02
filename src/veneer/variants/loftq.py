"""LoftQ: ΔW starts as the best rank-r approximation of the weight's quantisation error, so that
base and adapter together start near the original weight. Li et al. 2023, arXiv:2310.08659.

    ΔW = B₀ A₀ + alpha / rank · (B A − B₀ A₀)
    A₀ = √S Vᵀ and B₀ = U √S, from the r largest singular values of original − base

A₀ and B₀ are the initial values of A and B. The paper alternates several times between quantising
the base and approximating the error; here each is done once. ΔW starts as B₀ A₀ at every scale
(alpha / rank), because the scale multiplies only what training changes. The paper has no scale.
alpha defaults to 16, which is scale 1 at the default rank of 16; then ΔW = B A has rank r. At other
scales, ΔW has rank up to 2r.
"""

from __future__ import annotations

import torch
from torch import Tensor

from veneer.lowrank import LowRank
from veneer.variants._base import Base, InitContext, Parameters, Resolved, register
from veneer.variants._parts import balanced_factors, with_frozen_start
from veneer.variants.pissa import PISSA


def init(context: InitContext) -> dict[str, Tensor]:
    base = context.base()
    return with_frozen_start(*balanced_factors(context.original().to(base) - base, context.rank))


def resolve(parameters: Parameters, scale: float, base: Base) -> Resolved:
    A, B = parameters["A"], parameters["B"]
    if scale == 1:
        return LowRank(A, B, scale), None
    # B₀ A₀ + scale · (B A − B₀ A₀) = scale · (B A + (1 / scale − 1) · B₀ A₀)
    A = torch.cat([A, parameters["A0"]], dim=1)
    return LowRank(A, torch.cat([B, (1 / scale - 1) * parameters["B0"]], dim=2), scale), None


register(
    PISSA,
    name="loftq",
    paper="Li et al. 2023, arXiv:2310.08659",
    init=init,
    resolve=resolve,
    needs=frozenset({"original"}),
    exact_start=False,
)
