"""Orthogonal initialisation: ΔW = alpha / rank · B @ A. Both factors start random, but B @ A starts
at zero, because the random rows of A meet the zero columns of B. PEFT's
``init_lora_weights="orthogonal"``; Datta, https://datta0.github.io/posts/rethink-lora-init.

The first ⌈r / 2⌉ rows of A, and all columns of B but the first ⌈r / 2⌉, are normal with standard
deviation 0.1. All other elements are zero, so B @ A is exactly zero at every rank. PEFT also
rotates the r values between A and B by a random orthogonal matrix Q: A = (Y Q[0::2])ᵀ / 10 and
B = Xᵀ Q[1::2] / 10, where X and Y are normal. With this rotation, B @ A is zero only up to
rounding, which is large in 16 bits, and odd ranks are impossible.
"""

from __future__ import annotations

import torch
from torch import Tensor

from veneer.variants._base import InitContext, register
from veneer.variants.lora import LORA

#: standard deviation of the random elements
INIT_STD = 0.1


def init(context: InitContext) -> dict[str, Tensor]:
    """A [g, r, in] and B [g, out, r], each with one random half and one half of zeros. In the first
    training step, only the halves of zeros have a non-zero gradient."""
    A = torch.zeros(context.groups, context.rank, context.in_)
    B = torch.zeros(context.groups, context.out, context.rank)
    half_rank = (context.rank + 1) // 2
    A[:, :half_rank].normal_(std=INIT_STD)
    B[..., half_rank:].normal_(std=INIT_STD)
    return {"A": A, "B": B}


register(
    LORA,
    name="orthogonal",
    paper="Datta, https://datta0.github.io/posts/rethink-lora-init",
    init=init,
)
