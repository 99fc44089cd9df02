"""Casts around a layer that runs on W + ΔW (materialised, or a view). The factored path casts in
``layer_call.py``.

A 16-bit layer computes W + ΔW in float32, because a 16-bit sum would lose a ΔW that is small
against W. Each tensor of the output is then cast to the dtype that it would have without an
adapter. The tensors of one output may have different dtypes: a router returns float32 scores
beside bfloat16 logits. Integers (token ids, masks) pass through unchanged.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence
from torch.utils import _pytree as pytree


def is_float(value: Any) -> bool:
    tensor = value.data if isinstance(value, PackedSequence) else value
    return isinstance(tensor, Tensor) and tensor.is_floating_point()


def widen(value: Tensor, dtype: torch.dtype) -> Tensor:
    return value.to(dtype) if value.is_floating_point() else value


def cast_floats(tree: Any, dtype: torch.dtype) -> Any:
    return pytree.tree_map(lambda leaf: leaf.to(dtype) if is_float(leaf) else leaf, tree)


def cast_outputs(tree: Any, dtypes: Sequence[torch.dtype | None], default: torch.dtype) -> Any:
    """Cast each floating-point leaf of an output (a pytree): the i-th leaf to ``dtypes[i]``, or to
    ``default`` if that is None. If the output and ``dtypes`` differ in length, all leaves are
    cast to ``default``."""
    leaves, spec = pytree.tree_flatten(tree)
    if len(dtypes) != len(leaves):
        dtypes = [default] * len(leaves)
    cast_leaves = [
        leaf.to(dtype or default) if is_float(leaf) else leaf
        for leaf, dtype in zip(leaves, dtypes, strict=True)
    ]
    return pytree.tree_unflatten(cast_leaves, spec)


def no_autocast(tensor: Tensor) -> Any:
    return torch.autocast(tensor.device.type, enabled=False)


def output_dtype(x: Tensor, weight_dtype: torch.dtype) -> torch.dtype:
    """The dtype of the output that the layer without an adapter computes for the input ``x``:
    that of the weight for token ids, else that of autocast or of ``x``."""
    if not x.is_floating_point():
        return weight_dtype
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
