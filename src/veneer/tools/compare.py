"""Compare two adapters: which weights they change, how much, and in which directions.

    compare(a, b)  ->  Difference        with these numbers for each weight that both change:

    norms          ‖ΔW_A‖, ‖ΔW_B‖, and ‖ΔW_A − ΔW_B‖ divided by the larger of the two
    cosine         ⟨ΔW_A, ΔW_B⟩ / (‖ΔW_A‖ ‖ΔW_B‖)
    angles         principal angles between the row spaces (input directions that ΔW reads) and
                   between the column spaces (output directions that ΔW writes)
    similarity     φ = ‖U_Aᵀ U_B‖² / min(rank_A, rank_B) in [0, 1], for the row spaces and for the
                   column spaces; U_A and U_B are orthonormal bases (Hu et al. 2021,
                   arXiv:2106.09685, section 7.2 and appendix G)

All numbers are computed from the factors A and B in float64; ΔW is never formed. The subspaces are
the row and column spaces of ΔW = B A, not those of A and B: if the columns of B are linearly
dependent, the rows of A can span more than the row space of ΔW.

For DoRA, B A and the magnitudes are compared separately, because their combined effect depends on
the weights of the base, which this module does not read.
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
from veneer.tools.compose.align import effective_changes

__all__ = ["Difference", "FullDifference", "LayerDifference", "Space", "compare"]

#: a singular value of ΔW below this share of the largest one is taken for rounding error, so the
#: rank of ΔW does not count it
RANK_TOLERANCE = 1e-6


@dataclass(frozen=True)
class Space:
    """The comparison of two subspaces with orthonormal bases U_A and U_B. ``similarity``:
    φ = ‖U_Aᵀ U_B‖² / min(rank_A, rank_B), from 0 (orthogonal) to 1 (one contains the other).
    ``angles``: the principal angles in degrees, ascending."""

    similarity: float
    angles: tuple[float, ...]


@dataclass(frozen=True)
class LayerDifference:
    """One weight that both adapters change. In each pair, the number of adapter A is the first.

    Fields:
        path: the path of the weight's module, or of the weight if PEFT targets it as a parameter.
        ranks: the ranks of the factors of ΔW_A and of ΔW_B.
        norms: ‖ΔW_A‖ and ‖ΔW_B‖.
        difference: ‖ΔW_A − ΔW_B‖ divided by the larger of ``norms``.
        cosine: ⟨ΔW_A, ΔW_B⟩ / (‖ΔW_A‖ ‖ΔW_B‖); 0 if one of the changes is zero.
        rows, columns: the comparison of the row spaces and of the column spaces of ΔW_A and ΔW_B;
            None if one of the changes is zero.
        magnitude: ‖m_A − m_B‖ of the DoRA magnitudes, divided by the larger of their norms; inf if
            only one adapter is DoRA, None if neither is.
    """

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
    """One parameter that both adapters train in full, or one row of a token that both train.
    ``difference``: ‖P_A − P_B‖ divided by the larger of ‖P_A‖ and ‖P_B‖, where P_A and P_B are the
    trained values that the adapters store; inf if their shapes differ."""

    path: str
    difference: float


@dataclass(frozen=True)
class Difference:
    """The result of ``compare``. ``str(difference)`` is readable text."""

    a: Path
    b: Path
    # the paths of the weights that only A changes, and of the parameters and token rows whose new
    # values only A stores; ``only_b`` holds the corresponding paths for B
    only_a: tuple[str, ...]
    only_b: tuple[str, ...]
    layers: tuple[LayerDifference, ...]  # weights that both change
    full: tuple[FullDifference, ...]  # parameters and token rows whose new values both store
    config: Mapping[str, tuple[Any, Any]]  # fields of the LoraConfig that differ, as (A's, B's)
    #: whether both were trained on the same base: "same", "different" or "unknown" ("unknown": an
    #: adapter has no record, no weight is in both records, or the records use different hashes)
    base: str
    base_weights: tuple[str, ...]  # paths of base weights whose fingerprints differ

    @property
    def same_change(self) -> bool:
        """Whether both adapters change the same weights by the same values."""
        layers_equal = all(not layer.difference and not layer.magnitude for layer in self.layers)
        return (
            layers_equal
            and not self.only_a
            and not self.only_b
            and not any(entry.difference for entry in self.full)
        )

    @property
    def identical(self) -> bool:
        """Whether changes and configs are equal, and the bases are not known to differ."""
        return self.same_change and not self.config and self.base != "different"

    @property
    def relative(self) -> float:
        """‖ΔW_A − ΔW_B‖ / max(‖ΔW_A‖, ‖ΔW_B‖), with norms over all weights that both change; 0 if
        all of these changes are zero."""
        difference_norm = math.hypot(
            *(layer.difference * max(layer.norms) for layer in self.layers)
        )
        largest_norm = max(self._norms)
        return difference_norm / largest_norm if largest_norm else 0.0

    @property
    def cosine(self) -> float:
        """⟨ΔW_A, ΔW_B⟩ / (‖ΔW_A‖ ‖ΔW_B‖), over all weights that both adapters change; 0 if all of
        these changes are zero in one of the adapters."""
        inner_product = math.fsum(
            layer.cosine * layer.norms[0] * layer.norms[1] for layer in self.layers
        )
        return inner_product / math.prod(self._norms) if all(self._norms) else 0.0

    @property
    def _norms(self) -> list[float]:
        return [math.hypot(*(layer.norms[index] for layer in self.layers)) for index in (0, 1)]

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        yield f"A  {self.a}"
        yield f"B  {self.b}"
        base_texts = {
            "same": "the same weights",
            "unknown": "unknown whether the same",
            "different": "different weights",
        }
        mismatch_text = f" ({listing(self.base_weights, 3)})" if self.base_weights else ""
        yield f"base    {base_texts[self.base]}{mismatch_text}"
        if self.identical:
            yield "identical: the same numbers, the same config"
            return
        for field_name, (a_value, b_value) in self.config.items():
            yield f"config  {field_name}: {a_value!r} → {b_value!r}"
        for adapter_label, exclusive_paths in (("A", self.only_a), ("B", self.only_b)):
            if exclusive_paths:
                yield f"only {adapter_label}  {len(exclusive_paths)}: {listing(exclusive_paths)}"
        if self.same_change:
            yield "the same change: the same numbers"
            return
        if self.layers:
            distance_text = (
                f"apart by {self.relative:.3g} of the larger change, cosine {self.cosine:.3f}"
            )
            yield f"both    {len(self.layers)} weights, {distance_text}"
        differing_params = [entry for entry in self.full if entry.difference]
        if differing_params:
            largest_difference = max(differing_params, key=lambda entry: entry.difference)
            yield (
                f"full    {len(differing_params)} of {len(self.full)} differ, by up to"
                f" {largest_difference.difference:.3g} ({largest_difference.path})"
            )


@torch.no_grad()
def compare(a: str | Path | AdapterFiles, b: str | Path | AdapterFiles) -> Difference:
    """Compare two adapters. Their bases are not needed.

    Raises:
        AdapterError: an adapter cannot be read, or changes of one weight have different shapes, so
            that the adapters cannot belong to one model.
    """
    adapters = [
        adapter if isinstance(adapter, AdapterFiles) else read(adapter) for adapter in (a, b)
    ]
    changes_per_adapter, problems = [effective_changes(adapter) for adapter in adapters], []
    shared_paths = [path for path in changes_per_adapter[0] if path in changes_per_adapter[1]]
    for path in shared_paths:
        shapes = [
            (change.A.shape[0], change.B.shape[1], change.A.shape[2])
            for change in (changes_by_path[path] for changes_by_path in changes_per_adapter)
        ]
        if shapes[0] != shapes[1]:
            problem = f"changes of {path!r} of (groups, out, in) = {shapes[0]} and {shapes[1]}"
            problems.append(sentence(problem, "adapters of one model", "compare those"))
    raise_all(AdapterError, "These adapters cannot be compared", problems)
    magnitudes_per_adapter = [
        {layer.target_path: layer.extras for layer in adapter.low.values()} for adapter in adapters
    ]
    full_tensors_per_adapter = [_fully_trained_tensors(adapter) for adapter in adapters]
    exclusive_paths = [
        tuple(
            path
            for entries_per_adapter in (changes_per_adapter, full_tensors_per_adapter)
            for path in entries_per_adapter[index]
            if path not in entries_per_adapter[1 - index]
        )
        for index in (0, 1)
    ]
    config_a, config_b = (adapter.config.to_dict() for adapter in adapters)
    base_relation, mismatched_paths = _compare_bases(*adapters)
    return Difference(
        a=adapters[0].path,
        b=adapters[1].path,
        only_a=exclusive_paths[0],
        only_b=exclusive_paths[1],
        layers=tuple(
            _compare_layer(
                path,
                changes_per_adapter[0][path],
                changes_per_adapter[1][path],
                magnitudes_per_adapter[0][path],
                magnitudes_per_adapter[1][path],
            )
            for path in shared_paths
        ),
        full=tuple(
            FullDifference(path, _relative_difference(tensor, full_tensors_per_adapter[1][path]))
            for path, tensor in full_tensors_per_adapter[0].items()
            if path in full_tensors_per_adapter[1]
        ),
        config={
            field_name: (config_a[field_name], config_b[field_name])
            for field_name in config_a
            if config_a[field_name] != config_b[field_name]
        },
        base=base_relation,
        base_weights=mismatched_paths,
    )


def _compare_layer(
    path: str,
    change_a: LowRank,
    change_b: LowRank,
    magnitudes_a: Mapping[str, Tensor],
    magnitudes_b: Mapping[str, Tensor],
) -> LayerDifference:
    norms = float(change_a.core().norm()), float(change_b.core().norm())
    factors_are_equal = (
        change_a.scale == change_b.scale
        and torch.equal(change_a.A, change_b.A)
        and torch.equal(change_a.B, change_b.B)
    )
    difference_norm = (
        0.0
        if factors_are_equal
        else float(
            LowRank.sum([change_a.to(torch.float64), change_b.to(torch.float64)], [1, -1])
            .core()
            .norm()
        )
    )
    row_comparison, column_comparison = _compare_spaces(change_a, change_b)
    has_same_names = magnitudes_a.keys() == magnitudes_b.keys()
    magnitude_differences = (
        [
            _relative_difference(magnitude, magnitudes_b[name])
            for name, magnitude in magnitudes_a.items()
        ]
        if has_same_names
        else [math.inf]
    )
    larger_norm, norm_product = max(norms), norms[0] * norms[1]
    cosine = (
        1.0
        if factors_are_equal and larger_norm
        else change_a.inner(change_b) / norm_product
        if norm_product
        else 0.0
    )
    return LayerDifference(
        path=path,
        ranks=(change_a.rank, change_b.rank),
        norms=norms,
        difference=difference_norm / larger_norm if larger_norm else 0.0,
        cosine=max(-1.0, min(1.0, cosine)),
        rows=row_comparison,
        columns=column_comparison,
        magnitude=max(magnitude_differences, default=None),
    )


def _compare_spaces(change_a: LowRank, change_b: LowRank) -> tuple[Space | None, Space | None]:
    """(the comparison of the row spaces, the comparison of the column spaces) of two changes
    [g, out, in]; g: matrices in the weight, 1 for a linear layer. Both are None if for every matrix
    one of the changes is zero."""
    row_bases, column_bases = [], []
    svd_a, svd_b = change_a.svd(), change_b.svd()
    for group in range(change_a.A.shape[0]):
        rank_a, rank_b = (
            int((svd.S[group] > RANK_TOLERANCE * svd.S[group, 0]).sum()) for svd in (svd_a, svd_b)
        )
        if rank_a and rank_b:
            row_bases.append((svd_a.V[group, :rank_a].mT, svd_b.V[group, :rank_b].mT))
            column_bases.append((svd_a.U[group, :, :rank_a], svd_b.U[group, :, :rank_b]))
    return _relate_spaces(row_bases), _relate_spaces(column_bases)


def _relate_spaces(basis_pairs: Sequence[tuple[Tensor, Tensor]]) -> Space | None:
    """The similarity and the principal angles of the subspaces of two adapters. ``basis_pairs``:
    for each matrix of the weight (a stack has several), an orthonormal basis [in or out, rank] of
    either subspace. None if ``basis_pairs`` is empty."""
    if not basis_pairs:
        return None
    squared_overlap, angles = 0.0, []
    for first_basis, second_basis in basis_pairs:
        larger_basis, smaller_basis = (
            (first_basis, second_basis)
            if first_basis.shape[1] >= second_basis.shape[1]
            else (second_basis, first_basis)
        )
        inner_products = larger_basis.mT @ smaller_basis
        # Singular values descend, so the cosines are in the order of ascending angles. The sines
        # are flipped to be in the same order.
        cosines = torch.linalg.svdvals(inner_products).clamp(max=1)
        sines = (
            torch.linalg.svdvals(smaller_basis - larger_basis @ inner_products).clamp(max=1).flip(0)
        )
        # Each angle is computed by the more accurate function: arccos loses half the digits near
        # 0°, arcsin near 90°.
        angles += torch.where(cosines**2 > 0.5, sines.asin(), cosines.acos()).rad2deg().tolist()
        squared_overlap += float(inner_products.square().sum())
    smaller_rank = sum(
        min(first_basis.shape[1], second_basis.shape[1])
        for first_basis, second_basis in basis_pairs
    )
    return Space(min(1.0, squared_overlap / smaller_rank), tuple(sorted(angles)))


def _fully_trained_tensors(saved_adapter: AdapterFiles) -> dict[str, Tensor]:
    """The parameters that an adapter trains in full, and its trained token rows, by path. The path
    of a row ends in the token id, as in "embed.weight[7]"."""
    module_tensors = (
        (peft_paths.strip_wrappers(path)[0], tensors)
        for path, tensors in saved_adapter.full.items()
    )
    full_parameters = {
        parameter_path(module_path, name): tensor
        for module_path, tensors in module_tensors
        for name, tensor in tensors.items()
    }
    token_rows = (
        (trained_tokens, *id_and_row)
        for trained_tokens in saved_adapter.tokens.values()
        for id_and_row in zip(trained_tokens.ids, trained_tokens.rows, strict=True)
    )
    return full_parameters | {
        f"{parameter_path(trained_tokens.module_path, 'weight')}[{token_id}]": row
        for trained_tokens, token_id, row in token_rows
    }


def _relative_difference(a: Tensor, b: Tensor) -> float:
    """‖a − b‖ / max(‖a‖, ‖b‖); inf if the shapes differ."""
    if a.shape != b.shape:
        return math.inf
    larger_norm = max(float(a.double().norm()), float(b.double().norm()))
    return float((a.double() - b.double()).norm()) / larger_norm if larger_norm else 0.0


def _compare_bases(adapter_a: AdapterFiles, adapter_b: AdapterFiles) -> tuple[str, tuple[str, ...]]:
    """("same", "different" or "unknown" for the two bases, the paths of weights whose fingerprints
    differ). A fingerprint is a hash of a base weight in an adapter's record. The result is
    "unknown" if no weight has fingerprints by one hash function in both records."""
    fingerprints_a, fingerprints_b = (
        recorded_fingerprints(saved_adapter.metadata.get("base", {}))
        for saved_adapter in (adapter_a, adapter_b)
    )
    comparable_paths = [
        path
        for path in fingerprints_a
        if path in fingerprints_b and kind_of(fingerprints_a[path]) == kind_of(fingerprints_b[path])
    ]
    mismatched_paths = tuple(
        path for path in comparable_paths if fingerprints_a[path] != fingerprints_b[path]
    )
    return (
        "different" if mismatched_paths else "same" if comparable_paths else "unknown"
    ), mismatched_paths
