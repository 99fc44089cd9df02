"""The size of an adapter: its trained parameters per kind of layer, in bytes and in percent of the
base; and the cost of a call of its linear layers."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from veneer.attach.layer.lookup import adapters, changes, need_adapters, only_name, unwrap
from veneer.attach.layer.names import Names
from veneer.attach.planning.targets import layers_left_out
from veneer.bases import storage_of, weight_of
from veneer.errors import format_bytes
from veneer.kernels import cost_model


@dataclass(frozen=True)
class Row:
    """One kind of layer: the number of layers, of trained parameters, and of bytes."""

    kind: str
    layers: int
    parameters: int
    bytes: int


@dataclass(frozen=True)
class Summary:
    """The size of an adapter.

    Fields:
        trainable: the number of trained parameters.
        total: the number of parameters of the base.
        bytes: the size of the trained parameters.
        left_out: the layers with matrices that targets="all-linear" leaves out, by type; or "".
        is_default: whether it is the model's default adapter (``veneer.set_default``).
    """

    adapter: str
    rows: tuple[Row, ...]
    trainable: int
    total: int
    bytes: int
    left_out: str = ""
    is_default: bool = False

    @property
    def percent(self) -> float:
        return 100 * self.trainable / self.total if self.total else 0.0

    def __str__(self) -> str:
        width = max(len(row.kind) for row in self.rows) if self.rows else 0
        lines = [
            f"  {row.kind:<{width}}  {row.layers:>5} layers  {row.parameters:>13,} numbers "
            f" {format_bytes(row.bytes):>10}"
            for row in self.rows
        ]
        share = f"{self.percent:.3f} % of the base's {self.total:,}"
        total = f"  trains {self.trainable:,} numbers ({format_bytes(self.bytes)}), {share}"
        default = ", the model's default" if self.is_default else ""
        lines = [f"adapter {self.adapter!r}{default}", *lines, total]
        if self.left_out:
            lines.append(
                f'  "all-linear" leaves out {self.left_out}: name them in targets, or use'
                ' targets="all"'
            )
        return "\n".join(lines)


def summarise(model: nn.Module, name: str | None = None) -> Summary:
    """The summary of one adapter (None: the default, or the only one). The base's total counts tied
    weights once and leaves adapters out."""
    model = unwrap(model)
    name = only_name(model, name)
    counts: dict[str, list[int]] = {}
    counted: set[int] = set()  # tied parameters have one copy

    def count(kind: str, parameters: Iterable[nn.Parameter]) -> None:
        uncounted = [p for p in parameters if id(p) not in counted]
        counted.update(map(id, uncounted))
        if uncounted:
            entry = counts.setdefault(kind, [0, 0, 0])
            entry[0] += 1
            entry[1] += sum(p.numel() for p in uncounted)
            entry[2] += sum(p.numel() * p.element_size() for p in uncounted)

    for _, module, weight, change in changes(model, name):
        stored = (
            ""
            if change.storage.name == "plain"
            else f" ({change.storage.label(weight_of(module, weight))})"
        )
        count(f"{change.layer.name}{stored}, {change.variant.name}", change.parameters())
    for _, _, layer in adapters(model, name):
        count("trained in full", layer.full.parameters())
    rows = tuple(Row(kind, *numbers) for kind, numbers in counts.items())
    total = sum(
        _element_count(p) for path, p in model.named_parameters() if "veneer" not in path.split(".")
    )
    attached = need_adapters(model, name)
    left_out = layers_left_out(Names(model), attached.configs[name])
    return Summary(
        name,
        rows,
        sum(row.parameters for row in rows),
        total,
        sum(row.bytes for row in rows),
        left_out,
        attached.default_name == name,
    )


def _element_count(weight: nn.Parameter) -> int:
    """The number of elements of a weight; a packed one stores several in one element."""
    storage = storage_of(weight)
    return weight.numel() if storage is None else storage.shape(weight).numel()


@dataclass(frozen=True)
class CallPlan:
    """How the linear layers compute a call of a number of tokens.

    Fields:
        rows: ((out, in, rank), the paths of the layers of that size, the costs of both paths).
        together: groups of layers that read the same input and are computed together.
    """

    tokens: int
    training: bool
    rows: tuple[tuple[tuple[int, int, int], tuple[str, ...], cost_model.Costs], ...]
    together: tuple[tuple[str, ...], ...]

    def __str__(self) -> str:
        call = "a training step" if self.training else "inference"
        lines = [f"{call} of {self.tokens} tokens, by the cost model"]
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
        """The plan of a call of the adapter ``name`` (None: the default, or the only one)."""
        model = unwrap(model)
        rows: dict[tuple[int, int, int], tuple[cost_model.Costs, list[str]]] = {}
        groups: dict[int, list[str]] = {}
        for path, module, layer in adapters(model, only_name(model, name)):
            if layer.direct is None:
                continue
            change, weight = layer.direct.change, module._parameters[layer.direct.weight]
            size = (change.dims.out, change.dims.in_, change.rank)
            costs = cost_model.costs(*size, tokens, weight.dtype, training)
            rows.setdefault(size, (costs, []))[1].append(path)
            if layer.together is not None:
                groups.setdefault(id(layer.together), []).append(path)
        by_size = tuple((size, tuple(paths), costs) for size, (costs, paths) in rows.items())
        return CallPlan(tokens, training, by_size, tuple(map(tuple, groups.values())))
