"""A linear layer of an adapter with invocation tokens, which acts on some tokens of a call.

    y = op(x; W) + bias              of every token
    y = y + op(drop(x); ΔW)          of the tokens from the invocation on

So the keys and values of the tokens before the invocation are bit for bit the base's. Which tokens
of a call these are is found once a call, by the model (``attach/invocation.py``); a layer that runs
outside of such a call raises, as it cannot know.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from veneer.attach.layer.adapted_module import base_forward
from veneer.attach.layer.call import Call
from veneer.attach.layer.change import frozen_weight
from veneer.attach.layer.layer_adapter import LayerAdapter
from veneer.attach.layer.layer_call import LinearCall
from veneer.distributed import base_class
from veneer.errors import SelectionError
from veneer.kernels.dropout import dropout as drop


class InvokedTokens:
    """The tokens of one call on which an adapter acts, in the rows that use it.

    Fields:
        starts: for each of these rows the column of the call from which the adapter acts; the
            number of columns for a row on which it does not act.
        width: the number of columns.
        head_columns: the columns that the output head gets, if it does not get all.
    """

    def __init__(
        self, starts: Sequence[int], width: int, head_columns: slice | Tensor | None = None
    ) -> None:
        self.starts, self.width, self.head_columns = starts, width, head_columns
        self._indices: dict[Any, Tensor | None] = {}

    def indices_in(self, module: nn.Module, x: Tensor) -> Tensor | None:
        """The indices of these tokens among all of x [*, in], int64; None if they are all.

        Raises:
            SelectionError: the axes of x do not show which of its vectors is which token.
        """
        key = x.shape[:-1], x.device
        if key not in self._indices:
            mask = self._mask_of(x.shape[:-1])
            if mask is None:
                rows = f"{len(self.starts)} rows of {self.width} tokens"
                problem = f"inputs {list(x.shape)} of a {base_class(module).__name__}"
                expected = (
                    f"those of {rows}, of which an adapter changes those from its invocation on"
                )
                raise SelectionError(problem, expected, "exclude that layer")
            indices = None if bool(mask.all()) else mask.flatten().nonzero()[:, 0]
            self._indices[key] = None if indices is None else indices.to(x.device)
        return self._indices[key]

    def _mask_of(self, shape: torch.Size) -> Tensor | None:
        """A mask of this shape, which is [rows, columns, …] or all tokens along one axis."""
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
    """Has the interface of a ``LayerAdapter`` of one linear layer, and runs it on the tokens from
    the invocation of the adapter ``name`` on."""

    def __init__(self, layer_adapter: LayerAdapter, name: str) -> None:
        self.layer_adapter, self.name = layer_adapter, name

    @property
    def changes(self) -> Mapping[str, Any]:
        return self.layer_adapter.changes

    @property
    def low(self) -> nn.Module:
        return self.layer_adapter.low

    @property
    def full(self) -> nn.Module:
        return self.layer_adapter.full

    def reached_ids(self, method: str = "forward") -> Iterator[int]:
        return self.layer_adapter.reached_ids(method)

    def run(self, call: Call) -> Any:
        """As ``LayerAdapter.run``.

        Raises:
            SelectionError: no call of the model has found the tokens.
        """
        invoked_call = call.context.invoked.get(call.layer_state.attached.uid)
        tokens = None if invoked_call is None else invoked_call.tokens.get(self.name)
        if tokens is None:
            raise self._unknown_tokens_error(call.module)
        indices = tokens.indices_in(call.module, call.x)
        if indices is None:
            return self.layer_adapter.run(call)
        if not len(indices) and not torch.is_grad_enabled():
            return base_forward(call.module, call.base, *call.args, **call.kwargs)
        # with no token too: backward then gives the parameters a gradient of zero
        return self._run_at(indices, LinearCall(call, {}, False))

    def _run_at(self, indices: Tensor, call: LinearCall) -> Tensor:
        """The base's output, with the change added at these tokens."""
        reader: Any = call.layer_state.layer
        change = self.layer_adapter.changes[reader.weight]
        call.refuse_other_dtype(change)
        low, _ = change.resolve(frozen_weight(change, call.module, reader.weight))
        y = call.frozen(change, biased=True)
        x = call.x.reshape(-1, call.x.shape[-1])[indices]
        x = drop(x, change.dropout) if change.dropout and change.training else x
        update = reader.update(call.module, x, low.to(x.dtype), None)
        return y.reshape(-1, y.shape[-1]).index_add(0, indices, update.to(y.dtype)).view(y.shape)

    def _unknown_tokens_error(self, module: nn.Module) -> SelectionError:
        problem = (
            f"a {base_class(module).__name__} of adapter {self.name!r}, which has invocation"
            " tokens, outside of a call of its model"
        )
        expected = "a call that finds these tokens in its input_ids"
        do = (
            "call the model with input_ids; recompute layers in backward with the model's own"
            " gradient_checkpointing_enable()"
        )
        return SelectionError(problem, expected, do)
