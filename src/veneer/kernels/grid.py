"""The grid of a quantised weight: the values that integers, or codes of a table, times a scale can
represent.

    W[o, i] ∈ { (level - zero[o, i]) · scale[o, i] }
    level: one of n ≤ 256, shared by all values

A stored scale belongs to a row or a block of values; here it is expanded to the weight's shape.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class Grid:
    """``levels`` [n] ascend; ``scale`` (and ``zero`` if given) has the weight's shape. All are
    float32, and so is their product, as when such a weight is read."""

    levels: Float[Tensor, " n"]
    scale: Tensor
    zero: Tensor | None = None

    def map_tensors(self, change: Callable[[Tensor], Tensor]) -> Grid:
        """The same grid for a reshaped weight; ``change`` reshapes its tensors."""
        return Grid(
            self.levels, change(self.scale), None if self.zero is None else change(self.zero)
        )

    def cells(self, value: Tensor, mid: Tensor, half: Tensor) -> None:
        """Find the cell of the grid that contains each float64 ``value`` of a tensor of the
        weight's shape. ``half`` gets half the cell's width (with either sign), ``mid`` its middle
        minus the value; both are 0 for a value on the grid. Beyond the largest or smallest value of
        the grid, the cell is that value alone."""
        levels, scale = self.levels.double(), self.scale
        scaled = torch.where(scale == 0, 0.0, value / scale)
        scaled = scaled if self.zero is None else scaled + self.zero
        nearest = torch.bucketize(scaled, (levels[1:] + levels[:-1]) / 2)
        nearest_number = self._numbers(nearest)
        neighbour = nearest + ((value - nearest_number).sign() * scale.sign()).long()
        next_number = self._numbers(neighbour.clamp_(0, len(levels) - 1))
        torch.add(nearest_number, next_number, out=mid).mul_(0.5).sub_(value)
        torch.sub(nearest_number, next_number, out=half).mul_(0.5)

    def _numbers(self, index: Tensor) -> Tensor:
        level = self.levels[index]
        return ((level if self.zero is None else level - self.zero) * self.scale).double()
