"""Compose several adapters into one: weighted sums, sums at a lower rank, and merges of task
vectors (TIES, DARE).

    sum      ΔW = Σ wᵢ ΔWᵢ, exact: the factors are concatenated, the ranks add up
    svd      the best approximation of that sum at a rank, computed from the thin factors
    ties, dare, dare_ties, prune
             merge the dense ΔWᵢ entry by entry, layer by layer, then truncate to a rank

A weight may be negative: w = −1 is the negation of task arithmetic (Ilharco et al. 2023,
arXiv:2212.04089). A sum of DoRA changes and plain ones is a DoRA change (``weighted_sum.py``). It
needs the base, because the gain is g = m / ‖W + ΔW‖ and a folder stores only m.
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

from veneer.adapter_files.derived_folder import merged_base, write_derived
from veneer.adapter_files.folder import AdapterFiles, read
from veneer.config import path_test
from veneer.errors import AdapterError, ConfigError, listing, nearest, raise_all, sentence
from veneer.fileio.atomic import must_not_exist
from veneer.formats import peft, peft_paths
from veneer.layers import parameter_path
from veneer.lowrank import LowRank
from veneer.tools.compose.align import AlignedWeight, align, applied_products
from veneer.tools.compose.frozen_weights import FrozenWeights, Source
from veneer.tools.compose.full_params import Weigh, combine_full_params
from veneer.tools.compose.merge_methods import MERGE_METHODS
from veneer.tools.compose.option_checks import METHODS, LayerFactors, check_options, factor_list
from veneer.tools.compose.weighted_sum import (
    Blend,
    ComposeOptions,
    Term,
    merge_by_method,
    reduce_rank,
    sum_with_magnitudes,
)
from veneer.tools.report_text import count_noun, rank_range

__all__ = ["METHODS", "ComposeReport", "LayerReport", "compose"]


@dataclass(frozen=True)
class LayerReport:
    """The combined change of one weight. ``ranks``: those of the adapters that change it; ``rank``:
    that of the result; ``norm``: ‖ΔW‖ before truncation; ``error``: ‖truncated part‖ / ``norm``."""

    path: str
    ranks: tuple[int, ...]
    rank: int
    norm: float
    error: float


@dataclass(frozen=True)
class ComposeReport:
    """The report of ``compose``; ``str(report)`` is readable text. ``verified``: every adapter has
    a record with fingerprints of its base, so the result has one too. ``notes``: warnings for the
    caller."""

    path: Path
    method: str
    weights: tuple[float, ...]
    layers: tuple[LayerReport, ...]
    verified: bool
    notes: tuple[str, ...]

    @property
    def error(self) -> float:
        """‖truncated parts of all layers‖ / ‖the change of all layers‖."""
        norm = math.hypot(*(layer.norm for layer in self.layers))
        return (
            math.hypot(*(layer.norm * layer.error for layer in self.layers)) / norm if norm else 0.0
        )

    def __str__(self) -> str:
        ranks = rank_range(layer.rank for layer in self.layers)
        adapters, layers = (
            count_noun(len(self.weights), "adapter"),
            count_noun(len(self.layers), "layer"),
        )
        worst, loss_text = (
            max(self.layers, key=lambda layer: layer.error, default=None),
            ", nothing left out",
        )
        if worst is not None and worst.error >= 1e-9:  # rounding in float64
            loss_text = (
                f"; {self.error:.2%} of the change left out, {worst.error:.2%} at worst"
                f" ({worst.path})"
            )
        summary = f"{self.method} of {adapters}: {layers}, {ranks}{loss_text}"
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
        weights: a number for each adapter; None means 1 each. 0 leaves the adapter out.
        method: one of ``METHODS``; None is "svd" if a rank or an energy is given, else "sum".
        rank: rank of the result, for every method but "sum"; capped at min(out, in) of each
            weight. Without ``rank`` and ``energy`` the merge methods use the sum of the adapters'
            ranks.
        energy: instead of ``rank``: the share of ‖ΔW‖² to keep in each layer, in (0, 1].
        density: the share of entries that ties, dare, dare_ties and prune keep of each ΔWᵢ, in (0,
            1].
        layers: pattern → a factor for the layers that it matches, or a factor for each adapter.
            Patterns are those of ``LoraConfig``; the first that matches a layer counts.
        base: a model, or its weights by path (a mapping, or a function that raises KeyError).
            Needed for DoRA, and for parameters trained in full unless the weights of their
            adapters add up to 1.
        model: the model of the weights in ``base``, possibly on the meta device. Needed where a
            shape does not determine the layout: square weights of GPT-2's Conv1D, stacks of square
            matrices.
        seed: seed of the entries that DARE drops. The result is deterministic given the seed.

    Raises:
        ConfigError: an option cannot be used.
        AdapterError: the adapters do not match each other, or the base is needed.
        BaseMismatchError: the adapters have different bases, or ``base`` is not theirs.
        OutputExistsError: the path exists and ``overwrite`` is False.
    """
    if isinstance(base, str | Path):
        problem, do = f"base={str(base)!r}", "load the model, or give open_checkpoint(folder).read"
        raise ConfigError(problem, "a model, or its weights by path", do)
    adapters = [adapters] if isinstance(adapters, str | Path | AdapterFiles) else list(adapters)
    adapter_weights, layers = (
        [1.0] * len(adapters) if weights is None else list(weights),
        layers or {},
    )
    options = check_options(
        len(adapters), adapter_weights, method, rank, energy, density, layers, seed
    )
    must_not_exist(Path(out), overwrite)
    files = [
        adapter if isinstance(adapter, AdapterFiles) else read(adapter) for adapter in adapters
    ]
    for file in files:
        file.refuse_trained_tokens("a combination of adapters")
        file.refuse_invocation_tokens("a combination of adapters")
    used = [number for number, weight in enumerate(adapter_weights) if weight]
    notes = [
        f"{file.path} has weight 0 and is left out" for n, file in enumerate(files) if n not in used
    ]
    sources, base_weights = [files[number] for number in used], FrozenWeights(base, model)
    merged_base(sources)  # check before any computation that the adapters share one base
    notes += _unproven_notes(sources)
    aligned_weights = align(sources, base_weights.order)
    weigh = _layer_weights(
        [adapter_weights[number] for number in used], used, layers, aligned_weights, sources
    )
    low, reports, variant = _combine_changes(aligned_weights, sources, weigh, options, base_weights)
    full = combine_full_params(sources, aligned_weights, weigh, options, base_weights)
    provenance = {
        "composed": _provenance(files, adapter_weights, options, layers),
        **(provenance or {}),
    }
    path = write_derived(
        out, sources, low, full, variant=variant, overwrite=overwrite, provenance=provenance
    )
    verified = all(source.record is not None for source in sources)
    return ComposeReport(
        path, options.method, tuple(adapter_weights), tuple(reports), verified, tuple(notes)
    )


def _provenance(
    adapters: Sequence[AdapterFiles],
    weights: Sequence[float],
    options: ComposeOptions,
    layers: LayerFactors,
) -> dict[str, Any]:
    """The provenance in the record: for each adapter the name of its folder, the hash of its
    record, and its weight; and the options."""
    adapter_entries = [
        {
            "adapter": saved.path.name,
            "record": saved.metadata.get("hashes", {}).get("record"),
            "weight": weight,
        }
        for saved, weight in zip(adapters, weights, strict=True)
    ]
    option_fields = {"rank": options.rank, "energy": options.energy}
    option_fields |= (
        {"density": options.density, "seed": options.seed}
        if options.method in MERGE_METHODS
        else {}
    )
    option_fields |= (
        {"layers": {pattern: factor_list(factor) for pattern, factor in layers.items()}}
        if layers
        else {}
    )
    return {
        "method": options.method,
        **{name: value for name, value in option_fields.items() if value is not None},
        "of": adapter_entries,
    }


def _unproven_notes(sources: Sequence[AdapterFiles]) -> list[str]:
    """Notes on adapters without a record, written by other libraries. ``AdapterError``: PEFT
    applies the factors of another adapter in a different way than Veneer."""
    foreign = [source for source in sources if source.record is None]
    if not foreign:
        return []
    for source in sources:
        if peft.not_for_peft(source.peft_config) is not None:
            problem = (
                f"{source.path}, which holds what PEFT applies otherwise, and {foreign[0].path}"
                " without a record"
            )
            do = "load each on its model and save it with veneer.save first"
            raise AdapterError(problem, "adapters of Veneer's, or such as PEFT applies alike", do)
    for source in foreign:
        applied_products(source)  # raises if PEFT's behaviour is unknown
    names = listing((str(source.path) for source in foreign), 3)
    return [
        f"{names}: no record of the base, so the result has none; only you can tell that the bases"
        " are one"
    ]


def _layer_weights(
    weights: Sequence[float],
    used: Sequence[int],
    layers: LayerFactors,
    aligned_weights: Sequence[AlignedWeight],
    sources: Sequence[AdapterFiles],
) -> Weigh:
    """A function that returns the weight of an adapter in a layer: the adapter's weight times the
    factor of the first pattern in ``layers`` that matches one of the layer's names. Each pattern
    must match at least one layer."""
    layer_names = [
        name for aligned in aligned_weights for name in (aligned.model_path, aligned.weight) if name
    ]
    for source in sources:
        for path, tensors in source.full.items():
            module_path = peft_paths.strip_wrappers(path)[0]
            layer_names += [module_path, *(parameter_path(module_path, name) for name in tensors)]
    rules, problems = [], []
    for pattern, factor in layers.items():
        try:
            test = path_test(pattern)
        except re.error as error:
            problems.append(
                sentence(
                    f"pattern {pattern!r}",
                    f"a regular expression after re: ({error})",
                    "correct it",
                )
            )
            continue
        if not any(map(test, layer_names)):
            leaves = dict.fromkeys(
                aligned.model_path.rpartition(".")[2] for aligned in aligned_weights
            )
            suggestion = nearest(pattern, [*leaves, *layer_names])
            problem = f"layers pattern {pattern!r} matches no layer{suggestion}"
            problems.append(sentence(problem, f"names such as {listing(leaves)}", "correct it"))
        rules.append(
            (test, [float(factor if isinstance(factor, int | float) else factor[n]) for n in used])
        )
    raise_all(ConfigError, "These layers cannot be weighed", problems)

    def weigh(names: Sequence[str], number: int) -> float:
        return weights[number] * next(
            (factors[number] for test, factors in rules if any(map(test, names))), 1.0
        )

    return weigh


def _combine_changes(
    aligned_weights: Sequence[AlignedWeight],
    sources: Sequence[AdapterFiles],
    weigh: Weigh,
    options: ComposeOptions,
    base_weights: FrozenWeights,
) -> tuple[dict[str, peft.PeftLayer], list[LayerReport], str]:
    """(the combined changes by their path in the folder, a report of each weight, the variant)."""
    tied: defaultdict[str, list[AlignedWeight]] = defaultdict(list)
    for aligned in aligned_weights:
        if aligned.alias_of is not None:
            tied[aligned.alias_of[0]].append(aligned)
    weights: dict[str, dict[int, float]] = {}
    for aligned in aligned_weights:
        if aligned.alias_of is None:
            names = [
                name
                for tied_weight in (aligned, *tied[aligned.model_path])
                for name in (tied_weight.model_path, tied_weight.weight)
                if name
            ]
            weights[aligned.model_path] = {
                number: weight for number in aligned.layers if (weight := weigh(names, number))
            }
    changed = [aligned for aligned in aligned_weights if weights.get(aligned.model_path)]
    extras = any(
        aligned.layers[number].extras
        for aligned in changed
        for number in weights[aligned.model_path]
    )
    rescales = extras and options.method not in MERGE_METHODS
    low, reports = {}, []
    for aligned in changed:
        blend, layer = _combine_change(
            aligned, weights[aligned.model_path], sources, options, base_weights, rescales
        )
        low[aligned.entry_path] = layer
        for alias in tied[aligned.model_path]:
            alias_layer = alias.template.with_low(
                layer.low.T if alias.alias_of and alias.alias_of[1] else layer.low
            )
            low[alias.entry_path] = alias_layer.with_magnitude(blend.magnitude)
        ranks = tuple(aligned.layers[number].low.rank for number in weights[aligned.model_path])
        error = blend.error / blend.norm if blend.norm else 0.0
        reports.append(LayerReport(aligned.model_path, ranks, layer.rank, blend.norm, error))
    ordered = {
        aligned.entry_path: low[aligned.entry_path]
        for aligned in aligned_weights
        if aligned.entry_path in low
    }
    return ordered, reports, "dora" if rescales else "lora"


def _combine_change(
    aligned: AlignedWeight,
    weights: Mapping[int, float],
    sources: Sequence[AdapterFiles],
    options: ComposeOptions,
    base_weights: FrozenWeights,
    rescales: bool,
) -> tuple[Blend, peft.PeftLayer]:
    """The combined change of one weight, and its entry in the folder."""
    layers = [aligned.layers[number] for number in weights]
    dtype = (
        torch.float64 if any(layer.A.dtype == torch.float64 for layer in layers) else torch.float32
    )
    magnitudes = [layer.extras.get(peft.MAGNITUDE) for layer in layers]
    if (
        options.method == "sum"
        and list(weights.values()) == [1.0]
        and (magnitudes[0] is not None or not rescales)
    ):
        # one unscaled change needs no base; PEFT stores some variants at a higher rank than
        # needed, hence compact()
        low = layers[0].low.compact().to(dtype)
        return Blend(low, magnitudes[0], low.norm(), 0.0), layers[0].with_low(low).with_magnitude(
            magnitudes[0]
        )
    base_weight = None
    if rescales or any(magnitude is not None for magnitude in magnitudes):
        if base_weights.source is None:
            problem = (
                "DoRA, which rescales the rows of base and change together (at"
                f" {aligned.model_path!r}), without the base"
            )
            raise AdapterError(
                problem, "the base's weights", "pass base= (--base on the command line)"
            )
        base_weight = base_weights.proven_weight(aligned, [sources[number] for number in weights])
    swapped = base_weight is not None and base_weight.swapped
    terms = [
        Term(layer.low.T if swapped else layer.low, magnitude, weight)
        for layer, magnitude, weight in zip(layers, magnitudes, weights.values(), strict=True)
    ]
    if options.method in MERGE_METHODS:
        blend = merge_by_method(
            terms, options, None if base_weight is None else base_weight.weight, aligned.model_path
        )
    elif base_weight is not None:
        blend = sum_with_magnitudes(terms, options, base_weight.weight, aligned.model_path, dtype)
    else:
        blend = reduce_rank(
            LowRank.sum([term.low for term in terms], [term.weight for term in terms]), options
        )
    low = (blend.low.T if swapped else blend.low).to(dtype)
    return blend, layers[0].with_low(low).with_magnitude(blend.magnitude)
