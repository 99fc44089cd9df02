"""A linear layer of an adapter with invocation tokens (aLoRA), which acts on some tokens of a call.

    y = op(x; W) + bias              for every token
    y = y + op(drop(x); ΔW)          for the tokens from the invocation on

So the keys and values of the tokens before the invocation are bit for bit those of the base. Hooks
of the model find these tokens once per call (``attach/invocation.py``). A layer that runs outside
of such a call raises an error, because it does not know the tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from veneer.attach.layer.adapted_module import base_forward
from veneer.attach.layer.change import frozen_weight
from veneer.attach.layer.layer_adapter import LayerAdapter
from veneer.attach.layer.layer_call import LinearCall
from veneer.attach.layer.state import Call
from veneer.distributed import base_class
from veneer.errors import SelectionError
from veneer.kernels.dropout import dropout as drop


class InvokedTokens:
    """The tokens of one call on which an adapter acts.

    Fields:
        starts: for each row of the batch that uses the adapter, the column of ``input_ids`` from
            which the adapter acts; ``width`` for a row without an invocation.
        width: the number of columns of ``input_ids``.
        head_columns: the columns for which the output head computes logits; None for all.
    """

    def __init__(
        self, starts: Sequence[int], width: int, head_columns: slice | Tensor | None = None
    ) -> None:
        self.starts, self.width, self.head_columns = starts, width, head_columns
        self._indices_by_shape: dict[Any, Tensor | None] = {}

    def indices_in(self, module: nn.Module, x: Tensor) -> Tensor | None:
        """The indices, among all vectors of x [*, in], of those on which the adapter acts, int64.
        None if it acts on all of them.

        Raises:
            SelectionError: the shape of x does not show which vector belongs to which token.
        """
        key = x.shape[:-1], x.device
        if key not in self._indices_by_shape:
            mask = self._mask_of(x.shape[:-1])
            if mask is None:
                rows = f"{len(self.starts)} rows of {self.width} tokens"
                raise SelectionError(
                    f"inputs {list(x.shape)} of a {base_class(module).__name__}",
                    f"those of {rows}, of which an adapter changes those from its invocation on",
                    "exclude that layer",
                )
            indices = None if bool(mask.all()) else mask.flatten().nonzero()[:, 0]
            self._indices_by_shape[key] = None if indices is None else indices.to(x.device)
        return self._indices_by_shape[key]

    def _mask_of(self, shape: torch.Size) -> Tensor | None:
        """A boolean mask of ``shape`` that is True at the tokens on which the adapter acts. None if
        ``shape`` is neither [rows, columns, …] nor [rows · columns]."""
        columns = torch.arange(self.width, device="cpu")
        mask = columns >= torch.tensor(self.starts, device="cpu")[:, None]
        if len(shape) == 1 and shape.numel() == mask.numel():
            return mask.flatten()
        columns = self.head_columns
        if columns is not None and len(shape) > 1 and shape[1] != self.width:
            mask = mask[:, columns.cpu() if isinstance(columns, Tensor) else columns]
        if shape[:2] != mask.shape:
            return None
        return mask.view(*mask.shape, *[1] * (len(shape) - 2)).expand(shape)


class InvokedAdapter:
    """A wrapper of the ``LayerAdapter`` of a linear layer, which applies it only to the tokens from
    the invocation on. It has the members of a ``LayerAdapter`` that a selection needs. ``name`` is
    the adapter's name."""

    def __init__(self, layer_adapter: LayerAdapter, name: str) -> None:
        self.layer_adapter, self.name = layer_adapter, name
        self.low, self.full = layer_adapter.low, layer_adapter.full

    def reached_ids(self, method: str = "forward") -> Iterator[int]:
        return self.layer_adapter.reached_ids(method)

    def run(self, call: Call) -> Any:
        """The output of a call, with the change added at the tokens from the invocation on.

        Raises:
            SelectionError: the layer runs outside of a call of its model, so that it does not know
                the tokens.
        """
        invoked_call = call.context.invoked_calls.get(call.layer_state.model_adapters.uid)
        invoked_tokens = None if invoked_call is None else invoked_call.tokens.get(self.name)
        if invoked_tokens is None:
            raise self._unknown_tokens_error(call.module)
        indices = invoked_tokens.indices_in(call.module, call.x)
        if indices is None:
            return self.layer_adapter.run(call)
        if not len(indices) and not torch.is_grad_enabled():
            return base_forward(call.module, call.base_cls, *call.args, **call.kwargs)
        # If gradients are recorded, run even without such tokens, so that A and B get gradients of
        # zero instead of None.
        return self._run_at(indices, LinearCall(call, {}, False))

    def _run_at(self, indices: Tensor, linear_call: LinearCall) -> Tensor:
        """The base's output, with the change added at the tokens ``indices``."""
        kind: Any = linear_call.layer_state.layer
        change = self.layer_adapter.changes[kind.weight]
        linear_call.refuse_other_dtype(change)
        low_rank, _ = change.resolve(frozen_weight(change, linear_call.module, kind.weight))
        y = linear_call.base_output(change, with_bias=True)
        x = linear_call.x.reshape(-1, linear_call.x.shape[-1])[indices]
        x = drop(x, change.dropout) if change.dropout and change.training else x
        update = kind.update(linear_call.module, x, low_rank.to(x.dtype), None)
        return y.reshape(-1, y.shape[-1]).index_add(0, indices, update.to(y.dtype)).view(y.shape)

    def _unknown_tokens_error(self, module: nn.Module) -> SelectionError:
        return SelectionError(
            f"a {base_class(module).__name__} of adapter {self.name!r}, which has invocation"
            " tokens, outside of a call of its model",
            "a call that finds these tokens in its input_ids",
            "call the model with input_ids; recompute layers in backward with the model's own"
            " gradient_checkpointing_enable()",
        )
