"""Attention as plain matrix products: in 16 bits on a CPU, where torch's fused kernel is slow on short rows.

    scores [b · kv, g · s, k] = bias + (scale · query) keyᵀ,    chances = softmax(scores),    output = chances value

A key-value head serves the g query heads of its group in one product. Under a causal mask alone, rows are taken
``PIECE`` at a time with the keys up to their last: scores that nobody sees are neither computed nor kept. The numbers
differ from those of the fused kernel as those of transformers' "eager" do: scores are rounded to 16 bits before the
softmax.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

#: Keys up to which the products are the faster way in bfloat16, measured on cores with and without matrix units; and
#: where nothing is kept for backward and the mask is causal.
LONGEST, LONGEST_PIECES = 288, 4096
#: Rows that see the same keys, under a causal mask.
PIECE = 128


def pays(query: Tensor, key: Tensor, causal: bool) -> bool:
    """Whether the products are the faster way for a call; ``causal`` as ``products`` has it."""
    length, kept = key.shape[2], torch.is_grad_enabled() and (query.requires_grad or key.requires_grad)
    longest = LONGEST_PIECES if causal and not kept else LONGEST
    return query.device.type == "cpu" and query.element_size() == 2 and 1 < query.shape[2] == length <= longest


def products(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scale: float | None = None, dropout: float = 0.0,
    *, causal: bool = False,
) -> Tensor:  # fmt: skip
    """softmax(scale · query keyᵀ + bias) value.

    Args:
        query, key, value: [b, h, s, d], [b, kv, k, d] and [b, kv, k, e], with h a multiple of kv.
        bias: [1 or b, 1, s, k] of the dtype of query, or None.
        scale: 1 / √d if None.
        dropout: of the chances.
        causal: row i sees no key behind the i-th; s = k, and there is no bias.

    Returns:
        [b, h, s, e].
    """
    b, h, s, d = query.shape
    heads, length = key.shape[1], key.shape[2]
    group = h // heads
    grouped = (query * (d**-0.5 if scale is None else scale)).reshape(b * heads, group, s, d)
    keys, values = key.reshape(b * heads, length, d).mT, value.reshape(b * heads, length, -1)
    if not causal:
        rows, tall = grouped.flatten(1, 2), _tall(bias, b, heads, group)
        scores = rows @ keys if tall is None else torch.baddbmm(tall, rows, keys)
        return _output(scores, values, dropout).view(b, h, s, -1)
    hidden = torch.full((PIECE, PIECE), torch.finfo(query.dtype).min, dtype=query.dtype, device=query.device).triu_(1)
    found = []
    for first in range(0, s, PIECE):
        after = min(first + PIECE, s)
        scores = grouped[:, :, first:after].flatten(1, 2) @ keys[..., :after]
        scores[..., first:] += hidden[: after - first, : after - first].repeat(group, 1)
        part = _output(scores, values[:, :after], dropout)
        found.append(part.view(b, heads, group, after - first, -1))
    return (found[0] if len(found) == 1 else torch.cat(found, 3)).reshape(b, h, s, -1)


def _output(scores: Tensor, values: Tensor, dropout: float) -> Tensor:
    chances = torch.softmax(scores, dim=-1)
    return (F.dropout(chances, dropout) if dropout else chances) @ values


def _tall(bias: Tensor | None, b: int, heads: int, group: int) -> Tensor | None:
    """A bias [1 or b, 1, s, k] for the heads of a group below each other: [1 or b · heads, group · s, k]."""
    if bias is None:
        return None
    tall = bias.repeat(1, 1, group, 1)
    return tall.expand(b, heads, -1, -1).flatten(0, 1) if len(bias) > 1 else tall[0]


def bias_of(mask: Tensor | None, causal: bool, query: Tensor, key: Tensor) -> Tensor | None:
    """What is added to the scores. ``mask`` [1 or b, 1, s, k] is boolean (True: seen) or a summand already; ``causal``
    counts where there is none."""
    if mask is None:
        if not causal:
            return None
        mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril()[None, None]
    if mask.dtype != torch.bool:
        return mask.to(query.dtype)
    # finite: a row that sees nothing, such as one of padding, stays a number
    lowest = torch.finfo(query.dtype).min
    return torch.zeros(mask.shape, dtype=query.dtype, device=mask.device).masked_fill_(~mask, lowest)
