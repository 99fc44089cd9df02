"""AdaLoRA: ΔW = alpha / rank · B diag(E ⊙ mask) A, a singular value decomposition that is trained.
Its least important triplets (a value in E with its row of A and column of B) are masked. Zhang et
al. 2023, arXiv:2303.10512.

The paper calls B, E and A by P, Λ and Q. ``veneer.optim.RankBudget`` decides which triplets a layer
keeps, by writing 0 or 1 into ``mask``; ``veneer.optim.regulariser`` keeps A and B near orthogonal.
As in the paper, the gradient of E ignores the mask: the importance of a masked triplet is still
measured, and the triplet may be unmasked.
"""

from __future__ import annotations

import torch
from torch import Tensor

from veneer.lowrank import LowRank
from veneer.variants._base import Base, InitContext, Parameters, Resolved, register
from veneer.variants.lora import LORA

#: standard deviation of the initial A and B
INIT_STD = 0.02


def init(context: InitContext) -> dict[str, Tensor]:
    """Normal A [g, r, in] and B [g, out, r], E [g, r] of zeros, and a mask [g, r] of ones. E has a
    gradient in the first step, A and B from the second step on."""
    return {
        "A": torch.empty(context.groups, context.rank, context.in_).normal_(std=INIT_STD),
        "B": torch.empty(context.groups, context.out, context.rank).normal_(std=INIT_STD),
        "E": torch.zeros(context.groups, context.rank),
        "mask": torch.ones(context.groups, context.rank),
    }


def resolve(parameters: Parameters, scale: float, base: Base) -> Resolved:
    E = parameters["E"]
    # The value is E ⊙ mask. The gradient passes to E as if there were no mask.
    singular_values = E + (E * parameters["mask"] - E).detach()
    return LowRank(parameters["A"], parameters["B"] * singular_values[:, None, :], scale), None


register(
    LORA,
    name="adalora",
    paper="Zhang et al. 2023, arXiv:2303.10512",
    init=init,
    resolve=resolve,
    frozen=frozenset({"mask"}),
)
