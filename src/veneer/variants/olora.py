"""OLoRA: ΔW = alpha / rank · (B A − B₀ A₀), from W = Q R: B₀ the first r columns of Q, which are orthonormal, A₀ the
first r rows of R. Büyükakyüz 2024, arXiv:2406.01775.

The paper trains B A on top of W − B₀ A₀; here W itself stays as it is. alpha defaults to 16, which gives scale 1, the
paper's, at the default rank of 16.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from veneer.variants._base import InitContext, register
from veneer.variants._parts import with_start
from veneer.variants.pissa import PISSA


def init(start: InitContext) -> dict[str, Tensor]:
    """A [g, r, in], B [g, out, r] and their frozen copies. All of A and B has a gradient from the first step."""
    W = start.base()
    Q, _ = torch.linalg.qr(W[..., : start.rank])  # the first columns of Q depend on the first columns of W alone
    return with_start(Q.mT @ W, Q)


OLORA = register(replace(PISSA, name="olora", paper="Büyükakyüz 2024, arXiv:2406.01775", init=init))
