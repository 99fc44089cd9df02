"""A weighted blend of adapters, for calls of ``veneer.use`` and of a bank.

    W' = W + Σ wᵢ (W'ᵢ - W)        for each weight, and for each parameter that is trained in full

That defines a blend for every layer and variant, and its gradient. A layer that is linear in its
one weight computes it in factors, without forming a weight: y = y₀ + Σ wᵢ (gainᵢ ⊙ (y₀ + op(x;
ΔWᵢ)) - y₀) with y₀ = op(x; W), which without a gain is one product of the ranks' sum. Elsewhere the
blended weights are formed. A bank's rows have ``kernels/batched.py``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from veneer import context
from veneer.attach.adapted_module import own_class
from veneer.attach.change import frozen_weight
from veneer.attach.dtypes import at_least_float32
from veneer.attach.layer_adapter import (
    Call,
    LayerAdapter,
    factored,
    is_jagged,
    on_values,
    with_update,
)
from veneer.attach.state import ActiveAdapter, ModulePath
from veneer.attach.views import viewed
from veneer.errors import SelectionError
from veneer.kernels import cost_model, fused
from veneer.lowrank import LowRank
from veneer.variants import VARIANTS

_PLAIN = VARIANTS["lora"]


def finite_weights(weights: Mapping[Any, Any]) -> None:
    """Raise a SelectionError unless every weight of {name: weight} is a finite number."""
    for name, weight in weights.items():
        number = isinstance(weight, int | float) and not isinstance(weight, bool)
        try:
            fine = number and math.isfinite(weight)
        except OverflowError:  # a whole number that no float can hold
            fine = False
        if not fine:
            raise SelectionError(f"weight {weight!r} of {name!r}", "a finite number", "correct it")


def blended(uses: Sequence[tuple[ActiveAdapter, float]]) -> ActiveAdapter:
    """What a call uses that blends these adapters with these weights."""
    if len(uses) == 1 and uses[0][1] == 1:
        return uses[0][0]
    on = same_weights([selected for selected, _ in uses])
    return ActiveAdapter(
        " + ".join(f"{weight!r} {selected.name}" for selected, weight in uses), _Table(uses), on
    )


def same_weights(selections: Sequence[ActiveAdapter]) -> str | None:
    """``ActiveAdapter.on`` of what one call uses together; a SelectionError if they are of
    different weights."""
    on = {selected.on: selected.name for selected in selections}
    if len(on) > 1:
        (one, first), (other, second), *_ = on.items()
        merged = [f"{name!r} (attached while {at!r} was merged)" if at else f"{name!r}"
                  for at, name in ((one, first), (other, second))]  # fmt: skip
        problem = f"{' and '.join(merged)} in one call"
        raise SelectionError(
            problem,
            "adapters of the same weights",
            "use one of them alone, or unmerge before attaching",
        )
    return next(iter(on))


class _Table(Mapping[Any, Any]):
    def __init__(self, uses: Sequence[tuple[ActiveAdapter, float]]) -> None:
        self.uses = uses

    def __getitem__(self, key: Any) -> Blend:
        parts = [
            (selected.table[key], weight) for selected, weight in self.uses if key in selected.table
        ]
        if not parts:
            raise KeyError(key)
        return Blend(parts)

    def __iter__(self) -> Iterator[Any]:
        return iter(dict.fromkeys(key for selected, _ in self.uses for key in selected.table))

    def __len__(self) -> int:
        return len(list(iter(self)))


class Blend:
    """Stands where a ``LayerAdapter`` stands, for one call."""

    def __init__(self, parts: Sequence[tuple[Any, float]]) -> None:
        self.parts = parts

    @property
    def changes(self) -> dict[str, Any]:
        return {name: change for part, _ in self.parts for name, change in part.changes.items()}

    @property
    def read_below(self) -> dict[ModulePath, Blend]:
        return self.below("forward")

    @property
    def entries(self) -> dict[str, dict[ModulePath, Blend]]:
        return {method: self.below(method) for part, _ in self.parts for method in part.entries}

    def below(self, method: str) -> dict[ModulePath, Blend]:
        found: dict[ModulePath, list[tuple[Any, float]]] = {}
        for part, weight in self.parts:
            has = part.read_below if method == "forward" else part.entries.get(method, {})
            for way, one in has.items():
                found.setdefault(way, []).append((one, weight))
        return {way: Blend(parts) for way, parts in found.items()}

    def seen(self, method: str = "forward") -> Iterator[int]:
        for part, _ in self.parts:
            if method == "forward" or method in part.entries:
                yield from part.seen(method)

    def replacements(self, module: nn.Module) -> dict[str, Tensor]:
        own: dict[str, Any] = {**module._buffers, **module._parameters}
        values = [(part.replacements(module), weight) for part, weight in self.parts]
        if module.training and any("running_mean" in found for found, _ in values):
            found = (
                f"a blend at a {own_class(module).__name__} in training mode, which moves its"
                " running statistics"
            )
            do = "call eval() on that module, or train one adapter at a time"
            raise SelectionError(found, "one adapter, whose statistics they are", do)
        low = self.changes  # which another adapter may train in full: ``changed`` has both
        return self._blended(
            [({n: v for n, v in found.items() if n not in low}, w) for found, w in values], own
        )

    def run(
        self,
        module: Any,
        base: Any,
        layer_state: Any,
        args: tuple,
        kwargs: dict,
        now: Any,
        share=True,
        method="forward",
    ) -> Any:
        """As ``LayerAdapter.run``."""
        if (
            method == "forward"
            and now.path != cost_model.MATERIALISED
            and self._factors(layer_state, args, kwargs)
        ):
            if is_jagged(args, kwargs) and layer_state.layer.by_position:
                run = partial(self.run, module, base, layer_state, kwargs={}, now=now)
                return on_values(run, args, kwargs)
            call = Call(
                module,
                base,
                layer_state,
                args,
                kwargs,
                self.replacements(module),
                bool(self.entries),
            )
            call.refuse_other_dtype(next(iter(self.changes.values())))
            return self._factored(call)
        return viewed(self, module, base, layer_state, args, kwargs, now, method=method)

    def _factors(self, layer_state: Any, args: tuple, kwargs: dict) -> bool:
        """Whether a call is linear in the one weight of its layer, which each adapter changes at a
        low rank or not."""
        if (
            not (layer_state.factors and self.changes and len(args) + len(kwargs) == 1)
            or self.read_below
        ):
            return False
        own = layer_state.layer.weight
        if not all(
            isinstance(part, LayerAdapter) and own not in part.full._parameters
            for part, _ in self.parts
        ):
            return False  # trained in full, or what a bank made of it
        # rows of ΔW that are rescaled along what a tied layer reads as inputs: only W + ΔW is right
        return not layer_state.transposed or all(
            c.variant.resolve is _PLAIN.resolve for c in self.changes.values()
        )

    def _factored(self, call: Call) -> Tensor:
        layer_state, x, weight = call.layer_state, call.x, call.weight
        reader: Any = layer_state.layer
        uses = [(part.changes[reader.weight], share) for part, share in self.parts if part.changes]
        changes, shares = zip(*uses, strict=True)
        lows, gains = zip(*(change.resolve(weight) for change in changes), strict=True)
        dropouts = [change.dropout if change.training else 0.0 for change in changes]
        gained, first = any(gain is not None for gain in gains), changes[0]
        if not gained and not any(dropouts):
            low, form = LowRank.sum(lows, shares), False
            if context.current.path is None and layer_state.product and fused.applies(x, weight):
                _, out, in_ = first.dims
                forms_above = cost_model.forms_above(out, in_, low.rank, weight.dtype)
                form = x.numel() // x.shape[-1] > forms_above
            return factored(call, first, low, None, 0.0, form)
        y = frozen = call.frozen(first, biased=not gained)
        for low, gain, share, dropout in zip(lows, gains, shares, dropouts, strict=True):
            low = low.T if layer_state.transposed else low
            if gain is None:
                scaled = LowRank(low.A, low.B, low.scale * share)
                y = with_update(reader, call.module, x, y, scaled, None, None, dropout)
            else:
                own = with_update(reader, call.module, x, frozen, low, gain, None, dropout)
                y = y + (own - frozen) * share
        bias = call.bias(first) if gained else None
        return y if bias is None else y + reader.per_output(call.module, bias, y).to(y.dtype)

    def stacks(self, module: nn.Module) -> dict[str, tuple[Any, LowRank]] | None:
        """As ``LayerAdapter.stacks``: the adapters' changes beside each other, as one of the sum of
        their ranks."""
        own: dict[str, list[tuple[Any, LowRank, float]]] = {}
        for part, weight in self.parts:
            found = part.stacks(module)
            if found is None or part.replacements(module).keys() & self.changes.keys():
                return None
            for name, (stack, low) in found.items():
                own.setdefault(name, []).append((stack, low, weight))
        joined = {}
        for name, uses in own.items():
            A = torch.cat([low.A for _, low, _ in uses], 1)
            B = torch.cat([low.B * (low.scale * weight) for _, low, weight in uses], 2)
            joined[name] = uses[0][0], LowRank(A, B, 1.0)
        return joined

    def changed(self, module: nn.Module, wide: bool) -> dict[str, Tensor]:
        """As ``LayerAdapter.changed``. What is not wide is rounded once, after the blend."""
        own, dtypes, values = {}, {}, []
        for name, change in self.changes.items():
            dense = change.storage.dense(frozen_weight(change, module, name))
            own[name], dtypes[name] = dense.to(at_least_float32(dense.dtype)), dense.dtype
        for part, weight in self.parts:
            full = {name: value for name, value in part.replacements(module).items() if name in own}
            values.append(({**full, **part.changed(module, wide=True)}, weight))
        found = self._blended(values, own)
        return found if wide else {name: value.to(dtypes[name]) for name, value in found.items()}

    def _blended(
        self, values: Sequence[tuple[Mapping[str, Tensor], float]], own: Mapping[str, Any]
    ) -> dict[str, Tensor]:
        made: dict[str, Tensor] = {}
        for name in dict.fromkeys(name for found, _ in values for name in found):
            base = own[name]
            if base is None:  # the bias of a layer without one
                base = torch.zeros_like(next(found[name] for found, _ in values if name in found))
            if not base.is_floating_point():  # a counter of batches
                made[name] = next(found[name] for found, _ in values if name in found)
                continue
            wide = base.to(at_least_float32(base.dtype))
            moved = (
                weight * (found[name].to(wide.dtype) - wide)
                for found, weight in values
                if name in found
            )
            total: Any = sum(moved, wide)
            made[name] = total.to(base.dtype)
        return made
