"""LoKr: ΔW = alpha / rank · C ⊗ (B2 A2), a Kronecker product of a small full matrix with a low-rank
one. Edalati et al. 2022 (KronA), arXiv:2212.10650; Yeh et al. 2023 (LyCORIS), arXiv:2309.14859.

    out = l · k, in = m · n     C: [g, l, m]   B2: [g, k, q]   A2: [g, q, n]
    l ≤ k and m ≤ n, as near to each other as can be

With I the identity, C ⊗ (B2 A2) = (C ⊗ B2)(I ⊗ A2) = (I ⊗ B2)(C ⊗ A2): one ``LowRank`` of rank
min(l, m) · q. q is the rank, or min(k, n) if that is less: more could express nothing else (LyCORIS
then trains one full matrix instead). C and A2 start Kaiming-uniform, so that their product has the
size of LoRA's A, and B2 zero, as LoRA's B does (LyCORIS zeroes the other). A convolution's kernel
positions count as inputs.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from veneer.lowrank import LowRank
from veneer.variants._base import Base, InitContext, Parameters, Resolved, register
from veneer.variants.lora import LORA


def factors(length: int) -> tuple[int, int]:
    """(a, b) with a · b = ``length`` and a ≤ b as near to each other as can be: (1, length) for a
    prime."""
    small = next(a for a in range(math.isqrt(length), 0, -1) if length % a == 0)
    return small, length // small


def init(start: InitContext) -> dict[str, Tensor]:
    """C, A2 and B2. B2 has a gradient at the first step, C and A2 from the second."""
    (l, k), (m, n) = factors(start.out), factors(start.in_)  # noqa: E741
    q = min(start.rank, k, n)
    return {
        "C": torch.empty(start.groups, l, m).uniform_(-1 / math.sqrt(m), 1 / math.sqrt(m)),
        "A2": torch.empty(start.groups, q, n).uniform_(-1 / math.sqrt(n), 1 / math.sqrt(n)),
        "B2": torch.zeros(start.groups, k, q),
    }


def resolve(parameters: Parameters, scale: float, base: Base) -> Resolved:
    C = parameters["C"]
    _, l, m = C.shape  # noqa: E741
    identity = torch.eye(min(l, m), dtype=C.dtype, device=C.device)[None]
    outer, inner = (C, identity) if m <= l else (identity, C)
    return LowRank(_kron(inner, parameters["A2"]), _kron(outer, parameters["B2"]), scale), None


def _kron(x: Tensor, y: Tensor) -> Tensor:
    """x [g, a, b] ⊗ y [g, c, d] = [g, a · c, b · d]; x may be one for all groups."""
    return (x[:, :, None, :, None] * y[:, None, :, None, :]).flatten(3, 4).flatten(1, 2)


register(
    LORA,
    name="lokr",
    paper="Edalati et al. 2022, arXiv:2212.10650; Yeh et al. 2023, arXiv:2309.14859",
    default_alpha=32,
    init=init,
    resolve=resolve,
)
