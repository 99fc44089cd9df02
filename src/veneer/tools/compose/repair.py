"""Intruder dimensions scaled down, written as an adapter folder.

    W'' = W' + Σⱼ (factor − 1) σⱼ uⱼ vⱼᵀ        j: the intruders of W' (``tools/intruders.py``)

So ΔW'' = ΔW + the sum, a product whose rank is larger by the number of intruders: exact, and no
training. Where the adapter is DoRA's, W' = g ⊙ (W + ΔW) keeps its gain: the sum is divided by g,
and the magnitude is that of the new factors. Rows and columns in which ΔW is zero by its factors (a
padding token, rows that do not change) stay zero. Shuttleworth et al. 2024, arXiv:2410.21228, scale
the leading intruder of a weight so; here all that were found.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from veneer.adapter_files.derived_folder import write_derived
from veneer.adapter_files.folder import AdapterFiles, read
from veneer.errors import ConfigError
from veneer.fileio.atomic import must_not_exist
from veneer.formats import peft
from veneer.lowrank import LowRank
from veneer.tools.compose.align import AlignedWeight, align, applied
from veneer.tools.compose.blend import ComposeOptions
from veneer.tools.compose.frozen_weights import FrozenWeights, Source
from veneer.tools.compose.full_params import combined
from veneer.tools.intruders import COUNT, THRESHOLD, WeightIntruders, find_intruders
from veneer.tools.report_text import counted, rank_range
from veneer.variants.dora import row_norms

__all__ = ["FACTOR", "RepairReport", "RepairedWeight", "repair"]

#: what is left of an intruder's singular value
FACTOR = 0.5


@dataclass(frozen=True)
class RepairedWeight:
    """One weight. ``looked_at``: how many leading singular vectors; ``intruders``: how many of them
    are. ``removed``: the norm of what was taken off, as a share of ‖W' − W‖."""

    path: str
    looked_at: int
    intruders: int
    rank: int
    removed: float


@dataclass(frozen=True)
class RepairReport:
    """What ``repair`` wrote; ``str(report)`` is for people."""

    path: Path
    factor: float
    weights: tuple[RepairedWeight, ...]
    removed: (
        float  # the norm of what was taken off all weights, as a share of that of the whole change
    )

    @property
    def intruders(self) -> int:
        return sum(weight.intruders for weight in self.weights)

    def __str__(self) -> str:
        touched = sum(bool(weight.intruders) for weight in self.weights)
        looked_at = sum(weight.looked_at for weight in self.weights)
        if not self.intruders:
            return (
                f"no intruder among the {looked_at} leading singular vectors: the adapter is"
                " written as it was"
            )
        ranks = rank_range(weight.rank for weight in self.weights)
        said = (
            f"{counted(self.intruders, 'intruder')} among {looked_at} leading singular vectors, in"
            f" {touched} of "
        )
        said += f"{counted(len(self.weights), 'weight')}, scaled by {self.factor:g}; {ranks}; "
        return f"{said}{self.removed:.1%} of the change taken off"


@torch.no_grad()
def repair(
    adapter: str | Path | AdapterFiles,
    out: str | Path,
    *,
    base: Source | None,
    model: nn.Module | None = None,
    factor: float = FACTOR,
    count: int = COUNT,
    threshold: float = THRESHOLD,
    found: Sequence[WeightIntruders] | None = None,
    provenance: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> RepairReport:
    """Write an adapter whose intruder dimensions are scaled by ``factor``.

    Args:
        base, model: as ``compose`` takes them; the base is always needed.
        factor: what is left of each intruder's singular value, in [0, 1]. 0 takes it away.
        count, threshold: how many leading singular vectors of each weight are looked at, and the
            cosine below which one is an intruder.
        found: what ``find_intruders`` gave of this very adapter, to not look again.

    Raises:
        ConfigError: an option cannot be used.
        AdapterError: the adapter has trained tokens, or the base lacks a weight.
        BaseMismatchError: the base is another one.
        OutputExistsError: the path exists and ``overwrite`` is False.
    """
    if base is None:
        raise ConfigError(
            "a repair without the base",
            "its weights, which tell what is new",
            "pass the base (--base)",
        )
    if isinstance(factor, bool) or not isinstance(factor, int | float) or not 0 <= factor <= 1:
        raise ConfigError(
            f"factor={factor!r}", "what is left of an intruder, in [0, 1]", f"use {FACTOR}"
        )
    must_not_exist(Path(out), overwrite)
    saved = adapter if isinstance(adapter, AdapterFiles) else read(adapter)
    saved.refuse_trained_tokens("a repair")
    weights, lows = FrozenWeights(base, model), applied(saved)
    found = (
        found
        if found is not None
        else [*find_intruders(saved, weights, count=count, threshold=threshold)]
    )
    layers, reports = {}, []
    for one in found:
        layer = one.aligned.layers[0]
        layers[one.aligned.at] = _repaired(one, layer, lows[one.aligned.at], factor, weights, saved)
        lost = math.hypot(*(float(triples.S.norm()) for triples in one.found)) * (1 - factor)
        share = lost / one.distance if one.distance else 0.0
        rank = layers[one.aligned.at].rank
        reports.append(RepairedWeight(one.aligned.at, len(one.cosines), one.count, rank, share))
    aligned_weights = align([saved], weights.order)
    low = {aligned.path: _layer(aligned, layers) for aligned in aligned_weights}
    how = ComposeOptions("sum", None, None, 1.0, 0)
    full = combined([saved], aligned_weights, lambda names, number: 1.0, how, weights)
    provenance = {
        "repaired": {
            "adapter": saved.path.name,
            "factor": factor,
            "intruders": sum(one.count for one in found),
        },
        **(provenance or {}),
    }
    variant = "dora" if any(layer.extras for layer in low.values()) else "lora"
    path = write_derived(
        out, [saved], low, full, variant=variant, provenance=provenance, overwrite=overwrite
    )
    whole = math.hypot(*(one.distance for one in found))
    removed = math.hypot(
        *(report.removed * one.distance for report, one in zip(reports, found, strict=True))
    )
    return RepairReport(path, float(factor), tuple(reports), removed / whole if whole else 0.0)


def _layer(aligned: AlignedWeight, layers: Mapping[str, peft.PeftLayer]) -> peft.PeftLayer:
    """What a file holds of a weight; under a further name of a tied one, what stands under its
    first."""
    if aligned.alias_of is None:
        return layers[aligned.at]
    at, transposed = aligned.alias_of
    low = layers[at].low
    return aligned.template.with_low(low.T if transposed else low).with_magnitude(
        layers[at].extras.get(peft.MAGNITUDE)
    )


def _repaired(
    one: WeightIntruders,
    layer: peft.PeftLayer,
    low: LowRank,
    factor: float,
    weights: FrozenWeights,
    saved: AdapterFiles,
) -> peft.PeftLayer:
    magnitude, dtype = (
        layer.extras.get(peft.MAGNITUDE),
        torch.promote_types(layer.A.dtype, torch.float32),
    )
    if not one.count or factor == 1:
        return layer.with_low(layer.low.compact().to(dtype)).with_magnitude(magnitude)
    low = (low.T if one.swapped else low).to(torch.float64)
    total = LowRank.sum([low, _taken_off(one, low, factor)], [1, 1]).compact()
    if one.gain is not None:
        total = total.to(dtype)
        W = weights.frozen_weight(one.aligned, saved.peft_config).weight.double()
        magnitude = (one.gain.flatten() * row_norms(W, total).flatten()).to(dtype)
    total = total.T if one.swapped else total
    # PEFT's out-projection of an attention
    applied_twice = low.scale / layer.scale if layer.scale else 1.0
    total = LowRank(total.A, total.B, total.scale / applied_twice).to(dtype)
    return layer.with_low(total).with_magnitude(magnitude)


def _taken_off(one: WeightIntruders, low: LowRank, factor: float) -> LowRank:
    """(factor − 1) Σ σ u vᵀ for each group, as one product: those with fewer intruders end in
    zeros."""
    width = max(len(triples.S) for triples in one.found)

    def padded(rows: Tensor) -> Tensor:
        return torch.cat([rows, rows.new_zeros(width - len(rows), rows.shape[1])])

    A = torch.stack([padded(triples.V.mT) for triples in one.found])
    B = torch.stack([padded((triples.U * triples.S * (factor - 1)).mT) for triples in one.found]).mT
    if one.gain is not None:
        B = B / one.gain.masked_fill(one.gain == 0, 1)[..., None]
    rows, columns = (low.B == 0).all(2, keepdim=True), (low.A == 0).all(1, keepdim=True)
    return LowRank(A.masked_fill(columns, 0), B.masked_fill(rows, 0), 1.0)
