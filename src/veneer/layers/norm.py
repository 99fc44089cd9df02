"""The layer, group, batch, instance and RMS norms of torch. Their weight is a vector.

A low-rank change of a vector would not be smaller than the vector, so the weight is trained at its
full shape, and a rank has no meaning. The adapter gets its own copies of running statistics. Norms
of other libraries are of the general kind (``parameter.py``), which does the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn, randn

from veneer.layers._base import Layer, register


@register
class Norm(Layer):
    name = "norm"

    def types(self) -> tuple[type[nn.Module], ...]:
        return (
            nn.LayerNorm,
            nn.RMSNorm,
            nn.GroupNorm,
            nn.modules.batchnorm._BatchNorm,
            nn.modules.instancenorm._InstanceNorm,
        )

    def weights(self, module: Any) -> tuple[str, ...]:
        return ()

    def vectors(self, module: Any) -> tuple[str, ...]:
        return ("weight",) if module._parameters.get("weight") is not None else ()

    def examples(self) -> Iterator[tuple[nn.Module, Any]]:
        yield nn.LayerNorm(6), randn(3, 6)
        yield nn.LayerNorm([2, 6], bias=False), randn(3, 2, 6)
        yield nn.RMSNorm(6), randn(3, 6)
        yield nn.GroupNorm(2, 6), randn(3, 6, 4)
        yield nn.BatchNorm1d(6), randn(5, 6)
        yield nn.BatchNorm2d(3), randn(4, 3, 5, 5)
        yield nn.InstanceNorm1d(3, affine=True), randn(4, 3, 5)
