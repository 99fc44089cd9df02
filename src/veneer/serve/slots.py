"""Keys and values of the running rows: a transformers Cache, and the attention function that reads
it.

    keys, values of a layer   [rows, kv heads, columns, head dim]     row r holds its tokens in columns 0 … length − 1

The running rows are a dense prefix of the first axis, so a decode step reads views. A row that ends
is replaced by the last one. Three ways to call the model, each of which says where the tokens of
its rows lie:

    fill      new rows, right-padded, from column 0: attention is causal within the call
    extend    one row goes on from a column: for prompts longer than a call
    decode    one token for each running row, each at its own column

Columns of a row at and behind its length are never seen, and are zero again once the row has left.
Rotary positions are in the keys already: a row may be moved.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import Cache

# : columns are shown in multiples of this: views are made anew so rarely, and a mask has the
# alignment that GPUs want
BLOCK = 16

#: what the attention function reads: the Slots whose call runs in this thread
NOW = threading.local()


class Layer:
    """Keys and values of one layer, and the views of them that the running rows need."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self.set_storage(keys, values)

    def set_storage(self, keys: Tensor, values: Tensor) -> None:
        self.keys, self.values = keys, values  # [rows, kv, columns, d], [rows, kv, columns, e]
        self.flat = (
            keys.view(-1, keys.shape[-1]),
            values.view(-1, values.shape[-1]),
        )  # a row of memory each
        self.shown: tuple[Any, ...] = (None,)

    def show(self, rows: int, columns: int) -> tuple[Tensor, Tensor]:
        """Views [rows, kv, columns, ·], the same ones while the numbers stay."""
        if self.shown[0] != (rows, columns):
            self.shown = (
                (rows, columns),
                self.keys[:rows, :, :columns],
                self.values[:rows, :, :columns],
            )
        return self.shown[1], self.shown[2]


class Slots(Cache):
    """Room for ``rows`` rows of ``length`` tokens, taken as it is needed."""

    def __init__(self, rows: int, length: int, device: torch.device) -> None:
        self.kept: list[Layer] = []
        super().__init__(layers=self.kept)  # pyright: ignore[reportArgumentType]
        self.rows, self.length, self.device = rows, length, device
        self.allocated = (
            0,
            0,
        )  # rows and columns of each layer; some have more, where memory ran out while it grew
        self.touched = [0] * rows  # columns of a row that may hold anything but zeros
        self.call: _Fill | _Decode | None = None

    @contextlib.contextmanager
    def fill(self, first: int, count: int, width: int, start: int = 0) -> Iterator[None]:
        """The call in here computes ``width`` tokens of rows first … first + count − 1, from column
        ``start`` on. A start beyond 0 is for one row alone."""
        self.reserve(first + count, start + width)
        for row in range(first, first + count):
            self.touched[row] = max(self.touched[row], start + width)
        with self._during_call(_Fill(first, count, width, start)):
            yield

    @contextlib.contextmanager
    def decode(self, lengths: Sequence[int], positions: Tensor) -> Iterator[None]:
        """The call in here computes one token for each of the first rows, behind the ``lengths``
        tokens that it has. ``positions`` are these numbers as a tensor [n]."""
        longest = max(lengths) + 1
        self.reserve(len(lengths), longest)
        for row, length in enumerate(lengths):
            self.touched[row] = max(self.touched[row], length + 1)
        with self._during_call(_Decode(positions, min(_ceil(longest, BLOCK), self.allocated[1]))):
            yield

    @contextlib.contextmanager
    def _during_call(self, call: _Fill | _Decode) -> Iterator[None]:
        self.call, NOW.slots = call, self
        try:
            yield
        finally:
            self.call = NOW.slots = None
        if call.kept != call.attended:
            raise RuntimeError(
                f"{call.kept} layers kept keys and {call.attended} asked for attention: the model's attention is not "
                "the slots' any more"
            )

    def reserve(self, rows: int, columns: int) -> None:
        """Have memory for so many rows and columns. Both grow geometrically, a layer at a time."""
        old_rows, old_columns = self.allocated
        if rows <= old_rows and columns <= old_columns:
            return
        if rows > old_rows:
            rows = min(max(rows, 2 * old_rows), self.rows)
        if columns > old_columns:
            columns = min(
                _ceil(max(columns, old_columns * 3 // 2), 8 * BLOCK), _ceil(self.length, BLOCK)
            )
        rows, columns = max(rows, old_rows), max(columns, old_columns)
        for layer in self.kept:
            if layer.keys.shape[0] >= rows and layer.keys.shape[2] >= columns:
                continue
            old = layer.keys, layer.values
            grown = [
                old_tensor.new_zeros(rows, old_tensor.shape[1], columns, old_tensor.shape[3])
                for old_tensor in old
            ]
            for new, old_tensor in zip(grown, old, strict=True):
                new[: old_tensor.shape[0], :, : old_tensor.shape[2]] = old_tensor
            layer.set_storage(*grown)
            del old, grown, new, old_tensor  # at once: the next layer needs the memory
        self.allocated = (rows, columns)

    def leave(self, row: int, last: int) -> None:
        """Row ``row`` is over; row ``last`` takes its place, if that is another. No number of it
        stays."""
        columns = max(self.touched[row], self.touched[last])
        for layer in self.kept:
            for stored in (layer.keys, layer.values):
                if row != last:
                    stored[row, :, :columns] = stored[last, :, :columns]
                stored[last, :, : self.touched[last]] = 0
        self.touched[row] = self.touched[last]
        self.touched[last] = 0

    def clear(self, first: int, count: int) -> None:
        """Rows first … first + count − 1 are zero again, whatever a call that failed has left in
        them."""
        for row in range(first, min(first + count, self.allocated[0])):
            self.leave(row, row)

    def adopt(self, row: int, source: Slots, columns: int) -> None:
        """Row ``row`` becomes what row 0 of ``other`` is, in ``columns`` columns; that one is
        over."""
        self.reserve(row + 1, columns)
        for index, theirs in enumerate(source.kept):
            mine = self._layer(index, theirs.keys, theirs.values)
            for target, their in ((mine.keys, theirs.keys), (mine.values, theirs.values)):
                target[row, :, :columns] = their[0, :, :columns]
        self.touched[row] = columns
        source.leave(0, 0)

    def _layer(self, index: int, key: Tensor, value: Tensor) -> Layer:
        """The layer's memory, which the first keys and values give its form."""
        rows, columns = self.allocated
        while len(self.kept) <= index:
            self.kept.append(
                Layer(
                    *(
                        key.new_zeros(rows, tensor.shape[1], columns, tensor.shape[3])
                        for tensor in (key, value)
                    )
                )
            )
        return self.kept[index]

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Keep new keys and values [b, kv, s, d]; returns those that the call's attention reads."""
        if self.call is None:
            raise RuntimeError(
                "Slots hold the rows of an engine: call the model within fill, extend or decode"
            )
        layer = self._layer(layer_idx, key_states, value_states)
        self.call.kept += 1
        return self.call.keep(layer, key_states, value_states)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0  # positions are given with each call, as they differ from row to row

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return query_length, 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return self.length


def _ceil(number: int, block: int) -> int:
    return -(-number // block) * block


class _Fill:
    """New tokens of rows side by side, [count, kv, width, d] from column ``start``."""

    def __init__(self, first: int, count: int, width: int, start: int) -> None:
        self.rows, self.columns, self.start = (
            slice(first, first + count),
            slice(start, start + width),
            start,
        )
        self.masks: dict[tuple[int | None, torch.device], Tensor | None] = {}
        self.kept = self.attended = 0  # layers

    def keep(self, layer: Layer, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        layer.keys[self.rows, :, self.columns] = key
        layer.values[self.rows, :, self.columns] = value
        if not self.start:
            return key, value
        return layer.keys[self.rows, :, : self.columns.stop], layer.values[
            self.rows, :, : self.columns.stop
        ]

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float | None,
        window: int | None,
        cap: float | None,
    ) -> Tensor:
        mask = self._mask(window, query.device)
        if cap is not None:
            visible = torch.ones(
                query.shape[2], key.shape[2], dtype=torch.bool, device=query.device
            )
            return _soft_capped_attention(
                query, key, value, visible.tril_(self.start) if mask is None else mask, scale, cap
            )
        grouped = query.shape[1] != key.shape[1]
        out = F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            is_causal=mask is None,
            scale=scale,
            enable_gqa=grouped,
        )
        return out.transpose(1, 2)

    def _mask(self, window: int | None, device: torch.device) -> Tensor | None:
        """True where a token sees a column, [width, columns]; None is "causal"."""
        stop = self.columns.stop
        if window is not None and stop <= window:
            window = None
        if not self.start and window is None:
            return None
        if (form := (window, device)) not in self.masks:
            columns = torch.arange(stop, device=device)
            behind = columns[self.start :, None] - columns  # how far a column lies behind the token
            mask = behind >= 0
            self.masks[form] = mask if window is None else mask & (behind < window)
        return self.masks[form]


class _Decode:
    """One token for each of the first n rows."""

    def __init__(self, positions: Tensor, columns: int) -> None:
        self.positions, self.n, self.columns = positions, len(positions), columns
        self.row_positions: dict[
            tuple[int, int, torch.device], Tensor
        ] = {}  # a model may lie on several devices
        self.masks: dict[tuple[int | None, torch.dtype, torch.device], Tensor] = {}
        self.kept = self.attended = 0  # layers

    def keep(self, layer: Layer, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        form = heads, wide, _ = key.shape[1], layer.keys.shape[2], key.device
        if (row_positions := self.row_positions.get(form)) is None:
            starts = torch.arange(self.n * heads, device=key.device).view(self.n, heads) * wide
            row_positions = self.row_positions[form] = (
                starts + self.positions.to(key.device)[:, None]
            ).view(-1)
        keys, values = layer.flat
        keys.index_copy_(0, row_positions, key.reshape(-1, keys.shape[1]))
        values.index_copy_(0, row_positions, value.reshape(-1, values.shape[1]))
        return layer.show(self.n, self.columns)

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float | None,
        window: int | None,
        cap: float | None,
    ) -> Tensor:
        n, h, _, d = query.shape
        heads = key.shape[1]
        mask = self._mask(window, query)
        grouped = query.reshape(
            n, heads, h // heads, d
        )  # the queries of a key-value head are its rows
        if cap is not None:
            return (
                _soft_capped_attention(grouped, key, value, mask == 0, scale, cap)
                .transpose(1, 2)
                .reshape(n, 1, h, -1)
            )
        out = F.scaled_dot_product_attention(grouped, key, value, attn_mask=mask, scale=scale)
        return out.reshape(n, 1, h, -1)

    def _mask(self, window: int | None, query: Tensor) -> Tensor:
        """The mask that is added to the scores, [n, 1, 1, columns]."""
        form = window, query.dtype, query.device
        if (mask := self.masks.get(form)) is None:
            columns, now = (
                torch.arange(self.columns, device=query.device),
                self.positions.to(query.device)[:, None],
            )
            unseen = columns > now
            if window is not None:
                unseen |= columns <= now - window
            flat = torch.zeros(unseen.shape, dtype=query.dtype, device=query.device).masked_fill_(
                unseen, -torch.inf
            )
            mask = self.masks[form] = flat[:, None, None]
        return mask


def _soft_capped_attention(
    query: Tensor, key: Tensor, value: Tensor, visible: Tensor, scale: float | None, cap: float
) -> Tensor:
    """Attention with soft-capped scores, cap · tanh(scores / cap), which torch has no kernel for ->
    [b, s, h, e]."""
    b, h, s, d = query.shape
    heads = key.shape[1]
    grouped = query.reshape(b, heads, h // heads, s, d)
    scores = torch.matmul(grouped, key.unsqueeze(2).mT) * (d**-0.5 if scale is None else scale)
    scores = torch.tanh(scores / cap) * cap
    visible = (
        visible.unsqueeze(1) if visible.dim() == 4 else visible
    )  # [n, 1, 1, 1, columns] or [s, columns]
    scores = scores.masked_fill(~visible, -torch.inf)
    chances = torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    return torch.matmul(chances, value.unsqueeze(2)).reshape(b, h, s, -1).transpose(1, 2)


#: further arguments of an attention that the slots do not know how to honour
UNKNOWN = ("position_bias", "s_aux", "head_mask")


def attend(
    query: Tensor, key: Tensor, value: Tensor, scaling: float | None, further: dict[str, Any]
) -> Tensor:
    """Attention of the running call -> [b, s, h, e]."""
    if unknown := [name for name in UNKNOWN if further.get(name) is not None]:
        raise NotImplementedError(f"attention with {', '.join(unknown)}")
    call = NOW.slots.call
    call.attended += 1
    return call.attend(
        query, key, value, scaling, further.get("sliding_window"), further.get("softcap")
    )
