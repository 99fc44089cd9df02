"""The idea: a change of a weight, stored as a product of two thin matrices.

    ΔW[g] = scale · B[g] @ A[g]        A: [g, r, in]   B: [g, out, r]   ΔW: [g, out, in]

``g`` counts the groups of a grouped convolution and is 1 nearly everywhere. ``scale`` is not
multiplied into B: a file would then hold other numbers than those that were trained.

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
    """ΔW[g] = U[g] · diag(S[g]) · V[g], singular values falling: U [g, out, k], S [g, k], V [g, k,
    in]."""

    U: Float[Tensor, "g out k"]
    S: Float[Tensor, "g k"]
    V: Float[Tensor, "g k in_"]

    def rank_for(self, energy: float) -> int:
        """The smallest rank that keeps this share of ‖ΔW‖² (of all groups together), at least 1."""
        kept = self.S.square().sum(0).cumsum(0)  # of the rank 1, 2, …
        return int((kept < energy * kept[-1]).sum()) + 1

    def cut(self, rank: int) -> tuple[LowRank, float]:
        """(the best approximation of this rank, ‖ΔW − it‖: the singular values that it lacks). Each
        factor gets the root of the singular values, so that neither is much larger than the
        other."""
        root = self.S[:, :rank].sqrt()
        low = LowRank(root[..., None] * self.V[:, :rank], self.U[:, :, :rank] * root[:, None], 1.0)
        return low, float(self.S[:, rank:].norm())


def zero_column(A: Float[Tensor, "g r in_"], column: int) -> Float[Tensor, "g r in_"]:
    """A copy with zeros in one column; without an index tensor, which a device would wait for."""
    return A.select_scatter(A.new_zeros(A.shape[:2]), 2, column)


@dataclass(frozen=True)
class LowRank:
    """``scale · B @ A``, one product a group."""

    A: Float[Tensor, "g r in_"]
    B: Float[Tensor, "g out r"]
    scale: float

    @property
    def rank(self) -> int:
        return self.A.shape[1]

    @property
    def T(self) -> LowRank:
        """The transposed change, of shape [g, in, out]: what a layer reads that holds the same
        weight transposed."""
        return LowRank(self.B.mT, self.A.mT, self.scale)

    def place(self, rows: Tensor, out: int) -> LowRank:
        """The change of a weight with ``out`` rows that is this one in ``rows`` (indices) and zero
        elsewhere."""
        B = self.B.new_zeros(self.B.shape[0], out, self.rank).index_copy(1, rows, self.B)
        return LowRank(self.A, B, self.scale)

    def without(self, input_: int) -> LowRank:
        """The same change with a zero column for one input."""
        return LowRank(zero_column(self.A, input_), self.B, self.scale)

    def to(self, dtype: torch.dtype) -> LowRank:
        if self.A.dtype == self.B.dtype == dtype:
            return self
        return LowRank(self.A.to(dtype), self.B.to(dtype), self.scale)

    def on(self, device: torch.device) -> LowRank:
        return LowRank(self.A.to(device), self.B.to(device), self.scale)

    def delta(self, dtype: torch.dtype | None = None) -> Float[Tensor, "g out in_"]:
        """ΔW itself, computed in ``dtype`` (default: that of the factors)."""
        low = self if dtype is None else self.to(dtype)
        # in place: the product is as large as the weight
        return torch.bmm(low.B, low.A).mul_(low.scale)

    def norm(self) -> float:
        """Frobenius norm of ΔW in float64, without forming ΔW: ‖BA‖² = ⟨BᵀB, AAᵀ⟩, two r × r
        matrices a group."""
        return max(self.inner(self), 0.0) ** 0.5

    @staticmethod
    def sum(changes: Sequence[LowRank], weights: Sequence[float]) -> LowRank:
        """Σ wᵢ ΔWᵢ, exactly: the factors side by side, of the ranks' sum. In float32 or more, as a
        weight is multiplied into B; where all wᵢ · scaleᵢ are equal but for their sign, no number
        is rounded."""
        factors = [weight * low.scale for weight, low in zip(weights, changes, strict=True)]
        scale = max(map(abs, factors)) or 1.0
        dtypes = (factor.dtype for low in changes for factor in (low.A, low.B))
        dtype = functools.reduce(torch.promote_types, dtypes, torch.float32)
        A = torch.cat([low.A.to(dtype) for low in changes], 1)
        parts = (
            low.B.to(dtype) * (factor / scale) for low, factor in zip(changes, factors, strict=True)
        )
        return LowRank(A, torch.cat(list(parts), 2), scale)

    def gained(self, gain: Float[Tensor, "g out"]) -> LowRank:
        """gain ⊙ ΔW: each output row times its number."""
        return LowRank(self.A, self.B * gain[..., None].to(self.B.dtype), self.scale)

    def inner(self, other: LowRank) -> float:
        """⟨ΔW, ΔW'⟩ = Σ (BᵀB') ∘ (A A'ᵀ), in float64 and from the thin factors alone."""
        A, B = (double(factor.detach()) for factor in (self.A, self.B))
        product = ((B.mT @ double(other.B)) * (A @ double(other.A).mT)).sum()
        return self.scale * other.scale * product.item()

    def core(self) -> Float[Tensor, "g k l"]:
        """A small matrix with ΔW's singular values, in float64: R_B R_Aᵀ of B = Q_B R_B and Aᵀ =
        Q_A R_A. Its norm is ‖ΔW‖ to the last digits, also where the product nearly cancels, which
        ``norm`` has to half of them."""
        R = (
            torch.linalg.qr(double(factor.detach()), mode="r")[1] for factor in (self.B, self.A.mT)
        )
        left, right = R
        return left @ right.mT * self.scale

    def svd(self) -> Svd:
        """The decomposition of ΔW in float64 from the thin factors, which never forms ΔW:

            B = Q_B R_B   Aᵀ = Q_A R_A   R_B R_Aᵀ = u S vᵀ (r × r)   U = Q_B u   V = vᵀ Q_Aᵀ

        Rows and columns in which ΔW is zero by its factors are exactly zero here too: a padding
        token, the rows that a change leaves alone. Rejected: eigenvectors of BᵀB and AAᵀ, which
        cost half and lose half the digits.
        """
        A, B = double(self.A.detach()), double(self.B.detach())
        (QB, RB), (QA, RA) = torch.linalg.qr(B), torch.linalg.qr(A.mT)
        u, S, v = torch.linalg.svd(RB @ RA.mT * self.scale, full_matrices=False)
        U = (QB @ u).masked_fill((B == 0).all(2, keepdim=True), 0)
        return Svd(U, S, (v @ QA.mT).masked_fill((A == 0).all(1, keepdim=True), 0))

    def thin(self) -> LowRank:
        """The same change, but for rounding in float64, of no more rank than min(out, in), by a QR
        of the thinner factor. Unlike ``compact`` it keeps a B of zeros beside an A that is none,
        from which training starts, and the scale."""
        out, in_ = self.B.shape[1], self.A.shape[2]
        if self.rank <= min(out, in_):
            return self
        A, B = double(self.A.detach()), double(self.B.detach())
        Q, R = torch.linalg.qr(B.mT if out <= in_ else A)  # B = Rᵀ Qᵀ, or A = Q R
        A, B = (Q.mT @ A, R.mT) if out <= in_ else (R, B @ Q)
        return LowRank(A.to(self.A.dtype), B.to(self.B.dtype), self.scale)

    @property
    def largest_rank(self) -> int:
        """The largest rank that ΔW can have: its rows or columns that are not zero by the factors,
        the fewer."""
        rows, columns = (self.B != 0).any(2).sum(1), (self.A != 0).any(1).sum(1)
        return max(1, int(torch.minimum(rows, columns).max()))

    def compact(self) -> LowRank:
        """The same change, but for rounding in float64, with no more rank than it can have."""
        if self.rank <= self.largest_rank:
            return self
        return self.svd().cut(self.largest_rank)[0]
