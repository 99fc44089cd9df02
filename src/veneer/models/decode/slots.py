"""The KV cache of many sequences, as a ``Cache`` of transformers. Each sequence is a row in one of
several size classes.

    class of 128 columns    rows of up to 128 tokens: [rows, kv heads, 128, head dim] for each layer
    class of 256 columns    rows of up to 256 tokens: [rows, kv heads, 256, head dim]
    …                       twice as many, up to the longest row

A row is stored in the smallest class that holds it, and moves to the next class when it grows, so a
long row does not cost the other rows memory or time. The rows in use are the first ones of the
class's tensors, without gaps: when a row ends, the last one takes its index. A row of n tokens
holds them in columns 0 … n − 1. Later columns are masked in attention; the columns that a row has
used are set to zero when it is freed. Rotary positions are already applied to the keys, so a row
may be moved, and its prefix copied to another row.

Memory is allocated within a ``Budget`` of bytes, which the server's cached prefixes share
(``serve/prefixes.py``).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import reduce
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from veneer.models.decode.attention import (
    BLOCK,
    CALL_STATE,
    Decode,
    DecodeWithPrompts,
    Fill,
    round_up,
)
from veneer.models.decode.row_memory import LayerForm, Row, SizeClass

#: columns of the smallest size class
MIN_COLUMNS = 128

#: the most blocks (of ``BLOCK`` tokens) that are copied at one time
MAX_COPIED_BLOCKS = 16


class Budget:
    """The memory of the rows and of the server's cached prefixes, in bytes.

    Attributes:
        limit: the most bytes that rows, prefixes and reserve may use together; None is no limit.
        row_bytes, prefix_bytes: the bytes that rows and cached prefixes use now.
        reserved_bytes: the bytes to keep free for the second copy of a tensor while its size class
            is resized.
    """

    def __init__(self, limit: int | None = None) -> None:
        self.limit = limit
        self.row_bytes = self.prefix_bytes = self.reserved_bytes = 0

    @property
    def free(self) -> float:
        if self.limit is None:
            return math.inf
        return self.limit - self.row_bytes - self.prefix_bytes - self.reserved_bytes


class Slots(Cache):
    """A KV cache for up to ``rows`` rows of up to ``length`` tokens. Memory is allocated as rows
    need it.

    Args:
        forms: the sizes, dtype and device of each layer's keys and values; empty if they are not
            known yet.
        budget: the memory that rows may use; None is no limit.
        smallest: columns of the smallest size class.

    Attributes:
        reclaim: is called with the number of bytes that the budget lacks for rows. The caller may
            set it to a function that frees other memory of the budget, such as cached prefixes.
        call: the call of the model that runs; None outside of ``fill``, ``decode`` and
            ``together``.
    """

    def __init__(
        self,
        rows: int,
        length: int,
        device: torch.device,
        forms: Sequence[LayerForm] = (),
        budget: Budget | None = None,
        smallest: int = MIN_COLUMNS,
    ) -> None:
        super().__init__(layers=[])
        self.rows, self.length, self.device, self.smallest = rows, length, device, smallest
        self.forms, self.budget = list(forms), budget or Budget()
        self.classes: dict[int, SizeClass] = {}
        self.reclaim: Callable[[int], None] = lambda lacking_bytes: None
        self.call: Fill | Decode | DecodeWithPrompts | None = None

    def columns_for(self, length: int) -> int:
        """The number of columns of the size class for rows of ``length`` tokens."""
        columns = self.smallest
        while columns < length:
            columns *= 2
        return min(columns, round_up(self.length))

    @property
    def nbytes(self) -> int:
        return sum(size_class.nbytes for size_class in self.classes.values())

    def allocate(self, length: int) -> Row | None:
        """A new row for ``length`` tokens, after an allocation of memory if necessary; None if the
        budget has no room for it."""
        size_class = self._class_for(length)
        if len(size_class.rows) == size_class.capacity and not self._grow(size_class):
            return None
        return size_class.take()

    def reserve(self, length: int, count: int) -> None:
        """Allocate memory for ``count`` more rows of ``length`` tokens at once, so that
        ``allocate`` need not resize the class for each row. Allocates nothing if the budget has no
        room for all of them."""
        size_class = self._class_for(length)
        capacity = len(size_class.rows) + count
        if capacity > size_class.capacity and self._make_room(size_class, capacity):
            self._resize(size_class, capacity)

    def copy(self, source: Row, targets: Sequence[Row], length: int) -> None:
        """Copy the keys and values of the first ``length`` tokens of ``source`` to ``targets``."""
        for target in targets:
            target.written_columns = max(target.written_columns, length)
            for source_layer, target_layer in zip(
                source.size_class.layers, target.size_class.layers, strict=True
            ):
                target_layer.keys[target.index, :, :length] = source_layer.keys[
                    source.index, :, :length
                ]
                target_layer.values[target.index, :, :length] = source_layer.values[
                    source.index, :, :length
                ]

    def clear(self) -> None:
        """Free all memory, also that of rows to which callers still have references."""
        for size_class in self.classes.values():
            size_class.layers.clear()
        self.classes.clear()
        self._update_budget()

    def widen(self, row: Row, length: int) -> bool:
        """Move a row to a size class with room for ``length`` tokens, if its own has none. Returns
        False, and leaves the row unchanged, if the budget has no room for the wider row."""
        if length <= row.columns:
            return True
        wider_row = self.allocate(length)
        if wider_row is None:
            return False
        self.copy(row, [wider_row], row.written_columns)
        # The caller keeps its Row object. So the two Row objects exchange their classes and
        # indices, and the new object, which then stands for the old memory, is released.
        row.size_class.rows[row.index], wider_row.size_class.rows[wider_row.index] = wider_row, row
        row.size_class, wider_row.size_class = wider_row.size_class, row.size_class
        row.index, wider_row.index = wider_row.index, row.index
        self.release(wider_row)
        return True

    def release(self, row: Row) -> None:
        row.size_class.release(row)

    def trim(self, idle_seconds: float = 0.0) -> None:
        """Free the memory of size classes that have had no row for ``idle_seconds``."""
        now = time.monotonic()
        empty_classes = [size_class for size_class in self.classes.values() if not size_class.rows]
        for size_class in empty_classes:
            if now - size_class.emptied_at >= idle_seconds:
                del self.classes[size_class.columns]
        if empty_classes:
            self._update_budget()

    def _class_for(self, length: int) -> SizeClass:
        columns = self.columns_for(length)
        if columns not in self.classes:
            self.classes[columns] = SizeClass(columns, self.forms)
        return self.classes[columns]

    def _grow(self, size_class: SizeClass) -> bool:
        """Allocate memory for another row in a full class, and for up to half as many rows again if
        the budget has room for them. Returns False if it has no room for one row."""
        row_count = len(size_class.rows)
        larger_capacity = max(row_count + 1, min(row_count * 3 // 2, self.rows))
        capacity = (
            larger_capacity
            if self._bytes_lacking(size_class, larger_capacity) <= 0
            else row_count + 1
        )
        if not self._make_room(size_class, capacity):
            return False
        self._resize(size_class, capacity)
        return True

    def _resize(self, size_class: SizeClass, capacity: int) -> None:
        try:
            size_class.resize(capacity)
        finally:
            self._update_budget()

    def _make_room(self, size_class: SizeClass, capacity: int) -> bool:
        """Whether the budget has room for ``capacity`` rows of a class, after memory that no row
        uses has been freed and ``reclaim`` has been called, if this is necessary. Does not allocate
        memory for the rows."""
        if self._bytes_lacking(size_class, capacity) <= 0:
            return True
        if self._bytes_lacking(size_class, capacity, after_freeing=True) > 0:
            return False  # freeing memory would not suffice
        self.trim()
        self.classes[size_class.columns] = size_class
        if (lacking_bytes := self._bytes_lacking(size_class, capacity)) > 0:
            self.reclaim(lacking_bytes)
        for other_class in self.classes.values():
            lacking_bytes = self._bytes_lacking(size_class, capacity)
            if (
                lacking_bytes > 0
                and other_class is not size_class
                and other_class.capacity > len(other_class.rows)
            ):
                other_class.resize(len(other_class.rows))
                self._update_budget()
        return self._bytes_lacking(size_class, capacity) <= 0

    def _bytes_lacking(
        self, size_class: SizeClass, capacity: int, *, after_freeing: bool = False
    ) -> int:
        """The bytes that the budget lacks for ``capacity`` rows of a class; 0 or less if there is
        room. With ``after_freeing``, the bytes that it would lack without cached prefixes and
        without memory that no row uses."""
        if self.budget.limit is None:
            return 0
        capacities = {
            other: len(other.rows) if after_freeing else other.capacity
            for other in self.classes.values()
        } | {size_class: capacity}
        row_bytes = sum(rows * each_class.row_bytes for each_class, rows in capacities.items())
        reserve_bytes = max(
            each_class.largest_tensor_bytes(rows) for each_class, rows in capacities.items()
        )
        prefix_bytes = 0 if after_freeing else self.budget.prefix_bytes
        return row_bytes + reserve_bytes + prefix_bytes - self.budget.limit

    def _update_budget(self) -> None:
        classes = self.classes.values()
        self.budget.row_bytes = self.nbytes
        self.budget.reserved_bytes = max(
            (size_class.largest_tensor_bytes(size_class.capacity) for size_class in classes),
            default=0,
        )

    def fill(
        self, rows: Sequence[Row], starts: Sequence[int], counts: Sequence[int], width: int
    ) -> AbstractContextManager[None]:
        """A block for one call of the model that computes ``width`` tokens of each row. The first
        ``counts[i]`` tokens of ``rows[i]`` are stored from its column ``starts[i]`` on; the others
        are padding."""
        return self._during_call(self._fill_of(rows, starts, counts, width))

    def decode(
        self, rows: Sequence[Row], lengths: Sequence[int], positions: Tensor
    ) -> AbstractContextManager[None]:
        """A block for one call of the model that computes one more token of each row. ``lengths``:
        the number of tokens that each row holds; ``positions``: the same numbers as a tensor [n].
        ``rows`` are sorted by ``Row.position``."""
        return self._during_call(self._decode_of(rows, lengths, positions))

    def together(
        self,
        rows: Sequence[Row],
        lengths: Sequence[int],
        positions: Tensor,
        pieces: Sequence[tuple[Row, int, int]],
    ) -> AbstractContextManager[None]:
        """A block for one call of the model that computes one more token of each row, as in
        ``decode``, and ``pieces`` of prompts: (row, column of the first token, number of tokens)
        each. In the batch, each token of a piece is a row of its own."""
        fills = [self._fill_of([row], [start], [count], count) for row, start, count in pieces]
        return self._during_call(
            DecodeWithPrompts(self._decode_of(rows, lengths, positions), fills)
        )

    def _fill_of(
        self, rows: Sequence[Row], starts: Sequence[int], counts: Sequence[int], width: int
    ) -> Fill:
        for row, start, count in zip(rows, starts, counts, strict=True):
            row.written_columns = max(row.written_columns, start + count)
        return Fill(rows, starts, counts, width)

    def _decode_of(self, rows: Sequence[Row], lengths: Sequence[int], positions: Tensor) -> Decode:
        call = Decode(rows, lengths, positions)
        for row, length in zip(rows, lengths, strict=True):
            row.written_columns = max(row.written_columns, length + 1)
        return call

    @contextmanager
    def _during_call(self, call: Fill | Decode | DecodeWithPrompts) -> Iterator[None]:
        self.call = CALL_STATE.call = call
        try:
            yield
        finally:
            self.call = CALL_STATE.call = None
        if call.layers_stored != call.layers_attended:
            raise RuntimeError(
                f"{call.layers_stored} layers stored keys and {call.layers_attended} asked for "
                "attention: the model's attention is not the slots' any more"
            )

    @property
    def block_elements(self) -> int:
        """The number of elements in the keys and values of ``BLOCK`` tokens of a row, in all
        layers."""
        widths = (form.heads * (form.key_width + form.value_width) for form in self.forms)
        return BLOCK * sum(widths)

    @property
    def block_dtype(self) -> torch.dtype:
        """A dtype that holds the keys and values of all layers exactly."""
        return reduce(torch.promote_types, (form.dtype for form in self.forms))

    def read_blocks(self, row: Row, first: int, stop: int) -> list[Tensor]:
        """Copies of the blocks ``first`` … ``stop`` − 1 of a row, [``block_elements``] each, with
        the keys and values of ``BLOCK`` tokens."""
        blocks: list[Tensor] = []
        for start in range(first, stop, MAX_COPIED_BLOCKS):
            count = min(MAX_COPIED_BLOCKS, stop - start)
            stacked_blocks = torch.empty(
                count, self.block_elements, dtype=self.block_dtype, device=self.device
            )
            for row_view, copied_view in self._block_views(row, stacked_blocks, start):
                copied_view.copy_(row_view)
            # cloned, so that each can be freed separately
            blocks += [block.clone() for block in stacked_blocks]
        return blocks

    def write_blocks(self, row: Row, blocks: Sequence[Tensor]) -> None:
        """Copy ``blocks``, as ``read_blocks`` returns them, into the first columns of a row."""
        row.written_columns = max(row.written_columns, len(blocks) * BLOCK)
        for start in range(0, len(blocks), MAX_COPIED_BLOCKS):
            stacked_blocks = torch.stack(list(blocks[start : start + MAX_COPIED_BLOCKS]))
            for row_view, copied_view in self._block_views(row, stacked_blocks, start):
                row_view.copy_(copied_view)

    def _block_views(
        self, row: Row, stacked_blocks: Tensor, first: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (view of a layer's keys or values in a row, from block ``first`` on; view of the
        part of ``stacked_blocks`` that holds their copy), both [kv, blocks, BLOCK, d], for the keys
        and the values of each layer. ``stacked_blocks``: [blocks, ``block_elements``]."""
        count, offset = len(stacked_blocks), 0
        columns = slice(first * BLOCK, (first + count) * BLOCK)
        for layer in row.size_class.layers:
            for tensor in (layer.keys, layer.values):
                heads, width = tensor.shape[1], tensor.shape[3]
                element_count = heads * BLOCK * width
                copied_view = stacked_blocks[:, offset : offset + element_count].view(
                    count, heads, BLOCK, width
                )
                row_view = tensor[row.index, :, columns].view(heads, count, BLOCK, width)
                yield row_view, copied_view.transpose(0, 1)
                offset += element_count

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Store a layer's new keys and values [b, kv, s, ·], and return them, as ``Cache.update``
        must. The attention of the call reads the stored keys and values, not the returned ones."""
        if self.call is None:
            raise RuntimeError(
                "Slots hold the rows of an engine: call the model within fill or decode"
            )
        self.call.layers_stored += 1
        self.call.store(layer_idx, key_states, value_states)
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0  # positions are passed in each call, so transformers does not need the length

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return query_length, 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return self.length
