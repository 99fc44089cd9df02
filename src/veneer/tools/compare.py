"""Compare two adapters: where they change the model, how much, and in which directions.

    compare(a, b)  ->  Difference        for each weight that both change:

    norms          ‖ΔW_A‖, ‖ΔW_B‖, ‖ΔW_A − ΔW_B‖ / the larger of the two
    cosine         ⟨ΔW_A, ΔW_B⟩ / (‖ΔW_A‖ ‖ΔW_B‖)
    angles         principal angles between the row spaces (input directions that ΔW reads) and
                   between the column spaces (output directions that ΔW writes)
    similarity     φ = ‖U_Aᵀ U_B‖² / min(rank_A, rank_B) in [0, 1] of the same spaces: Hu et al.
                   2021, arXiv:2106.09685, section 7.2 and appendix G

Everything is computed from the thin factors in float64; ΔW is never formed. The spaces are those of
ΔW, not of A and B, because factors may be rank-deficient or scaled against each other.

For DoRA the products and the magnitudes are compared separately, because their combined effect
depends on the base.
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
from veneer.errors import AdapterError, listing, raise_all, sentence
from veneer.fileio.hashing import kind_of, recorded_fingerprints
from veneer.formats import peft_paths
from veneer.layers import parameter_path
from veneer.lowrank import LowRank
from veneer.tools.compose.align import applied_products

__all__ = ["Difference", "FullDifference", "LayerDifference", "Space", "compare"]

#: singular values below this share of the largest are rounding error
ROUNDING = 1e-6


@dataclass(frozen=True)
class Space:
    """The relation of two subspaces: φ, and the principal angles in degrees, ascending."""

    similarity: float
    angles: tuple[float, ...]


@dataclass(frozen=True)
class LayerDifference:
    """One weight that both adapters change. ``rows`` and ``columns`` are None if one of the changes
    is zero. ``magnitude`` is ‖m_A − m_B‖ / the larger norm: inf if only one adapter is DoRA, None
    if neither is."""

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
    """One parameter that both adapters train in full. ``difference``: ‖P_A − P_B‖ / the larger
    norm; inf if the shapes differ."""

    path: str
    difference: float


@dataclass(frozen=True)
class Difference:
    """The result of ``compare``. ``str(difference)`` is readable text."""

    a: Path
    b: Path
    # weights that only A changes, and parameters that only A trains in full
    only_a: tuple[str, ...]
    only_b: tuple[str, ...]
    layers: tuple[LayerDifference, ...]  # weights that both change
    full: tuple[FullDifference, ...]
    config: Mapping[str, tuple[Any, Any]]  # fields of the LoraConfig that differ, as (A's, B's)
    #: "same", "different" or "unknown" (no record, no weight in common, or fingerprints of
    #: different kinds)
    base: str
    base_weights: tuple[str, ...]  # base weights with different fingerprints

    @property
    def same_change(self) -> bool:
        """Whether both change the same weights by the same values."""
        exact = all(not layer.difference and not layer.magnitude for layer in self.layers)
        return (
            exact
            and not self.only_a
            and not self.only_b
            and not any(entry.difference for entry in self.full)
        )

    @property
    def identical(self) -> bool:
        """Whether values, config and base are all equal."""
        return self.same_change and not self.config and self.base != "different"

    @property
    def relative(self) -> float:
        """‖ΔW_A − ΔW_B‖ / the larger norm, over all weights that both change."""
        distance = math.hypot(*(layer.difference * max(layer.norms) for layer in self.layers))
        largest_norm = max(self._norms)
        return distance / largest_norm if largest_norm else 0.0

    @property
    def cosine(self) -> float:
        """The cosine of the two changes, over all weights that both change."""
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
        weights_text = f" ({listing(self.base_weights, 3)})" if self.base_weights else ""
        yield f"base    {base[self.base]}{weights_text}"
        if self.identical:
            yield "identical: the same numbers, the same config"
            return
        for name, (a_value, b_value) in self.config.items():
            yield f"config  {name}: {a_value!r} → {b_value!r}"
        for side, names in (("A", self.only_a), ("B", self.only_b)):
            if names:
                yield f"only {side}  {len(names)}: {listing(names)}"
        if self.same_change:
            yield "the same change: the same numbers"
            return
        if self.layers:
            distance_text = (
                f"apart by {self.relative:.3g} of the larger change, cosine {self.cosine:.3f}"
            )
            yield f"both    {len(self.layers)} weights, {distance_text}"
        changed_params = [entry for entry in self.full if entry.difference]
        if changed_params:
            furthest = max(changed_params, key=lambda entry: entry.difference)
            yield (
                f"full    {len(changed_params)} of {len(self.full)} differ, by up to"
                f" {furthest.difference:.3g} ({furthest.path})"
            )


@torch.no_grad()
def compare(a: str | Path | AdapterFiles, b: str | Path | AdapterFiles) -> Difference:
    """How two adapters differ; neither needs its base.

    Raises:
        AdapterError: one cannot be read, or their changes have other shapes, so that they are of no
            one model.
    """
    pair = [saved if isinstance(saved, AdapterFiles) else read(saved) for saved in (a, b)]
    products, problems = [applied_products(saved) for saved in pair], []
    both = [path for path in products[0] if path in products[1]]
    for path in both:
        sizes = [
            (low.A.shape[0], low.B.shape[1], low.A.shape[2])
            for low in (changes[path] for changes in products)
        ]
        if sizes[0] != sizes[1]:
            problem = f"changes of {path!r} of (groups, out, in) = {sizes[0]} and {sizes[1]}"
            problems.append(sentence(problem, "adapters of one model", "compare those"))
    raise_all(AdapterError, "These adapters cannot be compared", problems)
    magnitudes = [
        {layer.target_path: layer.extras for layer in saved.low.values()} for saved in pair
    ]
    full = [_full_tensors(saved) for saved in pair]
    only = [
        tuple(
            name
            for changes in (products, full)
            for name in changes[side]
            if name not in changes[1 - side]
        )
        for side in (0, 1)
    ]
    config_a, config_b = (saved.config.to_dict() for saved in pair)
    config = {
        name: (config_a[name], config_b[name])
        for name in config_a
        if config_a[name] != config_b[name]
    }
    base, weights = _compare_bases(*pair)
    layers = [
        _compare_layer(
            path, products[0][path], products[1][path], magnitudes[0][path], magnitudes[1][path]
        )
        for path in both
    ]
    full_differences = [
        FullDifference(name, _relative_difference(tensor, full[1][name]))
        for name, tensor in full[0].items()
        if name in full[1]
    ]
    return Difference(
        a=pair[0].path,
        b=pair[1].path,
        only_a=only[0],
        only_b=only[1],
        layers=tuple(layers),
        full=tuple(full_differences),
        config=config,
        base=base,
        base_weights=weights,
    )


def _compare_layer(
    path: str,
    a: LowRank,
    b: LowRank,
    magnitudes_a: Mapping[str, Tensor],
    magnitudes_b: Mapping[str, Tensor],
) -> LayerDifference:
    norms = float(a.core().norm()), float(b.core().norm())
    same = a.scale == b.scale and torch.equal(a.A, b.A) and torch.equal(a.B, b.B)
    distance = (
        0.0
        if same
        else float(LowRank.sum([a.to(torch.float64), b.to(torch.float64)], [1, -1]).core().norm())
    )
    rows, columns = _compare_spaces(a, b)
    same_keys = magnitudes_a.keys() == magnitudes_b.keys()
    differences = (
        [_relative_difference(m, magnitudes_b[name]) for name, m in magnitudes_a.items()]
        if same_keys
        else [math.inf]
    )
    larger, product = max(norms), norms[0] * norms[1]
    cosine = 1.0 if same and larger else a.inner(b) / product if product else 0.0
    return LayerDifference(
        path=path,
        ranks=(a.rank, b.rank),
        norms=norms,
        difference=distance / larger if larger else 0.0,
        cosine=max(-1.0, min(1.0, cosine)),
        rows=rows,
        columns=columns,
        magnitude=max(differences, default=None),
    )


def _compare_spaces(a: LowRank, b: LowRank) -> tuple[Space | None, Space | None]:
    rows, columns = [], []
    svd_a, svd_b = a.svd(), b.svd()
    for group in range(a.A.shape[0]):
        rank_a, rank_b = (
            int((svd.S[group] > ROUNDING * svd.S[group, 0]).sum()) for svd in (svd_a, svd_b)
        )
        if rank_a and rank_b:
            rows.append((svd_a.V[group, :rank_a].mT, svd_b.V[group, :rank_b].mT))
            columns.append((svd_a.U[group, :, :rank_a], svd_b.U[group, :, :rank_b]))
    return _relate_spaces(rows), _relate_spaces(columns)


def _relate_spaces(bases: Sequence[tuple[Tensor, Tensor]]) -> Space | None:
    """The relation of the spaces of orthonormal bases [n, rank], one pair for each group; None
    without any pair."""
    if not bases:
        return None
    shared, angles = 0.0, []
    for larger, smaller in bases:
        larger, smaller = (
            (larger, smaller) if larger.shape[1] >= smaller.shape[1] else (smaller, larger)
        )
        inner = larger.mT @ smaller
        cosines = torch.linalg.svdvals(inner).clamp(max=1)  # falling: the angles rise
        sines = torch.linalg.svdvals(smaller - larger @ inner).clamp(max=1).flip(0)
        # arccos loses half the digits near 0°, arcsin near 90°
        angles += torch.where(cosines**2 > 0.5, sines.asin(), cosines.acos()).rad2deg().tolist()
        shared += float(inner.square().sum())
    size = sum(min(larger.shape[1], smaller.shape[1]) for larger, smaller in bases)
    return Space(min(1.0, shared / size), tuple(sorted(angles)))


def _full_tensors(saved: AdapterFiles) -> dict[str, Tensor]:
    tensors_by_path = (
        (peft_paths.strip_wrappers(path)[0], tensors) for path, tensors in saved.full.items()
    )
    full = {
        parameter_path(module_path, name): tensor
        for module_path, tensors in tensors_by_path
        for name, tensor in tensors.items()
    }
    tokens = (
        (tokens_of_weight, *row)
        for tokens_of_weight in saved.tokens.values()
        for row in zip(tokens_of_weight.ids, tokens_of_weight.rows, strict=True)
    )
    return full | {
        f"{parameter_path(tokens_of_weight.module_path, 'weight')}[{id_}]": row
        for tokens_of_weight, id_, row in tokens
    }


def _relative_difference(a: Tensor, b: Tensor) -> float:
    """‖a − b‖ / the larger norm; inf if the shapes differ."""
    if a.shape != b.shape:
        return math.inf
    larger = max(float(a.double().norm()), float(b.double().norm()))
    return float((a.double() - b.double()).norm()) / larger if larger else 0.0


def _compare_bases(a: AdapterFiles, b: AdapterFiles) -> tuple[str, tuple[str, ...]]:
    fingerprints_a, fingerprints_b = (
        recorded_fingerprints(saved.metadata.get("base", {})) for saved in (a, b)
    )
    shared = [
        name
        for name in fingerprints_a
        if name in fingerprints_b and kind_of(fingerprints_a[name]) == kind_of(fingerprints_b[name])
    ]
    differ = tuple(name for name in shared if fingerprints_a[name] != fingerprints_b[name])
    return ("different" if differ else "same" if shared else "unknown"), differ
