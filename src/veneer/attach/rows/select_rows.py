"""Rows of one batch that use different adapters: ``with veneer.use(model, ["a", None, "b"]):
model(x)``.

Every adapted layer takes the rows of each distinct adapter out of its inputs, runs on these rows
alone, and puts the outputs back in order (``layer_rows.py``). While it runs on the rows of an
adapter, the modules that it calls use that adapter too. The layer's kind tells along which axis its
inputs hold the rows (``Layer.take``); a call whose inputs cannot be divided into rows raises an
error. Linear layers have faster paths (``linear_rows.py``).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from veneer import context
from veneer.attach.layer.adapted_module import walk
from veneer.attach.layer.state import BASE, ActiveAdapter, ModelAdapters
from veneer.attach.rows.blend import common_base_adapter
from veneer.attach.rows.layer_rows import LayerRows
from veneer.errors import SelectionError


class RowAdapters(Mapping[Any, Any]):
    """The adapters of the rows of one batch: a mapping from the key of a layer (``LayerState.key``)
    to its ``LayerRows``, which runs the layer for all rows.

    Attributes:
        uid: identifies the model in ``context.Context.selection``.
        selections: each distinct ``ActiveAdapter`` that rows use.
        row_indices: for each selection the indices of the rows that use it, an int64 vector.
        row_count: the number of rows of the batch.
        time_first: whether a module of the model takes inputs [time, batch, …], which hold the rows
            along the second axis.
        has_adapter: whether at least one row uses an adapter. If all rows use the base, layers only
            check the number of rows.
        order: for each row of the batch, the index of its output in the concatenated outputs of the
            selections, int64 [row_count].
        row_ranges: for each selection the index of its first row and the index after its last row.
            None unless the rows of each selection are neighbours, in the order of the selections.
        selection_index_by_row: for each row the index of its selection in ``selections``.
    """

    def __init__(
        self,
        uid: str,
        selections: Sequence[ActiveAdapter],
        row_indices: Sequence[Tensor],
        row_count: int,
        time_first: bool,
    ) -> None:
        self.uid, self.row_count, self.time_first = uid, row_count, time_first
        self.selections, self.row_indices = selections, row_indices
        self.has_adapter = any(selection is not BASE for selection in selections)
        self.order = torch.cat(list(row_indices)).argsort()
        self.row_ranges = _contiguous_ranges(row_indices)
        self._indices_on_device: dict[torch.device, tuple[Sequence[Tensor], Tensor]] = {}
        self._constants: dict[Any, Tensor] = {}
        self._layer_rows: dict[Any, LayerRows] = {}
        selection_index_by_row = {
            row: selection_index
            for selection_index, indices in enumerate(row_indices)
            for row in indices.tolist()
        }
        self.selection_index_by_row = [selection_index_by_row[row] for row in range(row_count)]

    def __getitem__(self, layer_key: Any) -> Any:
        # read at every lookup, because this raises an error once an adapter has been detached
        layer_adapters = [
            selection.usable_layer_adapters.get(layer_key) for selection in self.selections
        ]
        layer_rows = self._layer_rows.get(layer_key)
        if layer_rows is None or layer_rows.layer_adapters != layer_adapters:
            if all(layer_adapter is None for layer_adapter in layer_adapters) and self.has_adapter:
                raise KeyError(layer_key)
            layer_rows = self._layer_rows[layer_key] = LayerRows(self, layer_adapters)
        return layer_rows

    def __contains__(self, layer_key: Any) -> bool:
        return not self.has_adapter or any(
            layer_key in selection.usable_layer_adapters for selection in self.selections
        )

    def are_rows_of(self, x: Any) -> bool:
        """Whether x is a tensor of two axes or more that holds the rows of the batch along the
        first. False if the second of three or more axes could be the rows too: it is as long, and
        the model has modules with inputs [time, batch, …]."""
        if not isinstance(x, Tensor) or x.ndim < 2 or len(x) != self.row_count:
            return False
        return not (self.time_first and x.ndim > 2 and x.shape[1] == self.row_count)

    def indices_for(self, inputs: Any) -> tuple[Sequence[Tensor], Tensor]:
        """``row_indices`` and ``order`` on the device of ``inputs``, a tensor or a tree of
        arguments. They are copied to each device once, because a copy costs time in every layer."""
        if not isinstance(inputs, Tensor):
            inputs = next(
                (leaf for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, Tensor)),
                self.order,
            )
        if inputs.is_cpu:
            return self.row_indices, self.order
        device = inputs.device
        if device not in self._indices_on_device:
            *row_indices, order = (
                torch.cat([*self.row_indices, self.order])
                .to(device, non_blocking=True)
                .split([*map(len, self.row_indices), self.row_count])
            )
            self._indices_on_device[device] = row_indices, order
        return self._indices_on_device[device]

    def zeros(self, element_count: int, like: Tensor) -> Tensor:
        """A cached vector of at least ``element_count`` zeros, with the dtype and device of
        ``like``. Batched kernels read A and B of rows without a change from it. Do not write to it:
        all layers and calls share it."""
        cache_key = like.dtype, like.device
        if cache_key not in self._constants or len(self._constants[cache_key]) < element_count:
            with torch.inference_mode(False):
                self._constants[cache_key] = torch.zeros(
                    element_count, dtype=like.dtype, device=like.device
                )
        return self._constants[cache_key]

    def scales(self, selection_scales: Sequence[float], like: Tensor) -> Tensor:
        """The scale of ΔW for each row, [row_count, 1, 1], with the dtype and device of ``like``.
        ``selection_scales`` are the scales of ``selections``. The result is cached."""
        cache_key = *selection_scales, like.dtype, like.device
        if cache_key not in self._constants:
            with torch.inference_mode(False):
                row_scales = torch.tensor(
                    [
                        selection_scales[selection_index]
                        for selection_index in self.selection_index_by_row
                    ],
                    dtype=like.dtype,
                )
                row_scales = row_scales[:, None, None]
                self._constants[cache_key] = row_scales.to(like.device, non_blocking=True)
        return self._constants[cache_key]

    @contextmanager
    def only(self, selection: ActiveAdapter, no_lookups: bool = False) -> Iterator[None]:
        """A context manager in which calls of the model use only ``selection``, one of
        ``selections``, and random numbers come from its own stream, if it has one.

        ``no_lookups``: whether no code inside of the block looks up the selection. Then the context
        need not be changed, which saves time.
        """
        if selection.random_stream is None and no_lookups:
            yield
            return
        with (
            context.override({self.uid: selection}),
            selection.random_stream or nullcontext(),
        ):
            yield

    def __iter__(self):
        return iter(
            dict.fromkeys(
                layer_key
                for selection in self.selections
                for layer_key in selection.layer_adapters or ()
            )
        )

    def __len__(self) -> int:
        return len(list(iter(self)))


def _contiguous_ranges(row_indices: Sequence[Tensor]) -> list[tuple[int, int]] | None:
    """For each vector of row indices (first row, last row + 1). None unless the vectors, one after
    the other, count the rows from 0 upwards."""
    rows = [row for indices in row_indices for row in indices.tolist()]
    return (
        [*pairwise(accumulate(map(len, row_indices), initial=0))]
        if rows == list(range(len(rows)))
        else None
    )


def by_rows(
    model: nn.Module, model_adapters: ModelAdapters, selections: Sequence[ActiveAdapter]
) -> ActiveAdapter:
    """An ``ActiveAdapter`` for a call of ``model`` in which row i uses ``selections[i]``. Rows that
    use the same adapter must have the same ``ActiveAdapter`` object.

    Raises:
        SelectionError: ``selections`` is empty, or the adapters were attached to different weights.
    """
    distinct_selections = list(dict.fromkeys(selections))
    if not distinct_selections:
        raise SelectionError(
            "no names", "one name or None for each row", "name an adapter for each row"
        )
    row_indices = [
        torch.tensor(
            [i for i, selection in enumerate(selections) if selection is distinct_selection],
            device="cpu",
        )
        for distinct_selection in distinct_selections
    ]
    row_adapters = RowAdapters(
        model_adapters.uid, distinct_selections, row_indices, len(selections), time_first(model)
    )
    first_name = distinct_selections[0].name
    is_merged_adapter = len(distinct_selections) == 1 and first_name == model_adapters.merged
    return ActiveAdapter(
        first_name if is_merged_adapter else None,
        row_adapters,
        common_base_adapter(distinct_selections),
    )


def time_first(model: nn.Module) -> bool:
    """Whether a module of the model takes inputs [time, batch, …], as recurrent layers do unless
    ``batch_first`` is set."""
    return any(getattr(module, "batch_first", True) is False for _, module in walk(model))
