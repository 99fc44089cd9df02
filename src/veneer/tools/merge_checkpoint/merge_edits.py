"""Merge the edits of one tensor (``merge_plan.TensorEdit``) into its values.

Each weight equals what ``veneer.merge`` would write into a live model, bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from veneer.attach import Change, fold_change
from veneer.errors import MergeError
from veneer.kernels.reference import round_once
from veneer.kernels.rounding import Folded
from veneer.lowrank import LowRank
from veneer.models.base_weights import slice_shape
from veneer.tools.merge_checkpoint.merge_plan import TensorEdit


class _NeedsBase(Exception):  # noqa: N818 (a signal, not an error)
    """A variant needs the frozen weight."""


def merge_changes(
    edit: TensorEdit,
    weight: Tensor,
    dtype: torch.dtype,
    rounding: str,
    compiled: bool,
) -> Folded:
    """Merge the changes of ``edit`` into ``weight``, a slice of a tensor that stays unchanged. The
    result is bit for bit what ``veneer.merge`` writes into a live model with this ``rounding``.
    ``compiled=False`` does not use numba."""
    shape = slice_shape(edit.shape, edit.param_slice.index)
    dense, first_change = weight.reshape(shape), edit.changes[0][1]
    dims = first_change.dims if not edit.param_slice.index else first_change.layer.dims(None, shape)
    layer_weight = first_change.layer.unfold(dense, dims)
    low, gain = _sum_changes(
        [(share, *_resolve_slice(change, edit, layer_weight)) for share, change in edit.changes]
    )
    folded = fold_change(
        first_change, layer_weight, low, gain, dtype=dtype, rounding=rounding, compiled=compiled
    )
    return replace(
        folded, weight=first_change.layer.fold(folded.weight, shape).reshape(weight.shape)
    )


def _resolve_slice(
    change: Change, edit: TensorEdit, layer_weight: Tensor
) -> tuple[LowRank, Tensor | None]:
    """(ΔW, gain) for the slice ``layer_weight`` of the parameter."""
    if not edit.param_slice.index:
        return change.resolve_float64(change.layer.fold(layer_weight, edit.shape))
    if change.tokens is not None:
        problem = f"trained tokens of {edit.path!r}, which the files hold in parts"
        raise MergeError(
            problem, "the whole of it in one tensor", "merge it in memory, and save the model"
        )
    all_rows = slice(None)
    groups, rows = (
        (*edit.param_slice.index, all_rows)[:2]
        if change.dims.groups > 1
        else (all_rows, edit.param_slice.index[0])
    )

    def need() -> Tensor:
        raise _NeedsBase

    parameters: dict[str, Any] = {
        name: value.double() for name, value in change.adapter_parameters.items()
    }
    try:
        low, _ = change.variant.resolve(parameters, change.scale, need)
    except _NeedsBase:
        if change.rows is not None or parameters.keys() - {"A", "B"} - set(
            change.variant.peft_keys
        ):
            problem = (
                f"variant {change.variant.name!r} on {edit.path!r}, which the files hold in parts"
            )
            raise MergeError(
                problem, "the whole of it in one tensor", "merge it in memory"
            ) from None
        shape = change.dims[:2]
        sliced_parameters = {
            name: value[groups]
            if name == "A"
            else value[groups, rows]
            if name == "B"
            else value.view(shape)[groups, rows].flatten()
            for name, value in parameters.items()
        }
        return change.variant.resolve(sliced_parameters, change.scale, lambda: layer_weight)
    if change.rows is not None:
        low = low.place(change.rows, change.dims.out)
    return LowRank(low.A[groups], low.B[groups, rows], low.scale), None


def _sum_changes(
    terms: Sequence[tuple[float, LowRank, Tensor | None]],
) -> tuple[LowRank, Tensor | None]:
    """Σ wᵢ (gᵢ ⊙ (W + ΔWᵢ) − W) as one change G ⊙ (W + ΔW) − W."""
    if len(terms) == 1 and terms[0][0] == 1:
        return terms[0][1:]
    shares, lows, optional_gains = zip(*terms, strict=True)
    if all(gain is None for gain in optional_gains):
        return LowRank.sum(lows, shares), None
    sizes = lows[0].B.shape[:2]
    gains = [
        torch.ones(sizes).double() if gain is None else gain.double().view(sizes)
        for gain in optional_gains
    ]
    total_gain = 1 + torch.stack(
        [share * (gain - 1) for share, gain in zip(shares, gains, strict=True)]
    ).sum(0)
    if total_gain.abs().min() < 1e-6:
        raise MergeError(
            "a row that these weights scale to nothing", "a gain that is not 0", "change them"
        )
    scaled_lows = [
        low.to(torch.float64).scale_rows(gain / total_gain)
        for low, gain in zip(lows, gains, strict=True)
    ]
    return LowRank.sum(scaled_lows, shares), total_gain.flatten()


def merge_full(edit: TensorEdit, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Merge values trained in full into ``weight``, a slice of a tensor: W + Σ wᵢ (Pᵢ − W),
    rounded once."""
    values = [
        (share, value[edit.param_slice.index].reshape(weight.shape)) for share, value in edit.full
    ]
    if not weight.is_floating_point() or (len(values) == 1 and values[0][0] == 1):
        value = values[0][1]
        return round_once(value.double(), dtype) if value.is_floating_point() else value.to(dtype)
    base = weight.double()
    return round_once(base + sum(share * (value.double() - base) for share, value in values), dtype)
