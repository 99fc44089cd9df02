"""The change of one weight: adapter parameters, and how they become ΔW.

resolve(W)   ->  LowRank (A [g, r, in], B [g, out, r], scale), gain [g · out] or None
changed(W)   ->  gain ⊙ (W + ΔW), in the weight's own shape        ΔW = scale · B A
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from veneer import precision
from veneer.attach.adapted_module import own_class, state_of, weight_of
from veneer.attach.token_rows import ROWS, with_rows
from veneer.bases import Storage
from veneer.errors import SelectionError, TargetError, sentence
from veneer.layers import Dims, Layer
from veneer.lowrank import LowRank, zero_column
from veneer.variants import Variant

#: of a packed weight, of which no more than a piece should be dense
PIECES = 8


def changed_storage(module: nn.Module, name: str) -> SelectionError:
    """The error of a call, a merge or a save that meets a parameter which has been pruned,
    parametrised or taken away since the adapter was attached."""
    layer_state = state_of(module)
    path = None if layer_state is None else layer_state.attached.paths.get(layer_state.key)
    ref = name if path in (None, "") else f"{path}.{name}"
    problem = (
        f"{ref!r} ({own_class(module).__name__}), pruned or parametrised (or no longer so) after"
        " attach"
    )
    do = (
        "undo it (torch.nn.utils.prune.remove, parametrize.remove_parametrizations), or detach the"
        " adapter, change the model, and attach or load it again"
    )
    return SelectionError(problem, "the parameter that the adapter was attached to", do)


def frozen_weight(change: Any, module: nn.Module, name: str) -> Any:
    """The weight of a module that a change is of; a SelectionError if it is kept otherwise than as
    that was made."""
    weight = weight_of(module, name)
    computed = isinstance(weight, ParametrizationList)
    if weight is None or computed != (change.storage.name == "parametrized"):
        raise changed_storage(module, name)
    return weight


def _offloaded(gradient: Tensor) -> None:
    """Who trains would train copies that nobody has after the call."""
    problem = "a gradient of adapter parameters that accelerate has offloaded"
    raise TargetError(
        sentence(
            problem, "parameters in memory", "offload the base first, then attach; or do not train"
        )
    )


class Change(nn.Module):
    """One adapter's change of one weight. ``rows`` are the indices of the outputs that change
    (None: all); ``frozen_input`` is the input that never does. ``module_only``: it is a change of
    what its modules give, which those who read the weight past them do not see, as in PEFT.
    ``tokens`` are the rows of an embedding or head that are trained in full; of rank 0, nothing
    else of it changes."""

    #: the trained rows [n, d] of ``tokens``, where there are some
    token_rows: Any
    layer: Any
    variant: Any
    storage: Any
    dims: Dims

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        *,
        layer: Layer,
        variant: Variant,
        storage: Storage,
        dims: Dims,
        rank: int,
        alpha: float,
        dropout: float,
        rows: Tensor | None = None,
        tokens: Tensor | None = None,
        frozen_input: int | None = None,
        module_only: bool = False,
    ) -> None:
        super().__init__()
        self.layer, self.variant, self.storage, self.dims = layer, variant, storage, dims
        self.rank, self.alpha, self.dropout, self.frozen_input = rank, alpha, dropout, frozen_input
        self.scale = variant.scale(alpha, rank) if rank else 1.0
        self.rows, self.tokens, self.module_only = rows, tokens, module_only
        self._moved: dict[str, Tensor] = {}
        for name, value in parameters.items():
            if name in variant.frozen:
                self.register_buffer(name, value)
            else:
                self.register_parameter(name, nn.Parameter(value))

    def extra_repr(self) -> str:
        return f"{self.variant.name}, rank={self.rank}, alpha={self.alpha}, dropout={self.dropout}"

    @property
    def adapter_parameters(self) -> dict[str, Any]:
        """The variant's parameters, trained and frozen, by name; those that accelerate has
        offloaded, where it runs."""
        values = self._values()
        values.pop(ROWS, None)
        return values

    def _values(self) -> dict[str, Any]:
        hook = self.__dict__.get("_hf_hook")
        if hook is None or not any(
            value.is_meta for value in {**self._parameters, **self._buffers}.values()
        ):
            return {**self._parameters, **self._buffers}
        hook.pre_forward(self)
        found = {**self._parameters, **self._buffers}
        hook.post_forward(self, None)
        for value in found.values():
            if value.requires_grad:
                value.register_hook(_offloaded)
        return found

    def resolve(
        self, weight: Any, dtype: torch.dtype | None = None
    ) -> tuple[LowRank, Tensor | None]:
        """The change of ``weight`` as (LowRank, gain [g · out] or None), differentiable; in
        ``dtype`` if given."""
        # and the rank is not looked at: torch.compile would make a graph for each
        if self.tokens is None:
            return self.low_rank(weight, dtype)
        found = self.low_rank(weight, dtype) if self.rank else (None, None)
        rows, dense = self._values()[ROWS], self.storage.dense(weight)
        rows = rows if dtype is None else precision.cast(rows, dtype)
        return with_rows(*found, rows, self._on(rows.device, "tokens"), dense, self.layer)

    def low_rank(
        self, weight: Any, dtype: torch.dtype | None = None
    ) -> tuple[LowRank, Tensor | None]:
        """``resolve`` without the trained tokens: what the variant makes of its parameters."""
        parameters = self.adapter_parameters
        if dtype is not None:
            parameters = {name: precision.cast(value, dtype) for name, value in parameters.items()}
        if self.frozen_input is not None and "A" in parameters:
            # a gain may depend on ΔW, of which that input is no part
            parameters["A"] = zero_column(parameters["A"], self.frozen_input)
        low, gain = self.variant.resolve(parameters, self.scale, self._base(weight, dtype))
        if self.rows is not None:
            rows = self._on(low.B.device, "rows")
            low = low.place(rows, self.dims.out)
            gain = (
                None
                if gain is None
                else torch.ones_like(gain).new_ones(self.dims.out).index_copy(0, rows, gain)
            )
        return low if self.frozen_input is None else low.without(self.frozen_input), gain

    def exactly(self, weight: Any) -> tuple[LowRank, Tensor | None]:
        """``resolve`` for a merge, in float64: a gain is the same for one matrix as for a stack of
        them."""
        return self.resolve(weight, torch.float64)

    def _base(self, weight: Any, dtype: torch.dtype | None) -> Any:
        """What reads W for the variant: whole, or as an iterator of a packed weight's rows."""

        def base() -> Tensor:
            return self._dense(weight, dtype)

        lies = self.layer.product and not self.layer.out_axis and self.rows is None
        if lies and dtype is None and self.storage.dense_name is None:
            vars(base)["pieces"] = lambda: (
                one[None] for one in self.storage.pieces(weight, PIECES)
            )
        return base

    def _dense(self, weight: Any, dtype: torch.dtype | None = None) -> Tensor:
        """[g, out, in] in the dtype of the weight, where arithmetic in ``dtype`` is done."""
        dense = self.storage.dense(weight)
        dense = dense if dtype is None else dense.to(precision.place(dense.device, dtype))
        dense = self.layer.unfold(dense, self.dims)
        return dense if self.rows is None else dense[:, self._on(dense.device, "rows")]

    def _on(self, device: torch.device, name: str) -> Tensor:
        """``rows`` or ``tokens`` on a device, brought there once."""
        indices: Any = getattr(self, name)
        if device == indices.device:
            return indices
        moved = self._moved.get(name)
        if moved is None or moved.device != device:
            self._moved[name] = moved = indices.to(device, non_blocking=True)
        return moved

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_moved": {}}

    def changed(
        self,
        weight: Any,
        low: LowRank | None,
        gain: Tensor | None,
        dtype: torch.dtype,
        drop: bool = False,
    ) -> Tensor:
        """``gain ⊙ (W + ΔW)`` in the weight's own shape: the meaning of an adapter. Without
        ``low``, ``gain ⊙ W``. ``drop`` drops whole inputs of ΔW, as the same dropout of every input
        row would."""
        layer, dense = self.layer, precision.cast(self.storage.dense(weight), dtype)
        if low is not None:
            delta = low.delta(dtype)
            if drop and self.training and self.dropout:
                delta = delta * F.dropout(
                    delta.new_ones(delta.shape[0], 1, delta.shape[2]), self.dropout
                )
            dense = dense + layer.fold(delta, dense.shape)
        return (
            dense if gain is None else dense * layer.spread(gain.to(dtype), self.dims, dense.shape)
        )
