"""A linear layer in a batch whose rows use different adapters: one product with its weight for all
rows, where that is plain and frozen.

- On a CPU, if the rows of each adapter are neighbours (``kernels/spans.py``), with gradients to all
  adapters.
- On a GPU, where each kernel launch is expensive, for plain changes, which are two products of all
  rows there (``kernels/batched.py``).
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from veneer.attach.layer.fused_linear import PendingOutputs, identities, seed_of
from veneer.attach.layer.layer_adapter import LayerAdapter
from veneer.attach.layer.layer_call import with_update
from veneer.attach.layer.state import STATE
from veneer.kernels import batched, device, fused
from veneer.kernels.dropout import new_seed
from veneer.kernels.spans import Span, can_batch, linear, linears

#: outputs of layers that were computed before their own calls
_READY = PendingOutputs()


class LinearRows:
    """The fast paths of one layer for the rows of a batch.

    Attributes:
        layer_adapters: for each selection of ``rows`` what it does at this layer, or None.
        direct: the names of the layer's parameters (``fused_linear.FusedChange``), if every
            adapter is one plain change and the rows of each are neighbours; else None.
        changes: the plain changes of the selections that change this layer.
        row_ranges: the first row and the one after the last of each of ``changes``.
        siblings: the layers that read the same input after this one, if they are the same for
            every adapter here.
    """

    def __init__(self, rows: Any, layer_adapters: Sequence[Any]) -> None:
        self.rows, self.layer_adapters = rows, layer_adapters
        active = [layer_adapter for layer_adapter in layer_adapters if layer_adapter is not None]
        all_plain = bool(active and rows.row_ranges) and all(
            isinstance(layer_adapter, LayerAdapter) and layer_adapter.direct is not None
            for layer_adapter in active
        )
        self.direct: Any = active[0].direct if all_plain else None
        self.changes: list[Any] = (
            [layer_adapter.direct.change for layer_adapter in active] if all_plain else []
        )
        self.row_ranges: list[tuple[int, int]] = [
            row_range
            for row_range, layer_adapter in zip(rows.row_ranges or (), layer_adapters, strict=False)
            if layer_adapter is not None
        ]
        self._cached_spans: tuple[Any, tuple[Span, ...]] = (None, ())
        self.siblings = self._find_siblings() if self.changes else []

    def _find_siblings(self) -> list[tuple[nn.Module, LinearRows]]:
        active = [
            layer_adapter for layer_adapter in self.layer_adapters if layer_adapter is not None
        ]
        groups = [
            layer_adapter.together.members
            for layer_adapter in active
            if layer_adapter.together is not None
        ]
        if len(groups) < len(active) or any(
            members[0][1] is not layer_adapter
            for members, layer_adapter in zip(groups, active, strict=True)
        ):
            return []
        modules = [[module for module, _ in members] for members in groups]
        if any(group_modules != modules[0] for group_modules in modules):
            return []
        siblings = [
            (module, self.rows[module._modules[STATE].key].linear) for module in modules[0][1:]
        ]
        return [
            (module, sibling)
            for module, sibling in siblings
            if sibling.changes and sibling.row_ranges == self.row_ranges
        ]

    def output(
        self, module: Any, layer_state: Any, x: Any
    ) -> tuple[Tensor | None, list[int | None]]:
        """(the output of the layer, None if no fast path applies; the dropout seeds that were drawn
        for the selections)."""
        seeds: list[int | None] = [None] * len(self.layer_adapters)
        y = self._plain_output(module, x) if self.changes else None
        if y is not None:
            return y, seeds
        seeds = self._draw_seeds(module, x)
        y = self._batched_output(module, x)
        y = self._output_by_spans(module, layer_state, x, seeds) if y is None else y
        return y, seeds

    def _draw_seeds(self, module: Any, x: Any) -> list[int | None]:
        """The dropout seed of each direct change, drawn as if its rows were computed alone."""
        seeds: list[int | None] = []
        for selected, layer_adapter in zip(self.rows.selections, self.layer_adapters, strict=True):
            direct = layer_adapter.direct if isinstance(layer_adapter, LayerAdapter) else None
            weight = None if direct is None else module._parameters.get(direct.weight)
            if (
                weight is None
                or not direct.drops
                or not (fused.applies(x, weight) or device.applies(x, weight))
            ):
                seeds.append(None)  # only the fused paths take a seed
                continue
            with selected.stream or nullcontext():
                seeds.append(seed_of(module, layer_adapter, x))
        return seeds

    def _output_by_spans(
        self, module: Any, layer_state: Any, x: Any, seeds: Sequence[int | None]
    ) -> Tensor | None:
        """The output of a linear layer with a plain weight, if each adapter only changes that
        weight at a low rank. None if the layer, the input or an adapter does not allow this
        path."""
        rows, reader = self.rows, layer_state.layer
        if not (
            rows.row_ranges and layer_state.factors and layer_state.product and rows.are_rows_of(x)
        ):
            return None
        weight = module._parameters.get(reader.weight)
        bias = module._parameters.get("bias")
        if bias is None and getattr(module, "bias", None) is not None:
            return None  # pruned or parametrised since
        if (
            weight is None
            or not fused.applies(x, weight)
            or (bias is not None and bias.requires_grad)
        ):
            return None
        if not all(
            layer_adapter is None or _is_low_rank_only(layer_adapter)
            for layer_adapter in self.layer_adapters
        ):
            return None
        lows = {
            i: layer_adapter.changes[reader.weight].resolve(weight)
            for i, layer_adapter in enumerate(self.layer_adapters)
            if layer_adapter is not None and layer_adapter.changes and layer_adapter.direct is None
        }
        if layer_state.transposed and any(gain is not None for _, gain in lows.values()):
            return None  # rows of ΔW are rescaled along what this layer reads as inputs
        spans, A, B, with_gain = self._spans_and_factors(layer_state, x, seeds, lows)
        matrix = weight.mT if reader.out_axis == 1 else weight
        y = linear(x, matrix, None if with_gain else bias, spans, A, B)
        return self._apply_gains(module, reader, x, y, bias, with_gain) if with_gain else y

    def _spans_and_factors(
        self, layer_state: Any, x: Any, seeds: Sequence[int | None], lows: dict[int, Any]
    ) -> tuple[list[Span], list[Tensor], list[Tensor], dict[int, Any]]:
        """(spans, A, B) of the changes without a gain, and {selection: (ΔW, gain, dropout)} of
        those with one, which ``_apply_gains`` adds."""
        reader: Any = layer_state.layer
        row_ranges: Any = self.rows.row_ranges
        tokens = x.shape[1:-1].numel()
        spans, A, B, with_gain = [], [], [], {}
        for i, ((first, after), layer_adapter, seed) in enumerate(
            zip(row_ranges, self.layer_adapters, seeds, strict=True)
        ):
            if layer_adapter is None or not layer_adapter.changes:
                continue
            first, after = first * tokens, after * tokens
            if layer_adapter.direct is not None:  # its factors are what ``resolve`` would return
                change: Any = layer_adapter.direct.change
                A.append(change._parameters["A"])
                B.append(change._parameters["B"])
                drops = layer_adapter.direct.drops
                spans.append(Span(first, after, change.rank, change.scale, drops, seed or 0))
                continue
            low, gain = lows[i]
            change = layer_adapter.changes[reader.weight]
            drops = change.dropout if change.training else 0.0
            if gain is not None:
                with_gain[i] = low, gain, drops
                continue
            if drops:
                with self.rows.selections[i].stream or nullcontext():
                    seed = new_seed()
            low = low.T if layer_state.transposed else low
            spans.append(Span(first, after, low.rank, low.scale, drops, seed or 0))
            A.append(low.A)
            B.append(low.B)
        return spans, A, B, with_gain

    def _plain_output(self, module: Any, x: Any) -> Tensor | None:
        """The output of a linear layer if every adapter is one plain change without dropout in this
        call.

        Computes the outputs of ``siblings`` too, which wait in ``_READY`` for the calls of those
        layers (as ``fused_linear.SharedInputLayers`` does for one adapter).
        """
        spans = self._plain_spans(module, x)
        if spans is None:
            return None
        ready = _READY.take(x, self)
        if ready is not None and ready[1:] == (spans, self._versions_read(module)):
            return ready[0]
        layers: list[tuple[Any, LinearRows]] = [(module, self)]
        if self.siblings and torch.is_grad_enabled() and x.grad_fn is not None and can_batch(spans):
            for sibling_module, sibling in self.siblings:
                if (
                    sibling.direct.fits(sibling_module, x)
                    and sibling._plain_spans(sibling_module, x) == spans
                ):
                    layers.append((sibling_module, sibling))
        A, B = zip(*(layer._factors() for _, layer in layers), strict=True)
        weights, biases = zip(
            *(layer.direct.frozen(layer_module) for layer_module, layer in layers), strict=True
        )
        if len(layers) == 1:
            return linear(x, weights[0], biases[0], spans, A[0], B[0])
        y, *sibling_outputs = linears(x, weights, biases, spans, A, B)
        _READY.put(
            x,
            {
                sibling: (output, spans, sibling._versions_read(sibling_module))
                for (sibling_module, sibling), output in zip(
                    layers[1:], sibling_outputs, strict=True
                )
            },
        )
        return y

    def _plain_spans(self, module: Any, x: Any) -> tuple[Span, ...] | None:
        """The token spans of the changes in x [N, *, in]; None if ``_plain_output`` does not apply
        to this call."""
        parameters, direct = module._parameters, self.direct
        if (
            not {direct.weight, direct.bias or direct.weight} <= parameters.keys()
            or not self.rows.are_rows_of(x)
            or not fused.applies(x, parameters[direct.weight])
        ):
            return None
        bias = None if direct.bias is None else parameters[direct.bias]
        if bias is not None and bias.requires_grad:
            return None
        tokens = x.shape[1] if x.ndim == 3 else x.shape[1:-1].numel()
        settings = [tokens]
        for change in self.changes:
            if change.dropout and change.training:
                return None
            settings += change.rank, change.scale
        if self._cached_spans[0] != settings:
            spans = (
                Span(first * tokens, after * tokens, change.rank, change.scale)
                for (first, after), change in zip(self.row_ranges, self.changes, strict=True)
            )
            self._cached_spans = settings, tuple(spans)
        return self._cached_spans[1]

    def _versions_read(self, module: Any) -> list[tuple[int, int]]:
        """The identities and versions of all tensors besides x that the output depends on."""
        parameters, direct, (A, B) = module._parameters, self.direct, self._factors()
        bias = None if direct.bias is None else parameters[direct.bias]
        return [*identities((parameters[direct.weight], bias, *A, *B))]

    def _factors(self) -> tuple[list[Tensor], list[Tensor]]:
        factors = [change._parameters for change in self.changes]
        return [parameters["A"] for parameters in factors], [
            parameters["B"] for parameters in factors
        ]

    def _apply_gains(
        self, module: Any, reader: Any, x: Tensor, y: Tensor, bias: Any, with_gain: dict[int, Any]
    ) -> Tensor:
        """Add the changes that have a gain to y, which is x Wᵀ in their rows, and the bias to all
        rows."""
        row_ranges: Any = self.rows.row_ranges
        sizes, outputs = [after - first for first, after in row_ranges], []
        for i, (rows_x, rows_y) in enumerate(zip(x.split(sizes), y.split(sizes), strict=True)):
            if i in with_gain:
                low, gain, drops = with_gain[i]
                with self.rows.selections[i].stream or nullcontext():
                    outputs.append(
                        with_update(reader, module, rows_x, rows_y, low, gain, bias, drops)
                    )
            else:
                outputs.append(rows_y if bias is None else rows_y + bias)
        return torch.cat(outputs)

    def _batched_output(self, module: Any, x: Any) -> Tensor | None:
        """The output of a linear layer on a GPU if every change is plain; else None."""
        rows = self.rows
        if not rows.are_rows_of(x) or x.is_cpu:
            return None
        direct = next(
            (
                layer_adapter.direct
                for layer_adapter in self.layer_adapters
                if isinstance(layer_adapter, LayerAdapter)
            ),
            None,
        )
        if (
            direct is None
            or not {direct.weight, direct.bias or direct.weight} <= module._parameters.keys()
        ):
            return None
        weight = module._parameters[direct.weight]
        if not device.applies_without_cast(x, weight):
            return None
        bias = None if direct.bias is None else module._parameters[direct.bias]
        if bias is not None and torch.is_grad_enabled() and x.itemsize < 4:
            return None  # the general path rounds the sum with the bias once
        factors = [_plain_factors(layer_adapter, x) for layer_adapter in self.layer_adapters]
        first = next((triple for triple in factors if triple is not None), None)
        if first is None or any(
            layer_adapter is not None and triple is None
            for layer_adapter, triple in zip(self.layer_adapters, factors, strict=True)
        ):
            return None
        A, B, scale = first
        if any(
            factor.dtype != A.dtype
            for triple in factors
            if triple is not None
            for factor in triple[:2]
        ):
            return None
        factors = [(A[:0], B[:, :0], scale) if triple is None else triple for triple in factors]
        scales = [triple[2] for triple in factors]
        downs, ups, _ = zip(*(factors[number] for number in rows.selection_of_row), strict=True)
        zeros = rows.zeros(max(map(len, downs)) * max(weight.shape), A)
        scale = scale if len({*scales}) == 1 else rows.scales(scales, x)
        return batched.linear(
            x, weight.mT if direct.flipped else weight, bias, downs, ups, scale, zeros
        )


def _plain_factors(layer_adapter: Any, x: Tensor) -> tuple[Tensor, Tensor, float] | None:
    """(A [r, in], B [out, r], scale) of a plain change on the device of x without dropout in this
    call; else None."""
    if not isinstance(layer_adapter, LayerAdapter):
        return None
    direct = layer_adapter.direct
    if direct is None or direct.drops:
        return None
    factors = direct.change.adapter_parameters
    A, B = factors["A"][0], factors["B"][0]
    return (A, B, direct.change.scale) if A.device == B.device == x.device else None


def _is_low_rank_only(layer_adapter: Any) -> bool:
    """Whether an adapter does nothing at its layer but change weights at a low rank."""
    return (
        isinstance(layer_adapter, LayerAdapter)
        and not layer_adapter.read_below
        and not (layer_adapter.full._parameters or layer_adapter.full._buffers)
    )
