"""The changes of one adapter at one layer, and the choice of the arithmetic for a call.

Linear, adapted (a subclass of nn.Linear: ``adapted_module.py``)
  .weight, .bias                      the Parameters of the base, unchanged
  ._modules["veneer"]: LayerState     the adapters of this layer, by name
      ["default"]: LayerAdapter       the changes of one adapter at this layer
          .low["weight"]: Change      the adapter parameters A, B, … of one weight
          .full                       parameters that are trained in full, and running statistics

factored      y = gain ⊙ (op(x; W) + op(drop(x); ΔW)) + bias     layers linear in their one weight
materialised  y = op(x; gain ⊙ (W + ΔW)) + bias                  the same layers, by the definition
viewed        y = forward(x) of a view of the module whose       every other module
              weights are gain ⊙ (W + ΔW)

Rejected:
- Wrapping the layer renames every parameter, and breaks ``isinstance`` and tied weights.
- Replacing ``forward`` on the instance needs a bound method per copy, which pickle loses.
- Forward hooks cost two more calls a layer and cannot change the weight that is used.
- ``parametrize`` always materialises, changes the keys of the state dict and cannot be pickled.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from veneer.attach.layer.call import Call
from veneer.attach.layer.change import Change, changed_storage_error, frozen_weight
from veneer.attach.layer.experts import drop_inputs, is_stack
from veneer.attach.layer.fused_linear import (
    FusedChange,
    SharedInputLayers,
    make_fused_change,
    outputs,
    seed_of,
)
from veneer.attach.layer.layer_call import (
    LinearCall,
    is_jagged,
    on_values,
    run_factored,
    run_materialised,
)
from veneer.attach.layer.state import LayerState, ModulePath
from veneer.attach.layer.views import run_on_view
from veneer.kernels import cost_model, device, fused
from veneer.layers import Layer
from veneer.lowrank import LowRank
from veneer.precision import at_least_float32
from veneer.variants import VARIANTS


def _trains_both(change: Change) -> bool:
    """Whether a change is a product of two trained parameters A and B, as in LoRA. In MiCA, for
    example, B is a buffer."""
    return change.variant.resolve is VARIANTS["lora"].resolve and not change.variant.frozen


class LayerAdapter(nn.Module):
    """The changes of one adapter at one layer.

    Fields:
        changes: the changes of this module's weights, by name.
        low: a module with those of ``changes`` that are registered here. A change of a tied weight
            is registered in one layer adapter only.
        full: a module with full replacements of parameters and buffers, by name.
        read_below: the layer adapters of modules below, by path, whose weights the forward of this
            module reads directly.
        entries: the same for each other method that reads an adapted weight, here or below.
        has_gain: whether a change of a stack of matrices has a gain, as found in an earlier call.
        direct: the change in the form that the fused kernel takes, if it is one plain change.
        together: the layers that read the same input as this one, if they are computed together.
    """

    full: nn.Module
    low: nn.Module

    def __init__(self) -> None:
        super().__init__()
        self.low = nn.Module()
        self.full = nn.Module()
        self.changes: dict[str, Change] = {}
        self.has_gain = False
        self.direct: FusedChange | None = None
        self.together: SharedInputLayers | None = None
        self.read_below: dict[ModulePath, LayerAdapter] = {}
        self.entries: dict[str, dict[ModulePath, LayerAdapter]] = {}

    def keys(self, layer_state: LayerState) -> Iterator[Any]:
        """The keys of an ``ActiveAdapter`` under which this layer adapter is looked up: the key of
        the layer's state for ``forward``, unless nothing changes there, and a key for each other
        method."""
        if (
            self.changes
            or self.read_below
            or self.full._parameters
            or self.full._buffers
            or layer_state.attributes
        ):
            yield layer_state.key
        for method in self.entries:
            yield layer_state.key, method

    def finalize(self, module: nn.Module, layer_state: LayerState) -> None:
        """Called once all changes are set: set ``direct`` if the layer adapter is one product B A
        for all outputs, which the fused kernel can compute."""
        changes = tuple(self.changes.values())
        single = len(changes) == 1 and not (
            self.read_below or self.full._parameters or self.full._buffers
        )
        plain = single and _trains_both(changes[0])
        if (
            plain
            and changes[0].rows is None
            and changes[0].tokens is None
            and changes[0].frozen_input is None
            and layer_state.product
            and not layer_state.transposed
        ):
            self.direct = make_fused_change(changes[0], module, cast(Layer, layer_state.layer))

    def reached_ids(self, method: str = "forward") -> Iterator[int]:
        """The ``id`` of every layer adapter and change that takes part in a call of this layer, for
        ``Context.reached``."""
        yield id(self)
        yield from map(id, self.changes.values())
        for layer_adapter in self.below(method).values():
            yield from layer_adapter.reached_ids()

    def below(self, method: str) -> Mapping[ModulePath, LayerAdapter]:
        """The layer adapters of modules below whose weights a method reads directly, by path."""
        return self.read_below if method == "forward" else self.entries[method]

    def replacements(self, module: nn.Module) -> dict[str, Tensor]:
        """The replacements of the module's parameters and buffers by ``full``, in the dtypes of the
        replaced ones."""
        full = self.full
        if not full._parameters and not full._buffers:
            return {}
        module_tensors: dict[str, Any] = {**module._buffers, **module._parameters}
        for name in full._parameters.keys() - module_tensors.keys():
            raise changed_storage_error(module, name)
        # the bias of a layer that has none: in the dtype of the layer's weight
        if "bias" in full._parameters and module_tensors["bias"] is None:
            module_tensors["bias"] = module_tensors["weight"]
        trained: dict[str, Any] = {
            name: value.to(module_tensors[name].dtype) for name, value in full._parameters.items()
        }
        return {**trained, **cast(dict[str, Tensor], full._buffers)}

    def run(self, call: Call) -> Any:
        """The output of a call with the changes of this adapter."""
        module, _, _, args, kwargs, calling_context, method, share, seed = call
        if method != "forward":
            return run_on_view(self, call)
        fused_change = self.direct
        try:
            if (
                fused_change is not None
                and not (kwargs or args[1:])
                and calling_context.path is None
                and fused_change.weight in module._parameters
            ):
                # Avoid Python calls here: every layer of a decoding step runs this.
                x, parameters = args[0], module._parameters
                weight: Any = parameters[fused_change.weight]
                if fused.applies(x, weight):
                    if (
                        self.together is not None
                        and share
                        and self.together.applies(fused_change, x)
                    ):
                        return self.together.output(module, self, x)
                    shape, change = x.shape, fused_change.change
                    tokens = shape[0] * shape[1] if x.ndim == 3 else x.numel() // shape[-1]
                    if change.dropout and change.training:
                        seed = seed_of(module, self, x) if share and seed is None else seed
                        return outputs([(module, fused_change)], x, seed)[0]
                    if tokens > fused_change.forms_above:
                        return outputs([(module, fused_change)], x)[0]
                    factors: Any = change._parameters
                    bias = None if fused_change.bias is None else parameters[fused_change.bias]
                    weight = weight.mT if fused_change.flipped else weight
                    run = fused.linear if torch.is_grad_enabled() else fused.linear_without_graph
                    return run(change.scale, x, weight, bias, factors["A"], factors["B"])
                if device.applies(x, weight):
                    return self._run_with_shared_input(module, fused_change, x, share, seed)
        except KeyError as error:
            if fused_change is None or error.args != (fused_change.bias,):
                raise
            # The bias of this layer, or of one that is computed with it, is no longer a parameter:
            # it may have been pruned.
        return self._run_any(call)

    def _run_any(self, call: Call) -> Any:
        """The output of a forward that is not one fused product. It is computed in factors, with
        the changed weight, or on a view."""
        module, layer_state = call.module, call.layer_state
        full = self.replacements(module)
        if (
            not (layer_state.factors and self.changes and len(call.args) + len(call.kwargs) == 1)
            or self.read_below
        ):
            return run_on_view(self, call)
        reader: Any = layer_state.layer
        if is_jagged(call.x) and reader.by_position:
            return on_values(self._run_any, call)
        change = self.changes[reader.weight]
        low, gain = change.resolve(frozen_weight(change, module, reader.weight))
        dropout = change.dropout if change.training else 0.0
        linear_call = LinearCall(call, full, bool(self.entries))
        linear_call.refuse_other_dtype(change)
        # A gain scales rows of ΔW. A layer that holds the weight transposed reads these rows as
        # inputs, so that it must form W + ΔW.
        if call.context.path == cost_model.MATERIALISED or (
            gain is not None and layer_state.transposed
        ):
            weight, bias = linear_call.weight, linear_call.bias(change)
            return run_materialised(change, reader, module, call.x, weight, bias, low, gain)
        return run_factored(linear_call, change, low, gain, dropout)

    def stacks(self, module: nn.Module) -> dict[str, tuple[Any, LowRank]] | None:
        """(W, ΔW) of every changed weight, by name; None unless each is a plain stack of matrices
        and no change has a gain."""
        if self.has_gain:  # cached, because computing the gain again takes W + ΔW
            return None
        weights = {
            name: frozen_weight(change, module, name) for name, change in self.changes.items()
        }
        if not all(is_stack(change, weights[name]) for name, change in self.changes.items()):
            return None
        stacks = {}
        for name, change in self.changes.items():
            if _trains_both(change) and change.rows is change.tokens is None:
                parameters: Any = change._parameters  # in every layer of a decoding step
                low, gain = LowRank(parameters["A"], parameters["B"], change.scale), None
            else:
                low, gain = change.resolve(weights[name])
            if gain is not None:
                self.has_gain = True
                return None
            stacks[name] = weights[name], drop_inputs(change, low)
        return stacks

    def _run_with_shared_input(
        self, module: nn.Module, fused_change: FusedChange, x: Tensor, share: bool, seed: int | None
    ) -> Tensor:
        """The output of a layer on a device, computed by the fused kernel together with the layers
        that read the same x."""
        if self.together is not None and share and self.together.applies(fused_change, x):
            return self.together.output(module, self, x)
        seed = seed_of(module, self, x) if share and fused_change.drops and seed is None else seed
        return outputs([(module, fused_change)], x, seed)[0]

    def changed_weights(self, module: nn.Module, wide: bool) -> dict[str, Tensor]:
        """``gain ⊙ (W + ΔW)`` of every changed weight, by name: in at least float32 if ``wide``,
        else in the dtype of the weight."""
        values = {}
        for name, change in self.changes.items():
            weight = frozen_weight(change, module, name)
            dtype = change.storage.dtype(weight)
            low, gain = change.resolve(weight)
            value = change.changed_weight(weight, low, gain, at_least_float32(dtype), drop=True)
            values[name] = value if wide else value.to(dtype)
        return values
