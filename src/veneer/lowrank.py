"""A change of a weight, stored as a product of two thin matrices:

    ΔW[g] = scale · B[g] @ A[g]        A: [g, r, in]   B: [g, out, r]   ΔW: [g, out, in]

``g`` is the number of groups of a grouped convolution, or of matrices in a stack; it is 1 for most
layers. ``r`` is the rank. ``scale`` is stored separately. If it were multiplied into B, the values
in a file would not be the trained ones.

Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", arXiv:2106.09685.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from veneer.precision import double

__all__ = ["LowRank", "Svd"]


class Svd(NamedTuple):
    """A singular value decomposition ΔW[g] = U[g] · diag(S[g]) · V[g]. S holds the k singular
    values in descending order: U [g, out, k], S [g, k], V [g, k, in]."""

    U: Float[Tensor, "g out k"]
    S: Float[Tensor, "g k"]
    V: Float[Tensor, "g k in_"]

    def rank_for(self, energy: float) -> int:
        """The smallest rank, at least 1, whose best approximation of ΔW retains the share
        ``energy``, in (0, 1], of ‖ΔW‖² (the squared Frobenius norm, summed over groups)."""
        retained_energy = self.S.square().sum(0).cumsum(0)  # at rank 1, 2, …
        return int((retained_energy < energy * retained_energy[-1]).sum()) + 1

    def cut(self, rank: int) -> tuple[LowRank, float]:
        """(the best approximation of ΔW with rank ``rank``, its error ‖ΔW − approximation‖). A and
        B both contain the square roots of the singular values, so that their norms are similar."""
        roots = self.S[:, :rank].sqrt()
        A, B = roots[..., None] * self.V[:, :rank], self.U[:, :, :rank] * roots[:, None]
        return LowRank(A, B, 1.0), float(self.S[:, rank:].norm())


def zero_column(A: Float[Tensor, "g r in_"], column: int) -> Float[Tensor, "g r in_"]:
    """A copy of A with zeros in one column. It creates no index tensor, because copying one to a
    device would synchronise with the device."""
    return A.select_scatter(A.new_zeros(A.shape[:2]), 2, column)


@dataclass(frozen=True)
class LowRank:
    """ΔW = ``scale · B @ A``, for each of the g matrices of a weight: 1 for a linear layer, several
    for a stack or a grouped convolution."""

    A: Float[Tensor, "g r in_"]
    B: Float[Tensor, "g out r"]
    scale: float

    @property
    def rank(self) -> int:
        return self.A.shape[1]

    @property
    def T(self) -> LowRank:
        """The transposed change, of shape [g, in, out], for a layer that holds the weight
        transposed."""
        return LowRank(self.B.mT, self.A.mT, self.scale)

    def expand_rows(self, rows: Tensor, out: int) -> LowRank:
        """The change of a weight with ``out`` rows that equals this change in the rows with the
        indices ``rows``, and is zero in all other rows."""
        B = self.B.new_zeros(self.B.shape[0], out, self.rank).index_copy(1, rows, self.B)
        return LowRank(self.A, B, self.scale)

    def zero_input(self, input_index: int) -> LowRank:
        """The same change, except that ΔW is zero in the column of one input."""
        return LowRank(zero_column(self.A, input_index), self.B, self.scale)

    def to(self, dtype: torch.dtype) -> LowRank:
        if self.A.dtype == self.B.dtype == dtype:
            return self
        return LowRank(self.A.to(dtype), self.B.to(dtype), self.scale)

    def on(self, device: torch.device) -> LowRank:
        return LowRank(self.A.to(device), self.B.to(device), self.scale)

    def delta(self, dtype: torch.dtype | None = None) -> Float[Tensor, "g out in_"]:
        """ΔW [g, out, in], computed in ``dtype``, or in the dtype of the factors if it is None."""
        low_rank = self if dtype is None else self.to(dtype)
        # The product is scaled in place, because it is as large as the weight.
        return torch.bmm(low_rank.B, low_rank.A).mul_(low_rank.scale)

    def norm(self) -> float:
        """Frobenius norm of ΔW in float64, without forming ΔW: ‖BA‖² = ⟨BᵀB, AAᵀ⟩, with two r × r
        matrices per group."""
        return max(self.inner(self), 0.0) ** 0.5

    @staticmethod
    def sum(changes: Sequence[LowRank], weights: Sequence[float]) -> LowRank:
        """The change Σ wᵢ ΔWᵢ. Its factors are concatenated, so its rank is the sum of the ranks.

        The factors are in at least float32, because the weights wᵢ are multiplied into B. Nothing
        is rounded if all wᵢ · scaleᵢ are equal except for their signs.
        """
        scaled_weights = [
            weight * low_rank.scale for weight, low_rank in zip(weights, changes, strict=True)
        ]
        scale = max(map(abs, scaled_weights)) or 1.0
        factor_dtypes = (
            factor.dtype for low_rank in changes for factor in (low_rank.A, low_rank.B)
        )
        dtype = functools.reduce(torch.promote_types, factor_dtypes, torch.float32)
        A = torch.cat([low_rank.A.to(dtype) for low_rank in changes], 1)
        scaled_B = [
            low_rank.B.to(dtype) * (factor / scale)
            for low_rank, factor in zip(changes, scaled_weights, strict=True)
        ]
        return LowRank(A, torch.cat(scaled_B, 2), scale)

    def scale_rows(self, gain: Float[Tensor, "g out"]) -> LowRank:
        """gain ⊙ ΔW: each output row is multiplied by its gain."""
        return LowRank(self.A, self.B * gain[..., None].to(self.B.dtype), self.scale)

    def inner(self, other_change: LowRank) -> float:
        """The Frobenius inner product ⟨ΔW, ΔW'⟩ with another change, in float64, without forming
        ΔW or ΔW': scale · scale' · Σ (BᵀB') ∘ (A A'ᵀ), summed over all elements."""
        A, B = (double(factor.detach()) for factor in (self.A, self.B))
        factor_product = ((B.mT @ double(other_change.B)) * (A @ double(other_change.A).mT)).sum()
        return self.scale * other_change.scale * factor_product.item()

    def core(self) -> Float[Tensor, "g k l"]:
        """A small matrix with the singular values of ΔW, in float64: scale · R_B R_Aᵀ with
        B = Q_B R_B and Aᵀ = Q_A R_A; k = min(out, r), l = min(in, r). Its norm is ‖ΔW‖ in full
        precision even if the product B A nearly cancels, when ``norm`` is right in only half of the
        digits."""
        R_B, R_A = (
            torch.linalg.qr(double(factor.detach()), mode="r")[1] for factor in (self.B, self.A.mT)
        )
        return R_B @ R_A.mT * self.scale

    def svd(self) -> Svd:
        """The singular value decomposition of ΔW in float64, computed without forming ΔW:

            B = Q_B R_B   Aᵀ = Q_A R_A   scale · R_B R_Aᵀ = u S vᵀ   U = Q_B u   V = vᵀ Q_Aᵀ

        Rows of B and columns of A that are zero, such as the column of a padding token, are exactly
        zero in U and V too. Rejected: eigenvectors of BᵀB and AAᵀ, which take half the time but
        lose half the digits.
        """
        A, B = double(self.A.detach()), double(self.B.detach())
        (QB, RB), (QA, RA) = torch.linalg.qr(B), torch.linalg.qr(A.mT)
        u, S, v = torch.linalg.svd(RB @ RA.mT * self.scale, full_matrices=False)
        U = (QB @ u).masked_fill((B == 0).all(2, keepdim=True), 0)
        return Svd(U, S, (v @ QA.mT).masked_fill((A == 0).all(1, keepdim=True), 0))

    def thin(self) -> LowRank:
        """The same change, except for rounding in float64, with a rank of at most min(out, in). The
        method computes one QR decomposition, of B if out <= in, else of A. Unlike ``compact``, it
        keeps the scale, and a B of zeros, as at the start of training, does not turn A into zeros.
        """
        out, in_ = self.B.shape[1], self.A.shape[2]
        if self.rank <= min(out, in_):
            return self
        A, B = double(self.A.detach()), double(self.B.detach())
        Q, R = torch.linalg.qr(B.mT if out <= in_ else A)  # B = Rᵀ Qᵀ, or A = Q R
        A, B = (Q.mT @ A, R.mT) if out <= in_ else (R, B @ Q)
        return LowRank(A.to(self.A.dtype), B.to(self.B.dtype), self.scale)

    @property
    def largest_rank(self) -> int:
        """An upper bound of the rank of ΔW, at least 1. It is the number of nonzero rows of B or of
        nonzero columns of A, whichever is smaller."""
        row_counts = (self.B != 0).any(2).sum(1)
        column_counts = (self.A != 0).any(1).sum(1)
        return max(1, int(torch.minimum(row_counts, column_counts).max()))

    def compact(self) -> LowRank:
        """The same change, except for rounding in float64, with a rank of at most
        ``largest_rank``."""
        if self.rank <= self.largest_rank:
            return self
        return self.svd().cut(self.largest_rank)[0]
