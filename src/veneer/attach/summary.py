"""The size of an adapter: the number of its trained parameters per kind of layer, their bytes, and
their percentage of the base. Also the predicted cost that an adapter adds to linear layers."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from veneer.attach.layer.lookup import adapters, changes, name_or_default, need_adapters, unwrap
from veneer.attach.layer.model_index import ModelIndex
from veneer.attach.planning.targets import layers_left_out
from veneer.bases import storage_of, weight_of
from veneer.errors import format_bytes
from veneer.kernels import cost_model


@dataclass(frozen=True)
class SummaryRow:
    """The size of an adapter for one kind of layer.

    Fields:
        kind: a text with the layer kind, the weight's storage unless it is a plain parameter, and
            the LoRA variant, such as "linear, lora"; or "trained in full".
        layers: the number of weights with a low-rank change, or of layers with parameters that are
            trained in full.
        parameters: the number of elements of the trained parameters.
        bytes: the size of the trained parameters, in bytes.
    """

    kind: str
    layers: int
    parameters: int
    bytes: int


@dataclass(frozen=True)
class Summary:
    """The size of an adapter.

    Fields:
        adapter: the name of the adapter.
        rows: the size of the adapter for each kind of layer.
        trainable: the number of elements of the trained parameters.
        total: the number of elements of the base's parameters.
        bytes: the size of the trained parameters, in bytes.
        left_out: the layers with matrices that targets="all-linear" leaves out, counted by type,
            such as "2 Conv2d"; "" if there are none.
        is_default: whether the adapter is the model's default (``veneer.set_default``).
    """

    adapter: str
    rows: tuple[SummaryRow, ...]
    trainable: int
    total: int
    bytes: int
    left_out: str = ""
    is_default: bool = False

    @property
    def percent(self) -> float:
        return 100 * self.trainable / self.total if self.total else 0.0

    def __str__(self) -> str:
        kind_width = max(len(row.kind) for row in self.rows) if self.rows else 0
        lines = [
            f"  {row.kind:<{kind_width}}  {row.layers:>5} layers  {row.parameters:>13,} numbers "
            f" {format_bytes(row.bytes):>10}"
            for row in self.rows
        ]
        share_text = f"{self.percent:.3f} % of the base's {self.total:,}"
        total_line = (
            f"  trains {self.trainable:,} numbers ({format_bytes(self.bytes)}), {share_text}"
        )
        default_text = ", the model's default" if self.is_default else ""
        lines = [f"adapter {self.adapter!r}{default_text}", *lines, total_line]
        if self.left_out:
            lines.append(
                f'  "all-linear" leaves out {self.left_out}: name them in targets, or use'
                ' targets="all"'
            )
        return "\n".join(lines)


def summarise(model: nn.Module, name: str | None = None) -> Summary:
    """The summary of the adapter ``name``. None stands for the default adapter, or the only one.
    ``Summary.total`` counts tied weights once and leaves adapters out.

    Raises:
        SelectionError: there is no such adapter; or ``name`` is None, and there are several
            adapters and no default.
    """
    model = unwrap(model)
    name = name_or_default(model, name)
    counts_by_kind: dict[str, list[int]] = {}  # [layers, parameters, bytes]
    counted_ids: set[int] = set()  # tied parameters have one copy, which is counted once

    def count_parameters(kind: str, parameters: Iterable[nn.Parameter]) -> None:
        uncounted = [parameter for parameter in parameters if id(parameter) not in counted_ids]
        counted_ids.update(map(id, uncounted))
        if uncounted:
            counts = counts_by_kind.setdefault(kind, [0, 0, 0])
            counts[0] += 1
            counts[1] += sum(parameter.numel() for parameter in uncounted)
            counts[2] += sum(
                parameter.numel() * parameter.element_size() for parameter in uncounted
            )

    for _, module, weight_name, change in changes(model, name):
        storage_label = (
            ""
            if change.storage.name == "plain"
            else f" ({change.storage.label(weight_of(module, weight_name))})"
        )
        count_parameters(
            f"{change.layer.name}{storage_label}, {change.variant.name}", change.parameters()
        )
    for _, _, layer_adapter in adapters(model, name):
        count_parameters("trained in full", layer_adapter.full.parameters())
    rows = tuple(SummaryRow(kind, *counts) for kind, counts in counts_by_kind.items())
    base_element_count = sum(
        _element_count(parameter)
        for path, parameter in model.named_parameters()
        if "veneer" not in path.split(".")
    )
    model_adapters = need_adapters(model, name)
    left_out_text = layers_left_out(ModelIndex(model), model_adapters.configs[name])
    return Summary(
        name,
        rows,
        sum(row.parameters for row in rows),
        base_element_count,
        sum(row.bytes for row in rows),
        left_out_text,
        model_adapters.default_name == name,
    )


def _element_count(weight: nn.Parameter) -> int:
    """The number of elements of the dense weight. A packed weight stores several of them in one
    element of its tensor."""
    storage = storage_of(weight)
    return weight.numel() if storage is None else storage.shape(weight).numel()


@dataclass(frozen=True)
class CallPlan:
    """The cost that an adapter adds to a call in its linear layers, as the cost model predicts it.
    Only layers that the fused kernel can compute are listed.

    Fields:
        tokens: the number of tokens, batch size × length.
        training: whether the call is a training step, with a backward pass.
        rows: ((out, in, rank), paths, costs) for each size of layers: the paths of the layers of
            that size, and the costs of one such layer in factored and in materialised form.
        together: the paths of each group of layers that read the same input and are computed
            together.
    """

    tokens: int
    training: bool
    rows: tuple[tuple[tuple[int, int, int], tuple[str, ...], cost_model.Costs], ...]
    together: tuple[tuple[str, ...], ...]

    def __str__(self) -> str:
        call_kind = "a training step" if self.training else "inference"
        lines = [f"{call_kind} of {self.tokens} tokens, by the cost model"]
        for (out, in_, rank), paths, costs in self.rows:
            lines.append(f"  {out} x {in_} at rank {rank}, {len(paths)} layers: {costs}")
        return "\n".join(
            [
                *lines,
                f"  {len(self.together)} groups of layers read one input and are computed together",
            ]
        )

    @staticmethod
    def of(model: nn.Module, name: str | None, tokens: int, training: bool) -> CallPlan:
        """The plan of a call with the adapter ``name``. None stands for the default adapter, or the
        only one."""
        model = unwrap(model)
        costs_and_paths: dict[tuple[int, int, int], tuple[cost_model.Costs, list[str]]] = {}
        group_paths: dict[int, list[str]] = {}
        for path, module, layer_adapter in adapters(model, name_or_default(model, name)):
            fused_change = layer_adapter.fused_change
            if fused_change is None:
                continue
            change, weight = fused_change.change, module._parameters[fused_change.weight]
            layer_size = (change.dims.out, change.dims.in_, change.rank)
            costs = cost_model.costs(*layer_size, tokens, weight.dtype, training)
            costs_and_paths.setdefault(layer_size, (costs, []))[1].append(path)
            if layer_adapter.shared_input_layers is not None:
                group_paths.setdefault(id(layer_adapter.shared_input_layers), []).append(path)
        rows = tuple(
            (layer_size, tuple(paths), costs)
            for layer_size, (costs, paths) in costs_and_paths.items()
        )
        return CallPlan(tokens, training, rows, tuple(map(tuple, group_paths.values())))
