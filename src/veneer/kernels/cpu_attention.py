"""Attention on a CPU as plain matrix products, for the case in which torch's fused kernel is slow:
training on short sequences in bfloat16.

    scores [b · kv, g · s, k] = bias + (scale · query) keyᵀ
    probabilities = softmax(scores),    output = probabilities value
    b: batch   h: query heads   kv: key-value heads   g = h / kv: query heads of each kv head
    s: query tokens   k: key tokens   d: size of a query or key   e: size of a value

A key-value head is multiplied with its g query heads in one product. The probabilities are saved
for backward, which takes memory in proportion to s · k, so this form is for short sequences only.
Scores are rounded to the query's dtype before the softmax, as in the "eager" attention of
transformers.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from veneer.kernels import is_eager

_C: Any = torch._C

#: whether the CPU has AVX-512 instructions for bfloat16 products. Without them,
#: ``attend_by_products`` is slower than torch's attention kernel
HAS_BF16_PRODUCTS: bool = torch.cpu._is_avx512_bf16_supported()  # pyright: ignore[reportPrivateUsage]
#: the most key tokens for which ``attend_by_products`` is used: up to this number, it is faster
#: than torch's kernel, and the probabilities that it saves for backward are small
MAX_KEYS = 128
#: the fewest key tokens for which torch's 16-bit softmax is vectorised, and so faster than
#: float32's
VECTOR_MIN_KEYS = 32


def is_faster(query: Tensor, key: Tensor) -> bool:
    """Whether ``attend_by_products`` is faster than torch's attention kernel for query [b, h, s, d]
    and key [b, kv, k, d]. It is faster in training on at most ``MAX_KEYS`` tokens in bfloat16,
    because the backward of torch's kernel is slow in bfloat16."""
    return (
        HAS_BF16_PRODUCTS
        and query.device.type == "cpu"
        and query.dtype is torch.bfloat16
        and 1 < query.shape[2] == key.shape[2] <= MAX_KEYS
        and torch.is_grad_enabled()
        and (query.requires_grad or key.requires_grad)
    )


def attend_by_products(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    scale: float | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Attention, softmax(scale · query keyᵀ + bias) value, as plain matrix products.

    Args:
        query, key, value: [b, h, s, d], [b, kv, k, d] and [b, kv, k, e] for b sequences, h query
            heads (a multiple of the kv key-value heads), s query tokens and k key tokens.
        bias: [1 or b, 1, s, k] of the dtype of query, or None.
        scale: the factor of the scores; 1 / √d if None.
        dropout: the probability with which each softmax probability is dropped.

    Returns:
        [b, h, s, e].
    """
    b, h, s, d = query.shape
    kv_heads, key_count = key.shape[1], key.shape[2]
    heads_per_kv_head = h // kv_heads
    query_rows = (query * (d**-0.5 if scale is None else scale)).reshape(
        b * kv_heads, heads_per_kv_head * s, d
    )
    keys, values = (
        key.reshape(b * kv_heads, key_count, d).mT,
        value.reshape(b * kv_heads, key_count, -1),
    )
    if bias is None:
        scores = query_rows @ keys
    else:
        # once for each query head of a kv head
        group_bias = bias.repeat(1, 1, heads_per_kv_head, 1)
        group_bias = (
            group_bias.expand(b, kv_heads, -1, -1).flatten(0, 1) if len(bias) > 1 else group_bias[0]
        )
        scores = torch.baddbmm(group_bias, query_rows, keys)
    if scores.element_size() == 2 and key_count < VECTOR_MIN_KEYS:
        probabilities = torch.softmax(scores, dim=-1, dtype=torch.float32).to(scores.dtype)
    else:
        probabilities = torch.softmax(scores, dim=-1)
    probabilities = F.dropout(probabilities, dropout) if dropout else probabilities
    return (probabilities @ values).view(b, h, s, -1)


def bias_of(mask: Tensor | None, is_causal: bool, query: Tensor, key: Tensor) -> Tensor | None:
    """The bias [1 or b, 1, s, k] to add to the attention scores, in the dtype of ``query``. It is 0
    where ``mask`` [1 or b, 1, s, k] is True and the lowest finite number where it is False; a mask
    that is not boolean is itself the bias. If ``mask`` is None, a causal mask is used if
    ``is_causal`` is true; else the result is None."""
    if mask is None:
        if not is_causal:
            return None
        mask = torch.ones(
            query.shape[2], key.shape[2], dtype=torch.bool, device=query.device
        ).tril()[None, None]
    if mask.dtype != torch.bool:
        return mask.to(query.dtype)
    # With -inf, the softmax of a token that may attend to nothing, such as padding, would be NaN.
    lowest = torch.finfo(query.dtype).min
    return torch.zeros(mask.shape, dtype=query.dtype, device=mask.device).masked_fill_(
        ~mask, lowest
    )


def is_packed(query: Tensor, key: Tensor, mask: Any, sequence_starts: Any, max_length: Any) -> bool:
    """Whether ``query`` [1, h, s, d] and ``key`` pack several sequences into one row, which are
    cheaper to compute as a batch (``Packed``): the batch, in which each sequence is padded to the
    longest, has at most half as many attention scores as the row.

    Args:
        mask: the attention mask; anything but a boolean tensor [1, 1, s, s] gives False.
        sequence_starts: the index of the first token of each sequence, then the number of all
            tokens; or None.
        max_length: the number of tokens of the longest sequence, or None.
    """
    if (
        not isinstance(sequence_starts, Tensor)
        or max_length is None
        or not isinstance(mask, Tensor)
        or mask.dtype != torch.bool
    ):
        return False
    token_count = query.shape[2]
    return (
        query.device.type == "cpu"
        and type(query) is type(key) is Tensor
        and not _C._is_any_autocast_enabled()
        and is_eager()
        and mask.shape == (1, 1, token_count, token_count)
        and query.shape[0] == 1
        and key.shape[2] == token_count
        and 2 * (len(sequence_starts) - 1) * max_length**2 <= token_count**2
    )


class Packed:
    """n sequences that are packed into one row of s tokens. Sequence i consists of the tokens
    ``sequence_starts[i]`` … ``sequence_starts[i + 1]`` - 1. The longest sequence has ``max_length``
    tokens.

    ``unpack`` turns a packed [1, h, s, d] into a batch [n, h, max_length, d], in which each
    sequence is padded on the right with copies of its last token. ``pack`` turns a batch
    [n, max_length, h, d] of attention outputs, whose heads are the third axis, into a packed
    [1, s, h, d] without the padding.
    """

    def __init__(self, sequence_starts: Tensor, max_length: int) -> None:
        first_tokens, sequence_lengths = (
            sequence_starts[:-1, None].long(),
            sequence_starts.diff()[:, None],
        )
        column = torch.arange(max_length)
        self.is_token = column < sequence_lengths  # [n, max_length]
        self.positions = first_tokens + torch.minimum(column, sequence_lengths - 1)
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
        """The attention mask of each sequence in the batch, [n, 1, max_length, max_length]: its
        block of the boolean ``mask`` [1, 1, s, s] of the packed row, False for keys that are
        padding."""
        return (
            mask[0, 0, self.positions[:, :, None], self.positions[:, None, :]]
            & self.is_token[:, None]
        )[:, None]
