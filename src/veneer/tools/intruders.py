"""Intruder dimensions: leading singular vectors of the changed weight that resemble no singular
vector of the base weight.

    W' = gain ⊙ (W + ΔW) = Σ σⱼ uⱼ vⱼᵀ        W = Σ sᵢ xᵢ yᵢᵀ        cosine(j) = maxᵢ |⟨uⱼ, xᵢ⟩|

uⱼ, one of the first ``count`` left singular vectors of W', is an intruder if its cosine is below
``threshold`` (Shuttleworth et al. 2024, arXiv:2410.21228, algorithm 1, who link forgetting to these
directions). The control for each change is a change with the same singular values in random
directions. A high cosine means that the change strengthened or slightly rotated a direction of the
base, which is harmless.

Cost for each weight (each matrix of a stack) with n = min(out, in): all xᵢ come from the
eigenvectors of the smaller Gram matrix of W, about 10 n³ in float64; measured on one core: 0.06 s
at n = 576 and 2.8 s at n = 2048. The leading uⱼ of W' and of the control come from a
bidiagonalisation with about a hundred matrix-vector products, 0.04 s and 0.7 s. In memory: one
weight at a time in float64, with its change and the Gram matrix.

Rejected: comparing with the leading xᵢ alone, which would be cheaper. A change may amplify any xᵢ
of the base into a leading position, and such a direction is not an intruder.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from veneer.adapter_files.folder import AdapterFiles
from veneer.errors import ConfigError
from veneer.formats import peft
from veneer.kernels.svd import spectrum
from veneer.lowrank import LowRank
from veneer.tools.compose.align import AlignedWeight, align, applied_products
from veneer.tools.compose.frozen_weights import FrozenWeights
from veneer.tools.compose.weighted_sum import Term, gain_of

#: defaults: how many leading singular vectors of a changed weight are examined, and the cosine
#: below which one is an intruder
COUNT, THRESHOLD = 10, 0.5
#: singular values of W below this share of the largest are rounding error
ROUNDING = 1e-6
#: a triple has converged once ‖Mᵀu − σv‖ is below this share of the largest singular value
RESIDUAL = 1e-8
#: matrices with a shorter side up to this get a full SVD
SMALL = 96


class Triples(NamedTuple):
    """Singular triples: U [out, k], S [k] descending, V [in, k]; float64."""

    U: Tensor
    S: Tensor
    V: Tensor

    def select(self, mask: Tensor) -> Triples:
        """The triples where ``mask`` [k] is True."""
        return Triples(self.U[:, mask], self.S[mask], self.V[:, mask])


@dataclass(frozen=True)
class WeightIntruders:
    """The intruders of one weight, over all its groups. ``cosines``: of the leading singular
    vectors of W', the same number for each group. ``control``: the cosines for the random change;
    empty unless requested. ``intruders``: the intruding triples of W', by group. ``gain``: [g, out]
    of a DoRA change, else None. ``norm``: ‖W‖; ``distance``: ‖W' − W‖."""

    aligned: AlignedWeight
    swapped: bool
    cosines: tuple[float, ...]
    control: tuple[float, ...]
    intruders: tuple[Triples, ...]
    gain: Tensor | None
    norm: float
    distance: float
    seconds: float

    @property
    def count(self) -> int:
        return sum(len(triples.S) for triples in self.intruders)


def find_intruders(
    saved: AdapterFiles,
    base_weights: FrozenWeights,
    *,
    count: int = COUNT,
    threshold: float = THRESHOLD,
    control: bool = False,
    seed: int = 0,
) -> Iterator[WeightIntruders]:
    """Yield the intruders of each weight that an adapter changes; a tied weight once. With
    ``count`` 0 only the norms are computed.

    Raises:
        ConfigError: ``count`` or ``threshold`` cannot be used.
        AdapterError: the base lacks a weight, or the layout of a weight is ambiguous.
        BaseMismatchError: the adapter was trained on other weights.
    """
    if type(count) is not int or count < 0 or not 0 < threshold <= 1:
        problem = f"{count!r} singular vectors and a threshold of {threshold!r}"
        raise ConfigError(
            problem, "a whole number, and a cosine in (0, 1]", f"use {COUNT} and {THRESHOLD}"
        )
    lows = applied_products(saved)
    for aligned in align([saved], base_weights.parameter_order):
        if aligned.alias_of is None:
            low, random = lows[aligned.model_path], torch.Generator().manual_seed(seed)
            yield _find_in_weight(
                aligned, low, saved, base_weights, count, threshold, random if control else None
            )


@torch.no_grad()
def _find_in_weight(
    aligned: AlignedWeight,
    low: LowRank,
    saved: AdapterFiles,
    base_weights: FrozenWeights,
    count: int,
    threshold: float,
    random: torch.Generator | None,
) -> WeightIntruders:
    start_time = time.perf_counter()
    weight, swapped, _ = base_weights.proven_weight(aligned, [saved])
    low = (low.T if swapped else low).to(torch.float64)
    magnitude = aligned.layers[0].extras.get(peft.MAGNITUDE)
    gains = None if magnitude is None else gain_of(Term(low, magnitude, 1.0), weight.double())
    cosines, controls, intruders, squares = [], [], [], [0.0, 0.0]
    for group in range(weight.shape[0]):
        W, group_change = (
            weight[group].double(),
            LowRank(low.A[group, None], low.B[group, None], low.scale),
        )
        changed = W + group_change.delta()[0]
        changed = changed if gains is None else gains[group, :, None] * changed
        squares[0] += float(W.square().sum())
        squares[1] += float((changed - W).square().sum())
        leading_count = min(count, *W.shape)
        if leading_count:
            values, vectors = spectrum(W)
            triples = leading_triples(changed, leading_count)
            group_cosines = _cosines(W, values, vectors, triples.U)
            cosines += group_cosines.tolist()
            intruders.append(triples.select(group_cosines < threshold))
        if leading_count and random is not None:
            random_triples = leading_triples(W + _random_like(group_change, random), leading_count)
            controls += _cosines(W, values, vectors, random_triples.U).tolist()
    return WeightIntruders(
        aligned=aligned,
        swapped=swapped,
        cosines=tuple(cosines),
        control=tuple(controls),
        intruders=tuple(intruders),
        gain=gains,
        norm=squares[0] ** 0.5,
        distance=squares[1] ** 0.5,
        seconds=time.perf_counter() - start_time,
    )


def _cosines(W: Tensor, values: Tensor, vectors: Tensor, U: Tensor) -> Tensor:
    """maxᵢ |⟨uⱼ, xᵢ⟩| for the columns of U [out, k]. ``values``, ``vectors``: the ``spectrum`` of
    W: the vectors are xᵢ if W is wide, else the right singular vectors yᵢ with xᵢ = W yᵢ / sᵢ."""
    is_nonzero = values > ROUNDING**2 * values[:1]
    if W.shape[0] < W.shape[1]:
        inner = vectors.mT @ U
    else:
        inner = (vectors.mT @ (W.mT @ U)) / values.clamp_min(torch.finfo(values.dtype).tiny).sqrt()[
            :, None
        ]
    return inner.abs().masked_fill(~is_nonzero[:, None], 0).amax(0).clamp(max=1)


def _random_like(low: LowRank, random: torch.Generator) -> Tensor:
    """A change [out, in] with the singular values of ``low``, in random directions."""
    S = low.svd().S[0]
    sides = [
        torch.linalg.qr(torch.randn(size, len(S), generator=random, dtype=torch.float64))[0]
        for size in (low.B.shape[1], low.A.shape[2])
    ]
    left_vectors, right_vectors = (side.to(S.device) for side in sides)
    width = min(left_vectors.shape[1], right_vectors.shape[1])
    return (left_vectors[:, :width] * S[:width]) @ right_vectors[:, :width].mT


def leading_triples(matrix: Tensor, count: int, seed: int = 0) -> Triples:
    """The ``count`` leading singular triples of ``matrix`` [out, in], float64, by descending
    singular value.

    The method is Golub and Kahan's bidiagonalisation from a random vector with full
    reorthogonalisation (Golub and Van Loan, Matrix Computations, section 10.4): M V = U B with B
    bidiagonal. The singular triples of B converge to the leading ones of M; the last row of B
    bounds their error. If they do not converge within min(out, in) / 2 steps, or the iteration
    reaches an invariant subspace (equal singular values), a full SVD replaces it.
    """
    triples = _bidiagonalise(matrix, count, seed) if min(matrix.shape) > SMALL else None
    if triples is not None:
        return triples
    U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
    return Triples(U[:, :count], S[:count], Vh[:count].mT)


def _bidiagonalise(matrix: Tensor, count: int, seed: int) -> Triples | None:
    max_steps = min(matrix.shape) // 2
    start = torch.randn(
        matrix.shape[1], generator=torch.Generator().manual_seed(seed), dtype=matrix.dtype
    )
    # one vector in each row
    U, V = (
        matrix.new_zeros(max_steps, matrix.shape[0]),
        matrix.new_zeros(max_steps + 1, matrix.shape[1]),
    )
    V[0] = (start / start.norm()).to(matrix.device)
    diagonal, superdiagonal, next_check = [], [], 4 * count + 20
    for step in range(max_steps):
        for basis, vector, norms in (
            (U[:step], matrix @ V[step], diagonal),
            (V[: step + 1], None, superdiagonal),
        ):
            vector = U[step] @ matrix if vector is None else vector
            for _ in range(2):  # the second pass removes the rounding error of the first
                vector = vector - (basis @ vector) @ basis
            norms.append(float(vector.norm()))
            if norms[-1] <= RESIDUAL * max(diagonal):
                return None
            (U if norms is diagonal else V)[len(basis)] = vector / norms[-1]
        if step + 1 in (next_check, max_steps):
            next_check += max(20, next_check // 4)
            B = torch.diag(torch.tensor(diagonal, dtype=matrix.dtype))
            P, S, Qh = torch.linalg.svd(
                B + torch.diag(torch.tensor(superdiagonal[:-1], dtype=matrix.dtype), 1)
            )
            if superdiagonal[-1] * float(P[-1, :count].abs().max()) <= RESIDUAL * float(S[0]):
                P, S, Qh = (
                    factor.to(matrix.device) for factor in (P[:, :count], S[:count], Qh[:count])
                )
                return Triples(U[: step + 1].mT @ P, S, (Qh @ V[: step + 1]).mT)
    return None
