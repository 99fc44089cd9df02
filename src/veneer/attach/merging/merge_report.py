"""The report of a merge: the change of each weight, as values and as text."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass


@dataclass(frozen=True)
class LayerMerge:
    """The effect of a merge on one parameter.

    Fields:
        path: the path of the parameter.
        change: ‖ΔW‖ / ‖W‖ (Frobenius norms), where ΔW is the exact change of the weight, including
            the effect of a gain.
        retention: the share of ΔW that survives in the rounded weight W', ⟨ΔW, W' − W⟩ / ‖ΔW‖²; 1
            is ideal.
        rounding: "nearest", "faithful" (see ``merge``), or "storage" (by the rule of the weight's
            storage).
        nearest: the retention that rounding to nearest would give. If ``rounding`` is "storage",
            the same as ``retention``.
    """

    path: str
    change: float
    retention: float
    rounding: str
    nearest: float


@dataclass(frozen=True)
class MergeReport:
    """The effect of a merge: the name of the merged adapter, and a ``LayerMerge`` for each changed
    parameter. ``str(report)`` is a short text."""

    adapter: str
    layers: tuple[LayerMerge, ...]

    @property
    def retention(self) -> float:
        """The smallest share of a parameter's change that survived rounding; 1.0 if nothing
        changed."""
        return min((layer.retention for layer in self.layers), default=1.0)

    @property
    def summary(self) -> str:
        """One sentence: how many parameters changed, and the share of the change that survived
        rounding."""
        worst_layer = min(self.layers, key=lambda layer: layer.retention, default=None)
        if worst_layer is None:
            return f"merged {self.adapter!r}: nothing to change"
        median = sorted(layer.retention for layer in self.layers)[len(self.layers) // 2]
        rounding_counts = Counter(layer.rounding for layer in self.layers)
        nearest_retentions = sorted(
            layer.nearest for layer in self.layers if layer.rounding == "faithful"
        )
        comparison = (
            f" (to nearest: {nearest_retentions[len(nearest_retentions) // 2]:.2%})"
            if nearest_retentions
            else ""
        )
        descriptions = {
            "faithful": f"rounded faithfully{comparison}",
            "storage": "rounded as their storage does",
        }
        special_roundings = "".join(
            f"; {rounding_counts[rounding]} {description}"
            for rounding, description in descriptions.items()
            if rounding_counts[rounding]
        )
        return (
            f"merged {self.adapter!r} into {len(self.layers)} parameters: {median:.2%} of the"
            f" change kept after rounding (median), {worst_layer.retention:.2%} at worst"
            f" ({worst_layer.path}, where it is {worst_layer.change:.1e} of the"
            f" weight){special_roundings}"
        )

    def __str__(self) -> str:
        if not self.layers:
            return self.summary
        detach_hint = "handle.detach(keep_merged=True) leaves a plain one with these weights"
        return (
            f"{self.summary}\nthe model is still attached; {detach_hint}, which other libraries can"
            " save and quantise"
        )
