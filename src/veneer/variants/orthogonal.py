"""Orthogonal start: ΔW = alpha / rank · B @ A with both factors random and B @ A = 0, as the rows
of A and the columns of B use orthogonal halves of the bottleneck. PEFT's
``init_lora_weights="orthogonal"``; Datta, https://datta0.github.io/posts/rethink-lora-init.

PEFT turns the bottleneck by a random rotation Q: A = (Y Q[0::2])ᵀ / 10, B = Xᵀ Q[1::2] / 10, with X
and Y normal. There B @ A is zero up to rounding, which is no longer small in 16 bits, and only even
ranks have two halves. Here Q is the identity, which spans the same directions: the first ⌈r / 2⌉
rows of A and the other columns of B are normal with deviation 0.1, the rest is zero, and B @ A is
exactly zero at every rank.
"""

from __future__ import annotations

import torch
from torch import Tensor

from veneer.variants._base import InitContext, register
from veneer.variants.lora import LORA

DEVIATION = 0.1


def init(start: InitContext) -> dict[str, Tensor]:
    """A [g, r, in] and B [g, out, r]. The zero halves have a gradient at the first step, the others
    from the second."""
    A = torch.zeros(start.groups, start.rank, start.in_)
    B = torch.zeros(start.groups, start.out, start.rank)
    half = (start.rank + 1) // 2
    A[:, :half].normal_(std=DEVIATION)
    B[..., half:].normal_(std=DEVIATION)
    return {"A": A, "B": B}


register(
    LORA,
    name="orthogonal",
    paper="Datta, https://datta0.github.io/posts/rethink-lora-init",
    init=init,
)
