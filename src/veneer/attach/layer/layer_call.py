"""The arithmetic of one call of a layer that has one input and is linear in its one weight: the
factored and the materialised form, with their dtypes, also under autocast.

run_factored        y = gain ⊙ (op(x; W) + op(drop(x); ΔW)) + bias
run_materialised    y = op(x; gain ⊙ (W + ΔW)) + bias                  the definition

op is the layer's operation without its bias, drop is dropout, gain is a factor for each output. The
factored form needs no memory for W + ΔW. The materialised form is used if the caller requests it,
or if the change has a gain and the layer reads the weight transposed (``Change.is_transposed_in``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from veneer import context
from veneer.attach.layer.adapted_module import base_forward
from veneer.attach.layer.change import ROW_BLOCK_COUNT, Change, frozen_weight
from veneer.attach.layer.dtypes import no_autocast, output_dtype, widen
from veneer.attach.layer.state import Call, LayerState
from veneer.attach.layer.views import view
from veneer.bases import weight_of
from veneer.kernels import device, fused
from veneer.kernels.dropout import dropout as drop
from veneer.kernels.dropout import new_seed
from veneer.layers import Layer
from veneer.lowrank import LowRank
from veneer.precision import at_least_float32


def is_jagged(x: Any) -> bool:
    """Whether x is a nested tensor of jagged layout, whose rows have different lengths."""
    return type(x) is not Tensor and isinstance(x, Tensor) and x.layout is torch.jagged


def run_on_values(run: Callable[[Call], Any], call: Call) -> Any:
    """The output of a layer for a jagged nested tensor, if the layer computes each position
    independently. ``run`` is called with the positions of all rows as one plain tensor. The output
    gets the offsets object of the input, because torch considers the shapes of two jagged tensors
    equal only if they have the same object."""
    x = call.x
    y = run(call._replace(args=(x.values(),), kwargs={}))
    return torch.nested.nested_tensor_from_jagged(
        y, x.offsets(), x.lengths(), jagged_dim=x._ragged_idx
    )


class LinearCall(NamedTuple):
    """One call of a layer that has one input and is linear in its one weight.

    Fields:
        replacements: the tensors that replace the module's parameters and buffers in full, by name.
        adapts_methods: whether methods of the module besides forward are adapted too.
    """

    call: Call
    replacements: Mapping[str, Tensor]
    adapts_methods: bool

    @property
    def module(self) -> Any:
        return self.call.module

    @property
    def layer_state(self) -> LayerState:
        return self.call.layer_state

    @property
    def x(self) -> Tensor:
        return self.call.x

    @property
    def weight(self) -> Any:
        return weight_of(self.module, cast(Layer, self.layer_state.layer).weight)

    def bias(self, change: Change) -> Any:
        parameters = self.module._parameters
        is_parameter = "bias" in parameters and not change.storage.opaque
        # Read a pruned or parametrised bias as an attribute, by which torch computes it.
        bias = parameters["bias"] if is_parameter else getattr(self.module, "bias", None)
        return self.replacements.get("bias", bias)

    def refuse_other_dtype(self, change: Change) -> None:
        """Call the layer without its adapter if its input has another dtype than its plain weight
        (without autocast), so that torch raises the error that it raises for the plain layer."""
        x, name = self.x, cast(Layer, self.layer_state.layer).weight
        weight = frozen_weight(change, self.module, name)
        if change.storage.name != "plain" or not isinstance(x, Tensor) or x.dtype == weight.dtype:
            return
        if x.is_floating_point() and not torch.is_autocast_enabled(x.device.type):
            with torch.no_grad():
                base_forward(self.module, self.call.base_cls, *self.call.args, **self.call.kwargs)

    def base_output(self, change: Change, with_bias: bool) -> Tensor:
        """op(x; W), the layer's operation without its adapter, with the bias if ``with_bias``."""
        module, kind, x = self.module, cast(Layer, self.layer_state.layer), self.x
        if with_bias and not self.replacements and not change.storage.computed:
            # If other methods are adapted too, run on a view, whose methods are the base class's:
            # with those of the module, forward would add ΔW to this output.
            base_module = view(module, self.call.base_cls, {}) if self.adapts_methods else module
            return base_forward(
                base_module, self.call.base_cls, *self.call.args, **self.call.kwargs
            )
        dense = change.storage.dense(self.weight)
        dense = dense.to(x.dtype) if x.is_floating_point() else dense
        return kind.op(module, x, dense, self.bias(change) if with_bias else None)


def run_factored(
    linear_call: LinearCall,
    change: Change,
    low_rank: LowRank,
    gain: Tensor | None,
    dropout: float,
    forms_weight: bool = False,
) -> Any:
    """gain ⊙ (op(x; W) + op(drop(x); ΔW)) + bias, where op is the layer's operation.

    Args:
        low_rank: ΔW as the layer reads it (``Change.as_read_by``).
        gain: a factor for each output; None for 1.
        dropout: the probability of dropout of the inputs of ΔW.
        forms_weight: whether the fused kernel computes x (W + ΔW)ᵀ with W + ΔW formed, if it
            computes this call at all and without dropout.
    """
    module, layer_state, x, weight = (
        linear_call.module,
        linear_call.layer_state,
        linear_call.x,
        linear_call.weight,
    )
    kind: Any = layer_state.layer
    bias = linear_call.bias(change)
    if gain is None and layer_state.is_plain_product and fused.applies(x, weight):
        settings = fused.Settings(
            (low_rank.scale,), dropout, new_seed() if dropout else 0, forms_weight and not dropout
        )
        matrix = weight.mT if kind.out_axis == 1 else weight
        return fused.linears(settings, x, (matrix,), (bias,), (low_rank.A[0],), (low_rank.B[0],))[0]
    if kind.product and device.is_plain(x):
        y = _run_on_device(change, kind, layer_state, x, weight, bias, low_rank, gain, dropout)
        if y is not None:
            return y
    has_fused_path = (
        layer_state.is_stock_class
        and gain is None
        and not change.is_transposed_in(kind)
        and not change.storage.opaque
    )
    if has_fused_path and (fused.applies(x, weight) or device.applies_without_cast(x, weight)):
        y = None if context.current.path else kind.fused(module, x, weight, bias, low_rank, dropout)
        if y is not None:
            return y
    y = linear_call.base_output(change, with_bias=gain is None)
    return add_update(kind, module, x, y, low_rank, gain, bias, dropout)


def _run_on_device(
    change: Change,
    kind: Any,
    layer_state: LayerState,
    x: Tensor,
    weight: Any,
    bias: Any,
    low_rank: LowRank,
    gain: Tensor | None,
    dropout: float,
) -> Tensor | None:
    """The output of a layer that is a matrix product, by the kernel for devices other than the
    CPU. None if that kernel does not support the call, or has no advantage for it.

    For a packed weight, the kernel is used only if there is a gain: it decodes the weight again in
    backward instead of saving a dense copy. Without a gain, the product of the library that packed
    the weight saves no copy either, so that product is used.
    """
    if layer_state.is_plain_product:
        if not device.applies(x, weight):
            return None
        matrix_or_reader: Any = weight.mT if kind.out_axis == 1 else weight
    else:
        storage = change.storage
        if (
            gain is None
            or storage.computed
            or storage.name == "plain"
            or storage.device(weight) != x.device
        ):
            return None
        matrix_or_reader = partial(_read_dense, change, weight, kind.out_axis == 1)
    seed = new_seed() if dropout else 0
    return device.linears(
        (low_rank.scale,),
        x,
        (matrix_or_reader,),
        (bias,),
        (low_rank.A,),
        (low_rank.B,),
        (gain,),
        dropout,
        seed,
    )[0]


def _read_dense(change: Change, weight: Any, is_transposed: bool, dtype: torch.dtype) -> Tensor:
    """The dense weight, [out, in], in ``dtype``. ``is_transposed``: the weight is stored as [in,
    out]. It is read in blocks of rows, because a storage may decode in a wider dtype, in which the
    full weight would take more memory."""
    dense, first_row = None, 0
    for row_block in change.storage.pieces(weight, ROW_BLOCK_COUNT):
        if len(row_block) == (change.dims.in_ if is_transposed else change.dims.out):
            return row_block.to(dtype).mT if is_transposed else row_block.to(dtype)
        if dense is None:
            dense = row_block.new_empty(change.dims.out, change.dims.in_, dtype=dtype)
        dense[first_row : first_row + len(row_block)].copy_(row_block)
        first_row += len(row_block)
    return cast(Tensor, dense)


def add_update(
    kind: Any,
    module: nn.Module,
    x: Tensor,
    y: Tensor,
    low_rank: LowRank,
    gain: Tensor | None,
    bias: Any,
    dropout: float,
) -> Tensor:
    """The output in factored form, gain ⊙ (y + op(drop(x); ΔW)) + bias, given y = op(x; W). Without
    a gain, y contains the bias already and ``bias`` is ignored. With a gain, y must not contain the
    bias; ``bias`` is added after the gain unless it is None."""
    low_rank = low_rank.to(x.dtype if x.is_floating_point() else y.dtype)
    if dropout and not kind.drops_input:
        y = y + kind.update(module, x, low_rank, None) * _token_mask(x, dropout, y.dtype)
    else:
        y = kind.update(module, drop(x, dropout) if dropout else x, low_rank, y)
    if gain is not None:
        y = (y * kind.per_output(module, gain, y)).to(y.dtype)  # a gain near 1 needs its digits
        y = y if bias is None else y + kind.per_output(module, bias, y).to(y.dtype)
    return y


def run_materialised(
    change: Change,
    kind: Any,
    module: nn.Module,
    x: Tensor,
    weight: Any,
    bias: Any,
    low_rank: LowRank,
    gain: Tensor | None,
) -> Tensor:
    """y = op(x; gain ⊙ (W + ΔW)) + bias, where op is the layer's operation, with dropout on the
    inputs of ΔW in training mode."""
    weight_dtype = change.storage.dtype(weight)
    dtype = at_least_float32(weight_dtype)
    # A 16-bit layer runs in float32, because a 16-bit W + ΔW would lose a small ΔW. So does a layer
    # with a packed weight of a wider dtype and a 16-bit x.
    has_narrow_input = (
        x.is_floating_point() and x.dtype != dtype and not torch.is_autocast_enabled(x.device.type)
    )
    runs_wide = dtype != weight_dtype or has_narrow_input
    bias = widen(bias, dtype) if runs_wide and bias is not None else bias
    dropout = change.dropout if change.training else 0
    with no_autocast(x) if runs_wide else nullcontext():
        wide_x = widen(x, dtype) if runs_wide else x
        changed_weight = change.changed_weight(weight, low_rank, gain, dtype)
        if not dropout:
            y = kind.op(module, wide_x, changed_weight, bias)
        else:
            scaled_base_weight = change.changed_weight(weight, None, gain, dtype)
            dropped_x = drop(wide_x, dropout) if kind.drops_input else wide_x
            update = kind.op(module, dropped_x, changed_weight, bias) - kind.op(
                module, dropped_x, scaled_base_weight, bias
            )
            mask = 1 if kind.drops_input else _token_mask(wide_x, dropout, update.dtype)
            y = kind.op(module, wide_x, scaled_base_weight, bias) + update * mask
    return y.to(output_dtype(x, weight_dtype)) if runs_wide else y


def _token_mask(ids: Tensor, dropout: float, dtype: torch.dtype) -> Tensor:
    """A dropout mask [*ids.shape, 1] that drops all features of a token, for layers whose input is
    token ids."""
    return F.dropout(torch.ones(*ids.shape, 1, dtype=dtype, device=ids.device), dropout)
