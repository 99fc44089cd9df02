"""Common parts of several variants: the largest and smallest singular triplets of a matrix, and
a start that is not zero."""

from __future__ import annotations

import torch
from torch import Tensor

#: matrices whose smaller side is at most this get a full SVD: a second at 2,048, and the cube of
#: it beyond
EXACT = 1024
#: extra directions and power iterations of the randomised SVD (Halko et al. 2009, arXiv:0909.4061)
OVERSAMPLE, ITERATIONS = 16, 16


def principal(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """U [g, out, rank], S [g, rank] in descending order and Vᵀ [g, rank, in]: the largest singular
    triplets of ``matrix`` [g, out, in], in its dtype. Randomised, from the global random state,
    where ``matrix`` is large and ``rank`` small: a start needs the subspace, not the last digit."""
    if min(matrix.shape[-2:]) <= max(EXACT, 8 * rank):
        U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
    else:
        U, S, V = torch.svd_lowrank(matrix, q=rank + OVERSAMPLE, niter=ITERATIONS)
        Vh = V.mT
    return U[..., :rank], S[..., :rank], Vh[..., :rank, :]


def minor(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """U [g, out, rank], S [g, rank] in descending order and Vᵀ [g, rank, in]: the smallest singular
    triplets of ``matrix`` [g, out, in], in its dtype, of the min(out, in) that there are. From a
    full SVD, however large it is: no random projection finds the directions in which a matrix is
    small."""
    U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
    return U[..., -rank:], S[..., -rank:], Vh[..., -rank:, :]


def balanced_factors(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A = √S Vᵀ [g, rank, in] and B = U √S [g, out, rank]: B @ A is the best approximation of this
    rank."""
    return split(*principal(matrix, rank))


def split(U: Tensor, S: Tensor, Vh: Tensor) -> tuple[Tensor, Tensor]:
    """A = √S Vᵀ and B = U √S of singular triplets U [g, out, k], S [g, k], Vᵀ [g, k, in]."""
    root = S.sqrt()
    return root[..., :, None] * Vh, U * root[..., None, :]


def with_start(A: Tensor, B: Tensor) -> dict[str, Tensor]:
    """The parameters of a variant that starts at B @ A: trained A and B, and frozen copies A0 and
    B0, all float32."""
    A, B = own_float32(A), own_float32(B)
    return {"A": A, "B": B, "A0": A.clone(), "B0": B.clone()}


def own_float32(factor: Tensor) -> Tensor:
    """``factor`` in float32 in memory of its own: a view would keep the larger tensor alive."""
    return factor.to(torch.float32).clone(memory_format=torch.contiguous_format)
