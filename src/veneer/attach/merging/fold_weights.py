"""Compute the new content of one weight for a merge: gain ⊙ (W + ΔW), rounded and encoded in the
format in which the weight is stored (dense or quantised). Nothing is written here.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from veneer.attach.layer.change import Change
from veneer.attach.merging.merge_report import LayerMerge
from veneer.attach.merging.stored_weights import StoredWeight
from veneer.bases import GridStorage
from veneer.errors import MergeError, sentence
from veneer.kernels.grid import Grid
from veneer.kernels.rounding import Folded, fold, fold_onto
from veneer.lowrank import LowRank
from veneer.precision import double, has_float64

#: (the new stored tensors of a weight, by name; the report of its change, or None for running
#: statistics and other buffers, which have no report)
Content = tuple[dict[str, Tensor], LayerMerge | None]


def merged_content(
    weight: StoredWeight, rounding: str, second_moment: Tensor | None, problems: list[str]
) -> Content | None:
    """The new content of a weight. None if it cannot be merged; then the reason is added to
    ``problems``.

    Args:
        rounding: "auto", "nearest" or "faithful", as in ``merge``.
        second_moment: Σ xᵀx over the inputs x of the weight, [g, in, in] for g matrices, for
            faithful rounding. None if the caller of ``merge`` did not pass it.
    """
    weight_holder, storage, full_values = weight.weight_holder, weight.storage, weight.full_values
    if problem := _write_problem(weight):
        problems.append(problem)
        return None
    if full_values is None:
        return _fold_low_rank(weight, rounding, second_moment, problems)
    # running statistics and other buffers: the adapter's replace them, without rounding
    if isinstance(weight_holder, Tensor) and not isinstance(weight_holder, nn.Parameter):
        return {"values": full_values.detach().clone()}, None
    exact_weight = double(full_values)
    # If other adapters have been merged into the weight since this one was attached, keep their
    # changes: add the difference between the trained weight and the weight at the attach.
    if weight.origin_tensors is not None:
        exact_weight = (
            exact_weight
            - double(storage.decode(weight_holder, weight.origin_tensors))
            + double(storage.dense(weight_holder))
        )
    return _encode(weight, exact_weight, problems)


def _write_problem(weight: StoredWeight) -> str | None:
    """An error text if a merge cannot read or write a weight, because it is offloaded, created in
    inference mode, or packed (quantised) on a device without float64; else None."""
    weight_holder, storage = weight.weight_holder, weight.storage
    is_tensor = isinstance(weight_holder, Tensor)
    if is_tensor and weight_holder.is_meta and "_hf_hook" in weight.module.__dict__:
        return sentence(
            f"{weight.full_path}, whose numbers are elsewhere (offloaded?)",
            "a weight in memory",
            "bring it back (accelerate.hooks.remove_hook_from_module), or merge the files (veneer"
            " merge)",
        )
    if is_tensor and weight_holder.is_inference() and not torch.is_inference_mode_enabled():
        return sentence(
            f"{weight.full_path}, made under torch.inference_mode, which torch lets nobody write"
            " outside it",
            "a weight that can be written",
            "merge under torch.inference_mode too",
        )
    if storage.dense_name is None and not has_float64(device := storage.device(weight_holder)):
        problem = (
            f"{weight.full_path}, a weight that is stored packed, on {device}, which has no float64"
        )
        advice = 'move the model for the merge: model.to("cpu")'
        return sentence(problem, "a device with float64", advice)
    return None


def _fold_low_rank(
    weight: StoredWeight, rounding: str, second_moment: Tensor | None, problems: list[str]
) -> Content | None:
    """The new content of a weight with a low-rank change. None if it cannot be merged; then the
    reason is added to ``problems``.

    A dense weight is changed by ``kernels.rounding.fold``, tile by tile. All of W + ΔW is formed in
    float64 if the storage rounds by a rule of its own, the weight is sharded, or the layer's
    forward rewrites the weight.
    """
    change, storage, path = weight.keeper, weight.storage, weight.full_path
    storage.prepare(weight.module)
    low_rank, gain = weight.change()
    dense_weight, dense_name = storage.dense(weight.weight_holder).detach(), storage.dense_name
    is_unsharded = type(dense_weight) in (Tensor, nn.Parameter)
    # Whether it is known which values the format can represent. Only then can faithful rounding
    # choose between the two neighbours of an exact value.
    has_grid = dense_name is not None or isinstance(storage, GridStorage)
    if (
        not has_grid
        or not is_unsharded
        or change.layer.apply_forward_rewrite(weight.module, dense_weight) is not dense_weight
    ):
        if second_moment is not None:
            problem = f"{path}: inputs= of a weight that is rounded as it is stored or read"
            problems.append(sentence(problem, "none: it has no faithful rounding", "leave it out"))
        exact_weight = change.changed_weight(weight.weight_holder, low_rank, gain, torch.float64)
        return _encode(
            weight, change.layer.apply_forward_rewrite(weight.module, exact_weight), problems
        )
    if second_moment is not None and not change.layer.drops_input:
        problem, expected = f"{path}: inputs= of an embedding", "none: its inputs are indices"
        problems.append(sentence(problem, expected, "leave it out"))
        return None
    matrix = change.layer.unfold(dense_weight, change.dims)
    moment_shape = len(matrix), *[matrix.shape[2]] * 2
    if second_moment is not None and (
        second_moment.shape != moment_shape or not second_moment.isfinite().all()
    ):
        defect = (
            "with numbers that are not finite"
            if second_moment.shape == moment_shape
            else f"of shape {tuple(second_moment.shape)}"
        )
        problem, expected = f"{path}: inputs= {defect}", f"Σ xᵀx of shape {moment_shape}, finite"
        problems.append(sentence(problem, expected, "give that of the inputs of this weight"))
        return None
    if dense_name is None:
        return _fold_onto_grid(weight, matrix, low_rank, gain, rounding, second_moment, problems)
    folded = fold_change(change, matrix, low_rank, gain, rounding=rounding, inputs=second_moment)
    if not folded.finite:
        problems.append(_not_finite_problem(weight, dense_weight.dtype))
        return None
    report = LayerMerge(
        path, folded.change, folded.retention, folded.rounding, folded.sums.retention
    )
    return {dense_name: change.layer.fold(folded.weight, dense_weight.shape)}, report


def fold_change(
    change: Change, weight: Tensor, low_rank: LowRank, gain: Tensor | None, **options: Any
) -> Folded:
    """Round gain ⊙ (W + ΔW) for the weight W that ``change`` changes, or for a slice of it: see
    ``kernels.rounding.fold``, which gets ``options``.

    Args:
        weight: W, [g, out, in]. g is the number of matrices in it, 1 for a linear layer.
        low_rank, gain: ΔW, and the factor for each output [g · out] or None, as ``Change.resolve``
            returns them.
    """
    return fold(weight, low_rank, gain, side=_rounding_side(change), **options)


def _rounding_side(change: Change) -> str:
    """The argument ``side`` of ``fold``: faithful rounding cancels errors in the directions that A
    reads ("inputs") or those that B writes ("outputs"). The inputs of an embedding are indices,
    which have no directions, so its side is "outputs"."""
    return "inputs" if change.layer.drops_input else "outputs"


def _fold_onto_grid(
    weight: StoredWeight,
    matrix: Tensor,
    low_rank: LowRank,
    gain: Tensor | None,
    rounding: str,
    second_moment: Tensor | None,
    problems: list[str],
) -> Content | None:
    """The new content of a quantised weight. None if it cannot be merged; then the reason is added
    to ``problems``.

    gain ⊙ (W + ΔW) is encoded, which sets the scales and rounds to nearest. Unless ``rounding`` is
    "nearest", ``fold_onto`` may then round it faithfully to the values that the format can
    represent with these scales (the grid).

    Args:
        matrix: the present weight, dequantised, [g, out, in] for g matrices.
    """
    change, storage, weight_holder = (
        weight.keeper,
        cast(GridStorage, weight.storage),
        weight.weight_holder,
    )
    content = _encode(
        weight, change.changed_weight(weight_holder, low_rank, gain, torch.float64), problems
    )
    if content is None or rounding == "nearest":
        return content
    # ``cast``: the report is None for buffers only, and this is a weight with a low-rank change
    stored_tensors, report = cast(tuple[dict[str, Tensor], LayerMerge], content)

    def unfold(values: Tensor) -> Tensor:
        return change.layer.unfold(values, change.dims)

    def grid() -> Grid:
        return storage.grid(weight_holder, stored_tensors).map_tensors(unfold)

    nearest_weight = unfold(storage.decode(weight_holder, stored_tensors))
    options: Any = {"rounding": rounding, "side": _rounding_side(change), "inputs": second_moment}
    folded = fold_onto(grid, matrix, low_rank, gain, nearest_weight, **options)
    if folded.rounding == "nearest":
        return content
    stored_tensors = storage.onto(
        weight_holder,
        stored_tensors,
        double(change.layer.fold(folded.weight, storage.shape(weight_holder))),
    )
    return stored_tensors, replace(report, retention=folded.retention, rounding=folded.rounding)


def _encode(weight: StoredWeight, exact_weight: Tensor, problems: list[str]) -> Content | None:
    """The new content of a weight, ``exact_weight`` (float64) as the weight's storage rounds and
    encodes it. None if that fails or is not finite; then the reason is added to ``problems``."""
    storage = weight.storage
    try:
        stored_tensors = storage.encode(weight.weight_holder, exact_weight)
    except MergeError as error:
        problems.append(f"{weight.full_path}: {error}")
        return None
    rounded_weight = storage.decode(weight.weight_holder, stored_tensors)
    if not rounded_weight.isfinite().all():
        problems.append(_not_finite_problem(weight, rounded_weight.dtype))
        return None
    rounding = "storage" if storage.dense_name is None else "nearest"
    return stored_tensors, measure_change(
        weight.full_path,
        double(storage.dense(weight.weight_holder)),
        exact_weight,
        double(rounded_weight),
        rounding,
    )


def _not_finite_problem(weight: StoredWeight, dtype: torch.dtype) -> str:
    problem = f"{weight.full_path}: W + ΔW is not finite in {dtype}"
    return sentence(problem, "finite weights", "check the adapter for NaN or overflow")


def measure_change(
    path: str, old_weight: Tensor, exact_weight: Tensor, rounded_weight: Tensor, rounding: str
) -> LayerMerge:
    """The report of a weight at ``path`` that should change from ``old_weight`` to ``exact_weight``
    and was rounded to ``rounded_weight``. All three are float64. ``rounding`` names the rule:
    "nearest", or "storage" for the storage's own."""
    exact_change, realised_change = exact_weight - old_weight, rounded_weight - old_weight
    change_norm, old_norm = exact_change.norm().item(), old_weight.norm().item()
    retention = (
        ((exact_change * realised_change).sum() / (exact_change * exact_change).sum()).item()
        if change_norm
        else 1.0
    )
    relative_change = change_norm / old_norm if old_norm else float(change_norm > 0)
    return LayerMerge(path, relative_change, retention, rounding, retention)
