"""Examine an adapter: how much of its rank is used, which weights it changes most, and what the
model may have forgotten.

    examine(adapter, …)  ->  Report      numbers alone; ``to_dict()`` is the JSON
    report_page.page(facts)  ->  str     one HTML page, rendered from that JSON alone

Computed for each weight from the thin factors: the singular values of ΔW (for a stack or a grouped
convolution, the root of the sum of squares over its groups), and

    effective rank   exp(−Σ pᵢ log pᵢ), pᵢ = σᵢ / Σ σ: Roy and Vetterli 2007, "The effective rank".
                     It is r if all σᵢ are equal
    rank for 99 %    the lowest rank that keeps this share of ‖ΔW‖²
    lost at rank r   ‖ΔW − ΔW truncated to r‖ / ‖ΔW‖, over all weights

With a base: ‖W' − W‖ / ‖W‖ and intruder dimensions (``tools/intruders.py``). With another adapter:
the similarity of the spaces of both (``tools/compare.py``), and that of two random spaces,
max(r, r') / n.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from veneer.adapter_files.folder import AdapterFiles, read
from veneer.errors import AdapterError
from veneer.formats import peft_paths
from veneer.lowrank import LowRank
from veneer.tools.compare import LayerDifference, compare
from veneer.tools.compose.align import AlignedWeight, align, applied_products
from veneer.tools.compose.frozen_weights import FrozenWeights, Source
from veneer.tools.intruders import COUNT, THRESHOLD, WeightIntruders, find_intruders

__all__ = ["Cut", "Report", "ReportLayer", "Shared", "examine"]

#: the share of ‖ΔW‖² that the suggested rank must keep; the share of the allotted rank above which
#: the rank counts as fully used
ENOUGH, FULL = 0.99, 0.75


@dataclass(frozen=True)
class Shared:
    """The similarity of a weight's change to that of the other adapter. ``read`` and ``written``:
    φ of the row spaces and of the column spaces; ``angles``: their principal angles in degrees;
    ``chance``: φ of two random spaces of these ranks."""

    cosine: float
    read: float | None
    written: float | None
    chance_read: float
    chance_written: float
    angles_read: tuple[float, ...]
    angles_written: tuple[float, ...]


@dataclass(frozen=True)
class ReportLayer:
    """One weight that changes. ``block``: the first number in its path, or None. ``relative``: ‖W'
    − W‖ / ‖W‖; None without a base. ``cosines``, ``control``: cosines of the leading singular
    vectors of W' and of the control; empty if none were examined. ``intruders``: how many are below
    the threshold, in W' and in the control."""

    path: str
    block: int | None
    kind: str
    shape: tuple[int, int, int]  # groups, out, in
    rank: int
    norm: float
    spectrum: tuple[float, ...]
    effective_rank: float
    rank_90: int
    rank_99: int
    relative: float | None = None
    cosines: tuple[float, ...] = ()
    control: tuple[float, ...] = ()
    intruders: tuple[int, int] | None = None
    shared: Shared | None = None

    @property
    def used(self) -> float:
        """The used share of the allotted rank."""
        return self.effective_rank / self.rank


@dataclass(frozen=True)
class Cut:
    """All weights truncated to a rank. ``lost``: ‖truncated part‖ / ‖ΔW‖."""

    rank: int
    lost: float


@dataclass(frozen=True)
class Report:
    """The result of ``examine``. ``base``: its name, None if its weights were not read; ``other``:
    the other adapter. ``in_full``: parameters trained in full, which the report does not examine.
    ``next_rank`` and ``why``: the rank to train with next, and the reason. ``cuts``: truncations of
    all layers to lower ranks."""

    adapter: str
    about: Mapping[str, Any]
    base: str | None
    other: str | None
    layers: tuple[ReportLayer, ...]
    cuts: tuple[Cut, ...]
    next_rank: int
    why: str
    in_full: tuple[str, ...]
    only_here: tuple[str, ...] = ()
    only_other: tuple[str, ...] = ()
    leading: int = 0
    threshold: float = THRESHOLD
    seconds: float = 0.0
    #: the intruders of each weight, as ``repair`` takes them; not in the JSON
    found: tuple[WeightIntruders, ...] = field(default=(), repr=False)

    @property
    def norm(self) -> float:
        return math.hypot(*(layer.norm for layer in self.layers))

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON values; NaN and infinity become None."""
        facts = {name: value for name, value in vars(self).items() if name != "found"}
        facts["layers"] = [{**asdict(layer), "used": layer.used} for layer in self.layers]
        facts["cuts"] = [asdict(cut) for cut in self.cuts]
        return json.loads(
            json.dumps({**facts, "norm": self.norm}, default=list), parse_constant=lambda _: None
        )


@torch.no_grad()
def examine(
    adapter: str | Path | AdapterFiles,
    *,
    base: Source | None = None,
    model: nn.Module | None = None,
    base_name: str | None = None,
    other: str | Path | AdapterFiles | None = None,
    count: int = COUNT,
    threshold: float = THRESHOLD,
    seed: int = 0,
    progress: Callable[[str, int, int], None] | None = None,
) -> Report:
    """Examine an adapter.

    Args:
        base, model: as ``compose`` takes them.
        base_name: the name of the base in the report.
        other: another adapter of the same model.
        count, threshold: how many leading singular vectors of each weight to examine (0: none), and
            the cosine below which one is an intruder.
        seed: seed of the control's random directions.
        progress: called with (path, done, total) after each weight of the base.

    Raises:
        AdapterError: an adapter cannot be read, has no low-rank change, or its shapes differ from
            those of ``other``; or the base lacks a weight.
        BaseMismatchError: the adapter was trained on another base.
    """
    saved = adapter if isinstance(adapter, AdapterFiles) else read(adapter)
    weights = FrozenWeights(base, model)
    aligned_weights = [
        aligned for aligned in align([saved], weights.parameter_order) if aligned.alias_of is None
    ]
    if not aligned_weights:
        problem = f"{saved.path}, which changes no weight at a low rank"
        raise AdapterError(
            problem,
            "changes of the form scale · B @ A",
            "`veneer inspect` lists what it trains in full",
        )
    lows, intruders = applied_products(saved), {}
    if base is not None:
        search = find_intruders(
            saved, weights, count=count, threshold=threshold, control=True, seed=seed
        )
        for done, result in enumerate(search, 1):
            intruders[result.aligned.model_path] = result
            if progress is not None:
                progress(result.aligned.model_path, done, len(aligned_weights))
    difference = None if other is None else compare(saved, other)
    relations = [] if difference is None else difference.layers
    shared = {layer.path: _relate_layers(layer, lows[layer.path]) for layer in relations}
    layers = [
        _examine_layer(aligned, lows[path], intruders.get(path), threshold, shared.get(path))
        for aligned in aligned_weights
        for path in [aligned.model_path]
    ]
    cuts = _cuts(layers)
    next_rank, reason = _next_rank(layers, cuts)
    return Report(
        adapter=str(saved.path),
        about=_describe_adapter(saved),
        base=base_name if base is not None else None,
        other=None if difference is None else str(difference.b),
        layers=tuple(layers),
        cuts=tuple(cuts),
        next_rank=next_rank,
        why=reason,
        in_full=tuple(_full_names(saved)),
        only_here=() if difference is None else difference.only_a,
        only_other=() if difference is None else difference.only_b,
        leading=count if base is not None else 0,
        threshold=threshold,
        seconds=sum(result.seconds for result in intruders.values()),
        found=tuple(intruders.values()),
    )


def _full_names(saved: AdapterFiles) -> list[str]:
    """Parameters that are trained in full, and descriptions of trained token rows."""
    names = [
        f"{peft_paths.strip_wrappers(path)[0]}.{name}"
        for path, tensors in saved.full.items()
        for name in tensors
    ]
    return names + [f"{len(rows.ids)} tokens of {path}" for path, rows in saved.tokens.items()]


def _describe_adapter(saved: AdapterFiles) -> dict[str, Any]:
    record = saved.metadata.get("base", {})
    return {
        "base": record.get("name") or saved.peft_config.get("base_model_name_or_path"),
        "variant": saved.config.variant,
        "rank": saved.config.rank,
        "alpha": saved.peft_config["lora_alpha"],
        "parameters": saved.parameters,
        "verified": bool(saved.record),
    }


def effective_rank(spectrum: Tensor) -> float:
    """exp of the entropy of the singular values, normalised to sum 1; 0 if all are 0."""
    total = float(spectrum.sum())
    if not total:
        return 0.0
    shares = spectrum / total
    return float(torch.special.entr(shares).sum().exp())


def _examine_layer(
    aligned: AlignedWeight,
    low: LowRank,
    weight_intruders: WeightIntruders | None,
    threshold: float,
    shared: Shared | None,
) -> ReportLayer:
    svd = low.svd()
    spectrum = svd.S.square().sum(0).sqrt()
    norm, number = float(spectrum.norm()), re.search(r"(?:^|\.)(\d+)\.", f"{aligned.model_path}.")
    rank_90, rank_99 = (svd.rank_for(share) if norm else 0 for share in (0.9, ENOUGH))
    relative, cosines, control, intruders = None, (), (), None
    if weight_intruders is not None:
        relative = (
            weight_intruders.distance / weight_intruders.norm if weight_intruders.norm else math.inf
        )
        cosines, control = weight_intruders.cosines, weight_intruders.control
        intruders = (
            (weight_intruders.count, sum(cosine < threshold for cosine in control))
            if cosines
            else None
        )
    return ReportLayer(
        path=aligned.model_path,
        block=None if number is None else int(number[1]),
        kind=aligned.model_path.rpartition(".")[2],
        shape=aligned.template.dims,
        rank=aligned.template.rank,
        norm=norm,
        spectrum=tuple(spectrum.tolist()),
        effective_rank=effective_rank(spectrum),
        rank_90=rank_90,
        rank_99=rank_99,
        relative=relative,
        cosines=cosines,
        control=control,
        intruders=intruders,
        shared=shared,
    )


def _relate_layers(layer: LayerDifference, low: LowRank) -> Shared:
    largest_rank, rows, columns = max(layer.ranks), layer.rows, layer.columns
    return Shared(
        layer.cosine,
        None if rows is None else rows.similarity,
        None if columns is None else columns.similarity,
        min(1.0, largest_rank / low.A.shape[2]),
        min(1.0, largest_rank / low.B.shape[1]),
        () if rows is None else rows.angles,
        () if columns is None else columns.angles,
    )


def _cuts(layers: Sequence[ReportLayer]) -> list[Cut]:
    """Truncations at the powers of two below the largest rank, and at that rank."""
    largest, total_norm = (
        max(layer.rank for layer in layers),
        math.hypot(*(layer.norm for layer in layers)),
    )
    ranks = [2**power for power in range(largest.bit_length()) if 2**power < largest]
    lost = [
        math.hypot(*(value for layer in layers for value in layer.spectrum[rank:]))
        for rank in ranks
    ]
    return [
        *(
            Cut(rank, lost / total_norm if total_norm else 0.0)
            for rank, lost in zip(ranks, lost, strict=True)
        ),
        Cut(largest, 0.0),
    ]


def _next_rank(layers: Sequence[ReportLayer], cuts: Sequence[Cut]) -> tuple[int, str]:
    """(the rank to train with next, the reason), from the change alone, without any loss."""
    allotted = cuts[-1].rank
    used = sorted(layer.used for layer in layers)[len(layers) // 2]
    if not any(layer.norm for layer in layers):
        return allotted, "every change is zero: it was not trained"
    enough = next(cut.rank for cut in cuts if cut.lost**2 <= 1 - ENOUGH)
    if enough < allotted:
        return (
            enough,
            (
                f"rank {enough} holds {1 - next(c.lost for c in cuts if c.rank == enough) ** 2:.1%}"
                " of ‖ΔW‖²"
            ),
        )
    if used >= FULL:
        return (
            2 * allotted,
            (
                f"the median weight uses {used:.0%} of its rank: try whether twice as much lowers"
                " the loss"
            ),
        )
    return allotted, f"every smaller power of two would lose more than {1 - ENOUGH:.0%} of ‖ΔW‖²"
