"""CorDA: ΔW = alpha / rank · (B A − B₀ A₀), from W as the layer's inputs see it: with C = Σ xᵀx of
the inputs,

    W C = U S Vᵀ        A₀ = √S Vᵀ C⁻¹        B₀ = U √S        of r singular values

``corda`` takes the largest, the directions that the data use, to learn their task (the paper's
instruction-previewed mode); ``corda_kpm`` the smallest, for data whose knowledge is to be kept,
here untouched (knowledge-preserved mode). Yang et al. 2024, arXiv:2406.05223; PEFT's
``init_lora_weights="corda"``. alpha defaults to 16: scale 1 at the default rank.

C is taken with mean diagonal 1, which moves size between A₀ and B₀ and nothing else, and damped by
0.01 as in the paper's code; the damping is doubled until C C⁻¹ is the identity.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from veneer.variants._base import InitContext, register
from veneer.variants._parts import minor, principal, split, with_start
from veneer.variants.pissa import PISSA

#: (matrix [g, out, in], rank) -> U [g, out, rank], S [g, rank], Vᵀ [g, rank, in]
Triplets = Callable[[Tensor, int], tuple[Tensor, Tensor, Tensor]]
#: what is added to the mean diagonal of C at first
DAMPING = 0.01
#: how far ‖C C⁻¹ − I‖ may be from 0
WITHIN = 0.05


def init(start: InitContext, triplets: Triplets = principal) -> dict[str, Tensor]:
    """From ``triplets`` of W C: the r largest, or the r smallest."""
    C, inverse = damped_moment(start.inputs())
    U, S, Vh = triplets(start.base().to(C) @ C, start.rank)
    return with_start(*split(U, S, Vh @ inverse))


def damped_moment(moment: Tensor) -> tuple[Tensor, Tensor]:
    """C and C⁻¹ [g, in, in] of a moment Σ xᵀx [g, in, in]. Inputs that are all zero have C = I."""
    eye = torch.eye(moment.shape[-1], dtype=moment.dtype, device=moment.device)
    mean = moment.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]
    C = moment / torch.where(mean == 0, torch.ones_like(mean), mean)
    damping = DAMPING
    while True:
        damped = C + damping * eye
        inverse = torch.linalg.inv(damped)
        if damped.is_meta or bool(((damped @ inverse - eye).flatten(1).norm(dim=1) < WITHIN).all()):
            return damped, inverse
        damping *= 2


PAPER = "Yang et al. 2024, arXiv:2406.05223"
register(PISSA, name="corda", paper=PAPER, init=init, needs=frozenset({"inputs"}))
register(
    PISSA,
    name="corda_kpm",
    paper=PAPER,
    init=partial(init, triplets=minor),
    needs=frozenset({"inputs"}),
)
