"""Functions that several variants share: the largest and the smallest singular triplets of a matrix
(singular values with their left and right singular vectors), and the parameters of variants whose
initial B @ A is not zero.
"""

from __future__ import annotations

import torch
from torch import Tensor

#: a matrix whose shorter side is at most this gets a full SVD. A full SVD takes a second for a side
#: of 2,048, and a time that grows with the cube of the side
FULL_SVD_MAX_SIDE = 1024
#: of the randomised SVD (Halko et al. 2009, arXiv:0909.4061): how many more random directions than
#: wanted singular vectors, and how many power iterations
EXTRA_DIRECTIONS, POWER_ITERATIONS = 16, 16


def principal_triplets(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """U [g, out, rank], S [g, rank] in descending order and Vᵀ [g, rank, in]: the largest singular
    triplets of ``matrix`` [g, out, in], in its dtype.

    For a large matrix and a small rank, they are computed by a randomised SVD, which draws from
    torch's global generator. It is less exact, but good enough for an initialisation, for which
    only the spanned subspace must be nearly right.
    """
    if min(matrix.shape[-2:]) <= max(FULL_SVD_MAX_SIDE, 8 * rank):
        U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
    else:
        U, S, V = torch.svd_lowrank(matrix, q=rank + EXTRA_DIRECTIONS, niter=POWER_ITERATIONS)
        Vh = V.mT
    return U[..., :rank], S[..., :rank], Vh[..., :rank, :]


def minor_triplets(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """U [g, out, rank], S [g, rank] in descending order and Vᵀ [g, rank, in]: the smallest of the
    min(out, in) singular triplets of ``matrix`` [g, out, in], in its dtype. They are always
    computed by a full SVD, because a randomised SVD finds only large singular values."""
    U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
    return U[..., -rank:], S[..., -rank:], Vh[..., -rank:, :]


def balanced_factors(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A = √S Vᵀ [g, rank, in] and B = U √S [g, out, rank] from the ``rank`` largest singular
    triplets U S Vᵀ of ``matrix`` [g, out, in]. B @ A is its best approximation of this rank."""
    return factors_from_triplets(*principal_triplets(matrix, rank))


def factors_from_triplets(U: Tensor, S: Tensor, Vh: Tensor) -> tuple[Tensor, Tensor]:
    """A = √S Vᵀ and B = U √S from singular triplets U [g, out, k], S [g, k], Vᵀ [g, k, in]."""
    root = S.sqrt()
    return root[..., :, None] * Vh, U * root[..., None, :]


def with_frozen_start(A: Tensor, B: Tensor) -> dict[str, Tensor]:
    """The parameters of a variant whose initial B @ A is not zero: trained A and B, and frozen
    copies A0 and B0 of their initial values, all float32."""
    A, B = copy_float32(A), copy_float32(B)
    return {"A": A, "B": B, "A0": A.clone(), "B0": B.clone()}


def copy_float32(factor: Tensor) -> Tensor:
    """A contiguous copy of ``factor`` in float32. It is copied even if it is float32 already,
    because a view would keep the memory of a larger tensor in use."""
    return factor.to(torch.float32).clone(memory_format=torch.contiguous_format)
