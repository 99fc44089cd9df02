"""Attention on a CPU, for cases in which torch's fused kernel is slow: short rows in 16 bits, and
causal masks.

    scores [b · kv, g · s, k] = bias + (scale · query) keyᵀ
    probabilities = softmax(scores),    output = probabilities value

A key-value head is multiplied with the g query heads of its group in one product. Under a purely
causal mask (``causal``), a few rows and heads are computed at a time, with the keys up to the last
of these rows. Masked scores are thus not computed, and the others stay in the processor's cache;
none are saved, because backward recomputes them (Dao et al. 2022, arXiv:2205.14135). In 16 bits,
scores are rounded before the softmax, as in transformers' "eager".
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from veneer.kernels import eager as untransformed
from veneer.kernels import has_tiles

_C: Any = torch._C
_of_softmax: Any = torch._softmax_backward_data  # pyright: ignore[reportPrivateImportUsage]

#: The most torch threads for which computing float32 attention in pieces is faster than torch's
#: kernel.
THREADS = 3
#: The most keys for which the products are faster in 16 bits.
LONGEST = 288
#: The fewest and the most keys for which ``causal`` is faster; the most by the bytes of a value.
SHORTEST, LONGEST_PIECES = 128, {2: 4096, 4: 2048}
#: Rows of a query head at a time: in float32 if a key-value head serves several query heads, and
#: otherwise; and the number of scores for each of torch's threads.
PIECES, SCORES = (32, 64), 1 << 19
#: The fewest keys for which torch's 16-bit softmax is vectorised, and so the faster one.
VECTOR = 32
#: How many rows share the same keys if scores are saved.
PIECE = 128


def is_faster(query: Tensor, key: Tensor, causal: bool) -> bool:
    """Whether the products are faster for a call. ``causal``: the mask is causal, with no other
    mask."""
    length, size = key.shape[2], query.element_size()
    if query.device.type != "cpu" or size not in LONGEST_PIECES or not 1 < query.shape[2] == length:
        return False
    # first, because torch.compile supports neither thread counts nor processor features
    eager = _eager(query, key)
    if size == 4:  # chunks this small leave little to do for many torch threads
        supported = causal and eager and query.dtype is torch.float32
        return (
            supported
            and SHORTEST <= length <= LONGEST_PIECES[size]
            and torch.get_num_threads() <= THREADS
        )
    backward = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad)
    return length <= (
        LONGEST_PIECES[size]
        if causal and not (backward and (not eager or has_tiles()))
        else LONGEST
    )


def _eager(*tensors: Tensor) -> bool:
    """Whether custom functions may be called: on plain tensors, and not under ``torch.compile``,
    ``torch.func``, forward-mode AD or autocast."""
    if not untransformed() or _C._is_any_autocast_enabled():
        return False
    return all(type(tensor) in (Tensor, torch.nn.Parameter) for tensor in tensors)


def causal(query: Tensor, key: Tensor, value: Tensor, scale: float | None = None) -> Tensor:
    """softmax(scale · query keyᵀ) value with a causal mask: ``products`` without a bias.

    Args:
        query, key, value: [b, h, s, d], [b, kv, s, d] and [b, kv, s, e] of one dtype, with h a
            multiple of kv.
        scale: 1 / √d if None.

    Returns:
        [b, h, s, e], differentiable. Scores are saved for backward if there are few rows, and for
        the gradient of a gradient.
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    if query.shape[2] < SHORTEST or not _eager(query, key, value):
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
        for block, turns in _chunks(query, key, value, scale, 2):
            for rows_out, (_, _, values, _, chances) in zip(
                heads[block].split(_size(heads), 3), turns, strict=True
            ):
                rows_out.copy_((chances @ values).view(rows_out.shape))
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        (query, key, value), needs = ctx.saved_tensors, ctx.needs_input_grad[:3]
        graph = torch.is_grad_enabled()
        many = (
            _C._functorch.is_legacy_batchedtensor(gradient)
            or _C._functorch.peek_interpreter_stack() is not None
        )
        with torch.autocast(gradient.device.type, enabled=False):
            if not graph and not many:
                return *_gradients(query, key, value, gradient.transpose(1, 2), ctx.scale), None
            with torch.enable_grad():
                inputs = [
                    tensor.view_as(tensor) if graph else tensor.detach().requires_grad_()
                    for tensor in (query, key, value)
                ]
                output = products(
                    inputs[0], inputs[1], inputs[2], None, ctx.scale, causal=True
                ).transpose(1, 2)
            differentiated = [tensor for tensor, need in zip(inputs, needs, strict=True) if need]
            gradients = iter(
                torch.autograd.grad(output, differentiated, gradient, create_graph=graph)
            )
            return *(next(gradients) if need else None for need in needs), None


def _gradients(
    query: Tensor, key: Tensor, value: Tensor, gradient: Tensor, scale: float
) -> tuple[Tensor, ...]:
    """The gradients of query, key and value, from that of the output [b, h, s, e]."""
    b, h, s, d = query.shape
    of_query = query.new_empty(b, s, h, d).transpose(1, 2)
    # sums over pieces must be rounded to 16 bits only once
    wide = torch.promote_types(query.dtype, torch.float32)
    of_key, of_value = (
        torch.zeros(tensor.shape, dtype=wide, device=tensor.device) for tensor in (key, value)
    )
    output_heads, query_heads = _by_head(gradient, key), _by_head(of_query, key)
    for block, turns in _chunks(query, key, value, scale, 3):
        gradients, query_gradients = (
            tensor[block].split(_size(query_heads), 3) for tensor in (output_heads, query_heads)
        )
        totals = [tensor[block].flatten(0, 1) for tensor in (of_key, of_value)]
        for output_gradient, query_gradient, (rows, keys, values, scores, chances, onward) in zip(
            gradients, query_gradients, turns, strict=True
        ):
            output_gradient = output_gradient.reshape(len(rows), rows.shape[1], -1)
            torch.bmm(output_gradient, values.mT, out=scores)
            _of_softmax(scores, chances, -1, scores.dtype, grad_input=onward)
            for total, weights, factors in zip(
                totals, (onward, chances), (rows, output_gradient), strict=True
            ):
                target = total[:, : keys.shape[1]]
                (
                    target.baddbmm_(weights.mT, factors)
                    if wide is weights.dtype
                    else target.add_(weights.mT @ factors)
                )
            torch.mul((onward @ keys).view(query_gradient.shape), scale, out=query_gradient)
    return of_query, of_key.to(key.dtype), of_value.to(value.dtype)


def _size(heads: Tensor) -> int:
    """The number of rows of a query head to compute at a time, for heads [., ., g, s, d]."""
    return PIECES[heads.shape[2] == 1 or heads.element_size() == 2]


def _chunks(
    query: Tensor, key: Tensor, value: Tensor, scale: float, count: int
) -> Iterator[tuple[tuple[slice, slice], Iterator[Any]]]:
    """Iterate over a few heads at a time: yields their indices in [b, kv, ·], and the iterator of
    ``_turns`` for them."""
    heads, key, value = _by_head(query, key), key.contiguous(), value.contiguous()
    b, kv, group, s, _ = heads.shape
    # the number of heads at a time
    heads_a_chunk = max(SCORES * torch.get_num_threads() // (group * _size(heads) * s), 1)
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
            buffers = _buffers(chunk, count)
        yield (
            block,
            _turns(chunk, key[block].flatten(0, 1), value[block].flatten(0, 1), scale, buffers),
        )


def _turns(
    heads: Tensor, keys: Tensor, values: Tensor, scale: float, buffers: list
) -> Iterator[tuple[Tensor, ...]]:
    """Iterate over a few rows at a time, of heads [., ., g, s, d] with keys [n, s, d] and values
    [n, s, e].

    Yields:
        rows: [n, g · r, d], scaled.
        keys, values: [n, k, d] and [n, k, e], up to the last of these rows.
        places: buffers [n, g · r, k], reused in each turn; the second holds the probabilities.
    """
    lowest = torch.finfo(heads.dtype).min
    hidden = torch.ones(_size(heads), _size(heads), dtype=torch.bool, device=heads.device).triu_(1)
    for query_rows, (scaled_rows, rows, diagonal, scores, probabilities, *rest) in zip(
        heads.split(_size(heads), 3), buffers, strict=True
    ):
        torch.mul(query_rows, scale, out=scaled_rows)
        visible_keys = keys[:, : scores.shape[2]]
        torch.bmm(rows, visible_keys.mT, out=scores)
        diagonal.masked_fill_(hidden[: query_rows.shape[3], : query_rows.shape[3]], lowest)
        torch.softmax(scores, -1, out=probabilities)
        yield rows, visible_keys, values[:, : scores.shape[2]], scores, probabilities, *rest


def _buffers(heads_like: Tensor, count: int) -> list[tuple[Tensor, ...]]:
    """Reusable buffers for the turns of heads [., ., g, s, d]: rows as [., ., g, r, d] and [n, g ·
    r, d]; the partly masked scores [n, g, r, r]; and ``count`` buffers of [n, g · r, k], of which
    the first contains these scores."""
    *heads, group, s, d = heads_like.shape
    n, largest = heads[0] * heads[1], min(_size(heads_like), s)
    scaled, memory = (
        heads_like.new_empty(n * group * largest * d),
        heads_like.new_empty(count, n * group * largest * s),
    )
    buffers = []
    for first in range(0, s, largest):
        after = min(first + largest, s)
        row_count = group * (after - first)
        rows = scaled[: n * row_count * d].view(n, row_count, d)
        grouped_rows = rows.view(*heads, group, after - first, d)
        scores = [
            scores_memory[: n * row_count * after].view(n, row_count, after)
            for scores_memory in memory
        ]
        diagonal = scores[0].view(n, group, after - first, after)[..., first:]
        buffers.append((grouped_rows, rows, diagonal, *scores))
    return buffers


def _by_head(x: Tensor, key: Tensor) -> Tensor:
    """Reshape [b, h, s, ·] to [b, kv, g, s, ·]."""
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
        dropout: of the probabilities.
        causal: whether a causal mask applies; s = k then, and there is no bias.

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
        return _output(scores, values, dropout).view(b, h, s, -1)
    hidden = torch.full(
        (PIECE, PIECE), torch.finfo(query.dtype).min, dtype=query.dtype, device=query.device
    ).triu_(1)
    outputs = []
    for first in range(0, s, PIECE):
        after = min(first + PIECE, s)
        scores = grouped[:, :, first:after].flatten(1, 2) @ keys[..., :after]
        scores[..., first:] += hidden[: after - first, : after - first].repeat(group, 1)
        output = _output(scores, values[:, :after], dropout)
        outputs.append(output.view(b, heads, group, after - first, -1))
    return (outputs[0] if len(outputs) == 1 else torch.cat(outputs, 3)).reshape(b, h, s, -1)


def _output(scores: Tensor, values: Tensor, dropout: float) -> Tensor:
    if scores.element_size() == 2 and scores.shape[-1] < VECTOR:
        probabilities = torch.softmax(scores, dim=-1, dtype=torch.float32).to(scores.dtype)
    else:
        probabilities = torch.softmax(scores, dim=-1)
    return (F.dropout(probabilities, dropout) if dropout else probabilities) @ values


def bias_of(mask: Tensor | None, causal: bool, query: Tensor, key: Tensor) -> Tensor | None:
    """The bias of the scores. ``mask`` [1 or b, 1, s, k] is boolean (True: attended) or a bias
    already; ``causal`` is used if there is no mask."""
    if mask is None:
        if not causal:
            return None
        mask = torch.ones(
            query.shape[2], key.shape[2], dtype=torch.bool, device=query.device
        ).tril()[None, None]
    if mask.dtype != torch.bool:
        return mask.to(query.dtype)
    # finite, so that a fully masked row, such as a row of padding, does not become NaN
    lowest = torch.finfo(query.dtype).min
    return torch.zeros(mask.shape, dtype=query.dtype, device=mask.device).masked_fill_(
        ~mask, lowest
    )


def is_packed(query: Tensor, key: Tensor, mask: Any, starts: Any, longest: Any) -> bool:
    """Whether a call [1, h, s, d] packs several rows that are better computed separately: if
    padding each row to the longest leaves at most half as many scores."""
    if (
        not isinstance(starts, Tensor)
        or longest is None
        or not isinstance(mask, Tensor)
        or mask.dtype != torch.bool
    ):
        return False
    length = query.shape[2]
    if query.device.type != "cpu" or not _eager(query, key) or mask.shape != (1, 1, length, length):
        return False
    return (
        query.shape[0] == 1
        and key.shape[2] == length
        and 2 * (len(starts) - 1) * longest**2 <= length**2
    )


class Packed:
    """Several rows packed in one. Row i consists of tokens ``starts[i]`` to ``starts[i + 1]``, at
    most ``longest``.

    [1, h, s, d] -> ``unpack`` -> [n, h, longest, d], each row padded on the right with its last
    token. [n, longest, h, d] -> ``pack`` -> [1, s, h, d].
    """

    def __init__(self, starts: Tensor, longest: int) -> None:
        first, lengths = starts[:-1, None].long(), starts.diff()[:, None]
        column = torch.arange(longest)
        self.is_token = column < lengths  # [n, longest]
        self.positions = first + torch.minimum(column, lengths - 1)  # positions in the packed row
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
        """The blocks of a mask [1, 1, s, s] that belong to each row, [n, 1, longest, longest]."""
        return (
            mask[0, 0, self.positions[:, :, None], self.positions[:, None, :]]
            & self.is_token[:, None]
        )[:, None]
