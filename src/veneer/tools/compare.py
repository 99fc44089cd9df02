"""Two adapters side by side: where they change the model, how much, and in which directions.

    compare(a, b)  ->  Difference        of each weight that both change:

    norms          ‖ΔW_A‖, ‖ΔW_B‖, ‖ΔW_A − ΔW_B‖ as a share of the larger of the two
    cosine         ⟨ΔW_A, ΔW_B⟩ / (‖ΔW_A‖ ‖ΔW_B‖)
    angles         principal angles between the row spaces (what is read of the input), and the column spaces (what is
                   written to the output)
    similarity     φ = ‖U_Aᵀ U_B‖² / min(rank_A, rank_B) in [0, 1], of the same spaces: Hu et al. 2021,
                   arXiv:2106.09685, section 7.2 and appendix G

All from the thin factors in float64; ΔW is never formed. A space is that of ΔW, not of a factor: of
factors that lack rank, or that were scaled against each other, only the product means anything.

Of DoRA the products are compared, and the magnitudes beside them: what they amount to depends on
the base.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from veneer.adapter_files.folder import AdapterFiles, read
from veneer.attach.lookup import parameter_path
from veneer.errors import AdapterError, listing, raise_all, sentence
from veneer.fileio.hashing import kind_of, prints_in
from veneer.formats import peft_paths
from veneer.lowrank import LowRank
from veneer.tools.compose.align import applied

__all__ = ["Difference", "FullDifference", "LayerDifference", "Space", "compare"]

#: singular values below this share of the largest are rounding: no direction of a change
ROUNDING = 1e-6


@dataclass(frozen=True)
class Space:
    """How two subspaces lie to each other: φ, and the principal angles in degrees, the smallest
    first."""

    similarity: float
    angles: tuple[float, ...]


@dataclass(frozen=True)
class LayerDifference:
    """One weight that both change. ``rows`` and ``columns`` are None where one of the changes is
    zero. ``magnitude`` is ‖m_A − m_B‖ as a share of the larger norm: inf where one alone is DoRA's,
    None where neither is."""

    path: str
    ranks: tuple[int, int]
    norms: tuple[float, float]
    difference: float
    cosine: float
    rows: Space | None
    columns: Space | None
    magnitude: float | None


@dataclass(frozen=True)
class FullDifference:
    """One parameter that both train in full: ‖P_A − P_B‖ as a share of the larger norm; inf for
    other shapes."""

    path: str
    difference: float


@dataclass(frozen=True)
class Difference:
    """What ``compare`` found. ``str(difference)`` is a text for people."""

    a: Path
    b: Path
    # weights that A alone changes, and parameters that it alone trains in full
    only_a: tuple[str, ...]
    only_b: tuple[str, ...]
    layers: tuple[LayerDifference, ...]  # what both change
    full: tuple[FullDifference, ...]
    config: Mapping[str, tuple[Any, Any]]  # fields of the LoraConfig that differ, as (A's, B's)
    #: "same", "different" or "unknown" (no record, no weight in common, or fingerprints of
    #: different kinds)
    base: str
    base_weights: tuple[str, ...]  # those whose fingerprints differ

    @property
    def same_change(self) -> bool:
        """Whether they change the same weights by the same numbers."""
        exact = all(not layer.difference and not layer.magnitude for layer in self.layers)
        return (
            exact
            and not self.only_a
            and not self.only_b
            and not any(entry.difference for entry in self.full)
        )

    @property
    def identical(self) -> bool:
        """Whether nothing at all differs: numbers, config, base."""
        return self.same_change and not self.config and self.base != "different"

    @property
    def relative(self) -> float:
        """‖ΔW_A − ΔW_B‖ over all weights that both change, as a share of the larger norm."""
        apart = math.hypot(*(layer.difference * max(layer.norms) for layer in self.layers))
        whole = max(self._norms)
        return apart / whole if whole else 0.0

    @property
    def cosine(self) -> float:
        """That of the two changes, over all weights that both change."""
        product = math.fsum(layer.cosine * layer.norms[0] * layer.norms[1] for layer in self.layers)
        return product / math.prod(self._norms) if all(self._norms) else 0.0

    @property
    def _norms(self) -> list[float]:
        return [math.hypot(*(layer.norms[side] for layer in self.layers)) for side in (0, 1)]

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        yield f"A  {self.a}"
        yield f"B  {self.b}"
        base = {
            "same": "the same weights",
            "unknown": "unknown whether the same",
            "different": "different weights",
        }
        yield (
            "base   "
            f" {base[self.base]}{f' ({listing(self.base_weights, 3)})' if self.base_weights else ''}"
        )
        if self.identical:
            yield "identical: the same numbers, the same config"
            return
        for name, (mine, theirs) in self.config.items():
            yield f"config  {name}: {mine!r} → {theirs!r}"
        for side, names in (("A", self.only_a), ("B", self.only_b)):
            if names:
                yield f"only {side}  {len(names)}: {listing(names)}"
        if self.same_change:
            yield "the same change: the same numbers"
            return
        if self.layers:
            apart = f"apart by {self.relative:.3g} of the larger change, cosine {self.cosine:.3f}"
            yield f"both    {len(self.layers)} weights, {apart}"
        moved = [entry for entry in self.full if entry.difference]
        if moved:
            far = max(moved, key=lambda entry: entry.difference)
            yield (
                f"full    {len(moved)} of {len(self.full)} differ, by up to {far.difference:.3g}"
                f" ({far.path})"
            )


@torch.no_grad()
def compare(a: str | Path | AdapterFiles, b: str | Path | AdapterFiles) -> Difference:
    """How two adapters differ; neither needs its base.

    Raises:
        AdapterError: one cannot be read, or their changes have other shapes, so that they are of no
            one model.
    """
    pair = [each if isinstance(each, AdapterFiles) else read(each) for each in (a, b)]
    products, problems = [applied(each) for each in pair], []
    both = [at for at in products[0] if at in products[1]]
    for at in both:
        sizes = [
            (low.A.shape[0], low.B.shape[1], low.A.shape[2])
            for low in (changes[at] for changes in products)
        ]
        if sizes[0] != sizes[1]:
            problem = f"changes of {at!r} of (groups, out, in) = {sizes[0]} and {sizes[1]}"
            problems.append(sentence(problem, "adapters of one model", "compare those"))
    raise_all(AdapterError, "These adapters cannot be compared", problems)
    magnitudes = [{layer.target_path: layer.extras for layer in each.low.values()} for each in pair]
    full = [_full(each) for each in pair]
    only = [
        tuple(
            name
            for changes in (products, full)
            for name in changes[side]
            if name not in changes[1 - side]
        )
        for side in (0, 1)
    ]
    mine, theirs = (each.config.to_dict() for each in pair)
    config = {name: (mine[name], theirs[name]) for name in mine if mine[name] != theirs[name]}
    base, weights = _base(*pair)
    return Difference(
        pair[0].path, pair[1].path, only[0], only[1],
        tuple(_layer(at, products[0][at], products[1][at], magnitudes[0][at], magnitudes[1][at]) for at in both),
        tuple(FullDifference(name, _apart(full[0][name], full[1][name])) for name in full[0] if name in full[1]),
        config, base, weights,
    )  # fmt: skip


def _layer(
    at: str,
    a: LowRank,
    b: LowRank,
    magnitudes_a: Mapping[str, Tensor],
    magnitudes_b: Mapping[str, Tensor],
) -> LayerDifference:
    norms = float(a.core().norm()), float(b.core().norm())
    same = a.scale == b.scale and torch.equal(a.A, b.A) and torch.equal(a.B, b.B)
    apart = (
        0.0
        if same
        else float(LowRank.sum([a.to(torch.float64), b.to(torch.float64)], [1, -1]).core().norm())
    )
    rows, columns = _spaces(a, b)
    known = magnitudes_a.keys() == magnitudes_b.keys()
    differences = (
        [_apart(m, magnitudes_b[name]) for name, m in magnitudes_a.items()] if known else [math.inf]
    )
    larger, product = max(norms), norms[0] * norms[1]
    cosine = 1.0 if same and larger else a.inner(b) / product if product else 0.0
    return LayerDifference(
        at, (a.rank, b.rank), norms, apart / larger if larger else 0.0, max(-1.0, min(1.0, cosine)), rows, columns,
        max(differences, default=None),
    )  # fmt: skip


def _spaces(a: LowRank, b: LowRank) -> tuple[Space | None, Space | None]:
    rows, columns = [], []
    one, other = a.svd(), b.svd()
    for group in range(a.A.shape[0]):
        rank, more = (
            int((svd.S[group] > ROUNDING * svd.S[group, 0]).sum()) for svd in (one, other)
        )
        if rank and more:
            rows.append((one.V[group, :rank].mT, other.V[group, :more].mT))
            columns.append((one.U[group, :, :rank], other.U[group, :, :more]))
    return _space(rows), _space(columns)


def _space(bases: Sequence[tuple[Tensor, Tensor]]) -> Space | None:
    """Of orthonormal bases [n, rank], a pair a group; None without any."""
    if not bases:
        return None
    shared, angles = 0.0, []
    for one, other in bases:
        one, other = (one, other) if one.shape[1] >= other.shape[1] else (other, one)
        inner = one.mT @ other
        cosines = torch.linalg.svdvals(inner).clamp(max=1)  # falling: the angles rise
        sines = torch.linalg.svdvals(other - one @ inner).clamp(max=1).flip(0)
        # arccos has half the digits near 0, and arcsin near 90°
        angles += torch.where(cosines**2 > 0.5, sines.asin(), cosines.acos()).rad2deg().tolist()
        shared += float(inner.square().sum())
    size = sum(min(one.shape[1], other.shape[1]) for one, other in bases)
    return Space(min(1.0, shared / size), tuple(sorted(angles)))


def _full(saved: AdapterFiles) -> dict[str, Tensor]:
    items = ((peft_paths.strip_wrappers(path)[0], tensors) for path, tensors in saved.full.items())
    full = {
        parameter_path(at, name): tensor
        for at, tensors in items
        for name, tensor in tensors.items()
    }
    tokens = (
        (one, *row) for one in saved.tokens.values() for row in zip(one.ids, one.rows, strict=True)
    )
    return full | {
        f"{parameter_path(one.module_path, 'weight')}[{id_}]": row for one, id_, row in tokens
    }


def _apart(a: Tensor, b: Tensor) -> float:
    """‖a − b‖ as a share of the larger norm; inf for other shapes."""
    if a.shape != b.shape:
        return math.inf
    larger = max(float(a.double().norm()), float(b.double().norm()))
    return float((a.double() - b.double()).norm()) / larger if larger else 0.0


def _base(a: AdapterFiles, b: AdapterFiles) -> tuple[str, tuple[str, ...]]:
    mine, theirs = (prints_in(each.metadata.get("base", {})) for each in (a, b))
    shared = [at for at in mine if at in theirs and kind_of(mine[at]) == kind_of(theirs[at])]
    differ = tuple(at for at in shared if mine[at] != theirs[at])
    return ("different" if differ else "same" if shared else "unknown"), differ
