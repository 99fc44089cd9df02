"""The attention of one call of the model over the rows of the KV cache (``slots.py``), for three
kinds of calls.

    Fill                several new tokens for some rows, padded on the right to the same number
    Decode              one new token for each running row, after the tokens that the row holds
    DecodeWithPrompts   a ``Decode`` together with new tokens of other rows

A row of the cache holds the keys and values of one sequence; its columns are the tokens. For each
layer, ``store`` writes the new keys and values into the rows, and ``attend`` then computes the
attention. Linear layers compute all rows as one batch. Attention is computed on views of the cache,
one for each run of neighbouring rows of one size class (rows with equal numbers of columns).

In the code, h is the number of query heads and d the size of a query or key.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from veneer.models.decode.row_memory import Row, SizeClass

#: attention reads a multiple of this many columns, so that the same views of the cache serve
#: several calls, and masks have the alignment that GPUs need
BLOCK = 16

#: the state of the call of the model that runs in this thread. ``call``: its ``Fill``, ``Decode``
#: or ``DecodeWithPrompts``; None if no call on the KV cache runs. ``last``: for each row, the index
#: of the token whose hidden state the output head gets. ``rows``: in ``Forward.together``, the rows
#: of the batch whose hidden states the head gets. ``head_rows``: hidden states for
#: ``_multiply_taken_rows``. ``windows``: in ``Forward.compare_logits``, the sizes of the sliding
#: windows that transformers has passed to mask functions ("mask") and attention functions
#: ("attention"); else None
CALL_STATE = threading.local()

#: arguments of attention functions that ``attend`` does not support
UNSUPPORTED_ARGUMENTS = ("position_bias", "s_aux", "head_mask")


def round_up(number: int, block: int = BLOCK) -> int:
    return -(-number // block) * block


class Fill:
    """A call that computes ``width`` tokens of each of ``rows``. The keys and values of the first
    ``counts[i]`` tokens of ``rows[i]`` are stored from the row's column ``starts[i]`` on. The other
    tokens are padding."""

    def __init__(
        self, rows: Sequence[Row], starts: Sequence[int], counts: Sequence[int], width: int
    ) -> None:
        self.rows, self.starts, self.counts, self.width = rows, starts, counts, width
        self.masks: dict[Any, Tensor] = {}
        self.layers_stored = self.layers_attended = 0

    def store(self, layer_index: int, key: Tensor, value: Tensor) -> None:
        """Store the keys [rows, key-value heads, width, size] and values of the new tokens in a
        layer. Padding is not stored."""
        self.layer_index, self.new_keys_values = layer_index, (key, value)
        for batch_index, (row, start) in enumerate(zip(self.rows, self.starts, strict=True)):
            layer_memory, count = (
                row.size_class.layer(layer_index, key, value),
                self.counts[batch_index],
            )
            layer_memory.keys[row.index, :, start : start + count] = key[batch_index, :, :count]
            layer_memory.values[row.index, :, start : start + count] = value[batch_index, :, :count]

    def attend(
        self, query: Tensor, scale: float | None, window: int | None, softcap: float | None
    ) -> Tensor:
        """Attend to the keys and values of the layer for which ``store`` was called last. Takes the
        queries [rows, heads, width, size], returns [rows, width, heads, size of a value].

        Args:
            scale: the factor of the scores; None is 1/√d.
            window: the number of tokens of a sliding window; None if there is no window.
            softcap: c to replace the scores s by c · tanh(s / c); None leaves them as they are.
        """
        key, value = self.new_keys_values
        if not any(self.starts):
            return self.attend_to(query, key, value, 0, scale, window, softcap)
        outputs = []
        for batch_index, (row, start) in enumerate(zip(self.rows, self.starts, strict=True)):
            batch_slice = slice(batch_index, batch_index + 1)
            if start:
                columns = min(round_up(start + self.width), row.columns)
                layer_memory = row.size_class.layers[self.layer_index]
                keys, values = layer_memory.views(row.index, 1, columns)
            else:
                keys, values = key[batch_slice], value[batch_slice]
            outputs.append(
                self.attend_to(query[batch_slice], keys, values, start, scale, window, softcap)
            )
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def attend_to(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        start: int,
        scale: float | None,
        window: int | None,
        softcap: float | None,
    ) -> Tensor:
        """The attention of the queries [rows, heads, width, size] of tokens from column ``start``
        on, [rows, width, heads, size of a value]. ``key`` and ``value`` [rows, key-value heads,
        columns, size] hold the first columns of the rows. The other arguments are those of
        ``attend``."""
        n, h, width, d = query.shape
        kv_heads = key.shape[1]
        # For few tokens, the query heads that share a key-value head are computed as further tokens
        # of one head, as in ``Decode``. The keys are then read once, not once for each query head.
        is_grouped = softcap is None and kv_heads < h and width <= BLOCK
        copies = h // kv_heads if is_grouped else 1
        mask = self._mask(start, key.shape[2], window, query, copies)
        if softcap is not None:
            if mask is None:
                score_shape = (query.shape[2], key.shape[2])
                is_visible = torch.ones(score_shape, dtype=torch.bool, device=query.device).tril_()
            else:
                is_visible = mask == 0
            return _soft_capped_attention(query, key, value, is_visible, scale, softcap)
        if mask is not None and is_grouped:
            query = query.reshape(n, kv_heads, -1, d)
            output = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)
            return output.reshape(n, h, width, -1).transpose(1, 2)
        output = F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            is_causal=mask is None,
            scale=scale,
            enable_gqa=kv_heads < h,
        )
        return output.transpose(1, 2)

    def _mask(
        self, start: int, columns: int, window: int | None, query: Tensor, copies: int
    ) -> Tensor | None:
        """The mask to add to the scores, [copies · width, columns]; None if torch's own causal mask
        suffices. It is not boolean, because torch would convert a boolean mask anew in each layer.
        ``copies``: how often the mask is repeated, once for each query head that is computed as
        further tokens of one head."""
        if window is not None and start + self.width <= window:
            window = None
        if not start and window is None:
            return None
        cache_key = start, columns, window, copies, query.dtype, query.device
        if cache_key not in self.masks:
            tokens = torch.arange(start, start + self.width, device=query.device)
            distances = tokens[:, None] - torch.arange(columns, device=query.device)
            is_masked = distances < 0 if window is None else (distances < 0) | (distances >= window)
            zeros = torch.zeros(is_masked.shape, dtype=query.dtype, device=query.device)
            self.masks[cache_key] = zeros.masked_fill_(is_masked, -torch.inf).repeat(copies, 1)
        return self.masks[cache_key]


class Run(NamedTuple):
    """Neighbouring rows of a size class whose attention is computed in one operation.

    Fields:
        first, count: the index of the first row in the class, and the number of rows.
        batch_start: the index of the first row in the batch.
        columns: how many columns of the rows are read.
    """

    size_class: SizeClass
    first: int
    count: int
    batch_start: int
    columns: int


class Decode:
    """A call that computes one new token for each of n ``rows``, which are sorted by
    ``Row.position``. ``lengths``: the number of tokens that each row holds, which is also the
    column of its new token. ``positions``: the same numbers as a tensor [n]."""

    def __init__(self, rows: Sequence[Row], lengths: Sequence[int], positions: Tensor) -> None:
        self.positions = positions
        self.runs = _runs_of(rows, lengths)
        self.groups = _groups_of(self.runs)
        self.flat_indices: dict[Any, Tensor] = {}
        self.masks: dict[Any, Tensor] = {}
        self.layers_stored = self.layers_attended = 0

    def store(self, layer_index: int, key: Tensor, value: Tensor) -> None:
        """Store the keys [rows, key-value heads, 1, size] and values of the new tokens in a
        layer."""
        self.layer_index = layer_index
        for group_index, (size_class, start, stop) in enumerate(self.groups):
            layer_memory = size_class.layer(layer_index, key, value)
            flat_indices = self._flat_indices(group_index, key.shape[1], key.device)
            keys, values = layer_memory.flat_views
            keys.index_copy_(0, flat_indices, key[start:stop].reshape(-1, keys.shape[1]))
            values.index_copy_(0, flat_indices, value[start:stop].reshape(-1, values.shape[1]))

    def attend(
        self, query: Tensor, scale: float | None, window: int | None, softcap: float | None
    ) -> Tensor:
        """Attend to the keys and values of the layer for which ``store`` was called last. Takes the
        queries [rows, heads, 1, size], returns [rows, 1, heads, size of a value]. The other
        arguments are those of ``Fill.attend``."""
        if len(self.runs) == 1:
            return self._attend(0, query, scale, window, softcap)
        outputs = [
            self._attend(
                run_index,
                query[run.batch_start : run.batch_start + run.count],
                scale,
                window,
                softcap,
            )
            for run_index, run in enumerate(self.runs)
        ]
        return torch.cat(outputs)

    def _attend(
        self,
        run_index: int,
        query: Tensor,
        scale: float | None,
        window: int | None,
        softcap: float | None,
    ) -> Tensor:
        run = self.runs[run_index]
        layer_memory = run.size_class.layers[self.layer_index]
        key, value = layer_memory.views(run.first, run.count, run.columns)
        n, h, _, d = query.shape
        kv_heads = key.shape[1]
        mask = self._mask(run_index, window, query)
        # The query heads that share a key-value head become tokens of one head, so that the keys
        # are read once.
        grouped_query = query.reshape(n, kv_heads, h // kv_heads, d)
        if softcap is not None:
            output = _soft_capped_attention(grouped_query, key, value, mask == 0, scale, softcap)
            return output.transpose(1, 2).reshape(n, 1, h, -1)
        output = F.scaled_dot_product_attention(
            grouped_query, key, value, attn_mask=mask, scale=scale
        )
        return output.reshape(n, 1, h, -1)

    def _flat_indices(self, group_index: int, kv_heads: int, device: torch.device) -> Tensor:
        """The indices along the first axis of ``LayerMemory.flat_views`` at which the new keys and
        values of one group are stored, [rows · heads]. A group is the rows of one size class.
        ``kv_heads``: the number of key-value heads."""
        cache_key = group_index, kv_heads, device
        if (flat_indices := self.flat_indices.get(cache_key)) is None:
            size_class, start, stop = self.groups[group_index]
            head_rows_of_runs = [
                torch.arange(
                    run.first * kv_heads, (run.first + run.count) * kv_heads, device=device
                )
                for run in self.runs
                if run.size_class is size_class
            ]
            head_rows = (
                head_rows_of_runs[0]
                if len(head_rows_of_runs) == 1
                else torch.cat(head_rows_of_runs)
            )
            columns = self.positions[start:stop].to(device)[:, None]
            flat_indices = head_rows.view(-1, kv_heads) * size_class.columns + columns
            flat_indices = self.flat_indices[cache_key] = flat_indices.view(-1)
        return flat_indices

    def _mask(self, run_index: int, window: int | None, query: Tensor) -> Tensor:
        """The mask to add to the scores of the run ``runs[run_index]``, [rows, 1, 1, columns]."""
        cache_key = run_index, window, query.dtype, query.device
        if (mask := self.masks.get(cache_key)) is None:
            run = self.runs[run_index]
            columns = torch.arange(run.columns, device=query.device)
            stop = run.batch_start + run.count
            tokens = self.positions[run.batch_start : stop].to(query.device)[:, None]
            is_masked = columns > tokens
            if window is not None:
                is_masked |= columns <= tokens - window
            zeros = torch.zeros(is_masked.shape, dtype=query.dtype, device=query.device)
            mask = zeros.masked_fill_(is_masked, -torch.inf)[:, None, None]
            self.masks[cache_key] = mask
        return mask


class DecodeWithPrompts:
    """A ``Decode`` and ``pieces`` of prompts in one call of the model, so that its weights are read
    only once. Each piece is a ``Fill`` of one row without padding. The batch begins with the rows
    of the ``Decode``. Then each token of a piece is a batch row of its own, so that all batch rows
    have one token."""

    def __init__(self, decode: Decode, pieces: Sequence[Fill]) -> None:
        self.decode, self.pieces = decode, pieces
        self.decode_count = len(decode.positions)
        self.layers_stored = self.layers_attended = 0

    def store(self, layer_index: int, key: Tensor, value: Tensor) -> None:
        """Store the keys [batch rows, key-value heads, 1, size] and values of the new tokens in a
        layer. The batch rows are those of ``decode``, then the tokens of all pieces."""
        self.decode.store(layer_index, key[: self.decode_count], value[: self.decode_count])
        for piece, token_slice in self._batches():
            # [1, heads, tokens, size], the shape that ``Fill.store`` expects
            keys, values = (
                tensor[token_slice, :, 0].transpose(0, 1)[None] for tensor in (key, value)
            )
            piece.store(layer_index, keys, values)

    def attend(
        self, query: Tensor, scale: float | None, window: int | None, softcap: float | None
    ) -> Tensor:
        """Attend to the keys and values of the layer for which ``store`` was called last. Takes the
        queries [batch rows, heads, 1, size], returns [batch rows, 1, heads, size of a value]. The
        other arguments are those of ``Fill.attend``."""
        outputs = [self.decode.attend(query[: self.decode_count], scale, window, softcap)]
        for piece, token_slice in self._batches():
            queries = query[token_slice, :, 0].transpose(0, 1)[None]
            outputs.append(piece.attend(queries, scale, window, softcap).transpose(0, 1))
        return torch.cat(outputs)

    def _batches(self) -> Iterator[tuple[Fill, slice]]:
        """Yield (piece, slice of the batch that holds its tokens)."""
        start = self.decode_count
        for piece in self.pieces:
            yield piece, slice(start, start + piece.width)
            start += piece.width


def _runs_of(rows: Sequence[Row], lengths: Sequence[int]) -> list[Run]:
    """Divide rows into runs: neighbouring rows of one size class. ``lengths``: the number of tokens
    that each row holds before the new one. ``ValueError``: the rows are not sorted by
    ``Row.position``."""
    runs: list[Run] = []
    for batch_index, (row, length) in enumerate(zip(rows, lengths, strict=True)):
        if batch_index and rows[batch_index - 1].position >= row.position:
            raise ValueError("rows of a decode call are sorted by their positions")
        columns = min(round_up(length + 1), row.columns)
        last_run = runs[-1] if runs and runs[-1].size_class is row.size_class else None
        if last_run is not None and last_run.first + last_run.count == row.index:
            runs[-1] = last_run._replace(
                count=last_run.count + 1, columns=max(last_run.columns, columns)
            )
        else:
            runs.append(Run(row.size_class, row.index, 1, batch_index, columns))
    return runs


def _groups_of(runs: Sequence[Run]) -> list[tuple[SizeClass, int, int]]:
    """For each size class: (the class, the index of its first row in the batch, the index after its
    last row). The rows of a class are neighbours in the batch, because ``runs`` are sorted."""
    bounds: dict[SizeClass, tuple[int, int]] = {}
    for run in runs:
        start, _ = bounds.get(run.size_class, (run.batch_start, 0))
        bounds[run.size_class] = start, run.batch_start + run.count
    return [(size_class, start, stop) for size_class, (start, stop) in bounds.items()]


def _soft_capped_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    is_visible: Tensor,
    scale: float | None,
    softcap: float,
) -> Tensor:
    """Attention with soft-capped scores, softcap · tanh(scores / softcap), for which torch has no
    kernel: query [b, h, s, d], key and value [b, key-value heads, columns, ·] -> [b, s, h, ·].
    ``is_visible``, [s, columns] or [b, 1, 1, columns], is True where a query may attend to a
    key."""
    b, h, s, d = query.shape
    kv_heads = key.shape[1]
    grouped_query = query.reshape(b, kv_heads, h // kv_heads, s, d)
    scores = torch.matmul(grouped_query, key.unsqueeze(2).mT) * (
        d**-0.5 if scale is None else scale
    )
    scores = torch.tanh(scores / softcap) * softcap
    is_visible = (  # [b, 1, 1, 1, columns] or [s, columns]
        is_visible.unsqueeze(1) if is_visible.dim() == 4 else is_visible
    )
    scores = scores.masked_fill(~is_visible, -torch.inf)
    probabilities = torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    return torch.matmul(probabilities, value.unsqueeze(2)).reshape(b, h, s, -1).transpose(1, 2)


def attend(query: Tensor, scaling: float | None, kwargs: dict[str, Any]) -> Tensor:
    """The attention of the queries [batch rows, heads, tokens, size], [batch rows, tokens, heads,
    size of a value], computed by ``CALL_STATE.call``, the call on the KV cache that runs in this
    thread. ``kwargs``: other arguments that transformers passes to an attention function.
    ``NotImplementedError``: they contain one of ``UNSUPPORTED_ARGUMENTS``."""
    if unsupported_names := [
        name for name in UNSUPPORTED_ARGUMENTS if kwargs.get(name) is not None
    ]:
        raise NotImplementedError(f"attention with {', '.join(unsupported_names)}")
    call = CALL_STATE.call
    call.layers_attended += 1
    return call.attend(query, scaling, kwargs.get("sliding_window"), kwargs.get("softcap"))
