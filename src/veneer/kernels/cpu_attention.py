"""Attention on a CPU, for the cases in which torch's fused kernel is slow: short prompts in 16
bits, and causal masks.

    scores [b · kv, g · s, k] = bias + (scale · query) keyᵀ
    probabilities = softmax(scores),    output = probabilities value
    b: batch   h: query heads   kv: key-value heads   g = h / kv: query heads of each kv head
    s: query tokens   k: key tokens   d: size of a query or key   e: size of a value

A key-value head is multiplied with its g query heads in one product. With a causal mask and no bias
(``causal``), a few tokens and heads are computed at a time, with the keys up to the last of these
tokens. Masked scores are thus not computed, and the scores at hand stay in the CPU's cache. No
scores are saved, because backward recomputes them (Dao et al. 2022, arXiv:2205.14135). In 16 bits,
scores are rounded before the softmax, as in the "eager" attention of transformers.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from veneer.kernels import has_amx, is_eager

_C: Any = torch._C
_softmax_backward: Any = torch._softmax_backward_data  # pyright: ignore[reportPrivateImportUsage]

#: the most torch threads with which ``causal`` is faster in float32 than torch's kernel
CAUSAL_MAX_THREADS = 3
#: the most keys for which ``products`` is faster in 16 bits
PRODUCTS_MAX_KEYS = 288
#: the fewest keys for which ``causal`` is faster, and the most, by the bytes of a number
CAUSAL_MIN_KEYS, CAUSAL_MAX_KEYS = 128, {2: 4096, 4: 2048}
#: query tokens that ``causal`` computes at a time: in float32 if a key-value head has several query
#: heads, and otherwise
CAUSAL_ROWS = (32, 64)
#: scores that ``causal`` computes at a time for each torch thread
SCORES_PER_THREAD = 1 << 19
#: the fewest keys for which torch's 16-bit softmax is vectorised, and so faster than in float32
VECTOR_MIN_KEYS = 32
#: query tokens that ``products`` computes at a time under a causal mask
PRODUCTS_ROWS = 128


def is_faster(query: Tensor, key: Tensor, causal: bool) -> bool:
    """Whether ``causal`` or ``products`` is faster than torch's kernel. ``causal``: the mask is
    causal, and there is no other mask."""
    length, number_bytes = key.shape[2], query.element_size()
    if query.device.type != "cpu" or number_bytes not in CAUSAL_MAX_KEYS:
        return False
    if not 1 < query.shape[2] == length:
        return False
    # first, because torch.compile supports neither thread counts nor processor features
    can_customise = _can_customise(query, key)
    if number_bytes == 4:  # many torch threads would leave each thread few scores
        is_supported = causal and can_customise and query.dtype is torch.float32
        return (
            is_supported
            and CAUSAL_MIN_KEYS <= length <= CAUSAL_MAX_KEYS[number_bytes]
            and torch.get_num_threads() <= CAUSAL_MAX_THREADS
        )
    needs_backward = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad)
    return length <= (
        CAUSAL_MAX_KEYS[number_bytes]
        if causal and not (needs_backward and (not can_customise or has_amx()))
        else PRODUCTS_MAX_KEYS
    )


def _can_customise(*tensors: Tensor) -> bool:
    """Whether custom autograd functions may be called: on plain tensors, and not under
    ``torch.compile``, ``torch.func``, forward-mode AD or autocast."""
    if not is_eager() or _C._is_any_autocast_enabled():
        return False
    return all(type(tensor) in (Tensor, torch.nn.Parameter) for tensor in tensors)


def causal(query: Tensor, key: Tensor, value: Tensor, scale: float | None = None) -> Tensor:
    """softmax(scale · query keyᵀ) value with a causal mask.

    Args:
        query, key, value: [b, h, s, d], [b, kv, s, d] and [b, kv, s, e] of one dtype, with h a
            multiple of kv.
        scale: 1 / √d if None.

    Returns:
        [b, h, s, e], differentiable. Scores are saved for backward if s is below
        ``CAUSAL_MIN_KEYS``, and for a gradient of a gradient.
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    if query.shape[2] < CAUSAL_MIN_KEYS or not _can_customise(query, key, value):
        return products(query, key, value, None, scale, causal=True)
    return _Causal.apply(query, key, value, scale).transpose(1, 2)  # pyright: ignore[reportAttributeAccessIssue]


class _Causal(torch.autograd.Function):
    """``causal`` with its output as [b, s, h, e]."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(query, key, value)
        ctx.scale = scale
        b, h, s, _ = query.shape
        output = query.new_empty(b, s, h, value.shape[-1])
        heads = _by_head(output.transpose(1, 2), key)
        for block, passes in _chunks(query, key, value, scale, 2):
            for output_rows, (_, _, values, _, probabilities) in zip(
                heads[block].split(_rows_at_once(heads), 3), passes, strict=True
            ):
                output_rows.copy_((probabilities @ values).view(output_rows.shape))
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        (query, key, value), needs = ctx.saved_tensors, ctx.needs_input_grad[:3]
        needs_graph = torch.is_grad_enabled()
        is_transformed = (
            _C._functorch.is_legacy_batchedtensor(gradient)
            or _C._functorch.peek_interpreter_stack() is not None
        )
        with torch.autocast(gradient.device.type, enabled=False):
            if not needs_graph and not is_transformed:
                return *_gradients(query, key, value, gradient.transpose(1, 2), ctx.scale), None
            with torch.enable_grad():
                inputs = [
                    tensor.view_as(tensor) if needs_graph else tensor.detach().requires_grad_()
                    for tensor in (query, key, value)
                ]
                output = products(
                    inputs[0], inputs[1], inputs[2], None, ctx.scale, causal=True
                ).transpose(1, 2)
            differentiated = [tensor for tensor, need in zip(inputs, needs, strict=True) if need]
            gradients = iter(
                torch.autograd.grad(output, differentiated, gradient, create_graph=needs_graph)
            )
            return *(next(gradients) if need else None for need in needs), None


def _gradients(
    query: Tensor, key: Tensor, value: Tensor, gradient: Tensor, scale: float
) -> tuple[Tensor, ...]:
    """The gradients of query, key and value, from the gradient of the output [b, h, s, e]."""
    b, h, s, d = query.shape
    query_gradient = query.new_empty(b, s, h, d).transpose(1, 2)
    # the sums over all query tokens must be rounded to 16 bits only once
    sum_dtype = torch.promote_types(query.dtype, torch.float32)
    key_gradient, value_gradient = (
        torch.zeros(tensor.shape, dtype=sum_dtype, device=tensor.device) for tensor in (key, value)
    )
    output_heads, query_heads = _by_head(gradient, key), _by_head(query_gradient, key)
    for block, passes in _chunks(query, key, value, scale, 3):
        output_blocks, query_blocks = (
            tensor[block].split(_rows_at_once(query_heads), 3)
            for tensor in (output_heads, query_heads)
        )
        totals = [tensor[block].flatten(0, 1) for tensor in (key_gradient, value_gradient)]
        for d_output, d_query, (rows, keys, values, scores, probabilities, d_scores) in zip(
            output_blocks, query_blocks, passes, strict=True
        ):
            d_output = d_output.reshape(len(rows), rows.shape[1], -1)
            torch.bmm(d_output, values.mT, out=scores)
            _softmax_backward(scores, probabilities, -1, scores.dtype, grad_input=d_scores)
            for total, weights, factors in zip(
                totals, (d_scores, probabilities), (rows, d_output), strict=True
            ):
                target = total[:, : keys.shape[1]]
                (
                    target.baddbmm_(weights.mT, factors)
                    if sum_dtype is weights.dtype
                    else target.add_(weights.mT @ factors)
                )
            torch.mul((d_scores @ keys).view(d_query.shape), scale, out=d_query)
    return query_gradient, key_gradient.to(key.dtype), value_gradient.to(value.dtype)


def _rows_at_once(heads: Tensor) -> int:
    """How many query tokens to compute at a time, for heads [b, kv, g, s, d]."""
    return CAUSAL_ROWS[heads.shape[2] == 1 or heads.element_size() == 2]


def _chunks(
    query: Tensor, key: Tensor, value: Tensor, scale: float, buffer_count: int
) -> Iterator[tuple[tuple[slice, slice], Iterator[Any]]]:
    """Iterate over chunks of a few heads. Yields the indices of the heads in [b, kv, …], and the
    iterator ``_passes`` over their tokens. Each pass has ``buffer_count`` buffers."""
    heads, key, value = _by_head(query, key), key.contiguous(), value.contiguous()
    b, kv, group, s, _ = heads.shape
    heads_a_chunk = max(
        SCORES_PER_THREAD * torch.get_num_threads() // (group * _rows_at_once(heads) * s), 1
    )
    batch_size, head_count = (
        (heads_a_chunk // kv, kv) if heads_a_chunk >= kv else (1, heads_a_chunk)
    )
    buffers: list[tuple[Tensor, ...]] = []
    for first_batch, first_head in itertools.product(
        range(0, b, batch_size), range(0, kv, head_count)
    ):
        block = (
            slice(first_batch, first_batch + batch_size),
            slice(first_head, first_head + head_count),
        )
        chunk = heads[block]
        if not buffers or buffers[0][0].shape[:2] != chunk.shape[:2]:
            buffers = _buffers(chunk, buffer_count)
        yield (
            block,
            _passes(chunk, key[block].flatten(0, 1), value[block].flatten(0, 1), scale, buffers),
        )


def _passes(
    heads: Tensor, keys: Tensor, values: Tensor, scale: float, buffers: list
) -> Iterator[tuple[Tensor, ...]]:
    """Iterate over passes of a few query tokens, for heads [·, ·, g, s, d] (n key-value heads) with
    keys [n, s, d] and values [n, s, e].

    Yields:
        rows: [n, g · r, d], the queries of r tokens, times ``scale``.
        keys, values: [n, k, d] and [n, k, e], up to the last of these tokens.
        buffers: tensors [n, g · r, k], which later passes overwrite. The first holds the scores,
            the second the probabilities.
    """
    lowest_score = torch.finfo(heads.dtype).min
    size = _rows_at_once(heads)
    is_masked = torch.ones(size, size, dtype=torch.bool, device=heads.device).triu_(1)
    for query_rows, (scaled_rows, rows, diagonal, scores, probabilities, *more_buffers) in zip(
        heads.split(size, 3), buffers, strict=True
    ):
        torch.mul(query_rows, scale, out=scaled_rows)
        visible_keys = keys[:, : scores.shape[2]]
        torch.bmm(rows, visible_keys.mT, out=scores)
        diagonal.masked_fill_(is_masked[: query_rows.shape[3], : query_rows.shape[3]], lowest_score)
        torch.softmax(scores, -1, out=probabilities)
        yield rows, visible_keys, values[:, : scores.shape[2]], scores, probabilities, *more_buffers


def _buffers(heads: Tensor, count: int) -> list[tuple[Tensor, ...]]:
    """Buffers for each pass over heads [b, kv, g, s, d], which are reused for all chunks: rows of r
    tokens as [b, kv, g, r, d] and as [n, g · r, d], with n = b · kv; the scores [n, g, r, r] of
    these tokens with each other, of which some are masked; and ``count`` buffers [n, g · r, k]. The
    masked scores are a view of the first of these."""
    *batch_and_heads, group, s, d = heads.shape
    n, size = batch_and_heads[0] * batch_and_heads[1], min(_rows_at_once(heads), s)
    rows_memory = heads.new_empty(n * group * size * d)
    scores_memory = heads.new_empty(count, n * group * size * s)
    buffers = []
    for start in range(0, s, size):
        end = min(start + size, s)
        row_count = group * (end - start)
        rows = rows_memory[: n * row_count * d].view(n, row_count, d)
        grouped_rows = rows.view(*batch_and_heads, group, end - start, d)
        scores = [memory[: n * row_count * end].view(n, row_count, end) for memory in scores_memory]
        diagonal = scores[0].view(n, group, end - start, end)[..., start:]
        buffers.append((grouped_rows, rows, diagonal, *scores))
    return buffers


def _by_head(x: Tensor, key: Tensor) -> Tensor:
    """Reshape x [b, h, s, ·] to [b, kv, g, s, ·], where key has kv heads."""
    return x.unflatten(1, (key.shape[1], -1))


def products(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    scale: float | None = None,
    dropout: float = 0.0,
    *,
    causal: bool = False,
) -> Tensor:
    """softmax(scale · query keyᵀ + bias) value.

    Args:
        query, key, value: [b, h, s, d], [b, kv, k, d] and [b, kv, k, e], with h a multiple of kv.
        bias: [1 or b, 1, s, k] of the dtype of query, or None.
        scale: 1 / √d if None.
        dropout: the probability with which each softmax probability is dropped.
        causal: whether a causal mask applies; then s = k, and ``bias`` is ignored.

    Returns:
        [b, h, s, e].
    """
    b, h, s, d = query.shape
    heads, length = key.shape[1], key.shape[2]
    group = h // heads
    grouped = (query * (d**-0.5 if scale is None else scale)).reshape(b * heads, group, s, d)
    keys, values = key.reshape(b * heads, length, d).mT, value.reshape(b * heads, length, -1)
    if not causal:
        rows = grouped.flatten(1, 2)
        if bias is None:
            scores = rows @ keys
        else:
            group_bias = bias.repeat(1, 1, group, 1)  # repeated for the heads of a group
            group_bias = (
                group_bias.expand(b, heads, -1, -1).flatten(0, 1)
                if len(bias) > 1
                else group_bias[0]
            )
            scores = torch.baddbmm(group_bias, rows, keys)
        return _weight_values(scores, values, dropout).view(b, h, s, -1)
    mask_bias = torch.full(
        (PRODUCTS_ROWS, PRODUCTS_ROWS),
        torch.finfo(query.dtype).min,
        dtype=query.dtype,
        device=query.device,
    ).triu_(1)
    outputs = []
    for start in range(0, s, PRODUCTS_ROWS):
        end = min(start + PRODUCTS_ROWS, s)
        scores = grouped[:, :, start:end].flatten(1, 2) @ keys[..., :end]
        scores[..., start:] += mask_bias[: end - start, : end - start].repeat(group, 1)
        output = _weight_values(scores, values[:, :end], dropout)
        outputs.append(output.view(b, heads, group, end - start, -1))
    return (outputs[0] if len(outputs) == 1 else torch.cat(outputs, 3)).reshape(b, h, s, -1)


def _weight_values(scores: Tensor, values: Tensor, dropout: float) -> Tensor:
    """The values, weighted by the softmax of their scores."""
    if scores.element_size() == 2 and scores.shape[-1] < VECTOR_MIN_KEYS:
        probabilities = torch.softmax(scores, dim=-1, dtype=torch.float32).to(scores.dtype)
    else:
        probabilities = torch.softmax(scores, dim=-1)
    return (F.dropout(probabilities, dropout) if dropout else probabilities) @ values


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
    if query.device.type != "cpu" or not _can_customise(query, key):
        return False
    if mask.shape != (1, 1, length, length):
        return False
    return (
        query.shape[0] == 1
        and key.shape[2] == length
        and 2 * (len(starts) - 1) * longest**2 <= length**2
    )


class Packed:
    """n sequences that are packed in one row. Sequence i consists of tokens ``starts[i]`` to
    ``starts[i + 1]``, at most ``longest`` of them.

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
