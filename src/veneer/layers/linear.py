"""``nn.Linear``: y = x Wᵀ + bias, weight [out, in]."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn, randn

from veneer.kernels import reference
from veneer.layers._base import Layer, register
from veneer.lowrank import LowRank


@register
class Linear(Layer):
    name = "linear"
    linear = True
    product = True

    def types(self) -> tuple[type[nn.Module], ...]:
        return (nn.Linear,)

    def op(self, module: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, weight, bias)

    def update(self, module: Any, x: Tensor, low: LowRank, y: Tensor | None) -> Tensor:
        return reference.matmul_update(x, low.A[0], low.B[0], low.scale, y)

    def inputs(self, module: Any, weight: str, args: tuple) -> Tensor:
        return args[0].reshape(1, -1, args[0].shape[-1])

    def examples(self) -> Iterator[tuple[nn.Module, Tensor]]:
        yield nn.Linear(7, 5), randn(3, 4, 7)
        yield nn.Linear(6, 9, bias=False), randn(6)
