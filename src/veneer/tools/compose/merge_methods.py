"""Merge task vectors entry by entry, on the dense ΔW of one weight at a time.

    sparsify each vector   keep the largest entries, or keep random ones and rescale them (DARE)
    combine the vectors    add them, or elect a sign for each entry and average the entries with
                           that sign (TIES)

    name         sparsify    combine    paper
    ties         largest     elect      Yadav et al. 2023, arXiv:2306.01708
    dare         random      add        Yu et al. 2023, arXiv:2311.03099
    dare_ties    random      elect      both
    prune        largest     add        magnitude pruning, then task arithmetic

Each vector is multiplied by its weight before the election, so a negative weight votes for the
opposite sign; equal weights λ give TIES with its λ. The density applies to each layer separately.
Vectors are computed when needed (twice for an election); one vector and three results of its size
are in memory at a time.

Rejected: merging A and B separately, as PEFT does. The product of sparse factors is not sparse, the
signs of A and B are not those of ΔW, and the result would depend on how a scale is distributed
between A and B, which does not change ΔW.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from veneer.lowrank import LowRank, Svd

#: computes a task vector, float64
Vector = Callable[[], Tensor]

#: of the random range finder: columns beyond the rank, and power iterations for a slowly decaying
#: spectrum
OVERSAMPLING, POWER_ITERATIONS = 16, 4


class MergeMethod(NamedTuple):
    """A row of the table above; ``paper_density``: the density in its paper."""

    random: bool
    elect: bool
    paper_density: float


MERGE_METHODS = {
    "ties": MergeMethod(random=False, elect=True, paper_density=0.2),
    "dare": MergeMethod(random=True, elect=False, paper_density=0.1),
    "dare_ties": MergeMethod(random=True, elect=True, paper_density=0.1),
    "prune": MergeMethod(random=False, elect=False, paper_density=0.2),
}


def merge_vectors(
    method: MergeMethod,
    vectors: Sequence[Vector],
    weights: Sequence[float],
    density: float,
    seed: str,
) -> Tensor:
    """The merged vector, float64. Each vector keeps the share ``density`` of its entries, in (0,
    1]. Random entries depend only on ``seed`` and on the number of the vector."""
    # the smallest magnitude that is kept of each vector, cached for the second pass of an election
    thresholds: dict[int, Tensor] = {}

    def sparse(number: int) -> Tensor:
        vector = vectors[number]() * weights[number]
        # each entry with probability ``density``, divided by it: the expectation is the vector
        if method.random:
            uniform = torch.rand(
                vector.shape, generator=seeded_generator(f"{seed}/{number}"), dtype=torch.float32
            )
            return (vector / density).where(uniform.to(vector.device) < density, 0)
        # keep at least one entry, and all entries that equal the threshold
        if number not in thresholds:
            kept_count = max(1, round(density * vector.numel()))
            thresholds[number] = (
                vector.abs().flatten().kthvalue(vector.numel() - kept_count + 1).values
            )
        return vector.where(vector.abs() >= thresholds[number], 0)

    total = sparse(0)
    for number in range(1, len(vectors)):
        total = total + sparse(number)
    if not method.elect:
        return total
    # per entry, the mean of the vectors with the sign of the sum; 0 where the sum is 0
    sign, merged, agreeing = total.sign(), torch.zeros_like(total), torch.zeros_like(total)
    for number in range(len(vectors)):
        vector = sparse(number)
        agrees = (vector.sign() == sign) & (sign != 0)
        merged += vector.where(agrees, 0)
        agreeing += agrees
    return merged / agreeing.clamp_min(1)


def seeded_generator(seed: str) -> torch.Generator:
    """A random generator on the CPU, seeded with the text ``seed``."""
    number = int.from_bytes(hashlib.sha256(seed.encode()).digest()[:7], "big")
    return torch.Generator().manual_seed(number)


def nearest_product(
    delta: Tensor, rank: int | None, energy: float | None, seed: str
) -> tuple[LowRank, float]:
    """The best product for ``delta`` [g, out, in] at ``rank``, or at the lowest rank that keeps the
    share ``energy`` of ‖ΔW‖²; and ‖ΔW − product‖. The SVD is exact for an energy or a rank near
    min(out, in); otherwise a random range finder (Halko et al. 2011, arXiv:0909.4061, algorithm
    4.4). Zero rows and columns stay zero."""
    largest = min(delta.shape[1:])
    if rank is None or 3 * (rank + OVERSAMPLING) > largest:
        svd = Svd(*torch.linalg.svd(delta, full_matrices=False))
    else:
        svd = _randomised_svd(delta, rank + OVERSAMPLING, seeded_generator(seed))
    low, _ = svd.cut(min(rank or largest, largest) if energy is None else svd.rank_for(energy))
    rows, columns = (delta == 0).all(2, keepdim=True), (delta == 0).all(1, keepdim=True)
    low = LowRank(low.A.masked_fill(columns, 0), low.B.masked_fill(rows, 0), low.scale).compact()
    return low, float((delta - low.delta()).norm())


def _randomised_svd(delta: Tensor, width: int, random: torch.Generator) -> Svd:
    start_vectors = torch.randn(
        delta.shape[0], delta.shape[2], width, generator=random, dtype=delta.dtype
    )
    Q = torch.linalg.qr(delta @ start_vectors.to(delta.device))[0]
    for _ in range(POWER_ITERATIONS):
        Q = torch.linalg.qr(delta.mT @ Q)[0]
        Q = torch.linalg.qr(delta @ Q)[0]
    u, S, V = torch.linalg.svd(Q.mT @ delta, full_matrices=False)
    return Svd(Q @ u, S, V)
