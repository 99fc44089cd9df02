"""A weighted blend of adapters, for calls of ``veneer.use`` and of a bank.

    W' = W + Σ wᵢ (W'ᵢ - W)        for each weight, and for each parameter that is trained in full

This equation defines a blend, and its gradient, for every layer and variant. A layer that is linear
in its one weight computes the blend in factors, without forming a weight:

    y = y₀ + Σ wᵢ (gainᵢ ⊙ (y₀ + op(x; ΔWᵢ)) - y₀)        y₀ = op(x; W)

Without a gain, this is one product whose rank is the sum of the adapters' ranks. All other layers
form the blended weights. ``kernels/batched.py`` computes the rows of a bank.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from veneer import context
from veneer.attach.layer.call import Call
from veneer.attach.layer.change import frozen_weight
from veneer.attach.layer.layer_adapter import LayerAdapter
from veneer.attach.layer.layer_call import (
    LinearCall,
    is_jagged,
    on_values,
    run_factored,
    with_update,
)
from veneer.attach.layer.state import ActiveAdapter, ModulePath
from veneer.attach.layer.views import run_on_view
from veneer.distributed import base_class
from veneer.errors import SelectionError
from veneer.kernels import cost_model, fused
from veneer.lowrank import LowRank
from veneer.precision import at_least_float32
from veneer.variants import VARIANTS

_PLAIN = VARIANTS["lora"]


def require_finite_weights(weights: Mapping[Any, Any]) -> None:
    """Raise a SelectionError unless every weight of {name: weight} is a finite number."""
    for name, weight in weights.items():
        is_number = isinstance(weight, int | float) and not isinstance(weight, bool)
        try:
            is_finite = is_number and math.isfinite(weight)
        except OverflowError:  # an integer too large for a float
            is_finite = False
        if not is_finite:
            problem = f"weight {weight!r} of {name!r}"
            raise SelectionError(problem, "a finite number", "correct the weight")


def blend_adapters(uses: Sequence[tuple[ActiveAdapter, float]]) -> ActiveAdapter:
    """The ``ActiveAdapter`` of a call that blends these (adapter, weight) pairs."""
    if len(uses) == 1 and uses[0][1] == 1:
        return uses[0][0]
    if invoked := [str(selected.name) for selected, _ in uses if selected.invocation_tokens]:
        problem = f"a blend with {', '.join(map(repr, invoked))}, which has invocation tokens"
        do = "use it alone, or for some rows of the batch"
        raise SelectionError(problem, "adapters that act on every token", do)
    on = common_base_adapter([selected for selected, _ in uses])
    return ActiveAdapter(
        " + ".join(f"{weight!r} {selected.name}" for selected, weight in uses),
        _BlendTable(uses),
        on,
    )


def common_base_adapter(selections: Sequence[ActiveAdapter]) -> str | None:
    """The common ``ActiveAdapter.on`` of adapters that one call uses together.

    Raises:
        SelectionError: the adapters were attached to different weights.
    """
    bases = {selected.on: selected.name for selected in selections}
    if len(bases) > 1:
        (first_base, first), (second_base, second), *_ = bases.items()
        descriptions = [
            f"{name!r} (attached while {base_adapter!r} was merged)" if base_adapter else repr(name)
            for base_adapter, name in ((first_base, first), (second_base, second))
        ]
        problem = f"{' and '.join(descriptions)} in one call"
        raise SelectionError(
            problem,
            "adapters of the same weights",
            "use one of them alone, or unmerge before attaching",
        )
    return next(iter(bases))


class _BlendTable(Mapping[Any, Any]):
    """The ``Blend`` of each layer, by the key of the layer's state."""

    def __init__(self, uses: Sequence[tuple[ActiveAdapter, float]]) -> None:
        self.uses = uses

    def __getitem__(self, key: Any) -> Blend:
        components = [
            (selected.table[key], weight) for selected, weight in self.uses if key in selected.table
        ]
        if not components:
            raise KeyError(key)
        return Blend(components)

    def __iter__(self) -> Iterator[Any]:
        return iter(dict.fromkeys(key for selected, _ in self.uses for key in selected.table))

    def __len__(self) -> int:
        return len(list(iter(self)))


class Blend:
    """A blend of adapters at one layer, with the interface of a ``LayerAdapter``, for one call.

    ``components`` are the (layer adapter, weight) pairs that are blended.
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
    def read_below(self) -> dict[ModulePath, Blend]:
        return self.below("forward")

    @property
    def entries(self) -> dict[str, dict[ModulePath, Blend]]:
        return {
            method: self.below(method)
            for layer_adapter, _ in self.components
            for method in layer_adapter.entries
        }

    def below(self, method: str) -> dict[ModulePath, Blend]:
        components: dict[ModulePath, list[tuple[Any, float]]] = {}
        for layer_adapter, weight in self.components:
            read_adapters = (
                layer_adapter.read_below
                if method == "forward"
                else layer_adapter.entries.get(method, {})
            )
            for path, read_adapter in read_adapters.items():
                components.setdefault(path, []).append((read_adapter, weight))
        return {path: Blend(read_components) for path, read_components in components.items()}

    def reached_ids(self, method: str = "forward") -> Iterator[int]:
        for layer_adapter, _ in self.components:
            if method == "forward" or method in layer_adapter.entries:
                yield from layer_adapter.reached_ids(method)

    def replacements(self, module: nn.Module) -> dict[str, Tensor]:
        module_tensors: dict[str, Any] = {**module._buffers, **module._parameters}
        weighted_tensors = [
            (layer_adapter.replacements(module), weight)
            for layer_adapter, weight in self.components
        ]
        if module.training and any("running_mean" in tensors for tensors, _ in weighted_tensors):
            problem = (
                f"a blend at a {base_class(module).__name__} in training mode, which moves its"
                " running statistics"
            )
            do = "call eval() on that module, or train one adapter at a time"
            raise SelectionError(problem, "one adapter, whose statistics they are", do)
        # Another adapter may train in full what one changes at a low rank: ``changed_weights``
        # blends these parameters.
        low = self.changes
        return self._blend_tensors(
            [
                ({name: value for name, value in tensors.items() if name not in low}, weight)
                for tensors, weight in weighted_tensors
            ],
            module_tensors,
        )

    def run(self, call: Call) -> Any:
        """As ``LayerAdapter.run``."""
        if (
            call.method != "forward"
            or call.context.path == cost_model.MATERIALISED
            or not self._can_factor(call.layer_state, len(call.args) + len(call.kwargs))
        ):
            return run_on_view(self, call)
        if is_jagged(call.x) and call.layer_state.layer.by_position:
            return on_values(self.run, call)
        linear_call = LinearCall(call, self.replacements(call.module), bool(self.entries))
        linear_call.refuse_other_dtype(next(iter(self.changes.values())))
        return self._run_factored(linear_call)

    def _can_factor(self, layer_state: Any, inputs: int) -> bool:
        """Whether a call can be computed in factors: it is linear in the layer's one weight, and
        every adapter either changes this weight at a low rank or does not change it."""
        if not (layer_state.factors and self.changes and inputs == 1) or self.read_below:
            return False
        weight_name = layer_state.layer.weight
        if not all(
            isinstance(layer_adapter, LayerAdapter)
            and weight_name not in layer_adapter.full._parameters
            for layer_adapter, _ in self.components
        ):
            return False  # trained in full, or a layer adapter of a bank
        # A gain rescales rows of ΔW, which a tied layer reads as inputs: there W + ΔW must be
        # formed.
        return not layer_state.transposed or all(
            c.variant.resolve is _PLAIN.resolve for c in self.changes.values()
        )

    def _run_factored(self, call: LinearCall) -> Tensor:
        layer_state, x, weight = call.layer_state, call.x, call.weight
        reader: Any = layer_state.layer
        uses = [
            (layer_adapter.changes[reader.weight], share)
            for layer_adapter, share in self.components
            if layer_adapter.changes
        ]
        changes, shares = zip(*uses, strict=True)
        lows, gains = zip(*(change.resolve(weight) for change in changes), strict=True)
        dropouts = [change.dropout if change.training else 0.0 for change in changes]
        has_gain, first = any(gain is not None for gain in gains), changes[0]
        if not has_gain and not any(dropouts):
            low, form = LowRank.sum(lows, shares), False
            if context.current.path is None and layer_state.product and fused.applies(x, weight):
                _, out, in_ = first.dims
                forms_above = cost_model.forms_above(out, in_, low.rank, weight.dtype)
                form = x.numel() // x.shape[-1] > forms_above
            return run_factored(call, first, low, None, 0.0, form)
        y = frozen = call.frozen(first, biased=not has_gain)
        for low, gain, share, dropout in zip(lows, gains, shares, dropouts, strict=True):
            low = low.T if layer_state.transposed else low
            if gain is None:
                scaled = LowRank(low.A, low.B, low.scale * share)
                y = with_update(reader, call.module, x, y, scaled, None, None, dropout)
            else:
                adapter_output = with_update(
                    reader, call.module, x, frozen, low, gain, None, dropout
                )
                y = y + (adapter_output - frozen) * share
        bias = call.bias(first) if has_gain else None
        return y if bias is None else y + reader.per_output(call.module, bias, y).to(y.dtype)

    def stacks(self, module: nn.Module) -> dict[str, tuple[Any, LowRank]] | None:
        """As ``LayerAdapter.stacks``: the adapters' changes are concatenated into one change whose
        rank is the sum of theirs."""
        stacks: dict[str, list[tuple[Any, LowRank, float]]] = {}
        for layer_adapter, weight in self.components:
            layer_stacks = layer_adapter.stacks(module)
            if (
                layer_stacks is None
                or layer_adapter.replacements(module).keys() & self.changes.keys()
            ):
                return None
            for name, (stack, low) in layer_stacks.items():
                stacks.setdefault(name, []).append((stack, low, weight))
        sums = {}
        for name, uses in stacks.items():
            A = torch.cat([low.A for _, low, _ in uses], 1)
            B = torch.cat([low.B * (low.scale * weight) for _, low, weight in uses], 2)
            sums[name] = uses[0][0], LowRank(A, B, 1.0)
        return sums

    def changed_weights(self, module: nn.Module, wide: bool) -> dict[str, Tensor]:
        """As ``LayerAdapter.changed_weights``. Without ``wide``, the blend is rounded once."""
        base_weights, dtypes, values = {}, {}, []
        for name, change in self.changes.items():
            dense = change.storage.dense(frozen_weight(change, module, name))
            base_weights[name], dtypes[name] = dense.to(at_least_float32(dense.dtype)), dense.dtype
        for layer_adapter, weight in self.components:
            full = {
                name: value
                for name, value in layer_adapter.replacements(module).items()
                if name in base_weights
            }
            values.append(({**full, **layer_adapter.changed_weights(module, wide=True)}, weight))
        blended = self._blend_tensors(values, base_weights)
        return (
            blended if wide else {name: value.to(dtypes[name]) for name, value in blended.items()}
        )

    def _blend_tensors(
        self, values: Sequence[tuple[Mapping[str, Tensor], float]], base_tensors: Mapping[str, Any]
    ) -> dict[str, Tensor]:
        blended: dict[str, Tensor] = {}
        for name in dict.fromkeys(name for tensors, _ in values for name in tensors):
            base = base_tensors[name]
            if base is None:  # the bias of a layer without one
                base = torch.zeros_like(
                    next(tensors[name] for tensors, _ in values if name in tensors)
                )
            if not base.is_floating_point():  # a counter of batches
                blended[name] = next(tensors[name] for tensors, _ in values if name in tensors)
                continue
            wide = base.to(at_least_float32(base.dtype))
            differences = (
                weight * (tensors[name].to(wide.dtype) - wide)
                for tensors, weight in values
                if name in tensors
            )
            total: Any = sum(differences, wide)
            blended[name] = total.to(base.dtype)
        return blended
