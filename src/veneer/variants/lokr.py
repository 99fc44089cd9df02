"""LoKr: ΔW = alpha / rank · C ⊗ (B2 A2), a Kronecker product of a small full matrix with a low-rank
one. Edalati et al. 2022 (KronA), arXiv:2212.10650; Yeh et al. 2023 (LyCORIS), arXiv:2309.14859.

    out = l · k, in = m · n     C: [g, l, m]   B2: [g, k, q]   A2: [g, q, n]
    l ≤ k and m ≤ n: the two factors of out, and of in, that are closest to each other

With I the identity, C ⊗ (B2 A2) = (C ⊗ B2)(I ⊗ A2) = (I ⊗ B2)(C ⊗ A2). ΔW is therefore one product
B @ A of rank min(l, m) · q. q is the rank of the config, but at most min(k, n), because a larger q
could express no more (at such ranks, LyCORIS trains one full matrix in place of B2 A2). C and A2
start Kaiming-uniform, so that C ⊗ A2 has elements about as large as LoRA's A. B2 starts at zero, as
LoRA's B does (in LyCORIS, another factor does). For a convolution, ``in`` is the number of input
channels times that of kernel positions.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from veneer.lowrank import LowRank
from veneer.variants._base import Base, InitContext, Parameters, Resolved, register
from veneer.variants.lora import LORA


def closest_factors(length: int) -> tuple[int, int]:
    """The integers (a, b) with a · b = ``length`` and a ≤ b whose difference is smallest. For a
    prime, they are (1, length)."""
    small = next(a for a in range(math.isqrt(length), 0, -1) if length % a == 0)
    return small, length // small


def init(context: InitContext) -> dict[str, Tensor]:
    """C [g, l, m], A2 [g, q, n] and B2 [g, k, q] for out = l · k and in = m · n. In the first
    training step, only B2, which is zero, has a non-zero gradient."""
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
    """The Kronecker product x ⊗ y, [g, a · c, b · d], of x [g, a, b] and y [g, c, d]. x may be
    [1, a, b], for all groups of y."""
    return (x[:, :, None, :, None] * y[:, None, :, None, :]).flatten(3, 4).flatten(1, 2)


register(
    LORA,
    name="lokr",
    paper="Edalati et al. 2022, arXiv:2212.10650; Yeh et al. 2023, arXiv:2309.14859",
    default_alpha=32,
    init=init,
    resolve=resolve,
)
