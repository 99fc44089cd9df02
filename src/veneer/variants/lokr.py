"""LoKr: ΔW = alpha / rank · C ⊗ (B2 A2), a Kronecker product of a small full matrix with a low-rank
one. Edalati et al. 2022 (KronA), arXiv:2212.10650; Yeh et al. 2023 (LyCORIS), arXiv:2309.14859.

    out = l · k, in = m · n     C: [g, l, m]   B2: [g, k, q]   A2: [g, q, n]
    l ≤ k and m ≤ n: the two factors of out, and of in, that are closest to each other

With I the identity, C ⊗ (B2 A2) = (C ⊗ B2)(I ⊗ A2) = (I ⊗ B2)(C ⊗ A2): one ``LowRank`` of rank
min(l, m) · q. q is the rank, but at most min(k, n), because a larger q could express no more (at
such ranks, LyCORIS trains one full matrix in place of B2 A2). C and A2 start Kaiming-uniform, so
that their product is as large as LoRA's A. B2 starts at zero, as LoRA's B does (LyCORIS sets the
other factor to zero). For a convolution, ``in`` counts the positions of the kernel too.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from veneer.lowrank import LowRank
from veneer.variants._base import Base, InitContext, Parameters, Resolved, register
from veneer.variants.lora import LORA


def closest_factors(length: int) -> tuple[int, int]:
    """The (a, b) with a · b = ``length`` and a ≤ b that are closest to each other. For a prime,
    this is (1, length)."""
    small = next(a for a in range(math.isqrt(length), 0, -1) if length % a == 0)
    return small, length // small


def init(context: InitContext) -> dict[str, Tensor]:
    """C, A2 and B2. B2 has a gradient in the first step, C and A2 from the second step on."""
    (l, k), (m, n) = closest_factors(context.out), closest_factors(context.in_)  # noqa: E741
    q = min(context.rank, k, n)
    return {
        "C": torch.empty(context.groups, l, m).uniform_(-1 / math.sqrt(m), 1 / math.sqrt(m)),
        "A2": torch.empty(context.groups, q, n).uniform_(-1 / math.sqrt(n), 1 / math.sqrt(n)),
        "B2": torch.zeros(context.groups, k, q),
    }


def resolve(parameters: Parameters, scale: float, base: Base) -> Resolved:
    C = parameters["C"]
    _, l, m = C.shape  # noqa: E741
    identity = torch.eye(min(l, m), dtype=C.dtype, device=C.device)[None]
    outer, inner = (C, identity) if m <= l else (identity, C)
    return LowRank(_kron(inner, parameters["A2"]), _kron(outer, parameters["B2"]), scale), None


def _kron(x: Tensor, y: Tensor) -> Tensor:
    """x [g, a, b] ⊗ y [g, c, d] = [g, a · c, b · d]. x may have one group for all groups of y."""
    return (x[:, :, None, :, None] * y[:, None, :, None, :]).flatten(3, 4).flatten(1, 2)


register(
    LORA,
    name="lokr",
    paper="Edalati et al. 2022, arXiv:2212.10650; Yeh et al. 2023, arXiv:2309.14859",
    default_alpha=32,
    init=init,
    resolve=resolve,
)
