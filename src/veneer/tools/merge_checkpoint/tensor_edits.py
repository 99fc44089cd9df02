"""The edit of one tensor of a merge. Edits by parameters that adapters train in full are merged
here; ``job.py`` merges low-rank changes.

    TensorEdit                                      the weighted changes of a slice of a tensor
    merge_full(edit, weight, dtype)                 W + Σ wᵢ (Pᵢ − W)
    must_define_new_values(edits, first_new_row)    raises MergeError where there is no W
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from veneer import models
from veneer.attach import Change
from veneer.errors import MergeError
from veneer.kernels.reference import round_once

#: the slice of a tensor that holds one whole parameter and nothing else
WHOLE_PARAM = models.ParamSlice("")


@dataclass(frozen=True)
class TensorEdit:
    """An edit of one tensor in the files, or of a slice of it.

    Fields:
        path, shape: the parameter's first name in the model (a tied parameter has several), and the
            shape of the whole parameter.
        param_slice: ``within`` is the slice of the tensor that is edited, and ``index`` is the
            slice of the parameter whose values are there. Each is () for the whole.
        changes: (coefficient wᵢ, the adapter's change of the parameter) for each adapter that
            trains low-rank factors or token rows of the parameter.
        full: (coefficient wᵢ, trained value of the whole parameter) for each adapter that trains it
            in full. Exactly one of ``changes`` and ``full`` is empty.
    """

    path: str
    shape: torch.Size
    param_slice: models.ParamSlice = WHOLE_PARAM
    changes: tuple[tuple[float, Change], ...] = ()
    full: tuple[tuple[float, Tensor], ...] = ()


def merge_full(edit: TensorEdit, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Merge parameters Pᵢ that adapters train in full into W = ``weight``, the slice of a tensor
    that ``edit`` names: W + Σ wᵢ (Pᵢ − W), rounded once to ``dtype``. Integers, such as the step
    counter of a batch norm, cannot be averaged, so the result is the first adapter's value.
    ``MergeError``: the running variance of a batch norm would be negative."""
    trained_values = [
        (coefficient, tensor[edit.param_slice.index].reshape(weight.shape))
        for coefficient, tensor in edit.full
    ]
    if not weight.is_floating_point() or (len(trained_values) == 1 and trained_values[0][0] == 1):
        trained_value = trained_values[0][1]
        if not trained_value.is_floating_point():
            return trained_value.to(dtype)
        return round_once(trained_value.double(), dtype)
    base_value = weight.double()
    change = sum(
        coefficient * (trained_value.double() - base_value)
        for coefficient, trained_value in trained_values
    )
    if edit.path.endswith("running_var") and bool((base_value + change < 0).any()):
        raise MergeError(
            f"{edit.path!r}, which these weights make negative",
            "weights that add up to 1 at most",
            "change them",
        )
    return round_once(base_value + change, dtype)


def must_define_new_values(edits: Iterable[TensorEdit], first_new_row: int = 0) -> None:
    """Raise ``MergeError`` if rows that the base's files lack, those from ``first_new_row`` on of
    the parameters that ``edits`` change, would be a multiple of the adapters' values, because the
    weights of the adapters that hold a row do not add up to 1."""
    for edit in edits:
        weight_by_row = defaultdict[int, float](float)
        for coefficient, change in edit.changes:
            for row in () if change.tokens is None else change.tokens.tolist():
                weight_by_row[row] += coefficient
        for coefficient, _ in edit.full:
            weight_by_row[first_new_row] += coefficient
        if not all(
            math.isclose(weight, 1.0)
            for row, weight in weight_by_row.items()
            if row >= first_new_row
        ):
            raise MergeError(
                f"values of {edit.path!r}, which the base's files lack, in adapters whose weights"
                " do not add up to 1",
                "one adapter with the weight 1, or weights that add up to 1",
                "change the weights",
            )
