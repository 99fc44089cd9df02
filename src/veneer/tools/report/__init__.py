"""A look inside an adapter: how much of its rank is in use, where its change went, what it may have
made forget.

    examine(adapter, …)  ->  Report      numbers alone; ``to_dict()`` is the JSON
    page.page(facts)     ->  str         one HTML page, drawn from that JSON and nothing else

Of each weight, from the thin factors: the singular values of ΔW (of a stack or a grouped
convolution, the root of the sum of squares over its groups), and

    effective rank   exp(−Σ pᵢ log pᵢ), pᵢ = σᵢ / Σ σ: Roy and Vetterli 2007, "The effective rank". r if all are equal
    rank for 99 %    the smallest that keeps this share of ‖ΔW‖²
    lost at rank r   ‖what truncation to r leaves out‖ / ‖ΔW‖, of all weights together

With a base: ‖W' − W‖ / ‖W‖ and intruder dimensions (``tools/intruders.py``). With another adapter:
how the spaces of both lie to each other (``tools/compare.py``), beside what two random spaces
share, max(r, r') / n.
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
from veneer.tools.compose.align import AlignedWeight, align, applied
from veneer.tools.compose.frozen_weights import FrozenWeights, Source
from veneer.tools.intruders import COUNT, THRESHOLD, WeightIntruders, find_intruders

__all__ = ["Cut", "Report", "ReportLayer", "Shared", "examine"]

#: the share of ‖ΔW‖² that the next rank has to hold, and of the allotted rank beyond which all of
#: it counts as in use
ENOUGH, FULL = 0.99, 0.75


@dataclass(frozen=True)
class Shared:
    """What a weight's change shares with the other adapter's: φ and the principal angles in degrees
    of the spaces that it reads from (``read``) and writes to (``written``); ``chance``: φ of two
    random spaces of these ranks."""

    cosine: float
    read: float | None
    written: float | None
    chance_read: float
    chance_written: float
    angles_read: tuple[float, ...]
    angles_written: tuple[float, ...]


@dataclass(frozen=True)
class ReportLayer:
    """One weight that changes. ``block``: the first number of its path, None without one.
    ``relative``: ‖W' − W‖ / ‖W‖; None without a base. ``cosines``, ``control``: those of the
    leading singular vectors of W', and of the control; empty where none were looked at.
    ``intruders``: how many are below the threshold, in W' and in the control."""

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
        """The share of the allotted rank in use."""
        return self.effective_rank / self.rank


@dataclass(frozen=True)
class Cut:
    """All weights truncated to a rank: ``lost`` is the norm of what that leaves out, as a share of
    the whole."""

    rank: int
    lost: float


@dataclass(frozen=True)
class Report:
    """What ``examine`` found. ``base``: whether its weights were read; ``other``: the adapter
    beside. ``in_full``: what is trained whole, of which nothing here speaks. ``next_rank`` and
    ``why``: what to train with next."""

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
    #: what was found of intruders, for a repair; no part of the JSON
    found: tuple[WeightIntruders, ...] = field(default=(), repr=False)

    @property
    def norm(self) -> float:
        return math.hypot(*(layer.norm for layer in self.layers))

    def to_dict(self) -> dict[str, Any]:
        """For JSON, without numbers that it does not have."""
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
    """Look inside an adapter.

    Args:
        base, model: as ``compose`` takes them.
        base_name: what to call the base.
        other: another adapter of the same model.
        count, threshold: of intruder dimensions; 0 looks for none.
        seed: of the control's random directions.
        progress: called with (path, done, total) after each weight of the base.

    Raises:
        AdapterError: an adapter cannot be read, changes nothing at a low rank, or has other shapes
            than the other one; the base lacks a weight.
        BaseMismatchError: the base is another one than the adapter was made for.
    """
    saved = adapter if isinstance(adapter, AdapterFiles) else read(adapter)
    weights = FrozenWeights(base, model)
    aligned = [one for one in align([saved], weights.order) if one.alias_of is None]
    if not aligned:
        found = f"{saved.path}, which changes no weight at a low rank"
        raise AdapterError(
            found,
            "changes of the form scale · B @ A",
            "`veneer inspect` lists what it trains in full",
        )
    lows, found = applied(saved), {}
    if base is not None:
        search = find_intruders(
            saved, weights, count=count, threshold=threshold, control=True, seed=seed
        )
        for done, one in enumerate(search, 1):
            found[one.aligned.at] = one
            if progress is not None:
                progress(one.aligned.at, done, len(aligned))
    difference = None if other is None else compare(saved, other)
    shared = (
        {}
        if difference is None
        else {layer.path: _shared(layer, lows[layer.path]) for layer in difference.layers}
    )
    looks = [
        _layer(one, lows[one.at], found.get(one.at), threshold, shared.get(one.at))
        for one in aligned
    ]
    cuts = _cuts(looks)
    next_rank, why = _next_rank(looks, cuts)
    own = [
        f"{peft_paths.strip_wrappers(path)[0]}.{name}"
        for path, tensors in saved.full.items()
        for name in tensors
    ]
    own += [f"{len(rows.ids)} tokens of {path}" for path, rows in saved.tokens.items()]
    return Report(
        str(saved.path), _about(saved), base_name if base is not None else None,
        None if difference is None else str(difference.b), tuple(looks), tuple(cuts), next_rank, why, tuple(own),
        () if difference is None else difference.only_a, () if difference is None else difference.only_b,
        count if base is not None else 0, threshold, sum(one.seconds for one in found.values()), tuple(found.values()),
    )  # fmt: skip


def _about(saved: AdapterFiles) -> dict[str, Any]:
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
    """exp of the entropy of the singular values as shares of their sum; 0 where all are 0."""
    whole = float(spectrum.sum())
    if not whole:
        return 0.0
    shares = spectrum / whole
    return float(torch.special.entr(shares).sum().exp())


def _layer(
    aligned: AlignedWeight,
    low: LowRank,
    found: WeightIntruders | None,
    threshold: float,
    shared: Shared | None,
) -> ReportLayer:
    svd = low.svd()
    spectrum = svd.S.square().sum(0).sqrt()
    norm, number = float(spectrum.norm()), re.search(r"(?:^|\.)(\d+)\.", f"{aligned.at}.")
    rank_90, rank_99 = (svd.rank_for(share) if norm else 0 for share in (0.9, ENOUGH))
    relative, cosines, control, intruders = None, (), (), None
    if found is not None:
        relative = found.distance / found.norm if found.norm else math.inf
        cosines, control = found.cosines, found.control
        intruders = (
            (found.count, sum(cosine < threshold for cosine in control)) if cosines else None
        )
    return ReportLayer(
        aligned.at, None if number is None else int(number[1]), aligned.at.rpartition(".")[2], aligned.template.dims,
        aligned.template.rank, norm, tuple(spectrum.tolist()), effective_rank(spectrum), rank_90, rank_99, relative,
        cosines, control, intruders, shared,
    )  # fmt: skip


def _shared(layer: LayerDifference, low: LowRank) -> Shared:
    most, rows, columns = max(layer.ranks), layer.rows, layer.columns
    return Shared(
        layer.cosine,
        None if rows is None else rows.similarity,
        None if columns is None else columns.similarity,
        min(1.0, most / low.A.shape[2]),
        min(1.0, most / low.B.shape[1]),
        () if rows is None else rows.angles,
        () if columns is None else columns.angles,
    )


def _cuts(layers: Sequence[ReportLayer]) -> list[Cut]:
    """At the powers of two below the largest rank, and at that."""
    largest, whole = (
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
            Cut(rank, lost / whole if whole else 0.0)
            for rank, lost in zip(ranks, lost, strict=True)
        ),
        Cut(largest, 0.0),
    ]


def _next_rank(layers: Sequence[ReportLayer], cuts: Sequence[Cut]) -> tuple[int, str]:
    """(the rank to train with next, why). By the change alone: it knows nothing of the loss."""
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
