"""AdaLoRA: ΔW = alpha / rank · B diag(E ⊙ mask) A, a trained singular value decomposition, whose
least important triplets (a value of E with its row of A and column of B) are masked. Zhang et al.
2023, arXiv:2303.10512.

B, E and A are P, Λ and Q in the paper. ``veneer.optim.RankBudget`` decides which triplets a layer
keeps, and writes 1 for these and 0 for others into ``mask``. ``veneer.optim.regulariser`` keeps A
and B nearly orthogonal. As in the paper, the gradient of E is computed as if there were no mask, so
that the importance of a masked triplet is still measured and the triplet may be unmasked later.
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
    """Normal A [g, r, in] and B [g, out, r], E [g, r] of zeros, and a mask [g, r] of ones. In the
    first training step, only E has a non-zero gradient, because E = 0 hides A and B."""
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
