"""Rows of one batch that use different adapters: ``with veneer.use(model, ["a", None, "b"]):
model(x)``.

Every adapted layer takes the rows of each distinct adapter out of its inputs, runs on these rows
alone, and puts the outputs back in order (``layer_rows.py``). Modules that the layer calls in such
a run use the same adapter. This works for a layer if its kind knows along which axis the inputs
hold the rows (``Layer.take``). A call of any other layer is an error. Linear layers have faster
paths (``linear_rows.py``).
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
    """The adapters of the rows of one batch: a mapping from a layer's key to its ``LayerRows``.

    Attributes:
        selections: each distinct ``ActiveAdapter`` that rows use.
        row_indices: for each selection the indices of the rows that use it, int64 [n].
        count: the number of rows of the batch.
        time_first: whether a module of the model takes inputs [time, batch, …], which hold the rows
            along the second axis.
        any_adapter: whether at least one row uses an adapter. If all rows use the base, layers only
            check the number of rows.
        order: the permutation that brings the concatenated outputs of the selections back into the
            order of the batch, int64 [count].
        row_ranges: for each selection the index of its first row and the index after its last row.
            None unless the rows of each selection are neighbours, in the order of the selections.
        selection_of_row: for each row the index of its selection.
    """

    def __init__(
        self,
        uid: str,
        selections: Sequence[ActiveAdapter],
        row_indices: Sequence[Tensor],
        count: int,
        time_first: bool,
    ) -> None:
        self.uid, self.count, self.time_first = uid, count, time_first
        self.selections, self.row_indices = selections, row_indices
        self.any_adapter = any(selection is not BASE for selection in selections)
        self.order = torch.cat(list(row_indices)).argsort()
        self.row_ranges = _contiguous_ranges(row_indices)
        self._indices_on_device: dict[torch.device, tuple[Sequence[Tensor], Tensor]] = {}
        self._constants: dict[Any, Tensor] = {}
        self._layer_rows: dict[Any, LayerRows] = {}
        selection_by_row = {
            row: index for index, indices in enumerate(row_indices) for row in indices.tolist()
        }
        self.selection_of_row = [selection_by_row[row] for row in range(count)]

    def __getitem__(self, key: Any) -> Any:
        # raises an error if an adapter has been detached
        layer_adapters = [selection.usable_layer_adapters.get(key) for selection in self.selections]
        layer_rows = self._layer_rows.get(key)
        if layer_rows is None or layer_rows.layer_adapters != layer_adapters:
            if all(layer_adapter is None for layer_adapter in layer_adapters) and self.any_adapter:
                raise KeyError(key)
            layer_rows = self._layer_rows[key] = LayerRows(self, layer_adapters)
        return layer_rows

    def __contains__(self, key: Any) -> bool:
        return not self.any_adapter or any(
            key in selection.usable_layer_adapters for selection in self.selections
        )

    def are_rows_of(self, x: Any) -> bool:
        """Whether x holds the rows of the batch along its first axis, and along no other axis."""
        if not isinstance(x, Tensor) or x.ndim < 2 or len(x) != self.count:
            return False
        return not (self.time_first and x.ndim > 2 and x.shape[1] == self.count)

    def indices_for(self, inputs: Any) -> tuple[Sequence[Tensor], Tensor]:
        """``row_indices`` and ``order`` on the device of a call's inputs. They are copied once for
        each device."""
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
                .split([*map(len, self.row_indices), self.count])
            )
            self._indices_on_device[device] = row_indices, order
        return self._indices_on_device[device]

    def zeros(self, count: int, like: Tensor) -> Tensor:
        """A cached tensor of at least ``count`` zeros, from which the factors of rows without a
        change are taken. Do not write to it: all layers and calls share it."""
        key = like.dtype, like.device
        if key not in self._constants or len(self._constants[key]) < count:
            with torch.inference_mode(False):
                self._constants[key] = torch.zeros(count, dtype=like.dtype, device=like.device)
        return self._constants[key]

    def scales(self, selection_scales: Sequence[float], like: Tensor) -> Tensor:
        """The scale of each row, [number of rows, 1, 1], in the dtype of ``like``.
        ``selection_scales`` are the scales by selection."""
        key = *selection_scales, like.dtype, like.device
        if key not in self._constants:
            with torch.inference_mode(False):
                row_scales = torch.tensor(
                    [selection_scales[number] for number in self.selection_of_row], dtype=like.dtype
                )
                row_scales = row_scales[:, None, None]
                self._constants[key] = row_scales.to(like.device, non_blocking=True)
        return self._constants[key]

    @contextmanager
    def only(self, selection: ActiveAdapter, is_leaf: bool = False) -> Iterator[None]:
        """A context manager that selects one of the selections alone, with the random stream of its
        adapter.

        ``is_leaf``: whether no code inside of the block looks up the selection. Then the context
        need not be changed, which saves time.
        """
        if selection.random_stream is None and is_leaf:
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
                key for selection in self.selections for key in selection.layer_adapters or ()
            )
        )

    def __len__(self) -> int:
        return len(list(iter(self)))


def _contiguous_ranges(row_indices: Sequence[Tensor]) -> list[tuple[int, int]] | None:
    rows = [row for indices in row_indices for row in indices.tolist()]
    return (
        [*pairwise(accumulate(map(len, row_indices), initial=0))]
        if rows == list(range(len(rows)))
        else None
    )


def by_rows(
    model: nn.Module, model_adapters: ModelAdapters, selections: Sequence[ActiveAdapter]
) -> ActiveAdapter:
    """A selection that uses ``selections[i]`` for row i. Rows that use the same adapter must have
    the same ``ActiveAdapter`` object."""
    distinct_selections = list(dict.fromkeys(selections))
    if not distinct_selections:
        raise SelectionError(
            "no names", "one name or None for each row", "name an adapter for each row"
        )
    row_indices = [
        torch.tensor(
            [i for i, selection in enumerate(selections) if selection is selected], device="cpu"
        )
        for selected in distinct_selections
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
