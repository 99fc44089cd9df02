"""LoftQ: ΔW starts as the best rank-r approximation of what quantising took from the weight, so
that base and adapter together start near the original. Li et al. 2023, arXiv:2310.08659.

    ΔW = B₀ A₀ + alpha / rank · (B A − B₀ A₀)        A₀ = √S Vᵀ, B₀ = U √S of original − base

This is one step of the paper's alternation, with the quantised base as it is. The start is B₀ A₀ at
every scale; the scale multiplies the step that training takes. The paper has none: alpha defaults
to 16, which gives scale 1 at the default rank of 16, and ΔW = B A of rank r. At other scales the
``LowRank`` has rank 2r.
"""

from __future__ import annotations

import torch
from torch import Tensor

from veneer.lowrank import LowRank
from veneer.variants._base import Base, InitContext, Parameters, Resolved, register
from veneer.variants._parts import balanced_factors, with_start
from veneer.variants.pissa import PISSA


def init(start: InitContext) -> dict[str, Tensor]:
    base = start.base()
    return with_start(*balanced_factors(start.original().to(base) - base, start.rank))


def resolve(parameters: Parameters, scale: float, base: Base) -> Resolved:
    A, B = parameters["A"], parameters["B"]
    if scale == 1:
        return LowRank(A, B, scale), None
    # scale · (B A + (1 / scale − 1) · B₀ A₀)
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
