"""AdaLoRA: ΔW = alpha / rank · B diag(E ⊙ mask) A: a singular value decomposition P Λ Q that is
trained, and from which triplets are taken away. Zhang et al. 2023, arXiv:2303.10512.

B is the paper's P, A its Q, E its Λ. ``veneer.optim.RankBudget`` decides which triplets a layer
keeps, by writing 0 or 1 into ``mask``; ``veneer.optim.regulariser`` keeps A and B near orthogonal.
The gradient of E ignores the mask, as the paper's does: a triplet that was taken away goes on being
judged, and may come back.
"""

from __future__ import annotations

import torch
from torch import Tensor

from veneer.lowrank import LowRank
from veneer.variants._base import Base, InitContext, Parameters, Resolved, register
from veneer.variants.lora import LORA

DEVIATION = 0.02


def init(start: InitContext) -> dict[str, Tensor]:
    """A [g, r, in] and B [g, out, r] normal, E [g, r] zero, mask [g, r] ones. E has a gradient at
    the first step, A and B from the second."""
    return {
        "A": torch.empty(start.groups, start.rank, start.in_).normal_(std=DEVIATION),
        "B": torch.empty(start.groups, start.out, start.rank).normal_(std=DEVIATION),
        "E": torch.zeros(start.groups, start.rank),
        "mask": torch.ones(start.groups, start.rank),
    }


def resolve(parameters: Parameters, scale: float, base: Base) -> Resolved:
    E = parameters["E"]
    # E ⊙ mask exactly, with the gradient of E
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
