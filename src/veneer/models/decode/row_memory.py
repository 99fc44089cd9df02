"""The memory of the KV cache: size classes of rows, each with one tensor of keys and one of values
for each layer of the model."""

from __future__ import annotations

import time
from typing import NamedTuple

import torch
from torch import Tensor


class LayerForm(NamedTuple):
    """The sizes, dtype and device of a layer's keys and values. ``heads``: the number of key-value
    heads. ``key_width``, ``value_width``: the sizes of one head's key and value for one token."""

    heads: int
    key_width: int
    value_width: int
    dtype: torch.dtype
    device: torch.device

    @property
    def token_bytes(self) -> int:
        """Bytes of the keys and values of one token."""
        return self.heads * (self.key_width + self.value_width) * self.dtype.itemsize

    @property
    def larger_tensor_bytes(self) -> int:
        """Bytes of the keys, or of the values, of one token, whichever are larger."""
        return self.heads * max(self.key_width, self.value_width) * self.dtype.itemsize


class Row:
    """The row of one sequence in a size class. ``index``: the index of the row in the class's
    tensors. It changes if another row is freed and this row, as the last one, takes its index.
    ``written_columns``: how many of its first columns have been written; the others are zero."""

    def __init__(self, size_class: SizeClass, index: int) -> None:
        self.size_class, self.index, self.written_columns = size_class, index, 0

    @property
    def columns(self) -> int:
        """The most tokens that the row can hold."""
        return self.size_class.columns

    @property
    def position(self) -> tuple[int, int]:
        """The key by which the rows of a decode call are sorted: (columns of the class, index)."""
        return self.size_class.columns, self.index


class LayerMemory:
    """Keys and values of one layer in one size class, and views of them. Shapes: kv is the number
    of key-value heads, d the size of a key, and e the size of a value."""

    keys: Tensor  # [rows, kv, columns, d]
    values: Tensor  # [rows, kv, columns, e]

    def __init__(self, form: LayerForm, row_count: int, column_count: int) -> None:
        empty_tensor = torch.empty(0, dtype=form.dtype, device=form.device)
        self.keys = empty_tensor.new_zeros(row_count, form.heads, column_count, form.key_width)
        self.values = empty_tensor.new_zeros(row_count, form.heads, column_count, form.value_width)
        self._reset_views()

    def _reset_views(self) -> None:
        tensors = self.keys, self.values
        #: the keys [rows · kv · columns, d] and the values [rows · kv · columns, e]
        self.flat_views = tuple(tensor.view(-1, tensor.shape[-1]) for tensor in tensors)
        self._views: dict[tuple[int, int, int], tuple[Tensor, Tensor]] = {}

    def views(self, first: int, count: int, columns: int) -> tuple[Tensor, Tensor]:
        """Views [count, kv, columns, ·] of the keys and of the values of ``count`` rows from the
        row ``first`` on, in their first ``columns`` columns. The last few views are cached, because
        successive calls of the model mostly need the same ones."""
        cache_key = first, count, columns
        if cache_key not in self._views:
            if len(self._views) >= 8:
                self._views.clear()
            row_slice = slice(first, first + count)
            self._views[cache_key] = (
                self.keys[row_slice, :, :columns],
                self.values[row_slice, :, :columns],
            )
        return self._views[cache_key]

    @property
    def nbytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes

    def resize(self, row_count: int, used_count: int, *, grows: bool) -> None:
        """Allocate memory for ``row_count`` rows and copy the first ``used_count`` rows into it. If
        ``grows``, a tensor that already has at least ``row_count`` rows is left as it is: an
        earlier attempt to grow, which ran out of memory, has allocated it."""
        # one tensor after the other, so that at most one of them exists twice at a time
        for name in ("keys", "values"):
            old_tensor = getattr(self, name)
            if not (grows and len(old_tensor) >= row_count):
                new_tensor = old_tensor.new_zeros(row_count, *old_tensor.shape[1:])
                new_tensor[:used_count] = old_tensor[:used_count]
                setattr(self, name, new_tensor)
                self._reset_views()
            del old_tensor


class SizeClass:
    """Rows of up to ``columns`` tokens. Each layer has memory for ``capacity`` rows; the first
    ``len(rows)`` of them are in use. ``forms``: the sizes, dtype and device of each layer's keys
    and values, in a list that all size classes of a cache share. The first call of the model
    appends the forms that are missing."""

    def __init__(self, columns: int, forms: list[LayerForm]) -> None:
        self.columns, self.forms, self.capacity = columns, forms, 0
        self.rows: list[Row] = []
        self.layers: list[LayerMemory] = []
        self.emptied_at = time.monotonic()  # when the class became empty

    @property
    def nbytes(self) -> int:
        return sum(layer.nbytes for layer in self.layers)

    @property
    def row_bytes(self) -> int:
        return self.columns * sum(form.token_bytes for form in self.forms)

    def largest_tensor_bytes(self, capacity: int) -> int:
        largest_bytes = max((form.larger_tensor_bytes for form in self.forms), default=0)
        return capacity * self.columns * largest_bytes

    def layer(self, index: int, key: Tensor, value: Tensor) -> LayerMemory:
        """The memory of the layer ``index``, which is allocated if it is missing. If the form of
        the layer is not known yet, it is that of ``key`` and ``value``, [·, key-value heads, ·,
        size]."""
        while len(self.layers) <= index:
            if len(self.forms) == len(self.layers):
                widths = key.shape[-1], value.shape[-1]
                self.forms.append(LayerForm(key.shape[1], *widths, key.dtype, key.device))
            self.layers.append(
                LayerMemory(self.forms[len(self.layers)], self.capacity, self.columns)
            )
        return self.layers[index]

    def resize(self, capacity: int) -> None:
        """Allocate memory for ``capacity`` rows, one layer at a time. If memory runs out, torch's
        error is raised, ``capacity`` stays as it was, and layers that have grown already keep their
        memory for the next attempt."""
        grows = capacity > self.capacity
        for index, form in enumerate(self.forms):
            if index == len(self.layers):
                self.layers.append(LayerMemory(form, capacity, self.columns))
            else:
                self.layers[index].resize(capacity, len(self.rows), grows=grows)
        self.capacity = capacity

    def take(self) -> Row:
        """Return a new row after the last one. The caller must ensure that ``capacity`` is larger
        than the number of rows."""
        row = Row(self, len(self.rows))
        self.rows.append(row)
        return row

    def release(self, row: Row) -> None:
        """Free a row. Its keys and values are overwritten by those of the last row, which takes its
        index. The former memory of the last row is set to zero, so that no key or value of an ended
        request remains."""
        last_row = self.rows.pop()
        written_columns = max(row.written_columns, last_row.written_columns)
        for layer_memory in self.layers:
            for tensor in (layer_memory.keys, layer_memory.values):
                if row is not last_row:
                    tensor[row.index, :, :written_columns] = tensor[
                        last_row.index, :, :written_columns
                    ]
                tensor[last_row.index, :, : last_row.written_columns] = 0
        if row is not last_row:
            self.rows[row.index], last_row.index = last_row, row.index
        if not self.rows:
            self.emptied_at = time.monotonic()
