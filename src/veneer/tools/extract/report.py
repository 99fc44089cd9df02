"""The report of an extraction, as numbers and as readable text."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from veneer.errors import listing
from veneer.tools.report_text import rank_range


@dataclass(frozen=True)
class Extracted:
    """One weight whose change was written as a low-rank product."""

    path: str
    dims: tuple[int, int, int]  # (g, out, in) of the change; g: the number of its matrices
    rank: int
    change: float  # ‖ΔW‖
    relative: float  # ‖ΔW‖ / ‖W‖
    error: float  # ‖ΔW − BA‖ / ‖ΔW‖, with the factors in the dtype that is written
    method: str  # how the singular vectors were computed: "exact" or "randomised"
    seconds: float  # duration of reading and factoring

    @property
    def kept(self) -> float:
        """The share of ‖ΔW‖² that the product keeps."""
        return max(0.0, 1 - self.error**2)

    @property
    def numbers(self) -> int:
        """The number of elements of both factors."""
        groups, out, in_ = self.dims
        return groups * self.rank * (out + in_)

    @property
    def large(self) -> bool:
        """Whether the factors have at least as many elements as the weight."""
        return self.numbers >= math.prod(self.dims)


@dataclass(frozen=True)
class Kept:
    """One parameter or buffer that was written in full. ``numbers``: how many elements it has;
    ``change``: ‖ΔW‖; ``why``: the reason for writing it in full."""

    path: str
    numbers: int
    change: float
    why: str


@dataclass(frozen=True)
class Lost:
    """One changed parameter or buffer that was not written. ``change``: ‖ΔW‖; ``why``: the reason
    for not writing it."""

    path: str
    change: float
    why: str


@dataclass(frozen=True)
class ExtractReport:
    """The result of ``extract``; ``str(report)`` is readable text."""

    path: Path
    layers: tuple[Extracted, ...]  # changed weights that were written as products
    whole: tuple[Kept, ...]  # changed parameters that were written in full
    lost: tuple[Lost, ...]  # changed parameters that were not written
    unchanged: int  # how many parameters and buffers did not change
    unread: tuple[str, ...]  # names in the tuned model's files that no parameter of the model has
    least: float  # the share of ‖ΔW‖² below which a product counts as lossy
    seconds: float  # duration of the extraction

    @property
    def kept(self) -> float:
        """The share of ‖ΔW‖² that the adapter holds, over all changed parameters and buffers."""
        lost_energy = sum((layer.error * layer.change) ** 2 for layer in self.layers)
        lost_energy += sum(entry.change**2 for entry in self.lost)
        total_energy = sum(entry.change**2 for entry in (*self.layers, *self.whole, *self.lost))
        return 1 - lost_energy / total_energy if total_energy else 1.0

    @property
    def lossy(self) -> tuple[Extracted, ...]:
        """The weights whose product keeps a smaller share of ‖ΔW‖² than ``least``."""
        return tuple(layer for layer in self.layers if layer.kept < self.least)

    @property
    def numbers(self) -> int:
        """The number of elements in the adapter."""
        return sum(entry.numbers for entry in (*self.layers, *self.whole))

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON values."""
        return {
            "path": str(self.path),
            "kept": self.kept,
            "numbers": self.numbers,
            "unchanged": self.unchanged,
            "seconds": self.seconds,
            "lossy": [layer.path for layer in self.lossy],
            "layers": [
                {**asdict(layer), "kept": layer.kept, "numbers": layer.numbers}
                for layer in self.layers
            ],
            "whole": [asdict(entry) for entry in self.whole],
            "lost": [asdict(entry) for entry in self.lost],
            "unread": list(self.unread),
        }

    def __str__(self) -> str:
        lines = [
            f"{self.kept:.2%} of the change in {self.numbers:,} numbers, written to {self.path}"
        ]
        if self.layers:
            worst_layer = min(self.layers, key=lambda layer: layer.kept)
            ranks_text = rank_range(layer.rank for layer in self.layers)
            products_text = f"{len(self.layers)} weights as products of {ranks_text}"
            worst_text = f"the worst, {worst_layer.path}, keeps {worst_layer.kept:.2%}"
            lines.append(f"{products_text}; {worst_text}")
        if self.whole:
            lines.append(
                f"{len(self.whole)} whole: {listing((entry.path for entry in self.whole), 3)}"
            )
        if self.lossy:
            fix = 'keep="lossy" writes them whole; a larger rank keeps more'
            lossy_paths = listing((layer.path for layer in self.lossy), 3)
            lines.append(
                f"{len(self.lossy)} keep less than {self.least:.0%} of their change:"
                f" {lossy_paths} ({fix})"
            )
        if large_paths := [layer.path for layer in self.layers if layer.large]:
            lines.append(
                f"{len(large_paths)} need no fewer numbers as products than whole:"
                f" {listing(large_paths, 3)}"
            )
        for reason in dict.fromkeys(entry.why for entry in self.lost):
            lost_paths = [entry.path for entry in self.lost if entry.why == reason]
            lines.append(
                f"LOST: {len(lost_paths)} that changed ({reason}): {listing(lost_paths, 3)}"
            )
        lines.append(f"{self.unchanged} did not change; {self.seconds:.1f} s")
        return "\n".join(lines)
