"""Run one layer in a batch whose rows use different adapters: the inputs are split by adapter, the
layer runs on the rows of each adapter, and the outputs are put back in the order of the batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from veneer.attach.layer.adapted_module import base_forward, method_of
from veneer.attach.layer.state import Call
from veneer.attach.rows.linear_rows import LinearRows
from veneer.distributed import base_class
from veneer.errors import SelectionError
from veneer.layers import GENERAL_KIND, Layer

#: types of arguments that can be passed on: Tensor, out of which rows can be taken, and types whose
#: values hold no rows
_DIVISIBLE = (Tensor, bool, int, float, complex, str, Enum, torch.Size, torch.dtype, torch.device)


class LayerRows:
    """One layer in a batch whose rows use different adapters. It has the interface of a
    ``LayerAdapter``, one adapter's changes at a layer.

    Args:
        row_adapters: the ``RowAdapters`` of the batch: which row uses which selection.
        layer_adapters: for each selection, the object that computes this layer, such as a
            ``LayerAdapter``; None if the selection does not change the layer.
    """

    def __init__(self, row_adapters: Any, layer_adapters: Sequence[Any]) -> None:
        self.row_adapters, self.layer_adapters = row_adapters, layer_adapters
        self.linear = LinearRows(row_adapters, layer_adapters)

    def reached_ids(self, method: str = "forward") -> Iterator[int]:
        for layer_adapter in self.layer_adapters:
            yield from () if layer_adapter is None else layer_adapter.reached_ids(method)

    def run(self, call: Call) -> Any:
        """The output of a call of the layer in which each row uses its adapter.

        Raises:
            SelectionError: the inputs cannot be divided into the rows of the batch.
        """
        if len(self.layer_adapters) == 1:
            return self._run_single(call)
        has_one_input = len(call.args) == 1 and not call.kwargs and call.method == "forward"
        seeds: list[int | None] = [None] * len(self.layer_adapters)
        if has_one_input and call.context.path is None:
            y, seeds = self.linear.output(call.module, call.layer_state, call.args[0])
            if y is not None:
                return y
        return self._run_split(call, seeds)

    def _run_split(self, call: Call, seeds: Sequence[int | None]) -> Any:
        """Run the layer once for each selection, on the rows that use it, and join the outputs.
        ``seeds`` are the dropout seeds of the selections; the layer draws one where it is None."""
        module, base_cls, layer_state, args, kwargs, _, method, *_ = call
        row_adapters, kind = self.row_adapters, _kind_for(layer_state, method)
        is_leaf, may_look_up = (
            _is_leaf(module, layer_state),
            _looks_up_selection(module, layer_state),
        )
        tokens_per_row = _count_tokens_per_row(kind, module, (args, kwargs), row_adapters.row_count)
        # in a model with inputs [time, batch, …], the tokens of a row are not neighbours, so they
        # cannot be found by ``tokens_per_row``
        if tokens_per_row is not None and tokens_per_row > 1 and row_adapters.time_first:
            tokens_per_row = None
        problem = self._division_problem(
            kind, (args, kwargs), is_leaf, holds_routed_tokens=tokens_per_row is not None
        )
        if problem is not None:
            raise _division_error(module, problem)
        tokens_per_row = tokens_per_row or 1
        outputs = []
        row_indices, order = row_adapters.indices_for(
            args[0] if args and isinstance(args[0], Tensor) else (args, kwargs)
        )
        for selection, indices, layer_adapter, seed in zip(
            row_adapters.selections, row_indices, self.layer_adapters, seeds, strict=True
        ):
            row_args, row_kwargs = self._take(
                kind, module, args, kwargs, _token_indices(indices, tokens_per_row), tokens_per_row
            )
            with row_adapters.only(selection, not may_look_up):
                if layer_adapter is None:
                    outputs.append(_run_base(module, base_cls, method, row_args, row_kwargs))
                else:
                    # not in a variable, which would keep these rows in memory during the next run
                    outputs.append(
                        layer_adapter.run(
                            call._replace(
                                args=row_args, kwargs=row_kwargs, may_share=False, seed=seed
                            )
                        )
                    )
        return kind.put(module, outputs, _token_indices(order, tokens_per_row))

    def _run_single(self, call: Call) -> Any:
        """The output if all rows use the same selection: that of a plain call. As with several
        selections, a SelectionError is raised if the inputs do not hold the rows of the batch."""
        module, base_cls, layer_state, args, kwargs, _, method, *_ = call
        (layer_adapter,), (selection,) = self.layer_adapters, self.row_adapters.selections
        row_count = self.row_adapters.row_count
        kind = _kind_for(layer_state, method)
        x = args[0] if len(args) == 1 and not kwargs else None
        if not (
            type(kind).take is Layer.take
            and isinstance(x, Tensor)
            and x.ndim
            and len(x) == row_count
        ):
            tokens_per_row = _count_tokens_per_row(kind, module, (args, kwargs), row_count) or 1
            first_row = _token_indices(self.row_adapters.row_indices[0][:1], tokens_per_row)
            self._take(kind, module, args, kwargs, first_row, tokens_per_row)
        with self.row_adapters.only(selection, not _looks_up_selection(module, layer_state)):
            if layer_adapter is not None:
                return layer_adapter.run(call)
            return _run_base(module, base_cls, method, args, kwargs)

    def _take(
        self,
        kind: Layer,
        module: Any,
        args: tuple,
        kwargs: Any,
        indices: Tensor,
        tokens_per_row: int,
    ) -> Any:
        """(args, kwargs) with only the rows ``indices``. If the inputs hold one entry for each
        token (``_count_tokens_per_row``), ``indices`` are those of tokens; otherwise
        ``tokens_per_row`` is 1. Raises a SelectionError if no argument holds the rows."""
        row_count = self.row_adapters.row_count
        try:
            return kind.take(module, args, kwargs, indices, row_count * tokens_per_row)
        except LookupError:
            raise _division_error(
                module, f"whose inputs do not hold the {row_count} rows of the batch"
            ) from None

    def _division_problem(
        self, kind: Layer, inputs: Any, is_leaf: bool, holds_routed_tokens: bool
    ) -> str | None:
        """The reason why the inputs of a call cannot be divided into rows, or None.

        An argument may be an object that cannot be divided, such as a cache. Or the first two axes
        of a tensor may both have as many entries as the batch has rows, so that either may be the
        rows: in a model with inputs [time, batch, …], or in a mask [time, time] of a module that
        calls other modules.

        Args:
            inputs: the arguments of the call, as (args, kwargs).
            is_leaf: whether the module has no children besides its layer state.
            holds_routed_tokens: whether the inputs hold one entry for each token
                (``_count_tokens_per_row``).
        """
        for argument in () if is_leaf else _indivisible_arguments(inputs):
            return f"given a {type(argument).__name__}, which cannot be divided into rows"
        if holds_routed_tokens or type(kind).take is not Layer.take:
            return None
        square_shape = (self.row_adapters.row_count,) * 2
        tensors = [x for x in pytree.tree_leaves(inputs) if isinstance(x, Tensor)]
        may_have_mask = not is_leaf and len(tensors) > 1
        is_ambiguous = any(
            (
                may_have_mask
                if x.dim() == 2 and (x.is_floating_point() or x.dtype == torch.bool)
                else self.row_adapters.time_first
            )
            for x in tensors
            if x.shape[:2] == square_shape
        )
        return (
            f"with {self.row_adapters.row_count} along two axes, of which either may be the rows"
            if is_ambiguous
            else None
        )


def _count_tokens_per_row(
    kind: Layer, module: nn.Module, inputs: Any, row_count: int
) -> int | None:
    """The number of tokens in each of ``row_count`` rows, if the inputs of a module of experts hold
    rows and time as one axis. None if the module is of another kind, or its inputs do not show that
    they hold tokens.

        hidden [rows, time, n] --block--> [rows · time, n]    n: the width of a token's hidden state
                                          [rows · time, k]    the k experts of each token

    A mixture-of-experts block flattens its input before it routes the tokens, so the module of
    experts below it gets tokens instead of rows. The inputs show it if the module holds a stack of
    matrices and they are routed tokens: floats [tokens, n], integers that choose a matrix of the
    stack for each token, and no tensor of another length. If the floats are a view of a tensor with
    more axes, the first axis of that tensor must be the rows.
    """
    if kind is not GENERAL_KIND:
        return None
    has_stack = any(p is not None and p.dim() == 3 for p in module._parameters.values())
    tensors = [leaf for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, Tensor)]
    hidden = next((leaf for leaf in tensors if leaf.is_floating_point()), None)
    has_routes = any(
        leaf.dim() == 2 and leaf.dtype in (torch.int64, torch.int32) for leaf in tensors
    )
    if not has_stack or hidden is None or not has_routes or hidden.dim() != 2:
        return None
    token_count = len(hidden)
    if token_count % row_count or any(
        leaf.dim() == 0 or len(leaf) != token_count for leaf in tensors
    ):
        return None
    viewed_tensor = hidden._base
    if (
        viewed_tensor is not None
        and viewed_tensor.dim() > 2
        and viewed_tensor.numel() == hidden.numel()
        and viewed_tensor.shape[0] != row_count
    ):
        return None
    return token_count // row_count


def _token_indices(row_indices: Tensor, tokens_per_row: int) -> Tensor:
    """The indices of the tokens of these rows in inputs [rows · time, …], in which each row has
    ``tokens_per_row`` neighbouring tokens."""
    if tokens_per_row == 1:
        return row_indices
    positions = torch.arange(tokens_per_row, device=row_indices.device)
    return (row_indices[:, None] * tokens_per_row + positions).flatten()


def _kind_for(layer_state: Any, method: str) -> Any:
    """The layer kind that divides the inputs of a method into rows and joins its outputs: for
    forward that of the layer, for other methods the general kind (rows along the first axis)."""
    return (layer_state.layer if method == "forward" else None) or GENERAL_KIND


def _run_base(
    module: Any, base_cls: type[nn.Module], method: str, args: tuple, kwargs: Mapping[str, Any]
) -> Any:
    """The output of a method of an adapted module without its adapters."""
    if method == "forward":
        return base_forward(module, base_cls, *args, **kwargs)
    return method_of(base_cls, method)(module, *args, **kwargs)


def _is_leaf(module: Any, layer_state: Any) -> bool:
    """Whether a module has no children besides its layer state, which holds its adapters."""
    return all(child is layer_state for child in module._modules.values())


def _looks_up_selection(module: Any, layer_state: Any) -> bool:
    """Whether a call of the module runs code that may look up which adapter is selected: a module
    below it, or an adapted method of its own."""
    # Another thread may detach during the call: the module's class then has no ``veneer_methods``.
    methods = getattr(type(module), "veneer_methods", ())
    return bool(methods) or not _is_leaf(module, layer_state)


def _division_error(module: nn.Module, reason: str) -> SelectionError:
    """The error of a call whose inputs cannot be divided into rows."""
    advice = "exclude that layer, or run each adapter on its rows alone"
    return SelectionError(f"a {base_class(module).__name__} {reason}", "one row an adapter", advice)


def _indivisible_arguments(argument: Any) -> Iterator[Any]:
    """Yield the objects in an argument, or in a tree of arguments, that may hold rows but cannot be
    divided into rows, such as a cache of keys and values."""
    if isinstance(argument, dict):
        argument = tuple(argument.values())
    if type(argument) in (tuple, list):
        for element in argument:
            yield from _indivisible_arguments(element)
    elif not (argument is None or callable(argument) or isinstance(argument, _DIVISIBLE)):
        yield argument
