"""A weighted blend of adapters, for calls of ``veneer.use`` and of a bank.

    W' = W + Σ wᵢ (W'ᵢ - W)        for each weight, and for each parameter that is trained in full

W'ᵢ is the weight W as adapter i alone would change it, and wᵢ the coefficient of adapter i. The
equation above defines a blend, and its gradient, for every layer and variant. A layer that is
linear in its one weight computes the blend in factors, without forming a weight:

    y = y₀ + Σ wᵢ (gainᵢ ⊙ (y₀ + op(x; ΔWᵢ)) - y₀)        y₀ = op(x; W)

op is the layer's operation without its bias, gainᵢ a factor for each output, as in DoRA. If no
adapter has a gain or dropout, the sum is one low-rank product, whose rank is the sum of the
adapters' ranks. All other layers form the blended weights. A ``Bank`` uses this file only for
calls that it cannot compute with ``kernels/batched.py``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from veneer import context
from veneer.attach.layer.change import frozen_weight
from veneer.attach.layer.layer_adapter import LayerAdapter
from veneer.attach.layer.layer_call import (
    LinearCall,
    add_update,
    is_jagged,
    run_factored,
    run_on_values,
)
from veneer.attach.layer.state import ActiveAdapter, Call, ModulePath
from veneer.attach.layer.views import run_on_view
from veneer.distributed import base_class
from veneer.errors import SelectionError
from veneer.kernels import cost_model, fused
from veneer.lowrank import LowRank
from veneer.precision import at_least_float32
from veneer.variants import VARIANTS

_LORA = VARIANTS["lora"]


def require_finite_coefficients(coefficients: Mapping[Any, Any]) -> None:
    """Raise a SelectionError unless every coefficient of a blend {adapter name: coefficient} is a
    finite number."""
    for name, coefficient in coefficients.items():
        is_number = isinstance(coefficient, int | float) and not isinstance(coefficient, bool)
        try:
            is_finite = is_number and math.isfinite(coefficient)
        except OverflowError:  # an integer too large for a float
            is_finite = False
        if not is_finite:
            raise SelectionError(
                f"weight {coefficient!r} of {name!r}", "a finite number", "correct the weight"
            )


def blend_adapters(weighted_adapters: Sequence[tuple[ActiveAdapter, float]]) -> ActiveAdapter:
    """The ``ActiveAdapter`` of a call that blends adapters, given as (adapter, coefficient) pairs.

    Raises:
        SelectionError: an adapter has invocation tokens, or the adapters were attached to different
            weights.
    """
    if len(weighted_adapters) == 1 and weighted_adapters[0][1] == 1:
        return weighted_adapters[0][0]
    if invoked_names := [
        str(selection.name) for selection, _ in weighted_adapters if selection.invocation_tokens
    ]:
        raise SelectionError(
            f"a blend with {', '.join(map(repr, invoked_names))}, which has invocation tokens",
            "adapters that act on every token",
            "use it alone, or for some rows of the batch",
        )
    base_name = common_base_adapter([selection for selection, _ in weighted_adapters])
    return ActiveAdapter(
        " + ".join(
            f"{coefficient!r} {selection.name}" for selection, coefficient in weighted_adapters
        ),
        _BlendTable(weighted_adapters),
        base_name,
    )


def common_base_adapter(selections: Sequence[ActiveAdapter]) -> str | None:
    """The name of the adapter that was merged into the weights when ``selections``, the adapters
    that one call uses together, were attached (``ActiveAdapter.merged_at_attach``). None if none
    was merged.

    Raises:
        SelectionError: the adapters were attached to different weights, because another adapter was
            merged or unmerged in between.
    """
    name_by_base_adapter = {selection.merged_at_attach: selection.name for selection in selections}
    if len(name_by_base_adapter) > 1:
        (first_base_adapter, first_name), (second_base_adapter, second_name), *_ = (
            name_by_base_adapter.items()
        )
        descriptions = [
            f"{name!r} (attached while {base_adapter!r} was merged)" if base_adapter else repr(name)
            for base_adapter, name in (
                (first_base_adapter, first_name),
                (second_base_adapter, second_name),
            )
        ]
        raise SelectionError(
            f"{' and '.join(descriptions)} in one call",
            "adapters of the same weights",
            "use one of them alone, or unmerge before attaching",
        )
    return next(iter(name_by_base_adapter))


class _BlendTable(Mapping[Any, Any]):
    """The ``Blend`` of each layer that one of the blended adapters changes, by the key of the
    layer (as in ``ActiveAdapter.layer_adapters``). Each lookup creates a ``Blend``, so adapters
    that have been detached raise an error."""

    def __init__(self, weighted_adapters: Sequence[tuple[ActiveAdapter, float]]) -> None:
        self.weighted_adapters = weighted_adapters

    def __getitem__(self, layer_key: Any) -> Blend:
        components = [
            (selection.usable_layer_adapters[layer_key], coefficient)
            for selection, coefficient in self.weighted_adapters
            if layer_key in selection.usable_layer_adapters
        ]
        if not components:
            raise KeyError(layer_key)
        return Blend(components)

    def __iter__(self) -> Iterator[Any]:
        return iter(
            dict.fromkeys(
                layer_key
                for selection, _ in self.weighted_adapters
                for layer_key in selection.usable_layer_adapters
            )
        )

    def __len__(self) -> int:
        return len(list(iter(self)))


class Blend:
    """A blend of adapters at one layer, for one call. It has the interface of a ``LayerAdapter``,
    one adapter's changes at a layer.

    ``components`` are the (layer adapter, coefficient) pairs that are blended.
    """

    def __init__(self, components: Sequence[tuple[Any, float]]) -> None:
        self.components = components

    @property
    def changes(self) -> dict[str, Any]:
        return {
            name: change
            for layer_adapter, _ in self.components
            for name, change in layer_adapter.changes.items()
        }

    @property
    def submodule_adapters(self) -> dict[ModulePath, Blend]:
        return self.adapters_read_by("forward")

    @property
    def submodule_adapters_by_method(self) -> dict[str, dict[ModulePath, Blend]]:
        return {
            method: self.adapters_read_by(method)
            for layer_adapter, _ in self.components
            for method in layer_adapter.submodule_adapters_by_method
        }

    def adapters_read_by(self, method: str) -> dict[ModulePath, Blend]:
        """The blends of the submodules whose weights ``method`` reads without calling them, by the
        path of the submodule from this module."""
        components_by_path: dict[ModulePath, list[tuple[Any, float]]] = {}
        for layer_adapter, coefficient in self.components:
            for path, submodule_adapter in layer_adapter.adapters_read_by(method).items():
                components_by_path.setdefault(path, []).append((submodule_adapter, coefficient))
        return {path: Blend(components) for path, components in components_by_path.items()}

    def reached_ids(self, method: str = "forward") -> Iterator[int]:
        for layer_adapter, _ in self.components:
            if method == "forward" or method in layer_adapter.submodule_adapters_by_method:
                yield from layer_adapter.reached_ids(method)

    def replacements(self, module: nn.Module) -> dict[str, Tensor]:
        """The blended tensors that replace parameters and buffers of ``module``, by name: those
        that an adapter has trained in full. Weights that another adapter changes at a low rank are
        left to ``changed_weights``.

        Raises:
            SelectionError: ``module`` is a batch norm in training mode, which would update its
                running statistics, and a blend has none of its own.
        """
        module_tensors: dict[str, Any] = {**module._buffers, **module._parameters}
        weighted_tensors = [
            (layer_adapter.replacements(module), coefficient)
            for layer_adapter, coefficient in self.components
        ]
        if module.training and any("running_mean" in tensors for tensors, _ in weighted_tensors):
            raise SelectionError(
                f"a blend at a {base_class(module).__name__} in training mode, which moves its"
                " running statistics",
                "one adapter, whose statistics they are",
                "call eval() on that module, or train one adapter at a time",
            )
        # One adapter may train in full a weight that another adapter changes at a low rank.
        # ``changed_weights`` blends such a weight, so leave it out here.
        low_rank_names = self.changes
        return self._blend_tensors(
            [
                (
                    {name: value for name, value in tensors.items() if name not in low_rank_names},
                    coefficient,
                )
                for tensors, coefficient in weighted_tensors
            ],
            module_tensors,
        )

    def run(self, call: Call) -> Any:
        """The output of a call with the weighted sum of the adapters' changes."""
        if (
            call.method != "forward"
            or call.context.path == cost_model.MATERIALISED
            or not self._can_factor(call.layer_state, len(call.args) + len(call.kwargs))
        ):
            return run_on_view(self, call)
        if is_jagged(call.x) and call.layer_state.layer.by_position:
            return run_on_values(self.run, call)
        adapts_methods = bool(self.submodule_adapters_by_method)
        linear_call = LinearCall(call, self.replacements(call.module), adapts_methods)
        linear_call.refuse_other_dtype(next(iter(self.changes.values())))
        return self._run_factored(linear_call)

    def _can_factor(self, layer_state: Any, input_count: int) -> bool:
        """Whether a call with ``input_count`` arguments can be computed in factored form, without
        forming a weight: the layer is linear in its one weight, and every adapter either changes
        this weight at a low rank or does not change it."""
        if (
            not (layer_state.supports_factored and self.changes and input_count == 1)
            or self.submodule_adapters
        ):
            return False
        weight_name = layer_state.layer.weight
        if not all(
            isinstance(layer_adapter, LayerAdapter)
            and weight_name not in layer_adapter.full._parameters
            for layer_adapter, _ in self.components
        ):
            return False  # an adapter trains the weight in full, or belongs to a ``Bank``
        # Only the plain LoRA formula is known to have no gain, a factor for each row of W + ΔW. A
        # tied layer that holds the weight transposed reads these rows as inputs, so it cannot apply
        # the gain to its outputs, and must form W + ΔW.
        return all(
            change.variant.resolve is _LORA.resolve
            or not change.is_transposed_in(layer_state.layer)
            for layer_adapter, _ in self.components
            for change in layer_adapter.changes.values()
        )

    def _run_factored(self, call: LinearCall) -> Tensor:
        """The output of a blend in factored form: one product with the base weight, and a low-rank
        product for each adapter, or for all adapters at once if no change has a gain or dropout. In
        the latter case, a call with many tokens may form W + ΔW instead."""
        layer_state, x, base_weight = call.layer_state, call.x, call.weight
        kind: Any = layer_state.layer
        weighted_changes = [
            (layer_adapter.changes[kind.weight], coefficient)
            for layer_adapter, coefficient in self.components
            if layer_adapter.changes
        ]
        changes, coefficients = zip(*weighted_changes, strict=True)
        resolved_changes = [change.resolve(base_weight) for change in changes]
        low_ranks = [
            change.as_read_by(kind, low_rank)
            for change, (low_rank, _) in zip(changes, resolved_changes, strict=True)
        ]
        gains = [gain for _, gain in resolved_changes]
        dropouts = [change.dropout if change.training else 0.0 for change in changes]
        has_gain, first_change = any(gain is not None for gain in gains), changes[0]
        if not has_gain and not any(dropouts):
            low_rank, forms_weight = LowRank.sum(low_ranks, coefficients), False
            if (
                context.current.path is None
                and layer_state.is_plain_product
                and fused.applies(x, base_weight)
            ):
                _, out_features, in_features = first_change.dims
                max_factored_tokens = cost_model.max_factored_tokens(
                    out_features, in_features, low_rank.rank, base_weight.dtype
                )
                forms_weight = x.numel() // x.shape[-1] > max_factored_tokens
            return run_factored(call, first_change, low_rank, None, 0.0, forms_weight)
        y = base_y = call.base_output(first_change, with_bias=not has_gain)
        for low_rank, gain, coefficient, dropout in zip(
            low_ranks, gains, coefficients, dropouts, strict=True
        ):
            if gain is None:
                scaled_low_rank = LowRank(low_rank.A, low_rank.B, low_rank.scale * coefficient)
                y = add_update(kind, call.module, x, y, scaled_low_rank, None, None, dropout)
            else:
                adapter_y = add_update(kind, call.module, x, base_y, low_rank, gain, None, dropout)
                y = y + (adapter_y - base_y) * coefficient
        bias = call.bias(first_change) if has_gain else None
        return y if bias is None else y + kind.per_output(call.module, bias, y).to(y.dtype)

    def stacks(self, module: nn.Module) -> dict[str, tuple[Any, LowRank]] | None:
        """As ``LayerAdapter.stacks``: for a module of experts, (weight, blended ΔW) of each stack
        of matrices, by name. A and B of the adapters' changes are concatenated along the rank, so
        the rank of the blended ΔW is the sum of their ranks. None if a weight must be formed."""
        weighted_stacks: dict[str, list[tuple[Any, LowRank, float]]] = {}
        for layer_adapter, coefficient in self.components:
            layer_stacks = layer_adapter.stacks(module)
            if (
                layer_stacks is None
                or layer_adapter.replacements(module).keys() & self.changes.keys()
            ):
                return None
            for name, (stack, low_rank) in layer_stacks.items():
                weighted_stacks.setdefault(name, []).append((stack, low_rank, coefficient))
        blended_stacks = {}
        for name, weighted_terms in weighted_stacks.items():
            A = torch.cat([low_rank.A for _, low_rank, _ in weighted_terms], 1)
            B = torch.cat(
                [
                    low_rank.B * (low_rank.scale * coefficient)
                    for _, low_rank, coefficient in weighted_terms
                ],
                2,
            )
            blended_stacks[name] = weighted_terms[0][0], LowRank(A, B, 1.0)
        return blended_stacks

    def changed_weights(self, module: nn.Module, wide: bool) -> dict[str, Tensor]:
        """The blended weight for each weight that an adapter changes at a low rank, by name. In at
        least float32 if ``wide``, else rounded once to the dtype of the weight."""
        base_weights, dtypes, weighted_tensors = {}, {}, []
        for name, change in self.changes.items():
            dense = change.storage.dense(frozen_weight(change, module, name))
            base_weights[name], dtypes[name] = dense.to(at_least_float32(dense.dtype)), dense.dtype
        for layer_adapter, coefficient in self.components:
            replacements = {
                name: tensor
                for name, tensor in layer_adapter.replacements(module).items()
                if name in base_weights
            }
            tensors = {**replacements, **layer_adapter.changed_weights(module, wide=True)}
            weighted_tensors.append((tensors, coefficient))
        blended = self._blend_tensors(weighted_tensors, base_weights)
        if wide:
            return blended
        return {name: tensor.to(dtypes[name]) for name, tensor in blended.items()}

    def _blend_tensors(
        self,
        weighted_tensors: Sequence[tuple[Mapping[str, Tensor], float]],
        base_tensors: Mapping[str, Any],
    ) -> dict[str, Tensor]:
        """The blend, base + Σ coefficient · (tensor − base), of the tensors of each name.

        Args:
            weighted_tensors: ({name: tensor}, coefficient) of each adapter. An adapter without a
                tensor of a name adds nothing to it.
            base_tensors: the base's tensor by name; None for a bias that the layer does not have.
        """
        blended: dict[str, Tensor] = {}
        for name in dict.fromkeys(name for tensors, _ in weighted_tensors for name in tensors):
            base_tensor = base_tensors[name]
            first_tensor = next(tensors[name] for tensors, _ in weighted_tensors if name in tensors)
            if base_tensor is None:  # the bias of a layer without a bias
                base_tensor = torch.zeros_like(first_tensor)
            if not base_tensor.is_floating_point():  # such as the batch counter of a batch norm
                blended[name] = first_tensor
                continue
            wide_base = base_tensor.to(at_least_float32(base_tensor.dtype))
            differences = (
                coefficient * (tensors[name].to(wide_base.dtype) - wide_base)
                for tensors, coefficient in weighted_tensors
                if name in tensors
            )
            blended_tensor: Any = sum(differences, wide_base)
            blended[name] = blended_tensor.to(base_tensor.dtype)
        return blended
