"""Merge task vectors entry by entry. A task vector is the dense ΔW of one weight by one adapter.

    sparsify each vector   keep its largest entries, or keep random entries and rescale them (DARE)
    combine the vectors    add them, or elect a sign for each entry and average the vectors whose
                           entry has that sign (TIES)

    name         sparsify    combine    paper
    ties         largest     elect      Yadav et al. 2023, arXiv:2306.01708
    dare         random      add        Yu et al. 2023, arXiv:2311.03099
    dare_ties    random      elect      both papers
    prune        largest     add        magnitude pruning, then task arithmetic

Each vector is multiplied by its adapter's coefficient wᵢ before the election, so a vector with a
negative wᵢ votes for the opposite sign. If all wᵢ are equal to λ, the result is that of TIES with
the paper's scaling factor λ. The density, the share of entries that is kept, applies to each vector
separately. To save memory, a vector is computed each time that it is needed (twice for an
election), so one vector and up to four results of its size are in memory, besides temporaries.

Rejected: merging A and B separately, as PEFT does. The product of sparse factors is not sparse, and
the signs of A and B are not those of ΔW. The result would depend on how the scale is divided
between A and B, although this does not change ΔW.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from veneer.kernels.svd import leading, split
from veneer.lowrank import LowRank, Svd

#: a function that computes a task vector, float64
ComputeVector = Callable[[], Tensor]


class MergeMethod(NamedTuple):
    """A method for merging dense changes.

    Fields:
        keeps_random: whether random entries of each vector are kept, instead of the largest.
        elects_sign: whether a sign is elected for each entry, and only the vectors with this sign
            are averaged. Else all vectors are added.
        paper_density: the share of the entries that are kept in the paper of the method.
    """

    keeps_random: bool
    elects_sign: bool
    paper_density: float


MERGE_METHODS = {
    "ties": MergeMethod(keeps_random=False, elects_sign=True, paper_density=0.2),
    "dare": MergeMethod(keeps_random=True, elects_sign=False, paper_density=0.1),
    "dare_ties": MergeMethod(keeps_random=True, elects_sign=True, paper_density=0.1),
    "prune": MergeMethod(keeps_random=False, elects_sign=False, paper_density=0.2),
}


def merge_vectors(
    method: MergeMethod,
    vector_functions: Sequence[ComputeVector],
    coefficients: Sequence[float],
    density: float,
    seed: str,
) -> Tensor:
    """The merged vector, float64, in the shape of the vectors.

    Args:
        vector_functions: for each vector, a function that computes it; called up to twice.
        coefficients: for each vector, the number wᵢ that multiplies it.
        density: the share of the entries that each vector keeps, in (0, 1].
        seed: with the vector's index and shape, determines which random entries are kept.
    """
    # by vector index: the smallest magnitude that the vector keeps, for the election's second pass
    thresholds: dict[int, Tensor] = {}

    def sparsify(index: int) -> Tensor:
        vector = vector_functions[index]() * coefficients[index]
        # an entry is kept with probability ``density`` and divided by ``density``, so that its
        # expectation does not change
        if method.keeps_random:
            uniform_samples = torch.rand(
                vector.shape, generator=seeded_generator(f"{seed}/{index}"), dtype=torch.float32
            )
            return (vector / density).where(uniform_samples.to(vector.device) < density, 0)
        # the threshold is the smallest kept magnitude; entries that equal it are all kept
        if index not in thresholds:
            retained_count = max(1, round(density * vector.numel()))
            thresholds[index] = (
                vector.abs().flatten().kthvalue(vector.numel() - retained_count + 1).values
            )
        return vector.where(vector.abs() >= thresholds[index], 0)

    vector_sum = sum(map(sparsify, range(1, len(vector_functions))), start=sparsify(0))
    if not method.elects_sign:
        return vector_sum
    # for each entry: the mean over the vectors that have the sign of the sum; 0 if the sum is 0
    sign = vector_sum.sign()
    agreeing_sum, agreeing_count = torch.zeros_like(vector_sum), torch.zeros_like(vector_sum)
    for index in range(len(vector_functions)):
        vector = sparsify(index)
        agrees = (vector.sign() == sign) & (sign != 0)
        agreeing_sum += vector.where(agrees, 0)
        agreeing_count += agrees
    return agreeing_sum / agreeing_count.clamp_min(1)


def seeded_generator(seed: str) -> torch.Generator:
    """A random generator on the CPU whose seed is a hash of the text ``seed``."""
    hash_number = int.from_bytes(hashlib.sha256(seed.encode()).digest()[:7], "big")
    return torch.Generator().manual_seed(hash_number)


def nearest_product(delta: Tensor, rank: int | None, energy: float | None) -> tuple[LowRank, float]:
    """(the low-rank product nearest to ΔW = ``delta`` [g, out, in], ‖ΔW − product‖). The product
    has ``rank``, at most min(out, in); if it is None, the lowest rank that keeps the share
    ``energy`` of ‖ΔW‖². Zero rows and columns stay zero. If the rank is small and the matrix large,
    a randomised method may find the product, so it is the nearest one only approximately
    (``kernels/svd.py``)."""
    if rank is None:
        svd = Svd(*torch.linalg.svd(delta, full_matrices=False))
        low_rank, _ = svd.cut(svd.rank_for(energy or 1.0))
    else:
        rank = min(rank, *delta.shape[1:])
        factor_pairs = [split(matrix, leading(matrix, rank)[0]) for matrix in delta]
        A, B = (torch.stack(factor_matrices) for factor_matrices in zip(*factor_pairs, strict=True))
        low_rank = LowRank(A, B, 1.0)
    zero_rows = (delta == 0).all(2, keepdim=True)
    zero_columns = (delta == 0).all(1, keepdim=True)
    low_rank = LowRank(
        low_rank.A.masked_fill(zero_columns, 0),
        low_rank.B.masked_fill(zero_rows, 0),
        low_rank.scale,
    ).compact()
    return low_rank, float((delta - low_rank.delta()).norm())
