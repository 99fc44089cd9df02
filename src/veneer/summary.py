"""How many numbers an adapter trains: per kind of layer, in bytes and in percent."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from veneer.attach import adapters, only_name, unwrap


@dataclass(frozen=True)
class Row:
    """One kind of layer: how many of them, their trained numbers and bytes."""

    kind: str
    layers: int
    parameters: int
    bytes: int


@dataclass(frozen=True)
class Summary:
    """``trainable`` numbers of an adapter against the ``total`` of the base."""

    adapter: str
    rows: tuple[Row, ...]
    trainable: int
    total: int
    bytes: int

    @property
    def percent(self) -> float:
        return 100 * self.trainable / self.total if self.total else 0.0

    def __str__(self) -> str:
        width = max(len(row.kind) for row in self.rows) if self.rows else 0
        lines = [
            f"  {row.kind:<{width}}  {row.layers:>5} layers  {row.parameters:>13,} numbers  {size(row.bytes):>10}"
            for row in self.rows
        ]
        share = f"{self.percent:.3f} % of the base's {self.total:,}"
        total = f"  trains {self.trainable:,} numbers ({size(self.bytes)}), {share}"
        return "\n".join([f"adapter {self.adapter!r}", *lines, total])


def summarise(model: nn.Module, name: str | None = None) -> Summary:
    """The summary of one adapter (None: the only one). The base's total leaves every adapter out and counts tied
    weights once."""
    model = unwrap(model)
    name = only_name(model, name)
    counts: dict[str, list[int]] = {}
    for _, _, adapter in adapters(model, name):
        for parameter in (*adapter._parameters.values(), *adapter.full.parameters()):
            if parameter is None:
                continue
            low = any(parameter is own for own in adapter._parameters.values())
            kind = f"{adapter.layer.name}, {adapter.variant.name}" if low else "trained in full"
            entry = counts.setdefault(kind, [0, 0, 0])
            entry[1] += parameter.numel()
            entry[2] += parameter.numel() * parameter.element_size()
        if adapter.layer is not None:
            counts[f"{adapter.layer.name}, {adapter.variant.name}"][0] += 1
        if any(True for _ in adapter.full.parameters()):
            counts["trained in full"][0] += 1
    rows = tuple(Row(kind, *numbers) for kind, numbers in counts.items())
    total = sum(p.numel() for path, p in model.named_parameters() if "veneer" not in path.split("."))
    return Summary(name, rows, sum(row.parameters for row in rows), total, sum(row.bytes for row in rows))


def size(count: float) -> str:
    """A number of bytes for people, in powers of 1024."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            return f"{count:,.0f} {unit}" if unit == "B" else f"{count:,.1f} {unit}"
        count /= 1024
    raise AssertionError("unreachable")
