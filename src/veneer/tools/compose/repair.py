"""Scale down the intruder dimensions of an adapter, and write a new adapter folder.

    W'' = W' + Σⱼ (factor − 1) σⱼ uⱼ vⱼᵀ

W is a weight of the base, W' = W + ΔW the weight with the given adapter, and W'' the weight with
the repaired adapter. (σⱼ, uⱼ, vⱼ) are the singular triples of W' whose uⱼ is an intruder: a leading
singular vector of W' that resembles no singular vector of W (``tools/intruders.py``).

The new change ΔW'' is ΔW plus the sum above. It is stored exactly, as a product whose rank is
higher by the number of intruders; nothing is trained. A DoRA adapter has W' = g ⊙ (W + ΔW). Its
gain g, one factor for each row, stays unchanged: the sum is divided by g, and the magnitude is
recomputed from the new factors. Rows of B and columns of A that are zero (frozen rows, a padding
token) stay zero. Shuttleworth et al. 2024, arXiv:2410.21228, scale only the leading intruder of a
weight; this module scales all intruders.
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
from veneer.adapter_files.folder import AdapterFiles
from veneer.errors import ConfigError
from veneer.fileio.atomic import must_not_exist
from veneer.formats import peft
from veneer.lowrank import LowRank
from veneer.tools.compose.align import AlignedWeight, align, effective_changes
from veneer.tools.compose.frozen_weights import FrozenWeights, Source
from veneer.tools.compose.full_params import combine_full_params
from veneer.tools.compose.weighted_sum import ComposeOptions
from veneer.tools.intruders import (
    DEFAULT_THRESHOLD,
    DEFAULT_VECTOR_COUNT,
    WeightIntruders,
    find_intruders,
)
from veneer.tools.report_text import count_noun, rank_range
from veneer.variants.dora import row_norms

__all__ = ["FACTOR", "RepairReport", "RepairedWeight", "repair"]

#: default factor by which the singular value of an intruder is multiplied
FACTOR = 0.5


@dataclass(frozen=True)
class RepairedWeight:
    """The repair of one weight. W: the base weight; W', W'': the weight with the given and with the
    repaired adapter.

    Fields:
        looked_at: how many leading singular vectors of W' were examined.
        intruders: how many of them resemble no singular vector of W.
        rank: the rank of the repaired change.
        removed: ‖W'' − W'‖ / ‖W' − W‖.
    """

    path: str
    looked_at: int
    intruders: int
    rank: int
    removed: float


@dataclass(frozen=True)
class RepairReport:
    """The result of ``repair``; ``str(report)`` is readable text. ``factor``: the factor by which
    intruders were scaled. ``removed``: ‖W'' − W'‖ / ‖W' − W‖ over all weights, where W is the base
    weight, and W' and W'' are the weight with the given and with the repaired adapter."""

    path: Path
    factor: float
    weights: tuple[RepairedWeight, ...]
    removed: float

    @property
    def intruders(self) -> int:
        return sum(weight.intruders for weight in self.weights)

    def __str__(self) -> str:
        repaired_count = sum(bool(weight.intruders) for weight in self.weights)
        vector_count = sum(weight.looked_at for weight in self.weights)
        if not self.intruders:
            return (
                f"no intruder among the {vector_count} leading singular vectors: the adapter is"
                " written as it was"
            )
        ranks_text = rank_range(weight.rank for weight in self.weights)
        return (
            f"{count_noun(self.intruders, 'intruder')} among {vector_count} leading singular"
            f" vectors, in {repaired_count} of {count_noun(len(self.weights), 'weight')}, scaled by"
            f" {self.factor:g}; {ranks_text}; {self.removed:.1%} of the change taken off"
        )


@torch.no_grad()
def repair(
    adapter: str | Path | AdapterFiles,
    out: str | Path,
    *,
    base: Source | None,
    model: nn.Module | None = None,
    factor: float = FACTOR,
    count: int = DEFAULT_VECTOR_COUNT,
    threshold: float = DEFAULT_THRESHOLD,
    intruders: Sequence[WeightIntruders] | None = None,
    provenance: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> RepairReport:
    """Write an adapter whose intruder dimensions are scaled by ``factor``. An intruder is a leading
    singular vector of the adapted weight that resembles no singular vector of the base weight.

    Args:
        base, model: as for ``compose``, but the base is always needed.
        factor: the factor in [0, 1] of each intruder's singular value. 0 removes the intruder.
        count, threshold: how many leading singular vectors of each weight to examine, and the
            cosine below which a vector is an intruder.
        intruders: the results of ``find_intruders`` for this adapter, in place of ``count`` and
            ``threshold``; None computes them.
        provenance: JSON values to add to the provenance in the new adapter's record.

    Raises:
        ConfigError: an option has an invalid value.
        AdapterError: the adapter trains tokens or has invocation tokens, or a weight is missing in
            the base.
        BaseMismatchError: the adapter was trained on another base.
        OutputExistsError: ``out`` exists and ``overwrite`` is False.
    """
    _check_arguments(base, factor)
    must_not_exist(Path(out), overwrite)
    base_weights = FrozenWeights(base, model)
    saved_adapter = base_weights.read_adapter(adapter)
    saved_adapter.refuse_trained_tokens("a repair")
    saved_adapter.refuse_invocation_tokens("a repair")
    changes_by_path = effective_changes(saved_adapter)
    if intruders is None:
        intruders = [*find_intruders(saved_adapter, base_weights, count=count, threshold=threshold)]
    repaired_layers, weight_reports = {}, []
    for weight_intruders in intruders:
        path = weight_intruders.aligned_weight.model_path
        layer = weight_intruders.aligned_weight.layers[0]
        repaired_layers[path] = _repair_layer(
            weight_intruders, layer, changes_by_path[path], factor, base_weights, saved_adapter
        )
        weight_reports.append(_report_weight(weight_intruders, repaired_layers[path].rank, factor))
    aligned_weights = align([saved_adapter], base_weights.parameter_order)
    folder_entries = {
        aligned_weight.entry_path: _folder_entry(aligned_weight, repaired_layers)
        for aligned_weight in aligned_weights
    }
    options = ComposeOptions("sum", None, None, 1.0, 0)
    full_params = combine_full_params(
        [saved_adapter], aligned_weights, lambda names, source_index: 1.0, options, base_weights
    )
    provenance = {
        "repaired": {
            "adapter": saved_adapter.path.name,
            "factor": factor,
            "intruders": sum(weight_intruders.count for weight_intruders in intruders),
        },
        **(provenance or {}),
    }
    folder_path = write_derived(
        out,
        [saved_adapter],
        folder_entries,
        full_params,
        variant="dora" if any(layer.extras for layer in folder_entries.values()) else "lora",
        provenance=provenance,
        overwrite=overwrite,
    )
    return RepairReport(
        folder_path, float(factor), tuple(weight_reports), _removed_share(weight_reports, intruders)
    )


def _removed_share(
    weight_reports: Sequence[RepairedWeight], intruders: Sequence[WeightIntruders]
) -> float:
    """‖W'' − W'‖ / ‖W' − W‖ over all weights: W is the base weight, W' the weight with the given
    adapter, and W'' the weight with the repaired adapter."""
    distances = [weight_intruders.distance for weight_intruders in intruders]
    removed_norm = math.hypot(
        *(
            report.removed * distance
            for report, distance in zip(weight_reports, distances, strict=True)
        )
    )
    total_distance = math.hypot(*distances)
    return removed_norm / total_distance if total_distance else 0.0


def _check_arguments(base: Source | None, factor: Any) -> None:
    if base is None:
        raise ConfigError(
            "a repair without the base",
            "its weights, to which the intruders are compared",
            "pass the base (--base)",
        )
    if isinstance(factor, bool) or not isinstance(factor, int | float) or not 0 <= factor <= 1:
        raise ConfigError(
            f"factor={factor!r}",
            "the share of an intruder that remains, in [0, 1]",
            f"use {FACTOR}",
        )


def _report_weight(weight_intruders: WeightIntruders, rank: int, factor: float) -> RepairedWeight:
    intruder_norm = math.hypot(*(float(triples.S.norm()) for triples in weight_intruders.intruders))
    distance = weight_intruders.distance
    return RepairedWeight(
        path=weight_intruders.aligned_weight.model_path,
        looked_at=len(weight_intruders.cosines),
        intruders=weight_intruders.count,
        rank=rank,
        removed=intruder_norm * (1 - factor) / distance if distance else 0.0,
    )


def _folder_entry(
    aligned_weight: AlignedWeight, repaired_layers: Mapping[str, peft.PeftLayer]
) -> peft.PeftLayer:
    """The tensors (A, B, magnitude) that the repaired adapter's folder stores for a weight. Under a
    further name of a tied weight (an alias), these are the tensors of the weight's first name, or
    their transpose. ``repaired_layers``: the repaired changes by the weights' first names."""
    if aligned_weight.alias_of is None:
        return repaired_layers[aligned_weight.model_path]
    first_path, is_transposed = aligned_weight.alias_of
    low_rank = repaired_layers[first_path].low
    return aligned_weight.any_layer.with_low_rank(
        low_rank.T if is_transposed else low_rank
    ).with_magnitude(repaired_layers[first_path].extras.get(peft.MAGNITUDE))


def _repair_layer(
    weight_intruders: WeightIntruders,
    layer: peft.PeftLayer,
    low_rank: LowRank,
    factor: float,
    base_weights: FrozenWeights,
    saved_adapter: AdapterFiles,
) -> peft.PeftLayer:
    magnitude = layer.extras.get(peft.MAGNITUDE)
    dtype = torch.promote_types(layer.A.dtype, torch.float32)
    if not weight_intruders.count or factor == 1:
        return layer.with_low_rank(layer.low.compact().to(dtype)).with_magnitude(magnitude)
    low_rank = (low_rank.T if weight_intruders.is_transposed else low_rank).to(torch.float64)
    repaired_change = LowRank.sum(
        [low_rank, _intruder_change(weight_intruders, low_rank, factor)], [1, 1]
    ).compact()
    if weight_intruders.gain is not None:
        repaired_change = repaired_change.to(dtype)
        W = base_weights.frozen_weight(
            weight_intruders.aligned_weight, saved_adapter.peft_config
        ).weight.double()
        magnitude = (weight_intruders.gain.flatten() * row_norms(W, repaired_change).flatten()).to(
            dtype
        )
    repaired_change = repaired_change.T if weight_intruders.is_transposed else repaired_change
    # PEFT adds the change of an attention's out-projection more than once. ``low_rank`` has the
    # total effect, but the folder stores the scale of one addition.
    peft_repeats = low_rank.scale / layer.scale if layer.scale else 1.0
    repaired_change = LowRank(
        repaired_change.A, repaired_change.B, repaired_change.scale / peft_repeats
    ).to(dtype)
    return layer.with_low_rank(repaired_change).with_magnitude(magnitude)


def _intruder_change(
    weight_intruders: WeightIntruders, low_rank: LowRank, factor: float
) -> LowRank:
    """The change (factor − 1) Σⱼ σⱼ uⱼ vⱼᵀ that scales the intruders by ``factor``, as one low-rank
    product [g, out, in]; g: matrices in the weight. For DoRA, it is divided by the gain of each
    row, because the gain will be applied to it. Matrices with fewer intruders than others are
    padded with zeros. Rows and columns in which ``low_rank``, the adapter's change, is zero stay
    zero."""
    max_count = max(len(triples.S) for triples in weight_intruders.intruders)

    def pad(vector_rows: Tensor) -> Tensor:
        return torch.cat(
            [vector_rows, vector_rows.new_zeros(max_count - len(vector_rows), vector_rows.shape[1])]
        )

    A = torch.stack([pad(triples.V.mT) for triples in weight_intruders.intruders])
    B = torch.stack(
        [pad((triples.U * triples.S * (factor - 1)).mT) for triples in weight_intruders.intruders]
    ).mT
    if weight_intruders.gain is not None:
        B = B / weight_intruders.gain.masked_fill(weight_intruders.gain == 0, 1)[..., None]
    zero_rows = (low_rank.B == 0).all(2, keepdim=True)
    zero_columns = (low_rank.A == 0).all(1, keepdim=True)
    return LowRank(A.masked_fill(zero_columns, 0), B.masked_fill(zero_rows, 0), 1.0)
