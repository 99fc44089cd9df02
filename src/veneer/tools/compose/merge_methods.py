"""Ways to merge task vectors that are defined entry by entry, on the dense ΔW of one weight after
the other.

    sparsify each vector: keep the largest (magnitude), or keep some at random and rescale them
        (DARE)
    combine them:          add, or elect a sign for each entry and average those that agree with it (TIES)

    name         sparsify    combine    paper
    ties         largest     elect      Yadav et al. 2023, arXiv:2306.01708
    dare         random      add        Yu et al. 2023, arXiv:2311.03099
    dare_ties    random      elect      both
    prune        largest     add        magnitude pruning, then task arithmetic

A vector's weight multiplies it before the election, so that a negative one votes for the other
sign; with all weights λ this is TIES with its λ. What is kept is counted in each weight by itself.
One vector at a time is in memory, made when it is needed (twice for an election), with three
results of that size. Rejected: the same on A and B one by one, as PEFT does. The product of sparse
factors is no sparse product, signs of A and B are no signs of ΔW, and the result changes if A and B
are scaled against each other, which leaves ΔW as it is.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from veneer.lowrank import LowRank, Svd

#: makes a task vector, float64
Vector = Callable[[], Tensor]

#: of the random range finder: further columns than the rank asks for, and rounds that sharpen a
#: slow spectrum
MORE, ROUNDS = 16, 4


class MergeMethod(NamedTuple):
    """A row of the table above; ``usual`` is the density that its paper uses."""

    random: bool
    elect: bool
    usual: float


MERGE_METHODS = {
    "ties": MergeMethod(random=False, elect=True, usual=0.2),
    "dare": MergeMethod(random=True, elect=False, usual=0.1),
    "dare_ties": MergeMethod(random=True, elect=True, usual=0.1),
    "prune": MergeMethod(random=False, elect=False, usual=0.2),
}


def merged_vector(
    method: MergeMethod,
    vectors: Sequence[Vector],
    weights: Sequence[float],
    density: float,
    seed: str,
) -> Tensor:
    """The merged vector, float64. Each vector keeps the share ``density`` of its entries, in (0,
    1]; which at random depends on the text ``seed`` and on the vector's place alone."""
    least: dict[int, Tensor] = {}  # of each vector, so that an election need not look for it again

    def sparse(number: int) -> Tensor:
        vector = vectors[number]() * weights[number]
        # each entry with probability ``density``, divided by it: the expectation is the vector
        if method.random:
            drawn = torch.rand(
                vector.shape, generator=generator(f"{seed}/{number}"), dtype=torch.float32
            )
            return (vector / density).where(drawn.to(vector.device) < density, 0)
        # among the largest entries, at least one; entries that equal it are all as large
        if number not in least:
            keep = max(1, round(density * vector.numel()))
            least[number] = vector.abs().flatten().kthvalue(vector.numel() - keep + 1).values
        return vector.where(vector.abs() >= least[number], 0)

    total = sparse(0)
    for number in range(1, len(vectors)):
        total = total + sparse(number)
    if not method.elect:
        return total
    # the mean, entry by entry, of those vectors whose sign is the sign of their sum; 0 where that
    # is 0
    sign, merged, agreeing = total.sign(), torch.zeros_like(total), torch.zeros_like(total)
    for number in range(len(vectors)):
        vector = sparse(number)
        agrees = (vector.sign() == sign) & (sign != 0)
        merged += vector.where(agrees, 0)
        agreeing += agrees
    return merged / agreeing.clamp_min(1)


def generator(seed: str) -> torch.Generator:
    """Random numbers on the CPU that depend on this text alone."""
    number = int.from_bytes(hashlib.sha256(seed.encode()).digest()[:7], "big")
    return torch.Generator().manual_seed(number)


def factored(
    delta: Tensor, rank: int | None, energy: float | None, seed: str
) -> tuple[LowRank, float]:
    """The best product of this rank, or of the smallest rank with this share of ‖ΔW‖², for a dense
    [g, out, in]; and ‖ΔW − product‖. Exact decompositions where the rank is a good part of the
    weight's, or where a share is asked for; else a random range finder (Halko et al. 2011,
    arXiv:0909.4061, algorithm 4.4). The error is measured on ΔW itself either way. Rows and columns
    of zeros stay zero."""
    largest = min(delta.shape[1:])
    if rank is None or 3 * (rank + MORE) > largest:
        svd = Svd(*torch.linalg.svd(delta, full_matrices=False))
    else:
        svd = _random(delta, rank + MORE, generator(seed))
    low, _ = svd.cut(min(rank or largest, largest) if energy is None else svd.rank_for(energy))
    rows, columns = (delta == 0).all(2, keepdim=True), (delta == 0).all(1, keepdim=True)
    low = LowRank(low.A.masked_fill(columns, 0), low.B.masked_fill(rows, 0), low.scale).compact()
    return low, float((delta - low.delta()).norm())


def _random(delta: Tensor, width: int, random: torch.Generator) -> Svd:
    start = torch.randn(delta.shape[0], delta.shape[2], width, generator=random, dtype=delta.dtype)
    Q = torch.linalg.qr(delta @ start.to(delta.device))[0]
    for _ in range(ROUNDS):
        Q = torch.linalg.qr(delta.mT @ Q)[0]
        Q = torch.linalg.qr(delta @ Q)[0]
    u, S, V = torch.linalg.svd(Q.mT @ delta, full_matrices=False)
    return Svd(Q @ u, S, V)
