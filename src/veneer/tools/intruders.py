"""Find intruder dimensions: leading singular vectors of the changed weight that resemble no
singular vector of the base weight.

    W' = gain ⊙ (W + ΔW) = Σ σⱼ uⱼ vⱼᵀ        W = Σ sᵢ xᵢ yᵢᵀ        cosine(j) = maxᵢ |⟨uⱼ, xᵢ⟩|

W is the base weight, and gain is DoRA's factor for each row (1 for LoRA). Of the left singular
vectors uⱼ of W', the first ``count`` are examined. uⱼ is an intruder if its cosine is below
``threshold`` (Shuttleworth et al. 2024, arXiv:2410.21228, algorithm 1; they link
intruders to forgetting). The number of intruders is compared with a control: a change of W with the
same singular values in random directions. A high cosine means that the change strengthened or
slightly rotated a direction of the base, which is harmless.

Cost for each weight (each matrix of a stack) with n = min(out, in): all xᵢ come from the
eigenvectors of W Wᵀ or Wᵀ W, whichever is smaller. These take about 10 n³ operations in float64,
measured on one core: 0.06 s at n = 576 and 2.8 s at n = 2048. The leading uⱼ of W' and of the
control come from a bidiagonalisation with about a hundred matrix-vector products, which took 0.04 s
and 0.7 s. Memory, for one weight at a time, in float64: W, W' and the product W Wᵀ or Wᵀ W.

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
from veneer.tools.compose.align import AlignedWeight, align, effective_changes
from veneer.tools.compose.frozen_weights import FrozenWeights
from veneer.tools.compose.weighted_sum import WeightedChange, gain_of

#: defaults: how many leading singular vectors of a changed weight are examined, and the cosine
#: below which one is an intruder
DEFAULT_VECTOR_COUNT, DEFAULT_THRESHOLD = 10, 0.5
#: a singular value of W below this share of the largest one is taken for rounding error, so its
#: singular vectors are not compared with those of W'
RANK_TOLERANCE = 1e-6
#: a singular triple (u, σ, v) of M has converged if ‖Mᵀu − σv‖ is below this share of the largest σ
MAX_RESIDUAL = 1e-8
#: a full SVD, rather than a bidiagonalisation, is computed if min(out, in) is at most this
FULL_SVD_SIZE = 96


class SingularTriples(NamedTuple):
    """k singular triples: U [out, k], S [k] descending, V [in, k]; float64."""

    U: Tensor
    S: Tensor
    V: Tensor

    def select(self, mask: Tensor) -> SingularTriples:
        """The triples where ``mask`` [k] is True."""
        return SingularTriples(self.U[:, mask], self.S[mask], self.V[:, mask])


@dataclass(frozen=True)
class WeightIntruders:
    """The intruders of one weight: leading singular vectors of the changed weight W' that resemble
    no singular vector of the base weight W. g: matrices in the weight, 1 for a linear layer.

    Fields:
        aligned_weight: the weight and its change.
        is_transposed: whether the adapter folder stores the change of the transposed weight.
        cosines: for each examined left singular vector of W', the largest absolute cosine with a
            left singular vector of W. Each of the g matrices has equally many, one after another.
        control: the cosines of the control, which is W plus a change with the singular values of
            ΔW in random directions; empty unless the control was requested.
        intruders: for each of the g matrices, the singular triples of W' that are intruders.
        gain: the factors [g, out] by which DoRA rescales the rows of W + ΔW, else None.
        norm, distance: ‖W‖ and ‖W' − W‖.
        seconds: the duration of the search.
    """

    aligned_weight: AlignedWeight
    is_transposed: bool
    cosines: tuple[float, ...]
    control: tuple[float, ...]
    intruders: tuple[SingularTriples, ...]
    gain: Tensor | None
    norm: float
    distance: float
    seconds: float

    @property
    def count(self) -> int:
        return sum(len(triples.S) for triples in self.intruders)


def find_intruders(
    saved_adapter: AdapterFiles,
    base_weights: FrozenWeights,
    *,
    count: int = DEFAULT_VECTOR_COUNT,
    threshold: float = DEFAULT_THRESHOLD,
    control: bool = False,
    seed: int = 0,
) -> Iterator[WeightIntruders]:
    """Yield the intruders of each weight that an adapter changes: leading singular vectors of the
    changed weight that resemble no singular vector of the base weight. A tied weight is yielded
    once.

    Args:
        count: how many leading left singular vectors to examine; 0 computes the norms alone.
        threshold: a vector is an intruder if its cosine with every left singular vector of the
            base weight is below this, in absolute value.
        control: whether to examine the control too: the base weight plus a change with the same
            singular values in random directions.
        seed: the seed of these directions.

    Raises:
        ConfigError: ``count`` or ``threshold`` has an invalid value.
        AdapterError: the base lacks a weight, or the layout of a weight is ambiguous.
        BaseMismatchError: the adapter was trained on other weights.
    """
    if type(count) is not int or count < 0 or not 0 < threshold <= 1:
        raise ConfigError(
            f"{count!r} singular vectors and a threshold of {threshold!r}",
            "a whole number, and a cosine in (0, 1]",
            f"use {DEFAULT_VECTOR_COUNT} and {DEFAULT_THRESHOLD}",
        )
    saved_adapter = base_weights.read_adapter(saved_adapter)
    changes_by_path = effective_changes(saved_adapter)
    for aligned_weight in align([saved_adapter], base_weights.parameter_order):
        if aligned_weight.alias_of is None:
            low_rank = changes_by_path[aligned_weight.model_path]
            control_generator = torch.Generator().manual_seed(seed) if control else None
            yield _find_in_weight(
                aligned_weight,
                low_rank,
                saved_adapter,
                base_weights,
                count,
                threshold,
                control_generator,
            )


@torch.no_grad()
def _find_in_weight(
    aligned_weight: AlignedWeight,
    low_rank: LowRank,
    saved_adapter: AdapterFiles,
    base_weights: FrozenWeights,
    vector_count: int,
    cosine_threshold: float,
    control_generator: torch.Generator | None,
) -> WeightIntruders:
    start_time = time.perf_counter()
    base_weight, is_transposed, _ = base_weights.verified_weight(aligned_weight, [saved_adapter])
    low_rank = (low_rank.T if is_transposed else low_rank).to(torch.float64)
    magnitude = aligned_weight.layers[0].extras.get(peft.MAGNITUDE)
    row_gains = (
        None
        if magnitude is None
        else gain_of(WeightedChange(low_rank, magnitude, 1.0), base_weight.double())
    )
    cosines, control_cosines, intruders = [], [], []
    squared_norm = squared_distance = 0.0
    for matrix_index in range(base_weight.shape[0]):
        W = base_weight[matrix_index].double()
        matrix_change = LowRank(
            low_rank.A[matrix_index, None], low_rank.B[matrix_index, None], low_rank.scale
        )
        changed_W = W + matrix_change.delta()[0]
        changed_W = changed_W if row_gains is None else row_gains[matrix_index, :, None] * changed_W
        squared_norm += float(W.square().sum())
        squared_distance += float((changed_W - W).square().sum())
        leading_count = min(vector_count, *W.shape)
        if leading_count:
            squared_singular_values, base_vectors = spectrum(W)
            triples = leading_triples(changed_W, leading_count)
            matrix_cosines = _cosines(W, squared_singular_values, base_vectors, triples.U)
            cosines += matrix_cosines.tolist()
            intruders.append(triples.select(matrix_cosines < cosine_threshold))
        if leading_count and control_generator is not None:
            control_triples = leading_triples(
                W + _random_change_like(matrix_change, control_generator), leading_count
            )
            control_cosines += _cosines(
                W, squared_singular_values, base_vectors, control_triples.U
            ).tolist()
    return WeightIntruders(
        aligned_weight=aligned_weight,
        is_transposed=is_transposed,
        cosines=tuple(cosines),
        control=tuple(control_cosines),
        intruders=tuple(intruders),
        gain=row_gains,
        norm=squared_norm**0.5,
        distance=squared_distance**0.5,
        seconds=time.perf_counter() - start_time,
    )


def _cosines(W: Tensor, squared_singular_values: Tensor, base_vectors: Tensor, U: Tensor) -> Tensor:
    """The largest cosine of each column uⱼ of U [out, k] with a left singular vector xᵢ of W:
    maxᵢ |⟨uⱼ, xᵢ⟩|, [k]. ``squared_singular_values`` and ``base_vectors`` are the result of
    ``spectrum(W)``: the squares sᵢ² of the singular values of W, and its xᵢ if W has more columns
    than rows. Else ``base_vectors`` are the right singular vectors yᵢ, so that xᵢ = W yᵢ / sᵢ."""
    is_nonzero = squared_singular_values > RANK_TOLERANCE**2 * squared_singular_values[:1]
    if W.shape[0] < W.shape[1]:
        inner_products = base_vectors.mT @ U
    else:
        singular_values = squared_singular_values.clamp_min(
            torch.finfo(squared_singular_values.dtype).tiny
        ).sqrt()
        inner_products = (base_vectors.mT @ (W.mT @ U)) / singular_values[:, None]
    return inner_products.abs().masked_fill(~is_nonzero[:, None], 0).amax(0).clamp(max=1)


def _random_change_like(low_rank: LowRank, generator: torch.Generator) -> Tensor:
    """A change [out, in] with the singular values of ``low_rank``, in random directions."""
    singular_values = low_rank.svd().S[0]
    random_bases = [
        torch.linalg.qr(
            torch.randn(size, len(singular_values), generator=generator, dtype=torch.float64)
        )[0]
        for size in (low_rank.B.shape[1], low_rank.A.shape[2])
    ]
    left_vectors, right_vectors = (basis.to(singular_values.device) for basis in random_bases)
    rank = min(left_vectors.shape[1], right_vectors.shape[1])
    return (left_vectors[:, :rank] * singular_values[:rank]) @ right_vectors[:, :rank].mT


def leading_triples(matrix: Tensor, count: int) -> SingularTriples:
    """The ``count`` leading singular triples of ``matrix`` [out, in], float64, by descending
    singular value.

    The method is the bidiagonalisation of Golub and Kahan, from a random vector, with full
    reorthogonalisation (Golub and Van Loan, Matrix Computations, section 10.4): M V = U B, where M
    is ``matrix``, and the SVD of the bidiagonal B is P S Qᵀ. For the columns p of P and q of Q, the
    triples (U p, s, V q) converge to the leading triples of M. The residual of a triple is the next
    superdiagonal element of B times the last component of p. A full SVD is computed instead if
    ``matrix`` is small, if the triples do not converge within min(out, in) / 2 steps, or if the
    iteration reaches an invariant subspace (equal singular values).
    """
    triples = _bidiagonalise(matrix, count) if min(matrix.shape) > FULL_SVD_SIZE else None
    if triples is not None:
        return triples
    U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
    return SingularTriples(U[:, :count], S[:count], Vh[:count].mT)


def _bidiagonalise(matrix: Tensor, count: int) -> SingularTriples | None:
    """The result of ``leading_triples`` by bidiagonalisation; None if the iteration does not
    converge or reaches an invariant subspace."""
    max_steps = min(matrix.shape) // 2
    start_vector = torch.randn(
        matrix.shape[1], generator=torch.Generator().manual_seed(0), dtype=matrix.dtype
    )
    # here, the basis vectors are the rows of U and V, while the formulas in ``leading_triples``
    # have them as columns
    U = matrix.new_zeros(max_steps, matrix.shape[0])
    V = matrix.new_zeros(max_steps + 1, matrix.shape[1])
    V[0] = (start_vector / start_vector.norm()).to(matrix.device)
    diagonal, superdiagonal, next_check_step = [], [], 4 * count + 20
    for step in range(max_steps):
        for basis, vector, norms in (
            (U[:step], matrix @ V[step], diagonal),
            (V[: step + 1], None, superdiagonal),
        ):
            vector = U[step] @ matrix if vector is None else vector
            for _ in range(2):  # the second pass removes the rounding error of the first
                vector = vector - (basis @ vector) @ basis
            norms.append(float(vector.norm()))
            if norms[-1] <= MAX_RESIDUAL * max(diagonal):
                return None
            (U if norms is diagonal else V)[len(basis)] = vector / norms[-1]
        if step + 1 in (next_check_step, max_steps):
            next_check_step += max(20, next_check_step // 4)
            B = torch.diag(torch.tensor(diagonal, dtype=matrix.dtype))
            P, S, Qh = torch.linalg.svd(
                B + torch.diag(torch.tensor(superdiagonal[:-1], dtype=matrix.dtype), 1)
            )
            if superdiagonal[-1] * float(P[-1, :count].abs().max()) <= MAX_RESIDUAL * float(S[0]):
                P, S, Qh = (
                    factor.to(matrix.device) for factor in (P[:, :count], S[:count], Qh[:count])
                )
                return SingularTriples(U[: step + 1].mT @ P, S, (Qh @ V[: step + 1]).mT)
    return None
