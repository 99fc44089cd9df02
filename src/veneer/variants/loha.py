"""LoHa: ΔW = alpha / rank · (B1 A1) ⊙ (B2 A2), an elementwise product whose rank may reach r².
Hyeon-Woo et al. 2021 (FedPara), arXiv:2108.06098; Yeh et al. 2023 (LyCORIS), arXiv:2309.14859.

    ΔW[i, j] = scale · Σₖₗ B1[i, k] B2[i, l] · A1[k, j] A2[l, j]

ΔW is therefore one product B @ A of rank r². Each row of this A is the elementwise product of a row
of A1 with a row of A2, and each column of B that of a column of B1 with a column of B2. The four
matrices start as in LyCORIS: B1 is normal with standard deviation 0.1, A1 and A2 with standard
deviation 1, and B2 is zero. alpha defaults to 1, also as in LyCORIS.
"""

from __future__ import annotations

import torch
from torch import Tensor

from veneer.lowrank import LowRank
from veneer.variants._base import Base, InitContext, Parameters, Resolved, register
from veneer.variants.lora import LORA


def init(context: InitContext) -> dict[str, Tensor]:
    """A1, A2 [g, r, in] and B1, B2 [g, out, r]. In the first training step, only B2, which is zero,
    has a non-zero gradient."""
    groups, out, in_, rank = context.groups, context.out, context.in_, context.rank
    return {
        "A1": torch.empty(groups, rank, in_).normal_(std=1),
        "B1": torch.empty(groups, out, rank).normal_(std=0.1),
        "A2": torch.empty(groups, rank, in_).normal_(std=1),
        "B2": torch.zeros(groups, out, rank),
    }


def resolve(parameters: Parameters, scale: float, base: Base) -> Resolved:
    A1, B1, A2, B2 = (parameters[name] for name in ("A1", "B1", "A2", "B2"))
    A = (A1[:, :, None, :] * A2[:, None, :, :]).flatten(1, 2)  # [g, r·r, in]
    B = (B1[:, :, :, None] * B2[:, :, None, :]).flatten(2, 3)  # [g, out, r·r]
    return LowRank(A, B, scale), None


register(
    LORA,
    name="loha",
    paper="Hyeon-Woo et al. 2021, arXiv:2108.06098; Yeh et al. 2023, arXiv:2309.14859",
    default_alpha=1,
    init=init,
    resolve=resolve,
)
