"""Combine several adapters into one adapter: weighted sums, sums at a lower rank, and merges of
task vectors (TIES, DARE).

    sum      ΔW = Σ wᵢ ΔWᵢ, exact: the factors are concatenated, the ranks add up
    svd      the best approximation of this sum at a given rank, computed from the factors A and B
    ties, dare, dare_ties, prune
             merge the dense ΔWᵢ entry by entry, one weight at a time, then truncate to a rank

An adapter's weight wᵢ may be negative: wᵢ = −1 negates a task vector (Ilharco et al. 2023,
arXiv:2212.04089). A sum of DoRA changes and LoRA changes is a DoRA change (``weighted_sum.py``).
It needs the base weights W, because DoRA rescales each row by m / ‖W + ΔW‖, and an adapter folder
stores only the magnitudes m.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from veneer.adapter_files.derived_folder import common_base_record, write_derived
from veneer.adapter_files.folder import AdapterFiles
from veneer.config import path_test
from veneer.errors import AdapterError, ConfigError, listing, nearest, raise_all, sentence
from veneer.fileio.atomic import must_not_exist
from veneer.formats import peft, peft_paths
from veneer.layers import parameter_path
from veneer.lowrank import LowRank
from veneer.tools.compose.align import AlignedWeight, align, effective_changes
from veneer.tools.compose.frozen_weights import FrozenWeights, Source
from veneer.tools.compose.full_params import WeighAdapter, combine_full_params
from veneer.tools.compose.merge_methods import MERGE_METHODS
from veneer.tools.compose.option_checks import METHODS, LayerFactors, check_options, list_factors
from veneer.tools.compose.weighted_sum import (
    CombinedChange,
    ComposeOptions,
    WeightedChange,
    merge_by_method,
    reduce_rank,
    sum_with_magnitudes,
)
from veneer.tools.report_text import count_noun, rank_range

__all__ = ["METHODS", "ComposeReport", "LayerReport", "compose"]


@dataclass(frozen=True)
class LayerReport:
    """The combined change ΔW of one weight. ``ranks``: the ranks of its changes in the adapters;
    ``rank``: the rank of the combined change; ``norm``: ‖ΔW‖ before the truncation to ``rank``;
    ``error``: the norm of the part that the truncation removed, divided by ``norm``."""

    path: str
    ranks: tuple[int, ...]
    rank: int
    norm: float
    error: float


@dataclass(frozen=True)
class ComposeReport:
    """The result of ``compose``; ``str(report)`` is readable text. ``weights``: the coefficient wᵢ
    of each adapter. ``verified``: whether every adapter has a record with fingerprints of its base,
    so that the new adapter has one too. ``notes``: warnings for the caller, one text each."""

    path: Path
    method: str
    weights: tuple[float, ...]
    layers: tuple[LayerReport, ...]
    verified: bool
    notes: tuple[str, ...]

    @property
    def error(self) -> float:
        """The norm of the part that the truncation removed, divided by the norm of the change
        before the truncation. Both norms are over all layers."""
        norm = math.hypot(*(layer.norm for layer in self.layers))
        return (
            math.hypot(*(layer.norm * layer.error for layer in self.layers)) / norm if norm else 0.0
        )

    def __str__(self) -> str:
        ranks_text = rank_range(layer.rank for layer in self.layers)
        adapter_count = count_noun(len(self.weights), "adapter")
        layer_count = count_noun(len(self.layers), "layer")
        worst_layer = max(self.layers, key=lambda layer: layer.error, default=None)
        loss_text = ", nothing left out"
        if worst_layer is not None and worst_layer.error >= 1e-9:  # more than float64 rounding
            loss_text = (
                f"; {self.error:.2%} of the change left out, {worst_layer.error:.2%} at worst"
                f" ({worst_layer.path})"
            )
        summary = f"{self.method} of {adapter_count}: {layer_count}, {ranks_text}{loss_text}"
        return "\n".join([summary, *(f"note: {note}" for note in self.notes)])


@torch.no_grad()
def compose(
    adapters: Sequence[str | Path | AdapterFiles] | str | Path | AdapterFiles,
    out: str | Path,
    *,
    weights: Sequence[float] | None = None,
    method: str | None = None,
    rank: int | None = None,
    energy: float | None = None,
    density: float | None = None,
    layers: LayerFactors | None = None,
    base: Source | None = None,
    model: nn.Module | None = None,
    seed: int = 0,
    provenance: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> ComposeReport:
    """Write a combination of ``adapters`` as one adapter folder.

    Args:
        adapters: one or several folders, or results of ``veneer.adapter_files.read``.
        weights: a factor wᵢ for each adapter; None: 1 for each. 0 leaves the adapter out.
        method: one of ``METHODS``; None: "svd" if ``rank`` or ``energy`` is given, else "sum".
        rank: the rank of each combined change, for every method but "sum"; at most min(out, in) of
            the weight. Without ``rank`` and ``energy`` the merge methods use the sum of the
            adapters' ranks.
        energy: the share of ‖ΔW‖² to keep in each layer, in (0, 1], instead of ``rank``.
        density: the share of the entries of each ΔWᵢ that ties, dare, dare_ties and prune keep,
            in (0, 1].
        layers: factors by pattern: one number for all adapters, or a number for each. A factor
            multiplies the adapter's weight in the layers that the pattern matches. Patterns are as
            in ``LoraConfig``; the first one that matches a layer counts.
        base: a model, or its weights by path: a mapping, or a function of the path that raises
            KeyError for an unknown one. It is needed for DoRA adapters. It is also needed for
            parameters that are trained in full, unless the method is "sum" or "svd" and the
            weights of the adapters that train the parameter add up to 1.
        model: the model that the weights in ``base`` belong to, possibly on the meta device. It is
            needed where the shape of a weight does not determine its layout (square weights of
            GPT-2's Conv1D, stacks of square matrices), and for an adapter of another library that
            changes several parameters of one module.
        seed: seed of the random choice of the entries that DARE drops.
        provenance: JSON values to add to the provenance in the new adapter's record.

    Raises:
        ConfigError: an option has an invalid value.
        AdapterError: the adapters do not match each other, or ``base`` is missing and needed.
        BaseMismatchError: the adapters have different bases, or ``base`` is another base.
        OutputExistsError: ``out`` exists and ``overwrite`` is False.
    """
    if isinstance(base, str | Path):
        problem, fix = f"base={str(base)!r}", "load the model, or give open_checkpoint(folder).read"
        raise ConfigError(problem, "a model, or its weights by path", fix)
    adapters = [adapters] if isinstance(adapters, str | Path | AdapterFiles) else list(adapters)
    adapter_weights = [1.0] * len(adapters) if weights is None else list(weights)
    layers = layers or {}
    options = check_options(
        len(adapters), adapter_weights, method, rank, energy, density, layers, seed
    )
    must_not_exist(Path(out), overwrite)
    base_weights = FrozenWeights(base, model)
    saved_adapters = _read_adapters(adapters, base_weights)
    notes = [
        f"{saved_adapter.path} has weight 0 and is left out"
        for saved_adapter, weight in zip(saved_adapters, adapter_weights, strict=True)
        if not weight
    ]
    used_indices = [index for index, weight in enumerate(adapter_weights) if weight]
    coefficients = [adapter_weights[index] for index in used_indices]
    sources = [saved_adapters[index] for index in used_indices]
    common_base_record(sources)  # raises early if the adapters have different bases
    notes += _unrecorded_notes(sources)
    base_weights.verify_recorded(sources)
    aligned_weights = align(sources, base_weights.parameter_order)
    weigh_adapter = _make_weigher(coefficients, used_indices, layers, aligned_weights, sources)
    changes, layer_reports, variant = _combine_changes(
        aligned_weights, sources, weigh_adapter, options, base_weights
    )
    params = combine_full_params(sources, aligned_weights, weigh_adapter, options, base_weights)
    provenance = {
        "composed": _provenance(saved_adapters, adapter_weights, options, layers),
        **(provenance or {}),
    }
    path = write_derived(
        out, sources, changes, params, variant=variant, overwrite=overwrite, provenance=provenance
    )
    return ComposeReport(
        path=path,
        method=options.method,
        weights=tuple(adapter_weights),
        layers=tuple(layer_reports),
        verified=all(source.record is not None for source in sources),
        notes=tuple(notes),
    )


def _read_adapters(
    adapters: Sequence[str | Path | AdapterFiles], base_weights: FrozenWeights
) -> list[AdapterFiles]:
    """The content of each adapter folder. ``AdapterError``: an adapter trains single token rows, or
    is active only from its invocation tokens on, neither of which a combination can express; or
    only the model tells the order of its parameters."""
    saved_adapters = [base_weights.read_adapter(adapter) for adapter in adapters]
    for saved_adapter in saved_adapters:
        saved_adapter.refuse_trained_tokens("a combination of adapters")
        saved_adapter.refuse_invocation_tokens("a combination of adapters")
    return saved_adapters


def _provenance(
    adapters: Sequence[AdapterFiles],
    adapter_weights: Sequence[float],
    options: ComposeOptions,
    layer_factors: LayerFactors,
) -> dict[str, Any]:
    """The provenance that the record of the new adapter holds: the options, and for each adapter
    the name of its folder, the hash of its record, and its weight."""
    is_merge = options.method in MERGE_METHODS
    option_fields = {
        "rank": options.rank,
        "energy": options.energy,
        "density": options.density if is_merge else None,
        "seed": options.seed if is_merge else None,
        "layers": {
            pattern: list_factors(factor_or_list)
            for pattern, factor_or_list in layer_factors.items()
        }
        or None,
    }
    return {
        "method": options.method,
        **{field: option for field, option in option_fields.items() if option is not None},
        "of": [
            {
                "adapter": saved_adapter.path.name,
                "record": saved_adapter.metadata.get("hashes", {}).get("record"),
                "weight": weight,
            }
            for saved_adapter, weight in zip(adapters, adapter_weights, strict=True)
        ],
    }


def _unrecorded_notes(source_adapters: Sequence[AdapterFiles]) -> list[str]:
    """One note if some adapters have no record (Veneer's metadata with fingerprints of the base),
    because other libraries wrote them: nothing proves that their bases are equal. Else no note.

    Raises:
        AdapterError: an adapter has no record, and PEFT and Veneer would compute different results
            with one of the adapters; or it is unknown how PEFT applies a change.
    """
    unrecorded_adapters = [
        source_adapter for source_adapter in source_adapters if source_adapter.record is None
    ]
    if not unrecorded_adapters:
        return []
    for source_adapter in source_adapters:
        if peft.not_for_peft(source_adapter.peft_config) is not None:
            raise AdapterError(
                f"{source_adapter.path}, which holds what PEFT applies otherwise, and"
                f" {unrecorded_adapters[0].path} without a record",
                "adapters of Veneer's, or such as PEFT applies alike",
                "load each on its model and save it with veneer.save first",
            )
    for source_adapter in unrecorded_adapters:
        effective_changes(source_adapter)  # to raise if it is unknown how PEFT applies a change
    path_list = listing((str(source_adapter.path) for source_adapter in unrecorded_adapters), 3)
    return [
        f"{path_list}: no record of the base, so the result has none; only you can tell that the"
        " bases are one"
    ]


def _make_weigher(
    coefficients: Sequence[float],
    used_indices: Sequence[int],
    layer_factors: LayerFactors,
    aligned_weights: Sequence[AlignedWeight],
    source_adapters: Sequence[AdapterFiles],
) -> WeighAdapter:
    """A function that returns the coefficient wᵢ of an adapter in a layer: the adapter's number in
    ``coefficients``, times the factor of the first pattern in ``layer_factors`` that matches a name
    of the layer (times 1 if no pattern does).

    Args:
        source_adapters: the adapters whose weight is not 0, with their weights ``coefficients``.
        used_indices: their positions among all adapters, by which ``layer_factors`` lists factors.

    Raises:
        ConfigError: a pattern matches no layer, or its regular expression is invalid.
    """
    layer_names = [
        name
        for aligned_weight in aligned_weights
        for name in (aligned_weight.model_path, aligned_weight.weight_path)
        if name
    ]
    for source_adapter in source_adapters:
        for path, tensors in source_adapter.full.items():
            module_path = peft_paths.strip_wrappers(path)[0]
            layer_names += [module_path, *(parameter_path(module_path, name) for name in tensors)]
    pattern_rules, problems = [], []  # rule: (function that tests a name, factors by adapter)
    for pattern, factor in layer_factors.items():
        try:
            matches_name = path_test(pattern)
        except re.error as error:
            problems.append(
                sentence(
                    f"pattern {pattern!r}",
                    f"a regular expression after re: ({error})",
                    "correct it",
                )
            )
            continue
        if not any(map(matches_name, layer_names)):
            leaf_names = dict.fromkeys(
                aligned_weight.model_path.rpartition(".")[2] for aligned_weight in aligned_weights
            )
            suggestion = nearest(pattern, [*leaf_names, *layer_names])
            problem = f"layers pattern {pattern!r} matches no layer{suggestion}"
            problems.append(sentence(problem, f"names such as {listing(leaf_names)}", "correct it"))
        pattern_rules.append(
            (
                matches_name,
                [
                    float(factor if isinstance(factor, int | float) else factor[index])
                    for index in used_indices
                ],
            )
        )
    raise_all(ConfigError, "These layers cannot be weighed", problems)

    def weigh_adapter(names_of_layer: Sequence[str], source_index: int) -> float:
        return coefficients[source_index] * next(
            (
                factors[source_index]
                for matches_name, factors in pattern_rules
                if any(map(matches_name, names_of_layer))
            ),
            1.0,
        )

    return weigh_adapter


def _combine_changes(
    aligned_weights: Sequence[AlignedWeight],
    source_adapters: Sequence[AdapterFiles],
    weigh_adapter: WeighAdapter,
    options: ComposeOptions,
    base_weights: FrozenWeights,
) -> tuple[dict[str, peft.PeftLayer], list[LayerReport], str]:
    """(the combined changes by their path in the new adapter folder, a report of each weight, the
    variant of the new adapter: "dora" or "lora")."""
    aliases_by_path: defaultdict[str, list[AlignedWeight]] = defaultdict(list)
    for aligned_weight in aligned_weights:
        if aligned_weight.alias_of is not None:
            aliases_by_path[aligned_weight.alias_of[0]].append(aligned_weight)
    coefficients_by_path = _source_coefficients(aligned_weights, aliases_by_path, weigh_adapter)
    changed_weights = [
        aligned_weight
        for aligned_weight in aligned_weights
        if coefficients_by_path.get(aligned_weight.model_path)
    ]
    has_magnitudes = any(
        aligned_weight.layers[source_index].extras
        for aligned_weight in changed_weights
        for source_index in coefficients_by_path[aligned_weight.model_path]
    )
    is_dora = has_magnitudes and options.method not in MERGE_METHODS
    combined_layers, layer_reports = {}, []
    for aligned_weight in changed_weights:
        coefficients = coefficients_by_path[aligned_weight.model_path]
        combined_change, layer = _combine_change(
            aligned_weight, coefficients, source_adapters, options, base_weights, is_dora
        )
        combined_layers[aligned_weight.entry_path] = layer
        for alias in aliases_by_path[aligned_weight.model_path]:
            tied_layer = alias.any_layer.with_low_rank(
                layer.low.T if alias.alias_of and alias.alias_of[1] else layer.low
            )
            combined_layers[alias.entry_path] = tied_layer.with_magnitude(combined_change.magnitude)
        layer_reports.append(
            LayerReport(
                path=aligned_weight.model_path,
                ranks=tuple(aligned_weight.layers[index].low.rank for index in coefficients),
                rank=layer.rank,
                norm=combined_change.norm,
                error=combined_change.error / combined_change.norm if combined_change.norm else 0.0,
            )
        )
    ordered_layers = {
        aligned_weight.entry_path: combined_layers[aligned_weight.entry_path]
        for aligned_weight in aligned_weights
        if aligned_weight.entry_path in combined_layers
    }
    return ordered_layers, layer_reports, "dora" if is_dora else "lora"


def _source_coefficients(
    aligned_weights: Sequence[AlignedWeight],
    aliases_by_path: Mapping[str, Sequence[AlignedWeight]],
    weigh_adapter: WeighAdapter,
) -> dict[str, dict[int, float]]:
    """The coefficient wᵢ of each source adapter for each weight: {path of the weight: {index of the
    adapter: wᵢ}}. Coefficients of 0 are left out. ``aliases_by_path``: for a tied weight, by the
    path of its first name, its entries under its other names. They are not listed in the result,
    but a pattern for the layers can match them too."""
    coefficients_by_path: dict[str, dict[int, float]] = {}
    for aligned_weight in aligned_weights:
        if aligned_weight.alias_of is None:
            names_of_weight = [
                name
                for tied_weight in (
                    aligned_weight,
                    *aliases_by_path.get(aligned_weight.model_path, ()),
                )
                for name in (tied_weight.model_path, tied_weight.weight_path)
                if name
            ]
            coefficients_by_path[aligned_weight.model_path] = {
                source_index: coefficient
                for source_index in aligned_weight.layers
                if (coefficient := weigh_adapter(names_of_weight, source_index))
            }
    return coefficients_by_path


def _combine_change(
    aligned_weight: AlignedWeight,
    coefficients: Mapping[int, float],
    source_adapters: Sequence[AdapterFiles],
    options: ComposeOptions,
    base_weights: FrozenWeights,
    is_dora: bool,
) -> tuple[CombinedChange, peft.PeftLayer]:
    """(the combined change of one weight, its entry in the new adapter folder). ``coefficients``:
    the coefficient wᵢ of each adapter, by its index in ``source_adapters``. ``is_dora``: whether
    the new adapter is a DoRA adapter. ``AdapterError``: a DoRA change is combined without a base.
    """
    layers = [aligned_weight.layers[source_index] for source_index in coefficients]
    dtype = (
        torch.float64 if any(layer.A.dtype == torch.float64 for layer in layers) else torch.float32
    )
    magnitudes = [layer.extras.get(peft.MAGNITUDE) for layer in layers]
    if (
        options.method == "sum"
        and list(coefficients.values()) == [1.0]
        and (magnitudes[0] is not None or not is_dora)
    ):
        # A single change with coefficient 1 is copied, so that even DoRA needs no base. Some
        # variants have a higher rank in PEFT's file than their ΔW needs; compact() lowers it.
        low_rank = layers[0].low.compact().to(dtype)
        return (
            CombinedChange(low_rank, magnitudes[0], low_rank.norm(), 0.0),
            layers[0].with_low_rank(low_rank).with_magnitude(magnitudes[0]),
        )
    frozen_weight = None
    if is_dora or any(magnitude is not None for magnitude in magnitudes):
        if base_weights.source is None:
            raise AdapterError(
                "DoRA, which rescales the rows of base and change together (at"
                f" {aligned_weight.model_path!r}), without the base",
                "the base's weights",
                "pass base= (--base on the command line)",
            )
        frozen_weight = base_weights.verified_weight(
            aligned_weight, [source_adapters[source_index] for source_index in coefficients]
        )
    is_transposed = frozen_weight is not None and frozen_weight.is_transposed
    terms = [
        WeightedChange(layer.low.T if is_transposed else layer.low, magnitude, coefficient)
        for layer, magnitude, coefficient in zip(
            layers, magnitudes, coefficients.values(), strict=True
        )
    ]
    if options.method in MERGE_METHODS:
        combined = merge_by_method(
            terms,
            options,
            None if frozen_weight is None else frozen_weight.weight,
            aligned_weight.model_path,
        )
    elif frozen_weight is not None:
        combined = sum_with_magnitudes(
            terms, options, frozen_weight.weight, aligned_weight.model_path, dtype
        )
    else:
        summed_change = LowRank.sum([term.low_rank for term in terms], [*coefficients.values()])
        combined = reduce_rank(summed_change, options)
    low_rank = (combined.low_rank.T if is_transposed else combined.low_rank).to(dtype)
    return combined, layers[0].with_low_rank(low_rank).with_magnitude(combined.magnitude)
