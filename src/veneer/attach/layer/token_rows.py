"""Rows of an embedding, or of a head, that are trained in full: the tokens of
``LoraConfig(trainable_tokens=…)``.

    W'[id] = R[id]              for each of n trained tokens, whatever else the adapter changes
    ΔW     = (R − W[ids]) at these rows: a product with the one-hot rows of the tokens, of rank n

R starts as W[ids]. The adapter stores R and not the difference: if the vocabulary is grown again,
the new rows of W are random, and a token must mean the same with them. As ΔW is a low-rank product,
every path of a layer, a merge, a blend and a tied head handle it without code of their own, and no
gradient of the embedding's size is formed. It costs n · V numbers per call. Rejected: a copy of W
with replaced rows in every call (PEFT's index_copy), which autograd saves in full and for which it
forms a dense gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from veneer.layers import Layer
from veneer.lowrank import LowRank
from veneer.precision import at_least_float32

#: the name of R among the parameters of a ``Change``
ROWS = "token_rows"


def start(dense: Tensor, ids: Tensor) -> Tensor:
    """The initial R: the base's rows [n, d] of a weight [V, d]."""
    return dense.detach().index_select(0, ids.to(dense.device))


def with_rows(
    low: LowRank | None, gain: Tensor | None, rows: Tensor, ids: Tensor, dense: Tensor, layer: Layer
) -> tuple[LowRank, Tensor | None]:
    """(ΔW, gain) of a weight ``dense`` [V, d] whose rows ``ids`` become ``rows`` [n, d]; ``low``
    and ``gain`` change all other rows."""
    dtype = at_least_float32(rows.dtype)
    rows, count = rows.to(dtype), len(dense)
    if gain is not None and layer.out_axis == 1:
        rows = rows / gain.to(dtype)  # which multiplies every row again
    elif gain is not None:
        gain = gain.index_fill(0, ids, 1)
    difference = rows - dense.index_select(0, ids).to(dtype)
    one_hot = difference.new_zeros(len(ids), count).scatter_(1, ids[:, None], 1)
    A, B = (one_hot, difference.mT) if layer.out_axis == 1 else (difference, one_hot.mT)
    if low is None:
        return LowRank(A[None], B[None], 1.0), gain
    if layer.out_axis == 1:
        low = LowRank(low.A.index_fill(2, ids, 0), low.B, low.scale)
    else:
        low = LowRank(low.A, low.B.index_fill(1, ids, 0), low.scale)
    return (
        LowRank(torch.cat([low.A, A[None]], 1), torch.cat([low.B * low.scale, B[None]], 2), 1.0),
        gain,
    )
