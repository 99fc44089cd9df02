"""Attention on a CPU as plain matrix products, for the case in which torch's fused kernel is slow:
training on short rows in bfloat16.

    scores [b · kv, g · s, k] = bias + (scale · query) keyᵀ
    probabilities = softmax(scores),    output = probabilities value
    b: batch   h: query heads   kv: key-value heads   g = h / kv: query heads of each kv head
    s: query tokens   k: key tokens   d: size of a query or key   e: size of a value

A key-value head is multiplied with its g query heads in one product. The probabilities are saved
for backward, so this is only for short rows. Scores are rounded before the softmax, as in the
"eager" attention of transformers.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from veneer.kernels import is_eager

_C: Any = torch._C

#: whether the CPU has instructions for products of bfloat16. Without them, products of 16 bits are
#: slower than torch's attention kernel
HAS_BF16_PRODUCTS: bool = torch.cpu._is_avx512_bf16_supported()  # pyright: ignore[reportPrivateUsage]
#: the most keys for which ``products`` is faster than torch's kernel and the probabilities that it
#: saves for backward are small
MAX_KEYS = 128
#: the fewest keys for which torch's 16-bit softmax is vectorised, and so faster than in float32
VECTOR_MIN_KEYS = 32


def is_faster(query: Tensor, key: Tensor) -> bool:
    """Whether ``products`` is faster than torch's kernel. It is in training on short rows in
    bfloat16, because the backward of torch's kernel is slow in bfloat16."""
    return (
        HAS_BF16_PRODUCTS
        and query.device.type == "cpu"
        and query.dtype is torch.bfloat16
        and 1 < query.shape[2] == key.shape[2] <= MAX_KEYS
        and torch.is_grad_enabled()
        and (query.requires_grad or key.requires_grad)
    )


def products(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    scale: float | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """softmax(scale · query keyᵀ + bias) value.

    Args:
        query, key, value: [b, h, s, d], [b, kv, k, d] and [b, kv, k, e], with h a multiple of kv.
        bias: [1 or b, 1, s, k] of the dtype of query, or None.
        scale: 1 / √d if None.
        dropout: the probability with which each softmax probability is dropped.

    Returns:
        [b, h, s, e].
    """
    b, h, s, d = query.shape
    heads, length = key.shape[1], key.shape[2]
    group = h // heads
    rows = (query * (d**-0.5 if scale is None else scale)).reshape(b * heads, group * s, d)
    keys, values = key.reshape(b * heads, length, d).mT, value.reshape(b * heads, length, -1)
    if bias is None:
        scores = rows @ keys
    else:
        group_bias = bias.repeat(1, 1, group, 1)  # repeated for the heads of a group
        group_bias = (
            group_bias.expand(b, heads, -1, -1).flatten(0, 1) if len(bias) > 1 else group_bias[0]
        )
        scores = torch.baddbmm(group_bias, rows, keys)
    if scores.element_size() == 2 and length < VECTOR_MIN_KEYS:
        probabilities = torch.softmax(scores, dim=-1, dtype=torch.float32).to(scores.dtype)
    else:
        probabilities = torch.softmax(scores, dim=-1)
    probabilities = F.dropout(probabilities, dropout) if dropout else probabilities
    return (probabilities @ values).view(b, h, s, -1)


def bias_of(mask: Tensor | None, causal: bool, query: Tensor, key: Tensor) -> Tensor | None:
    """The bias to add to the scores, or None. ``mask`` [1 or b, 1, s, k] is boolean (True: attend)
    or a bias already. If it is None and ``causal``, a causal mask is used."""
    if mask is None:
        if not causal:
            return None
        mask = torch.ones(
            query.shape[2], key.shape[2], dtype=torch.bool, device=query.device
        ).tril()[None, None]
    if mask.dtype != torch.bool:
        return mask.to(query.dtype)
    # not -inf, so that a fully masked token, such as padding, does not become NaN
    lowest = torch.finfo(query.dtype).min
    return torch.zeros(mask.shape, dtype=query.dtype, device=mask.device).masked_fill_(
        ~mask, lowest
    )


def is_packed(query: Tensor, key: Tensor, mask: Any, starts: Any, longest: Any) -> bool:
    """Whether a call [1, h, s, d] packs several sequences that are better computed separately: if
    padding each sequence to the longest leaves at most half as many scores.

    ``starts``: the first token of each sequence, and the number of all tokens; ``longest``: the
    tokens of the longest sequence."""
    if (
        not isinstance(starts, Tensor)
        or longest is None
        or not isinstance(mask, Tensor)
        or mask.dtype != torch.bool
    ):
        return False
    length = query.shape[2]
    return (
        query.device.type == "cpu"
        and type(query) is type(key) is Tensor
        and not _C._is_any_autocast_enabled()
        and is_eager()
        and mask.shape == (1, 1, length, length)
        and query.shape[0] == 1
        and key.shape[2] == length
        and 2 * (len(starts) - 1) * longest**2 <= length**2
    )


class Packed:
    """n sequences that are packed in one row. Sequence i consists of the tokens ``starts[i]`` …
    ``starts[i + 1]`` - 1. The longest sequence has ``longest`` tokens.

    ``unpack`` turns [1, h, s, d] into [n, h, longest, d]: each sequence is padded on the right with
    its last token. ``pack`` turns [n, longest, h, d] into [1, s, h, d].
    """

    def __init__(self, starts: Tensor, longest: int) -> None:
        first_tokens, lengths = starts[:-1, None].long(), starts.diff()[:, None]
        column = torch.arange(longest)
        self.is_token = column < lengths  # [n, longest]
        self.positions = first_tokens + torch.minimum(column, lengths - 1)
        self.token_indices = self.is_token.flatten().nonzero()[:, 0]

    def unpack(self, x: Tensor) -> Tensor:
        return (
            x.transpose(1, 2)[0]
            .index_select(0, self.positions.flatten())
            .unflatten(0, self.positions.shape)
            .transpose(1, 2)
        )

    def pack(self, x: Tensor) -> Tensor:
        return x.flatten(0, 1).index_select(0, self.token_indices)[None]

    def row_masks(self, mask: Any) -> Tensor:
        """The block of a mask [1, 1, s, s] for each sequence, [n, 1, longest, longest]."""
        return (
            mask[0, 0, self.positions[:, :, None], self.positions[:, None, :]]
            & self.is_token[:, None]
        )[:, None]
