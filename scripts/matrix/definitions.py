"""The definition of each variant on dense matrices. It follows the variant's paper alone, so that
the matrix does not compare Veneer with itself."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from veneer.attach.layer.change import Change

#: maps (n: the adapter parameters by name, s: the scale, W: the frozen weight [g, out, in]) to
#: gain ⊙ (W + ΔW)
Meaning = Callable[[Mapping[str, Tensor], float, Tensor], Tensor]


def _product(n: Mapping[str, Tensor], s: float, W: Tensor) -> Tensor:
    return W + s * n["B"] @ n["A"]


def _product_minus_start(n: Mapping[str, Tensor], s: float, W: Tensor) -> Tensor:
    return W + s * (n["B"] @ n["A"] - n["B0"] @ n["A0"])


def _dora(n: Mapping[str, Tensor], s: float, W: Tensor) -> Tensor:
    """DoRA: no gradient flows through the norm; a zero row stays zero."""
    V = _product(n, s, W)
    norm = V.detach().norm(dim=2, keepdim=True)
    return n["magnitude"].view(norm.shape) * V / torch.where(norm == 0, torch.ones_like(norm), norm)


def _product_on_pooled_input(n: Mapping[str, Tensor], s: float, W: Tensor) -> Tensor:
    pooled_count = n["A1"].shape[-1]
    pool_size = W.shape[-1] // pooled_count
    pool_index = torch.arange(W.shape[-1]) // pool_size
    return W + s * n["B"] @ n["A1"][..., pool_index] * pooled_count / pool_size


def _lokr(n: Mapping[str, Tensor], s: float, W: Tensor) -> Tensor:
    return W + s * torch.einsum("glm,gkn->glkmn", n["C"], n["B2"] @ n["A2"]).reshape(W.shape)


MEANINGS: dict[str, Meaning] = {
    "lora": _product,
    "rslora": _product,
    "orthogonal": _product,
    "eva": _product,
    "dora": _dora,
    "dora_rslora": _dora,
    "pissa": _product_minus_start,
    "olora": _product_minus_start,
    "lora_ga": _product_minus_start,
    "loftq": lambda n, s, W: _product_minus_start(n, s, W) + n["B0"] @ n["A0"],
    "milora": _product_minus_start,
    "corda": _product_minus_start,
    "corda_kpm": _product_minus_start,
    "mica": _product,
    "qalora": _product_on_pooled_input,
    "lora_xs": lambda n, s, W: W + s * n["B"] @ n["R"] @ n["A"],
    "vera": lambda n, s, W: W + s * n["b"].diag_embed() @ n["B"] @ n["d"].diag_embed() @ n["A"],
    "adalora": lambda n, s, W: W + s * n["B"] @ (n["E"] * n["mask"]).diag_embed() @ n["A"],
    "loha": lambda n, s, W: W + s * (n["B1"] @ n["A1"]) * (n["B2"] @ n["A2"]),
    "lokr": _lokr,
}

#: a function of (alpha, rank) that returns the scale, for variants whose scale is not alpha / rank
SCALES: dict[str, Callable[[float, int], float]] = {
    "rslora": lambda alpha, rank: alpha / math.sqrt(rank),
    "dora_rslora": lambda alpha, rank: alpha / math.sqrt(rank),
    "lora_ga": lambda alpha, rank: alpha / math.sqrt(rank),
    "vera": lambda alpha, rank: alpha,
}


def meaning(
    change: Change, alpha: float, rank: int, numbers: Mapping[str, Tensor], weight: Tensor
) -> Tensor:
    """``gain ⊙ (W + ΔW)`` in the shape of ``weight``, with a graph to the adapter parameters
    ``numbers``. Only the layout of the weight comes from Veneer's layer."""
    variant, W = change.variant.name, change.layer.unfold(weight, change.dims)
    numbers = dict(numbers)
    input_mask = torch.ones(change.dims.in_, dtype=W.dtype)
    if change.frozen_input is not None:  # the change ignores this input
        input_mask[change.frozen_input] = 0
        if "A" in numbers:
            numbers["A"] = numbers["A"] * input_mask
        if "A0" in numbers:
            numbers["A0"] = numbers["A0"] * input_mask
    changed = MEANINGS[variant](
        numbers, SCALES.get(variant, lambda alpha, rank: alpha / rank)(alpha, rank), W
    )
    if "A" not in numbers:
        changed = W + (changed - W) * input_mask
    return change.layer.fold(changed, weight.shape)
