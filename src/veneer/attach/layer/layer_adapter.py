"""The changes of one adapter at one layer, and the choice of the form that computes a call.

The structure of an adapted nn.Linear (its class is a subclass of nn.Linear: ``adapted_module.py``):
  .weight, .bias                      the Parameters of the base, unchanged
  ._modules["veneer"]: LayerState     the adapters of this layer, by name
      ["default"]: LayerAdapter       the changes of one adapter at this layer
          .low["weight"]: Change      the adapter parameters A, B, … of one weight
          .full                       parameters that are trained in full, and running statistics

factored      y = gain ⊙ (op(x; W) + op(drop(x); ΔW)) + bias     layers linear in their one weight
materialised  y = op(x; gain ⊙ (W + ΔW)) + bias                  the same layers, by the definition
viewed        y = forward(x) of a view of the module, whose      every other module
              weights are gain ⊙ (W + ΔW)

op is the layer's operation without its bias, drop is dropout, gain is a factor for each output.

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

from veneer.attach.layer.change import Change, changed_storage_error, frozen_weight
from veneer.attach.layer.experts import drop_inputs, is_stack
from veneer.attach.layer.fused_linear import (
    FusedChange,
    SharedInputLayers,
    bias_is_parameter,
    fused_outputs,
    make_fused_change,
    shared_dropout_seed,
)
from veneer.attach.layer.layer_call import (
    LinearCall,
    is_jagged,
    run_factored,
    run_materialised,
    run_on_values,
)
from veneer.attach.layer.state import Call, LayerState, ModulePath
from veneer.attach.layer.views import run_on_view
from veneer.kernels import cost_model, device, fused
from veneer.layers import Layer
from veneer.lowrank import LowRank
from veneer.precision import at_least_float32
from veneer.variants import VARIANTS


def _trains_both_factors(change: Change) -> bool:
    """Whether a change is the product of two trained parameters A and B, as in LoRA. A
    counterexample is MiCA, where B is a buffer."""
    return change.variant.resolve is VARIANTS["lora"].resolve and not change.variant.frozen


class LayerAdapter(nn.Module):
    """The changes of one adapter at one layer.

    Fields:
        changes: the low-rank changes of this module's weights, by the name of the weight.
        low: a module whose children are the ``changes`` that are registered here. A change of a
            tied weight is registered in one layer adapter only.
        full: a module whose parameters and buffers replace those of the layer in full, by name.
        submodule_adapters: the layer adapters of submodules whose weights this module's forward
            reads without calling the submodule, by the path of the submodule from this module.
        submodule_adapters_by_method: for each method besides forward that reads adapted weights of
            this module or of a submodule, a mapping like ``submodule_adapters``; by method name.
        has_gain: whether an earlier call found that a change of a stack of matrices has a gain (a
            factor for each output).
        fused_change: the change as the fused kernel takes it; None if that kernel cannot compute
            this layer adapter.
        shared_input_layers: the layers that read the same input and are computed together; None if
            this layer is computed alone.
    """

    full: nn.Module
    low: nn.Module

    def __init__(self) -> None:
        super().__init__()
        self.low = nn.Module()
        self.full = nn.Module()
        self.changes: dict[str, Change] = {}
        self.has_gain = False
        self.fused_change: FusedChange | None = None
        self.shared_input_layers: SharedInputLayers | None = None
        self.submodule_adapters: dict[ModulePath, LayerAdapter] = {}
        self.submodule_adapters_by_method: dict[str, dict[ModulePath, LayerAdapter]] = {}

    def keys(self, layer_state: LayerState) -> Iterator[Any]:
        """The keys under which ``ActiveAdapter.layer_adapters`` holds this layer adapter: the
        layer's key if ``forward`` changes, and (key, method) for each other method that reads
        adapted weights."""
        if (
            self.changes
            or self.submodule_adapters
            or self.full._parameters
            or self.full._buffers
            or layer_state.view_attributes
        ):
            yield layer_state.key
        for method in self.submodule_adapters_by_method:
            yield layer_state.key, method

    def set_fused_change(self, module: nn.Module, layer_state: LayerState) -> None:
        """Set ``fused_change`` if the fused kernel can compute this layer adapter: its only change
        is a plain product B A for all outputs of a plain weight. To be called once all changes are
        set."""
        changes, kind = tuple(self.changes.values()), cast(Layer, layer_state.layer)
        has_one_change = len(changes) == 1 and not (
            self.submodule_adapters or self.full._parameters or self.full._buffers
        )
        if (
            has_one_change
            and _trains_both_factors(changes[0])
            and changes[0].rows is None
            and changes[0].tokens is None
            and changes[0].frozen_input is None
            and layer_state.is_plain_product
            and not changes[0].is_transposed_in(kind)
            and bias_is_parameter(module)
        ):
            self.fused_change = make_fused_change(changes[0], module, kind)

    def reached_ids(self, method: str = "forward") -> Iterator[int]:
        """The ``id`` of every layer adapter and change that a call of this layer's ``method`` uses,
        for ``veneer.check``, which collects them in ``Context.reached_ids``."""
        yield id(self)
        yield from map(id, self.changes.values())
        for layer_adapter in self.adapters_read_by(method).values():
            yield from layer_adapter.reached_ids()

    def adapters_read_by(self, method: str) -> Mapping[ModulePath, LayerAdapter]:
        """The layer adapters of the modules whose weights ``method`` reads without calling the
        module, by the path of the module from this one."""
        return (
            self.submodule_adapters
            if method == "forward"
            else self.submodule_adapters_by_method.get(method, {})
        )

    def replacements(self, module: nn.Module) -> dict[str, Tensor]:
        """The tensors of ``full`` that replace parameters and buffers of the module, by name. A
        parameter is cast to the dtype of the one that it replaces. Raises a SelectionError if the
        module no longer has a parameter that is to be replaced."""
        full_parameters, full_buffers = self.full._parameters, self.full._buffers
        if not full_parameters and not full_buffers:
            return {}
        module_tensors: dict[str, Any] = {**module._buffers, **module._parameters}
        for name in full_parameters.keys() - module_tensors.keys():
            raise changed_storage_error(module, name)
        # The adapter may train a bias for a layer without one. Its dtype is that of the weight.
        if "bias" in full_parameters and module_tensors["bias"] is None:
            module_tensors["bias"] = module_tensors["weight"]
        cast_parameters: dict[str, Any] = {
            name: parameter.to(module_tensors[name].dtype)
            for name, parameter in full_parameters.items()
        }
        return {**cast_parameters, **cast(dict[str, Tensor], full_buffers)}

    def run(self, call: Call) -> Any:
        """The output of a call with the changes of this adapter."""
        module, _, _, args, kwargs, calling_context, method, may_share, seed = call
        if method != "forward":
            return run_on_view(self, call)
        fused_change = self.fused_change
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
                        self.shared_input_layers is not None
                        and may_share
                        and self.shared_input_layers.can_share_outputs(fused_change, x)
                    ):
                        return self.shared_input_layers.output(module, self, x)
                    shape, change = x.shape, fused_change.change
                    token_count = shape[0] * shape[1] if x.ndim == 3 else x.numel() // shape[-1]
                    if change.dropout and change.training:
                        seed = (
                            shared_dropout_seed(module, self, x)
                            if may_share and seed is None
                            else seed
                        )
                        return fused_outputs([(module, fused_change)], x, seed)[0]
                    if token_count > fused_change.max_factored_tokens:
                        return fused_outputs([(module, fused_change)], x)[0]
                    factors: Any = change._parameters
                    bias = None if fused_change.bias is None else parameters[fused_change.bias]
                    weight = weight.mT if fused_change.is_transposed else weight
                    linear_kernel = (
                        fused.linear if torch.is_grad_enabled() else fused.linear_without_graph
                    )
                    return linear_kernel(change.scale, x, weight, bias, factors["A"], factors["B"])
                if device.applies(x, weight):
                    return self._run_with_shared_input(module, fused_change, x, may_share, seed)
        except KeyError as error:
            if fused_change is None or error.args != (fused_change.bias,):
                raise
            # The bias of this layer, or of a layer that is computed with it, is no longer a
            # parameter (pruned, for example). ``_run_unfused`` reads it as an attribute.
        return self._run_unfused(call)

    def _run_unfused(self, call: Call) -> Any:
        """The output of a call of forward, without the fused kernel of ``run``: in factored form,
        in materialised form, or by the module's own forward on a view with changed weights."""
        module, layer_state = call.module, call.layer_state
        replacements = self.replacements(module)
        input_count = len(call.args) + len(call.kwargs)
        if (
            not (layer_state.supports_factored and self.changes and input_count == 1)
            or self.submodule_adapters
        ):
            return run_on_view(self, call)
        kind: Any = layer_state.layer
        if is_jagged(call.x) and kind.by_position:
            return run_on_values(self._run_unfused, call)
        change = self.changes[kind.weight]
        low_rank, gain = change.resolve(frozen_weight(change, module, kind.weight))
        dropout = change.dropout if change.training else 0.0
        linear_call = LinearCall(call, replacements, bool(self.submodule_adapters_by_method))
        linear_call.refuse_other_dtype(change)
        # A gain scales the rows of ΔW. In a layer that stores the weight transposed, these rows
        # belong to inputs, so the layer's output cannot be scaled instead: W + ΔW is formed.
        if call.context.path == cost_model.MATERIALISED or (
            gain is not None and change.is_transposed_in(kind)
        ):
            weight, bias = linear_call.weight, linear_call.bias(change)
            return run_materialised(change, kind, module, call.x, weight, bias, low_rank, gain)
        low_rank = change.as_read_by(kind, low_rank)
        return run_factored(linear_call, change, low_rank, gain, dropout)

    def stacks(self, module: nn.Module) -> dict[str, tuple[Any, LowRank]] | None:
        """(W, ΔW) of every changed weight, by name, with ΔW under dropout in training mode. None
        unless each weight is a plain stack of matrices and no change has a gain."""
        if self.has_gain:  # cached, because ``resolve`` forms W + ΔW for a gain
            return None
        weights = {
            name: frozen_weight(change, module, name) for name, change in self.changes.items()
        }
        if not all(is_stack(change, weights[name]) for name, change in self.changes.items()):
            return None
        stacks = {}
        for name, change in self.changes.items():
            if _trains_both_factors(change) and change.rows is change.tokens is None:
                parameters: Any = change._parameters  # faster than ``resolve``
                low_rank, gain = LowRank(parameters["A"], parameters["B"], change.scale), None
            else:
                low_rank, gain = change.resolve(weights[name])
            if gain is not None:
                self.has_gain = True
                return None
            stacks[name] = weights[name], drop_inputs(change, low_rank)
        return stacks

    def _run_with_shared_input(
        self,
        module: nn.Module,
        fused_change: FusedChange,
        x: Tensor,
        may_share: bool,
        seed: int | None,
    ) -> Tensor:
        """The output of a layer whose x is not on the CPU. If ``may_share``, the fused kernel may
        compute the layers that read the same x too, and their dropout seed is the same. ``seed`` is
        the dropout seed; None draws one."""
        shared_layers = self.shared_input_layers if may_share else None
        if shared_layers is not None and shared_layers.can_share_outputs(fused_change, x):
            return shared_layers.output(module, self, x)
        if may_share and fused_change.active_dropout and seed is None:
            seed = shared_dropout_seed(module, self, x)
        return fused_outputs([(module, fused_change)], x, seed)[0]

    def changed_weights(self, module: nn.Module, wide: bool) -> dict[str, Tensor]:
        """``gain ⊙ (W + ΔW)`` of every changed weight, by name: in at least float32 if ``wide``,
        else in the dtype of the weight. In training mode ΔW has dropout of whole input columns."""
        changed_weights = {}
        for name, change in self.changes.items():
            weight = frozen_weight(change, module, name)
            dtype = change.storage.dtype(weight)
            low_rank, gain = change.resolve(weight)
            changed_weight = change.changed_weight(
                weight, low_rank, gain, at_least_float32(dtype), with_dropout=True
            )
            changed_weights[name] = changed_weight if wide else changed_weight.to(dtype)
        return changed_weights
