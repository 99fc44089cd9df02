"""Compute the new content of one weight for a merge: round(gain ⊙ (W + ΔW)), encoded as its storage
keeps it. Nothing is written here.
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

#: (the new stored tensors of a weight, the report of its change; None for running statistics)
Content = tuple[dict[str, Tensor], LayerMerge | None]


def merged_content(
    weight: StoredWeight, rounding: str, second_moment: Tensor | None, problems: list[str]
) -> Content | None:
    """The new content of a weight. None if it cannot be merged; then the reason is added to
    ``problems``.

    ``second_moment`` is Σ xᵀx over the inputs x of the weight, [g, in, in], if the caller of
    ``merge`` passed it.
    """
    target, storage, values = weight.target, weight.storage, weight.values
    if problem := _write_problem(weight):
        problems.append(problem)
        return None
    if values is None:
        return _fold_low_rank(weight, rounding, second_moment, problems)
    # running statistics and other buffers are copied without rounding
    if isinstance(target, Tensor) and not isinstance(target, nn.Parameter):
        return {"values": values.detach().clone()}, None
    exact_weight = double(values)
    if weight.origin is not None:  # add the change of the full values to the present weight
        exact_weight = (
            exact_weight
            - double(storage.decode(target, weight.origin))
            + double(storage.dense(target))
        )
    return _encode(weight, exact_weight, problems)


def _write_problem(weight: StoredWeight) -> str | None:
    """An error text if a weight cannot be read or written here, because it is offloaded, created in
    inference mode, or packed on a device without float64; else None."""
    target, storage = weight.target, weight.storage
    is_tensor = isinstance(target, Tensor)
    if is_tensor and target.is_meta and "_hf_hook" in weight.module.__dict__:
        return sentence(
            f"{weight.full_path}, whose numbers are elsewhere (offloaded?)",
            "a weight in memory",
            "bring it back (accelerate.hooks.remove_hook_from_module), or merge the files (veneer"
            " merge)",
        )
    if is_tensor and target.is_inference() and not torch.is_inference_mode_enabled():
        return sentence(
            f"{weight.full_path}, made under torch.inference_mode, which torch lets nobody write"
            " outside it",
            "a weight that can be written",
            "merge under torch.inference_mode too",
        )
    if storage.dense_name is None and not has_float64(device := storage.device(target)):
        problem = (
            f"{weight.full_path}, a weight that is stored packed, on {device}, which has no float64"
        )
        do = 'move the model for the merge: model.to("cpu")'
        return sentence(problem, "a device with float64", do)
    return None


def _fold_low_rank(
    weight: StoredWeight, rounding: str, second_moment: Tensor | None, problems: list[str]
) -> Content | None:
    """The new content of a weight with a low-rank change; None if it cannot be merged.

    Dense weights go through ``fold``, tile by tile. If the storage or the layer transforms the
    weight further, all of W + ΔW is formed in float64.
    """
    change, storage, path = weight.keeper, weight.storage, weight.full_path
    storage.prepare(weight.module)
    low_rank, gain = weight.change()
    dense, dense_name = storage.dense(weight.target).detach(), storage.dense_name
    is_unsharded = type(dense) in (Tensor, nn.Parameter)
    # whether the values that the format can represent are known, so that rounding can be chosen
    has_grid = dense_name is not None or isinstance(storage, GridStorage)
    if (
        not has_grid
        or not is_unsharded
        or change.layer.apply_forward_rewrite(weight.module, dense) is not dense
    ):
        if second_moment is not None:
            problem = f"{path}: inputs= of a weight that is rounded as it is stored or read"
            problems.append(sentence(problem, "none: it has no faithful rounding", "leave it out"))
        exact_weight = change.changed_weight(weight.target, low_rank, gain, torch.float64)
        return _encode(
            weight, change.layer.apply_forward_rewrite(weight.module, exact_weight), problems
        )
    if second_moment is not None and not change.layer.drops_input:
        problem, expected = f"{path}: inputs= of an embedding", "none: its inputs are indices"
        problems.append(sentence(problem, expected, "leave it out"))
        return None
    matrix = change.layer.unfold(dense, change.dims)
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
        problems.append(_not_finite_problem(weight, dense.dtype))
        return None
    report = LayerMerge(
        path, folded.change, folded.retention, folded.rounding, folded.sums.retention
    )
    return {dense_name: change.layer.fold(folded.weight, dense.shape)}, report


def fold_change(
    change: Change, weight: Tensor, low_rank: LowRank, gain: Tensor | None, **options: Any
) -> Folded:
    """``kernels.rounding.fold`` of the weight that ``change`` changes, [g, out, in], or of a slice
    of it. g is the number of matrices in the weight, 1 for a linear layer."""
    return fold(weight, low_rank, gain, side=_rounding_side(change), **options)


def _rounding_side(change: Change) -> str:
    """The side in whose directions faithful rounding cancels errors. The inputs of an embedding are
    indices, which have no directions, so the outputs are used."""
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
    """The new content of a quantised weight. It is first rounded to the nearest values of its grid,
    which are the values that its format can represent with the present scales. Unless ``rounding``
    is "nearest", the result is then improved as ``rounding`` says."""
    change, storage, target = weight.keeper, cast(GridStorage, weight.storage), weight.target
    content = _encode(
        weight, change.changed_weight(target, low_rank, gain, torch.float64), problems
    )
    if content is None or rounding == "nearest":
        return content
    # only buffers have no report, and this is a low-rank change
    stored_tensors, report = cast(tuple[dict[str, Tensor], LayerMerge], content)

    def unfold(values: Tensor) -> Tensor:
        return change.layer.unfold(values, change.dims)

    def grid() -> Grid:
        return storage.grid(target, stored_tensors).map_tensors(unfold)

    nearest_weight = unfold(storage.decode(target, stored_tensors))
    options: Any = {"rounding": rounding, "side": _rounding_side(change), "inputs": second_moment}
    folded = fold_onto(grid, matrix, low_rank, gain, nearest_weight, **options)
    if folded.rounding == "nearest":
        return content
    stored_tensors = storage.onto(
        target, stored_tensors, double(change.layer.fold(folded.weight, storage.shape(target)))
    )
    return stored_tensors, replace(report, retention=folded.retention, rounding=folded.rounding)


def _encode(weight: StoredWeight, values: Tensor, problems: list[str]) -> Content | None:
    """The new content of a weight whose storage rounds ``values`` by its own rule."""
    storage = weight.storage
    try:
        stored_tensors = storage.encode(weight.target, values)
    except MergeError as error:
        problems.append(f"{weight.full_path}: {error}")
        return None
    rounded_weight = storage.decode(weight.target, stored_tensors)
    if not rounded_weight.isfinite().all():
        problems.append(_not_finite_problem(weight, rounded_weight.dtype))
        return None
    rounding = "storage" if storage.dense_name is None else "nearest"
    return stored_tensors, measure_change(
        weight.full_path,
        double(storage.dense(weight.target)),
        values,
        double(rounded_weight),
        rounding,
    )


def _not_finite_problem(weight: StoredWeight, dtype: torch.dtype) -> str:
    problem = f"{weight.full_path}: W + ΔW is not finite in {dtype}"
    return sentence(problem, "finite weights", "check the adapter for NaN or overflow")


def measure_change(
    path: str, old_weight: Tensor, exact_weight: Tensor, rounded_weight: Tensor, rounding: str
) -> LayerMerge:
    """The report of a weight ``old_weight`` that became ``rounded_weight`` instead of
    ``exact_weight``. All three are float64."""
    change, realised_change = exact_weight - old_weight, rounded_weight - old_weight
    change_norm, old_norm = change.norm().item(), old_weight.norm().item()
    retention = (
        ((change * realised_change).sum() / (change * change).sum()).item() if change_norm else 1.0
    )
    relative_change = change_norm / old_norm if old_norm else float(change_norm > 0)
    return LayerMerge(path, relative_change, retention, rounding, retention)
