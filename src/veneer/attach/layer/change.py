"""The change of one weight: the adapter parameters, and how ΔW is computed from them.

resolve(W)          ->  LowRank (A [g, r, in], B [g, out, r], scale), gain [g · out] or None
changed_weight(W)   ->  gain ⊙ (W + ΔW), in the shape of W        ΔW = scale · B A
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from veneer import precision
from veneer.attach.layer.adapted_module import state_of
from veneer.attach.layer.token_rows import ROWS, with_rows
from veneer.bases import Storage, weight_of
from veneer.distributed import base_class
from veneer.errors import SelectionError, TargetError, sentence
from veneer.layers import Dims, Layer
from veneer.lowrank import LowRank, zero_column
from veneer.variants import Variant

#: the number of pieces in which a packed weight is made dense, so that no full dense copy exists
PIECES = 8


def changed_storage_error(module: nn.Module, name: str) -> SelectionError:
    """The error of a call, a merge or a save for a parameter that was pruned, parametrised or
    removed after the adapter was attached."""
    layer_state = state_of(module)
    path = None if layer_state is None else layer_state.attached.paths.get(layer_state.key)
    ref = name if path in (None, "") else f"{path}.{name}"
    problem = (
        f"{ref!r} ({base_class(module).__name__}), pruned or parametrised (or no longer so) after"
        " attach"
    )
    do = (
        "undo it (torch.nn.utils.prune.remove, parametrize.remove_parametrizations), or detach the"
        " adapter, change the model, and attach or load it again"
    )
    return SelectionError(problem, "the parameter that the adapter was attached to", do)


def frozen_weight(change: Any, module: nn.Module, name: str) -> Any:
    """The frozen weight of ``module`` that ``change`` applies to.

    Raises:
        SelectionError: the weight is no longer stored as it was when the change was created.
    """
    weight = weight_of(module, name)
    computed = isinstance(weight, ParametrizationList)
    if weight is None or computed != (change.storage.name == "parametrized"):
        raise changed_storage_error(module, name)
    return weight


def _refuse_gradient(gradient: Tensor) -> None:
    """Backward hook of offloaded parameters. It raises, because the gradient would belong to copies
    on the device that are freed after the call."""
    problem = "a gradient of adapter parameters that accelerate has offloaded"
    raise TargetError(
        sentence(
            problem, "parameters in memory", "offload the base first, then attach; or do not train"
        )
    )


class Change(nn.Module):
    """One adapter's change of one weight.

    Fields:
        rows: indices of the outputs that change; None for all outputs.
        frozen_input: index of the one input whose column of ΔW stays zero, or None.
        module_only: the change affects only the outputs of the modules that hold the weight, as in
            PEFT. Other code that reads the weight gets the base weight.
        tokens: the rows of an embedding or head that are trained in full. With rank 0, nothing else
            changes.
    """

    #: the trained rows [n, d] of ``tokens``, if any
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
        """The variant's parameters, trained and frozen, by name. Parameters that accelerate has
        offloaded are copied to the device of the module."""
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
        values = {**self._parameters, **self._buffers}
        hook.post_forward(self, None)
        for value in values.values():
            if value.requires_grad:
                value.register_hook(_refuse_gradient)
        return values

    def resolve(
        self, weight: Any, dtype: torch.dtype | None = None
    ) -> tuple[LowRank, Tensor | None]:
        """The change of ``weight`` as (LowRank, gain [g · out] or None), differentiable; in
        ``dtype`` if given."""
        # Do not branch on the rank here: torch.compile would compile a graph for each rank.
        if self.tokens is None:
            return self.low_rank(weight, dtype)
        low_rank = self.low_rank(weight, dtype) if self.rank else (None, None)
        rows, dense = self._values()[ROWS], self.storage.dense(weight)
        rows = rows if dtype is None else precision.cast(rows, dtype)
        return with_rows(*low_rank, rows, self._on(rows.device, "tokens"), dense, self.layer)

    def low_rank(
        self, weight: Any, dtype: torch.dtype | None = None
    ) -> tuple[LowRank, Tensor | None]:
        """``resolve`` without the trained token rows."""
        parameters = self.adapter_parameters
        if dtype is not None:
            parameters = {name: precision.cast(value, dtype) for name, value in parameters.items()}
        if self.frozen_input is not None and "A" in parameters:
            # before the variant runs, as its gain may depend on ΔW
            parameters["A"] = zero_column(parameters["A"], self.frozen_input)
        low, gain = self.variant.resolve(parameters, self.scale, self._base(weight, dtype))
        if self.rows is not None:
            rows = self._on(low.B.device, "rows")
            low = low.expand_rows(rows, self.dims.out)
            gain = (
                None
                if gain is None
                else torch.ones_like(gain).new_ones(self.dims.out).index_copy(0, rows, gain)
            )
        return low if self.frozen_input is None else low.zero_input(self.frozen_input), gain

    def resolve_float64(self, weight: Any) -> tuple[LowRank, Tensor | None]:
        """``resolve`` in float64, for a merge. In float64, the gain of a matrix does not depend on
        whether it is computed alone or in a stack of matrices."""
        return self.resolve(weight, torch.float64)

    def _base(self, weight: Any, dtype: torch.dtype | None) -> Any:
        """A function with which the variant reads W. For a packed weight it has the attribute
        ``pieces``, which yields W in pieces of its rows."""

        def base() -> Tensor:
            return self._dense(weight, dtype)

        by_rows = self.layer.product and not self.layer.out_axis and self.rows is None
        if by_rows and dtype is None and self.storage.dense_name is None:
            vars(base)["pieces"] = lambda: (
                piece[None] for piece in self.storage.pieces(weight, PIECES)
            )
        return base

    def _dense(self, weight: Any, dtype: torch.dtype | None = None) -> Tensor:
        """W as [g, out, in] in its dtype, on a device that supports arithmetic in ``dtype``."""
        dense = self.storage.dense(weight)
        dense = dense if dtype is None else dense.to(precision.compute_device(dense.device, dtype))
        dense = self.layer.unfold(dense, self.dims)
        return dense if self.rows is None else dense[:, self._on(dense.device, "rows")]

    def _on(self, device: torch.device, name: str) -> Tensor:
        """``rows`` or ``tokens`` on a device; the copy is cached."""
        indices: Any = getattr(self, name)
        if device == indices.device:
            return indices
        moved = self._moved.get(name)
        if moved is None or moved.device != device:
            self._moved[name] = moved = indices.to(device, non_blocking=True)
        return moved

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_moved": {}}

    def changed_weight(
        self,
        weight: Any,
        low: LowRank | None,
        gain: Tensor | None,
        dtype: torch.dtype,
        drop: bool = False,
    ) -> Tensor:
        """``gain ⊙ (W + ΔW)`` in the shape of the weight, in ``dtype``; without ``low``,
        ``gain ⊙ W``. This is the definition of an adapter. ``drop`` applies dropout to whole input
        columns of ΔW, which is the same dropout mask for every row of the input."""
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
