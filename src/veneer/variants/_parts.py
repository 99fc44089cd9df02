"""What several variants share: the largest singular triplets of a matrix, and a change that is zero wherever it starts.

    ΔW = scale · (B A − B₀ A₀) = scale · [B − B₀, B₀] @ [A ; A − A₀]        rank 2r, A₀ and B₀ frozen

PiSSA, OLoRA and LoRA-GA start from a product that is not zero and take it off the base weight. Here the base is never
written: the start stays beside it and is subtracted. Rejected: [B, −B₀] @ [A ; A₀], the same matrix as a difference of
two large products. In 16 bits its rounding error is as large as a small ΔW; written as above both factors are exactly
zero at the start, in every dtype, and errors are relative to what was learnt.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from veneer.lowrank import LowRank

#: matrices whose smaller side is at most this get a full SVD: a second at 2,048, and the cube of it beyond
EXACT = 1024
#: extra directions and power iterations of the randomised SVD (Halko et al. 2009, arXiv:0909.4061)
OVERSAMPLE, ITERATIONS = 16, 16


def principal(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """U [g, out, rank], S [g, rank] in descending order and Vᵀ [g, rank, in]: the largest singular triplets of
    ``matrix`` [g, out, in], in its dtype. Randomised, from the global random state, where ``matrix`` is large and
    ``rank`` small: a start needs the subspace, not the last digit."""
    if min(matrix.shape[-2:]) <= max(EXACT, 8 * rank):
        U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
    else:
        U, S, V = torch.svd_lowrank(matrix, q=rank + OVERSAMPLE, niter=ITERATIONS)
        Vh = V.mT
    return U[..., :rank], S[..., :rank], Vh[..., :rank, :]


def balanced(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A = √S Vᵀ [g, rank, in] and B = U √S [g, out, rank]: B @ A is the best approximation of this rank."""
    U, S, Vh = principal(matrix, rank)
    root = S.sqrt()
    return root[..., :, None] * Vh, U * root[..., None, :]


def with_start(A: Tensor, B: Tensor) -> dict[str, Tensor]:
    """The parameters of a variant that starts at B @ A: trained A and B, and frozen copies A0 and B0, all float32."""
    A, B = own(A), own(B)
    return {"A": A, "B": B, "A0": A.clone(), "B0": B.clone()}


def own(part: Tensor) -> Tensor:
    """``part`` in float32 in memory of its own, so that it does not keep alive the larger tensor it is a part of."""
    return part.to(torch.float32).clone(memory_format=torch.contiguous_format)


def since_start(parameters: Mapping[str, Tensor], scale: float) -> LowRank:
    """``scale · (B A − B0 A0)`` as one LowRank of twice the rank, exactly zero at the start."""
    A, B, A0, B0 = (parameters[name] for name in ("A", "B", "A0", "B0"))
    return LowRank(torch.cat([A, A - A0], dim=1), torch.cat([B - B0, B0], dim=2), scale)
