"""One adapter out of several: weighted sums, sums of a lower rank, and merges of task vectors
(TIES, DARE).

    sum     ΔW = Σ wᵢ ΔWᵢ       exact: factors side by side; the rank is the sum of the ranks
    svd     the same, to a rank  its best approximation, from the thin factors alone
    ties, dare, dare_ties, prune entry by entry on the dense ΔWᵢ, one layer after the other; then to
    a rank

A weight may be negative: w = −1 is the negation of task arithmetic (Ilharco et al. 2023,
arXiv:2212.04089). A sum of DoRA's changes and of plain ones is DoRA again (``blend.py``); it needs
the base, as g = m / ‖W + ΔW‖ and a file has m.
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
from veneer.attach.lookup import parameter_path
from veneer.attach.targets import path_test
from veneer.errors import AdapterError, ConfigError, listing, nearest, raise_all, sentence
from veneer.fileio.atomic import must_not_exist
from veneer.formats import peft, peft_paths
from veneer.lowrank import LowRank
from veneer.tools.compose.align import AlignedWeight, align, applied
from veneer.tools.compose.blend import (
    Blend,
    ComposeOptions,
    Term,
    merged_by_method,
    reduced,
    rescaled,
)
from veneer.tools.compose.frozen_weights import FrozenWeights, Source
from veneer.tools.compose.full_params import Weigh, combined
from veneer.tools.compose.merge_methods import MERGE_METHODS
from veneer.tools.report_text import counted, rank_range

__all__ = ["ComposeReport", "LayerReport", "compose"]

METHODS = ("sum", "svd", *MERGE_METHODS)
#: pattern -> a factor for the layers that it matches, or one for each adapter
Layers = Mapping[str, float | Sequence[float]]


@dataclass(frozen=True)
class LayerReport:
    """What became of one weight. ``ranks``: of the adapters that change it; ``norm``: ‖ΔW‖ before
    anything was left out; ``error``: the norm of what was left out, as a share of it."""

    path: str
    ranks: tuple[int, ...]
    rank: int
    norm: float
    error: float


@dataclass(frozen=True)
class ComposeReport:
    """What ``compose`` wrote; ``str(report)`` is for people. ``verified``: every adapter proves its
    base, so the result does too. ``notes``: what the caller should know."""

    path: Path
    method: str
    weights: tuple[float, ...]
    layers: tuple[LayerReport, ...]
    verified: bool
    notes: tuple[str, ...]

    @property
    def error(self) -> float:
        """The norm of what was left out in all layers, as a share of that of the whole change."""
        norm = math.hypot(*(layer.norm for layer in self.layers))
        return (
            math.hypot(*(layer.norm * layer.error for layer in self.layers)) / norm if norm else 0.0
        )

    def __str__(self) -> str:
        ranks = rank_range(layer.rank for layer in self.layers)
        adapters, layers = counted(len(self.weights), "adapter"), counted(len(self.layers), "layer")
        worst, lost = (
            max(self.layers, key=lambda layer: layer.error, default=None),
            ", nothing left out",
        )
        if worst is not None and worst.error >= 1e-9:  # rounding in float64
            lost = (
                f"; {self.error:.2%} of the change left out, {worst.error:.2%} at worst"
                f" ({worst.path})"
            )
        said = f"{self.method} of {adapters}: {layers}, {ranks}{lost}"
        return "\n".join([said, *(f"note: {note}" for note in self.notes)])


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
    layers: Layers | None = None,
    base: Source | None = None,
    model: nn.Module | None = None,
    seed: int = 0,
    provenance: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> ComposeReport:
    """Write the adapter that a combination of ``adapters`` is.

    Args:
        adapters: one or several folders, or what ``veneer.adapter_files.read`` gave.
        weights: a number for each; None means 1 each. 0 leaves the adapter out.
        method: one of ``METHODS``; None is "svd" if a rank or an energy is given, else "sum".
        rank: of the result, for every method but "sum" (where it is larger than the weight allows,
            it is what that allows). The merge methods take the sum of the adapters' ranks if
            neither it nor an energy is given.
        energy: instead of a rank: the share of ‖ΔW‖² to keep in each layer, in (0, 1].
        density: the share of entries that ties, dare, dare_ties and prune keep of each ΔWᵢ, in (0,
            1].
        layers: pattern → a factor for the layers that it matches (patterns as in ``LoraConfig``,
            the first that matches counts), or a factor for each adapter.
        base: a model, or its weights by path (a mapping, or a function that raises KeyError).
            Needed for DoRA, and for parameters that are trained in full unless the weights of those
            adapters add up to 1.
        model: beside weights by path, the model that they are of, on the meta device if need be.
            Needed where shapes do not tell how a weight is used: square weights of GPT-2's Conv1D,
            stacks of square matrices.
        seed: of dare's random entries; the result depends on nothing else.

    Raises:
        ConfigError: an option cannot be used.
        AdapterError: the adapters cannot be put side by side, or the base is needed.
        BaseMismatchError: the adapters are of different bases, or ``base`` is another one.
        OutputExistsError: the path exists and ``overwrite`` is False.
    """
    if isinstance(base, str | Path):
        problem, do = f"base={str(base)!r}", "load the model, or give open_checkpoint(folder).read"
        raise ConfigError(problem, "a model, or its weights by path", do)
    adapters = [adapters] if isinstance(adapters, str | Path | AdapterFiles) else list(adapters)
    given, layers = [1.0] * len(adapters) if weights is None else list(weights), layers or {}
    how = _options(len(adapters), given, method, rank, energy, density, layers, seed)
    must_not_exist(Path(out), overwrite)
    files = [
        adapter if isinstance(adapter, AdapterFiles) else read(adapter) for adapter in adapters
    ]
    for file in files:
        file.refuse_trained_tokens("a combination of adapters")
    used = [number for number, weight in enumerate(given) if weight]
    notes = [
        f"{file.path} has weight 0 and is left out" for n, file in enumerate(files) if n not in used
    ]
    sources, base_weights = [files[number] for number in used], FrozenWeights(base, model)
    merged_base(sources)  # of one base, before anything is computed
    notes += _unproven(sources)
    aligned_weights = align(sources, base_weights.order)
    weigh = _layer_weights(
        [given[number] for number in used], used, layers, aligned_weights, sources
    )
    low, reports, variant = _changes(aligned_weights, sources, weigh, how, base_weights)
    full = combined(sources, aligned_weights, weigh, how, base_weights)
    provenance = {"composed": _provenance(files, given, how, layers), **(provenance or {})}
    path = write_derived(
        out, sources, low, full, variant=variant, overwrite=overwrite, provenance=provenance
    )
    verified = all(source.record is not None for source in sources)
    return ComposeReport(path, how.method, tuple(given), tuple(reports), verified, tuple(notes))


def _options(
    count: int, weights: Sequence[float], method: str | None, rank: int | None, energy: float | None,
    density: float | None, layers: Layers, seed: int,
) -> ComposeOptions:  # fmt: skip
    every = [*weights, *(value for factor in layers.values() for value in _listed(factor))]
    finite, given = all(map(_is_finite_number, every)), len(weights)
    nothing = finite and given and not any(weights)
    odd = [
        at
        for at, factor in layers.items()
        if not isinstance(factor, int | float) and len(factor) != count
    ]
    bad_rank = rank is not None and (type(rank) is not int or rank < 1)
    bad_energy = energy is not None and not _is_share(energy)
    reduces = rank is not None or energy is not None
    method = method or ("svd" if reduces else "sum")
    merges, bare = method in MERGE_METHODS, method == "svd" and not reduces
    usual = f"give density={MERGE_METHODS[method].usual}, as in the paper" if merges else ""
    useless = density is not None and method in ("sum", "svd")
    checks = [
        (count == 0, "no adapter", "at least one", "name the adapters"),
        (
            given != count,
            f"{given} weights for {count} adapters",
            "one each",
            "leave them out to weigh all by 1",
        ),
        (not finite, f"weights {every}", "finite numbers", "correct them"),
        (nothing, "weights that are all 0", "one that is not", "there would be nothing to write"),
        (
            odd,
            f"factors of {listing(odd)} for other than {count} adapters",
            "one each",
            "correct it",
        ),
        (
            method not in METHODS,
            f"method={method!r}{nearest(str(method), METHODS)}",
            " | ".join(METHODS),
            'use "sum"',
        ),
        (bad_rank, f"rank={rank!r}", "a whole number of at least 1", "use 16"),
        (bad_energy, f"energy={energy!r}", "a share of ‖ΔW‖² in (0, 1]", "use 0.99"),
        (
            rank is not None and energy is not None,
            "both a rank and an energy",
            "one of them",
            "leave one out",
        ),
        (
            method == "sum" and reduces,
            "a rank or an energy for an exact sum",
            "none",
            "use method='svd'",
        ),
        (
            bare,
            "neither a rank nor an energy for svd",
            "one of them",
            "give rank=16 or energy=0.99",
        ),
        (
            merges and not _is_share(density),
            f"density={density!r} for {method}",
            "a share of entries in (0, 1]",
            usual,
        ),
        (
            useless,
            f"a density for {method}",
            "none",
            f"use it with one of {listing(MERGE_METHODS)}",
        ),
    ]
    problems = [sentence(*said) for wrong, *said in checks if wrong]
    raise_all(ConfigError, "These adapters cannot be composed so", problems)
    return ComposeOptions(method, rank, energy, density or 1.0, seed)


def _is_share(value: Any) -> bool:
    return _is_finite_number(value) and 0 < value <= 1


def _is_finite_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _listed(factor: float | Sequence[float]) -> list[float]:
    return [factor] if isinstance(factor, int | float) else list(factor)


def _provenance(
    adapters: Sequence[AdapterFiles], weights: Sequence[float], how: ComposeOptions, layers: Layers
) -> dict[str, Any]:
    """What goes into the record: of each adapter the name of its folder, the hash of its record,
    and its weight."""
    of = [
        {
            "adapter": each.path.name,
            "record": each.metadata.get("hashes", {}).get("record"),
            "weight": weight,
        }
        for each, weight in zip(adapters, weights, strict=True)
    ]
    options = {"rank": how.rank, "energy": how.energy}
    options |= {"density": how.density, "seed": how.seed} if how.method in MERGE_METHODS else {}
    options |= (
        {"layers": {pattern: _listed(factor) for pattern, factor in layers.items()}}
        if layers
        else {}
    )
    return {
        "method": how.method,
        **{name: value for name, value in options.items() if value is not None},
        "of": of,
    }


def _unproven(sources: Sequence[AdapterFiles]) -> list[str]:
    """Notes on adapters of other libraries. ``AdapterError``: they and others mean different things
    by the same numbers."""
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
        applied(source)  # as PEFT would: an error where it is not known how
    names = listing((str(source.path) for source in foreign), 3)
    return [
        f"{names}: no record of the base, so the result has none; only you can tell that the bases"
        " are one"
    ]


def _layer_weights(
    weights: Sequence[float], used: Sequence[int], layers: Layers, aligned_weights: Sequence[AlignedWeight],
    sources: Sequence[AdapterFiles],
) -> Weigh:  # fmt: skip
    """The weight of an adapter in a layer: its own, times the factor of the first pattern of
    ``layers`` that meets a name of the layer. Each pattern must match something."""
    known = [name for aligned in aligned_weights for name in (aligned.at, aligned.weight) if name]
    for source in sources:
        for path, tensors in source.full.items():
            at = peft_paths.strip_wrappers(path)[0]
            known += [at, *(parameter_path(at, name) for name in tensors)]
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
        if not any(map(test, known)):
            leaves = dict.fromkeys(aligned.at.rpartition(".")[2] for aligned in aligned_weights)
            problem = (
                f"layers pattern {pattern!r} matches no layer{nearest(pattern, [*leaves, *known])}"
            )
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


def _changes(
    aligned_weights: Sequence[AlignedWeight], sources: Sequence[AdapterFiles], weigh: Weigh, how: ComposeOptions,
    base_weights: FrozenWeights,
) -> tuple[dict[str, peft.PeftLayer], list[LayerReport], str]:  # fmt: skip
    """(every change by its path in the file, a report of each weight, the variant)."""
    tied: defaultdict[str, list[AlignedWeight]] = defaultdict(list)
    for aligned in aligned_weights:
        if aligned.alias_of is not None:
            tied[aligned.alias_of[0]].append(aligned)
    weights: dict[str, dict[int, float]] = {}
    for aligned in aligned_weights:
        if aligned.alias_of is None:
            names = [
                name
                for each in (aligned, *tied[aligned.at])
                for name in (each.at, each.weight)
                if name
            ]
            weights[aligned.at] = {
                number: weight for number in aligned.layers if (weight := weigh(names, number))
            }
    changed = [aligned for aligned in aligned_weights if weights.get(aligned.at)]
    extras = any(
        aligned.layers[number].extras for aligned in changed for number in weights[aligned.at]
    )
    rescales = extras and how.method not in MERGE_METHODS
    low, reports = {}, []
    for aligned in changed:
        blend, layer = _change(aligned, weights[aligned.at], sources, how, base_weights, rescales)
        low[aligned.path] = layer
        for alias in tied[aligned.at]:
            own = alias.template.with_low(
                layer.low.T if alias.alias_of and alias.alias_of[1] else layer.low
            )
            low[alias.path] = own.with_magnitude(blend.magnitude)
        ranks = tuple(aligned.layers[number].low.rank for number in weights[aligned.at])
        error = blend.error / blend.norm if blend.norm else 0.0
        reports.append(LayerReport(aligned.at, ranks, layer.rank, blend.norm, error))
    ordered = {
        aligned.path: low[aligned.path] for aligned in aligned_weights if aligned.path in low
    }
    return ordered, reports, "dora" if rescales else "lora"


def _change(
    aligned: AlignedWeight, weights: Mapping[int, float], sources: Sequence[AdapterFiles], how: ComposeOptions,
    base_weights: FrozenWeights, rescales: bool,
) -> tuple[Blend, peft.PeftLayer]:  # fmt: skip
    """One weight's change: as a value, and as a file holds it."""
    layers = [aligned.layers[number] for number in weights]
    dtype = (
        torch.float64 if any(layer.A.dtype == torch.float64 for layer in layers) else torch.float32
    )
    magnitudes = [layer.extras.get(peft.MAGNITUDE) for layer in layers]
    if (
        how.method == "sum"
        and list(weights.values()) == [1.0]
        and (magnitudes[0] is not None or not rescales)
    ):
        # the change itself, for which no base is needed; what PEFT's file holds of some variants
        # has too large a rank
        low = layers[0].low.compact().to(dtype)
        return Blend(low, magnitudes[0], low.norm(), 0.0), layers[0].with_low(low).with_magnitude(
            magnitudes[0]
        )
    base_weight = None
    if rescales or any(magnitude is not None for magnitude in magnitudes):
        if base_weights.source is None:
            problem = (
                f"DoRA, which rescales the rows of base and change together (at {aligned.at!r}),"
                " without the base"
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
    if how.method in MERGE_METHODS:
        blend = merged_by_method(
            terms, how, None if base_weight is None else base_weight.weight, aligned.at
        )
    elif base_weight is not None:
        blend = rescaled(terms, how, base_weight.weight, aligned.at, dtype)
    else:
        blend = reduced(
            LowRank.sum([term.low for term in terms], [term.weight for term in terms]), how
        )
    low = (blend.low.T if swapped else blend.low).to(dtype)
    return blend, layers[0].with_low(low).with_magnitude(blend.magnitude)
