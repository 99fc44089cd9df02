"""One layer in a batch whose rows use different adapters: split the inputs by adapter, run each
piece, and put the outputs back in order.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from veneer.attach.layer.adapted_module import base_forward, method_of
from veneer.attach.layer.call import Call
from veneer.attach.rows.linear_rows import LinearRows
from veneer.attach.rows.routed_rows import spread, tokens_a_row
from veneer.distributed import base_class
from veneer.errors import SelectionError
from veneer.layers import LAYERS, Layer
from veneer.layers._base import GENERAL

#: arguments that hold no rows, and tensors, whose rows can be taken out
_DIVISIBLE = (Tensor, bool, int, float, complex, str, Enum, torch.Size, torch.dtype, torch.device)


class LayerRows:
    """One layer in a batch whose rows select different adapters, with the interface of
    ``LayerAdapter``.

    ``layer_adapters``: for each selection of ``rows``, the object with the interface of
    ``LayerAdapter`` at this layer, or None if it changes nothing here.
    """

    def __init__(self, rows: Any, layer_adapters: Sequence[Any]) -> None:
        self.rows, self.layer_adapters = rows, layer_adapters
        self.linear = LinearRows(rows, layer_adapters)

    def reached_ids(self, method: str = "forward") -> Iterator[int]:
        for layer_adapter in self.layer_adapters:
            yield from () if layer_adapter is None else layer_adapter.reached_ids(method)

    def run(self, call: Call) -> Any:
        """As ``LayerAdapter.run``."""
        if len(self.layer_adapters) == 1:
            return self._run_single(call)
        one_input = len(call.args) == 1 and not call.kwargs and call.method == "forward"
        seeds: list[int | None] = [None] * len(self.layer_adapters)
        if one_input and call.context.path is None:
            y, seeds = self.linear.output(call.module, call.layer_state, call.args[0])
            if y is not None:
                return y
        return self._run_split(call, seeds)

    def _run_split(self, call: Call, seeds: Sequence[int | None]) -> Any:
        """Run the layer once for each selection, on its rows."""
        module, base, layer_state, args, kwargs, _, method, *_ = call
        rows, kind = self.rows, _kind_for(layer_state, method)
        is_leaf = _is_leaf(module, layer_state)
        tokens = tokens_a_row(module, (args, kwargs), rows.count) if kind.name == GENERAL else None
        if tokens is not None and tokens > 1 and rows.time_first:
            tokens = None
        problem = self._division_problem(
            kind, (args, kwargs), is_leaf, is_routed=tokens is not None
        )
        if problem is not None:
            raise _division_error(module, problem)
        outputs = []
        row_indices, order = rows.indices_for(
            args[0] if args and isinstance(args[0], Tensor) else (args, kwargs)
        )
        for selected, indices, layer_adapter, seed in zip(
            rows.selections, row_indices, self.layer_adapters, seeds, strict=True
        ):
            row_args, row_kwargs = self._take(
                kind, module, args, kwargs, spread(indices, tokens or 1), tokens or 1
            )
            with rows.only(selected, is_leaf):
                if layer_adapter is None:
                    outputs.append(method_of(base, method)(module, *row_args, **row_kwargs))
                else:
                    # no name for the call: it would hold these rows while the next are taken
                    outputs.append(
                        layer_adapter.run(
                            call._replace(args=row_args, kwargs=row_kwargs, share=False, seed=seed)
                        )
                    )
        return kind.put(module, outputs, spread(order, tokens or 1))

    def _run_single(self, call: Call) -> Any:
        """The output if all rows use the same selection: that of a plain call, once the number of
        rows is checked."""
        module, base, layer_state, args, kwargs, _, method, *_ = call
        rows, (layer_adapter,), (selected,) = self.rows, self.layer_adapters, self.rows.selections
        kind = _kind_for(layer_state, method)
        x = args[0] if len(args) == 1 and not kwargs else None
        if not (
            type(kind).take is Layer.take
            and isinstance(x, Tensor)
            and x.ndim
            and len(x) == rows.count
        ):
            tokens = (
                tokens_a_row(module, (args, kwargs), rows.count) if kind.name == GENERAL else None
            )
            first_row = spread(rows.row_indices[0][:1], tokens or 1)
            self._take(kind, module, args, kwargs, first_row, tokens or 1)
        with rows.only(selected, _is_leaf(module, layer_state)):
            if layer_adapter is not None:
                return layer_adapter.run(call)
            if method == "forward":
                return base_forward(module, base, *args, **kwargs)
            return method_of(base, method)(module, *args, **kwargs)

    def _take(
        self, kind: Layer, module: Any, args: tuple, kwargs: Any, indices: Tensor, tokens: int
    ) -> Any:
        """The arguments of a call for these rows; ``tokens``: how many of them each row of the
        batch has."""
        try:
            return kind.take(module, args, kwargs, indices, self.rows.count * tokens)
        except LookupError:
            raise _division_error(
                module, f"whose inputs do not hold the {self.rows.count} rows of the batch"
            ) from None

    def _division_problem(
        self, kind: Layer, inputs: Any, is_leaf: bool, is_routed: bool
    ) -> str | None:
        """Why the rows of a call cannot be told apart, or None.

        An argument may be an object that cannot be divided, such as a cache. Or two axes of a
        tensor have as many entries as the batch has rows: in a model with time first, or in a mask
        [time, time] of a module that calls others.
        """
        for value in () if is_leaf else _indivisible_values(inputs):
            return f"given a {type(value).__name__}, which cannot be divided into rows"
        if is_routed or type(kind).take is not Layer.take:
            return None
        square, leaves = (
            (self.rows.count,) * 2,
            [x for x in pytree.tree_leaves(inputs) if isinstance(x, Tensor)],
        )
        may_have_mask = not is_leaf and len(leaves) > 1
        ambiguous = any(
            (
                may_have_mask
                if x.dim() == 2 and (x.is_floating_point() or x.dtype == torch.bool)
                else self.rows.time_first
            )
            for x in leaves
            if x.shape[:2] == square
        )
        return (
            f"with {self.rows.count} along two axes, of which either may be the rows"
            if ambiguous
            else None
        )


def _kind_for(layer_state: Any, method: str) -> Any:
    """The layer kind that divides the inputs of a method."""
    return (layer_state.layer if method == "forward" else None) or LAYERS[GENERAL]


def _is_leaf(module: Any, layer_state: Any) -> bool:
    """Whether no module below this one looks up the selection."""
    return all(child is layer_state for child in module._modules.values())


def _division_error(module: nn.Module, reason: str) -> SelectionError:
    do = "exclude that layer, or run each adapter on its rows alone"
    return SelectionError(f"a {base_class(module).__name__} {reason}", "one row an adapter", do)


def _indivisible_values(value: Any) -> Iterator[Any]:
    """The objects in a call's arguments that may hold rows which cannot be taken out, such as a
    cache of keys and values."""
    if isinstance(value, dict):
        value = tuple(value.values())
    if type(value) in (tuple, list):
        for element in value:
            yield from _indivisible_values(element)
    elif not (value is None or callable(value) or isinstance(value, _DIVISIBLE)):
        yield value
