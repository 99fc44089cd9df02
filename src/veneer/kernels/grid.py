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
    """``levels`` [n] are in ascending order; ``scale``, and ``zero`` if it is not None, have the
    weight's shape. All are float32. Levels are multiplied by scales in float32, as when the weight
    is dequantised."""

    levels: Float[Tensor, " n"]
    scale: Tensor
    zero: Tensor | None = None

    def map_tensors(self, reshape: Callable[[Tensor], Tensor]) -> Grid:
        """The grid of a reshaped weight: ``reshape`` is applied to ``scale`` and ``zero``."""
        return Grid(
            self.levels, reshape(self.scale), None if self.zero is None else reshape(self.zero)
        )

    def find_neighbours(self, values: Tensor, mid: Tensor, half: Tensor) -> None:
        """Find the two neighbours on the grid of each element of ``values``, a float64 tensor of
        the weight's shape. Writes half of their (signed) distance to ``half`` and their mean minus
        the value to ``mid``. Both are 0 for a value on the grid. Beyond the largest or smallest
        number of the grid, that number is both neighbours."""
        levels, scale = self.levels.double(), self.scale
        scaled = torch.where(scale == 0, 0.0, values / scale)
        scaled = scaled if self.zero is None else scaled + self.zero
        nearest_index = torch.bucketize(scaled, (levels[1:] + levels[:-1]) / 2)
        nearest = self._dequantise(nearest_index)
        second_index = nearest_index + ((values - nearest).sign() * scale.sign()).long()
        second = self._dequantise(second_index.clamp_(0, len(levels) - 1))
        torch.add(nearest, second, out=mid).mul_(0.5).sub_(values)
        torch.sub(nearest, second, out=half).mul_(0.5)

    def _dequantise(self, level_index: Tensor) -> Tensor:
        level = self.levels[level_index]
        return ((level if self.zero is None else level - self.zero) * self.scale).double()
