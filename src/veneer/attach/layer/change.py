"""The change of one weight: its adapter parameters, and how ΔW is computed from them.

resolve(W)          ->  LowRank (A [g, r, in], B [g, out, r], scale), gain [g · out] or None
changed_weight(W)   ->  gain ⊙ (W + ΔW), in the shape of W        ΔW = scale · B A

g is the number of groups of a convolution or of matrices in a stack (1 for a linear layer), r the
rank. The gain is a factor for each output, as in DoRA.
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
from veneer.attach.layer.token_rows import TOKEN_ROWS, with_token_rows
from veneer.bases import Storage, weight_of
from veneer.distributed import base_class
from veneer.errors import SelectionError, TargetError, sentence
from veneer.layers import Dims, Layer
from veneer.lowrank import LowRank, zero_column
from veneer.variants import Variant

#: the number of blocks of rows in which a packed (quantised) weight is decoded, so that there is
#: never a full dense copy of it
ROW_BLOCK_COUNT = 8


def changed_storage_error(module: nn.Module, name: str) -> SelectionError:
    """The error of a call, a merge or a save for a parameter that was pruned, parametrised or
    removed after the adapter was attached."""
    layer_state = state_of(module)
    path = (
        None if layer_state is None else layer_state.model_adapters.layer_paths.get(layer_state.key)
    )
    weight_path = name if path in (None, "") else f"{path}.{name}"
    return SelectionError(
        f"{weight_path!r} ({base_class(module).__name__}), pruned or parametrised (or no longer"
        " so) after attach",
        "the parameter that the adapter was attached to",
        "undo it (torch.nn.utils.prune.remove, parametrize.remove_parametrizations), or detach the"
        " adapter, change the model, and attach or load it again",
    )


def frozen_weight(change: Any, module: nn.Module, name: str) -> Any:
    """The frozen weight ``name`` of ``module``, to which ``change`` (a ``Change``) applies: the
    object that ``bases.weight_of`` returns.

    Raises:
        SelectionError: the weight is no longer stored as it was when the change was created.
    """
    weight = weight_of(module, name)
    is_computed = isinstance(weight, ParametrizationList)
    if weight is None or is_computed != (change.storage.name == "parametrized"):
        raise changed_storage_error(module, name)
    return weight


def _refuse_gradient(gradient: Tensor) -> None:
    """Backward hook of offloaded parameters. It raises an error, because the gradient would belong
    to copies on the device, which are freed after the call."""
    problem = "a gradient of adapter parameters that accelerate has offloaded"
    raise TargetError(
        sentence(
            problem, "parameters in memory", "offload the base first, then attach; or do not train"
        )
    )


class Change(nn.Module):
    """One adapter's change of one weight.

    Fields:
        layer, variant, storage: the kind of the layer that has the weight, the LoRA variant, and
            the way in which the weight is stored.
        dims: the number g of matrices in the weight, and their outputs and inputs.
        rows: indices of the output rows that change; None if all of them change.
        frozen_input: index of the one input whose column of ΔW stays zero, such as a padding token;
            None if there is no such input.
        module_only: the change affects only the outputs of the modules that hold the weight, as in
            PEFT. Other code that reads the weight gets the base weight.
        tokens: ids of the tokens whose rows of an embedding or head are trained in full; None
            trains no such rows. If the rank is 0, nothing else changes.
    """

    #: the trained rows of ``tokens``, [number of tokens, width]
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
        self._device_copies: dict[str, Tensor] = {}
        for name, tensor in parameters.items():
            if name in variant.frozen:
                self.register_buffer(name, tensor)
            else:
                self.register_parameter(name, nn.Parameter(tensor))

    def extra_repr(self) -> str:
        return f"{self.variant.name}, rank={self.rank}, alpha={self.alpha}, dropout={self.dropout}"

    @property
    def adapter_parameters(self) -> dict[str, Any]:
        """The variant's parameters, trained and frozen, by name. Parameters that accelerate has
        offloaded are copied to the device of the module."""
        parameters = self._all_parameters()
        parameters.pop(TOKEN_ROWS, None)
        return parameters

    def _all_parameters(self) -> dict[str, Any]:
        """The parameters of ``adapter_parameters`` and, if there are any, the trained token rows
        (rows of an embedding or head that are trained in full)."""
        offload_hook = self.__dict__.get("_hf_hook")
        if offload_hook is None or not any(
            tensor.is_meta for tensor in {**self._parameters, **self._buffers}.values()
        ):
            return {**self._parameters, **self._buffers}
        offload_hook.pre_forward(self)
        parameters = {**self._parameters, **self._buffers}
        offload_hook.post_forward(self, None)
        for tensor in parameters.values():
            if tensor.requires_grad:
                tensor.register_hook(_refuse_gradient)
        return parameters

    def resolve(
        self, weight: Any, dtype: torch.dtype | None = None
    ) -> tuple[LowRank, Tensor | None]:
        """(LowRank, gain) of the change of ``weight``, for which the changed weight is gain ⊙ (W +
        ΔW). Differentiable in the adapter parameters. The gain has one factor for each output row,
        [g · out], or is None for a gain of 1. ``dtype`` is the dtype of both; None keeps that of
        the parameters."""
        # No test of the rank before this return: torch.compile would compile a graph for each rank.
        if self.tokens is None:
            return self.low_rank(weight, dtype)
        low_and_gain = self.low_rank(weight, dtype) if self.rank else (None, None)
        token_rows, dense = self._all_parameters()[TOKEN_ROWS], self.storage.dense(weight)
        token_rows = token_rows if dtype is None else precision.cast(token_rows, dtype)
        token_ids = self._indices_on(token_rows.device, "tokens")
        return with_token_rows(*low_and_gain, token_rows, token_ids, dense, self.layer)

    def low_rank(
        self, weight: Any, dtype: torch.dtype | None = None
    ) -> tuple[LowRank, Tensor | None]:
        """The result of ``resolve`` for the variant's parameters alone, without the token rows that
        are trained in full. The rank must not be 0."""
        parameters = self.adapter_parameters
        if dtype is not None:
            parameters = {
                name: precision.cast(tensor, dtype) for name, tensor in parameters.items()
            }
        if self.frozen_input is not None and "A" in parameters:
            # Zero this column of A before the variant runs, which may compute its gain from ΔW.
            parameters["A"] = zero_column(parameters["A"], self.frozen_input)
        low_rank, gain = self.variant.resolve(
            parameters, self.scale, self._weight_reader(weight, dtype)
        )
        if self.rows is not None:
            row_indices = self._indices_on(low_rank.B.device, "rows")
            low_rank = low_rank.expand_rows(row_indices, self.dims.out)
            gain = (
                None
                if gain is None
                else torch.ones_like(gain).new_ones(self.dims.out).index_copy(0, row_indices, gain)
            )
        if self.frozen_input is not None:
            low_rank = low_rank.zero_input(self.frozen_input)
        return low_rank, gain

    def is_transposed_in(self, kind: Layer) -> bool:
        """Whether layers of this kind read the stored weight with inputs and outputs exchanged,
        compared with the layer of this change. For example, the change belongs to an embedding, to
        which a linear head is tied."""
        return self.layer.out_axis != kind.out_axis

    def as_read_by(self, kind: Layer, low_rank: LowRank) -> LowRank:
        """``low_rank``, a result of ``resolve``, for a layer of this kind: transposed if
        ``is_transposed_in``."""
        return low_rank.T if self.is_transposed_in(kind) else low_rank

    def resolve_float64(self, weight: Any) -> tuple[LowRank, Tensor | None]:
        """``resolve`` in float64, for a merge. In float64, a matrix has the same gain whether it is
        computed alone or in a stack of matrices, so its merged values are the same too."""
        return self.resolve(weight, torch.float64)

    def _weight_reader(self, weight: Any, dtype: torch.dtype | None) -> Any:
        """A function that returns W, which the variant calls if it needs W. For a packed weight it
        has the attribute ``pieces``, a function that yields W in blocks of rows."""

        def read_weight() -> Tensor:
            """The rows of the weight W that change, [g, out, in] for g matrices, in the dtype of W.
            If ``dtype`` is not None, on a device that supports arithmetic in ``dtype``."""
            dense = self.storage.dense(weight)
            if dtype is not None:
                dense = dense.to(precision.compute_device(dense.device, dtype))
            dense = self.layer.unfold(dense, self.dims)
            return dense if self.rows is None else dense[:, self._indices_on(dense.device, "rows")]

        has_row_blocks = self.layer.product and not self.layer.out_axis and self.rows is None
        if has_row_blocks and dtype is None and self.storage.dense_name is None:
            vars(read_weight)["pieces"] = lambda: (
                piece[None] for piece in self.storage.pieces(weight, ROW_BLOCK_COUNT)
            )
        return read_weight

    def _indices_on(self, device: torch.device, attribute_name: str) -> Tensor:
        """The indices in ``attribute_name``, "rows" or "tokens", on a device. The copy for the last
        device is cached."""
        indices: Any = getattr(self, attribute_name)
        if device == indices.device:
            return indices
        indices_copy = self._device_copies.get(attribute_name)
        if indices_copy is None or indices_copy.device != device:
            self._device_copies[attribute_name] = indices_copy = indices.to(
                device, non_blocking=True
            )
        return indices_copy

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_device_copies": {}}

    def changed_weight(
        self,
        weight: Any,
        low_rank: LowRank | None,
        gain: Tensor | None,
        dtype: torch.dtype,
        with_dropout: bool = False,
    ) -> Tensor:
        """``gain ⊙ (W + ΔW)`` in the shape of the weight, in ``dtype``; without ``low_rank``,
        ``gain ⊙ W``. This formula defines an adapter; all other code computes the same. In training
        mode, ``with_dropout`` sets whole input columns of ΔW to zero, which is a dropout of the
        input of ΔW with one mask for all rows."""
        layer, dense = self.layer, precision.cast(self.storage.dense(weight), dtype)
        if low_rank is not None:
            delta = low_rank.delta(dtype)
            if with_dropout and self.training and self.dropout:
                delta = delta * F.dropout(
                    delta.new_ones(delta.shape[0], 1, delta.shape[2]), self.dropout
                )
            dense = dense + layer.fold(delta, dense.shape)
        return (
            dense if gain is None else dense * layer.spread(gain.to(dtype), self.dims, dense.shape)
        )
