"""Rows of an embedding, or of a head, that are trained in full: the tokens of
``LoraConfig(trainable_tokens=…)``.

    W'[ids] = R                   for the n trained tokens, whatever else the adapter changes
    ΔW[ids] = R − W[ids]          a product of the one-hot rows of the tokens and R − W[ids], rank n

    W: [V, d], V tokens in the vocabulary, d the width     R: [n, d]     ids: the trained tokens
    W': the weight with the adapter

R starts as W[ids]. The adapter stores R, not the difference: if the base is loaded and its
vocabulary grown again, the new rows of W have other random values, but a trained token must stay
the same. Because ΔW is a low-rank product, all ways to compute a layer, merges, blends and tied
heads support it without extra code, and no gradient of the embedding's size is formed. Each call
forms a tensor of n · V elements. Rejected: a copy of W with replaced rows in every call (PEFT's
index_copy). Autograd would save the full copy, and form a dense gradient for it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from veneer.layers import Layer
from veneer.lowrank import LowRank
from veneer.precision import at_least_float32

#: the name of the trained token rows R among the parameters of a ``Change``
TOKEN_ROWS = "token_rows"


def initial_rows(dense: Tensor, ids: Tensor) -> Tensor:
    """The initial values of the trained token rows, [n, d]: the rows ``ids`` of the base's weight
    ``dense``, [V, d]."""
    return dense.detach().index_select(0, ids.to(dense.device))


def with_token_rows(
    low_rank: LowRank | None,
    gain: Tensor | None,
    token_rows: Tensor,
    ids: Tensor,
    dense: Tensor,
    layer: Layer,
) -> tuple[LowRank, Tensor | None]:
    """(ΔW, gain), so that gain ⊙ (W + ΔW) has the rows ``token_rows`` [n, d] at ``ids`` and is the
    result of ``low_rank`` and ``gain`` elsewhere. W is ``dense``, [V, d]. ``layer`` is the kind of
    the layer, whose ``out_axis`` is 1 for an embedding and 0 for a head."""
    dtype = at_least_float32(token_rows.dtype)
    rows, vocabulary_size = token_rows.to(dtype), len(dense)
    if gain is not None and layer.out_axis == 1:
        rows = rows / gain.to(dtype)  # because the gain multiplies every row
    elif gain is not None:
        gain = gain.index_fill(0, ids, 1)
    row_difference = rows - dense.index_select(0, ids).to(dtype)
    one_hot = row_difference.new_zeros(len(ids), vocabulary_size).scatter_(1, ids[:, None], 1)
    A, B = (one_hot, row_difference.mT) if layer.out_axis == 1 else (row_difference, one_hot.mT)
    if low_rank is None:
        return LowRank(A[None], B[None], 1.0), gain
    if layer.out_axis == 1:
        low_rank = LowRank(low_rank.A.index_fill(2, ids, 0), low_rank.B, low_rank.scale)
    else:
        low_rank = LowRank(low_rank.A, low_rank.B.index_fill(1, ids, 0), low_rank.scale)
    return (
        LowRank(
            torch.cat([low_rank.A, A[None]], 1),
            torch.cat([low_rank.B * low_rank.scale, B[None]], 2),
            1.0,
        ),
        gain,
    )
