"""CorDA: ΔW = alpha / rank · (B A − B₀ A₀). The initial values A₀ and B₀ of A and B come from a
singular value decomposition of W, weighted by the layer's inputs x. With C = Σ xᵀx:

    W C = U S Vᵀ        A₀ = √S Vᵀ C⁻¹        B₀ = U √S        of r singular values

``corda`` takes the r largest singular values of W C. Their directions are those that the
calibration data use most, so training adapts to the task of these data (the paper's
instruction-previewed mode). ``corda_kpm`` takes the r smallest, so that training leaves the
directions that the data use unchanged, and so preserves knowledge (the paper's knowledge-preserved
mode). Yang et al. 2024, arXiv:2406.05223; PEFT's ``init_lora_weights="corda"``. alpha defaults to
16, which is scale 1 at the default rank.

C is divided by the mean of its diagonal, which changes the norms of A₀ and B₀, but not B₀ A₀. Then
C is damped, so that it can be inverted: 0.01 times the identity is added, as in the paper's code,
and this amount is doubled until C C⁻¹ is the identity up to rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from veneer.variants._base import InitContext, register
from veneer.variants._parts import (
    factors_from_triplets,
    minor_triplets,
    principal_triplets,
    with_frozen_start,
)
from veneer.variants.pissa import PISSA

#: a function (matrix [g, out, in], rank) -> singular vectors and values U [g, out, rank], S
#: [g, rank], Vᵀ [g, rank, in]
Triplets = Callable[[Tensor, int], tuple[Tensor, Tensor, Tensor]]
#: the first multiple of the identity that is added to C, whose mean diagonal is 1
FIRST_DAMPING = 0.01
#: the largest accepted ‖C C⁻¹ − I‖
MAX_INVERSE_ERROR = 0.05


def init(context: InitContext, triplets: Triplets = principal_triplets) -> dict[str, Tensor]:
    """A and B, and frozen copies A0 and B0, from r singular triplets of W C: the largest, or others
    that ``triplets`` chooses."""
    C, C_inverse = damped_moment(context.inputs())
    U, S, Vh = triplets(context.base().to(C) @ C, context.rank)
    return with_frozen_start(*factors_from_triplets(U, S, Vh @ C_inverse))


def damped_moment(moment: Tensor) -> tuple[Tensor, Tensor]:
    """(C, its inverse), each [g, in, in]: C is ``moment`` = Σ xᵀx [g, in, in], divided by the mean
    of its diagonal, plus the smallest tried multiple of the identity with which it can be inverted.
    If all x are 0, C is a multiple of the identity."""
    identity = torch.eye(moment.shape[-1], dtype=moment.dtype, device=moment.device)
    mean_diagonal = moment.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]
    C = moment / torch.where(mean_diagonal == 0, torch.ones_like(mean_diagonal), mean_diagonal)
    damping = FIRST_DAMPING
    while True:
        damped = C + damping * identity
        damped_inverse = torch.linalg.inv(damped)
        inverse_errors = (damped @ damped_inverse - identity).flatten(1).norm(dim=1)
        if damped.is_meta or bool((inverse_errors < MAX_INVERSE_ERROR).all()):
            return damped, damped_inverse
        damping *= 2


PAPER = "Yang et al. 2024, arXiv:2406.05223"
register(PISSA, name="corda", paper=PAPER, init=init, needs=frozenset({"inputs"}))
register(
    PISSA,
    name="corda_kpm",
    paper=PAPER,
    init=partial(init, triplets=minor_triplets),
    needs=frozenset({"inputs"}),
)
