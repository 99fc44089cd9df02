"""Fast paths of a linear layer in a batch whose rows use different adapters: one product with its
weight computes all rows, if the weight is plain (not quantised) and frozen.

- On a CPU, if the rows of each adapter are neighbours in the batch (``kernels/spans.py``).
  Gradients reach all adapters.
- On a GPU, if each adapter's change is plain LoRA: ΔW = scale · B A for all outputs, without a
  gain (a factor for each output, as in DoRA). Each kernel launch is expensive there, so two batched
  products compute the changes of all rows (``kernels/batched.py``).
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from veneer.attach.layer.fused_linear import (
    PendingOutputs,
    bias_is_parameter,
    shared_dropout_seed,
    tensor_versions,
)
from veneer.attach.layer.layer_adapter import LayerAdapter
from veneer.attach.layer.layer_call import add_update
from veneer.attach.layer.state import LAYER_STATE_NAME
from veneer.kernels import batched, device, fused
from veneer.kernels.dropout import new_seed
from veneer.kernels.spans import Span, can_batch, linear, linears

#: outputs that the call of a layer has already computed for other layers with the same input, such
#: as q_proj for k_proj and v_proj
_PENDING_OUTPUTS = PendingOutputs()


class LinearRows:
    """The fast paths of one layer for the rows of a batch.

    Attributes:
        row_adapters: the ``RowAdapters`` of the batch: which row uses which selection.
        layer_adapters: for each selection of ``row_adapters`` its layer adapter at this layer, or
            None if it does not change the layer.
        fused_change: a ``FusedChange`` with the names of the layer's parameters. None unless every
            adapter's only change here is plain LoRA (ΔW = scale · B A for all outputs) and the rows
            of each adapter are neighbours.
        changes: the ``Change`` of each selection that changes this layer; empty if ``fused_change``
            is None.
        row_ranges: for each selection that changes this layer, its first row, and its last row
            plus 1.
        siblings: (module, its ``LinearRows``) of each layer that reads the same input after this
            one, if these are the same layers for every adapter.
    """

    def __init__(self, row_adapters: Any, layer_adapters: Sequence[Any]) -> None:
        self.row_adapters, self.layer_adapters = row_adapters, layer_adapters
        changing_adapters = [
            layer_adapter for layer_adapter in layer_adapters if layer_adapter is not None
        ]
        are_plain = bool(changing_adapters and row_adapters.row_ranges) and all(
            isinstance(layer_adapter, LayerAdapter) and layer_adapter.fused_change is not None
            for layer_adapter in changing_adapters
        )
        self.fused_change: Any = changing_adapters[0].fused_change if are_plain else None
        self.changes: list[Any] = (
            [layer_adapter.fused_change.change for layer_adapter in changing_adapters]
            if are_plain
            else []
        )
        self.row_ranges: list[tuple[int, int]] = [
            row_range
            for row_range, layer_adapter in zip(
                row_adapters.row_ranges or (), layer_adapters, strict=False
            )
            if layer_adapter is not None
        ]
        self._cached_spans: tuple[Any, tuple[Span, ...]] = (None, ())
        self.siblings = self._find_siblings(changing_adapters) if self.changes else []

    def _find_siblings(
        self, changing_adapters: Sequence[LayerAdapter]
    ) -> list[tuple[nn.Module, LinearRows]]:
        """The value of ``siblings``: empty unless all ``changing_adapters``, the layer adapters
        that are not None, share the input of this layer with the same later layers."""
        groups = [
            layer_adapter.shared_input_layers.members
            for layer_adapter in changing_adapters
            if layer_adapter.shared_input_layers is not None
        ]
        if len(groups) < len(changing_adapters) or any(
            members[0][1] is not layer_adapter
            for members, layer_adapter in zip(groups, changing_adapters, strict=True)
        ):
            return []
        group_modules = [[module for module, _ in members] for members in groups]
        if any(modules != group_modules[0] for modules in group_modules):
            return []
        siblings = [
            (module, self.row_adapters[module._modules[LAYER_STATE_NAME].key].linear)
            for module in group_modules[0][1:]
        ]
        return [
            (module, sibling)
            for module, sibling in siblings
            if sibling.changes and sibling.row_ranges == self.row_ranges
        ]

    def output(
        self, module: Any, layer_state: Any, x: Any
    ) -> tuple[Tensor | None, list[int | None]]:
        """(the output of the layer for x; for each selection the dropout seed that was drawn, or
        None). The output is None if no fast path applies; the caller must then run the layer by
        another path with these seeds, so that no second seed is drawn."""
        seeds: list[int | None] = [None] * len(self.layer_adapters)
        y = self._plain_output(module, x) if self.changes else None
        if y is not None:
            return y, seeds
        seeds = self._draw_seeds(module, x)
        y = self._batched_output(module, x)
        y = self._output_by_spans(module, layer_state, x, seeds) if y is None else y
        return y, seeds

    def _draw_seeds(self, module: Any, x: Any) -> list[int | None]:
        """For each selection the seed for the dropout of its ``FusedChange``, drawn from the same
        random stream as if its rows were computed alone. None for a selection without dropout, and
        for one that the fused kernels do not compute."""
        seeds: list[int | None] = []
        for selection, layer_adapter in zip(
            self.row_adapters.selections, self.layer_adapters, strict=True
        ):
            is_layer_adapter = isinstance(layer_adapter, LayerAdapter)
            fused_change = layer_adapter.fused_change if is_layer_adapter else None
            weight = None if fused_change is None else module._parameters.get(fused_change.weight)
            if (
                weight is None
                or not fused_change.active_dropout
                or not (fused.applies(x, weight) or device.applies(x, weight))
            ):
                seeds.append(None)
                continue
            with selection.random_stream or nullcontext():
                seeds.append(shared_dropout_seed(module, layer_adapter, x))
        return seeds

    def _output_by_spans(
        self, module: Any, layer_state: Any, x: Any, seeds: Sequence[int | None]
    ) -> Tensor | None:
        """The output of a linear layer on a CPU, with one product for all rows and the change of
        each adapter on the tokens of its rows (its span). None if this is impossible: each adapter
        must change only the weight, at a low rank, and its rows must be neighbours."""
        row_adapters, kind = self.row_adapters, layer_state.layer
        if not (
            row_adapters.row_ranges
            and layer_state.supports_factored
            and layer_state.is_plain_product
            and row_adapters.are_rows_of(x)
        ):
            return None
        weight = module._parameters.get(kind.weight)
        bias = module._parameters.get("bias")
        if (
            weight is None
            or not bias_is_parameter(module)
            or not fused.applies(x, weight)
            or (bias is not None and bias.requires_grad)
        ):
            return None
        if not all(
            layer_adapter is None or _is_low_rank_only(layer_adapter)
            for layer_adapter in self.layer_adapters
        ):
            return None
        low_ranks = {
            i: layer_adapter.changes[kind.weight].resolve(weight)
            for i, layer_adapter in enumerate(self.layer_adapters)
            if layer_adapter is not None
            and layer_adapter.changes
            and layer_adapter.fused_change is None
        }
        if any(
            gain is not None and self.layer_adapters[i].changes[kind.weight].is_transposed_in(kind)
            for i, (_, gain) in low_ranks.items()
        ):
            # The layer holds the weight transposed, so it reads the rows of ΔW, which the gain
            # scales, as inputs: scaling the output would be wrong.
            return None
        spans, A, B, gain_terms = self._spans_and_factors(layer_state, x, seeds, low_ranks)
        matrix = weight.mT if kind.out_axis == 1 else weight
        y = linear(x, matrix, None if gain_terms else bias, spans, A, B)
        return self._apply_gains(module, kind, x, y, bias, gain_terms) if gain_terms else y

    def _spans_and_factors(
        self, layer_state: Any, x: Any, seeds: Sequence[int | None], low_ranks: dict[int, Any]
    ) -> tuple[list[Span], list[Tensor], list[Tensor], dict[int, Any]]:
        """(spans, A, B, gain terms). The first three have an entry for each change without a gain:
        the range of tokens that it applies to, and its factors. The gain terms, {index of the
        selection: (ΔW, gain, dropout)}, are the other changes, which ``_apply_gains`` adds.
        ``low_ranks``: {index of the selection: (ΔW, gain)} of the changes without a
        ``FusedChange``."""
        kind: Any = layer_state.layer
        row_ranges: Any = self.row_adapters.row_ranges
        tokens_per_row = x.shape[1:-1].numel()
        spans, A, B, gain_terms = [], [], [], {}
        for i, ((first_row, row_stop), layer_adapter, seed) in enumerate(
            zip(row_ranges, self.layer_adapters, seeds, strict=True)
        ):
            if layer_adapter is None or not layer_adapter.changes:
                continue
            start, stop = first_row * tokens_per_row, row_stop * tokens_per_row
            fused_change = layer_adapter.fused_change
            if fused_change is not None:  # read A and B directly: ``resolve`` returns the same
                change: Any = fused_change.change
                A.append(change._parameters["A"])
                B.append(change._parameters["B"])
                dropout = fused_change.active_dropout
                spans.append(Span(start, stop, change.rank, change.scale, dropout, seed or 0))
                continue
            low_rank, gain = low_ranks[i]
            change = layer_adapter.changes[kind.weight]
            dropout = change.dropout if change.training else 0.0
            if gain is not None:
                gain_terms[i] = low_rank, gain, dropout
                continue
            if dropout:
                with self.row_adapters.selections[i].random_stream or nullcontext():
                    seed = new_seed()
            low_rank = change.as_read_by(kind, low_rank)
            spans.append(Span(start, stop, low_rank.rank, low_rank.scale, dropout, seed or 0))
            A.append(low_rank.A)
            B.append(low_rank.B)
        return spans, A, B, gain_terms

    def _plain_output(self, module: Any, x: Any) -> Tensor | None:
        """The output of a linear layer on a CPU if every adapter's change is plain LoRA without
        dropout in this call; else None.

        In training, if possible, the outputs of ``siblings``, which read the same x, are computed
        in the same autograd node. They wait in ``_PENDING_OUTPUTS`` for the calls of those layers,
        as in ``fused_linear.SharedInputLayers``.
        """
        spans = self._plain_spans(module, x)
        if spans is None:
            return None
        pending_output = _PENDING_OUTPUTS.take(x, self)
        if pending_output is not None and torch.is_grad_enabled():
            y, *dependencies = pending_output
            if dependencies == [spans, self._tensor_versions(module)]:
                return y
        layers: list[tuple[Any, LinearRows]] = [(module, self)]
        if self.siblings and torch.is_grad_enabled() and x.grad_fn is not None and can_batch(spans):
            for sibling_module, sibling in self.siblings:
                if (
                    sibling.fused_change.can_compute_early(sibling_module, x)
                    and sibling._plain_spans(sibling_module, x) == spans
                ):
                    layers.append((sibling_module, sibling))
        A, B = zip(*(layer._factors() for _, layer in layers), strict=True)
        weights, biases = zip(
            *(layer.fused_change.base_parameters(layer_module) for layer_module, layer in layers),
            strict=True,
        )
        if len(layers) == 1:
            return linear(x, weights[0], biases[0], spans, A[0], B[0])
        y, *sibling_outputs = linears(x, weights, biases, spans, A, B)
        _PENDING_OUTPUTS.put(
            x,
            {
                sibling: (sibling_y, spans, sibling._tensor_versions(sibling_module))
                for (sibling_module, sibling), sibling_y in zip(
                    layers[1:], sibling_outputs, strict=True
                )
            },
        )
        return y

    def _plain_spans(self, module: Any, x: Any) -> tuple[Span, ...] | None:
        """The range of tokens that each of ``changes`` applies to, in x [number of rows, *, in].
        None if ``_plain_output`` does not support this call."""
        parameters, fused_change = module._parameters, self.fused_change
        if (
            not _has_parameters(module, fused_change)
            or not self.row_adapters.are_rows_of(x)
            or not fused.applies(x, parameters[fused_change.weight])
        ):
            return None
        bias = None if fused_change.bias is None else parameters[fused_change.bias]
        if bias is not None and bias.requires_grad:
            return None
        tokens_per_row = x.shape[1] if x.ndim == 3 else x.shape[1:-1].numel()
        cache_key = [tokens_per_row]
        for change in self.changes:
            if change.dropout and change.training:
                return None
            cache_key += change.rank, change.scale
        if self._cached_spans[0] != cache_key:
            spans = (
                Span(start * tokens_per_row, stop * tokens_per_row, change.rank, change.scale)
                for (start, stop), change in zip(self.row_ranges, self.changes, strict=True)
            )
            self._cached_spans = cache_key, tuple(spans)
        return self._cached_spans[1]

    def _tensor_versions(self, module: Any) -> list[tuple[int, int]]:
        """(``id``, version) of each tensor besides x that the output depends on. If one of them is
        replaced or written, a pending output is out of date."""
        parameters, fused_change, (A, B) = module._parameters, self.fused_change, self._factors()
        bias = None if fused_change.bias is None else parameters[fused_change.bias]
        return [*tensor_versions((parameters[fused_change.weight], bias, *A, *B))]

    def _factors(self) -> tuple[list[Tensor], list[Tensor]]:
        """(the A of each change, the B of each change)."""
        parameters = [change._parameters for change in self.changes]
        return [factors["A"] for factors in parameters], [factors["B"] for factors in parameters]

    def _apply_gains(
        self, module: Any, kind: Any, x: Tensor, y: Tensor, bias: Any, gain_terms: dict[int, Any]
    ) -> Tensor:
        """y with the changes of ``gain_terms`` (a result of ``_spans_and_factors``) in their rows,
        and the bias in all rows. y must be x Wᵀ without any change in the rows of ``gain_terms``,
        and the output without the bias in the other rows."""
        row_ranges: Any = self.row_adapters.row_ranges
        row_counts, outputs = [stop - start for start, stop in row_ranges], []
        row_pieces = zip(x.split(row_counts), y.split(row_counts), strict=True)
        for i, (x_of_rows, y_of_rows) in enumerate(row_pieces):
            if i in gain_terms:
                low_rank, gain, dropout = gain_terms[i]
                with self.row_adapters.selections[i].random_stream or nullcontext():
                    outputs.append(
                        add_update(
                            kind, module, x_of_rows, y_of_rows, low_rank, gain, bias, dropout
                        )
                    )
            else:
                outputs.append(y_of_rows if bias is None else y_of_rows + bias)
        return torch.cat(outputs)

    def _batched_output(self, module: Any, x: Any) -> Tensor | None:
        """The output of a linear layer on a GPU if every adapter's change is plain LoRA, without
        dropout in this call, and the factors of all adapters have the same dtype; else None."""
        row_adapters = self.row_adapters
        if not row_adapters.are_rows_of(x) or x.is_cpu:
            return None
        fused_change = next(
            (
                layer_adapter.fused_change
                for layer_adapter in self.layer_adapters
                if isinstance(layer_adapter, LayerAdapter)
            ),
            None,
        )
        if fused_change is None or not _has_parameters(module, fused_change):
            return None
        weight = module._parameters[fused_change.weight]
        if not device.applies_without_cast(x, weight):
            return None
        bias = None if fused_change.bias is None else module._parameters[fused_change.bias]
        if bias is not None and torch.is_grad_enabled() and x.itemsize < 4:
            # With gradients, ``batched.linear`` rounds the low-rank term plus the bias to 16 bits
            # before it adds x Wᵀ. The general path, taken instead, adds the bias before it rounds.
            return None
        factors = [_plain_factors(layer_adapter, x) for layer_adapter in self.layer_adapters]
        first_factors = next(
            (factors_and_scale for factors_and_scale in factors if factors_and_scale is not None),
            None,
        )
        if first_factors is None or any(
            layer_adapter is not None and factors_and_scale is None
            for layer_adapter, factors_and_scale in zip(self.layer_adapters, factors, strict=True)
        ):
            return None
        A, B, scale = first_factors
        if any(
            factor.dtype != A.dtype
            for factors_and_scale in factors
            if factors_and_scale is not None
            for factor in factors_and_scale[:2]
        ):
            return None
        factors = [
            (A[:0], B[:, :0], scale) if factors_and_scale is None else factors_and_scale
            for factors_and_scale in factors
        ]
        scales = [factors_and_scale[2] for factors_and_scale in factors]
        row_A, row_B, _ = zip(
            *(factors[index] for index in row_adapters.selection_index_by_row), strict=True
        )
        zero_factors = row_adapters.zeros(max(map(len, row_A)) * max(weight.shape), A)
        scale = scale if len({*scales}) == 1 else row_adapters.scales(scales, x)
        matrix = weight.mT if fused_change.is_transposed else weight
        return batched.linear(x, matrix, bias, row_A, row_B, scale, zero_factors)


def _has_parameters(module: nn.Module, fused_change: Any) -> bool:
    """Whether the weight and the bias of a ``FusedChange`` are still parameters of its module, not
    parametrised or pruned since."""
    bias_name = fused_change.bias or fused_change.weight
    return {fused_change.weight, bias_name} <= module._parameters.keys()


def _plain_factors(layer_adapter: Any, x: Tensor) -> tuple[Tensor, Tensor, float] | None:
    """(A [r, in], B [out, r], scale) of a layer adapter whose only change is plain LoRA. None for
    any other layer adapter, if dropout applies in this call, or if A or B is on another device than
    x."""
    if not isinstance(layer_adapter, LayerAdapter):
        return None
    fused_change = layer_adapter.fused_change
    if fused_change is None or fused_change.active_dropout:
        return None
    parameters = fused_change.change.adapter_parameters
    A, B = parameters["A"][0], parameters["B"][0]
    return (A, B, fused_change.change.scale) if A.device == B.device == x.device else None


def _is_low_rank_only(layer_adapter: Any) -> bool:
    """Whether a layer adapter changes only weights of its own module, at a low rank: it trains no
    parameter in full, and changes no weights of submodules that the module reads."""
    return (
        isinstance(layer_adapter, LayerAdapter)
        and not layer_adapter.submodule_adapters
        and not (layer_adapter.full._parameters or layer_adapter.full._buffers)
    )
