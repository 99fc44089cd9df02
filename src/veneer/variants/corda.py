"""CorDA: ΔW = alpha / rank · (B A − B₀ A₀). The start A₀, B₀ comes from a singular value
decomposition of W that is weighted by the layer's inputs x. With C = Σ xᵀx:

    W C = U S Vᵀ        A₀ = √S Vᵀ C⁻¹        B₀ = U √S        of r singular values

``corda`` takes the r largest singular values of W C. Their directions are those that the data use,
so training learns the task of the data (the paper's instruction-previewed mode). ``corda_kpm``
takes the r smallest, so that training preserves the knowledge that the data need (the paper's
knowledge-preserved mode). Yang et al. 2024, arXiv:2406.05223; PEFT's ``init_lora_weights="corda"``.
alpha defaults to 16, which is scale 1 at the default rank.

C is divided by the mean of its diagonal. This changes the norms of A₀ and B₀, but not their
product. C is also damped: 0.01 times the identity is added as in the paper's code, and this amount
is doubled until C C⁻¹ is the identity up to rounding.
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

#: (matrix [g, out, in], rank) -> U [g, out, rank], S [g, rank], Vᵀ [g, rank, in]
Triplets = Callable[[Tensor, int], tuple[Tensor, Tensor, Tensor]]
#: the first damping, relative to the mean diagonal of C
FIRST_DAMPING = 0.01
#: the largest accepted ‖C C⁻¹ − I‖
MAX_INVERSE_ERROR = 0.05


def init(context: InitContext, triplets: Triplets = principal_triplets) -> dict[str, Tensor]:
    """A₀ and B₀ from ``triplets`` of W C, which are the r largest or the r smallest."""
    C, inverse = damped_moment(context.inputs())
    U, S, Vh = triplets(context.base().to(C) @ C, context.rank)
    return with_frozen_start(*factors_from_triplets(U, S, Vh @ inverse))


def damped_moment(moment: Tensor) -> tuple[Tensor, Tensor]:
    """The damped C and its inverse, [g, in, in], for ``moment`` = Σ xᵀx. If all x are 0, C is I."""
    eye = torch.eye(moment.shape[-1], dtype=moment.dtype, device=moment.device)
    mean = moment.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]
    C = moment / torch.where(mean == 0, torch.ones_like(mean), mean)
    damping = FIRST_DAMPING
    while True:
        damped = C + damping * eye
        inverse = torch.linalg.inv(damped)
        errors = (damped @ inverse - eye).flatten(1).norm(dim=1)
        if damped.is_meta or bool((errors < MAX_INVERSE_ERROR).all()):
            return damped, inverse
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
