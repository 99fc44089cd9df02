"""Rows of one batch that use different adapters: ``with veneer.use(model, ["a", None, "b"]):
model(x)``.

Every layer takes the rows of each distinct adapter out of its inputs, runs on them alone, and puts
the outputs back in order (``layer_rows.py``). The modules that it calls in such a run use the same
adapter. This works for every layer whose inputs hold the rows along an axis that its kind knows
(``Layer.take``), and is an error for any other. Linear layers have faster paths
(``linear_rows.py``).
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
        selections: what the rows use, each distinct ``ActiveAdapter`` once.
        row_indices: for each selection the indices of the rows that use it, int64 [n].
        count: the number of rows of the batch.
        time_first: whether a module of the model takes inputs that hold the rows along the second
            axis.
        any_adapter: False if every row uses the base alone; layers then only check the number of
            rows.
        order: the permutation that brings the concatenated outputs of the selections back into the
            order of the batch, int64 [count].
        row_ranges: for each selection its first row and the one after its last, if its rows are
            neighbours and the selections are in the order of the rows; else None.
        selection_of_row: for each row the number of its selection.
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
        self.any_adapter = any(selected is not BASE for selected in selections)
        self.order = torch.cat(list(row_indices)).argsort()
        self.row_ranges = _contiguous_ranges(row_indices)
        self._indices_on_device: dict[torch.device, tuple[Sequence[Tensor], Tensor]] = {}
        self._constants: dict[Any, Tensor] = {}
        self._layer_rows: dict[Any, LayerRows] = {}
        selection_by_row = {
            row: number for number, indices in enumerate(row_indices) for row in indices.tolist()
        }
        self.selection_of_row = [selection_by_row[row] for row in range(count)]

    def __getitem__(self, key: Any) -> Any:
        # ``table`` raises if an adapter has been detached
        layer_adapters = [selected.table.get(key) for selected in self.selections]
        layer_rows = self._layer_rows.get(key)
        if layer_rows is None or layer_rows.layer_adapters != layer_adapters:
            if all(layer_adapter is None for layer_adapter in layer_adapters) and self.any_adapter:
                raise KeyError(key)
            layer_rows = self._layer_rows[key] = LayerRows(self, layer_adapters)
        return layer_rows

    def __contains__(self, key: Any) -> bool:
        return not self.any_adapter or any(key in selected.table for selected in self.selections)

    def are_rows_of(self, x: Any) -> bool:
        """Whether the first axis of x holds the rows of the batch, and no other axis may."""
        if not isinstance(x, Tensor) or x.ndim < 2 or len(x) != self.count:
            return False
        return not (self.time_first and x.ndim > 2 and x.shape[1] == self.count)

    def indices_for(self, inputs: Any) -> tuple[Sequence[Tensor], Tensor]:
        """``row_indices`` and ``order`` on the device of a call's inputs; copied once a device."""
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
        """At least ``count`` zeros, to be read only: factors that change nothing."""
        key = like.dtype, like.device
        if key not in self._constants or len(self._constants[key]) < count:
            with torch.inference_mode(False):
                self._constants[key] = torch.zeros(count, dtype=like.dtype, device=like.device)
        return self._constants[key]

    def scales(self, selection_scales: Sequence[float], like: Tensor) -> Tensor:
        """The scale of each row, [N, 1, 1], from the scales of the selections."""
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
    def only(self, selected: ActiveAdapter, is_leaf: bool = False) -> Iterator[None]:
        """A block in which one of the selections is selected alone, with its own random numbers.

        ``is_leaf``: nothing that runs in the block looks the selection up, so that it need not be
        set.
        """
        if selected.stream is None and is_leaf:
            yield
            return
        with (
            context.override({self.uid: selected}),
            selected.stream or nullcontext(),
        ):
            yield

    def __iter__(self):
        return iter(
            dict.fromkeys(
                key for selected in self.selections for key in selected.layer_adapters or ()
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
    model: nn.Module, attached: ModelAdapters, selections: Sequence[ActiveAdapter]
) -> ActiveAdapter:
    """A selection that uses ``selections[i]`` for row i; rows that use the same adapter hold the
    same object."""
    distinct = list(dict.fromkeys(selections))
    if not distinct:
        raise SelectionError(
            "no names", "one name or None for each row", "name an adapter for each row"
        )
    row_indices = [
        torch.tensor([i for i, choice in enumerate(selections) if choice is selected], device="cpu")
        for selected in distinct
    ]
    row_adapters = RowAdapters(
        attached.uid, distinct, row_indices, len(selections), time_first(model)
    )
    merged = (
        distinct[0].name if len(distinct) == 1 and distinct[0].name == attached.merged else None
    )
    return ActiveAdapter(merged, row_adapters, common_base_adapter(distinct))


def time_first(model: nn.Module) -> bool:
    """Whether a module of the model takes inputs that hold the rows along the second axis."""
    return any(getattr(module, "batch_first", True) is False for _, module in walk(model))
