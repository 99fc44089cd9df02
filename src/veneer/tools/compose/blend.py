"""One weight's changes, combined: a weighted sum, its best approximation of a rank, or dense ΔW
merged (TIES).

    plain     Σ wᵢ ΔWᵢ
    DoRA      W + Σ wᵢ (gᵢ ⊙ (W + ΔWᵢ) − W) = G ⊙ (W + ΔW*)      G = 1 + Σ wᵢ (gᵢ − 1)      ΔW* = (1/G) ⊙ Σ wᵢ gᵢ ⊙ ΔWᵢ

So a sum of DoRA changes, and of plain ones with g = 1, is DoRA with the magnitude G ⊙ ‖W + ΔW*‖. To
a rank, S = G ⊙ ΔW* is approximated, as it is what reaches the weights: the error is then the best
one there is for this G.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from veneer.errors import AdapterError
from veneer.lowrank import LowRank
from veneer.tools.compose.merge_methods import MERGE_METHODS, factored, merged_vector
from veneer.variants.dora import row_norms

#: |G| below which a row counts as scaled to nothing
SMALLEST = 1e-6


class ComposeOptions(NamedTuple):
    method: str
    rank: int | None
    energy: float | None
    density: float
    seed: int


class Term(NamedTuple):
    """One adapter's change of a weight as that lies: ΔW [g, out, in], DoRA's magnitude [g · out],
    its share."""

    low: LowRank
    magnitude: Tensor | None
    weight: float


class Blend(NamedTuple):
    """The change, its magnitude if it is DoRA's, the norm of the whole, and that of what was left
    out."""

    low: LowRank
    magnitude: Tensor | None
    norm: float
    error: float


def reduced(total: LowRank, how: ComposeOptions) -> Blend:
    """A sum as it is, or to a rank."""
    if how.method == "sum" or (
        how.rank is not None and total.rank <= min(how.rank, total.largest_rank)
    ):
        return Blend(total.compact(), None, total.norm(), 0.0)
    svd = total.svd()
    rank = how.rank if how.rank is not None else svd.rank_for(how.energy or 1.0)
    low, error = svd.cut(min(rank, total.largest_rank))
    return Blend(low, None, float(svd.S.norm()), error)


def rescaled(
    terms: Sequence[Term], how: ComposeOptions, weight: Tensor, at: str, dtype: torch.dtype
) -> Blend:
    """The sum of changes of which some are DoRA's, as DoRA's; the factors in ``dtype``. ``weight``:
    the frozen weight [g, out, in]. ``AdapterError``: G is 0 in some row, where the sum has no such
    form."""
    W = weight.double()
    gains = [gain_of(term, W) for term in terms]
    G = 1 + torch.stack(
        [term.weight * (gain - 1) for term, gain in zip(terms, gains, strict=True)]
    ).sum(0)
    nothing = int((G.abs() < SMALLEST).sum())
    if nothing:
        problem = f"a sum that scales {nothing} rows of {at!r} to 0"
        do = "change the weights a little, or use another method"
        raise AdapterError(problem, "a row that is W's, rescaled, plus a product", do)
    products = [
        term.low.to(torch.float64).scale_rows(gain) for term, gain in zip(terms, gains, strict=True)
    ]
    total = LowRank.sum(products, [term.weight for term in terms])
    norm = float(torch.baddbmm((G - 1)[..., None] * W, total.B, total.A, alpha=total.scale).norm())
    low, *_, error = reduced(total, how)
    # the magnitude is that of the stored factors, so that the gain is G when they are read
    low = low.to(torch.float64).scale_rows(1 / G).to(dtype)
    return Blend(low, (G.flatten() * row_norms(W, low)).to(dtype), norm, error)


def gain_of(term: Term, W: Tensor) -> Tensor:
    """[g, out]: magnitude / ‖W + ΔW‖, and 1 where that is 0, as in ``variants/dora.py``."""
    if term.magnitude is None:
        return W.new_ones(W.shape[:2])
    norms = row_norms(W, term.low)
    gain = term.magnitude.double().flatten() / norms.masked_fill(norms == 0, 1)
    return torch.where(norms == 0, torch.ones_like(gain), gain).view(W.shape[:2])


def merged_by_method(
    terms: Sequence[Term], how: ComposeOptions, weight: Tensor | None, at: str
) -> Blend:
    """The dense changes merged by one of ``MERGE_METHODS``, as factors; ``weight`` is for those
    with a magnitude."""

    def dense(term: Term) -> Tensor:
        delta = term.low.delta(torch.float64)
        if term.magnitude is None or weight is None:
            return delta
        W = weight.double()
        gain = gain_of(term, W)[..., None]
        return (gain - 1) * W + gain * delta

    vectors, seed = [partial(dense, term) for term in terms], f"{how.seed}/{at}"
    delta = merged_vector(
        MERGE_METHODS[how.method], vectors, [term.weight for term in terms], how.density, seed
    )
    rank = (
        sum(term.low.rank for term in terms)
        if how.rank is None and how.energy is None
        else how.rank
    )
    low, error = factored(delta, rank, how.energy, seed)
    return Blend(low, None, float(delta.norm()), error)
