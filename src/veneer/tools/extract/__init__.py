"""Extract an adapter from a full fine-tune: the nearest low-rank product of each weight's change.

    ΔW = W_tuned − W_base ≈ B A        per weight, [g, out, in], truncated at a rank or at a share
                                       of ‖ΔW‖²

    open both models → pair their weights → find changes → low rank, full or lost → factor → save

Models in folders are read weight by weight (stacks of experts matrix by matrix), so memory is a few
times the largest tensor plus the output.

``B = U √S, A = √S Vᵀ`` and alpha = rank, so the scale is 1 everywhere, also for readers without
per-layer ranks.

If the tuned model has a coarser dtype, the base is rounded to that dtype before the comparison, so
rounding alone is no change. If its dtype is finer, the difference is taken as it is. Every change
is written or listed in the report. Rejected: writing low-rank changes only. A full fine-tune also
changes norms and biases, and some of its changes do not have a low rank.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from veneer.adapter_files.save_load import save
from veneer.attach import Names, adapters, adapters_of, detach, install_adapter
from veneer.config import LoraConfig, Targets
from veneer.distributed import base_class
from veneer.errors import ConfigError, ExtractError, TargetError, listing, raise_all, sentence
from veneer.fileio.atomic import must_not_exist
from veneer.fileio.hashing import fingerprint_of
from veneer.kernels import svd
from veneer.layers import ParamRef, kind_for, parameter_path
from veneer.layers._base import GENERAL
from veneer.models.base_weights import list_weights
from veneer.tools.extract.report import Extracted, ExtractReport, Kept, Lost
from veneer.tools.extract.selection import LITTLE, LOSSY, keep_options, plan, select_weights
from veneer.tools.extract.weight_pairs import Both, Source, WeightPair, open_both, pair_weights

__all__ = ["ExtractReport", "Extracted", "Kept", "Lost", "extract"]

#: weights that are written in full or not at all, each with the reason
Whole = Sequence[tuple[WeightPair, str]]
#: called with (the last factored layer, number of layers factored so far, number of layers in all)
Progress = Callable[[Extracted, int, int], None]


class _Product(NamedTuple):
    """The factors of one weight in the written dtype: A [g, r, in], B [g, out, r]."""

    pair: WeightPair
    A: Tensor
    B: Tensor
    fingerprint: str
    facts: Extracted


@torch.no_grad()
def extract(
    base: Source,
    tuned: Source,
    out: str | Path,
    *,
    rank: int | None = None,
    energy: float | None = None,
    targets: Targets = "all",
    exclude: str | Sequence[str] = (),
    keep: str | Sequence[str] = "auto",
    least: float = 0.5,
    model: nn.Module | None = None,
    base_name: str | None = None,
    provenance: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> ExtractReport:
    """Write the adapter folder ``out``: the best approximation of ``tuned`` − ``base`` at its rank.

    Args:
        base, tuned: each a folder of safetensors (or what ``veneer.models.load_base`` takes), a
            live model, or a state dict (of the base only with ``model``). Neither is changed; no
            call of a live base may run meanwhile.
        rank: rank of every product; lower for weights that are too small. Give either this or
            ``energy``.
        energy: the share of ‖ΔW‖² in (0, 1) to keep; each weight gets the smallest rank that keeps
            it.
        targets, exclude: which weights get a product, as in ``LoraConfig``. Weights that
            ``exclude`` matches are not written.
        keep: which weights are written in full. "auto": changed vectors (norms, biases) and
            persistent buffers, which have no low-rank change. Patterns and "lossy" add weights;
            lossy are those that keep less than ``least`` of their change, or whose product would
            have as many values as they do. "none" omits the vectors.
        least: the share of ‖ΔW‖² below which a weight counts as lossy.
        model: the structure of a base that transformers cannot build; its values are not used.
        base_name: the recorded name of the base; None takes the folder, or the name by which
            transformers loaded it.
        provenance: JSON values to record with the adapter.
        progress: called after each weight.

    Raises:
        ConfigError, CheckpointError: an invalid option, or a folder without a model.
        ExtractError: the models have other names or shapes, nothing changed, or values are not
            finite.
        TargetError: a pattern that matches nothing, or a changed weight that cannot carry an
            adapter.
        OutputExistsError: the path exists and ``overwrite`` is False.
    """
    started, out = time.perf_counter(), Path(out)
    raise_all(ConfigError, "Nothing was extracted", _option_problems(rank, energy, least))
    keep_patterns = keep_options(keep)
    must_not_exist(out, overwrite)
    both = open_both(base, tuned, model)
    weight_pairs, names = pair_weights(both), Names(both.model)
    changed, attached = _find_changed(weight_pairs, both), adapters_of(both.model)
    used_names = () if attached is None else attached.configs
    name = next(name for number in count() if (name := f"extracted{number}") not in used_names)
    excluded = (exclude,) if isinstance(exclude, str) else exclude
    selection = select_weights(names, changed, targets, excluded, keep_patterns, name)
    dtype = (
        torch.float64 if any(p.old.dtype == torch.float64 for p in selection.low) else torch.float32
    )
    products, full_pairs = [], list(selection.whole)
    for number, pair in enumerate(selection.low, 1):
        product = _factor_change(pair, rank, energy, dtype)
        if progress is not None:
            progress(product.facts, number, len(selection.low))
        if LOSSY in keep_patterns and (product.facts.large or product.facts.kept < least):
            full_pairs.append((pair, LITTLE))
        else:
            products.append(product)
    unchanged = len(weight_pairs) - len(changed)
    report = _report(out, products, full_pairs, selection.lost, unchanged, both.new.unread, least)
    record_fields = {
        "rank": rank,
        "energy": energy,
        "kept": report.kept,
        "lost": [entry.path for entry in report.lost],
    }
    _write(
        both,
        name,
        products,
        full_pairs,
        dtype,
        out,
        base_name=base_name or both.name,
        provenance={"extracted": {"from": both.new.label, **record_fields}, **(provenance or {})},
        overwrite=overwrite,
    )
    return replace(report, seconds=time.perf_counter() - started)


def _report(
    out: Path,
    products: Sequence[_Product],
    full_pairs: Whole,
    lost: Whole,
    unchanged: int,
    unread: Any,
    least: float,
) -> ExtractReport:
    """The report of an extraction, without its seconds. ``ExtractError``: nothing to write."""
    if not products and not full_pairs:
        problem = (
            f"changes of {listing((pair.path for pair, _ in lost), 3)} only, which neither targets"
            " nor keep cover"
        )
        raise ExtractError(problem, "something to write", "widen targets or keep")
    return ExtractReport(
        out,
        tuple(product.facts for product in products),
        tuple(
            Kept(pair.path, torch.Size(pair.old.shape).numel(), pair.change(), reason)
            for pair, reason in full_pairs
        ),
        tuple(Lost(pair.path, pair.change(), reason) for pair, reason in lost),
        unchanged,
        unread,
        least,
        0.0,
    )


def _option_problems(rank: Any, energy: Any, least: Any) -> list[str]:
    bad_rank = rank is not None and (type(rank) is not int or rank < 1)
    bad_energy = energy is not None and not (isinstance(energy, int | float) and 0 < energy < 1)
    bad_least, share = (
        not (isinstance(least, int | float) and 0 <= least <= 1),
        "a share between 0 and 1",
    )
    both_text, usual_fix = f"rank={rank!r} and energy={energy!r}", "give rank=16, or energy=0.95"
    checks = [
        ((rank is None) == (energy is None), both_text, "one of them", usual_fix),
        (bad_rank, f"rank={rank!r}", "a whole number of at least 1", "use 16, or energy=0.95"),
        (bad_energy, f"energy={energy!r}", share, "use 0.95, or 0.999 to lose next to nothing"),
        (bad_least, f"least={least!r}", "a share from 0 to 1", "use 0.5"),
    ]
    return [sentence(*error_texts) for failed, *error_texts in checks if failed]


def _find_changed(weight_pairs: Sequence[WeightPair], both: Both) -> list[WeightPair]:
    changed, non_finite_paths = [], []
    for pair in weight_pairs:
        differs, finite = pair.compare()
        changed += [pair] if differs else []
        non_finite_paths += [] if finite or (pair.entry.is_buffer and not differs) else [pair.path]
    if non_finite_paths:
        problem = f"NaN or infinity in {listing(non_finite_paths, 40)}"
        raise ExtractError(
            problem, "finite numbers in base and tuned model", "get the models again"
        )
    if not changed:
        problem = f"no difference between {both.old.label} and {both.new.label}"
        raise ExtractError(
            problem, "a fine-tuned model and its base", "check which models these are"
        )
    return changed


def _factor_change(
    pair: WeightPair, rank: int | None, energy: float | None, dtype: torch.dtype
) -> _Product:
    """The nearest product to the change of one weight, in ``dtype``."""
    started = time.perf_counter()
    fingerprint = fingerprint_of(pair.old.shape, (pair.old.read(rows) for rows in pair.rows))
    dense, frozen_input = (
        None if pair.is_stack else list(pair.matrices()),
        pair.kind.frozen_input(pair.module),
    )
    frozen_energy = 0.0
    # leave out the input that never changes, such as the padding row of an embedding
    for matrix in dense or () if frozen_input is not None else ():
        frozen_energy += matrix[:, frozen_input].double().square().sum().item()
        matrix[:, frozen_input] = 0

    def matrices() -> Iterator[Tensor]:
        return iter(dense) if dense is not None else pair.matrices()

    vectors_of_gram = None
    if energy is not None:
        spectra = []
        for matrix in matrices():
            values, vectors_of_gram = svd.spectrum(matrix)
            spectra.append(values)
        rank = svd.smallest_rank(spectra, energy)
    assert rank is not None  # either `rank` or `energy` is given
    rank, change, error, methods, factors = (
        min(rank, pair.dims.max_rank),
        frozen_energy,
        frozen_energy,
        set(),
        [],
    )
    for number, matrix in enumerate(matrices()):
        if vectors_of_gram is not None and pair.dims.groups == 1:
            vectors, method = vectors_of_gram[:, :rank], "exact"
        else:
            vectors, method = svd.leading(matrix, rank, exact=energy is not None, seed=number)
        A, B = (factor.to(dtype) for factor in svd.split(matrix, vectors))
        change, error = change + svd.energy(matrix), error + svd.distance(matrix, A, B)
        factors.append((A.cpu(), B.cpu()))
        methods.add(method)
    base = sum(svd.energy(pair.old.read(rows).reshape(1, -1)) for rows in pair.rows)
    A, B = (torch.stack(side) for side in zip(*factors, strict=True))
    method = "exact" if methods == {"exact"} else "randomised"
    relative = (change / base) ** 0.5 if base else math.inf
    seconds = time.perf_counter() - started
    error = (error / change) ** 0.5
    facts = Extracted(
        pair.path,
        (pair.dims.groups, pair.dims.out, pair.dims.in_),
        rank,
        change**0.5,
        relative,
        error,
        method,
        seconds,
    )
    return _Product(pair, A, B, fingerprint, facts)


def _write(
    both: Both,
    name: str,
    products: Sequence[_Product],
    full_pairs: Whole,
    dtype: torch.dtype,
    out: Path,
    **options: Any,
) -> None:
    """Install the adapter on the base's structure, save it, and detach it."""
    names = Names(both.model)
    ranks = {product.pair.entry.ref: product.facts.rank for product in products}
    target_paths = [product.pair.path for product in products] or [
        pair.path for pair, _ in full_pairs
    ]
    common = max(ranks.values(), default=1)
    config = LoraConfig(
        rank=common,
        alpha=float(common),
        targets=tuple(target_paths),
        dtype="float64" if dtype == torch.float64 else None,
    )
    problems: list[str] = []
    plans = plan(names, config, ranks, [pair for pair, _ in full_pairs], problems)
    raise_all(TargetError, "Nothing was written", problems)
    if both.meta_model:
        _show_forwards([(names.modules[path], weight) for path, weight in ranks])
    factors: dict[ParamRef, Mapping[str, Tensor]] = {
        product.pair.entry.ref: {"A": product.A, "B": product.B} for product in products
    }
    # Parameters that the adapter holds in full get the tuned model's values. Buffers that did not
    # change or are left out, such as running statistics, get the base's.
    tuned = {path for pair, _ in full_pairs for path in pair.entry.names}
    product_weights = {id(both.old.by_name.get(product.pair.path)) for product in products}
    fingerprints = {product.pair.path: product.fingerprint for product in products}
    try:
        install_adapter(both.model, name, plans, trainable=False, parameters=factors)
        for path, _, module_parameters in adapters(both.model, name):
            for key, value in (
                *module_parameters.full._parameters.items(),
                *module_parameters.full._buffers.items(),
            ):
                full_path = parameter_path(path, key)
                source = (both.new if full_path in tuned else both.old).by_name.get(full_path)
                if source is not None and value is not None:
                    value.copy_(source.read(None))
        for entry in list_weights(names):
            value = both.old.find(entry.names)
            if value is not None and id(value) not in product_weights:
                fingerprints[entry.path] = value.fingerprint()
        save(both.model, out, name=name, fingerprints=fingerprints, **options)
    finally:
        attached = adapters_of(both.model)
        if attached is not None and name in attached.configs:
            detach(both.model, name)


def _show_forwards(targets: Sequence[tuple[nn.Module, str]]) -> None:
    """Fill some rows of weights in a meta model with random values, where the module has a custom
    forward. The check whether that forward computes what its layer kind does, and so whether PEFT
    can apply the adapter, needs values other than zeros."""
    generator = torch.Generator().manual_seed(0)
    for module, name in targets:
        kind, weight = kind_for(module, name), module._parameters.get(name)
        has_stock_forward = kind.name == GENERAL or any(
            base_class(module).forward is layer_class.forward for layer_class in kind.types()
        )
        if weight is not None and not has_stock_forward:
            weight.data[:8].normal_(generator=generator)
