"""Intruder dimensions: leading singular vectors of the changed weight that the base has none like.

    W' = gain ⊙ (W + ΔW) = Σ σⱼ uⱼ vⱼᵀ        W = Σ sᵢ xᵢ yᵢᵀ        cosine(j) = maxᵢ |⟨uⱼ, xᵢ⟩|

uⱼ, one of the first ``count`` left singular vectors of W', is an intruder if its cosine is below
``threshold``: Shuttleworth et al. 2024, arXiv:2410.21228, algorithm 1, who find that what a model
forgets lies there. Beside each change stands a control: one of the same singular values in random
directions. A high cosine means that a direction of the base was strengthened or turned a little,
and tells nothing against a change.

What it costs, for each weight (each matrix of a stack) of n = min(out, in): all xᵢ, from the
eigenvectors of the small Gram matrix of W, once: about 10 n³ in float64, measured on one core 0.06
s at n = 576 and 2.8 s at n = 2048. The leading uⱼ of W' and of the control come from a
bidiagonalisation of some hundred products with a vector each, 0.04 s and 0.7 s. In memory: one
weight at a time, in float64, with its change and that Gram matrix. Rejected: to look for a like
among the leading xᵢ alone. Those are cheap too, but a change may raise any xᵢ of the base to the
front, and that is no intruder.
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
from veneer.tools.compose.align import AlignedWeight, align, applied
from veneer.tools.compose.blend import Term, gain_of
from veneer.tools.compose.frozen_weights import FrozenWeights

#: how many leading singular vectors of a changed weight are looked at, and the cosine below which
#: one is an intruder
COUNT, THRESHOLD = 10, 0.5
#: singular values of W below this share of the largest are rounding: they have no direction
ROUNDING = 1e-6
#: a leading triple is found once ‖Mᵀu − σv‖ is below this share of the largest singular value
RESIDUAL = 1e-8
#: matrices whose shorter side is at most this are decomposed as they are
SMALL = 96


class Triples(NamedTuple):
    """Singular triples: U [out, k], S [k] falling, V [in, k]; float64."""

    U: Tensor
    S: Tensor
    V: Tensor

    def at(self, chosen: Tensor) -> Triples:
        return Triples(self.U[:, chosen], self.S[chosen], self.V[:, chosen])


@dataclass(frozen=True)
class WeightIntruders:
    """What was found of one weight, over all its groups. ``cosines``: of each leading singular
    vector of W', as many for each group. ``control``: those of the random change; empty if none was
    asked for. ``found``: the intruders of each group, as they are in W'. ``gain``: [g, out], of
    DoRA alone. ``norm``: ‖W‖; ``distance``: ‖W' − W‖."""

    aligned: AlignedWeight
    swapped: bool
    cosines: tuple[float, ...]
    control: tuple[float, ...]
    found: tuple[Triples, ...]
    gain: Tensor | None
    norm: float
    distance: float
    seconds: float

    @property
    def count(self) -> int:
        return sum(len(triples.S) for triples in self.found)


def find_intruders(
    saved: AdapterFiles,
    base_weights: FrozenWeights,
    *,
    count: int = COUNT,
    threshold: float = THRESHOLD,
    control: bool = False,
    seed: int = 0,
) -> Iterator[WeightIntruders]:
    """Those of every weight that an adapter changes, one weight after the other; a tied one once.
    ``count`` 0 looks for none: norms alone.

    Raises:
        ConfigError: ``count`` or ``threshold`` cannot be used.
        AdapterError: the base lacks a weight, or it cannot be told how that is used.
        BaseMismatchError: the weights are not those that the adapter was made for.
    """
    if type(count) is not int or count < 0 or not 0 < threshold <= 1:
        problem = f"{count!r} singular vectors and a threshold of {threshold!r}"
        raise ConfigError(
            problem, "a whole number, and a cosine in (0, 1]", f"use {COUNT} and {THRESHOLD}"
        )
    lows = applied(saved)
    for aligned in align([saved], base_weights.order):
        if aligned.alias_of is None:
            low, random = lows[aligned.at], torch.Generator().manual_seed(seed)
            yield _of_weight(
                aligned, low, saved, base_weights, count, threshold, random if control else None
            )


@torch.no_grad()
def _of_weight(
    aligned: AlignedWeight,
    low: LowRank,
    saved: AdapterFiles,
    base_weights: FrozenWeights,
    count: int,
    threshold: float,
    random: torch.Generator | None,
) -> WeightIntruders:
    began = time.perf_counter()
    weight, swapped, _ = base_weights.proven_weight(aligned, [saved])
    low = (low.T if swapped else low).to(torch.float64)
    magnitude = aligned.layers[0].extras.get(peft.MAGNITUDE)
    gains = None if magnitude is None else gain_of(Term(low, magnitude, 1.0), weight.double())
    cosines, controls, found, squares = [], [], [], [0.0, 0.0]
    for group in range(weight.shape[0]):
        W, part = weight[group].double(), LowRank(low.A[group, None], low.B[group, None], low.scale)
        changed = W + part.delta()[0]
        changed = changed if gains is None else gains[group, :, None] * changed
        squares[0] += float(W.square().sum())
        squares[1] += float((changed - W).square().sum())
        leading = min(count, *W.shape)
        if leading:
            values, vectors = spectrum(W)
            triples = leading_triples(changed, leading)
            near = _cosines(W, values, vectors, triples.U)
            cosines += near.tolist()
            found.append(triples.at(near < threshold))
        if leading and random is not None:
            other = leading_triples(W + _random_like(part, random), leading)
            controls += _cosines(W, values, vectors, other.U).tolist()
    return WeightIntruders(
        aligned, swapped, tuple(cosines), tuple(controls), tuple(found), gains, squares[0] ** 0.5, squares[1] ** 0.5,
        time.perf_counter() - began,
    )  # fmt: skip


def _cosines(W: Tensor, values: Tensor, vectors: Tensor, U: Tensor) -> Tensor:
    """maxᵢ |⟨uⱼ, xᵢ⟩| for the columns of U [out, k]. ``values``, ``vectors``: the ``spectrum`` of
    W, of which the vectors are its right singular ones yᵢ where W is not wide; then xᵢ = W yᵢ /
    sᵢ."""
    real = values > ROUNDING**2 * values[:1]
    if W.shape[0] < W.shape[1]:
        inner = vectors.mT @ U
    else:
        inner = (vectors.mT @ (W.mT @ U)) / values.clamp_min(torch.finfo(values.dtype).tiny).sqrt()[
            :, None
        ]
    return inner.abs().masked_fill(~real[:, None], 0).amax(0).clamp(max=1)


def _random_like(low: LowRank, random: torch.Generator) -> Tensor:
    """A change [out, in] with the singular values of ``low``, in random directions."""
    S = low.svd().S[0]
    sides = [
        torch.linalg.qr(torch.randn(size, len(S), generator=random, dtype=torch.float64))[0]
        for size in (low.B.shape[1], low.A.shape[2])
    ]
    left, right = (side.to(S.device) for side in sides)
    k = min(left.shape[1], right.shape[1])
    return (left[:, :k] * S[:k]) @ right[:, :k].mT


def leading_triples(matrix: Tensor, count: int, seed: int = 0) -> Triples:
    """The ``count`` leading singular triples of ``matrix`` [out, in], float64, in the order of
    their values.

    By Golub and Kahan's bidiagonalisation from a random vector, with every new vector made
    orthogonal to all before it (Golub and Van Loan, Matrix Computations, section 10.4): M V = U B
    with B bidiagonal, whose singular triples tend to the leading ones of M, and whose last row says
    how far they are from them. Where that does not get there in half the steps that would be all,
    or meets a space that M does not leave (equal singular values), the matrix is decomposed.
    """
    found = _bidiagonalised(matrix, count, seed) if min(matrix.shape) > SMALL else None
    if found is not None:
        return found
    U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
    return Triples(U[:, :count], S[:count], Vh[:count].mT)


def _bidiagonalised(matrix: Tensor, count: int, seed: int) -> Triples | None:
    most = min(matrix.shape) // 2
    start = torch.randn(
        matrix.shape[1], generator=torch.Generator().manual_seed(seed), dtype=matrix.dtype
    )
    # a vector a row
    U, V = (
        matrix.new_zeros(most, matrix.shape[0]),
        matrix.new_zeros(most + 1, matrix.shape[1]),
    )
    V[0] = (start / start.norm()).to(matrix.device)
    diagonal, above, look = [], [], 4 * count + 20
    for step in range(most):
        for known, vector, sizes in (
            (U[:step], matrix @ V[step], diagonal),
            (V[: step + 1], None, above),
        ):
            vector = U[step] @ matrix if vector is None else vector
            for _ in range(2):  # what the first pass leaves is rounding of a nearly parallel vector
                vector = vector - (known @ vector) @ known
            sizes.append(float(vector.norm()))
            if sizes[-1] <= RESIDUAL * max(diagonal):
                return None
            (U if sizes is diagonal else V)[len(known)] = vector / sizes[-1]
        if step + 1 in (look, most):
            look += max(20, look // 4)
            B = torch.diag(torch.tensor(diagonal, dtype=matrix.dtype))
            P, S, Qh = torch.linalg.svd(
                B + torch.diag(torch.tensor(above[:-1], dtype=matrix.dtype), 1)
            )
            if above[-1] * float(P[-1, :count].abs().max()) <= RESIDUAL * float(S[0]):
                P, S, Qh = (
                    part.to(matrix.device) for part in (P[:, :count], S[:count], Qh[:count])
                )
                return Triples(U[: step + 1].mT @ P, S, (Qh @ V[: step + 1]).mT)
    return None
