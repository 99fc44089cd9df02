"""The attention of one call of the model over the rows of the KV cache (``slots.py``), for three
kinds of calls.

    Fill                new tokens of some rows, each from a column of its row on, right-padded to
                        one width
    Decode              one new token of each running row, after the tokens that the row holds
    DecodeWithPrompts   a ``Decode``, and tokens of other rows; in the batch, each of these tokens
                        is a row

A row holds the keys and values of one sequence; its columns are the tokens. For each layer,
``store`` writes the new keys and values into the rows, and ``attend`` then computes the attention.
Linear layers compute all rows as one batch. Attention is computed for each run of neighbouring rows
of one size class, on views of the class's tensors.

Shapes: h: query heads   kv: key-value heads   d: size of a query or key   e: size of a value
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

#: attention reads a multiple of this many columns, so that views are rarely created anew and masks
#: have the alignment that GPUs need
BLOCK = 16

#: the state of this thread's call. ``call``: the ``Fill``, ``Decode`` or ``DecodeWithPrompts``;
#: None outside of one. ``last``: for each row, the index of the token whose hidden state the output
#: head reads. ``rows``: in ``Forward.together``, the rows of the batch whose hidden states the head
#: reads. ``head_rows``: hidden states for ``_multiply_taken_rows``. ``windows``: in a trial, the
#: sliding windows that the functions for the "mask" and the "attention" have been given
CALL_STATE = threading.local()

#: arguments of attention functions that ``attend`` does not support
UNSUPPORTED = ("position_bias", "s_aux", "head_mask")


def round_up(number: int, block: int = BLOCK) -> int:
    return -(-number // block) * block


class Fill:
    """New tokens of ``rows``, ``width`` for each in the batch. The first ``counts[i]`` of row i are
    stored from its column ``starts[i]`` on; the others are padding."""

    def __init__(
        self, rows: Sequence[Row], starts: Sequence[int], counts: Sequence[int], width: int
    ) -> None:
        self.rows, self.starts, self.counts, self.width = rows, starts, counts, width
        self.masks: dict[Any, Tensor] = {}
        self.layers_stored = self.layers_attended = 0

    def store(self, layer_index: int, key: Tensor, value: Tensor) -> None:
        """Store keys and values [rows, kv, width, d]."""
        self.layer_index, self.new_keys_values = layer_index, (key, value)
        for number, (row, start) in enumerate(zip(self.rows, self.starts, strict=True)):
            layer, count = row.size_class.layer(layer_index, key, value), self.counts[number]
            layer.keys[row.index, :, start : start + count] = key[number, :, :count]
            layer.values[row.index, :, start : start + count] = value[number, :, :count]

    def attend(
        self, query: Tensor, scale: float | None, window: int | None, cap: float | None
    ) -> Tensor:
        """The attention of queries [rows, h, width, d] -> [rows, width, h, e]. ``window``: the
        number of tokens of a sliding window. ``cap``: soft-caps the scores."""
        key, value = self.new_keys_values
        if not any(self.starts):
            return self.attend_to(query, key, value, 0, scale, window, cap)
        outputs = []
        for number, (row, start) in enumerate(zip(self.rows, self.starts, strict=True)):
            batch = slice(number, number + 1)
            if start:
                columns = min(round_up(start + self.width), row.columns)
                layer = row.size_class.layers[self.layer_index]
                keys, values = layer.views(row.index, 1, columns)
            else:
                keys, values = key[batch], value[batch]
            outputs.append(self.attend_to(query[batch], keys, values, start, scale, window, cap))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def attend_to(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        start: int,
        scale: float | None,
        window: int | None,
        cap: float | None,
    ) -> Tensor:
        """The attention of tokens that begin in column ``start`` of a row, over the row's first
        columns, which ``key`` and ``value`` [rows, kv, columns, ·] hold."""
        n, h, width, d = query.shape
        heads = key.shape[1]
        # as in a decode, so that the keys of a head are read once, not once for each query head
        is_grouped = cap is None and heads < h and width <= BLOCK
        copies = h // heads if is_grouped else 1
        mask = self._mask(start, key.shape[2], window, query, copies)
        if cap is not None:
            if mask is None:
                square = (query.shape[2], key.shape[2])
                visible = torch.ones(square, dtype=torch.bool, device=query.device).tril_()
            else:
                visible = mask == 0
            return _soft_capped_attention(query, key, value, visible, scale, cap)
        if mask is not None and is_grouped:
            query = query.reshape(n, heads, -1, d)
            attended = F.scaled_dot_product_attention(
                query, key, value, attn_mask=mask, scale=scale
            )
            return attended.reshape(n, h, width, -1).transpose(1, 2)
        attended = F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            is_causal=mask is None,
            scale=scale,
            enable_gqa=heads < h,
        )
        return attended.transpose(1, 2)

    def _mask(
        self, start: int, columns: int, window: int | None, query: Tensor, copies: int
    ) -> Tensor | None:
        """The mask to add to the scores, [copies · width, columns]; None if torch's own causal mask
        suffices. It is not boolean, because torch would convert a boolean mask anew in each layer.
        ``copies``: the query heads of one key-value head, if they are computed as rows; else 1."""
        if window is not None and start + self.width <= window:
            window = None
        if not start and window is None:
            return None
        cache_key = start, columns, window, copies, query.dtype, query.device
        if cache_key not in self.masks:
            tokens = torch.arange(start, start + self.width, device=query.device)
            distances = tokens[:, None] - torch.arange(columns, device=query.device)
            unseen = distances < 0 if window is None else (distances < 0) | (distances >= window)
            zeros = torch.zeros(unseen.shape, dtype=query.dtype, device=query.device)
            self.masks[cache_key] = zeros.masked_fill_(unseen, -torch.inf).repeat(copies, 1)
        return self.masks[cache_key]


class Run(NamedTuple):
    """Neighbouring rows of a size class whose attention is computed in one call: ``count`` rows
    from index ``first`` in the class and from ``batch_start`` in the batch. Their first ``columns``
    columns are read."""

    size_class: SizeClass
    first: int
    count: int
    batch_start: int
    columns: int


class Decode:
    """One new token for each of n ``rows``, which are sorted by ``Row.position``. ``lengths``: the
    number of tokens that each row holds. ``positions``: the columns of the new tokens, which are
    the same numbers, as a tensor [n]."""

    def __init__(self, rows: Sequence[Row], lengths: Sequence[int], positions: Tensor) -> None:
        self.positions = positions
        self.runs = _runs_of(rows, lengths)
        self.groups = _groups_of(self.runs)
        self.targets: dict[Any, Tensor] = {}
        self.masks: dict[Any, Tensor] = {}
        self.layers_stored = self.layers_attended = 0

    def store(self, layer_index: int, key: Tensor, value: Tensor) -> None:
        """Store keys and values [n, kv, 1, d]."""
        self.layer_index = layer_index
        for number, (size_class, start, stop) in enumerate(self.groups):
            layer = size_class.layer(layer_index, key, value)
            targets = self._targets(number, key.shape[1], key.device)
            keys, values = layer.flat_views
            keys.index_copy_(0, targets, key[start:stop].reshape(-1, keys.shape[1]))
            values.index_copy_(0, targets, value[start:stop].reshape(-1, values.shape[1]))

    def attend(
        self, query: Tensor, scale: float | None, window: int | None, cap: float | None
    ) -> Tensor:
        """The attention of queries [n, h, 1, d] -> [n, 1, h, e]."""
        if len(self.runs) == 1:
            return self._attend(0, query, scale, window, cap)
        outputs = [
            self._attend(
                number, query[run.batch_start : run.batch_start + run.count], scale, window, cap
            )
            for number, run in enumerate(self.runs)
        ]
        return torch.cat(outputs)

    def _attend(
        self, number: int, query: Tensor, scale: float | None, window: int | None, cap: float | None
    ) -> Tensor:
        run = self.runs[number]
        layer = run.size_class.layers[self.layer_index]
        key, value = layer.views(run.first, run.count, run.columns)
        n, h, _, d = query.shape
        heads = key.shape[1]
        mask = self._mask(number, window, query)
        # the queries of one key-value head become rows
        grouped = query.reshape(n, heads, h // heads, d)
        if cap is not None:
            attended = _soft_capped_attention(grouped, key, value, mask == 0, scale, cap)
            return attended.transpose(1, 2).reshape(n, 1, h, -1)
        attended = F.scaled_dot_product_attention(grouped, key, value, attn_mask=mask, scale=scale)
        return attended.reshape(n, 1, h, -1)

    def _targets(self, number: int, heads: int, device: torch.device) -> Tensor:
        """The indices in ``LayerMemory.flat_views`` at which the new keys and values of a group of
        rows (those of one size class) are stored, [rows · heads]."""
        cache_key = number, heads, device
        if (targets := self.targets.get(cache_key)) is None:
            size_class, start, stop = self.groups[number]
            heads_of_runs = [
                torch.arange(run.first * heads, (run.first + run.count) * heads, device=device)
                for run in self.runs
                if run.size_class is size_class
            ]
            starts = heads_of_runs[0] if len(heads_of_runs) == 1 else torch.cat(heads_of_runs)
            columns = self.positions[start:stop].to(device)[:, None]
            targets = starts.view(-1, heads) * size_class.columns + columns
            targets = self.targets[cache_key] = targets.view(-1)
        return targets

    def _mask(self, number: int, window: int | None, query: Tensor) -> Tensor:
        """The additive mask of the scores of a run, [rows, 1, 1, columns]."""
        cache_key = number, window, query.dtype, query.device
        if (mask := self.masks.get(cache_key)) is None:
            run = self.runs[number]
            columns = torch.arange(run.columns, device=query.device)
            stop = run.batch_start + run.count
            tokens = self.positions[run.batch_start : stop].to(query.device)[:, None]
            unseen = columns > tokens
            if window is not None:
                unseen |= columns <= tokens - window
            zeros = torch.zeros(unseen.shape, dtype=query.dtype, device=query.device)
            mask = zeros.masked_fill_(unseen, -torch.inf)[:, None, None]
            self.masks[cache_key] = mask
        return mask


class DecodeWithPrompts:
    """A ``Decode`` and ``pieces`` of prompts in one call, so that the model's weights are read only
    once. Each piece is a ``Fill`` of one row without padding. The batch begins with the rows of the
    ``Decode``; after these, each token of a piece is a row of the batch."""

    def __init__(self, decode: Decode, pieces: Sequence[Fill]) -> None:
        self.decode, self.pieces = decode, pieces
        self.count = len(decode.positions)
        self.layers_stored = self.layers_attended = 0

    def store(self, layer_index: int, key: Tensor, value: Tensor) -> None:
        """Store keys and values [n + tokens, kv, 1, d]."""
        self.decode.store(layer_index, key[: self.count], value[: self.count])
        for piece, batch in self._batches():
            # [1, kv, tokens, d], the shape that ``Fill.store`` expects
            keys, values = (each[batch, :, 0].transpose(0, 1)[None] for each in (key, value))
            piece.store(layer_index, keys, values)

    def attend(
        self, query: Tensor, scale: float | None, window: int | None, cap: float | None
    ) -> Tensor:
        """The attention of queries [n + tokens, h, 1, d] -> [n + tokens, 1, h, e]."""
        outputs = [self.decode.attend(query[: self.count], scale, window, cap)]
        for piece, batch in self._batches():
            queries = query[batch, :, 0].transpose(0, 1)[None]
            outputs.append(piece.attend(queries, scale, window, cap).transpose(0, 1))
        return torch.cat(outputs)

    def _batches(self) -> Iterator[tuple[Fill, slice]]:
        """Each piece with its rows of the batch."""
        start = self.count
        for piece in self.pieces:
            yield piece, slice(start, start + piece.width)
            start += piece.width


def _runs_of(rows: Sequence[Row], lengths: Sequence[int]) -> list[Run]:
    """Divide sorted rows into runs. ``lengths``: the number of tokens that each row holds before
    this call adds one. ``ValueError``: the rows are not sorted."""
    runs: list[Run] = []
    for number, (row, length) in enumerate(zip(rows, lengths, strict=True)):
        if number and rows[number - 1].position >= row.position:
            raise ValueError("rows of a decode call are sorted by their positions")
        columns = min(round_up(length + 1), row.columns)
        last = runs[-1] if runs and runs[-1].size_class is row.size_class else None
        if last is not None and last.first + last.count == row.index:
            runs[-1] = last._replace(count=last.count + 1, columns=max(last.columns, columns))
        else:
            runs.append(Run(row.size_class, row.index, 1, number, columns))
    return runs


def _groups_of(runs: Sequence[Run]) -> list[tuple[SizeClass, int, int]]:
    """For each size class of the runs: (the class, its first row in the batch, the row after its
    last)."""
    bounds: dict[SizeClass, tuple[int, int]] = {}
    for run in runs:
        start, _ = bounds.get(run.size_class, (run.batch_start, 0))
        bounds[run.size_class] = start, run.batch_start + run.count
    return [(size_class, start, stop) for size_class, (start, stop) in bounds.items()]


def _soft_capped_attention(
    query: Tensor, key: Tensor, value: Tensor, visible: Tensor, scale: float | None, cap: float
) -> Tensor:
    """Attention [b, s, h, e] with soft-capped scores, cap · tanh(scores / cap), for which torch has
    no kernel. ``visible`` is True where a query may attend to a key."""
    b, h, s, d = query.shape
    heads = key.shape[1]
    grouped = query.reshape(b, heads, h // heads, s, d)
    scores = torch.matmul(grouped, key.unsqueeze(2).mT) * (d**-0.5 if scale is None else scale)
    scores = torch.tanh(scores / cap) * cap
    visible = (
        visible.unsqueeze(1) if visible.dim() == 4 else visible
    )  # [n, 1, 1, 1, columns] or [s, columns]
    scores = scores.masked_fill(~visible, -torch.inf)
    probabilities = torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    return torch.matmul(probabilities, value.unsqueeze(2)).reshape(b, h, s, -1).transpose(1, 2)


def attend(query: Tensor, scaling: float | None, further: dict[str, Any]) -> Tensor:
    """The attention of the running call, [b, s, h, e]. ``further``: other arguments that
    transformers passes to an attention function. ``NotImplementedError``: one of ``UNSUPPORTED`` is
    among them."""
    if unsupported := [name for name in UNSUPPORTED if further.get(name) is not None]:
        raise NotImplementedError(f"attention with {', '.join(unsupported)}")
    call = CALL_STATE.call
    call.layers_attended += 1
    return call.attend(query, scaling, further.get("sliding_window"), further.get("softcap"))
