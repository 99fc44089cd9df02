"""The report of a merge: the change of each weight, as values and as text."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass


@dataclass(frozen=True)
class LayerMerge:
    """The effect of a merge on one parameter.

    Fields:
        change: ‖ΔW‖ / ‖W‖.
        retention: the share of ΔW that the rounded weight realises.
        rounding: "nearest", "faithful", or "storage" (the storage's own rule).
        nearest: the share of ΔW that rounding to nearest (or the storage's own rule) realises.
    """

    path: str
    change: float
    retention: float
    rounding: str
    nearest: float


@dataclass(frozen=True)
class MergeReport:
    """The effect of a merge on all parameters. ``str(report)`` is a short text."""

    adapter: str
    layers: tuple[LayerMerge, ...]

    @property
    def retention(self) -> float:
        """The smallest share of a change that survived rounding; 1.0 if nothing changed."""
        return min((layer.retention for layer in self.layers), default=1.0)

    @property
    def summary(self) -> str:
        """One sentence: how many parameters changed, and the share of the change that survived
        rounding."""
        worst = min(self.layers, key=lambda layer: layer.retention, default=None)
        if worst is None:
            return f"merged {self.adapter!r}: nothing to change"
        median = sorted(layer.retention for layer in self.layers)[len(self.layers) // 2]
        counts = Counter(layer.rounding for layer in self.layers)
        nearest = sorted(layer.nearest for layer in self.layers if layer.rounding == "faithful")
        compared = f" (to nearest: {nearest[len(nearest) // 2]:.2%})" if nearest else ""
        words = {
            "faithful": f"rounded faithfully{compared}",
            "storage": "rounded as their storage does",
        }
        special_roundings = "".join(
            f"; {counts[name]} {text}" for name, text in words.items() if counts[name]
        )
        return (
            f"merged {self.adapter!r} into {len(self.layers)} parameters: {median:.2%} of the"
            f" change kept after rounding (median), {worst.retention:.2%} at worst ({worst.path},"
            f" where it is {worst.change:.1e} of the weight){special_roundings}"
        )

    def __str__(self) -> str:
        if not self.layers:
            return self.summary
        plain = "handle.detach(keep_merged=True) leaves a plain one with these weights"
        return (
            f"{self.summary}\nthe model is still attached; {plain}, which other libraries can save"
            " and quantise"
        )
