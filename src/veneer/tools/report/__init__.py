"""Examine an adapter: how much of its rank is used, which weights it changes most, and whether the
model may have forgotten something.

    examine(adapter, …)  ->  Report      all numbers; ``to_dict()`` returns them as JSON values
    report_page.page(facts)  ->  str     one HTML page, from these JSON values alone

For each weight the singular values σᵢ of ΔW are computed from the factors A and B. (A stack of
matrices or a grouped convolution has several ΔW. Then σᵢ is the root of the sum of the squares of
their i-th singular values.) From these values follow

    effective rank   exp(−Σ pᵢ log pᵢ) with pᵢ = σᵢ / Σ σ (Roy and Vetterli 2007, "The effective
                     rank"). If r singular values are equal and the others 0, it is r
    rank for 99 %    the lowest rank to which ΔW can be truncated so that 99 % of ‖ΔW‖² remain
    lost at rank r   ‖ΔW − ΔW truncated to r‖ / ‖ΔW‖, with norms over all weights together

With a base, the report adds ‖W' − W‖ / ‖W‖, where W' is the weight W with the change. It also adds
intruder dimensions: leading singular vectors of W' that resemble no singular vector of W
(``tools/intruders.py``). With another adapter, it adds the similarity φ of the two adapters' row
spaces and column spaces: 1 if one contains the other, 0 if they are orthogonal
(``tools/compare.py``). For comparison it adds the expected φ of two random spaces of ranks r and r'
in n dimensions, max(r, r') / n.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from veneer.adapter_files.folder import AdapterFiles
from veneer.errors import AdapterError
from veneer.formats import peft_paths
from veneer.lowrank import LowRank
from veneer.tools.compare import LayerDifference, compare
from veneer.tools.compose.align import AlignedWeight, align, effective_changes
from veneer.tools.compose.frozen_weights import FrozenWeights, Source
from veneer.tools.intruders import (
    DEFAULT_THRESHOLD,
    DEFAULT_VECTOR_COUNT,
    WeightIntruders,
    find_intruders,
)

__all__ = ["Cut", "Report", "ReportLayer", "Shared", "examine"]

#: KEPT_SHARE: the share of ‖ΔW‖² that must remain if ΔW is truncated to the suggested rank.
#: FULL_USE_SHARE: the rank counts as fully used if the effective rank is at least this share of it
KEPT_SHARE, FULL_USE_SHARE = 0.99, 0.75


@dataclass(frozen=True)
class Shared:
    """The comparison of two adapters' changes of one weight, ΔW and ΔW'. φ is the similarity of two
    spaces in [0, 1]: 1 if one contains the other, 0 if they are orthogonal (Hu et al. 2021, section
    7.2).

    Fields:
        cosine: ⟨ΔW, ΔW'⟩ / (‖ΔW‖ ‖ΔW'‖).
        read, written: φ of the row spaces (the input directions that a change reads), and φ of the
            column spaces (the output directions that a change writes); None if a change is zero.
        chance_read, chance_written: the expected φ of two random spaces with the ranks of the two
            changes, for comparison with ``read`` and ``written``.
        angles_read, angles_written: the principal angles between the row spaces, and between the
            column spaces, in degrees, ascending; empty if a change is zero.
    """

    cosine: float
    read: float | None
    written: float | None
    chance_read: float
    chance_written: float
    angles_read: tuple[float, ...]
    angles_written: tuple[float, ...]


@dataclass(frozen=True)
class ReportLayer:
    """One weight W that the adapter changes by ΔW. W' is the changed weight.

    Fields:
        path: the path of the weight's module, or of the weight if PEFT targets it as a parameter.
        block: the first number in ``path``, which is the index of the transformer block; None if
            ``path`` has no number.
        kind: the last name in ``path``, such as "q_proj".
        shape: the shape of ΔW as (groups, out, in); groups is the number of matrices in a stack or
            of groups of a convolution, else 1.
        rank: the rank r of the factors A and B.
        norm: ‖ΔW‖ (Frobenius norm).
        spectrum: the singular values of ΔW, descending.
        effective_rank: exp of the entropy of the singular values divided by their sum.
        rank_90, rank_99: the lowest ranks to which ΔW can be truncated so that 90 % and 99 % of
            ‖ΔW‖² remain; 0 if ΔW is zero.
        relative: ‖W' − W‖ / ‖W‖, infinite if W is zero; None without a base.
        cosines: for each leading singular vector of W', its highest cosine with a singular vector
            of W; empty if none were examined.
        control: the same cosines for a control, W plus a random change with the singular values of
            ΔW.
        intruders: (how many ``cosines`` are below the threshold, how many ``control`` are), that
            is, the number of singular vectors that resemble none of W; None if none were examined.
        shared: the comparison with the other adapter's change; None if there is no other adapter,
            or if it does not change this weight.
    """

    path: str
    block: int | None
    kind: str
    shape: tuple[int, int, int]
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
        """The effective rank divided by the rank."""
        return self.effective_rank / self.rank


@dataclass(frozen=True)
class Cut:
    """The effect of truncating the change ΔW of every weight to ``rank``. ``lost``: ‖ΔW − truncated
    ΔW‖ / ‖ΔW‖, with norms over all weights together."""

    rank: int
    lost: float


@dataclass(frozen=True)
class Report:
    """The result of ``examine``.

    Fields:
        adapter: the path of the adapter's folder.
        about: facts about the adapter, such as its rank and variant.
        base: the name of the base; None if its weights were not read.
        other: the path of the other adapter's folder; None if none was compared.
        cuts: the effect of truncating all changes to lower ranks, by ascending rank; the last entry
            is the largest rank, which loses nothing.
        next_rank, why: the rank that is suggested for the next training, and the reason.
        in_full: parameters and token rows that are trained in full, which the report does not
            examine.
        only_here, only_other: the weights, parameters and token rows that only this adapter
            changes, and those that only the other adapter changes.
        leading: how many leading singular vectors of each changed weight were examined; 0 without a
            base.
        threshold: a vector is an intruder if its highest cosine with a singular vector of the base
            weight is below this.
        seconds: the duration of the search for intruders.
        weight_intruders: the intruders of each weight, for ``compose.repair``, which scales them;
            not in the JSON values.
    """

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
    threshold: float = DEFAULT_THRESHOLD
    seconds: float = 0.0
    weight_intruders: tuple[WeightIntruders, ...] = field(default=(), repr=False)

    @property
    def norm(self) -> float:
        """The Frobenius norm of the changes of all weights together, the root of Σ ‖ΔW‖²."""
        return math.hypot(*(layer.norm for layer in self.layers))

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON values, without ``weight_intruders``. NaN and infinity become None."""
        facts = {
            field_name: field_value
            for field_name, field_value in vars(self).items()
            if field_name != "weight_intruders"
        }
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
    count: int = DEFAULT_VECTOR_COUNT,
    threshold: float = DEFAULT_THRESHOLD,
    seed: int = 0,
    progress: Callable[[str, int, int], None] | None = None,
) -> Report:
    """Examine an adapter; the module's docstring defines the numbers.

    Args:
        base: the base model, or its dense weights by path (a mapping, or a function that raises
            KeyError for an unknown path). None leaves out the relative change and the intruders.
        model: the model that the weights in ``base`` belong to, possibly on the meta device.
        base_name: the name of the base that the report shows.
        other: another adapter of the same model.
        count, threshold: how many leading singular vectors of each changed weight to examine (0:
            none), and the cosine in (0, 1] below which a vector is an intruder.
        seed: seed of the control, a change of each weight with the singular values of ΔW in random
            directions.
        progress: called with (path of a weight, number of weights done, number of weights) after
            the search for intruders in the weight.

    Raises:
        AdapterError: an adapter cannot be read, the adapter has no low-rank change, the shapes of
            the two adapters differ, or the base lacks a weight.
        BaseMismatchError: the adapter was trained on another base.
        ConfigError: ``count`` or ``threshold`` has an invalid value, and ``base`` is not None.
    """
    base_weights = FrozenWeights(base, model)
    saved_adapter = base_weights.read_adapter(adapter)
    aligned_weights = [
        aligned_weight
        for aligned_weight in align([saved_adapter], base_weights.parameter_order)
        if aligned_weight.alias_of is None
    ]
    if not aligned_weights:
        raise AdapterError(
            f"{saved_adapter.path}, which changes no weight at a low rank",
            "changes of the form scale · B @ A",
            "`veneer inspect` lists what it trains in full",
        )
    changes_by_path, intruders_by_path = effective_changes(saved_adapter), {}
    if base is not None:
        intruder_results = find_intruders(
            saved_adapter, base_weights, count=count, threshold=threshold, control=True, seed=seed
        )
        intruders_by_path = _collect_intruders(intruder_results, len(aligned_weights), progress)
    other = None if other is None else base_weights.read_adapter(other)
    adapter_difference = None if other is None else compare(saved_adapter, other)
    comparisons = {
        layer.path: _relate_layers(layer, changes_by_path[layer.path])
        for layer in (() if adapter_difference is None else adapter_difference.layers)
    }
    layers = [
        _examine_layer(aligned_weight, changes_by_path, intruders_by_path, threshold, comparisons)
        for aligned_weight in aligned_weights
    ]
    cuts = _cuts(layers)
    next_rank, reason = _next_rank(layers, cuts)
    return Report(
        adapter=str(saved_adapter.path),
        about=_describe_adapter(saved_adapter),
        base=base_name if base is not None else None,
        other=None if adapter_difference is None else str(adapter_difference.b),
        layers=tuple(layers),
        cuts=tuple(cuts),
        next_rank=next_rank,
        why=reason,
        in_full=tuple(_full_names(saved_adapter)),
        only_here=() if adapter_difference is None else adapter_difference.only_a,
        only_other=() if adapter_difference is None else adapter_difference.only_b,
        leading=count if base is not None else 0,
        threshold=threshold,
        seconds=sum(weight_intruders.seconds for weight_intruders in intruders_by_path.values()),
        weight_intruders=tuple(intruders_by_path.values()),
    )


def _collect_intruders(
    results: Iterable[WeightIntruders],
    weight_count: int,
    progress: Callable[[str, int, int], None] | None,
) -> dict[str, WeightIntruders]:
    """The results by path of the weight. ``results`` is computed while it is iterated, and
    ``progress`` is called after each result."""
    intruders_by_path = {}
    for done_count, weight_intruders in enumerate(results, 1):
        path = weight_intruders.aligned_weight.model_path
        intruders_by_path[path] = weight_intruders
        if progress is not None:
            progress(path, done_count, weight_count)
    return intruders_by_path


def _full_names(saved_adapter: AdapterFiles) -> list[str]:
    """The paths of the parameters that are trained in full, then a text such as "3 tokens of
    model.embed_tokens" for each weight with trained token rows."""
    names = [
        f"{peft_paths.strip_wrappers(path)[0]}.{name}"
        for path, tensors in saved_adapter.full.items()
        for name in tensors
    ]
    return names + [
        f"{len(rows.ids)} tokens of {path}" for path, rows in saved_adapter.tokens.items()
    ]


def _describe_adapter(saved_adapter: AdapterFiles) -> dict[str, Any]:
    base_record = saved_adapter.metadata.get("base", {})
    return {
        "base": base_record.get("name") or saved_adapter.peft_config.get("base_model_name_or_path"),
        "variant": saved_adapter.config.variant,
        "rank": saved_adapter.config.rank,
        "alpha": saved_adapter.peft_config["lora_alpha"],
        "parameters": saved_adapter.parameters,
        "verified": bool(saved_adapter.record),
    }


def effective_rank(spectrum: Tensor) -> float:
    """exp(−Σ pᵢ log pᵢ) with pᵢ = σᵢ / Σ σ, where σᵢ are the singular values in ``spectrum`` [k];
    0.0 if all are 0 (Roy and Vetterli 2007, "The effective rank")."""
    singular_value_sum = float(spectrum.sum())
    if not singular_value_sum:
        return 0.0
    shares = spectrum / singular_value_sum
    return float(torch.special.entr(shares).sum().exp())


def _examine_layer(
    aligned_weight: AlignedWeight,
    changes_by_path: Mapping[str, LowRank],
    intruders_by_path: Mapping[str, WeightIntruders],
    threshold: float,
    shared_by_path: Mapping[str, Shared],
) -> ReportLayer:
    path = aligned_weight.model_path
    weight_intruders = intruders_by_path.get(path)
    svd = changes_by_path[path].svd()
    spectrum = svd.S.square().sum(0).sqrt()
    norm = float(spectrum.norm())
    block_match = re.search(r"(?:^|\.)(\d+)\.", f"{path}.")
    rank_90, rank_99 = (svd.rank_for(share) if norm else 0 for share in (0.9, KEPT_SHARE))
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
        path=path,
        block=None if block_match is None else int(block_match[1]),
        kind=path.rpartition(".")[2],
        shape=aligned_weight.any_layer.dims,
        rank=aligned_weight.any_layer.rank,
        norm=norm,
        spectrum=tuple(spectrum.tolist()),
        effective_rank=effective_rank(spectrum),
        rank_90=rank_90,
        rank_99=rank_99,
        relative=relative,
        cosines=cosines,
        control=control,
        intruders=intruders,
        shared=shared_by_path.get(path),
    )


def _relate_layers(layer: LayerDifference, low_rank: LowRank) -> Shared:
    largest_rank, row_spaces, column_spaces = max(layer.ranks), layer.rows, layer.columns
    return Shared(
        layer.cosine,
        None if row_spaces is None else row_spaces.similarity,
        None if column_spaces is None else column_spaces.similarity,
        min(1.0, largest_rank / low_rank.A.shape[2]),
        min(1.0, largest_rank / low_rank.B.shape[1]),
        () if row_spaces is None else row_spaces.angles,
        () if column_spaces is None else column_spaces.angles,
    )


def _cuts(layers: Sequence[ReportLayer]) -> list[Cut]:
    """The effects of truncating the changes of all layers to each power of two below the largest
    rank of a layer, and to the largest rank itself, by ascending rank."""
    largest_rank = max(layer.rank for layer in layers)
    total_norm = math.hypot(*(layer.norm for layer in layers))
    ranks = [2**power for power in range(largest_rank.bit_length()) if 2**power < largest_rank]
    lost_norms = [
        math.hypot(*(sigma for layer in layers for sigma in layer.spectrum[rank:]))
        for rank in ranks
    ]
    return [
        *(
            Cut(rank, lost_norm / total_norm if total_norm else 0.0)
            for rank, lost_norm in zip(ranks, lost_norms, strict=True)
        ),
        Cut(largest_rank, 0.0),
    ]


def _next_rank(layers: Sequence[ReportLayer], cuts: Sequence[Cut]) -> tuple[int, str]:
    """(the rank that is suggested for the next training, the reason). It is chosen by the singular
    values of ΔW alone, without measuring a loss. ``cuts``: the result of ``_cuts(layers)``."""
    largest_rank = cuts[-1].rank
    median_use = sorted(layer.used for layer in layers)[len(layers) // 2]
    if not any(layer.norm for layer in layers):
        return largest_rank, "every change is zero: it was not trained"
    sufficient_rank = next(cut.rank for cut in cuts if cut.lost**2 <= 1 - KEPT_SHARE)
    if sufficient_rank < largest_rank:
        retained_share = 1 - next(cut.lost for cut in cuts if cut.rank == sufficient_rank) ** 2
        return sufficient_rank, f"rank {sufficient_rank} holds {retained_share:.1%} of ‖ΔW‖²"
    if median_use >= FULL_USE_SHARE:
        return (
            2 * largest_rank,
            (
                f"the median weight uses {median_use:.0%} of its rank: try whether twice as much"
                " lowers the loss"
            ),
        )
    return (
        largest_rank,
        f"every smaller power of two would lose more than {1 - KEPT_SHARE:.0%} of ‖ΔW‖²",
    )
