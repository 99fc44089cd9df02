"""The cost of an adapter: how many numbers it trains, per kind of layer, in bytes and in percent;
and what its linear layers add to a call."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from veneer.attach.adapted_module import weight_of
from veneer.attach.lookup import adapters, changes, need_adapters, only_name, unwrap
from veneer.attach.targets import Names, left_out_of_word
from veneer.bases import storage_of
from veneer.kernels import cost_model


@dataclass(frozen=True)
class Row:
    """One kind of layer: how many of them, their trained numbers and bytes."""

    kind: str
    layers: int
    parameters: int
    bytes: int


@dataclass(frozen=True)
class Summary:
    """``trainable`` numbers of an adapter against the ``total`` of the base. ``left_out``: the
    layers with matrices that targets="all-linear" does not mean, by type, or an empty text.
    ``is_default``: ``veneer.set_default`` has made it the model's default."""

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
            f" {size(row.bytes):>10}"
            for row in self.rows
        ]
        share = f"{self.percent:.3f} % of the base's {self.total:,}"
        total = f"  trains {self.trainable:,} numbers ({size(self.bytes)}), {share}"
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
    weights once, and no adapter."""
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
        _numbers(p) for path, p in model.named_parameters() if "veneer" not in path.split(".")
    )
    attached = need_adapters(model, name)
    left_out = left_out_of_word(Names(model), attached.configs[name])
    return Summary(
        name,
        rows,
        sum(row.parameters for row in rows),
        total,
        sum(row.bytes for row in rows),
        left_out,
        attached.default_name == name,
    )


def _numbers(weight: nn.Parameter) -> int:
    """How many numbers a weight means, of which a packed one keeps several in an element."""
    storage = storage_of(weight)
    return weight.numel() if storage is None else storage.shape(weight).numel()


def size(count: float) -> str:
    """A number of bytes for people, in powers of 1024."""
    power = next((power for power in range(3) if count < 1024 ** (power + 1)), 3)
    return f"{count / 1024**power:,.{min(power, 1)}f} {('B', 'KiB', 'MiB', 'GiB')[power]}"


@dataclass(frozen=True)
class CallPlan:
    """How linear layers compute a call of some tokens: for each (out, in, rank) the layers and both
    paths' costs."""

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


def call_plan(model: nn.Module, name: str | None, tokens: int, training: bool) -> CallPlan:
    """The plan that ``Handle.plan`` returns."""
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
