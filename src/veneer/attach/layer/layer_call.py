"""The arithmetic of one call of a layer that has one input and is linear in its one weight.

run_factored        y = gain ⊙ (op(x; W) + op(drop(x); ΔW)) + bias
run_materialised    y = op(x; gain ⊙ (W + ΔW)) + bias                  the definition

The factored form needs no memory for W + ΔW. The materialised form is used if the caller requests
it, and for a layer that holds the weight transposed if the change has a gain.
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
from veneer.attach.layer.call import Call
from veneer.attach.layer.change import PIECES, Change, frozen_weight
from veneer.attach.layer.dtypes import no_autocast, output_dtype, widen
from veneer.attach.layer.state import LayerState
from veneer.attach.layer.views import view
from veneer.bases import weight_of
from veneer.kernels import device, fused
from veneer.kernels.dropout import dropout as drop
from veneer.kernels.dropout import new_seed
from veneer.layers import Layer
from veneer.lowrank import LowRank
from veneer.precision import at_least_float32


def is_jagged(x: Any) -> bool:
    """Whether the one input of a call is a nested tensor of jagged layout."""
    return type(x) is not Tensor and isinstance(x, Tensor) and x.layout is torch.jagged


def on_values(run: Callable[[Call], Any], call: Call) -> Any:
    """The output of a layer for a jagged nested tensor, if the layer computes each position
    independently. ``run`` gets the positions of all rows as one plain tensor. The output has the
    same offsets object as the input, by which torch recognises that their shapes are equal."""
    x = call.x
    y = run(call._replace(args=(x.values(),), kwargs={}))
    return torch.nested.nested_tensor_from_jagged(
        y, x.offsets(), x.lengths(), jagged_dim=x._ragged_idx
    )


class LinearCall(NamedTuple):
    """One call of a layer that has one input and is linear in its one weight.

    Fields:
        full: the replacements of the module's parameters and buffers.
        entries: whether other methods of the module read adapted weights too.
    """

    call: Call
    full: Mapping[str, Tensor]
    entries: bool

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
        # the attribute of a pruned or parametrised bias is computed
        bias = parameters["bias"] if is_parameter else getattr(self.module, "bias", None)
        return self.full.get("bias", bias)

    def refuse_other_dtype(self, change: Change) -> None:
        """Run the layer without its adapter if its input has another dtype than its weight, so that
        torch raises its own error."""
        x, weight = (
            self.x,
            frozen_weight(change, self.module, cast(Layer, self.layer_state.layer).weight),
        )
        if change.storage.name != "plain" or not isinstance(x, Tensor) or x.dtype == weight.dtype:
            return
        if x.is_floating_point() and not torch.is_autocast_enabled(x.device.type):
            with torch.no_grad():
                _run_base(self.call, self.module)

    def frozen(self, change: Change, biased: bool) -> Tensor:
        """op(x; W), with the bias if ``biased``."""
        module, reader, x = self.module, cast(Layer, self.layer_state.layer), self.x
        if biased and not self.full and not change.storage.computed:
            # a view, if other methods are adapted too: the view has those of the base class
            return _run_base(
                self.call, view(module, self.call.base, {}) if self.entries else module
            )
        dense = change.storage.dense(self.weight)
        dense = dense.to(x.dtype) if x.is_floating_point() else dense
        return reader.op(module, x, dense, self.bias(change) if biased else None)


def _run_base(call: Call, module: Any) -> Any:
    """The output of a call without adapters, computed by ``module``."""
    return base_forward(module, call.base, *call.args, **call.kwargs)


def run_factored(
    call: LinearCall,
    change: Change,
    low: LowRank,
    gain: Tensor | None,
    dropout: float,
    form: bool = False,
) -> Any:
    """gain ⊙ (op(x; W) + op(drop(x); ΔW)) + bias. ``form`` allows the fused kernel to form W + ΔW,
    if there is no dropout."""
    module, layer_state, x, weight = call.module, call.layer_state, call.x, call.weight
    reader: Any = layer_state.layer
    bias = call.bias(change)
    if gain is None and layer_state.product and fused.applies(x, weight):
        low = low.T if layer_state.transposed else low
        settings = fused.Settings(
            (low.scale,), dropout, new_seed() if dropout else 0, form and not dropout
        )
        matrix = weight.mT if reader.out_axis == 1 else weight
        return fused.linears(settings, x, (matrix,), (bias,), (low.A[0],), (low.B[0],))[0]
    if reader.product and device.is_plain(x):
        y = _run_on_device(change, reader, layer_state, x, weight, bias, low, gain, dropout)
        if y is not None:
            return y
    stock = (
        layer_state.stock
        and gain is None
        and not layer_state.transposed
        and not change.storage.opaque
    )
    if stock and (fused.applies(x, weight) or device.applies_without_cast(x, weight)):
        y = None if context.current.path else reader.fused(module, x, weight, bias, low, dropout)
        if y is not None:
            return y
    y = call.frozen(change, biased=gain is None)
    return with_update(
        reader, module, x, y, low.T if layer_state.transposed else low, gain, bias, dropout
    )


def _run_on_device(
    change: Change,
    reader: Any,
    layer_state: LayerState,
    x: Tensor,
    weight: Any,
    bias: Any,
    low: LowRank,
    gain: Tensor | None,
    dropout: float,
) -> Tensor | None:
    """The output of a matrix product on a device, or None if the device kernel does not support the
    call. It reads a packed weight only if there is a gain: then no dense copy is saved for
    backward. Without a gain, the product of the weight's own library saves none either."""
    if layer_state.product:
        if not device.applies(x, weight):
            return None
        read: Any = weight.mT if reader.out_axis == 1 else weight
    else:
        storage = change.storage
        if (
            gain is None
            or storage.computed
            or storage.name == "plain"
            or storage.device(weight) != x.device
        ):
            return None
        read = partial(_read_dense, change, weight, reader.out_axis == 1)
    low = low.T if layer_state.transposed else low
    drops = dropout, new_seed() if dropout else 0
    return device.linears((low.scale,), x, (read,), (bias,), (low.A,), (low.B,), (gain,), *drops)[0]


def _read_dense(change: Change, weight: Any, flipped: bool, dtype: torch.dtype) -> Tensor:
    """The dense weight [out, in] in a dtype. It is read in pieces, because the storage may compute
    them in a wider dtype."""
    dense, first = None, 0
    for piece in change.storage.pieces(weight, PIECES):
        if len(piece) == (change.dims.in_ if flipped else change.dims.out):
            return piece.to(dtype).mT if flipped else piece.to(dtype)
        if dense is None:
            dense = piece.new_empty(change.dims.out, change.dims.in_, dtype=dtype)
        dense[first : first + len(piece)].copy_(piece)
        first += len(piece)
    return cast(Tensor, dense)


def with_update(
    reader: Any,
    module: nn.Module,
    x: Tensor,
    y: Tensor,
    low: LowRank,
    gain: Tensor | None,
    bias: Any,
    dropout: float,
) -> Tensor:
    """The factored form, given y = op(x; W). With a gain, y has no bias, and ``bias`` is added
    here."""
    low = low.to(x.dtype if x.is_floating_point() else y.dtype)
    if dropout and not reader.drops_input:
        y = y + reader.update(module, x, low, None) * _token_mask(x, dropout, y.dtype)
    else:
        y = reader.update(module, drop(x, dropout) if dropout else x, low, y)
    if gain is not None:
        y = y * reader.per_output(module, gain, y).to(y.dtype)
        y = y if bias is None else y + reader.per_output(module, bias, y).to(y.dtype)
    return y


def run_materialised(
    change: Change,
    reader: Any,
    module: nn.Module,
    x: Tensor,
    weight: Any,
    bias: Any,
    low: LowRank,
    gain: Tensor | None,
) -> Tensor:
    """y = op(x; gain ⊙ (W + ΔW)) + bias, with dropout on the inputs of ΔW."""
    weight_dtype = change.storage.dtype(weight)
    dtype = at_least_float32(weight_dtype)
    # A 16-bit layer runs in float32, because a 16-bit W + ΔW would lose a small ΔW. A packed layer
    # with a 16-bit x runs in float32 too.
    narrow_x = (
        x.is_floating_point() and x.dtype != dtype and not torch.is_autocast_enabled(x.device.type)
    )
    wide = dtype != weight_dtype or narrow_x
    bias = widen(bias, dtype) if wide and bias is not None else bias
    dropout = change.dropout if change.training else 0
    with no_autocast(x) if wide else nullcontext():
        input_ = widen(x, dtype) if wide else x
        changed_weight = change.changed_weight(weight, low, gain, dtype)
        if not dropout:
            y = reader.op(module, input_, changed_weight, bias)
        else:
            scaled_base = change.changed_weight(weight, None, gain, dtype)
            dropped = drop(input_, dropout) if reader.drops_input else input_
            update = reader.op(module, dropped, changed_weight, bias) - reader.op(
                module, dropped, scaled_base, bias
            )
            mask = 1 if reader.drops_input else _token_mask(input_, dropout, update.dtype)
            y = reader.op(module, input_, scaled_base, bias) + update * mask
    return y.to(output_dtype(x, weight_dtype)) if wide else y


def _token_mask(ids: Tensor, p: float, dtype: torch.dtype) -> Tensor:
    """A dropout mask [*ids.shape, 1]: dropout of whole tokens, for layers whose input are ids."""
    return F.dropout(torch.ones(*ids.shape, 1, dtype=dtype, device=ids.device), p)
