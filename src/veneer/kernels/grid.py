"""The grid of a quantised weight: the numbers that it can represent, each a level times a scale.

    W[o, i] ∈ { (level - zero[o, i]) · scale[o, i] : level among the n ≤ 256 levels }

The levels are integers or the numbers of a table, and the same for all elements. A quantised weight
stores one scale for each row or block of elements; here, it is expanded to the weight's shape.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class Grid:
    """The numbers (level - ``zero``) · ``scale`` that each element of a quantised weight can hold.
    They are computed in float32, as when the weight is dequantised.

    Fields:
        levels: [n], float32, in ascending order.
        scale, zero: float32, of the weight's shape. A ``zero`` of None counts as 0.
    """

    levels: Float[Tensor, " n"]
    scale: Tensor
    zero: Tensor | None = None

    def map_tensors(self, reshape: Callable[[Tensor], Tensor]) -> Grid:
        """The grid of the weight ``reshape(weight)``: ``reshape``, such as a transposition or a
        slice, is applied to ``scale`` and ``zero``. The levels are the same."""
        return Grid(
            self.levels, reshape(self.scale), None if self.zero is None else reshape(self.zero)
        )

    def find_neighbours(self, values: Tensor, mid: Tensor, half: Tensor) -> None:
        """Find, for each element of ``values`` (float64, of the weight's shape), the nearest number
        of the grid and the next number on the other side of the value. Writes half of the signed
        difference (nearest - other) to ``half``, and the mean of the two minus the value to
        ``mid``. Both are 0 for a value on the grid. A value beyond the largest or smallest number
        of the grid has this number as both neighbours."""
        levels, scale = self.levels.double(), self.scale
        scaled_values = torch.where(scale == 0, 0.0, values / scale)
        scaled_values = scaled_values if self.zero is None else scaled_values + self.zero
        nearest_index = torch.bucketize(scaled_values, (levels[1:] + levels[:-1]) / 2)
        nearest = self._dequantise(nearest_index)
        second_index = nearest_index + ((values - nearest).sign() * scale.sign()).long()
        second = self._dequantise(second_index.clamp_(0, len(levels) - 1))
        torch.add(nearest, second, out=mid).mul_(0.5).sub_(values)
        torch.sub(nearest, second, out=half).mul_(0.5)

    def _dequantise(self, level_index: Tensor) -> Tensor:
        level = self.levels[level_index]
        return ((level if self.zero is None else level - self.zero) * self.scale).double()
