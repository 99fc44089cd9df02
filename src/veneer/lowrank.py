"""The idea: a change of a weight, stored as a product of two thin matrices.

    ΔW[g] = scale · B[g] @ A[g]        A: [g, r, in]   B: [g, out, r]   ΔW: [g, out, in]

``g`` counts the groups of a grouped convolution and is 1 nearly everywhere. A ``LowRank`` is a value: it knows
nothing of layers (which fold ΔW into their weight's shape), of variants (which make one from what they train) or of
storage.

Rejected: keeping ``scale`` multiplied into B. A file would then hold other numbers than those that were trained, and a
change of alpha would be a change of every tensor.

Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", arXiv:2106.09685.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


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
        """The transposed change, of shape [g, in, out]: what a layer reads that holds the same weight transposed."""
        return LowRank(self.B.mT, self.A.mT, self.scale)

    def place(self, rows: Tensor, out: int) -> LowRank:
        """The change of a weight with ``out`` rows that is this one in ``rows`` (indices) and zero elsewhere."""
        B = self.B.new_zeros(self.B.shape[0], out, self.rank).index_copy(1, rows, self.B)
        return LowRank(self.A, B, self.scale)

    def without(self, input_: int) -> LowRank:
        """The same change with a zero column for one input."""
        index = torch.tensor([input_], device=self.A.device)
        return LowRank(self.A.index_fill(2, index, 0), self.B, self.scale)

    def to(self, dtype: torch.dtype) -> LowRank:
        if self.A.dtype == self.B.dtype == dtype:
            return self
        return LowRank(self.A.to(dtype), self.B.to(dtype), self.scale)

    def delta(self, dtype: torch.dtype | None = None) -> Float[Tensor, "g out in_"]:
        """ΔW itself, computed in ``dtype`` (default: that of the factors)."""
        low = self if dtype is None else self.to(dtype)
        return torch.bmm(low.B, low.A) * low.scale

    def norm(self) -> float:
        """Frobenius norm of ΔW in float64, without forming ΔW: ‖BA‖² = ⟨BᵀB, AAᵀ⟩, two r × r matrices a group."""
        A, B = self.A.detach().double(), self.B.detach().double()
        squared = ((B.mT @ B) * (A @ A.mT)).sum()
        return abs(self.scale) * squared.clamp_min(0).sqrt().item()
