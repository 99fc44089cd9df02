"""What an extraction did, in numbers and in a short text."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from veneer.errors import listing
from veneer.tools.report_text import rank_range


@dataclass(frozen=True)
class Extracted:
    """One weight whose change was written as a product.

    Fields:
        path, dims: the weight's path, and the (groups, out, in) of its change.
        rank: of the product.
        change: ‖ΔW‖, and ``relative`` is ‖ΔW‖ / ‖W‖.
        error: ‖ΔW − BA‖ / ‖ΔW‖, measured with the factors as they were written.
        method: how the directions were found, "exact" or "randomised".
        seconds: reading and factoring.
    """

    path: str
    dims: tuple[int, int, int]
    rank: int
    change: float
    relative: float
    error: float
    method: str
    seconds: float

    @property
    def kept(self) -> float:
        """The share of ‖ΔW‖² that the product keeps."""
        return max(0.0, 1 - self.error**2)

    @property
    def numbers(self) -> int:
        """How many numbers the product has."""
        groups, out, in_ = self.dims
        return groups * self.rank * (out + in_)

    @property
    def large(self) -> bool:
        """Whether the product has at least as many numbers as the weight itself."""
        return self.numbers >= math.prod(self.dims)


@dataclass(frozen=True)
class Kept:
    """One parameter (or buffer) that was written whole. ``change`` is the norm of its change."""

    path: str
    numbers: int
    change: float
    why: str


@dataclass(frozen=True)
class Lost:
    """One parameter (or buffer) that changed and is not in the adapter. ``change`` is the norm of its change."""

    path: str
    change: float
    why: str


@dataclass(frozen=True)
class ExtractReport:
    """What an extraction wrote. ``str(report)`` is a short text for people, ``to_dict`` plain JSON values.

    Fields:
        path: the adapter's folder.
        layers, whole, lost: what became of each parameter that changed.
        unchanged: how many parameters and buffers did not.
        unread: tensors of the tuned model's files that are no part of the model.
        least: the share of ‖ΔW‖² below which a layer counts as lossy.
        seconds: all in all.
    """

    path: Path
    layers: tuple[Extracted, ...]
    whole: tuple[Kept, ...]
    lost: tuple[Lost, ...]
    unchanged: int
    unread: tuple[str, ...]
    least: float
    seconds: float

    @property
    def kept(self) -> float:
        """The share of ‖ΔW‖², over everything that changed, that the adapter holds."""
        gone = sum((layer.error * layer.change) ** 2 for layer in self.layers)
        gone += sum(entry.change**2 for entry in self.lost)
        all_ = sum(entry.change**2 for entry in (*self.layers, *self.whole, *self.lost))
        return 1 - gone / all_ if all_ else 1.0

    @property
    def lossy(self) -> tuple[Extracted, ...]:
        """The layers that keep less than ``least`` of their change."""
        return tuple(layer for layer in self.layers if layer.kept < self.least)

    @property
    def numbers(self) -> int:
        """How many numbers the adapter holds."""
        return sum(entry.numbers for entry in (*self.layers, *self.whole))

    def to_dict(self) -> dict[str, Any]:
        return {
            "path": str(self.path),
            "kept": self.kept,
            "numbers": self.numbers,
            "unchanged": self.unchanged,
            "seconds": self.seconds,
            "lossy": [layer.path for layer in self.lossy],
            "layers": [{**asdict(layer), "kept": layer.kept, "numbers": layer.numbers} for layer in self.layers],
            "whole": [asdict(entry) for entry in self.whole],
            "lost": [asdict(entry) for entry in self.lost],
            "unread": list(self.unread),
        }

    def __str__(self) -> str:
        lines = [f"{self.kept:.2%} of the change in {self.numbers:,} numbers, written to {self.path}"]
        if self.layers:
            worst = min(self.layers, key=lambda layer: layer.kept)
            rank = rank_range(layer.rank for layer in self.layers)
            lines.append(
                f"{len(self.layers)} weights as products of {rank}; the worst, {worst.path}, keeps {worst.kept:.2%}"
            )
        if self.whole:
            lines.append(f"{len(self.whole)} whole: {listing((entry.path for entry in self.whole), 3)}")
        if self.lossy:
            do = 'keep="lossy" writes them whole; a larger rank keeps more'
            paths = listing((layer.path for layer in self.lossy), 3)
            lines.append(f"{len(self.lossy)} keep less than {self.least:.0%} of their change: {paths} ({do})")
        if large := [layer.path for layer in self.layers if layer.large]:
            lines.append(f"{len(large)} need no fewer numbers as products than whole: {listing(large, 3)}")
        for why in dict.fromkeys(entry.why for entry in self.lost):
            paths = [entry.path for entry in self.lost if entry.why == why]
            lines.append(f"LOST: {len(paths)} that changed ({why}): {listing(paths, 3)}")
        lines.append(f"{self.unchanged} did not change; {self.seconds:.1f} s")
        return "\n".join(lines)
