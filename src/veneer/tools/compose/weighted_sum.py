"""Combine several adapters' changes of one weight: as a weighted sum, as the sum's best
approximation at a rank, or by merging the dense ΔW (TIES, DARE). The seed of DARE's random choice
is made of the option ``seed`` and the weight's path.

    LoRA      Σ wᵢ ΔWᵢ                    wᵢ: the coefficient of adapter i
    DoRA      W + Σ wᵢ (gᵢ ⊙ (W + ΔWᵢ) − W) = G ⊙ (W + ΔW*)
              G = 1 + Σ wᵢ (gᵢ − 1)      ΔW* = (1/G) ⊙ Σ wᵢ gᵢ ⊙ ΔWᵢ

gᵢ is the gain of adapter i, a factor for each row: mᵢ / ‖W + ΔWᵢ‖ with DoRA's magnitude mᵢ, and 1
for a LoRA change. So a sum of DoRA and LoRA changes is a DoRA change with the magnitude
G ⊙ ‖W + ΔW*‖, where the norms are those of the rows. The truncation to a rank approximates G ⊙ ΔW*,
the term that is added to the weights, so that the error in the weights is minimal for this G.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from veneer.errors import AdapterError
from veneer.lowrank import LowRank
from veneer.tools.compose.merge_methods import MERGE_METHODS, merge_vectors, nearest_product
from veneer.variants import dora

#: a row's combined gain G (see the docstring of this module) counts as 0 if its absolute value is
#: smaller than this
MIN_GAIN = 1e-6


class ComposeOptions(NamedTuple):
    """The checked options of ``compose``, whose docstring explains them. ``density`` is 1 if the
    caller of ``compose`` gave none."""

    method: str
    rank: int | None
    energy: float | None
    density: float
    seed: int


class WeightedChange(NamedTuple):
    """One adapter's change of a weight of the model.

    Fields:
        low_rank: ΔW [g, out, in], oriented as the model's weight; g: matrices in the weight.
        magnitude: the magnitude [g · out] of a DoRA change, None for LoRA.
        coefficient: the number wᵢ by which the sum multiplies the change.
    """

    low_rank: LowRank
    magnitude: Tensor | None
    coefficient: float


class CombinedChange(NamedTuple):
    """The combined change of a weight.

    Fields:
        low_rank: its ΔW [g, out, in], truncated; g: matrices in the weight.
        magnitude: the magnitude [g · out] of a DoRA change, None for LoRA.
        norm: the norm of the change before the truncation to a rank.
        error: the norm of the part that the truncation removed.
    """

    low_rank: LowRank
    magnitude: Tensor | None
    norm: float
    error: float


def reduce_rank(change: LowRank, options: ComposeOptions) -> CombinedChange:
    """``change``, truncated to the rank in ``options``, or to the lowest rank that keeps the share
    ``options.energy`` of ‖ΔW‖². It is not truncated if the method is "sum"."""
    if options.method == "sum" or (
        options.rank is not None and change.rank <= min(options.rank, change.largest_rank)
    ):
        return CombinedChange(change.compact(), None, change.norm(), 0.0)
    svd = change.svd()
    rank = options.rank if options.rank is not None else svd.rank_for(options.energy or 1.0)
    low_rank, error = svd.cut(min(rank, change.largest_rank))
    return CombinedChange(low_rank, None, float(svd.S.norm()), error)


def sum_with_magnitudes(
    terms: Sequence[WeightedChange],
    options: ComposeOptions,
    base_weight: Tensor,
    model_path: str,
    dtype: torch.dtype,
) -> CombinedChange:
    """The sum of DoRA and LoRA changes as one DoRA change with factors in ``dtype``.
    ``base_weight``: the frozen weight [g, out, in]; ``model_path``: its path, for the error.
    ``AdapterError``: the combined gain G = 1 + Σ wᵢ (gᵢ − 1) is 0 in some row, so that no DoRA
    change equals the sum."""
    W = base_weight.double()
    gains = [gain_of(term, W) for term in terms]
    G = 1 + torch.stack(
        [term.coefficient * (gain - 1) for term, gain in zip(terms, gains, strict=True)]
    ).sum(0)
    zero_row_count = int((G.abs() < MIN_GAIN).sum())
    if zero_row_count:
        raise AdapterError(
            f"a sum that scales {zero_row_count} rows of {model_path!r} to 0",
            "a row that is W's, rescaled, plus a product",
            "change the weights a little, or use another method",
        )
    rescaled_changes = [
        term.low_rank.to(torch.float64).scale_rows(gain)
        for term, gain in zip(terms, gains, strict=True)
    ]
    summed_change = LowRank.sum(rescaled_changes, [term.coefficient for term in terms])
    norm = float(
        torch.baddbmm(
            (G - 1)[..., None] * W, summed_change.B, summed_change.A, alpha=summed_change.scale
        ).norm()
    )
    low_rank, *_, error = reduce_rank(summed_change, options)
    # The magnitude is computed from the rounded factors, so that programs that load the file get
    # the gain G from it.
    low_rank = low_rank.to(torch.float64).scale_rows(1 / G).to(dtype)
    return CombinedChange(
        low_rank, (G.flatten() * dora.row_norms(W, low_rank)).to(dtype), norm, error
    )


def gain_of(term: WeightedChange, W: Tensor) -> Tensor:
    """The gain [g, out] by which a change rescales the rows of W + ΔW; W is the base weight
    [g, out, in]. It is magnitude / ‖W + ΔW‖ for each row of a DoRA change, or 1 where this norm is
    0 (as in ``variants/dora.py``), and 1 for a LoRA change."""
    if term.magnitude is None:
        return W.new_ones(W.shape[:2])
    row_norms = dora.row_norms(W, term.low_rank)
    return dora.gain_of(term.magnitude.double().flatten(), row_norms).view(W.shape[:2])


def merge_by_method(
    terms: Sequence[WeightedChange],
    options: ComposeOptions,
    base_weight: Tensor | None,
    model_path: str,
) -> CombinedChange:
    """Merge the dense changes entry by entry, by the method in ``options``, and factor the result.
    Its rank is the one in ``options``, or the lowest that keeps the share ``options.energy`` of
    ‖ΔW‖²; if both are None, it is the sum of the changes' ranks.

    Args:
        base_weight: the frozen weight [g, out, in], needed for DoRA changes.
        model_path: the path of the weight, a part of the seed of DARE's random choice.
    """

    def dense_change(term: WeightedChange) -> Tensor:
        delta = term.low_rank.delta(torch.float64)
        if term.magnitude is None or base_weight is None:
            return delta
        W = base_weight.double()
        gain = gain_of(term, W)[..., None]
        return (gain - 1) * W + gain * delta

    merged_delta = merge_vectors(
        MERGE_METHODS[options.method],
        [partial(dense_change, term) for term in terms],
        [term.coefficient for term in terms],
        options.density,
        seed=f"{options.seed}/{model_path}",
    )
    rank = (
        sum(term.low_rank.rank for term in terms)
        if options.rank is None and options.energy is None
        else options.rank
    )
    low_rank, error = nearest_product(merged_delta, rank, options.energy)
    return CombinedChange(low_rank, None, float(merged_delta.norm()), error)
