"""Extract an adapter from a full fine-tune: choose a rank for each weight's change, and approximate
the change by a low-rank product.

    ΔW = W_tuned − W_base ≈ B A        for each weight [g, out, in], with a given rank or the lowest
                                       rank that keeps a given share of ‖ΔW‖²; g: matrices of a
                                       stack, groups of a convolution, else 1

    open the models → pair their weights → find changes → decide how to write each → factor → save

Models in folders are read weight by weight (stacks of experts matrix by matrix), so the memory
needed is a few times the largest tensor plus the output.

The factors are B = U √S and A = √S Vᵀ with the SVD ΔW = U S Vᵀ, cut off at the rank. alpha equals
the rank for every weight and in the config's defaults, so the scale is 1 even in programs that
ignore the ranks of single layers.

If the tuned model has a coarser dtype than the base, the base is rounded to this dtype before the
comparison, so that a difference by rounding alone does not count as a change. If the tuned model
has the finer dtype, the difference is computed without rounding.

Every change is either written, or listed in the report as lost. Rejected: writing low-rank changes
only, because a full fine-tune also changes norms and biases, and some of its changes do not have a
low rank.
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
from veneer.attach import ModelIndex, adapters, adapters_of, detach, install_adapter
from veneer.config import LoraConfig, Targets
from veneer.distributed import base_class
from veneer.errors import ConfigError, ExtractError, TargetError, listing, raise_all, sentence
from veneer.fileio.atomic import must_not_exist
from veneer.fileio.hashing import fingerprint_of
from veneer.kernels import svd
from veneer.layers import GENERAL_KIND, ParamRef, kind_for, parameter_path
from veneer.models.base_weights import list_weights
from veneer.tools.extract.report import Extracted, ExtractReport, Kept, Lost
from veneer.tools.extract.selection import (
    LOSSY,
    LOSSY_PRODUCT,
    Selection,
    keep_options,
    plan_adapter,
    select_weights,
)
from veneer.tools.extract.weight_pairs import (
    ModelPair,
    ModelSource,
    WeightPair,
    open_models,
    pair_weights,
)

__all__ = ["ExtractReport", "Extracted", "Kept", "Lost", "extract"]

#: weights that are written in full, or not at all, each with the reason for that
PairsWithReason = Sequence[tuple[WeightPair, str]]
#: called with (the report of the layer just factored, how many are factored, how many there are)
Progress = Callable[[Extracted, int, int], None]


class _Product(NamedTuple):
    """The factors A [g, r, in] and B [g, out, r] of one weight's change, in the dtype that is
    written; g: matrices in the weight. ``fingerprint``: the fingerprint of the base weight."""

    pair: WeightPair
    A: Tensor
    B: Tensor
    fingerprint: str
    report: Extracted


@torch.no_grad()
def extract(
    base: ModelSource,
    tuned: ModelSource,
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
    """Write the adapter folder ``out``: the best low-rank approximation of ``tuned`` − ``base``.

    Args:
        base, tuned: each a folder of safetensors files (or another argument of
            ``veneer.models.load_base``), a model in memory, or a state dict (for the base only
            together with ``model``). Neither is changed. Do not call the base's model meanwhile,
            because the adapter is attached to it for a moment.
        rank: the rank of every product, at most min(out, in) of the weight. Give either ``rank`` or
            ``energy``.
        energy: the share of ‖ΔW‖² in (0, 1) to keep; each weight gets the smallest rank that keeps
            this share.
        targets, exclude: which weights get a product, as in ``LoraConfig``. A weight that
            ``exclude`` matches is not written at all.
        keep: which changed parameters are written in full. "auto": vectors (norms, biases) and
            persistent buffers, because these cannot have a low-rank change. Patterns add the
            parameters that they match. "lossy" adds each weight whose product keeps less than
            ``least`` of ‖ΔW‖², or has at least as many elements as the weight. "none" writes no
            vectors and buffers but those that a pattern matches.
        least: the share of ‖ΔW‖² below which a product counts as lossy.
        model: the model of a base that transformers cannot build. Only its modules and shapes are
            used, not its values.
        base_name: the name of the base in the record; None: the folder, or the name by which
            transformers loaded the base.
        provenance: JSON values to record with the adapter.
        progress: called after each weight with (its report, how many weights are factored, how many
            there are).

    Raises:
        ConfigError, CheckpointError: an option is invalid, or a folder holds no model.
        ExtractError: the models have different names or shapes, nothing changed, or a value is not
            finite.
        TargetError: a pattern matches nothing, or a changed weight cannot carry an adapter.
        OutputExistsError: ``out`` exists and ``overwrite`` is False.
    """
    start_time, out = time.perf_counter(), Path(out)
    raise_all(ConfigError, "Nothing was extracted", _option_problems(rank, energy, least))
    keep_entries = keep_options(keep)
    must_not_exist(out, overwrite)
    model_pair = open_models(base, tuned, model)
    weight_pairs, model_index = pair_weights(model_pair), ModelIndex(model_pair.structure)
    changed_pairs = _find_changed(weight_pairs, model_pair)
    name = _free_adapter_name(model_pair.structure)
    selection = select_weights(model_index, changed_pairs, targets, exclude, keep_entries, name)
    has_float64 = any(pair.base.dtype == torch.float64 for pair in selection.low_rank)
    factor_dtype = torch.float64 if has_float64 else torch.float32
    products, full_pairs = [], list(selection.full)
    for done_count, pair in enumerate(selection.low_rank, 1):
        product = _factor_change(pair, rank, energy, factor_dtype)
        if progress is not None:
            progress(product.report, done_count, len(selection.low_rank))
        if LOSSY in keep_entries and (product.report.large or product.report.kept < least):
            full_pairs.append((pair, LOSSY_PRODUCT))
        else:
            products.append(product)
    unchanged_count = len(weight_pairs) - len(changed_pairs)
    report = _build_report(out, products, full_pairs, selection, unchanged_count, model_pair, least)
    _write_folder(
        model_pair,
        name,
        products,
        full_pairs,
        factor_dtype,
        out,
        base_name=base_name or model_pair.base_name,
        provenance={
            "extracted": {
                "from": model_pair.tuned.label,
                "rank": rank,
                "energy": energy,
                "kept": report.kept,
                "lost": [entry.path for entry in report.lost],
            },
            **(provenance or {}),
        },
        overwrite=overwrite,
    )
    return replace(report, seconds=time.perf_counter() - start_time)


def _free_adapter_name(model: nn.Module) -> str:
    """A name that no adapter on ``model`` has."""
    attached_adapters = adapters_of(model)
    used_names = () if attached_adapters is None else attached_adapters.configs
    return next(name for number in count() if (name := f"extracted{number}") not in used_names)


def _build_report(
    out: Path,
    products: Sequence[_Product],
    full_pairs: PairsWithReason,
    selection: Selection,
    unchanged_count: int,
    model_pair: ModelPair,
    min_kept: float,
) -> ExtractReport:
    """The report of an extraction, with a duration of 0, which the caller replaces. ``min_kept``:
    the argument ``least`` of ``extract``. ``ExtractError``: there is nothing to write."""
    if not products and not full_pairs:
        raise ExtractError(
            f"changes of {listing((pair.path for pair, _ in selection.lost), 3)} only, which"
            " neither targets nor keep cover",
            "something to write",
            "widen targets or keep",
        )
    return ExtractReport(
        path=out,
        layers=tuple(product.report for product in products),
        whole=tuple(
            Kept(pair.path, torch.Size(pair.base.shape).numel(), pair.change_norm(), reason)
            for pair, reason in full_pairs
        ),
        lost=tuple(Lost(pair.path, pair.change_norm(), reason) for pair, reason in selection.lost),
        unchanged=unchanged_count,
        unread=model_pair.tuned.unread,
        least=min_kept,
        seconds=0.0,
    )


def _option_problems(rank: Any, energy: Any, least: Any) -> list[str]:
    checks = [
        (
            (rank is None) == (energy is None),
            f"rank={rank!r} and energy={energy!r}",
            "one of them",
            "give rank=16, or energy=0.95",
        ),
        (
            rank is not None and (type(rank) is not int or rank < 1),
            f"rank={rank!r}",
            "a whole number of at least 1",
            "use 16, or energy=0.95",
        ),
        (
            energy is not None and not (isinstance(energy, int | float) and 0 < energy < 1),
            f"energy={energy!r}",
            "a share between 0 and 1",
            "use 0.95, or 0.999 to lose next to nothing",
        ),
        (
            not (isinstance(least, int | float) and 0 <= least <= 1),
            f"least={least!r}",
            "a share from 0 to 1",
            "use 0.5",
        ),
    ]
    return [sentence(*error_texts) for failed, *error_texts in checks if failed]


def _find_changed(weight_pairs: Sequence[WeightPair], model_pair: ModelPair) -> list[WeightPair]:
    """The pairs whose base and tuned weights differ. ``ExtractError``: there is no such pair, or a
    weight has a value that is not finite. (An unchanged buffer, such as a mask, may have one.)"""
    comparisons = [(pair, *pair.compare()) for pair in weight_pairs]
    changed_pairs = [pair for pair, is_changed, _ in comparisons if is_changed]
    non_finite_paths = [
        pair.path
        for pair, is_changed, is_finite in comparisons
        if not is_finite and (is_changed or not pair.model_weight.is_buffer)
    ]
    if non_finite_paths:
        raise ExtractError(
            f"NaN or infinity in {listing(non_finite_paths, 40)}",
            "finite numbers in base and tuned model",
            "get the models again",
        )
    if not changed_pairs:
        raise ExtractError(
            f"no difference between {model_pair.base.label} and {model_pair.tuned.label}",
            "a fine-tuned model and its base",
            "check which models these are",
        )
    return changed_pairs


def _factor_change(
    pair: WeightPair, rank: int | None, energy: float | None, factor_dtype: torch.dtype
) -> _Product:
    """The low-rank product nearest to the change of one weight, with factors in ``factor_dtype``.
    Its rank is ``rank``, or the lowest that keeps the share ``energy`` of ‖ΔW‖²."""
    start_time = time.perf_counter()
    fingerprint = fingerprint_of(pair.base.shape, map(pair.base.read, pair.matrix_slices))
    dense_matrices = None if pair.is_stack else list(pair.matrices())
    frozen_input_index = pair.layer_kind.frozen_input(pair.module)
    frozen_input_energy = 0.0
    # A product must not change a frozen input, such as the padding token of an embedding. So the
    # change of this input is lost, and is added to the error of the product.
    for matrix in dense_matrices or () if frozen_input_index is not None else ():
        frozen_input_energy += matrix[:, frozen_input_index].double().square().sum().item()
        matrix[:, frozen_input_index] = 0

    def change_matrices() -> Iterator[Tensor]:
        return iter(dense_matrices) if dense_matrices is not None else pair.matrices()

    singular_vectors = None
    if energy is not None:
        spectra = []
        for matrix in change_matrices():
            squared_values, singular_vectors = svd.spectrum(matrix)
            spectra.append(squared_values)
        rank = svd.smallest_rank(spectra, energy)
    assert rank is not None  # either `rank` or `energy` is given
    rank, method_names, factor_pairs = min(rank, pair.dims.max_rank), set(), []
    change_energy = error_energy = frozen_input_energy
    for index, matrix in enumerate(change_matrices()):
        if singular_vectors is not None and pair.dims.groups == 1:
            vectors, method = singular_vectors[:, :rank], "exact"
        else:
            vectors, method = svd.leading(matrix, rank, exact=energy is not None, seed=index)
        A, B = (factor.to(factor_dtype) for factor in svd.split(matrix, vectors))
        change_energy += svd.energy(matrix)
        error_energy += svd.squared_distance(matrix, A, B)
        factor_pairs.append((A.cpu(), B.cpu()))
        method_names.add(method)
    base_energy = sum(
        svd.energy(pair.base.read(matrix_slice).reshape(1, -1))
        for matrix_slice in pair.matrix_slices
    )
    A, B = (torch.stack(factor_matrices) for factor_matrices in zip(*factor_pairs, strict=True))
    report = Extracted(
        path=pair.path,
        dims=(pair.dims.groups, pair.dims.out, pair.dims.in_),
        rank=rank,
        change=change_energy**0.5,
        relative=(change_energy / base_energy) ** 0.5 if base_energy else math.inf,
        error=(error_energy / change_energy) ** 0.5,
        method="exact" if method_names == {"exact"} else "randomised",
        seconds=time.perf_counter() - start_time,
    )
    return _Product(pair, A, B, fingerprint, report)


def _write_folder(
    model_pair: ModelPair,
    adapter_name: str,
    products: Sequence[_Product],
    full_pairs: PairsWithReason,
    factor_dtype: torch.dtype,
    out: Path,
    **options: Any,
) -> None:
    """Install the adapter ``adapter_name`` on the base's model, save it to ``out``, and detach it.
    ``full_pairs``: the parameters and buffers that it stores in full, with the tuned model's
    values. If it stores a buffer of a module, it must store all persistent buffers of the module;
    those that are not in ``full_pairs`` get the base's values. ``options``: further arguments of
    ``save``.
    """
    model_index = ModelIndex(model_pair.structure)
    ranks = {product.pair.model_weight.ref: product.report.rank for product in products}
    target_paths = [product.pair.path for product in products] or [
        pair.path for pair, _ in full_pairs
    ]
    highest_rank = max(ranks.values(), default=1)
    config = LoraConfig(
        rank=highest_rank,
        alpha=float(highest_rank),
        targets=tuple(target_paths),
        dtype="float64" if factor_dtype == torch.float64 else None,
    )
    problems: list[str] = []
    plans = plan_adapter(model_index, config, ranks, [pair for pair, _ in full_pairs], problems)
    raise_all(TargetError, "Nothing was written", problems)
    if model_pair.is_meta:
        _randomize_rows([(model_index.modules[path], weight) for path, weight in ranks])
    factors: dict[ParamRef, Mapping[str, Tensor]] = {
        product.pair.model_weight.ref: {"A": product.A, "B": product.B} for product in products
    }
    # the tensors at these paths get the tuned model's values, other buffers the base's
    tuned_paths = {path for pair, _ in full_pairs for path in pair.model_weight.names}
    product_weight_ids = {
        id(model_pair.base.by_name.get(product.pair.path)) for product in products
    }
    fingerprints = {product.pair.path: product.fingerprint for product in products}
    try:
        install_adapter(
            model_pair.structure, adapter_name, plans, trainable=False, parameters=factors
        )
        for path, _, layer_adapter in adapters(model_pair.structure, adapter_name):
            for tensor_name, tensor in (
                *layer_adapter.full._parameters.items(),
                *layer_adapter.full._buffers.items(),
            ):
                full_path = parameter_path(path, tensor_name)
                stored_weight = (
                    model_pair.tuned if full_path in tuned_paths else model_pair.base
                ).by_name.get(full_path)
                if stored_weight is not None and tensor is not None:
                    tensor.copy_(stored_weight.read(None))
        for model_weight in list_weights(model_index):
            base_weight = model_pair.base.find(model_weight.names)
            if base_weight is not None and id(base_weight) not in product_weight_ids:
                fingerprints[model_weight.path] = base_weight.fingerprint()
        save(model_pair.structure, out, name=adapter_name, fingerprints=fingerprints, **options)
    finally:
        attached_adapters = adapters_of(model_pair.structure)
        if attached_adapters is not None and adapter_name in attached_adapters.configs:
            detach(model_pair.structure, adapter_name)


def _randomize_rows(targeted_weights: Sequence[tuple[nn.Module, str]]) -> None:
    """Prepare a model that was built without weights for a check in ``save``: to find out whether
    PEFT can apply the adapter, ``save`` compares the forward of a module whose class overrides it
    with the forward of the stock layer (such as ``nn.Linear``), on a sample input. Weights of zeros
    would make all outputs equal, so this function fills the first rows of these modules' weights
    with random values. ``targeted_weights``: (module, name of the weight)."""
    generator = torch.Generator().manual_seed(0)
    for module, weight_name in targeted_weights:
        layer_kind, weight = kind_for(module, weight_name), module._parameters.get(weight_name)
        has_stock_forward = layer_kind is GENERAL_KIND or any(
            base_class(module).forward is layer_class.forward for layer_class in layer_kind.types()
        )
        if weight is not None and not has_stock_forward:
            weight.data[:8].normal_(generator=generator)
