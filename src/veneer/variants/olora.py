"""OLoRA: ΔW = alpha / rank · (B A − B₀ A₀). The initial values come from the decomposition W = Q R:
B₀ is the first r columns of Q, which are orthonormal, and A₀ the first r rows of R. Büyükakyüz
2024, arXiv:2406.01775. alpha defaults to 16, which gives the paper's scale of 1 at the default rank
of 16.
"""

from __future__ import annotations

import torch
from torch import Tensor

from veneer.variants._base import InitContext, register
from veneer.variants._parts import with_frozen_start
from veneer.variants.pissa import PISSA


def init(context: InitContext) -> dict[str, Tensor]:
    W = context.base()
    # The first r columns of Q depend only on the first r columns of W, so only these are
    # decomposed.
    Q, _ = torch.linalg.qr(W[..., : context.rank])
    return with_frozen_start(Q.mT @ W, Q)


register(PISSA, name="olora", paper="Büyükakyüz 2024, arXiv:2406.01775", init=init)
