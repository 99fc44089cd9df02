"""Scale down the intruder dimensions of an adapter, and write the result as an adapter folder.

    W'' = W' + Σⱼ (factor − 1) σⱼ uⱼ vⱼᵀ        j: the intruders of W' (``tools/intruders.py``)

ΔW'' = ΔW + the sum is an exact product whose rank grows by the number of intruders; nothing is
trained. For a DoRA adapter, W' = g ⊙ (W + ΔW) keeps its gain g: the sum is divided by g, and the
magnitude is recomputed from the new factors. Rows and columns that are zero in the factors (a
padding token, frozen rows) stay zero. Shuttleworth et al. 2024, arXiv:2410.21228, scale the leading
intruder of a weight this way; this module scales all intruders.
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
from veneer.tools.compose.align import AlignedWeight, align, applied_products
from veneer.tools.compose.frozen_weights import FrozenWeights, Source
from veneer.tools.compose.full_params import combine_full_params
from veneer.tools.compose.weighted_sum import ComposeOptions
from veneer.tools.intruders import COUNT, THRESHOLD, WeightIntruders, find_intruders
from veneer.tools.report_text import count_noun, rank_range
from veneer.variants.dora import row_norms

__all__ = ["FACTOR", "RepairReport", "RepairedWeight", "repair"]

#: default factor of an intruder's singular value
FACTOR = 0.5


@dataclass(frozen=True)
class RepairedWeight:
    """The repair of one weight. ``looked_at``: the number of leading singular vectors that were
    examined; ``intruders``: how many of them are intruders. ``removed``: ‖W'' − W'‖ / ‖W' − W‖."""

    path: str
    looked_at: int
    intruders: int
    rank: int
    removed: float


@dataclass(frozen=True)
class RepairReport:
    """The report of ``repair``; ``str(report)`` is readable text. ``removed``: ‖W'' − W'‖ / ‖W' −
    W‖ over all weights."""

    path: Path
    factor: float
    weights: tuple[RepairedWeight, ...]
    removed: float

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
        summary = (
            f"{count_noun(self.intruders, 'intruder')} among {looked_at} leading singular vectors,"
            f" in {touched} of {count_noun(len(self.weights), 'weight')}, scaled by"
            f" {self.factor:g}; {ranks}; "
        )
        return f"{summary}{self.removed:.1%} of the change taken off"


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
        factor: multiplies the singular value of each intruder, in [0, 1]. 0 removes it.
        count, threshold: how many leading singular vectors of each weight to examine, and the
            cosine below which one is an intruder.
        found: the results of ``find_intruders`` for this adapter, if they are known already.

    Raises:
        ConfigError: an option cannot be used.
        AdapterError: the adapter has trained tokens, or the base lacks a weight.
        BaseMismatchError: the adapter was trained on another base.
        OutputExistsError: the path exists and ``overwrite`` is False.
    """
    if base is None:
        raise ConfigError(
            "a repair without the base",
            "its weights, to which the intruders are compared",
            "pass the base (--base)",
        )
    _check_factor(factor)
    must_not_exist(Path(out), overwrite)
    saved = adapter if isinstance(adapter, AdapterFiles) else read(adapter)
    saved.refuse_trained_tokens("a repair")
    saved.refuse_invocation_tokens("a repair")
    weights, lows = FrozenWeights(base, model), applied_products(saved)
    if found is None:
        found = [*find_intruders(saved, weights, count=count, threshold=threshold)]
    layers, reports = {}, []
    for result in found:
        path = result.aligned.model_path
        layer = result.aligned.layers[0]
        layers[path] = _repair_layer(result, layer, lows[path], factor, weights, saved)
        reports.append(_report_weight(result, layers[path].rank, factor))
    aligned_weights = align([saved], weights.order)
    low = {aligned.entry_path: _layer(aligned, layers) for aligned in aligned_weights}
    options = ComposeOptions("sum", None, None, 1.0, 0)
    full = combine_full_params(
        [saved], aligned_weights, lambda names, number: 1.0, options, weights
    )
    provenance = {
        "repaired": {
            "adapter": saved.path.name,
            "factor": factor,
            "intruders": sum(result.count for result in found),
        },
        **(provenance or {}),
    }
    variant = "dora" if any(layer.extras for layer in low.values()) else "lora"
    folder = write_derived(
        out, [saved], low, full, variant=variant, provenance=provenance, overwrite=overwrite
    )
    total_distance = math.hypot(*(result.distance for result in found))
    removed = math.hypot(
        *(report.removed * result.distance for report, result in zip(reports, found, strict=True))
    )
    return RepairReport(
        folder, float(factor), tuple(reports), removed / total_distance if total_distance else 0.0
    )


def _check_factor(factor: Any) -> None:
    if isinstance(factor, bool) or not isinstance(factor, int | float) or not 0 <= factor <= 1:
        raise ConfigError(
            f"factor={factor!r}",
            "the share of an intruder that remains, in [0, 1]",
            f"use {FACTOR}",
        )


def _report_weight(result: WeightIntruders, rank: int, factor: float) -> RepairedWeight:
    intruder_norm = math.hypot(*(float(triples.S.norm()) for triples in result.intruders))
    removed = intruder_norm * (1 - factor) / result.distance if result.distance else 0.0
    return RepairedWeight(
        result.aligned.model_path, len(result.cosines), result.count, rank, removed
    )


def _layer(aligned: AlignedWeight, layers: Mapping[str, peft.PeftLayer]) -> peft.PeftLayer:
    """The folder's entry for a weight. An alias of a tied weight gets the change of its first
    name."""
    if aligned.alias_of is None:
        return layers[aligned.model_path]
    first_path, transposed = aligned.alias_of
    low = layers[first_path].low
    return aligned.template.with_low(low.T if transposed else low).with_magnitude(
        layers[first_path].extras.get(peft.MAGNITUDE)
    )


def _repair_layer(
    intruders: WeightIntruders,
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
    if not intruders.count or factor == 1:
        return layer.with_low(layer.low.compact().to(dtype)).with_magnitude(magnitude)
    low = (low.T if intruders.swapped else low).to(torch.float64)
    total = LowRank.sum([low, _intruder_change(intruders, low, factor)], [1, 1]).compact()
    if intruders.gain is not None:
        total = total.to(dtype)
        W = weights.frozen_weight(intruders.aligned, saved.peft_config).weight.double()
        magnitude = (intruders.gain.flatten() * row_norms(W, total).flatten()).to(dtype)
    total = total.T if intruders.swapped else total
    # PEFT adds the change of an attention's out-projection more than once
    repeats = low.scale / layer.scale if layer.scale else 1.0
    total = LowRank(total.A, total.B, total.scale / repeats).to(dtype)
    return layer.with_low(total).with_magnitude(magnitude)


def _intruder_change(intruders: WeightIntruders, low: LowRank, factor: float) -> LowRank:
    """(factor − 1) Σ σ u vᵀ of each group as one product; groups with fewer intruders are padded
    with zeros."""
    width = max(len(triples.S) for triples in intruders.intruders)

    def pad(rows: Tensor) -> Tensor:
        return torch.cat([rows, rows.new_zeros(width - len(rows), rows.shape[1])])

    A = torch.stack([pad(triples.V.mT) for triples in intruders.intruders])
    B = torch.stack(
        [pad((triples.U * triples.S * (factor - 1)).mT) for triples in intruders.intruders]
    ).mT
    if intruders.gain is not None:
        B = B / intruders.gain.masked_fill(intruders.gain == 0, 1)[..., None]
    rows, columns = (low.B == 0).all(2, keepdim=True), (low.A == 0).all(1, keepdim=True)
    return LowRank(A.masked_fill(columns, 0), B.masked_fill(rows, 0), 1.0)
