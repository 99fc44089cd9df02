"""What a merge did to each weight, as values and as a text for people."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass


@dataclass(frozen=True)
class LayerMerge:
    """What a merge did to one parameter: ``change`` is ‖ΔW‖ / ‖W‖, ``retention`` the share of ΔW
    that the rounded weight realises, ``rounding`` how that was rounded: "nearest", "faithful", or
    "storage" (its own way). ``nearest`` is the share that rounding to nearest (or the storage's own
    way) realises."""

    path: str
    change: float
    retention: float
    rounding: str
    nearest: float


@dataclass(frozen=True)
class MergeReport:
    """What a merge did. ``str(report)`` is a short text for people."""

    adapter: str
    layers: tuple[LayerMerge, ...]

    @property
    def retention(self) -> float:
        """The worst layer's share of the change that survived rounding; 1.0 where nothing
        changed."""
        return min((layer.retention for layer in self.layers), default=1.0)

    @property
    def summary(self) -> str:
        """How many parameters changed, and how much of the change survived rounding: a sentence for
        people."""
        worst = min(self.layers, key=lambda layer: layer.retention, default=None)
        if worst is None:
            return f"merged {self.adapter!r}: nothing to change"
        median = sorted(layer.retention for layer in self.layers)[len(self.layers) // 2]
        counts = Counter(layer.rounding for layer in self.layers)
        usual = sorted(layer.nearest for layer in self.layers if layer.rounding == "faithful")
        usually = f" (to nearest: {usual[len(usual) // 2]:.2%})" if usual else ""
        words = {
            "faithful": f"rounded faithfully{usually}",
            "storage": "rounded as their storage does",
        }
        others = "".join(f"; {counts[name]} {text}" for name, text in words.items() if counts[name])
        return (
            f"merged {self.adapter!r} into {len(self.layers)} parameters: {median:.2%} of the"
            f" change kept after rounding (median), {worst.retention:.2%} at worst ({worst.path},"
            f" where it is {worst.change:.1e} of the weight){others}"
        )

    def __str__(self) -> str:
        if not self.layers:
            return self.summary
        plain = "handle.detach(keep_merged=True) leaves a plain one with these weights"
        return (
            f"{self.summary}\nthe model is still attached; {plain}, which other libraries can save"
            " and quantise"
        )
